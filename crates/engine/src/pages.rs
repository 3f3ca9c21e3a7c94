//! A table of small records by index, in pages made when first touched: a million records cost what they weigh, and
//! growing never copies. Decides where a record lies. Knows nothing of what a record means.

const PER_PAGE: usize = 256;

/// Records of `T`; one never touched reads as `T::default()`.
#[derive(Debug)]
pub(crate) struct Pages<T> {
    pages: Vec<Option<Box<[T]>>>,
}

impl<T: Copy + Default> Pages<T> {
    pub(crate) fn new() -> Pages<T> {
        Pages { pages: Vec::new() }
    }

    /// The record at `index`, or a default one.
    pub(crate) fn read(&self, index: u32) -> T {
        let (page, place) = split(index);
        self.pages.get(page).and_then(Option::as_ref).map_or_else(T::default, |records| records[place])
    }

    /// Replace the record at `index`.
    pub(crate) fn write(&mut self, index: u32, record: T) {
        let (page, place) = split(index);
        if page >= self.pages.len() {
            self.pages.resize_with(page + 1, || None);
        }
        let records = self.pages[page].get_or_insert_with(|| vec![T::default(); PER_PAGE].into_boxed_slice());
        records[place] = record;
    }

    /// One past the highest index that may have a record.
    pub(crate) fn end(&self) -> u32 {
        (self.pages.len() * PER_PAGE) as u32
    }

    /// The first index from `index` on whose page exists, so that a walk skips what was never touched.
    pub(crate) fn skip_untouched(&self, index: u32) -> u32 {
        let (page, _) = split(index);
        match self.pages.iter().skip(page).position(Option::is_some) {
            Some(0) => index,
            Some(pages) => ((page + pages) * PER_PAGE) as u32,
            None => self.end(),
        }
    }

    /// Every record of every page made so far.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().flatten().flat_map(|records| records.iter())
    }
}

fn split(index: u32) -> (usize, usize) {
    (index as usize / PER_PAGE, index as usize % PER_PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_pages_cost_nothing_and_are_skipped() {
        let mut table: Pages<u64> = Pages::new();
        assert_eq!((table.read(7), table.end()), (0, 0));
        table.write(9 * PER_PAGE as u32 + 3, 5);
        assert_eq!(table.pages.iter().flatten().count(), 1);
        assert_eq!(table.skip_untouched(0), 9 * PER_PAGE as u32);
        assert_eq!(table.skip_untouched(9 * PER_PAGE as u32 + 1), 9 * PER_PAGE as u32 + 1);
        assert_eq!(table.skip_untouched(table.end()), table.end());
        assert_eq!((table.read(9 * PER_PAGE as u32 + 3), table.read(0)), (5, 0));
    }
}
