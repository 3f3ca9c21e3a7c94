//! The token of a connection: bytes that nobody else's token has, computed when needed, never stored.
//!
//! Decides what a connection sends and expects back. First (seed, serial), 8 bytes each, little-endian; then a pattern of
//! both, so that bytes lost, doubled or crossed between connections cannot pass for right ones.

/// The fewest bytes of a token: seed and serial.
pub const TOKEN_BYTES_MIN: u32 = 16;

/// A token, by what makes it unique.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// Of the run.
    pub seed: u64,
    /// Of the connection.
    pub serial: u64,
}

impl Token {
    /// Write the token's first bytes into `bytes`.
    pub fn fill(self, bytes: &mut [u8]) {
        for (place, word) in bytes.chunks_mut(8).enumerate() {
            word.copy_from_slice(&self.word(place as u64)[..word.len()]);
        }
    }

    /// Whether `bytes` are the token's from `offset` on.
    pub fn matches(self, offset: usize, bytes: &[u8]) -> bool {
        let (mut offset, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let expected = &self.word((offset / 8) as u64)[offset % 8..];
            let length = expected.len().min(rest.len());
            if rest[..length] != expected[..length] {
                return false;
            }
            (offset, rest) = (offset + length, &rest[length..]);
        }
        true
    }

    fn word(self, place: u64) -> [u8; 8] {
        match place {
            0 => self.seed,
            1 => self.serial,
            _ => mixed(self.seed ^ mixed(self.serial.wrapping_add(place))),
        }
        .to_le_bytes()
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection that spreads every bit.
fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn seed_and_serial_come_first() {
        let mut bytes = [0; 20];
        Token { seed: 1, serial: 2 }.fill(&mut bytes);
        assert_eq!(bytes[..16], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_ne!(bytes[16..], [0; 4]);
    }

    proptest! {
        #[test]
        fn every_piece_matches_and_no_changed_byte_does(
            seed: u64, serial: u64, length in 16usize..100, cut in 0usize..100, flip in 0usize..100
        ) {
            let token = Token { seed, serial };
            let mut bytes = vec![0; length];
            token.fill(&mut bytes);
            let cut = cut % length;
            prop_assert!(token.matches(0, &bytes[..cut]) && token.matches(cut, &bytes[cut..]));
            bytes[flip % length] ^= 1;
            prop_assert!(!token.matches(0, &bytes));
        }
    }
}
