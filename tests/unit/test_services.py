"""Names, services and routes: one spelling, hostile text, and the same judgement in Python and in Rust."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.brokerfile import BrokerFile
from fourtuple.errors import BadConfig
from fourtuple.registry import check
from fourtuple.services import Delivery, Match, Route, Seen, Service, canonical_name, canonical_pattern

LONG = ".".join(["a" * 63] * 4)[2:]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a", "a"),
        ("A.Example.COM.", "a.example.com"),
        ("_pg._tcp.x", "_pg._tcp.x"),
        ("Bücher.Example", "xn--bcher-kva.example"),
        ("BÜCHER。例え。テスト", "xn--bcher-kva.xn--r8jz45g.xn--zckzah"),
        ("_x.straße", "_x.xn--strae-oqa"),
        (LONG, LONG),
        (f"{LONG}.", LONG),
    ],
)
def test_one_spelling(text: str, name: str) -> None:
    assert canonical_name(text) == name
    assert canonical_name(name) == name


NO_NAMES = (
    "", ".", "..", "a..b", ".a", "a..", "-a", "a-", "a-.b", "a/b", "../a", "a\0b", "a b", "*.a", "a:80", "[::1]", "a\n",
    "%2e", "a\n.b", "\u2024", "a\u2215b", "ä/b", "-ä", "a" * 64, "ä" * 64, f"a{LONG}", "\ud800", "xn--ä", "a\u200db",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_NAMES)
def test_no_names(text: str) -> None:
    with pytest.raises(BadConfig, match="name: "):
        Service(name=text, target="unix:/a")


@given(st.text(max_size=80))
def test_python_and_rust_agree(text: str) -> None:
    """Of ASCII, both read names; of other text, what Python encodes is a name for Rust."""
    try:
        name = canonical_name(text)
    except BadConfig:
        if text.isascii() and text.isprintable():
            with pytest.raises(BadConfig):
                check([], [Route(to=f"service:{text}" if "{" not in text and "}" not in text else "service:")])
        return
    assert "/" not in name
    assert not name.startswith(".")
    assert ".." not in name
    check([Service(name=name, target=f"unix:/run/{name[:63]}")], [Route(match=Match(name=name), to=f"service:{name}")])


@pytest.mark.parametrize(
    ("text", "pattern"), [("*", "*"), ("**", "**"), ("*.A.b.", "*.a.b"), ("**.Ü.de", "**.xn--tda.de"), ("A", "a")]
)
def test_patterns(text: str, pattern: str) -> None:
    assert canonical_pattern(text) == pattern


@pytest.mark.parametrize("text", ["***", "*a", "a.*.b", "*.", "**.*.a", "*.a/b"])
def test_no_patterns(text: str) -> None:
    with pytest.raises(BadConfig, match="name: "):
        Match(name=text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", "unix:relative"), ("target", "unix:/a/../b"), ("target", "unix:/" + "a" * 107), ("target", 7),
        ("target", "tcp:1.2.3.4"), ("target", "tcp:1.2.3.4:0"), ("target", "tcp:[::1:80"), ("target", "http://a"),
        ("wide_port", 0), ("wide_port", 2**32), ("wide_port", True), ("wide_port", "7"),
        ("patience_ms", -1), ("connections", 0), ("proxy", 3), ("delivery", "handoff"),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(BadConfig) as refused:
        check([Service(**{"name": "a", "target": "unix:/a", field: value})], [])  # type: ignore[arg-type]
    assert field in refused.value.path


@pytest.mark.parametrize(
    ("match", "to", "field"),
    [
        ({}, "service:", "to"), ({}, "service:a/b", "to"), ({}, "unix:a", "to"), ({}, "", "to"), ({}, "a", "to"),
        ({}, "unix:/{label}", "to"), ({"name": "a.b"}, "unix:/{label}", "to"), ({"name": "*.b"}, "unix:/{labe}", "to"),
        ({"name": "*.b"}, "unix:/{label", "to"), ({"name": "*.b"}, "unix:/label}", "to"), ({}, "unix:/{user}", "to"),
        ({"path": "a"}, "unix:/a", "path"), ({"path": "/a b"}, "unix:/a", "path"),
        ({"path": "/a?b"}, "unix:/a", "path"),
        ({"protocol": "gopher"}, "unix:/a", "protocol"), ({"alpn": ""}, "unix:/a", "alpn"),
        ({"user": "a\0"}, "unix:/a", "user"), ({"client": "a" * 256}, "unix:/a", "client"),
        ({"source": "10.0.0.1/8"}, "unix:/a", "source"), ({"source": "10.0.0.0/33"}, "unix:/a", "source"),
        ({"destination": "a"}, "unix:/a", "destination"), ({"source_port": 65_536}, "unix:/a", "source_port"),
        ({"wide_port": 0}, "unix:/a", "wide_port"),
    ],
)  # fmt: skip
def test_bad_routes_name_their_field(match: dict[str, object], to: str, field: str) -> None:
    with pytest.raises(BadConfig) as refused:
        check([], [Route(match=Match(**match), to=to)])  # type: ignore[arg-type]
    assert refused.value.path == field


def test_what_goes_not_together() -> None:
    for service in (
        Service(name="a", target="tcp:1.2.3.4:5", delivery=Delivery.HANDOFF),
        Service(name="a", target="unix:/a", delivery=Delivery.HANDOFF, proxy=1),
    ):
        with pytest.raises(BadConfig):
            check([service], [])
    with pytest.raises(BadConfig, match="own delivery"):
        check([], [Route(to="service:a", delivery=Delivery.HANDOFF)])


def test_alpn_as_tls_writes_it() -> None:
    assert Seen(alpn=(b"h2", b"http/1.1")).alpn_list == b"\x02h2\x08http/1.1"
    with pytest.raises(BadConfig):
        Seen(alpn=(b"",))


WHOLE = """\
[[listen]]
address = "[::]:443"
default = "service:www"

[[service]]
name = "www"
target = "unix:/run/www.sock"
delivery = "handoff"

[[service]]
name = "Bücher.example"
target = \"\"\"tcp:\\
  127.0.0.1:80\"\"\"
proxy = 2

[[route]]
name = "*.pg.example.com"
to = "unix:/run/pg/{label}.sock"
"""


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(WHOLE)
    found = BrokerFile.read(path)
    assert [service.name for service in found.services] == ["www", "xn--bcher-kva.example"]
    assert found.routes[0].match.name == "*.pg.example.com"
    assert BrokerFile.parse(b"", "empty").services == ()


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("127.0.0.1:80", "127.0.0.1", 13, "service[1].target"),
        ("proxy = 2", "proxy = 3", 14, "service[1].proxy"),
        ("proxy = 2", "proxies = 2", 14, "service[1].proxies"),
        ("proxy = 2", 'proxy = "2"', 14, "service[1].proxy"),
        ('"Bücher.example"', '"www"', 11, "service[1].name"),
        ('"Bücher.example"', '"a/b"', 11, "service[1].name"),
        ("{label}", "{lable}", 18, "route[0].to"),
        ('to = "unix:/run/pg/{label}.sock"', "", 16, "route[0].to"),
        ('"handoff"', '"hand"', 8, "service[0].delivery"),
        ("unix:/run/www.sock", "tcp:[::1]:1", 8, "service[0].delivery"),
        ("[::]:443", "[::]:70000", 2, "listen[0].address"),
        ("[::]:443", ":::443", 2, "listen[0].address"),
        ("service:www", "service:nobody", 3, "listen[0].default"),
        ("[[listen]]", "[[listner]]", 1, "listner"),
    ],
)
def test_an_error_gives_line_and_key(old: str, new: str, line: int, key: str) -> None:
    assert old in WHOLE
    with pytest.raises(BadConfig) as refused:
        BrokerFile.parse(WHOLE.replace(old, new).encode(), "broker.toml")
    assert refused.value.path == "broker.toml"
    assert refused.value.why.startswith(f"line {line}, {key}: "), refused.value.why


PATTERNS = """\
[[listen]]
address = "127.0.0.1:443"
protocols = ["http1", "pattern:dns", "tcpmux"]

[[listen]]
address = "127.0.0.1:444"

[[pattern]]
name = "dns"
offset = 4
hex = "01 00"

[[pattern]]
name = "rtsp"
text = "OPTIONS rtsp:"

[[route]]
protocol = "pattern:rtsp"
to = "unix:/run/rtsp"
"""


def test_what_a_listener_looks_for() -> None:
    first, second = (file := BrokerFile.parse(PATTERNS.encode(), "broker.toml")).listen
    assert (first.probes, second.probes) == (("http", "tcpmux"), None)
    assert [[listener.wants(one) for one in file.pattern] for listener in file.listen] == [[True, False], [True, True]]
    dns, rtsp = (one.pattern() for one in file.pattern)
    assert (dns.offset, dns.bytes, rtsp.offset, rtsp.bytes) == (4, b"\x01\x00", 0, b"OPTIONS rtsp:")


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ('"http1"', '"http"', 3, "listen[0].protocols"),
        ('"http1"', '"unknown"', 3, "listen[0].protocols"),
        ("pattern:dns", "pattern:rdns", 3, "listen[0].protocols"),
        ("pattern:rtsp", "pattern:rtps", 18, "route[0].protocol"),
        ("pattern:rtsp", "pattern:", 18, "route[0].protocol"),
        ('"rtsp"', '"dns"', 14, "pattern[1].name"),
        ('"rtsp"', '"RTSP"', 14, "pattern[1].name"),
        ("offset = 4", "offset = 4096", 10, "pattern[0].offset"),
        ("offset = 4", "offset = 4095", 11, "pattern[0].hex"),
        ("offset = 4", "offset = -1", 10, "pattern[0].offset"),
        ("offset = 4", "at = 4", 10, "pattern[0].at"),
        ('"01 00"', '"0g"', 11, "pattern[0].hex"),
        ('"01 00"', '""', 11, "pattern[0].hex"),
        ('text = "OPTIONS rtsp:"', f'text = "{"x" * 65}"', 15, "pattern[1].text"),
        ('text = "OPTIONS rtsp:"', 'text = "a"\nhex = "61"', 13, "pattern[1]"),
        ('text = "OPTIONS rtsp:"', "", 13, "pattern[1]"),
    ],
)
def test_an_error_in_a_pattern_gives_line_and_key(old: str, new: str, line: int, key: str) -> None:
    assert old in PATTERNS
    with pytest.raises(BadConfig) as refused:
        BrokerFile.parse(PATTERNS.replace(old, new).encode(), "broker.toml")
    assert refused.value.why.startswith(f"line {line}, {key}: "), refused.value.why


@pytest.mark.parametrize("data", [b"a = ", b"\xff", b"a = [" * 5_000, b"x" * (5 << 20), b'a = "\0"'])
def test_what_is_no_toml(data: bytes) -> None:
    with pytest.raises(BadConfig, match=r"broker\.toml: "):
        BrokerFile.parse(data, "broker.toml")


@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda text: f"[[service]]\nname = {json.dumps(text)}".encode())
)
@settings(max_examples=200)
def test_any_bytes_are_a_file_or_an_error(data: bytes) -> None:
    with suppress(BadConfig):
        BrokerFile.parse(data, "broker.toml")


DAMAGE = st.tuples(
    st.integers(0, len(WHOLE)), st.integers(0, 12), st.text(max_size=6) | st.sampled_from("[]{}='\"\n#.,0-")
)
"""From where, how much is lost, and what stands there instead."""


@given(st.lists(DAMAGE, min_size=1, max_size=3))
@settings(max_examples=150)
def test_a_damaged_file_is_a_file_or_an_error_with_its_line(damages: list[tuple[int, int, str]]) -> None:
    text = WHOLE
    for start, lost, instead in damages:
        text = text[:start] + instead + text[start + lost :]
    refused = None
    try:
        found = BrokerFile.parse(text.encode(errors="replace"), "broker.toml")
        check(found.services, found.routes)
    except BadConfig as error:
        refused = error
    if refused is not None:
        placed = re.search(r"\bline (\d+)|end of document", refused.why)
        assert refused.path == "broker.toml"
        assert placed, refused.why
        assert int(placed[1] or 1) <= text.count("\n") + 1
