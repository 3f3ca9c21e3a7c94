"""One load run: ramp, hold, read, close; and a report, also of a run that was interrupted or went wrong.

Decides the course of a run and what is read when. What a peer does is the engine's to count and `attribution`'s to
explain. Watches its own host: facts before, at the end of the ramp and after.
"""

from __future__ import annotations

import os
import resource
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fourtuple.doctor import diagnose
from fourtuple.engine import CarrierName, Engine, LoadConfig, Phase, Snapshot, SourceChoice, raise_soft_descriptors
from fourtuple.errors import BadConfig
from fourtuple.facts import Flow, Host
from fourtuple.host import read_host
from fourtuple.host.sockdiag import udp_flows
from fourtuple.load import presets, reach
from fourtuple.load.attribution import Cause, Witness, attribute, of_script
from fourtuple.load.meter import Reading
from fourtuple.load.report import Latency, PortUse, Report, Sample
from fourtuple.load.scenario import Scenario, Scheme
from fourtuple.load.sessions import Crew
from fourtuple.tuples import AddressSet, PortSet, Protocol, TupleSpace

GLANCE_S = 0.1
REPLACE_EVERY_S = 0.5
"""Ended connections are made anew no more often: a server that closes at once does not keep us busy for ever."""
CLOSING_S = 30.0
ENOUGH_TO_WEIGH = 1_000
MOST_PORT_ROWS = 64
MOST_SAMPLES = 600
MOST_ROUNDS_AT_ONCE = 65_535
SPARE_DESCRIPTORS = 48
"""Held back while the ramp may use up all others, so that there is something to read /proc with."""
_DEFAULT_RANGE = (32_768, 60_999)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What somebody who watches is told."""

    phase: str
    snapshot: Snapshot
    wanted: int
    elapsed_s: float
    is_datagrams: bool


Watch = Callable[[Progress], None]


def play(scenario: Scenario, watch: Watch, *, owned: bool = False) -> Report:
    """Do it. `owned` says that the user may put load on the target, wherever it is."""
    target = reach.resolve(scenario.target)
    if target.addresses is None:
        raise AssertionError("a resolved target has addresses")
    before = read_host(probe_ports=False)
    if not owned:
        reach.require_own(target.addresses, before)
    sources = scenario.sources or reach.source_for(target.addresses)
    scenario = replace(scenario, target=target, sources=sources)
    raise_soft_descriptors()
    return _Run(scenario, sources, target.addresses, before, watch).play()


class _Run:
    def __init__(
        self, scenario: Scenario, sources: AddressSet, destinations: AddressSet, before: Host, watch: Watch
    ) -> None:
        low, high = (*before.sysctl_ints("net.ipv4.ip_local_port_range"), *_DEFAULT_RANGE)[:2]
        self.scenario, self.before, self.watch = scenario, before, watch
        self.space = TupleSpace(
            sources=sources,
            source_ports=PortSet.parse(f"{low}-{high}"),
            destinations=destinations,
            destination_ports=scenario.target.ports,
            protocol=Protocol.UDP if scenario.target.scheme is Scheme.UDP else Protocol.TCP,
        )
        self.samples: list[Sample] = []
        self.replaced = 0
        self.held = before
        self.flows: tuple[Flow, ...] = ()
        self.spare: list[int] = []
        self.pids: tuple[int, ...] = ()

    def play(self) -> Report:
        started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.start = Reading.now()
        self.ramped = self.pressed = self.start
        interrupted = False
        self.spare = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(SPARE_DESCRIPTORS)]
        with self._player() as engine:
            if isinstance(engine, Crew):
                self.pids = engine.pids
                # What the interpreters take is not the connections'.
                self.start = self.ramped = self.pressed = Reading.now(self.pids)
            self.ramp_end = engine.snapshot()
            try:
                self._ramp(engine)
                self._hold(engine)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                self._release()
            last, end = engine.snapshot(), Reading.now(self.pids)
            engine.close()
            try:
                engine.join(CLOSING_S)
            except KeyboardInterrupt:
                interrupted = True
        return self._report(engine, last, end, started_at, interrupted=interrupted)

    def _player(self) -> Engine | Crew:
        if self.scenario.script is not None:
            _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
            return Crew(self.scenario, self.scenario.script, self.space, descriptors)
        try:
            return Engine.start(self._config(), CarrierName(self.scenario.carrier), self.scenario.workers)
        except BadConfig as problem:
            # What a file holds is only seen by who reads certificates.
            if not problem.path.startswith("tls."):
                raise
            option = "--" + problem.path.replace(".", "-").replace("_", "-")
            raise BadConfig(option, problem.why) from None

    def _config(self) -> LoadConfig:
        scenario = self.scenario
        seed = secrets.randbits(64)
        # Every tuple by arithmetic: flat up to the last one, spread over all pairs, and no port is poisoned for others
        # (catalogue A4, A8).
        by_range = self.before.features.get("local_port_range", False)
        return LoadConfig(
            space=self.space,
            connections=scenario.connections,
            choice=SourceChoice.SINGLE_PORT if by_range else SourceChoice.KERNEL_PORT,
            window=scenario.window,
            rate_per_s=scenario.rate_per_s,
            connect_timeout_s=scenario.connect_timeout_s,
            ping_timeout_s=scenario.answer_timeout_s,
            token_bytes=scenario.size_bytes,
            seed=seed,
            # In a closed loop as many rounds are under way as there are connections: that is what is asked for.
            ping_window=min(scenario.connections, MOST_ROUNDS_AT_ONCE) if scenario.closed_loop else 256,
            ping_every_s=scenario.round_every_s,
            closed_loop=scenario.closed_loop,
            abort_on_close=not scenario.close_with_fin,
            tls=scenario.tls.config(scenario.target),
            dialogue=scenario.dialogue or presets.preset(scenario.target, scenario.size_bytes, seed),
        )

    def _ramp(self, engine: Engine | Crew) -> None:
        deadline_s = self.start.at_s + self.scenario.ramp_timeout_s
        while True:
            now = self._look(engine, "ramping")
            if now.phase is not Phase.RAMPING or not now.running:
                break
            # The last moment at which there was something to do: after it the processor is idle for another reason.
            self.pressed = Reading.now(self.pids)
            if time.monotonic() >= deadline_s:
                engine.set_target(now.open_now)
                break
            time.sleep(GLANCE_S / 2)
        self._release()
        self.ramped, self.ramp_end = Reading.now(self.pids), now
        self.held = read_host(probe_ports=False)
        self.flows = tuple(
            self._own_flows(udp_flows() if self.scenario.target.scheme is Scheme.UDP else self.held.flows)
        )

    def _hold(self, engine: Engine | Crew) -> None:
        begun_s = time.monotonic()
        deadline_s, next_replace_s = begun_s + self.scenario.duration_s, begun_s + REPLACE_EVERY_S
        complete = self.ramp_end.connects_succeeded >= self.scenario.connections
        if self.scenario.round_every_s or self.scenario.closed_loop:
            engine.ping()
        while (now_s := time.monotonic()) < deadline_s:
            now = self._look(engine, "holding")
            if not now.running:
                break
            if complete and self.scenario.replace and now_s >= next_replace_s:
                next_replace_s = now_s + REPLACE_EVERY_S
                if now.open_now < self.scenario.connections and now.phase is not Phase.RAMPING:
                    engine.set_target(self.scenario.connections)
            time.sleep(min(GLANCE_S, max(0.0, deadline_s - now_s)))

    def _look(self, engine: Engine | Crew, phase: str) -> Snapshot:
        now = engine.snapshot()
        elapsed_s = time.monotonic() - self.start.at_s
        if not self.samples or elapsed_s - self.samples[-1].at_s >= 1.0:
            self.samples.append(Sample(at_s=elapsed_s, open_now=now.open_now, rounds_right=now.pings_right))
            if len(self.samples) > MOST_SAMPLES:
                del self.samples[1::2]
        self.watch(
            Progress(
                phase=phase,
                snapshot=now,
                wanted=self.scenario.connections,
                elapsed_s=elapsed_s,
                is_datagrams=self.scenario.target.scheme is Scheme.UDP,
            )
        )
        return now

    def _release(self) -> None:
        while self.spare:
            os.close(self.spare.pop())

    def _report(
        self, engine: Engine | Crew, last: Snapshot, end: Reading, started_at: str, *, interrupted: bool
    ) -> Report:
        wanted = self.scenario.connections
        after = read_host(probe_ports=False)
        ramp_s = max(self.ramped.at_s - self.start.at_s, 1e-9)
        connected = self.ramp_end.connects_succeeded
        rate_per_s = connected / ramp_s
        short = connected < wanted or (0 < self.scenario.rate_per_s * 0.9 > rate_per_s)
        witness = Witness(
            before=self.before,
            held=self.held,
            after=after,
            wanted=wanted,
            space=self.space,
            fullest=max((flow.connections for flow in self.flows), default=0),
            client_busy=self.pressed.busy_since(self.start),
            client_wanted=self.pressed.wanted_since(self.start),
            fell_short=short,
        )
        script = engine.outcome() if isinstance(engine, Crew) else None
        causes = of_script(script) + attribute(last, witness)
        complete = _held(last) >= wanted
        return Report(
            target=str(self.scenario.target),
            started_at=started_at,
            kernel=self.before.kernel.release,
            carrier=engine.carrier.value,
            workers=engine.workers,
            wanted=wanted,
            held=_held(last),
            most_held=last.open_peak,
            interrupted=interrupted,
            verdict=_verdict(last, wanted, causes, self.scenario.target.noun, interrupted=interrupted),
            stopped_by=None if complete or not causes else causes[0].side,
            causes=causes,
            attempts=last.connects_attempted,
            connected=last.connects_succeeded,
            replaced=max(0, last.connects_succeeded - wanted),
            ramp_s=ramp_s,
            ramp_rate_per_s=rate_per_s,
            seconds=end.at_s - self.start.at_s,
            noun=self.scenario.target.noun,
            connect=Latency.of(last.connect_ns),
            opening=Latency.of(last.opening_ns),
            answer=Latency.of(last.echo_ns),
            openings_right=last.openings_right,
            openings_failed=last.openings_failed,
            rounds=last.pings_sent,
            rounds_right=last.pings_right,
            rounds_failed=last.pings_missing + last.pings_wrong + last.pings_refused,
            rounds_missing=last.pings_missing,
            rounds_wrong=last.pings_wrong,
            strays=last.datagrams_stray,
            closed_by_peer=last.closed_by_peer,
            broken=last.broken,
            bytes_in=last.bytes_in,
            bytes_out=last.bytes_out,
            user_bytes_per_connection=_each(self.ramped.rss_bytes - self.start.rss_bytes, self.ramp_end.open_now),
            kernel_bytes_per_connection=_each(
                self.ramped.kernel_bytes - self.start.kernel_bytes, self.ramp_end.open_now
            ),
            client_cpu_share=end.busy_since(self.start),
            client_cpu_us_per_connection=1e6 * (self.ramped.processor_s - self.start.processor_s) / max(1, connected),
            ports=tuple(self._port_use(flow) for flow in self.flows[:MOST_PORT_ROWS]),
            host_warnings=diagnose(self.held, goals=(), previous=self.before).reasons,
            samples=tuple(self.samples),
            script=script,
        )

    def _own_flows(self, flows: Iterable[Flow]) -> Iterable[Flow]:
        for flow in flows:
            there = flow.destination
            if there.port in self.space.destination_ports and there.address in self.space.destinations:
                yield flow

    def _port_use(self, flow: Flow) -> PortUse:
        return PortUse(
            source=flow.source,
            destination=str(flow.destination),
            used=flow.connections,
            of=len(self.space.source_ports),
        )


def _verdict(last: Snapshot, wanted: int, causes: tuple[Cause, ...], noun: str, *, interrupted: bool) -> str:
    held = _held(last)
    if held >= wanted:
        return f"All {wanted:,} {noun} are held"
    why = f"{causes[0].what} ({causes[0].side.value})" if causes else "the ramp took longer than it may"
    if interrupted and not causes:
        why = "interrupted"
    return f"{held:,} of {wanted:,} {noun} are held: {why}"


def _held(last: Snapshot) -> int:
    return last.open_now - last.openings_now


def _each(grown_bytes: int, connections: int) -> float | None:
    # A host that freed more than this run took says nothing about the run.
    return grown_bytes / connections if connections >= ENOUGH_TO_WEIGH and grown_bytes > 0 else None
