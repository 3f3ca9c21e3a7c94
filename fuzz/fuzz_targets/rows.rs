#![no_main]
//! Lines of services, CSV and JSON: one meaning however they are cut into blocks, and what was read can be written down so
//! that it is read again.

use fourtuple_registry::{Format, Rows, Service, write_row};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&choice, bytes)) = data.split_first() else { return };
    let format = if choice & 1 == 0 { Format::Csv } else { Format::JsonLines };
    let (services, error) = read(format, bytes.chunks(bytes.len().max(1)));
    let cut = read(format, bytes.chunks(1 + usize::from(choice >> 1)));
    assert_eq!(cut, (services.clone(), error));
    for service in services {
        for format in [Format::Csv, Format::JsonLines] {
            let mut line = Vec::new();
            write_row(format, &service, &mut line);
            assert_eq!(read(format, [&line[..]].into_iter()), (vec![service.clone()], None));
        }
    }
});

/// What is whole before the first error, and that.
fn read<'a>(format: Format, blocks: impl Iterator<Item = &'a [u8]>) -> (Vec<Service>, Option<String>) {
    let (mut rows, mut services) = (Rows::new(format), Vec::new());
    let mut each = |service| {
        services.push(service);
        Ok(())
    };
    let fed = blocks.map(|block| rows.feed(block, &mut each)).find(Result::is_err);
    let done = fed.unwrap_or_else(|| rows.finish(&mut each));
    (services, done.err().map(|error| error.to_string()))
}
