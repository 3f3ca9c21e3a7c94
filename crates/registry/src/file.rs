//! The bytes of the file and the places of templates, for fuzz targets: cargo-fuzz alone sets the cfg. Decides nothing.

use crate::record::Service;
use crate::route::{Conditions, Route, Shown};

/// Read a service.
pub fn service(key: &[u8], value: &[u8]) -> Option<Service> {
    Service::decode(key, value)
}

/// Its value.
pub fn of_service(service: &Service) -> Vec<u8> {
    let mut out = Vec::new();
    service.encode(&mut out);
    out
}

/// Read a route.
pub fn route(value: &[u8]) -> Option<Route> {
    Route::decode(value)
}

/// Its value.
pub fn of_route(route: &Route) -> Vec<u8> {
    route.encode()
}

/// Its key, without the number at its end.
pub fn key(conditions: &Conditions) -> Vec<u8> {
    [&conditions.anchor()[..], &conditions.rank()].concat()
}

/// Where a route leads whose client sends this user, database and client id.
pub fn expanded(route: &Route, [user, database, client]: [&[u8]; 3]) -> Result<String, &'static str> {
    let (name, label) = (Some("a.example"), Some("a"));
    Shown { name, label, user: Some(user), database: Some(database), client: Some(client) }.expand(&route.to)
}
