//! Times in nanoseconds, counted log-linearly: 32 steps per octave, so every answer is within 1/32 of the truth.
//!
//! Decides how times are rounded. Knows nothing of what was timed. 15 KB each, allocated once, whatever is recorded.

/// Steps per octave as a power of two.
const STEP_BITS: u32 = 5;
const STEPS: usize = 1 << STEP_BITS;
/// Values below `STEPS` have a bucket each; every octave above has `STEPS` of them.
const BUCKETS: usize = (64 - STEP_BITS as usize + 1) * STEPS;
const _: () = assert!(BUCKETS * size_of::<u64>() <= 16 * 1024);

/// How often which time was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

impl Histogram {
    /// Nothing recorded.
    pub fn new() -> Histogram {
        Histogram { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    /// Count one value.
    pub fn record(&mut self, value: u64) {
        self.buckets[bucket_of(value)] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// How many values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The smallest, exactly; 0 if there is none.
    pub fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// The largest, exactly.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean, exactly (rounded down); 0 if there is none.
    pub fn mean(&self) -> u64 {
        if self.count == 0 { 0 } else { (self.sum / u128::from(self.count)) as u64 }
    }

    /// The value that a share `quantile` (0 to 1) of all values does not exceed, as the middle of its bucket; 0 if there
    /// is none.
    pub fn quantile(&self, quantile: f64) -> u64 {
        if self.count == 0 {
            return 0;
        }
        let rank = ((quantile.clamp(0.0, 1.0) * self.count as f64).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle_of(bucket).clamp(self.min, self.max);
            }
        }
        self.max
    }

    /// Add everything that `other` has.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Forget everything; the memory stays.
    pub fn clear(&mut self) {
        self.buckets.fill(0);
        (self.count, self.sum, self.min, self.max) = (0, 0, u64::MAX, 0);
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram::new()
    }
}

fn bucket_of(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let octave = 63 - value.leading_zeros() - STEP_BITS;
    (octave as usize + 1) * STEPS + (value >> octave) as usize - STEPS
}

fn middle_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let octave = bucket / STEPS - 1;
    let first = ((bucket % STEPS + STEPS) as u64) << octave;
    first + ((1u64 << octave) >> 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_recorded_answers_zero() {
        let empty = Histogram::new();
        assert_eq!((empty.count(), empty.min(), empty.max(), empty.mean(), empty.quantile(0.5)), (0, 0, 0, 0, 0));
    }

    #[test]
    fn buckets_follow_each_other_and_end_at_the_largest_value() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(middle_of(bucket)), bucket);
        }
    }

    #[test]
    fn clear_forgets() {
        let mut histogram = Histogram::new();
        histogram.record(7);
        histogram.clear();
        assert_eq!(histogram, Histogram::new());
    }

    proptest! {
        #[test]
        fn quantile_is_within_3_percent(values in prop::collection::vec(0u64.., 1..200), quantile in 0.0f64..=1.0) {
            let mut histogram = Histogram::new();
            values.iter().for_each(|&value| histogram.record(value));
            let mut sorted = values.clone();
            sorted.sort_unstable();
            let rank = ((quantile * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len());
            let exact = sorted[rank - 1];
            let error = histogram.quantile(quantile).abs_diff(exact) as f64;
            prop_assert!(error <= exact as f64 * 0.03, "{} for {exact}", histogram.quantile(quantile));
            prop_assert_eq!((histogram.min(), histogram.max()), (sorted[0], sorted[sorted.len() - 1]));
        }

        #[test]
        fn merge_is_recording_both(left in prop::collection::vec(0u64.., 0..50), right in prop::collection::vec(0u64.., 0..50)) {
            let record = |values: &[u64]| {
                let mut histogram = Histogram::new();
                values.iter().for_each(|&value| histogram.record(value));
                histogram
            };
            let mut merged = record(&left);
            merged.merge(&record(&right));
            prop_assert_eq!(merged, record(&[left, right].concat()));
        }
    }
}
