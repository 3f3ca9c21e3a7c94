#![no_main]
//! What comes over a ferry: any messages, with any number of connections, to a broker that lands them. It keeps its own
//! rules after each, loses no buffer, and what it reads of a record is what was written.
//!
//! Per message: a byte for how many connections come with it and whether a ferry ends behind it, two for its length.

use fourtuple_engine::broker::guide::{Chosen, Guidance, Guide, Shown};
use fourtuple_engine::broker::ledger::Unwritten;
use fourtuple_engine::broker::record::{self, Message};
use fourtuple_engine::broker::{BrokerConfig, BrokerCore, ListenAt};
use fourtuple_engine::{Buffers, Command, ConnId, Core, Event, Given, Instant, Order, Outbox};

#[derive(Debug)]
struct Nobody;

impl Guide for Nobody {
    type Memory = ();

    fn guide(&mut self, _: &Shown<'_>, (): &mut (), _: &mut Chosen) -> Guidance {
        Guidance::NoRoute
    }
}

const FERRY: Given = Given(0);

/// Do what is wanted, until nothing is. Nothing is ever received or sent.
fn obey(core: &mut BrokerCore<Nobody, Unwritten>, outbox: &mut Outbox, fetching: &mut bool) {
    loop {
        let commands = std::mem::take(&mut outbox.commands);
        if commands.is_empty() {
            return;
        }
        for command in commands {
            let event = match command {
                Command::Send { conn, buf } => {
                    outbox.buffers.release(buf);
                    Event::Sent { conn }
                }
                Command::Close { conn, .. } => Event::Closed { conn },
                Command::Name { conn } => Event::Named { conn, names: None },
                Command::Unlisten { listener } => Event::Unlistened { listener },
                Command::Listen { listener, local, .. } => Event::Listening { listener, local },
                Command::Ship { ferry, message, .. } => {
                    outbox.peeks.release(message);
                    Event::Shipped { ferry }
                }
                Command::Fetch { .. } => {
                    assert!(!*fetching, "a second Fetch");
                    *fetching = true;
                    continue;
                }
                _ => continue,
            };
            core.handle(event, Instant(1), outbox);
        }
        core.check_invariants().expect("its own rules");
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let listen = vec![ListenAt { local: ([127, 0, 0, 1], 1).into(), sniff_timeout: std::time::Duration::from_secs(1) }];
    let config = BrokerConfig { listen, ..BrokerConfig::default() };
    let mut core = BrokerCore::new(config, Nobody, Unwritten);
    let mut outbox = Outbox::new(Buffers::new(64, 64, 4));
    let (mut index, mut fetching, mut rest) = (0, false, data);
    core.start(Instant(1), &mut outbox);
    core.handle(Event::Ordered(Order::Land(FERRY)), Instant(1), &mut outbox);
    obey(&mut core, &mut outbox, &mut fetching);
    while let Some((&[how, high, low], more)) = rest.split_first_chunk() {
        let (message, after) = more.split_at(more.len().min(usize::from(high) << 8 | usize::from(low)));
        rest = after;
        if let Ok(Message::Relay(read) | Message::Fresh(read)) = record::read(message) {
            let is_relay = matches!(record::read(message), Ok(Message::Relay(_)));
            let mut written = vec![0xaa; message.len() + 64];
            let counts = read.queued.map(|bytes| bytes.len() as u32);
            let mut end = record::write_record(&mut written, is_relay, &read, counts);
            for bytes in read.queued {
                written[end..end + bytes.len()].copy_from_slice(bytes);
                end += bytes.len();
            }
            let again = match record::read(&written[..end]) {
                Ok(Message::Relay(record) | Message::Fresh(record)) => record,
                other => panic!("{other:?} was {read:?}"),
            };
            assert_eq!(again, read);
        }
        if !std::mem::take(&mut fetching) {
            break; // it waits for buffers, or is done
        }
        let Some(mut buf) = outbox.peeks.take() else { panic!("a message was kept") };
        outbox.peeks.memory(&buf)[..message.len()].copy_from_slice(message);
        outbox.peeks.set_len(&mut buf, message.len());
        let conns = [0, 1].map(|place| {
            (how >> place & 1 == 1).then(|| {
                index += 1;
                ConnId { index, generation: 0 }
            })
        });
        core.handle(Event::Landed { ferry: FERRY, conns, message: buf }, Instant(1), &mut outbox);
        core.check_invariants().expect("its own rules");
        obey(&mut core, &mut outbox, &mut fetching);
        if how & 4 != 0 && std::mem::take(&mut fetching) {
            core.handle(Event::FerryLost { ferry: FERRY, error: None }, Instant(1), &mut outbox);
            break;
        }
    }
    core.handle(Event::Ordered(Order::Close), Instant(1), &mut outbox);
    for _ in 0..1_000_000 {
        obey(&mut core, &mut outbox, &mut fetching);
        if core.is_done() {
            break;
        }
        core.handle_timeout(Instant(u64::MAX / 2), &mut outbox);
    }
    assert!(core.is_done(), "{:?}", core.report());
    assert_eq!(outbox.buffers.in_use() + outbox.peeks.in_use(), 0);
});
