#![no_main]
//! Names, patterns and targets: what is read is written in one spelling, and that is read as the same.

use fourtuple_registry::{MOST_NAME_BYTES, Name, Pattern, Prefix, Target};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(name) = Name::parse(data) {
        assert!(name.len() <= MOST_NAME_BYTES && !name.contains(['/', '\0']) && !name.starts_with('.'));
        assert_eq!(Name::parse(name.as_bytes()).as_deref(), Ok(&*name));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(pattern) = Pattern::checked("name", text) {
        assert_eq!(Pattern::checked("name", &pattern.to_string()).expect("a pattern"), pattern);
    }
    if let Ok(target) = Target::checked("target", text) {
        assert_eq!(Target::checked("target", &target.to_string()).expect("a target"), target);
    }
    if let Ok(prefix) = Prefix::checked("source", text) {
        assert_eq!(Prefix::checked("source", &prefix.to_string()).expect("a prefix"), prefix);
    }
});
