"""The engine as Python drives it, on 127.0.0.1 with the real carriers: small counts, all numbers cross-checked."""

from __future__ import annotations

import itertools
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from msgspec.structs import replace

from fourtuple import _core  # noqa: TID251  # its errors are the subject of one test
from fourtuple.dialogue import Dialogue, Pong, Response, Rest, Say
from fourtuple.engine import (
    CarrierName,
    CarrierSettings,
    EchoConfig,
    Engine,
    LoadConfig,
    Phase,
    Snapshot,
    SourceChoice,
    uring_abilities,
)
from fourtuple.errors import BadConfig, EngineStopped, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.tuples import AddressSet, Endpoint, PortSet, Protocol, TupleSpace

TIMEOUT_S = 20.0
_sources = (f"127.77.{high}.{low}" for high, low in itertools.product(range(256), range(1, 255)))


def _refusal(carrier: CarrierName) -> str:
    """Why the carrier cannot run here; empty if it can."""
    if carrier is CarrierName.URING:
        try:
            uring_abilities()
        except (MissingFeature, MissingPrivilege, LimitReached) as problem:
            return str(problem)
    return ""


@pytest.fixture(params=[CarrierName.URING, CarrierName.EPOLL], ids=lambda carrier: carrier.value)
def carrier(request: pytest.FixtureRequest) -> CarrierName:
    chosen: CarrierName = request.param
    if reason := _refusal(chosen):
        pytest.skip(f"{chosen.value} cannot run here: {reason}")
    return chosen


@pytest.fixture
def endpoint() -> Endpoint:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint(ip_address("127.0.0.1"), probe.getsockname()[1])


@pytest.fixture
def server(carrier: CarrierName, endpoint: Endpoint) -> Iterator[Engine]:
    with Engine.start(EchoConfig(listen=(endpoint,)), carrier, workers=2) as engine:
        engine.wait_for(lambda now: now.listening_now == 2, TIMEOUT_S)
        yield engine


def _load(endpoint: Endpoint, connections: int, **changes: Any) -> LoadConfig:  # noqa: ANN401  # fields of LoadConfig
    """A load on a source address that no other test uses, so that no TIME_WAIT of one meets another."""
    space = TupleSpace(
        sources=AddressSet.parse(next(_sources)),
        source_ports=PortSet(runs=((20_000, 20_000 + max(connections, 1) - 1),)),
        destinations=AddressSet.of(endpoint.address),
        destination_ports=PortSet.of(endpoint.port),
    )
    return replace(LoadConfig(space=space, connections=connections, seed=7), **changes)


def _held(connections: int) -> Any:  # noqa: ANN401  # a predicate
    return lambda now: now.open_now == connections and now.phase is Phase.HOLDING


@pytest.mark.parametrize("workers", [1, 2])
def test_each_of_500_connections_gets_its_token_back(
    carrier: CarrierName, server: Engine, endpoint: Endpoint, workers: int
) -> None:
    with Engine.start(_load(endpoint, 500), carrier, workers=workers) as client:
        client.wait_for(_held(500), TIMEOUT_S)
        server.wait_for(lambda now: now.open_now == 500, TIMEOUT_S)
        client.ping()
        pinged = client.wait_for(lambda now: now.pings_answered == 500, TIMEOUT_S)
        assert (pinged.pings_sent, pinged.pings_right, pinged.pings_wrong, pinged.pings_missing) == (500, 500, 0, 0)
        assert pinged.bytes_out == pinged.bytes_in == 500 * 16
        assert pinged.echo_ns.count == 500
        assert 0 < pinged.echo_ns.least <= pinged.echo_ns.p50 <= pinged.echo_ns.p99 <= pinged.echo_ns.most
        client.close()
        assert client.join(TIMEOUT_S)
        closed = client.snapshot()
    assert (closed.phase, closed.running, closed.open_now, closed.closed_by_us) == (Phase.DONE, False, 0, 500)
    assert closed.carrier.buffers_in_use == 0
    assert closed.errors == ()
    after = server.wait_for(lambda now: now.open_now == 0, TIMEOUT_S)
    assert after.accepts_succeeded == 500
    assert after.carrier.accept_lost == 0


def test_a_snapshot_adds_up(carrier: CarrierName, server: Engine, endpoint: Endpoint) -> None:
    with Engine.start(_load(endpoint, 300, rate_per_s=2_000), carrier, workers=2) as client:
        seen: list[Snapshot] = []

        def all_open(now: Snapshot) -> bool:
            seen.append(now)
            return now.open_now == 300

        client.wait_for(all_open, TIMEOUT_S)
    for now in seen:
        under_way = now.connects_attempted - now.connects_succeeded - now.connects_failed
        assert 0 <= under_way <= 256
        assert now.open_now == now.connects_succeeded - now.closed_by_us - now.closed_by_peer - now.broken
        assert now.connect_ns.count == now.connects_succeeded
    for before, after in itertools.pairwise(seen):
        assert after.connects_attempted >= before.connects_attempted
        assert after.taken_s >= before.taken_s


def test_orders_raise_the_target_and_the_rate(carrier: CarrierName, server: Engine, endpoint: Endpoint) -> None:
    load = replace(_load(endpoint, 200), connections=50, rate_per_s=1_000)
    with Engine.start(load, carrier, workers=2) as client:
        client.wait_for(_held(50), TIMEOUT_S)
        client.set_rate(0)
        client.set_target(200)
        client.wait_for(_held(200), TIMEOUT_S)


def test_stopping_in_the_middle_leaves_nothing_open(carrier: CarrierName, server: Engine, endpoint: Endpoint) -> None:
    with Engine.start(_load(endpoint, 400, rate_per_s=200), carrier) as client:
        client.wait_for(lambda now: now.open_now >= 20, TIMEOUT_S)
        client.stop()
        assert client.join(TIMEOUT_S)
        assert not client.running
        assert client.snapshot().connects_succeeded < 400
    server.wait_for(lambda now: now.open_now == 0 and now.accepts_succeeded >= 20, TIMEOUT_S)


def test_a_refusing_peer_is_counted_and_never_raised(carrier: CarrierName, endpoint: Endpoint) -> None:
    with Engine.start(_load(endpoint, 20), carrier) as client:
        now = client.wait_for(lambda now: now.connects_failed >= 20, TIMEOUT_S)
    assert now.open_now == 0
    assert [(failure.step, failure.name) for failure in now.failures] == [("connect", "ECONNREFUSED")]


def test_an_endpoint_in_use_is_counted_as_a_failed_listen(carrier: CarrierName) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint(ip_address("127.0.0.1"), other.getsockname()[1])
        with Engine.start(EchoConfig(listen=(taken,)), carrier, workers=1) as engine:
            now = engine.wait_for(lambda now: now.listens_failed == 1, TIMEOUT_S)
    assert [failure.name for failure in now.failures] == ["EADDRINUSE"]


def test_a_thousand_listeners_are_shared_out(carrier: CarrierName) -> None:
    listen = tuple(Endpoint(ip_address("127.0.0.1") + 256 * 77 + place, 7_777) for place in range(1_000))
    with Engine.start(EchoConfig(listen=listen), carrier, workers=2) as engine:
        now = engine.wait_for(lambda now: now.listening_now + now.listens_failed >= 1_000, TIMEOUT_S)
        assert (now.listening_now, now.listens_failed) == (1_000, 0)
        for place in (0, 1, 998, 999):
            with socket.create_connection((str(listen[place].address), 7_777), timeout=TIMEOUT_S) as peer:
                peer.sendall(b"through")
                assert peer.recv(16) == b"through"
        engine.wait_for(lambda now: now.listeners_served == 4, TIMEOUT_S)


def test_a_full_descriptor_table_is_a_counted_failure(endpoint: Endpoint) -> None:
    with Engine.start(EchoConfig(listen=(endpoint,)), CarrierName.EPOLL, workers=1) as server:
        server.wait_for(lambda now: now.listening_now == 1, TIMEOUT_S)
        answer = _with_few_descriptors(
            "here = Endpoint.parse(sys.argv[1])\n"
            "space = TupleSpace(sources=AddressSet.parse(sys.argv[2]), source_ports=PortSet.parse('20000-20999'),\n"
            "    destinations=AddressSet.of(here.address), destination_ports=PortSet.of(here.port))\n"
            "config = LoadConfig(space=space, connections=100)\n"
            "with Engine.start(config, CarrierName.EPOLL, workers=1) as engine:\n"
            "    now = engine.wait_for(lambda now: now.stopped_by is not None, 20)\n"
            "    print(now.stopped_by.name, now.stopped_by.step, 0 < now.open_now < 60)\n",
            str(endpoint),
            next(_sources),
        )
    assert answer.split() == ["EMFILE", "socket", "True"]


def test_no_descriptor_for_the_carrier_itself_is_a_limit_reached(endpoint: Endpoint) -> None:
    answer = _with_few_descriptors(
        "from contextlib import suppress\n"
        "import os\n"
        "with suppress(OSError):\n"
        "    while True:\n"
        "        os.dup(0)\n"
        "for carrier in CarrierName:\n"
        "    try:\n"
        "        Engine.start(EchoConfig(listen=(Endpoint.parse(sys.argv[1]),)), carrier, workers=1)\n"
        "    except FourtupleError as error:\n"
        "        print(type(error).__name__, error.limit)\n",
        str(endpoint),
    )
    assert answer.splitlines() == ["LimitReached descriptors-soft"] * 3


def _with_few_descriptors(script: str, *arguments: str) -> str:
    """What the script prints in a process of its own with RLIMIT_NOFILE 60: the limit is a process's."""
    before = (
        "import resource, sys\n"
        "from fourtuple.engine import CarrierName, EchoConfig, Engine, LoadConfig\n"
        "from fourtuple.errors import FourtupleError\n"
        "from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", before + script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_an_engine_that_only_listens_leaves_connections_in_the_queue(carrier: CarrierName, endpoint: Endpoint) -> None:
    with Engine.start(EchoConfig(listen=(endpoint,), backlog=8, accept=False), carrier, workers=1) as server:
        server.wait_for(lambda now: now.listening_now == 1, TIMEOUT_S)
        # The queue holds backlog + 1 (sk_acceptq_is_full); the rest get no answer to their SYN's last step.
        with Engine.start(_load(endpoint, 9), carrier, workers=1) as client:
            client.wait_for(_held(9), TIMEOUT_S)
        assert server.snapshot().accepts_succeeded == 0


def test_waiting_ends_with_a_reason(carrier: CarrierName, endpoint: Endpoint) -> None:
    with Engine.start(EchoConfig(listen=(endpoint,)), carrier, workers=1) as engine:
        with pytest.raises(TimeoutError, match=r"not within 0\.1 s"):
            engine.wait_for(lambda now: now.open_now > 0, 0.1)
        assert engine.join(0.1) is False
        engine.stop()
        with pytest.raises(EngineStopped, match="done before"):
            engine.wait_for(lambda now: now.open_now > 0, TIMEOUT_S)


def test_waiting_lets_other_threads_run(carrier: CarrierName, endpoint: Endpoint) -> None:
    with Engine.start(EchoConfig(listen=(endpoint,)), carrier, workers=1) as engine:
        timer = threading.Timer(0.2, engine.stop)
        timer.start()
        started_s = time.monotonic()
        assert engine.join(TIMEOUT_S)
        assert time.monotonic() - started_s < TIMEOUT_S / 2


def test_auto_says_what_it_took_and_why(endpoint: Endpoint) -> None:
    reason = _refusal(CarrierName.URING)
    with Engine.start(EchoConfig(listen=(endpoint,)), workers=1) as engine:
        assert engine.carrier is (CarrierName.EPOLL if reason else CarrierName.URING)
        assert bool(engine.fallback_reason) == bool(reason)
        assert engine.workers == 1


def test_a_carrier_that_does_not_exist_is_bad_config() -> None:
    config = EchoConfig(listen=(Endpoint(ip_address("127.0.0.1"), 1),))
    with pytest.raises(BadConfig, match=r"carrier: .*pigeon.*uring, epoll"):
        _core.Workers.start(config, "pigeon", 1, CarrierSettings())


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"connections": -1}, "connections"),
        ({"connections": 2**32}, "connections"),
        ({"connections": True}, "connections"),
        ({"connections": "many"}, "connections"),
        ({"window": 0}, "window"),
        ({"window": 65_536}, "window"),
        ({"rate_per_s": -1}, "rate_per_s"),
        ({"token_bytes": 15}, "token_bytes"),
        ({"token_bytes": 2_049}, "token_bytes"),
        ({"connect_timeout_s": 0}, "connect_timeout_s"),
        ({"connect_timeout_s": float("nan")}, "connect_timeout_s"),
        ({"ping_timeout_s": float("inf")}, "ping_timeout_s"),
        ({"ping_every_s": -1.0}, "ping_every_s"),
        ({"ping_window": None}, "ping_window"),
        ({"seed": 2**64}, "seed"),
        ({"give_up_after": 0}, "give_up_after"),
        ({"choice": "bind"}, "choice"),
        ({"space": None}, "space"),
        ({"abort_on_close": 1}, "abort_on_close"),
    ],
)
def test_a_wrong_load_value_is_named(endpoint: Endpoint, change: dict[str, Any], path: str) -> None:
    with pytest.raises(BadConfig) as caught:
        replace(_load(endpoint, 10), **change)
    assert caught.value.path == path
    assert repr(next(iter(change.values()))) in caught.value.why


def test_acts_are_for_streams_or_for_datagrams(endpoint: Endpoint) -> None:
    tcp = _load(endpoint, 1)
    udp = replace(tcp, space=replace(tcp.space, protocol=Protocol.UDP))
    for good, bad, act in ((udp, tcp, Rest()), (tcp, udp, Response()), (tcp, udp, Pong(b""))):
        replace(good, dialogue=Dialogue(round=(Say(b"x"), act)))
        with pytest.raises(BadConfig, match=rf"round\[1\]: is {type(act).__name__}"):
            replace(bad, dialogue=Dialogue(round=(Say(b"x"), act)))


def test_a_closed_loop_needs_a_round_and_no_interval(endpoint: Endpoint) -> None:
    for change in ({"ping_every_s": 1.0}, {"dialogue": Dialogue(opening=(Say(b"x"),))}):
        with pytest.raises(BadConfig, match="closed_loop"):
            replace(_load(endpoint, 1), closed_loop=True, **change)


def test_a_closed_loop_goes_on_until_it_is_closed(endpoint: Endpoint) -> None:
    with Engine.start(EchoConfig(listen=(endpoint,)), workers=1) as server:
        server.wait_for(lambda now: now.listening_now == 1, 10)
        with Engine.start(_load(endpoint, 20, closed_loop=True), workers=1) as load:
            load.wait_for(lambda now: now.phase is Phase.HOLDING, 10)
            load.ping()
            load.wait_for(lambda now: now.pings_right >= 20 * 20, 10)
            load.close()
            assert load.join(10)
            last = load.snapshot()
    assert (last.pings_wrong, last.pings_missing, last.open_now) == (0, 0, 0)


def test_a_wrong_space_is_named(endpoint: Endpoint) -> None:
    good = _load(endpoint, 10).space
    with pytest.raises(BadConfig, match=r"space\.sources: is empty"):
        LoadConfig(space=replace(good, sources=AddressSet()), connections=1)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"listen": ()}, "listen"),
        ({"listen": None}, "listen"),
        ({"listen": ("127.0.0.1:80",)}, "listen[0]"),
        ({"listen": (Endpoint.parse("127.0.0.1:80"),) * 2}, "listen"),
        ({"backlog": 0}, "backlog"),
        ({"most_connections": -1}, "most_connections"),
        ({"accept": "no"}, "accept"),
    ],
)
def test_a_wrong_echo_value_is_named(endpoint: Endpoint, change: dict[str, Any], path: str) -> None:
    with pytest.raises(BadConfig) as caught:
        replace(EchoConfig(listen=(endpoint,)), **change)
    assert caught.value.path == path


def test_wrong_orders_and_settings_are_named(carrier: CarrierName, endpoint: Endpoint) -> None:
    with pytest.raises(BadConfig, match="buffers_per_chunk"):
        CarrierSettings(buffers_per_chunk=0)
    with pytest.raises(BadConfig, match="workers"):
        Engine.start(EchoConfig(listen=(endpoint,)), carrier, workers=0)
    with Engine.start(EchoConfig(listen=(endpoint,)), carrier, workers=1) as engine:
        with pytest.raises(BadConfig, match="rate_per_s"):
            engine.set_rate(-5)
        with pytest.raises(BadConfig, match="timeout_s"):
            engine.join(float("nan"))


def test_configs_and_snapshots_cross_to_other_processes(endpoint: Endpoint) -> None:
    load, echo, settings = _load(endpoint, 10), EchoConfig(listen=(endpoint,)), CarrierSettings(slots_per_ring=64)
    assert pickle.loads(pickle.dumps((load, echo, settings))) == (load, echo, settings)
    with Engine.start(echo, CarrierName.EPOLL, workers=1) as engine:
        now = engine.snapshot()
    assert pickle.loads(pickle.dumps(now)) == now


@pytest.mark.parametrize("choice", list(SourceChoice))
def test_every_source_choice_connects(
    carrier: CarrierName, server: Engine, endpoint: Endpoint, choice: SourceChoice
) -> None:
    load = _load(endpoint, 20, choice=choice, abort_on_close=True)
    # The kernel's own choices, and SINGLE_PORT, stay inside net.ipv4.ip_local_port_range (A4).
    ports = PortSet(runs=((40_000, 40_999),))
    with Engine.start(replace(load, space=replace(load.space, source_ports=ports)), carrier, workers=1) as client:
        client.wait_for(_held(20), TIMEOUT_S)
