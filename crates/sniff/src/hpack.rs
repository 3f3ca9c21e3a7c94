//! Header fields out of a block that HPACK has packed (RFC 7541).
//!
//! Decides which fields stand in the first block of a connection. The dynamic table is empty then and holds what this
//! very block puts in; it is kept as places in the block, so nothing is copied. Knows no meaning of any field.

use crate::cursor::Cursor;
use crate::{Refusal, huffman};

/// A name or value as it stands in the block or in the static table.
#[derive(Clone, Copy)]
pub(crate) struct Text<'a> {
    raw: &'a [u8],
    packed: bool,
}

impl<'a> Text<'a> {
    const EMPTY: Self = Self { raw: b"", packed: false };

    /// Hand over each byte.
    pub(crate) fn each(self, mut each: impl FnMut(u8)) -> Result<(), Refusal> {
        if self.packed {
            return huffman::decode(self.raw, each);
        }
        self.raw.iter().for_each(|&byte| each(byte));
        Ok(())
    }

    pub(crate) fn size(self) -> Result<usize, Refusal> {
        let mut size = 0;
        self.each(|_| size += 1)?;
        Ok(size)
    }

    pub(crate) fn is(self, other: &[u8]) -> Result<bool, Refusal> {
        let (mut at, mut same) = (0, true);
        self.each(|byte| (at, same) = (at + 1, same && other.get(at) == Some(&byte)))?;
        Ok(same && at == other.len())
    }

    /// Unpack into the front of `space`.
    pub(crate) fn copy(self, space: &mut [u8]) -> Result<&mut [u8], Refusal> {
        let mut used = 0;
        self.each(|byte| {
            if let Some(place) = space.get_mut(used) {
                *place = byte;
            }
            used += 1;
        })?;
        space.get_mut(..used).ok_or(Refusal::TooLong)
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Field<'a> {
    pub(crate) name: Text<'a>,
    pub(crate) value: Text<'a>,
}

/// The fields of a block, one after the other.
pub(crate) struct Fields<'a> {
    block: Cursor<'a>,
    table: DynamicTable<'a>,
    began: bool,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(block: &'a [u8]) -> Self {
        Self { block: Cursor(block), table: DynamicTable::new(), began: false }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Field<'a>>, Refusal> {
        loop {
            let Some(&first) = self.block.0.first() else { return Ok(None) };
            if first & 0xe0 == 0x20 {
                // RFC 7541 4.2, 6.3: at the beginning of a block, and not above what SETTINGS allow.
                let most = self.integer(5)?;
                if self.began || most > TABLE_BYTES {
                    return Err(Refusal::Malformed);
                }
                self.table.resize(most);
                continue;
            }
            self.began = true;
            if first & 0x80 != 0 {
                let index = self.integer(7)?;
                return self.field(index).map(Some); // 6.1
            }
            let keep = first & 0x40 != 0; // 6.2.1; otherwise 6.2.2 or 6.2.3
            let index = self.integer(if keep { 6 } else { 4 })?;
            let name = if index == 0 { self.string()? } else { self.field(index)?.name };
            let field = Field { name, value: self.string()? };
            let size = field.name.size()? + field.value.size()? + 32; // 4.1
            if keep {
                self.table.insert(field, size);
            }
            return Ok(Some(field));
        }
    }

    /// The field at an index of static and dynamic table together (2.3.3).
    fn field(&self, index: usize) -> Result<Field<'a>, Refusal> {
        let place = index.checked_sub(1).ok_or(Refusal::Malformed)?;
        match STATIC_TABLE.get(place) {
            Some(&(name, value)) => {
                Ok(Field { name: Text { raw: name, packed: false }, value: Text { raw: value, packed: false } })
            }
            None => self.table.newest(place - STATIC_TABLE.len()).ok_or(Refusal::Malformed),
        }
    }

    /// An integer whose first part has so many bits (5.1).
    fn integer(&mut self, bits: u32) -> Result<usize, Refusal> {
        let most = (1usize << bits) - 1;
        let mut number = usize::from(self.block.u8()?) & most;
        if number < most {
            return Ok(number);
        }
        for shift in [0, 7, 14] {
            let byte = usize::from(self.block.u8()?);
            number += (byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Refusal::TooLong) // past two million: no block here is as long
    }

    /// A string, packed or not (5.2).
    fn string(&mut self) -> Result<Text<'a>, Refusal> {
        let packed = self.block.0.first().is_some_and(|byte| byte & 0x80 != 0);
        let count = self.integer(7)?;
        Ok(Text { raw: self.block.take(count)?, packed })
    }
}

/// Before the server has said anything, a client's table has 4,096 bytes (RFC 9113 6.5.2).
const TABLE_BYTES: usize = 4096;
/// Each entry counts 32 bytes more than its text.
const MOST_ENTRIES: usize = TABLE_BYTES / 32;

/// The newest entries, in a circle.
struct DynamicTable<'a> {
    entries: [(Field<'a>, usize); MOST_ENTRIES],
    next: usize,
    count: usize,
    bytes: usize,
    most_bytes: usize,
}

impl<'a> DynamicTable<'a> {
    fn new() -> Self {
        let empty = (Field { name: Text::EMPTY, value: Text::EMPTY }, 0);
        Self { entries: [empty; MOST_ENTRIES], next: 0, count: 0, bytes: 0, most_bytes: TABLE_BYTES }
    }

    fn newest(&self, place: usize) -> Option<Field<'a>> {
        (place < self.count).then(|| self.entries[(self.next + MOST_ENTRIES - 1 - place) % MOST_ENTRIES].0)
    }

    fn resize(&mut self, most_bytes: usize) {
        self.most_bytes = most_bytes;
        self.shrink(most_bytes);
    }

    /// An entry larger than the table empties it (4.4).
    fn insert(&mut self, field: Field<'a>, size: usize) {
        self.shrink(self.most_bytes.saturating_sub(size));
        if size <= self.most_bytes {
            self.entries[self.next] = (field, size);
            (self.next, self.count) = ((self.next + 1) % MOST_ENTRIES, self.count + 1);
            self.bytes += size;
        }
    }

    fn shrink(&mut self, most_bytes: usize) {
        while self.bytes > most_bytes {
            let oldest = (self.next + MOST_ENTRIES - self.count) % MOST_ENTRIES;
            self.bytes -= self.entries[oldest].1;
            self.count -= 1;
        }
    }
}

/// Appendix A.
#[rustfmt::skip]
const STATIC_TABLE: [(&[u8], &[u8]); 61] = [
    (b":authority", b""), (b":method", b"GET"), (b":method", b"POST"), (b":path", b"/"), (b":path", b"/index.html"),
    (b":scheme", b"http"), (b":scheme", b"https"), (b":status", b"200"), (b":status", b"204"), (b":status", b"206"),
    (b":status", b"304"), (b":status", b"400"), (b":status", b"404"), (b":status", b"500"), (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"), (b"accept-language", b""), (b"accept-ranges", b""), (b"accept", b""),
    (b"access-control-allow-origin", b""), (b"age", b""), (b"allow", b""), (b"authorization", b""),
    (b"cache-control", b""), (b"content-disposition", b""), (b"content-encoding", b""), (b"content-language", b""),
    (b"content-length", b""), (b"content-location", b""), (b"content-range", b""), (b"content-type", b""),
    (b"cookie", b""), (b"date", b""), (b"etag", b""), (b"expect", b""), (b"expires", b""), (b"from", b""),
    (b"host", b""), (b"if-match", b""), (b"if-modified-since", b""), (b"if-none-match", b""), (b"if-range", b""),
    (b"if-unmodified-since", b""), (b"last-modified", b""), (b"link", b""), (b"location", b""),
    (b"max-forwards", b""), (b"proxy-authenticate", b""), (b"proxy-authorization", b""), (b"range", b""),
    (b"referer", b""), (b"refresh", b""), (b"retry-after", b""), (b"server", b""), (b"set-cookie", b""),
    (b"strict-transport-security", b""), (b"transfer-encoding", b""), (b"user-agent", b""), (b"vary", b""),
    (b"via", b""), (b"www-authenticate", b""),
];
