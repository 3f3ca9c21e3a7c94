//! The Huffman code of HPACK (RFC 7541 5.2 and appendix B).
//!
//! Decides what text a code means, and whether it ends as it must. The code is canonical: symbols in the order of their
//! length and value have consecutive codes, so the lengths alone say everything.

use crate::Refusal;

/// Decode, and hand over each byte.
pub(crate) fn decode(raw: &[u8], mut each: impl FnMut(u8)) -> Result<(), Refusal> {
    let (mut bits, mut count) = (0u64, 0u32);
    let mut rest = raw.iter();
    loop {
        while count <= 32 {
            let Some(&byte) = rest.next() else { break };
            (bits, count) = (bits << 8 | u64::from(byte), count + 8);
        }
        let Some((symbol, length)) = first_symbol(bits, count) else { break };
        if symbol == END_OF_STRING {
            return Err(Refusal::Malformed);
        }
        each(symbol as u8);
        count -= length;
        bits &= (1 << count) - 1;
    }
    // What is left over is less than a byte, and the beginning of the end-of-string code: ones.
    if count < 8 && bits == (1 << count) - 1 { Ok(()) } else { Err(Refusal::Malformed) }
}

/// The symbol at the head of `count` bits, and how long its code is.
fn first_symbol(bits: u64, count: u32) -> Option<(u16, u32)> {
    let (mut first_code, mut first_place, mut length) = (0u64, 0usize, 0u32);
    for (step, symbols) in LENGTHS {
        (first_code, length) = (first_code << (step - length), step);
        let code = bits >> count.checked_sub(length)?;
        if code < first_code + symbols {
            return Some((SYMBOLS[first_place + (code - first_code) as usize], length));
        }
        (first_code, first_place) = (first_code + symbols, first_place + symbols as usize);
    }
    None
}

const END_OF_STRING: u16 = 256;

/// Length of a code in bits, and how many codes have it.
const LENGTHS: [(u32, u64); 21] = [
    (5, 10),
    (6, 26),
    (7, 32),
    (8, 6),
    (10, 5),
    (11, 3),
    (12, 2),
    (13, 6),
    (14, 2),
    (15, 3),
    (19, 3),
    (20, 8),
    (21, 13),
    (22, 26),
    (23, 29),
    (24, 12),
    (25, 4),
    (26, 15),
    (27, 19),
    (28, 29),
    (30, 4),
];

/// Symbols in the order of their codes.
#[rustfmt::skip]
const SYMBOLS: [u16; 257] = [
    48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57, 61, 65, 95, 98, 100,
    102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81,
    82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119, 120, 121, 122, 38, 42, 44, 59, 88, 90, 33, 34, 40, 41, 63,
    39, 43, 124, 35, 62, 0, 36, 64, 91, 93, 126, 94, 125, 60, 96, 123, 92, 195, 208, 128, 130, 131, 162, 184, 194,
    224, 226, 153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154,
    156, 160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1, 135, 137, 138,
    139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180, 182, 183, 188, 191,
    197, 231, 239, 9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237, 199, 207, 234, 235, 192, 193, 200, 201,
    202, 205, 210, 213, 218, 219, 238, 240, 242, 243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245,
    246, 247, 248, 250, 251, 252, 253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25,
    26, 27, 28, 29, 30, 31, 127, 220, 249, 10, 13, 22, 256,
];
