"""What `fourtuple load` decides without a socket: URLs, conditions, words to say, and whose fault an error is."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from fourtuple import _core  # noqa: TID251  # the names as Rust has them
from fourtuple.cli.main import main
from fourtuple.dialogue import Act, Dialogue, Expect, Pong, Response, Rest, Say, Skip, Until, Upgrade, Wait, said
from fourtuple.engine import CarrierSettings, EchoConfig, Engine, Failure, LoadConfig, Snapshot, SourceChoice, TlsConfig
from fourtuple.errors import BadConfig
from fourtuple.facts import Conntrack, Host, RLimit, Sockets
from fourtuple.limits import by_name
from fourtuple.load import NUMBERS, Condition, Scenario, Scheme, Side, Target, TlsOptions
from fourtuple.load.attribution import Cause, Witness, attribute
from fourtuple.load.presets import http, typed, unescaped, websocket
from fourtuple.load.reasons import OPENING_REASONS, ROUND_REASONS
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace
from tests.netns.certificates import Authority

HOSTS = Path(__file__).parents[1] / "hosts"
QUIET = Host.model_validate_json((HOSTS / "recorded.json").read_text()).model_copy(
    update={"conntrack": Conntrack(loaded=False), "rule_limits": (), "poisoned_ports": (), "sockets": Sockets()}
)

SPACE = TupleSpace(
    sources=AddressSet.parse("10.0.0.1"),
    source_ports=PortSet.parse("40000-40099"),
    destinations=AddressSet.parse("10.0.0.9"),
    destination_ports=PortSet.of(80),
)


# URLs


@pytest.mark.parametrize(
    ("url", "scheme", "size", "ports", "path"),
    [
        ("tcp://127.0.0.1:6379", Scheme.TCP, 1, "6379", "/"),
        ("HTTP://10.0.0.1-10.0.0.8/a?b=c", Scheme.HTTP, 8, "80", "/a?b=c"),
        ("http://10.0.0.1,10.0.0.9:80-83?x", Scheme.HTTP, 2, "80-83", "/?x"),
        ("ws://[::1]:8080/chat", Scheme.WS, 1, "8080", "/chat"),
        ("udp://127.0.0.1:53", Scheme.UDP, 1, "53", "/"),
    ],
)
def test_a_url(url: str, scheme: Scheme, size: int, ports: str, path: str) -> None:
    target = Target.parse(url)
    assert target.addresses is not None
    assert (target.scheme, len(target.addresses), str(target.ports), target.path) == (scheme, size, ports, path)
    assert Target.parse(str(target)) == target


def test_a_name_is_resolved_later() -> None:
    target = Target.parse("http://localhost:8080/")
    assert (target.addresses, target.authority) == (None, "localhost:8080")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("127.0.0.1:80", "is none"),
        ("ftp://127.0.0.1:21", "not a scheme"),
        ("tcp://127.0.0.1", "names no port"),
        ("tcp://127.0.0.1:80-99999", "99999"),
        ("tcp://:80", "names no host"),
        ("tcp://127.0.0.1:80/path", "has no path"),
        ("udp://127.0.0.1:80/path", "a udp target has no path"),
        ("udp://127.0.0.1", "names no port"),
        ("tcp://10.0.0.999:80", "10.0.0.999"),
        ("http://bad_host!:80/", "neither an address nor a name"),
        ("http://127.0.0.1/a b", "%XX"),
        ("http://127.0.0.1/\r\nX: y", "%XX"),
        ("tcp://10.0.0.0-10.255.255.255:80", "1,000,000 endpoints"),
    ],
)
def test_a_url_that_is_none(url: str, named: str) -> None:
    with pytest.raises(BadConfig, match="URL") as refused:
        Target.parse(url)
    assert named in str(refused.value)


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_a_clear_error(text: str) -> None:
    for url in (text, f"tcp://{text}", f"http://{text}"):
        try:
            Target.parse(url)
        except BadConfig:
            continue


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"connections": 0}, "--connections"),
        ({"size_bytes": 15}, "--size"),
        ({"size_bytes": 2_049}, "--size"),
        ({"window": 0}, "--window"),
        ({"duration_s": -1.0}, "--duration"),
        ({"duration_s": float("nan")}, "--duration"),
        ({"sources": AddressSet.parse("::1")}, "--from"),
        ({"closed_loop": True, "round_every_s": 1.0}, "--closed-loop"),
        ({"target": Target.parse("udp://127.0.0.1:80"), "close_with_fin": True}, "--fin"),
    ],
)
def test_a_scenario_that_cannot_be(change: dict[str, object], option: str) -> None:
    scenario = Scenario(target=Target.parse("tcp://127.0.0.1:80"), connections=1)
    with pytest.raises(BadConfig) as refused:
        replace(scenario, **change)  # type: ignore[arg-type]
    assert refused.value.path == option


# Conditions

NAMES = {"held": 0, "p99_connect_ms": 0}


@pytest.mark.parametrize(
    ("text", "held", "p99", "holds"),
    [
        ("p99_connect_ms>50", 10, 50.1, True),
        ("p99_connect_ms > 50.5", 10, 50.5, False),
        ("held < 1_000 and p99_connect_ms >= 2 or held == 5", 5, 1, True),
        ("held < 1_000 and (p99_connect_ms >= 2 or held == 6)", 5, 1, False),
        ("3 != held", 3, 0, False),
        ("10 <= held", 10, 0, True),
    ],
)
def test_a_condition(text: str, held: float, p99: float, holds: bool) -> None:
    assert Condition.parse(text, NAMES).holds({"held": held, "p99_connect_ms": p99}) is holds


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the end"),
        ("held", "one of <"),
        ("held >", "a number or one of held, p99_connect_ms"),
        ("open > 5", "'open' stands where"),
        ("held > 5 or", "the end"),
        ("held > 5 held", "'held' stands where and, or"),
        ("(held > 5", "where ) is expected"),
        ("held > 5; import os", "';' is not understood"),
        ("__import__('os') > 1", "not understood"),
        ("(" * 300, "at most 200"),
        ("(" * 200, "the end"),
    ],
)
def test_a_condition_that_is_none(text: str, named: str) -> None:
    with pytest.raises(BadConfig, match="--fail-if") as refused:
        Condition.parse(text, NAMES)
    assert named in str(refused.value)


@given(st.text(alphabet="held p9_connt<>=!()0123456789.andor", max_size=40))
def test_any_text_is_a_condition_or_a_clear_error(text: str) -> None:
    try:
        condition = Condition.parse(text, NAMES)
    except BadConfig:
        return
    assert condition.holds({"held": 1.0, "p99_connect_ms": 1.0}) in (True, False)


# What is said


def test_words_typed_become_bytes() -> None:
    assert unescaped("--say", r"a\r\n\t\0\\\x7fé") == b"a\r\n\t\0\\\x7f\xc3\xa9"
    assert typed(r"PING\r\n", r"+PONG\r\n") == Dialogue(round=(Say(b"PING\r\n"), Expect(b"+PONG\r\n")))
    assert typed("x", "220 ...") == Dialogue(round=(Say(b"x"), Expect(b"220 "), Until(b"\n")))
    assert typed("x", "...") == Dialogue(round=(Say(b"x"), Until(b"\n")))
    assert typed("x", "22...", Scheme.UDP) == Dialogue(round=(Say(b"x"), Expect(b"22"), Rest()))
    with pytest.raises(BadConfig, match="a datagram here has at most"):
        typed("x" * 2_049, "y", Scheme.UDP)
    for text in (r"\q", "", r"\x4"):
        with pytest.raises(BadConfig):
            unescaped("--say", text)
    with pytest.raises(BadConfig, match="go together"):
        typed("x", None)


def test_presets_say_what_the_standards_want() -> None:
    get = http(Target.parse("http://[::1]:8080/x")).round[0]
    assert isinstance(get, Say)
    assert get.data.startswith(b"GET /x HTTP/1.1\r\nHost: [::1]:8080\r\n")
    dialogue = websocket(Target.parse("ws://127.0.0.1/"), 500, seed=1)
    asked, upgrade = dialogue.opening
    assert isinstance(asked, Say)
    assert isinstance(upgrade, Upgrade)
    key = asked.data.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
    assert upgrade.accept == base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    ping, pong = dialogue.round
    assert isinstance(ping, Say)
    assert isinstance(pong, Pong)
    assert (ping.data[:2], len(pong.data)) == (b"\x89\xfd", 125)
    mask = ping.data[2:6]
    assert bytes(byte ^ mask[place % 4] for place, byte in enumerate(ping.data[6:])) == pong.data


@pytest.mark.parametrize(
    "acts",
    [
        (Say(b""),),
        (Say(b"x" * 2_049),),
        (Expect(b"x" * 65_536),),
        (Until(b"ab", 1),),
        (Skip(0),),
        (Wait(0),),
        (Wait(float("nan")),),
        (Wait(100_000),),
        (Response(500, 200),),
        (Pong(b"x" * 126),),
        (Upgrade(b"too short"),),
        ("hello",),
        (Skip(1),) * 251,
    ],
)
def test_a_dialogue_that_cannot_be_played(acts: tuple[object, ...]) -> None:
    with pytest.raises(BadConfig):
        Dialogue(round=acts)  # type: ignore[arg-type]


def test_much_is_said_in_parts() -> None:
    data = bytes(range(256)) * 20
    assert b"".join(say.data for say in said(data)) == data
    dialogue = Dialogue(opening=said(data))
    assert dialogue.longest_say_bytes == 2_048
    config = LoadConfig(space=SPACE, connections=0, dialogue=dialogue)
    with pytest.raises(BadConfig, match=r"settings\.buffer_bytes"):
        Engine.start(config, workers=1, settings=CarrierSettings(buffer_bytes=1_024))


def test_a_dialogue_is_played_by_the_engine() -> None:
    long = bytes(range(1, 256)) * 40
    parts: list[Act] = [act for say in said(long) for act in (say, Expect(say.data))]
    dialogue = Dialogue(
        opening=(Say(b"hello"), Skip(2), Expect(b"llo"), *parts),
        round=(Say(b"ab\n"), Until(b"\n")),
    )
    port = _free_port()
    space = TupleSpace(
        sources=AddressSet.parse("127.0.0.1"),
        source_ports=PortSet.parse("1-65535"),
        destinations=AddressSet.parse("127.0.0.1"),
        destination_ports=PortSet.of(port),
    )
    config = LoadConfig(space=space, connections=20, choice=SourceChoice.KERNEL, dialogue=dialogue, abort_on_close=True)
    with Engine.start(EchoConfig(listen=(Endpoint.parse(f"127.0.0.1:{port}"),)), workers=1) as echo:
        echo.wait_for(lambda now: now.listening_now == 1, 10)
        with Engine.start(config, workers=1) as engine:
            engine.wait_for(lambda now: now.openings_right == 20, 10)
            engine.ping()
            now = engine.wait_for(lambda now: now.pings_answered == 20, 10)
    assert (now.pings_right, now.openings_failed) == (20, 0)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Whose fault it is


@pytest.fixture(scope="module")
def nothing() -> Snapshot:
    """A snapshot in which nothing has happened."""
    space = TupleSpace(
        sources=AddressSet.parse("127.0.0.1"),
        source_ports=PortSet.parse("1-2"),
        destinations=AddressSet.parse("127.0.0.1"),
        destination_ports=PortSet.of(9),
    )
    with Engine.start(LoadConfig(space=space, connections=0), workers=1) as engine:
        return engine.snapshot()


def first_cause(
    nothing: Snapshot, step: str, errno: int, host: Host = QUIET, fullest: int = 0, **counters: int
) -> Cause:
    failure = Failure(step=step, errno=errno, count=7)
    snapshot = structs.replace(nothing, failures=(failure,), stopped_by=failure, **counters)
    witness = Witness(before=QUIET, held=host, after=host, wanted=1, space=SPACE, fullest=fullest)
    return attribute(snapshot, witness)[0]


def with_counter(name: str, by: int) -> Host:
    return QUIET.model_copy(update={"counters": QUIET.counters | {name: QUIET.counters.get(name, 0) + by}})


EMFILE, ENFILE, ENOMEM, ECONNRESET, ENOBUFS, ETIMEDOUT, EADDRNOTAVAIL = 24, 23, 12, 104, 105, 110, 99


def test_a_full_connection_table_here(nothing: Snapshot) -> None:
    full = QUIET.model_copy(update={"conntrack": Conntrack(loaded=True, active=True, count=1_000, maximum=1_000)})
    found = first_cause(nothing, "connect", ETIMEDOUT, full)
    assert (found.side, found.limits, found.count) == (Side.CLIENT, ("conntrack-table",), 7)
    assert "1,000 of 1,000" in found.evidence
    dropped = first_cause(nothing, "connect", ETIMEDOUT, with_counter("conntrack.drop", 5))
    assert (dropped.side, dropped.limits) == (Side.CLIENT, ("conntrack-table",))


@pytest.mark.parametrize(
    ("counter", "limit"),
    [
        ("TcpExt.ListenOverflows", "accept-queue"),
        ("TcpExt.TCPReqQFullDrop", "syn-queue"),
        ("TcpExt.TCPSYNChallenge", "accept-queue"),
    ],
)
def test_a_full_queue_there(nothing: Snapshot, counter: str, limit: str) -> None:
    found = first_cause(nothing, "connect", ETIMEDOUT, with_counter(counter, 3))
    assert (found.side, found.limits[0]) == (Side.SERVER, limit)
    assert "3" in found.evidence


def test_silence_says_no_more_than_it_knows(nothing: Snapshot) -> None:
    assert first_cause(nothing, "connect", ETIMEDOUT).side is Side.BETWEEN
    assert first_cause(nothing, "connect", ETIMEDOUT, connects_succeeded=9).side is Side.SERVER
    assert first_cause(nothing, "connect", ETIMEDOUT, connects_succeeded=9, pings_right=9).side is Side.BETWEEN
    assert first_cause(nothing, "receive", ETIMEDOUT).side is Side.BETWEEN


def test_ports_by_their_evidence(nothing: Snapshot) -> None:
    waiting = QUIET.model_copy(update={"sockets": Sockets(time_wait=80)})
    poisoned = QUIET.model_copy(update={"poisoned_ports": ((1, 2),)})
    for host, fullest, first in (
        (QUIET, 100, "ephemeral-ports"),
        (waiting, 20, "time-wait"),
        (poisoned, 9, "poisoned-ports"),
    ):
        found = first_cause(nothing, "connect", EADDRNOTAVAIL, host, fullest)
        assert (found.side, found.limits[0]) == (Side.CLIENT, first)
        assert f"{fullest} of 100" in found.evidence


def test_a_space_that_is_used_up(nothing: Snapshot) -> None:
    witness = Witness(before=QUIET, held=QUIET, after=QUIET, wanted=130, space=SPACE)
    snapshot = structs.replace(nothing, connects_succeeded=90, tuples_busy=10)
    (found,) = attribute(snapshot, witness)
    assert (found.side, found.limits[0], found.count) == (Side.CLIENT, "ephemeral-ports", 30)
    assert "1 source addresses x 100 ports x 1 destinations = 100" in found.evidence
    assert attribute(structs.replace(snapshot, tuples_busy=9), witness) == ()


def test_a_busy_tuple_costs_nothing_where_another_was_taken(nothing: Snapshot) -> None:
    busy = Failure(step="connect", errno=EADDRNOTAVAIL, count=3)
    snapshot = structs.replace(nothing, failures=(busy,), tuples_busy=3)
    assert attribute(snapshot, Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE)) == ()


def test_what_runs_out_here(nothing: Snapshot) -> None:
    tight = QUIET.process.model_copy(update={"rlimits": {"NOFILE": RLimit(soft=64, hard=64)}})
    found = first_cause(nothing, "socket", EMFILE, QUIET.model_copy(update={"process": tight}))
    assert (found.side, found.limits[:2]) == (Side.CLIENT, ("descriptors-soft", "descriptors-hard"))
    for step, errno, limit in (
        ("socket", ENFILE, "files-on-host"),
        ("socket", ENOMEM, "kernel-memory"),
        ("send", ENOBUFS, "tcp-buffer-memory"),
    ):
        found = first_cause(nothing, step, errno)
        assert (found.side, found.limits[0]) == (Side.CLIENT, limit)


def test_a_reset_is_the_others(nothing: Snapshot) -> None:
    assert first_cause(nothing, "receive", ECONNRESET).side is Side.SERVER
    assert first_cause(nothing, "connect", ECONNRESET).limits == ("abort-on-overflow",)


def test_a_busy_client_is_said_to_be_so(nothing: Snapshot) -> None:
    witness = Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE, client_busy=0.97, fell_short=True)
    assert [cause.side for cause in attribute(nothing, witness)] == [Side.CLIENT]
    assert attribute(nothing, replace(witness, fell_short=False)) == ()


def test_a_client_that_waits_for_processors_is_busy_too(nothing: Snapshot) -> None:
    witness = Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE, client_busy=0.1, fell_short=True)
    assert attribute(nothing, witness) == ()
    found = attribute(nothing, replace(witness, client_wanted=1.0))
    assert "used 10%" in found[0].evidence
    assert "wanted 100%" in found[0].evidence


def test_late_answers_while_bytes_have_no_room_are_ours(nothing: Snapshot) -> None:
    late = structs.replace(nothing, pings_missing=7)
    pressed = QUIET.model_copy(update={"counters": {**QUIET.counters, "TcpExt.TCPMemoryPressures": 10**9}})
    witness = Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE)
    assert [cause.side for cause in attribute(late, witness)] == [Side.SERVER]
    (found,) = attribute(late, replace(witness, after=pressed))
    assert (found.side, found.count, found.limits) == (Side.CLIENT, 7, ("tcp-buffer-memory",))


def test_the_failure_that_stopped_it_comes_first(nothing: Snapshot) -> None:
    many = Failure(step="connect", errno=111, count=900)
    few = Failure(step="socket", errno=EMFILE, count=64)
    snapshot = structs.replace(nothing, failures=(many, few), stopped_by=few, closed_by_peer=10_000)
    causes = attribute(snapshot, Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE))
    assert [cause.error for cause in causes] == ["EMFILE", "", "ECONNREFUSED"]
    assert all(by_name(limit) is not None for cause in causes for limit in cause.limits)


# The command


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("tcp://127.0.0.1",), "names no port"),
        (("tcp://127.0.0.1:9", "--connections", "-1"), "not a count"),
        (("tcp://127.0.0.1:9", "--fail-if", "speed > 1"), "one of bro"),
        (("tcp://127.0.0.1:9", "--from", "10.0.0.1-"), "--from"),
        (("http://127.0.0.1:9/", "--say", "x", "--expect", "y"), "has its own words"),
        (("wss://127.0.0.1:9/", "--say", "x", "--expect", "y"), "has its own words"),
        (("tls://127.0.0.1:9/path",), "a tls target has no path"),
        (("tcp://127.0.0.1:9", "--say", "x"), "go together"),
        (("tcp://127.0.0.1:9", "--script", "/nowhere.py"), "cannot be run"),
        (("tcp://127.0.0.1:9", "--html", "/nowhere/report.html"), "cannot be written"),
        (("tcp://no.such.name.invalid:9",), "cannot be resolved"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", *arguments]) == 64
    assert named in capsys.readouterr().err


def test_what_is_asked_of_tls_has_to_make_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = Authority(tmp_path, "ours")
    good, empty = ours.sign("server.test"), tmp_path / "empty.pem"
    empty.write_text("")
    url = "tls://127.0.0.1:9"
    rows = (
        ((url, "--tls-ca", str(empty)), "--tls-ca: holds no PEM certificate"),
        ((url, "--tls-ca", str(good.key)), "--tls-ca: holds no PEM certificate"),
        ((url, "--tls-ca", str(tmp_path / "none")), "--tls-ca"),
        ((url, "--tls-ca", str(ours.ca), "--tls-insecure"), "leave out --tls-ca"),
        ((url, "--tls-insecure", "--tls-server-name", "no name"), "--tls-server-name"),
        ((url, "--tls-insecure", "--tls-alpn", "x" * 256), "--tls-alpn"),
        ((url, "--tls-cert", str(good.chain)), "--tls-key: is missing"),
        ((url, "--tls-insecure", "--tls-cert", str(good.chain), "--tls-key", str(ours.own().key)), "--tls-key"),
        (("tcp://127.0.0.1:9", "--tls-insecure"), "--tls-insecure: is for tls"),
        (("https://127.0.0.1-127.0.0.4/",), "--tls-server-name: is needed"),
    )
    for options, named in rows:
        assert main(["load", *options, "--duration", "0"]) == 64
        assert named in capsys.readouterr().err, options


def test_what_a_target_asks_of_tls() -> None:
    def config(url: str, **options: object) -> TlsConfig | None:
        return TlsOptions(**options).config(Target.parse(url))  # type: ignore[arg-type]

    for url, name, alpn in (
        ("https://server.test/", "server.test", (b"http/1.1",)),
        ("wss://10.0.0.1:99/", "10.0.0.1", (b"http/1.1",)),
        ("tls://[2001:db8::1]:99", "2001:db8::1", ()),
    ):
        found = config(url)
        assert found is not None
        assert (found.server_name, found.alpn, found.insecure) == (name, alpn, False)
    assert config("http://10.0.0.1/") is None
    several = config("tls://10.0.0.1-10.0.0.9:5", server_name="x.test", alpn=("a", "b"))
    assert several is not None
    assert (several.server_name, several.alpn) == ("x.test", (b"a", b"b"))
    named = replace(Target.parse("https://server.test:8443/"), addresses=AddressSet.parse("10.0.0.1"))
    assert named.authority == "server.test:8443", "a name stays one when it is resolved"


def test_every_reason_is_explained() -> None:
    assert set(OPENING_REASONS) == set(ROUND_REASONS) == set(_core.reasons())
    assert len({reason.what for reason in OPENING_REASONS.values()}) == len(OPENING_REASONS)


def test_reasons_become_causes(nothing: Snapshot) -> None:
    snapshot = structs.replace(nothing, opening_reasons=(("certificate-issuer", 4),), round_reasons=(("wrong", 2),))
    causes = attribute(snapshot, Witness(before=QUIET, held=QUIET, after=QUIET, wanted=0, space=SPACE))
    assert [(cause.side, cause.count) for cause in causes] == [(Side.BETWEEN, 4), (Side.SERVER, 2)]
    assert "--tls-ca" in causes[0].evidence


def test_a_script_without_a_dialogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    for text in ("dialogue = 5", "x = (", ""):
        script.write_text(text)
        assert main(["load", "tcp://127.0.0.1:9", "--script", str(script)]) == 64
        assert "--script" in capsys.readouterr().err


def test_every_number_is_read() -> None:
    assert {"held", "p99_connect_ms", "p999_answer_ms", "rate_per_s"} <= set(NUMBERS)
