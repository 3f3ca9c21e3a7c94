//! The guide at a door: what a client has said there as a question to the registry, and what the service is to be told.

use fourtuple_engine::broker::guide::{Address, Chosen, Delivery, Guidance, Shown, Word};
use fourtuple_registry::Seen;
use fourtuple_sniff::{Protocol, Sniffer, Verdict};

use super::{BrokerGuide, Reading};
use crate::door::{Door, Move};

impl BrokerGuide {
    pub(super) fn at_door(
        &mut self,
        door: &Door,
        shown: &Shown<'_>,
        memory: &mut Reading,
        chosen: &mut Chosen,
    ) -> Guidance {
        let standing = &mut memory.standing;
        let (source, destination) = shown.names.unzip();
        let mut seen = Seen { source, destination, protocol: Some(door.name()), ..Seen::default() };
        match door.look(standing, shown.bytes, shown.last, &mut chosen.told) {
            Move::More => Guidance::More,
            Move::Tell => Guidance::Tell,
            Move::Goodbye => Guidance::Goodbye,
            Move::Garbage => Guidance::Garbage,
            Move::Plain { user, database } => {
                (seen.user, seen.database) = (user, database);
                let guidance = self.resolve(&seen, shown, chosen);
                if guidance == Guidance::NoRoute && !shown.last {
                    // There is a way on.
                    return match door.insist(standing, shown.bytes, &mut chosen.told) {
                        Move::Tell => Guidance::Tell,
                        Move::Goodbye => Guidance::Goodbye,
                        _ => guidance,
                    };
                }
                chosen.script = door.before_plain(standing, shown.bytes);
                arrived(guidance, door.name(), standing.answered, chosen)
            }
            Move::Tls => {
                let answered = standing.answered;
                let hello = &shown.bytes[usize::from(answered)..];
                let verdict = Sniffer::new([Protocol::Tls]).sniff(&mut memory.state, hello, &mut self.scratch);
                let found = match verdict {
                    Verdict::More(_) => return Guidance::More,
                    Verdict::Match(found) => found,
                    // After the yes, nothing else than a hello is right.
                    Verdict::No | Verdict::Answer(_) | Verdict::Refused(..) => return Guidance::Garbage,
                };
                let alpn = super::alpn(found.alpn);
                let name = found.name.map(str::to_owned);
                seen.name = name.as_deref().map(str::as_bytes);
                seen.alpn = (!alpn.is_empty()).then_some(&alpn);
                let guidance = self.resolve(&seen, shown, chosen);
                chosen.script = door.before_tls(&memory.standing, shown.bytes);
                arrived(guidance, door.name(), answered, chosen)
            }
        }
    }
}

/// The service is known. What has been answered is not for it; nor, where it has to be told something, is the socket: in
/// whoever is handed that nobody would say it.
fn arrived(guidance: Guidance, protocol: &str, answered: u16, chosen: &mut Chosen) -> Guidance {
    chosen.skip = answered.into();
    if !chosen.script.is_empty() {
        if chosen.delivery == Delivery::Inetd {
            chosen.address = Address::Unix(Vec::new());
        }
        chosen.delivery = Delivery::Relay;
    }
    chosen.protocol = Word::new(protocol);
    guidance
}
