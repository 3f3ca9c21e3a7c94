#![no_main]
//! Routes as somebody writes them, and what a client sends in the place of their placeholders. A line each: where to, user,
//! database and client id as sent, then conditions, which begin with a letter for their field.

use fourtuple_registry::{Conditions, Delivery, Options, Route, Target, file};

const FIELDS: [&str; 12] = [
    "wide_port",
    "name",
    "path",
    "protocol",
    "alpn",
    "user",
    "database",
    "client",
    "destination",
    "destination_port",
    "source",
    "source_port",
];
/// Of LMDB.
const MOST_KEY_BYTES: usize = 511;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let [to, user, database, client] = std::array::from_fn(|_| lines.next().unwrap_or_default());
    let Ok(to) = std::str::from_utf8(to) else { return };
    let fields = lines.filter_map(|line| {
        let (field, text) = line.split_first()?;
        Some((*FIELDS.get(usize::from(field.wrapping_sub(b'a')))?, std::str::from_utf8(text).ok()?))
    });
    let Ok(conditions) = Conditions::checked(fields) else { return };
    let told = conditions.fields();
    let again = Conditions::checked(told.iter().map(|(field, text)| (*field, text.as_str())));
    assert_eq!(again.expect("what was read is a condition"), conditions);
    assert!(file::key(&conditions).len() + 2 <= MOST_KEY_BYTES);

    let (delivery, options) = (Delivery::Relay, Options::default());
    let Ok(route) = (Route { conditions, to: to.to_owned(), delivery, options }).checked() else { return };
    assert_eq!(file::route(&file::of_route(&route)).as_ref(), Some(&route));
    // What a client sends names one component of a path: no other folder, and no other kind of target.
    let Ok(target) = file::expanded(&route, [user, database, client]) else { return };
    if let (Ok(Target::Unix(path)), Some(template)) = (Target::checked("to", &target), route.to.strip_prefix("unix:")) {
        assert_eq!(path.matches('/').count(), template.matches('/').count(), "{path:?}");
        assert_eq!(path.starts_with('@'), template.starts_with('@'), "{path:?}");
        assert!(path.starts_with('@') || path.split('/').all(|part| !matches!(part, "." | "..")), "{path:?}");
    }
});
