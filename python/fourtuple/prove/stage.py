"""Where a step of the proof plays: its labs, its engines, its clock, and the rows and curves that it leaves.

Decides how a step waits, measures and reports, so that the steps say only what is claimed. Knows no particular step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from fourtuple.engine import CarrierName, EchoConfig, Failure, LoadConfig
from fourtuple.lab import Lab, LabHost, memory_room
from fourtuple.limits import suspects
from fourtuple.prove import fleet as fleet_of
from fourtuple.prove.fleet import Fleet
from fourtuple.prove.model import Curve, Observer, Options, Outcome, Row, StepResult
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace

ECHO_PORT = 1_023
"""Where the lab's server listens: below every ephemeral range that a step sets on the same host."""
CLIENT_PREFIX, SERVER_PREFIX = "10.81.0.0/16", "10.82.0.0/15"
CLIENT_PREFIX_6, SERVER_PREFIX_6 = "fd81::/64", "fd82::/64"
BACKLOG = 65_535
SHORTAGES = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")
"""Errors that say that something ran out which is not a tuple."""
POLL_S, SETTLE_S, STILL_BYTES = 0.25, 10.0, 2 << 20
ENOUGH_TO_WEIGH = 100_000
"""Sockets from which on memory per socket means something: fewer find their room in slabs that are half empty."""


class Stage:
    """One step's surroundings; everything that it starts ends with it."""

    def __init__(self, options: Options, observer: Observer) -> None:
        self.options, self.observer = options, observer
        self.doing, self.reached = "", 0
        """The claim that is being shown, and the number that it stands at."""
        self.rows: list[Row] = []
        self.curves: list[Curve] = []
        self.notes: list[str] = []
        self.carrier = CarrierName.AUTO
        """What the step runs on, once its server has started."""
        self.carrier_reason = ""
        """Why not on uring."""
        self._stack = ExitStack()
        self._started = time.monotonic()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def lab(self, *hosts: str) -> Lab:
        """A fresh lab of these hosts, as far as descriptors go; gone at the end of the step."""
        refuse = self.options.refuse_io_uring
        return self._stack.enter_context(Lab(hosts, refuse_io_uring=refuse, descriptors=fleet_of.hard_limit()))

    def pair(self) -> tuple[LabHost, LabHost]:
        """A client and a server, a veth link between them, a prefix of addresses on each, a long accept queue."""
        settle()
        lab = self.lab("client", "server")
        client, server = lab["client"], lab["server"]
        for host, prefixes in (
            (client, (CLIENT_PREFIX, CLIENT_PREFIX_6)),
            (server, (SERVER_PREFIX, SERVER_PREFIX_6)),
        ):
            for prefix in prefixes[: 2 if self.has_ipv6 else 1]:
                host.add_any_ip(prefix)
        server.set_sysctl("net.core.somaxconn", BACKLOG)
        server.set_sysctl("net.ipv4.ip_unprivileged_port_start", 0)
        return client, server

    @property
    def has_ipv6(self) -> bool:
        """Whether this kernel speaks IPv6 at all."""
        return Path("/proc/sys/net/ipv6").is_dir()

    def serve(self, host: LabHost, connections: int, *endpoints: str) -> Fleet:
        """An echo server with room for so many connections; settles which carrier the step runs on."""
        listen = tuple(Endpoint.parse(one) for one in endpoints)
        return self.serve_all(host, connections, listen, BACKLOG)

    def serve_all(self, host: LabHost, connections: int, listen: tuple[Endpoint, ...], backlog: int) -> Fleet:
        """As `serve`, for any number of endpoints."""
        config = EchoConfig(listen=listen, backlog=backlog)
        fleet = fleet_of.serve(host, config, CarrierName(self.options.carrier), connections)
        self.carrier = fleet.engines[0].carrier
        self.carrier_reason = fleet.engines[0].fallback_reason or f"--carrier {self.options.carrier}"
        return fleet

    def connect(
        self,
        host: LabHost,
        config: LoadConfig,
        label: str,
        target: int,
        workers: int | None = None,
        each: Callable[[int], None] | None = None,
    ) -> Fleet:
        """Make the connections of `config` and wait until all that can be made stand; `each` sees them grow."""

        def progress(open_now: int) -> None:
            self.progressed(label, open_now, target)
            if each is not None:
                each(open_now)

        fleet = fleet_of.connect(host, config, self.carrier, workers)
        fleet.fill(progress)
        self._say_if_stalled(fleet, label)
        return fleet

    def ping(self, fleet: Fleet, label: str, target: int) -> None:
        """Have every connection of the fleet send its token once, and wait until each is back, wrong or missing."""
        fleet.ping(lambda right: self.progressed(label, right, target))
        self._say_if_stalled(fleet, label)

    def _say_if_stalled(self, fleet: Fleet, label: str) -> None:
        if fleet.stalled:
            self.note(f"{label}: nothing moved any more for {fleet_of.STALL_S:.0f} s")

    def say(self, claim: str) -> None:
        """State the claim that comes next."""
        self.doing, self.reached = claim, 0
        self.observer.claimed(claim)

    def progressed(self, label: str, value: int, target: int | None) -> None:
        """A number grows."""
        self.reached = value
        self.observer.progressed(label, value, target)

    def note(self, text: str) -> None:
        """Say something that belongs into the result as well."""
        self.notes.append(text)
        self.observer.noted(text)

    def add(self, row: Row, *fleets: Fleet) -> None:
        """Leave a row. If it fell short because one of the fleets ran out of something, that does not refute the claim:
        the row says which limit stopped it.
        """
        failure = next((one.stopped_by for one in fleets if one.stopped_by is not None), None)
        if row.outcome is Outcome.FAILED and failure is not None:
            answer = said(failure)
            told = row.kernel_said if answer in row.kernel_said else f"{answer}; {row.kernel_said}"
            row = replace(row, kernel_said=told, bound_by="")
            slots = self.carrier is CarrierName.URING and failure.name == "EMFILE"
            if limit := "direct-descriptors" if slots else limit_behind(failure.name, failure.step):
                row = replace(row, outcome=Outcome.STOPPED, bound_by=limit)
        self.doing = ""
        self.rows.append(row)
        self.observer.row_added(row)

    def stopped(self, claim: str, bound_by: str, why: str, reached: int = 0) -> None:
        """Leave a row that says that this part could not run here, and which limit stopped it."""
        self.add(Row(claim=claim, reached=reached, bound_by=bound_by, kernel_said=why, outcome=Outcome.STOPPED))

    def broken_off(self, claim: str, bound_by: str, why: str) -> None:
        """As `stopped`, in the middle of whatever was being shown; `claim` is for where nothing was."""
        self.stopped(self.doing or claim, bound_by, why, self.reached if self.doing else 0)

    def result(self, step: str, title: str) -> StepResult:
        """What the step came to: failed if any row failed, else stopped if any part could not run."""
        outcomes = {row.outcome for row in self.rows}
        outcome = next(
            (one for one in (Outcome.FAILED, Outcome.STOPPED) if one in outcomes),
            Outcome.PASSED if outcomes else Outcome.FAILED,
        )
        return StepResult(
            step=step,
            title=title,
            outcome=outcome,
            rows=tuple(self.rows),
            curves=tuple(self.curves),
            notes=tuple(self.notes),
            seconds=time.monotonic() - self._started,
        )


class Meter:
    """What a number of sockets costs: time, kernel slab of the whole host, resident memory of the lab's processes.

    The slab is host-wide (/proc/meminfo), so its figure is right on a quiet host only; it is printed, never asserted.
    """

    def __init__(self, *hosts: LabHost) -> None:
        self._hosts = hosts
        self._slab = meminfo_bytes("Slab")
        self._rss = self._rss_now()
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def kernel_bytes(self) -> int:
        """Slab since the start: sockets, inodes, files, io_uring requests."""
        return meminfo_bytes("Slab") - self._slab

    def user_bytes(self) -> int:
        """Resident memory since the start, all processes together."""
        return self._rss_now() - self._rss

    def kernel_bytes_each(self, sockets: int) -> float | None:
        """Slab per socket; None for so few that other changes on the host would drown it."""
        return self.kernel_bytes() / sockets if sockets >= ENOUGH_TO_WEIGH else None

    def user_bytes_each(self, connections: int) -> float | None:
        """Resident memory per connection, in the processes that are watched; None for a few."""
        return self.user_bytes() / connections if connections >= ENOUGH_TO_WEIGH else None

    def _rss_now(self) -> int:
        return sum(host.rss_bytes() for host in self._hosts)


def settle() -> None:
    """Wait, not long, until the kernel has freed the sockets of what came before: that goes on after a close."""
    before = meminfo_bytes("Slab")
    for _ in range(int(SETTLE_S / POLL_S)):
        time.sleep(POLL_S)
        now = meminfo_bytes("Slab")
        if before - now < STILL_BYTES:
            return
        before = now


def meminfo_bytes(key: str) -> int:
    """A line of /proc/meminfo in bytes; 0 if there is no such line."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return 0


def space(sources: str, source_ports: str, destinations: str, destination_ports: str = str(ECHO_PORT)) -> TupleSpace:
    """A TCP tuple space from the texts of its four sets."""
    return TupleSpace(
        sources=AddressSet.parse(sources),
        source_ports=PortSet.parse(source_ports),
        destinations=AddressSet.parse(destinations),
        destination_ports=PortSet.parse(destination_ports),
    )


def said(failure: Failure | None) -> str:
    """The kernel's answer as a row shows it."""
    return "" if failure is None else f"{failure.name} at {failure.step}()"


def limit_behind(name: str, call: str = "") -> str:
    """The catalogue's name for what ran out when `call` failed with this error; empty if nothing did."""
    if name not in SHORTAGES:
        return ""
    if name in ("ENOBUFS", "ENOMEM"):
        return memory_room()[1]
    return (suspects(call, name) or suspects("", name))[0].name
