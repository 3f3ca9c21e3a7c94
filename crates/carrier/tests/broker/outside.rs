//! Who is asked to wake services in the broker's worlds: starts them at once or late, fails, refuses some, says nothing, or
//! says things of its own that are late, doubled or about nobody. And who watches that no client meets a service that is
//! not up.

use std::collections::BTreeMap;
use std::net::IpAddr;

use fourtuple_carrier::sim::Random;
use fourtuple_engine::broker::ledger::Reason;
use fourtuple_engine::report::Report;
use fourtuple_engine::{Answer, Command, Core, Event, Instant, Order, Outbox, Question, Target};

use super::talk::Service;

/// What becomes of a service that is to be woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sleep {
    /// It never sleeps.
    Never,
    /// It is up so many milliseconds after it was asked for.
    Wakes(u64),
    /// It cannot be started.
    Fails(u64),
    /// Nobody answers.
    Silent,
    /// It is up after so long, but not started for sources whose last byte is odd.
    Picky(u64),
    /// Anything.
    Flighty,
}

/// Whether a picky one refuses it.
pub(crate) fn is_refused(peer: IpAddr) -> bool {
    match peer {
        IpAddr::V4(peer) => peer.octets()[3] % 2 == 1,
        IpAddr::V6(_) => false,
    }
}

/// A broker, and the outside around it.
pub(crate) struct Outside {
    core: Box<dyn Core>,
    random: Random,
    services: Vec<(Service, Sleep)>,
    /// Told to be up last.
    up: Vec<bool>,
    due: BTreeMap<(Instant, u64), Order>,
    /// Something failed; somebody was refused.
    failed: bool,
    refused: bool,
    said: u64,
    wrong: Option<String>,
}

impl Outside {
    pub(crate) fn new(core: Box<dyn Core>, seed: u64, services: Vec<(Service, Sleep)>) -> Outside {
        let up = vec![false; services.len()];
        let random = Random::new(seed ^ 0x6f75_7473);
        Outside {
            core,
            random,
            services,
            up,
            due: BTreeMap::new(),
            failed: false,
            refused: false,
            said: 0,
            wrong: None,
        }
    }

    fn say(&mut self, now: Instant, within_ms: u64, order: Order) {
        let at = Instant(now.0 + self.random.between(0, within_ms * 1_000_000));
        self.said += 1;
        self.due.insert((at, self.said), order);
    }

    /// A service's number and how it sleeps, by its name.
    fn known(&self, name: &str) -> Option<(usize, Sleep)> {
        let number: usize = name.strip_prefix('s')?.parse().ok()?;
        self.services.get(number).map(|row| (number, row.1))
    }

    fn asked(&mut self, question: Question, now: Instant) {
        let up = |service: &str| Order::Answer(Answer::Up { service: service.to_owned() });
        let failed = |service: &str| Order::Answer(Answer::Failed { service: service.to_owned() });
        let slept = |service: &str| Order::Answer(Answer::Slept { service: service.to_owned() });
        match question {
            Question::Wake { service, start, name, peer, .. } => {
                let Some((number, sleep)) = self.known(&service).filter(|it| it.1 != Sleep::Never && start == "t")
                else {
                    self.wrong = Some(format!("{service} was asked for"));
                    return;
                };
                if name != format!("line of s{number}") {
                    self.wrong = Some(format!("{name:?} is no name of {service}"));
                }
                let peer = peer.map(|peer| peer.ip());
                match sleep {
                    Sleep::Wakes(ms) => self.say(now, ms, up(&service)),
                    Sleep::Fails(ms) => self.say(now, ms, failed(&service)),
                    Sleep::Picky(ms) => match peer.is_none_or(is_refused) {
                        true => self.say(now, ms, Order::Answer(Answer::Refused { service, peer })),
                        false => self.say(now, ms, up(&service)),
                    },
                    Sleep::Silent | Sleep::Never => {}
                    Sleep::Flighty => {
                        for _ in 0..self.random.between(0, 3) {
                            let order = match self.random.between(0, 6) {
                                0 => slept(&service),
                                1 => failed(&service),
                                2 => Order::Answer(Answer::Refused { service: service.clone(), peer }),
                                3 => Order::Hold(service.clone()),
                                4 => Order::Answer(Answer::Up { service: "nobody".to_owned() }),
                                _ => up(&service),
                            };
                            self.say(now, 3_000, order);
                        }
                        self.say(now, 100, Order::Usage { ticket: self.said, services: [service].into() });
                    }
                }
            }
            Question::Held { service, .. } => {
                let order = if self.random.chance(500) { slept(&service) } else { up(&service) };
                self.say(now, 500, order);
            }
            Question::Usage { rows, .. } => {
                if rows.len() != 1 || rows[0].unused.is_some() && rows[0].live + rows[0].parked > 0 {
                    self.wrong = Some(format!("{rows:?}"));
                }
            }
            other => self.wrong = Some(format!("nobody asked for {other:?}")),
        }
    }

    /// Take what was asked, and look at what is done.
    fn after(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut asked = Vec::new();
        outbox.questions.drain(|question| {
            asked.push(question);
            None
        });
        asked.into_iter().for_each(|question| self.asked(question, now));
        for command in &outbox.commands {
            let path = match command {
                Command::Reach { target: Target::Unix(path), .. } | Command::HandOff { path, .. } => {
                    String::from_utf8_lossy(outbox.buffers.bytes(path)).into_owned()
                }
                Command::Reach { target: Target::Tcp(at), .. } => at.to_string(),
                _ => continue,
            };
            let number = self.services.iter().position(|row| row.0.at.to_string() == path);
            if number.is_some_and(|number| self.services[number].1 != Sleep::Never && !self.up[number]) {
                self.wrong = Some(format!("a client is brought to {path}, which is not up"));
            }
        }
    }

    fn order(&mut self, order: Order, now: Instant, outbox: &mut Outbox) {
        let said = match &order {
            Order::Answer(Answer::Up { service }) => Some((service, true)),
            Order::Answer(Answer::Slept { service } | Answer::Failed { service }) | Order::Hold(service) => {
                Some((service, false))
            }
            _ => None,
        };
        if let Some((number, up)) = said.and_then(|(service, up)| Some((self.known(service)?.0, up))) {
            self.up[number] = up;
        }
        self.failed |= matches!(order, Order::Answer(Answer::Failed { .. }));
        self.refused |= matches!(order, Order::Answer(Answer::Refused { .. }));
        self.core.handle(Event::Ordered(order), now, outbox);
        self.after(now, outbox);
    }
}

impl Core for Outside {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.core.start(now, outbox);
        for number in 0..self.services.len() {
            if self.services[number].1 == Sleep::Flighty {
                let service = format!("s{number}");
                self.say(now, 3_000, Order::Hold(service.clone()));
                self.say(now, 3_000, Order::Answer(Answer::Up { service }));
            }
        }
        self.after(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.core.handle(event, now, outbox);
        self.after(now, outbox);
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        while let Some(entry) = self.due.first_entry()
            && entry.key().0 <= now
        {
            let order = entry.remove();
            self.order(order, now, outbox);
        }
        if self.core.poll_timeout().is_some_and(|at| at <= now) {
            self.core.handle_timeout(now, outbox);
            self.after(now, outbox);
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let due = self.due.first_key_value().map(|(at, _)| at.0);
        self.core.poll_timeout().into_iter().chain(due).min()
    }

    fn is_done(&self) -> bool {
        self.core.is_done()
    }

    fn report(&self) -> &Report {
        self.core.report()
    }

    fn check_invariants(&self) -> Result<(), String> {
        let ended = |reason: Reason| self.report().count(reason.counter()) > 0;
        if ended(Reason::StartFailed) && !self.failed || ended(Reason::WakeRefused) && !self.refused {
            return Err("a client was ended for what nobody has said".to_owned());
        }
        self.wrong.clone().map_or_else(|| self.core.check_invariants(), Err)
    }
}
