//! Targets: where a service listens. `unix:/path`, `unix:@abstract`, `tcp:ADDRESS:PORT`, `tcp:NAME:PORT`.
//!
//! Decides which targets can be meant, and which values may stand in the place of a template's placeholder. Knows no
//! socket: whether anybody listens there is not asked.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::failure::{Error, Result, shown};
use crate::name::Name;

/// sun_path without its NUL (unix(7)).
const MOST_PATH_BYTES: usize = 107;
const MOST_COMPONENT_BYTES: usize = 63;
const ALLOWED: &str = "unix:/PATH, unix:@NAME, tcp:ADDRESS:PORT or tcp:NAME:PORT is wanted";

/// Where a service listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// A unix socket: an absolute path, or `@` and an abstract name.
    Unix(String),
    /// An address and port.
    Tcp(SocketAddr),
    /// A name that is resolved when it is needed, and a port.
    Host(String, u16),
}

impl Target {
    /// Read the text form; an error names `field`.
    pub fn checked(field: &str, text: &str) -> Result<Target> {
        let bad = |why: &str| Error::bad(field, format!("{} {why}; {ALLOWED}", shown(text)));
        if let Some(path) = text.strip_prefix("unix:") {
            unix(path).map_err(bad)?;
            return Ok(Target::Unix(path.to_owned()));
        }
        let Some(endpoint) = text.strip_prefix("tcp:") else { return Err(bad("is no target")) };
        let (host, port) = endpoint.rsplit_once(':').ok_or_else(|| bad("names no port"))?;
        if port.is_empty() || port.len() > 5 || !port.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(bad("has no port from 1 to 65535"));
        }
        let port = port.parse().ok().filter(|port| *port > 0u16).ok_or_else(|| bad("has no port from 1 to 65535"))?;
        if let Some(inner) = host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').and_then(|inner| inner.parse().ok());
            let address = inner.ok_or_else(|| bad("has no IPv6 address between the brackets"))?;
            return Ok(Target::Tcp(SocketAddr::new(IpAddr::V6(address), port)));
        }
        if let Ok(address) = host.parse() {
            return Ok(Target::Tcp(SocketAddr::new(IpAddr::V4(address), port)));
        }
        // The last label of a name has a letter (RFC 3696 2): 10.0.0.256 is a mistake and not a name.
        if host.rsplit('.').next().is_none_or(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(bad("has neither an address nor a name"));
        }
        let name = Name::parse(host.as_bytes()).map_err(|_| bad("has neither an address nor a name"))?;
        Ok(Target::Host(name.to_string(), port))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Unix(path) => write!(out, "unix:{path}"),
            Target::Tcp(endpoint) => write!(out, "tcp:{endpoint}"),
            Target::Host(name, port) => write!(out, "tcp:{name}:{port}"),
        }
    }
}

/// Whether bytes that a client sent may stand in a path, for a placeholder: then they are text of one component, neither
/// `.` nor `..`, no hidden file and no option.
pub(crate) fn component(bytes: &[u8]) -> Option<&str> {
    let [first, ..] = bytes else { return None };
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
    let fits = bytes.len() <= MOST_COMPONENT_BYTES && bytes.iter().all(plain) && !b".-".contains(first);
    if fits { std::str::from_utf8(bytes).ok() } else { None }
}

fn unix(path: &str) -> std::result::Result<(), &'static str> {
    if path.len() > MOST_PATH_BYTES {
        return Err("is longer than the 107 bytes that a socket's address holds");
    }
    if path.chars().any(char::is_control) {
        return Err("has a control character");
    }
    if let Some(name) = path.strip_prefix('@') {
        return if name.is_empty() { Err("has an empty name") } else { Ok(()) };
    }
    let Some(components) = path.strip_prefix('/') else { return Err("has no absolute path") };
    if components.split('/').any(|one| matches!(one, "" | "." | "..")) {
        return Err("has an empty component, or . or ..");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn as_written() {
        for text in ["unix:/run/a.sock", "unix:@name", "tcp:127.0.0.1:80", "tcp:[::1]:65535", "tcp:db.example.com:5432"]
        {
            assert_eq!(Target::checked("target", text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn no_targets() {
        let long = format!("unix:/{}", "a".repeat(107));
        for text in [
            "",
            "unix:",
            "unix:a",
            "unix:/",
            "unix:/a/",
            "unix:/a//b",
            "unix:/a/../b",
            "unix:/.",
            "unix:/a\0b",
            "unix:@",
            "unix:/a\n",
            "tcp:",
            "tcp::80",
            "tcp:1.2.3.4",
            "tcp:1.2.3.4:0",
            "tcp:1.2.3.4:65536",
            "tcp:1.2.3.4:+1",
            "tcp:[::1:80",
            "tcp:[1.2.3.4]:80",
            "tcp:::1:80",
            "tcp:a b:80",
            "tcp:1.2.3.256:80",
            "udp:1.2.3.4:80",
            "/run/a",
            &long,
        ] {
            assert!(Target::checked("target", text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_component_escapes_no_folder(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
            if let Some(text) = component(&bytes) {
                let path = format!("unix:/run/{text}");
                prop_assert!(Target::checked("target", &path).is_ok());
                prop_assert!(!text.contains('/'));
            }
        }

        #[test]
        fn any_text_is_a_target_or_not(text in "(unix:|tcp:)?\\PC{0,40}") {
            if let Ok(target) = Target::checked("target", &text) {
                prop_assert_eq!(Target::checked("target", &target.to_string()).unwrap(), target);
            }
        }
    }
}
