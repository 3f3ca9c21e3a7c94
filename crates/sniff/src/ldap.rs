//! LDAP: the first request, and as whom it binds (RFC 4511 4.2, 4.14; BER as in 5.1).
//!
//! Decides the name in a bind, which is a distinguished name or, with SASL, mostly empty; and whether TLS is asked for.
//! Knows no password and no filter, and needs no more of a request than its head and that name.

use crate::cursor::Cursor;
use crate::name::is_clean;
use crate::shown::Shown;
use crate::{Found, Progress, Protocol, Refusal};

/// The longest distinguished name, with what stands in front of it.
pub(crate) const BYTES: usize = 4096;

mod tag {
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const OCTET_STRING: u8 = 0x04;
    pub(super) const SEQUENCE: u8 = 0x30;
    /// requestName of an extended request.
    pub(super) const NAME: u8 = 0x80;
    pub(super) const BIND: u8 = 0x60;
    pub(super) const EXTENDED: u8 = 0x77;
    /// Search, modify, add, delete, rename, compare; unbind, abandon.
    pub(super) const OTHERS: [u8; 8] = [0x63, 0x66, 0x68, 0x4a, 0x6c, 0x6e, 0x42, 0x50];
}

/// RFC 4511 4.14.1.
const STARTTLS: &[u8] = b"1.3.6.1.4.1.1466.20037";

/// Any version of a bind, to be answered by the server if it is wrong.
const VERSION: [u8; 2] = [tag::INTEGER, 1];

/// A sequence that begins with a number and then has the tag of a request is LDAP: from there on a fault is refused.
pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    match Request::read(bytes) {
        Ok(request) => Found::Whole(request.end),
        Err(Fault::No) => Found::No,
        Err(Fault::More(count)) => Found::More(count.max(bytes.len() + 1)),
        Err(Fault::Refused(why)) => Found::Refused(why),
    }
}

pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Shown<'_>, Refusal> {
    let mut shown = Shown::new(Protocol::Ldap, end);
    let Ok(request) = Request::read(bytes) else { return Err(Refusal::Malformed) };
    match request.kind {
        tag::BIND if !is_clean(Cursor(request.name)) => return Err(Refusal::Malformed),
        tag::BIND => shown.user = Some(request.name).filter(|name| !name.is_empty()),
        tag::EXTENDED => shown.starttls = request.name == STARTTLS,
        _ => {}
    }
    Ok(shown)
}

struct Request<'a> {
    kind: u8,
    /// Of a bind: as whom. Of an extended request: what for, as an object identifier.
    name: &'a [u8],
    /// Where what is read of it ends.
    end: usize,
}

enum Fault {
    No,
    More(usize),
    Refused(Refusal),
}

impl<'a> Request<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut rest = Reader { bytes, at: 0 };
        rest.tag(&[tag::SEQUENCE])?;
        let message = rest.length()?;
        let end = rest.at + message;
        rest.tag(&[tag::INTEGER])?;
        let id = rest.length()?;
        if !(1..=4).contains(&id) {
            return Err(Fault::No);
        }
        // Zero is the server's, and negative nobody's (RFC 4511 4.1.1.1).
        let id = rest.take(id)?;
        if id[0] & 0x80 != 0 || id.iter().all(|&byte| byte == 0) {
            return Err(Fault::No);
        }
        let kind = match rest.tag(&[tag::BIND, tag::EXTENDED]) {
            Err(Fault::No) => rest.tag(&tag::OTHERS)?,
            kind => kind?,
        };
        rest.request(kind, end)
            .map_err(|fault| if let Fault::No = fault { Fault::Refused(Refusal::Malformed) } else { fault })
    }
}

/// Tags and lengths, as far as they have come.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// What is in a request of this kind, which is in a message that ends at `message`.
    fn request(&mut self, kind: u8, message: usize) -> Result<Request<'a>, Fault> {
        let size = self.length()?;
        let end = self.at + size;
        if end > message {
            return Err(Fault::No);
        }
        let wanted = match kind {
            tag::BIND => {
                for expected in VERSION {
                    self.tag(&[expected])?;
                }
                self.take(1)?;
                tag::OCTET_STRING
            }
            tag::EXTENDED => tag::NAME,
            _ => return Ok(Request { kind, name: b"", end: self.at }),
        };
        self.tag(&[wanted])?;
        let count = self.length()?;
        match self.at + count {
            name if name > end => Err(Fault::No),
            name if name > BYTES => Err(Fault::Refused(Refusal::TooLong)),
            name => Ok(Request { kind, name: self.take(count)?, end: name }),
        }
    }

    /// The next byte, if it is one of these.
    fn tag(&mut self, allowed: &[u8]) -> Result<u8, Fault> {
        let byte = *self.bytes.get(self.at).ok_or(Fault::More(self.at + 1))?;
        if !allowed.contains(&byte) {
            return Err(Fault::No);
        }
        self.at += 1;
        Ok(byte)
    }

    /// One byte, or so many as its low bits say; the indefinite form is none of LDAP's (RFC 4511 5.1).
    fn length(&mut self) -> Result<usize, Fault> {
        let first = self.take(1)?[0];
        match first {
            0..=0x7f => Ok(usize::from(first)),
            0x81..=0x84 => {
                let bytes = self.take(usize::from(first & 0x7f))?;
                Ok(bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte)))
            }
            _ => Err(Fault::No),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let end = self.at + count;
        let taken = self.bytes.get(self.at..end).ok_or(Fault::More(end))?;
        self.at = end;
        Ok(taken)
    }
}
