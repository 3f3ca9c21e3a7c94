#![no_main]
//! What a PostgreSQL server says as far as its key: the same one however it is cut.

use fourtuple_broker::cancel::{Messages, Told};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&segment, bytes)) = data.split_first() else { return };
    let whole = told(bytes, bytes.len().max(1));
    assert_eq!(told(bytes, usize::from(segment) + 1), whole);
    assert!(whole.is_none_or(|key| (8..=260).contains(&key.len())));
});

fn told(bytes: &[u8], step: usize) -> Option<Vec<u8>> {
    let mut messages = Messages::default();
    for piece in bytes.chunks(step) {
        match messages.read(piece) {
            Told::More => {}
            Told::Key(key) => return Some(key.to_vec()),
            Told::Nothing => return None,
        }
    }
    None
}
