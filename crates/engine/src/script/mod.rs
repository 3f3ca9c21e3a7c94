//! A small step language for dialogues: say these bytes, expect those, read a response, wait for a pong.
//!
//! Decides how a script is played on one connection, in 16 bytes of state. Knows no socket and no time: when a round is
//! due, and how long an answer may take, the core decides. Whatever the peer sends is bounded by the act that reads it,
//! and nothing of it is kept.

mod frames;
mod http;

use std::time::Duration;

use self::http::Answer;
use crate::speech::{ACCEPT, Failing, Part, Speech, Stray, Turn, Wrong};

/// One step of a dialogue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Act {
    /// Say these bytes; they fit into a buffer, which whoever starts the engine has checked.
    Say(Vec<u8>),
    /// Exactly these bytes come.
    Expect(Vec<u8>),
    /// Anything comes, up to and with this mark, at most so many bytes in all.
    Until(Vec<u8>, u32),
    /// So many bytes come, whatever they are.
    Skip(u32),
    /// What is left of the datagram, whatever it is, nothing included. On a stream, what is left of a piece.
    Rest,
    /// Nothing is said or wanted for so long.
    Wait(Duration),
    /// A whole HTTP/1.1 response comes (RFC 9112); a status outside of the two, both included, is a refusal.
    Response(u16, u16),
    /// A WebSocket's opening is answered (RFC 6455 4.1): status 101 and this Sec-WebSocket-Accept; another status is a
    /// refusal.
    Upgrade(Vec<u8>),
    /// WebSocket frames come (RFC 6455), until a pong that carries these bytes.
    Pong(Vec<u8>),
}

/// What is said on every connection: an opening once, then rounds.
#[derive(Clone, Debug)]
pub struct Script {
    /// The opening's acts, then the round's.
    acts: Vec<Act>,
    /// Where the round's begin.
    round: u8,
    /// For each `Until`, the borders of its mark (Knuth, Morris, Pratt); empty for other acts.
    borders: Vec<Vec<u16>>,
    /// Whether the peer speaks in frames between rounds.
    framed: bool,
}

/// Most acts of a script.
pub const ACTS_MOST: usize = 250;

/// How far a connection is in its script.
#[derive(Clone, Copy, Default, Debug)]
pub struct Place {
    /// Bytes still to come, or bytes that came, by act.
    left: u32,
    /// Bytes of the act that matched, or header bytes that came, by act.
    at: u16,
    act: u8,
    /// Where the reader of a response or frame stands.
    phase: u8,
    /// REFUSED, OPENING, then by act.
    flags: u8,
    /// By act: what the reader of a response or frame keeps.
    kept: [u8; 7],
}

const _: () = assert!(size_of::<Place>() <= 16, "a dialogue costs 16 bytes per connection");

const REFUSED: u8 = 1;
const OPENING: u8 = 2;

impl Place {
    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// No byte of the act has come.
    fn is_at_start(self) -> bool {
        (self.at, self.left, self.phase) == (0, 0, 0)
    }

    /// The act is over.
    fn go_on(&mut self) {
        (self.act, self.at, self.left, self.phase) = (self.act + 1, 0, 0, 0);
    }
}

impl Script {
    /// A script, or what is wrong with it.
    pub fn new(opening: Vec<Act>, round: Vec<Act>) -> Result<Script, &'static str> {
        if opening.len() + round.len() > ACTS_MOST {
            return Err("more than 250 acts");
        }
        let first_of_round = opening.len() as u8;
        let acts: Vec<Act> = opening.into_iter().chain(round).collect();
        if acts.iter().any(Act::is_empty) {
            return Err("an act of no bytes");
        }
        if acts.iter().any(|act| act.len() > usize::from(u16::MAX)) {
            return Err("an act of more than 65,535 bytes");
        }
        if acts.iter().any(|act| matches!(act, Act::Upgrade(proof) if proof.len() != http::ACCEPT_BYTES)) {
            return Err("a Sec-WebSocket-Accept that is not of 28 bytes");
        }
        let framed = acts.iter().any(|act| matches!(act, Act::Pong(_)));
        let borders = acts.iter().map(|act| if let Act::Until(mark, _) = act { borders(mark) } else { Vec::new() });
        Ok(Script { borders: borders.collect(), acts, round: first_of_round, framed })
    }

    fn end(&self, place: &Place) -> u8 {
        if place.has(OPENING) { self.round } else { self.acts.len() as u8 }
    }

    fn until(&self, place: &mut Place, mark: &[u8], most: u32, bytes: &[u8]) -> Result<usize, Wrong> {
        let borders = &self.borders[usize::from(place.act)];
        for (count, &byte) in bytes.iter().enumerate() {
            place.left += 1;
            let mut matched = usize::from(place.at);
            while matched > 0 && mark[matched] != byte {
                matched = usize::from(borders[matched - 1]);
            }
            matched += usize::from(mark[matched] == byte);
            place.at = matched as u16;
            if matched == mark.len() {
                place.go_on();
                return Ok(count + 1);
            }
            if place.left >= most {
                return Err(Wrong);
            }
        }
        Ok(bytes.len())
    }
}

impl Act {
    fn is_empty(&self) -> bool {
        matches!(self, Act::Skip(0))
            || (self.len() == 0 && matches!(self, Act::Say(_) | Act::Expect(_) | Act::Until(..)))
    }

    fn len(&self) -> usize {
        match self {
            Act::Say(bytes) | Act::Expect(bytes) | Act::Until(bytes, _) | Act::Pong(bytes) | Act::Upgrade(bytes) => {
                bytes.len()
            }
            Act::Skip(_) | Act::Rest | Act::Wait(_) | Act::Response(..) => 0,
        }
    }
}

impl Speech for Script {
    type Memory = Place;

    fn fit(&mut self, _buffer_bytes: usize) {}

    fn has_opening(&self) -> bool {
        self.round > 0
    }

    fn begin(&mut self, place: &mut Place, part: Part) {
        place.flags &= !(REFUSED | OPENING);
        match part {
            Part::Opening => (place.act, place.flags) = (0, place.flags | OPENING),
            Part::Round => place.act = self.round,
        }
    }

    fn turn(&self, place: &Place) -> Turn {
        if self.owes(place) {
            return Turn::Say;
        }
        if place.act >= self.end(place) {
            return Turn::Over { refused: place.has(REFUSED) };
        }
        match self.acts[usize::from(place.act)] {
            Act::Say(_) => Turn::Say,
            Act::Wait(time) => Turn::Wait(time),
            _ => Turn::Listen,
        }
    }

    fn say(&mut self, place: &mut Place, _serial: u64, into: &mut [u8]) -> usize {
        if self.owes(place) {
            return frames::write_pong(place, into);
        }
        let Some(Act::Say(bytes)) = self.acts.get(usize::from(place.act)) else { return 0 };
        let length = bytes.len().min(into.len());
        into[..length].copy_from_slice(&bytes[..length]);
        // Not `go_on`: the reader may stand in the middle of a frame that came between rounds.
        place.act += 1;
        length
    }

    fn hear(&mut self, place: &mut Place, _serial: u64, bytes: &[u8]) -> Result<usize, Wrong> {
        match &self.acts[usize::from(place.act)] {
            Act::Say(_) | Act::Wait(_) => Err(Wrong),
            Act::Rest => {
                place.go_on();
                Ok(bytes.len())
            }
            Act::Expect(expected) => {
                let rest = &expected[usize::from(place.at)..];
                let took = rest.len().min(bytes.len());
                if rest[..took] != bytes[..took] {
                    return Err(Wrong);
                }
                place.at += took as u16;
                if took == rest.len() {
                    place.go_on();
                }
                Ok(took)
            }
            Act::Until(mark, most) => self.until(place, mark, *most, bytes),
            Act::Skip(count) => {
                let took = (count - place.left).min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                place.left += took;
                if place.left == *count {
                    place.go_on();
                }
                Ok(took as usize)
            }
            Act::Response(least, most) => http::hear(place, &Answer::Status(*least..=*most), bytes),
            Act::Upgrade(proof) => http::hear(place, &Answer::Upgrade(proof), bytes),
            Act::Pong(carried) => frames::hear(place, Some(carried), bytes),
        }
    }

    /// Acts in a row share a datagram; each ends in the one that it began in.
    fn hear_datagram(&mut self, place: &mut Place, serial: u64, bytes: &[u8]) -> Result<(), Stray> {
        let (mut tried, mut rest) = (*place, bytes);
        while self.turn(&tried) == Turn::Listen {
            let takes_nothing = matches!(self.acts[usize::from(tried.act)], Act::Rest);
            if rest.is_empty() && !takes_nothing {
                break;
            }
            let took = self.hear(&mut tried, serial, rest).map_err(|Wrong| Stray::Wrong)?;
            rest = &rest[took..];
            if takes_nothing {
                break; // what comes next begins in the next datagram
            }
        }
        if !rest.is_empty() || !tried.is_at_start() || tried.act == place.act {
            return Err(Stray::Wrong);
        }
        *place = tried;
        Ok(())
    }

    fn waited(&mut self, place: &mut Place) {
        // Not `go_on`, as in `say`.
        if matches!(self.acts.get(usize::from(place.act)), Some(Act::Wait(_))) {
            place.act += 1;
        }
    }

    fn overhear(&mut self, place: &mut Place, bytes: &[u8]) -> Result<(), Wrong> {
        if !self.framed {
            return Err(Wrong);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = &rest[frames::hear(place, None, rest)?..];
        }
        Ok(())
    }

    fn owes(&self, place: &Place) -> bool {
        // The reader of a response uses the same flags for something else.
        self.framed
            && !matches!(self.acts.get(usize::from(place.act)), Some(Act::Response(..) | Act::Upgrade(_)))
            && frames::owes_pong(place)
    }

    fn why(&self, place: &Place, failing: Failing) -> &'static str {
        match (failing, self.acts.get(usize::from(place.act))) {
            (Failing::Wrong, Some(Act::Upgrade(_))) if http::is_unproven(place) => ACCEPT,
            _ => failing.name(),
        }
    }
}

/// For each length of a match, the longest proper prefix of the mark that also ends it.
fn borders(mark: &[u8]) -> Vec<u16> {
    let mut borders = vec![0u16; mark.len()];
    for end in 1..mark.len() {
        let mut length = usize::from(borders[end - 1]);
        while length > 0 && mark[length] != mark[end] {
            length = usize::from(borders[length - 1]);
        }
        borders[end] = (length + usize::from(mark[length] == mark[end])) as u16;
    }
    borders
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the whole of `bytes` leads to, told in pieces that end at `cuts`.
    fn heard(script: &Script, bytes: &[u8], cuts: &[usize]) -> (Result<usize, Wrong>, Turn) {
        let (mut script, mut place) = (script.clone(), Place::default());
        script.begin(&mut place, Part::Round);
        let mut took = 0;
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.push(bytes.len());
        cuts.sort_unstable();
        for cut in cuts {
            while took < cut && script.turn(&place) == Turn::Listen {
                match script.hear(&mut place, 0, &bytes[took..cut]) {
                    Ok(more) => took += more,
                    Err(wrong) => return (Err(wrong), Turn::Listen),
                }
            }
        }
        (Ok(took), script.turn(&place))
    }

    fn round(acts: Vec<Act>) -> Script {
        Script::new(Vec::new(), acts).expect("a script")
    }

    const OVER: Turn = Turn::Over { refused: false };

    #[test]
    fn each_act_takes_its_bytes_and_no_more() {
        let script = round(vec![
            Act::Expect(b"+PONG\r\n".to_vec()),
            Act::Skip(3),
            Act::Until(b"aab".to_vec(), 100),
            Act::Expect(b"!".to_vec()),
        ]);
        let bytes = b"+PONG\r\nxyzaaaaab!rest";
        for cut in 0..bytes.len() {
            assert_eq!(heard(&script, bytes, &[cut]), (Ok(bytes.len() - 4), OVER), "cut at {cut}");
        }
        assert_eq!(heard(&script, b"+PANG", &[]).0, Err(Wrong));
    }

    #[test]
    fn what_never_ends_is_bounded() {
        let script = round(vec![Act::Until(b"\n".to_vec(), 10)]);
        assert_eq!(heard(&script, b"123456789\n", &[]), (Ok(10), OVER));
        assert_eq!(heard(&script, b"1234567890\n", &[]).0, Err(Wrong));
    }

    #[test]
    fn an_opening_is_played_once_and_apart() {
        let mut script = Script::new(
            vec![Act::Say(b"hello".to_vec()), Act::Expect(b"hi".to_vec())],
            vec![Act::Say(b"ping".to_vec()), Act::Expect(b"pong".to_vec())],
        )
        .expect("a script");
        let (mut place, mut out) = (Place::default(), [0; 16]);
        assert!(script.has_opening());
        for (part, say, hear) in [(Part::Opening, &b"hello"[..], &b"hi"[..]), (Part::Round, b"ping", b"pong")] {
            script.begin(&mut place, part);
            assert_eq!(script.turn(&place), Turn::Say);
            let length = script.say(&mut place, 0, &mut out);
            assert_eq!(&out[..length], say);
            assert_eq!(script.hear(&mut place, 0, hear), Ok(hear.len()));
            assert_eq!(script.turn(&place), OVER);
        }
        assert_eq!(script.overhear(&mut place, b"x"), Err(Wrong));
    }

    #[test]
    fn what_cannot_be_played_is_refused() {
        for acts in [vec![Act::Skip(0)], vec![Act::Say(Vec::new())], vec![Act::Until(Vec::new(), 5)]] {
            assert!(Script::new(acts, Vec::new()).is_err());
        }
        assert!(Script::new(vec![Act::Skip(1); 251], Vec::new()).is_err());
        assert!(Script::new(vec![Act::Expect(vec![0; 70_000])], Vec::new()).is_err());
    }

    #[test]
    fn a_frame_that_a_round_cuts_in_two_stays_whole() {
        let mut script = round(vec![Act::Say(b"ping".to_vec()), Act::Pong(b"me".to_vec())]);
        let bytes = b"\x81\x0bhello world\x89\x03abc\x8a\x02me";
        for cut in 0..=18 {
            let (mut place, mut out) = (Place::default(), [0; 16]);
            assert_eq!(script.overhear(&mut place, &bytes[..cut]), Ok(()));
            script.begin(&mut place, Part::Round);
            while script.owes(&place) || script.turn(&place) == Turn::Say {
                script.say(&mut place, 0, &mut out);
            }
            assert_eq!(script.hear(&mut place, 0, &bytes[cut..]), Ok(bytes.len() - cut), "cut at {cut}");
            assert_eq!(Speech::turn(&script, &place), if cut < 18 { Turn::Say } else { OVER });
        }
    }

    fn any_act() -> impl Strategy<Value = Act> {
        let bytes = || prop::collection::vec(prop::sample::select(b"ab\r\n".to_vec()), 1..4);
        prop_oneof![
            bytes().prop_map(Act::Expect),
            (bytes(), 1u32..20).prop_map(|(mark, most)| Act::Until(mark, most)),
            (1u32..5).prop_map(Act::Skip),
            Just(Act::Response(200, 399)),
            bytes().prop_map(Act::Pong),
        ]
    }

    proptest! {
        #[test]
        fn how_bytes_are_cut_changes_nothing(
            acts in prop::collection::vec(any_act(), 1..4),
            bytes in prop::collection::vec(prop_oneof![prop::sample::select(b"ab\r\n".to_vec()), any::<u8>()], 0..60),
            cuts in prop::collection::vec(0usize..60, 0..5),
        ) {
            let script = round(acts);
            prop_assert_eq!(heard(&script, &bytes, &cuts), heard(&script, &bytes, &[]));
        }
    }
}
