#![no_main]
//! HTTP/1.1 responses of a server under load, and the answer to a WebSocket's opening.

use fourtuple_engine::script::{Act, Script};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let answer = match choice & 3 {
        0 => Act::Response(200, 399),
        1 => Act::Response(101, 101),
        _ => Act::Upgrade(b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_vec()), // RFC 6455 1.3
    };
    let script = Script::new(Vec::new(), vec![answer.clone(), answer, Act::Expect(b"!".to_vec())]).expect("a script");
    fourtuple_fuzz::heard_alike(&script, 1 + usize::from(choice >> 2), rest);
});
