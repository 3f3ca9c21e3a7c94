//! Which service a connection means: the only place that walks the precedence of routes.
//!
//! Decides the order in which anchors are looked at, and that a service is a route to itself: by its wide port, and by its
//! name, after the routes that have the same condition. Reads the file under one snapshot; caches nothing.

use std::net::SocketAddr;

use crate::failure::Result;
use crate::name::Name;
use crate::record::{Delivery, Options, Service};
use crate::route::{Route, Shown, anchor, anchor_key};
use crate::store::Reader;
use crate::target::Target;

/// What a connection shows, as it was sent; what it does not show is None.
#[derive(Clone, Copy, Default, Debug)]
pub struct Seen<'a> {
    /// A wide port, in whichever way it came.
    pub wide_port: Option<u32>,
    /// SNI, Host, :authority or what else names a host, without a port. What is no name matches no condition on names.
    pub name: Option<&'a [u8]>,
    /// Path of a request of HTTP or RTSP.
    pub path: Option<&'a [u8]>,
    /// What is spoken: one of [`crate::PROTOCOLS`], or [`crate::PATTERN`] and a name.
    pub protocol: Option<&'a str>,
    /// The ALPN extension's ProtocolNameList without its own length (RFC 7301 3.1).
    pub alpn: Option<&'a [u8]>,
    /// User of the startup message or CONNECT packet, distinguished name of an LDAP bind, whom XMPP, RDP and SOCKS 4 name.
    pub user: Option<&'a [u8]>,
    /// Database of the startup message.
    pub database: Option<&'a [u8]>,
    /// MQTT client id, RTSP session, routing token of RDP.
    pub client: Option<&'a [u8]>,
    /// Where the client comes from.
    pub source: Option<SocketAddr>,
    /// Where it connected to.
    pub destination: Option<SocketAddr>,
}

/// Where a connection goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The service; None where a route gives the target itself.
    pub service: Option<String>,
    /// Where it listens.
    pub target: Target,
    /// How connections reach it.
    pub delivery: Delivery,
    /// What it asks of the broker.
    pub options: Options,
}

/// What became of a lookup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Go there.
    Found(Resolved),
    /// Nothing matches, not even a route without conditions.
    NoRoute,
    /// A route names this service, and there is none.
    NoService(String),
    /// A route matches, and what the client sent cannot stand in its template; why.
    Refused(&'static str),
}

impl Reader {
    /// Which service a connection means, in this snapshot.
    pub fn resolve(&self, seen: &Seen<'_>) -> Result<Outcome> {
        let name = seen.name.and_then(|name| Name::parse(name).ok());
        let name = name.as_ref();
        if let Some(port) = seen.wide_port {
            if let Some(outcome) = self.routed(anchor::WIDE_PORT, &port.to_be_bytes(), seen, name)? {
                return Ok(outcome);
            }
            if let Some(service) = self.by_wide_port(port)? {
                return Ok(found(service));
            }
        }
        if let Some(name) = name
            && let Some(outcome) = self.named(name, seen)?
        {
            return Ok(outcome);
        }
        let texts = [(anchor::DATABASE, seen.database), (anchor::USER, seen.user), (anchor::CLIENT, seen.client)];
        for (kind, text) in texts {
            // No route wants a longer text, and an anchor has no room for it.
            let Some(text) = text.filter(|text| text.len() <= usize::from(u8::MAX)) else { continue };
            if let Some(outcome) = self.routed(kind, text, seen, name)? {
                return Ok(outcome);
            }
        }
        Ok(self.routed(anchor::ANY, b"", seen, name)?.unwrap_or(Outcome::NoRoute))
    }

    /// The name itself, then wildcards from the longest suffix.
    fn named(&self, name: &Name, seen: &Seen<'_>) -> Result<Option<Outcome>> {
        if let Some(outcome) = self.routed(anchor::EXACT, name.as_bytes(), seen, Some(name))? {
            return Ok(Some(outcome));
        }
        if let Some(service) = self.by_name(name)? {
            return Ok(Some(found(service)));
        }
        if !self.has_routes() {
            return Ok(None);
        }
        for (place, suffix) in name.suffixes().enumerate() {
            // `*` stands for one label, so its suffix can only be the longest.
            if place == 0
                && let Some(outcome) = self.routed(anchor::ONE, suffix.as_bytes(), seen, Some(name))?
            {
                return Ok(Some(outcome));
            }
            if let Some(outcome) = self.routed(anchor::MANY, suffix.as_bytes(), seen, Some(name))? {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// The first route under an anchor whose conditions hold.
    fn routed(&self, kind: u8, text: &[u8], seen: &Seen<'_>, name: Option<&Name>) -> Result<Option<Outcome>> {
        if !self.has_routes() {
            return Ok(None);
        }
        let mut outcome = None;
        self.routes_under(&anchor_key(kind, text), |route| {
            if !route.conditions.hold(seen, name) {
                return Ok(true);
            }
            outcome = Some(self.follow(&route, seen, name)?);
            Ok(false)
        })?;
        Ok(outcome)
    }

    fn follow(&self, route: &Route, seen: &Seen<'_>, name: Option<&Name>) -> Result<Outcome> {
        let shown = Shown {
            name: name.map(|name| &**name),
            label: name.map(Name::label),
            user: seen.user,
            database: seen.database,
            client: seen.client,
        };
        let to = match shown.expand(&route.to) {
            Ok(to) => to,
            Err(why) => return Ok(Outcome::Refused(why)),
        };
        if let Some(text) = to.strip_prefix("service:") {
            let Ok(name) = Name::parse(text.as_bytes()) else {
                return Ok(Outcome::Refused("what the client sent makes no name of a service"));
            };
            return Ok(self.by_name(&name)?.map_or_else(|| Outcome::NoService(name.to_string()), found));
        }
        Ok(match Target::checked("to", &to) {
            Ok(target) => {
                Outcome::Found(Resolved { service: None, target, delivery: route.delivery, options: route.options })
            }
            Err(_) => Outcome::Refused("what the client sent makes no target"),
        })
    }
}

fn found(service: Service) -> Outcome {
    Outcome::Found(Resolved {
        service: Some(service.name),
        target: service.target,
        delivery: service.delivery,
        options: service.options,
    })
}
