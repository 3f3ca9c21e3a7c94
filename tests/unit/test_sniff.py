"""What the sniffers see of real clients, and beside another implementation; the command that shows it.

Clients connect to a listener of this test on loopback, which plays the broker: it looks, answers, and looks again.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, HeadersFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.cli import Exit
from fourtuple.cli.main import main
from fourtuple.engine import PROBES, Prelude, Sniffed, sniff
from fourtuple.errors import BadConfig

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@contextmanager
def client(command: Sequence[str]) -> Iterator[socket.socket]:
    """The connection of a program, whose `{port}` is where this test listens; skips where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        typed = [part.format(port=listener.getsockname()[1]) for part in command]
        with subprocess.Popen(
            typed, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(20)
                    yield connection
            finally:
                process.kill()


def look(connection: socket.socket, *, postgres_tls: bool = True, prelude: Prelude = Prelude.NONE) -> Sniffed:
    """Look until the verdict is final, sending each answer when it is first asked for."""
    opening, answered = b"", 0
    while True:
        seen = sniff(opening, postgres_tls=postgres_tls, prelude=prelude)
        for answer in seen.answers[answered:]:
            connection.sendall(answer)
        answered = len(seen.answers)
        if seen.verdict != "more":
            return seen
        more = connection.recv(65_536)
        assert more, f"the client went after {opening!r}"
        opening += more


CLIENTS: dict[str, tuple[list[str], dict[str, object]]] = {
    "openssl": (
        ["openssl", "s_client", "-connect", "127.0.0.1:{port}", "-servername", "A.Example", "-alpn", "h2,http/1.1"],
        {"protocol": "tls", "name": "a.example", "alpn": (b"h2", b"http/1.1")},
    ),
    "openssl, no name": (
        ["openssl", "s_client", "-connect", "127.0.0.1:{port}", "-noservername"],
        {"protocol": "tls", "name": None, "alpn": ()},
    ),
    "openssl, an address as name": (
        ["openssl", "s_client", "-connect", "127.0.0.1:{port}", "-servername", "127.0.0.1"],
        {"protocol": "tls", "name": None},
    ),
    "openssl of 1.2": (
        ["openssl", "s_client", "-connect", "127.0.0.1:{port}", "-tls1_2", "-servername", "a.example"],
        {"protocol": "tls", "name": "a.example"},
    ),
    "openssl of 1.1, which scanners alone speak": (
        ["openssl", "s_client", "-connect", "127.0.0.1:{port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
        {"protocol": "tls", "intent": "probe"},
    ),
    "node": (
        ["node", "-e", "require('tls').connect({{port: {port}, host: '127.0.0.1', servername: 'a.example'}})"],
        {"protocol": "tls", "name": "a.example"},
    ),
    "curl": (
        ["curl", "-s", "--connect-to", "::127.0.0.1:{port}", "http://A.Example:8080/x/y?z"],
        {"protocol": "http", "name": "a.example", "port": 8080, "path": b"/x/y", "intent": "use"},
    ),
    "curl, head": (
        ["curl", "-sI", "--connect-to", "::127.0.0.1:{port}", "http://a.example/"],
        {"protocol": "http", "name": "a.example", "intent": "probe"},
    ),
    "curl, SOCKS 4A": (
        ["curl", "-s", "-x", "socks4a://alice@127.0.0.1:{port}", "http://a.example/"],
        {"protocol": "socks4", "name": "a.example", "port": 80, "user": b"alice", "answers": ()},
    ),
    "curl, SOCKS 5": (
        ["curl", "-s", "--socks5-hostname", "127.0.0.1:{port}", "https://a.example/"],
        {"protocol": "socks5", "name": "a.example", "port": 443, "answers": (b"\x05\x00",)},
    ),
    "curl, RTSP": (["curl", "-s", "rtsp://127.0.0.1:{port}/"], {"protocol": "rtsp", "name": None, "intent": "probe"}),
    "curl, LDAP": (["curl", "-s", "ldap://127.0.0.1:{port}/dc=example"], {"protocol": "ldap", "starttls": False}),
    "curl, HTTP/2": (
        ["curl", "-s", "--http2-prior-knowledge", "--connect-to", "::127.0.0.1:{port}", "http://a.example/x?z"],
        {"protocol": "http2", "name": "a.example", "path": b"/x"},
    ),
    "nghttp": (
        ["nghttp", "-H", ":authority: a.example:81", "http://127.0.0.1:{port}/long/" + "x" * 3000],
        {"protocol": "http2", "name": "a.example", "port": 81, "path": b"/long/" + b"x" * 3000},
    ),
    "curl, tunnel": (
        ["curl", "-s", "-p", "-x", "http://127.0.0.1:{port}", "http://a.example:99/"],
        {"protocol": "connect", "name": "a.example", "port": 99},
    ),
    "curl, proxy": (
        ["curl", "-s", "-x", "http://127.0.0.1:{port}", "http://a.example/x"],
        {"protocol": "http", "name": "a.example", "path": b"/x"},
    ),
    "ssh": (["ssh", "-F", "none", "-p", "{port}", "127.0.0.1"], {"protocol": "ssh", "name": None}),
    "redis-cli": (["redis-cli", "-p", "{port}", "PING"], {"protocol": "redis"}),
    "redis-cli, user": (
        ["redis-cli", "-p", "{port}", "--user", "alice", "--pass", "secret", "-n", "2", "PING"],
        {"protocol": "redis", "user": b"alice"},
    ),
    "psql": (
        ["psql", "host=127.0.0.1 port={port} user=alice dbname=shop sslmode=disable gssencmode=disable"],
        {"protocol": "postgres", "user": b"alice", "database": b"shop", "answers": ()},
    ),
    "psql, TLS": (
        ["psql", "host=127.0.0.1 port={port} user=alice dbname=shop sslmode=require gssencmode=disable"],
        {"protocol": "postgres", "user": None, "answers": (b"S",)},
    ),
    "ldapwhoami": (
        ["ldapwhoami", "-x", "-H", "ldap://127.0.0.1:{port}", "-D", "cn=admin,dc=example", "-w", "secret"],
        {"protocol": "ldap", "user": b"cn=admin,dc=example", "starttls": False},
    ),
    "ldapwhoami, TLS": (
        ["ldapwhoami", "-x", "-ZZ", "-H", "ldap://127.0.0.1:{port}"],
        {"protocol": "ldap", "user": None, "starttls": True},
    ),
    "mcstatus": (
        [sys.executable, "-m", "mcstatus", "localhost:{port}", "status"],
        {"protocol": "minecraft", "name": "localhost", "intent": "probe"},
    ),
    "mosquitto_pub": (
        [
            "mosquitto_pub",
            "-p",
            "{port}",
            "-V",
            "5",
            "-i",
            "dev-1",
            "-u",
            "bob",
            "-t",
            "t",
            "-m",
            "m",
            "--will-topic",
            "w",
        ],
        {"protocol": "mqtt", "client": b"dev-1", "user": b"bob"},
    ),
    "mosquitto_pub of 3.1.1": (
        ["mosquitto_pub", "-p", "{port}", "-V", "311", "-i", "dev-1", "-t", "t", "-m", "m"],
        {"protocol": "mqtt", "client": b"dev-1", "user": None},
    ),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_real_client(name: str) -> None:
    command, expected = CLIENTS[name]
    with client(command) as connection:
        seen = look(connection)
    assert seen.verdict == "match", seen
    assert {field: getattr(seen, field) for field in expected} == expected


def test_psql_that_may_encrypt_is_declined_and_names_its_database() -> None:
    command = ["psql", "host=127.0.0.1 port={port} user=alice dbname=shop sslmode=prefer"]
    with client(command) as connection:
        seen = look(connection, postgres_tls=False)
    assert (seen.verdict, seen.user, seen.database) == ("match", b"alice", b"shop")
    assert set(seen.answers) == {b"N"}


def test_curl_behind_a_proxy_header() -> None:
    command = ["curl", "-s", "--haproxy-protocol", "--connect-to", "::127.0.0.1:{port}", "http://a.example/"]
    with client(command) as connection:
        expected = connection.getpeername()[1]
        seen = look(connection, prelude=Prelude.REQUIRED)
    assert seen.proxied is not None
    assert (seen.name, seen.proxied[0]) == ("a.example", f"127.0.0.1:{expected}")


@pytest.mark.parametrize("record", [1, 2, 100, 1 << 14])
def test_a_hello_of_this_python_in_records(record: int) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "x" * 255])
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="bücher.example").do_handshake()
    message = outgoing.read()[5:]
    parts = [message[at : at + record] for at in range(0, len(message), record)]
    seen = sniff(b"".join(b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in parts))
    assert (seen.protocol, seen.name, seen.alpn) == ("tls", "xn--bcher-kva.example", (b"h2", b"x" * 255))


names = st.from_regex(r"[a-zA-Z0-9_-]{1,20}(\.[a-zA-Z0-9-]{1,20}){0,3}", fullmatch=True)
paths = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=60)
fields = st.lists(st.tuples(st.text("abcdefgh-", min_size=1, max_size=9), st.text(max_size=40)), max_size=8)
sizes = st.sampled_from([0, 64, 4096])


@settings(deadline=None, max_examples=50)
@given(
    names, st.none() | st.integers(0, 65_535), paths, fields, st.booleans(), sizes, st.integers(1, 200), st.booleans()
)
def test_hpack_of_another_implementation(
    name: str,
    port: int | None,
    path: str,
    others: list[tuple[str, str]],
    huffman: bool,
    table_bytes: int,
    part_bytes: int,
    twice: bool,
) -> None:
    """The encoder of `hpack`, with its dynamic table and Huffman code, in frames of `hyperframe`."""
    authority = name if port is None else f"{name}:{port}"
    encoder = Encoder()
    encoder.header_table_size = table_bytes
    head = [(":method", "GET"), (":scheme", "http"), (":path", f"/{path}"), (":authority", authority)]
    block = encoder.encode([*head, *others, *(others if twice else [])], huffman)
    parts = [block[at : at + part_bytes] for at in range(0, len(block), part_bytes)]
    first = HeadersFrame(1, parts[0], flags=["END_HEADERS"] if len(parts) == 1 else [])
    frames = [SettingsFrame(0), first, *(ContinuationFrame(1, part) for part in parts[1:])]
    frames[-1].flags.add("END_HEADERS")
    seen = sniff(PREFACE + b"".join(frame.serialize() for frame in frames))
    assert (seen.verdict, seen.protocol) == ("match", "http2")
    assert (seen.name, seen.port, seen.path) == (name.lower(), port, f"/{path}".encode())


def test_a_request_of_another_implementation() -> None:
    connection = H2Connection(H2Configuration(client_side=True))
    connection.initiate_connection()
    head = [(":method", "POST"), (":scheme", "http"), (":authority", "a.example"), (":path", "/rpc.Service/Call")]
    connection.send_headers(1, [*head, ("content-type", "application/grpc")], priority_weight=9, priority_depends_on=0)
    seen = sniff(connection.data_to_send())
    assert (seen.protocol, seen.name, seen.path) == ("http2", "a.example", b"/rpc.Service/Call")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.sets(st.sampled_from(PROBES)), st.sampled_from(Prelude), st.booleans())
def test_any_bytes_get_a_verdict(opening: bytes, probes: set[str], prelude: Prelude, postgres_tls: bool) -> None:
    seen = sniff(opening, probes=sorted(probes), prelude=prelude, postgres_tls=postgres_tls)
    assert seen.verdict in {"match", "no", "more", "refused"}
    assert (seen.why is not None) == (seen.verdict == "refused")
    assert (seen.needed is not None) == (seen.verdict == "more")


def test_what_is_no_probe_or_no_bytes() -> None:
    with pytest.raises(BadConfig, match="'gopher' is no probe; allowed are tls, "):
        sniff(b"", probes=["gopher"])
    with pytest.raises(BadConfig, match="opening"):
        sniff("text")  # type: ignore[arg-type]


# The command.

REQUEST = b"GET /a/../b HTTP/1.1\r\nHost: A.Example\r\n\r\n"


def test_a_file_is_shown_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "opening").write_bytes(b"PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n" + REQUEST)
    assert main(["sniff", str(tmp_path / "opening"), "--proxy", "required", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    source, destination = (f"{IPv4Address('192.0.2.1')}:5", "192.0.2.2:80")
    assert shown["proxied"] == [source, destination]
    assert (shown["name"], shown["path"], shown["path_is_plain"]) == ("a.example", "/a/../b", False)


def test_standard_input_is_shown_in_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opening = b"CONNECT [2001:db8::1]:22 HTTP/1.1\r\n\r\n\x1b[2J"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(opening)))
    assert main(["sniff"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["verdict"], shown["protocol"], shown["name"]) == ("match", "connect", str(IPv6Address("2001:db8::1")))


def test_a_terminal_is_not_commanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "opening").write_bytes(b"\x10\x12\0\x04MQTT\x04\x02\0\x3c\0\x06\x1b[2J\\x")
    assert main(["sniff", str(tmp_path / "opening")]) == 0
    assert "\\x1b[2J\\x5cx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "tls,gopher"], "--only: 'gopher' is no probe; allowed are tls,"),
        (["--proxy", "maybe"], "--proxy: 'maybe' is not allowed; allowed are none, allowed, required"),
        (["/nonexistent"], "'/nonexistent' cannot be read: No such file"),
        (["/tmp"], "'/tmp' cannot be read: Is a directory"),
        (["a\0b"], "cannot be read"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sniff", *arguments]) == Exit.USAGE
    assert complaint in capsys.readouterr().err
