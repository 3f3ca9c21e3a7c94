//! Doors: listeners where somebody has to speak before the service is known. The broker greets in the service's name,
//! answers what comes before encryption, and reads the server name from the hello that follows its yes.
//!
//! Decides when a client has said enough: it begins with TLS, goes on without, or leaves. Also what a service has to be
//! told, and to answer, so that it stands where its client does. Knows no route and no socket; what a command means is in
//! one file per protocol.
//!
//! A client's bytes are looked at and not taken, so all that it has said stands in front of what it says; how far it has
//! been answered is in `Standing`. A door offers less than any service: what a client is told here it forgets when TLS
//! begins (RFC 3207 4.2, RFC 9051 6.2.1, RFC 2595 4).

mod imap;
mod ldap;
mod lines;
mod mysql;
mod pop3;
mod smtp;

use fourtuple_engine::broker::guide::{Heard, Turn};

/// Bytes that a client may say before TLS, or before it shows that it goes on without.
pub const TALK_BYTES: usize = 4_096;

/// What is spoken at a door.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// RFC 5321, STARTTLS of RFC 3207.
    Smtp,
    /// RFC 9051 and RFC 3501, STARTTLS.
    Imap,
    /// RFC 1939, STLS of RFC 2595.
    Pop3,
    /// Protocol 10, SSLRequest.
    Mysql,
    /// RFC 4511, StartTLS. The client begins.
    Ldap,
}

/// Every dialect with its name, which is that of its `protocol` in a route, too.
pub const DIALECTS: [(&str, Dialect); 5] = [
    ("smtp", Dialect::Smtp),
    ("imap", Dialect::Imap),
    ("pop3", Dialect::Pop3),
    ("mysql", Dialect::Mysql),
    ("ldap", Dialect::Ldap),
];

/// Who stands at a door.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Door {
    /// What it speaks.
    pub dialect: Dialect,
    /// The host that it says it is; for MySQL, the version of the server.
    pub host: String,
    /// Clients that go on without TLS are told that they must not.
    pub requires_tls: bool,
}

/// How far a client has come at a door.
#[derive(Clone, Copy, Default, Debug)]
pub struct Standing {
    stage: Stage,
    /// So many of its bytes have been answered.
    pub(crate) answered: u16,
    /// Where the line ends with which it has introduced itself, and its length (SMTP).
    introduced: (u16, u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Stage {
    #[default]
    Ungreeted,
    /// What it says is answered.
    Talk,
    /// It was told to begin with TLS.
    Hello,
}

/// What to do with a client at a door.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move<'a> {
    /// Wait for more.
    More,
    /// Tell it what is said, and look again.
    Tell,
    /// Tell it what is said: it leaves.
    Goodbye,
    /// The hello begins behind what has been answered.
    Tls,
    /// It goes on without TLS, with what it has not been answered; as whom, if it has said so.
    Plain {
        /// The user.
        user: Option<&'a [u8]>,
        /// The database (MySQL).
        database: Option<&'a [u8]>,
    },
    /// It breaks the protocol.
    Garbage,
}

/// What one command of a client comes to.
enum Command<'a> {
    /// It is not whole.
    More,
    /// So many bytes are answered by what was said.
    Answered(usize),
    /// The same, and it leaves.
    Leaves,
    /// The same, and TLS begins.
    Begins(usize),
    /// It is for the service.
    Plain(Option<&'a [u8]>, Option<&'a [u8]>),
    Garbage,
}

impl Door {
    /// Look at everything that a client has said so far; what it is told is appended to `says`. `last` says that no more is
    /// waited for.
    pub fn look<'a>(&self, standing: &mut Standing, bytes: &'a [u8], last: bool, says: &mut Vec<u8>) -> Move<'a> {
        says.clear();
        match standing.stage {
            Stage::Ungreeted => {
                standing.stage = Stage::Talk;
                self.greet(says);
                if !says.is_empty() {
                    return Move::Tell;
                }
            }
            Stage::Talk => {}
            Stage::Hello => return Move::Tls,
        }
        let answered = usize::from(standing.answered);
        let rest = &bytes[answered..];
        if rest.is_empty() {
            // Whoever waits for more than a greeting, or for nothing, is the default's.
            return if last && !self.requires_tls { Move::Plain { user: None, database: None } } else { Move::More };
        }
        let command = match self.dialect {
            Dialect::Smtp => smtp::command(self, rest, says),
            Dialect::Imap => imap::command(self, rest, says),
            Dialect::Pop3 => pop3::command(self, rest, says),
            Dialect::Mysql => mysql::command(rest),
            Dialect::Ldap => ldap::command(rest, says),
        };
        let (count, stage) = match command {
            Command::More if bytes.len() > TALK_BYTES => return Move::Garbage,
            Command::More => return Move::More,
            Command::Garbage => return Move::Garbage,
            Command::Plain(..) if self.requires_tls => return self.insist(standing, bytes, says),
            Command::Plain(user, database) => return Move::Plain { user, database },
            Command::Answered(count) => (count, Stage::Talk),
            Command::Leaves => return Move::Goodbye,
            // Sent in the clear before encryption began: CVE-2011-0411.
            Command::Begins(count) if rest.len() > count && self.dialect != Dialect::Mysql => return Move::Garbage,
            Command::Begins(count) => (count, Stage::Hello),
        };
        if answered + count > TALK_BYTES {
            return Move::Garbage;
        }
        if self.dialect == Dialect::Smtp && smtp::introduces(&rest[..count]) {
            standing.introduced = ((answered + count) as u16, count as u16);
        }
        (standing.answered, standing.stage) = ((answered + count) as u16, stage);
        if says.is_empty() { Move::Tls } else { Move::Tell }
    }

    /// What the service is told, and has to answer, before it gets the hello; `bytes` are all that the client has said.
    pub fn before_tls(&self, standing: &Standing, bytes: &[u8]) -> Vec<Turn> {
        match self.dialect {
            Dialect::Smtp => smtp::before_tls(&self.introduction(standing, bytes)),
            Dialect::Imap => imap::before_tls(),
            Dialect::Pop3 => pop3::before_tls(),
            Dialect::Mysql => mysql::before_tls(&bytes[..usize::from(standing.answered)]),
            Dialect::Ldap => ldap::before_tls(),
        }
    }

    /// The same for a client that goes on without.
    pub fn before_plain(&self, standing: &Standing, bytes: &[u8]) -> Vec<Turn> {
        match self.dialect {
            Dialect::Smtp => smtp::before_plain(standing.introduced.1 > 0, &self.introduction(standing, bytes)),
            Dialect::Imap => imap::before_plain(),
            Dialect::Pop3 => pop3::before_plain(),
            Dialect::Mysql => mysql::before_plain(),
            Dialect::Ldap => Vec::new(),
        }
    }

    /// What it speaks, as a route has it.
    pub fn name(&self) -> &'static str {
        DIALECTS.iter().find(|row| row.1 == self.dialect).map_or("", |row| row.0)
    }

    fn greet(&self, says: &mut Vec<u8>) {
        match self.dialect {
            Dialect::Smtp => smtp::greet(self, says),
            Dialect::Imap => imap::greet(self, says),
            Dialect::Pop3 => pop3::greet(self, says),
            Dialect::Mysql => mysql::greet(self, says),
            Dialect::Ldap => {}
        }
    }

    /// Tell a client that has to begin with TLS, and did not.
    pub fn insist<'a>(&self, standing: &mut Standing, bytes: &[u8], says: &mut Vec<u8>) -> Move<'a> {
        let rest = &bytes[usize::from(standing.answered)..];
        let count = match self.dialect {
            Dialect::Smtp => smtp::insist(rest, says),
            Dialect::Imap => imap::insist(rest, says),
            Dialect::Pop3 => pop3::insist(rest, says),
            Dialect::Mysql => mysql::insist(rest, says),
            Dialect::Ldap => ldap::insist(rest, says),
        };
        let answered = usize::from(standing.answered) + count;
        if answered > TALK_BYTES {
            return Move::Garbage;
        }
        standing.answered = answered as u16;
        // A MySQL client is told an error once.
        if self.dialect == Dialect::Mysql { Move::Goodbye } else { Move::Tell }
    }

    /// The line with which an SMTP client has introduced itself, or that which it would have said.
    fn introduction(&self, standing: &Standing, bytes: &[u8]) -> Vec<u8> {
        let (end, length) = (usize::from(standing.introduced.0), usize::from(standing.introduced.1));
        match bytes.get(end - length..end) {
            Some(line) if length > 0 => line.to_vec(),
            _ => format!("EHLO {}\r\n", self.host).into_bytes(),
        }
    }
}

/// Whether what a service has said is what a turn of one of these scripts expects.
pub fn hears(expect: u8, said: &[u8]) -> Option<Heard> {
    Some(match expect {
        smtp::READY => smtp::hears(b"220", said),
        smtp::DONE => smtp::hears(b"250", said),
        imap::GREETING => lines::hears(said, |line| if line.starts_with(b"* OK") { Heard::Yes } else { Heard::No }),
        imap::TAGGED => lines::hears(said, imap::tagged),
        pop3::FINE => lines::hears(said, |line| if line.starts_with(b"+OK") { Heard::Yes } else { Heard::No }),
        mysql::GREETING => mysql::hears(said, false),
        mysql::GREETING_WITH_TLS => mysql::hears(said, true),
        ldap::BEGIN => ldap::hears(said),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
