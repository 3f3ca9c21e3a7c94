#![no_main]
//! Services and routes as they lie in the file: whatever a damaged one holds is a value that can be kept, or none.

use fourtuple_registry::file;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(route) = file::route(data) {
        assert_eq!(file::route(&file::of_route(&route)), Some(route));
    }
    let Some((&length, bytes)) = data.split_first() else { return };
    let Some((key, value)) = bytes.split_at_checked(length.into()) else { return };
    if let Some(service) = file::service(key, value) {
        assert_eq!(file::service(service.name.as_bytes(), &file::of_service(&service)), Some(service));
    }
});
