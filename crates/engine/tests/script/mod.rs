//! Drives a core by hand: tell an event, see the commands. One carrier's worth of buffers, no network.

use fourtuple_engine::{Buffers, Command, ConnId, Core, Event, Instant, Order, Outbox};

/// A core, its outbox and its clock.
pub(crate) struct Played<C> {
    pub(crate) core: C,
    pub(crate) outbox: Outbox,
    pub(crate) now: Instant,
}

impl<C: Core> Played<C> {
    /// Start the core with `buffers` buffers of 64 bytes.
    pub(crate) fn start(core: C, buffers: u32) -> Played<C> {
        let buffers = Buffers::new(64, buffers.max(1), u32::from(buffers > 0));
        let mut played = Played { core, outbox: Outbox::new(buffers), now: Instant(0) };
        played.core.start(played.now, &mut played.outbox);
        played
    }

    /// Tell an event; returns what the core says.
    pub(crate) fn tell(&mut self, event: Event) -> Vec<Command> {
        self.core.handle(event, self.now, &mut self.outbox);
        self.commands()
    }

    /// Give an order.
    pub(crate) fn order(&mut self, order: Order) -> Vec<Command> {
        self.tell(Event::Ordered(order))
    }

    /// Tell that these bytes came.
    pub(crate) fn receive(&mut self, conn: ConnId, bytes: &[u8]) -> Vec<Command> {
        let buf = self.outbox.buffers.write(bytes).expect("a buffer to receive in");
        self.tell(Event::Received { conn, buf })
    }

    /// Let `ms` pass; the timeout is handled if it is due.
    pub(crate) fn wait_ms(&mut self, ms: u64) -> Vec<Command> {
        self.now.0 += ms * 1_000_000;
        if self.core.poll_timeout().is_some_and(|due| due <= self.now) {
            self.core.handle_timeout(self.now, &mut self.outbox);
        }
        self.commands()
    }

    /// The commands since last asked. Every core must be in order whenever somebody looks.
    pub(crate) fn commands(&mut self) -> Vec<Command> {
        assert_eq!(self.core.check_invariants(), Ok(()));
        std::mem::take(&mut self.outbox.commands)
    }

    /// The bytes of the `Send`s among `commands`, whose buffers are released.
    pub(crate) fn sent_bytes(&mut self, commands: Vec<Command>) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for command in commands {
            if let Command::Send { buf, .. } = command {
                all.push(self.outbox.buffers.bytes(&buf).to_vec());
                self.outbox.buffers.release(buf);
            }
        }
        all
    }
}

/// A connection by its index, first generation.
pub(crate) fn conn(index: u32) -> ConnId {
    ConnId { index, generation: 1 }
}
