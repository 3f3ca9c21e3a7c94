"""What `fourtuple serve` can be told to look for: protocols of a listener, patterns, tcpmux; with real clients."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.netns.brokering import (
    PATIENCE_S,
    SERVE,
    echoing,
    free_port,
    get,
    listens,
    needed,
    process,
    run,
    said,
    wait_for,
)

HELLO = bytes.fromhex("1603010200010001fc0303")
"""The beginning of a TLS hello, which asks for more."""


@contextmanager
def broker(folder: Path, text: str, *services: str, listeners: int = 1) -> Iterator[tuple[list[int], list[str]]]:
    """Ports of the listeners `{0}`, `{1}` of the text, whose targets are `{folder}/NAME`; its last line."""
    ports = [free_port() for _ in range(listeners)]
    file = folder / "broker.toml"
    addresses = [f'address = "127.0.0.1:{port}"\nsniff_ms = 300' for port in ports]
    file.write_text(text.format(*addresses, folder=folder))
    printed: list[str] = []
    with ExitStack() as stack:
        for name in services:
            stack.enter_context(echoing(folder / name))
        started = stack.enter_context(process(*SERVE, "-c", str(file), "--json", "--grace", "1"))
        wait_for(lambda: all(map(listens, ports)) or started.poll() is not None)
        yield ports, printed
        started.send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=PATIENCE_S)
        printed.append(output.splitlines()[-1])
    assert started.returncode == 0, output


def test_each_listener_has_its_own_protocols_and_default(tmp_path: Path) -> None:
    text = """
        [[listen]]
        {0}
        protocols = ["http1", "ssh"]
        default = "unix:{folder}/rest"
        [[listen]]
        {1}
        protocols = ["tls"]
        default = "unix:{folder}/other"
        [[route]]
        protocol = "http1"
        to = "unix:{folder}/web"
        [[route]]
        protocol = "tls"
        to = "unix:{folder}/web"
    """
    with broker(tmp_path, text, "web", "rest", "other", listeners=2) as ((first, second), printed):
        assert said(first, get("a.example")) == b"web heard " + get("a.example")
        assert said(second, get("a.example")) == b"other heard " + get("a.example")
        # A hello is nothing that the first listener knows; the second waits for the rest, and gives nobody its start.
        assert said(first, HELLO) == b"rest heard " + HELLO
        assert said(second, HELLO) == b""
        # SSH is known to the first, and has no route: only then is it the default's.
        assert said(first, b"SSH-2.0-x\r\n") == b"rest heard SSH-2.0-x\r\n"
    assert json.loads(printed[0])["ended"]["sniff_deadline"] == 1


def test_real_clients_are_told_apart_by_bytes_at_an_offset(tmp_path: Path) -> None:
    """SOCKS 5 from curl, whose probe is off, and a DNS query over TCP, which has none."""
    needed("curl")
    text = """
        [[listen]]
        {0}
        default = "unix:{folder}/rest"
        [[pattern]]
        name = "dns-query"
        offset = 4
        hex = "01 00 00 01"
        [[pattern]]
        name = "socks5"
        hex = "05"
        [[pattern]]
        name = "rtsp"
        text = "OPTIONS rtsp:"
        [[route]]
        protocol = "pattern:socks5"
        to = "unix:{folder}/socks"
        [[route]]
        protocol = "pattern:dns-query"
        to = "unix:{folder}/dns"
    """
    query = bytes.fromhex("001d abcd 0100 0001 0000 0000 0000 0765 7861 6d70 6c65 0363 6f6d 0000 0100 01")
    with broker(tmp_path, text, "socks", "dns", "rest") as ((port,), _):
        assert said(port, query) == b"dns heard " + query
        # Not the answer that a SOCKS server gives (RFC 1928 3), and so curl shows that ours answered.
        verbose = run("curl", "-sv", "--socks5", f"127.0.0.1:{port}", "http://example.com/")
        assert "SOCKS5" in verbose
        assert said(port, b"\x05\x01\x00abcdef") == b"socks heard \x05\x01\x00abcdef"
        assert said(port, b"\x04\x01\x00abcdef") == b"rest heard \x04\x01\x00abcdef"


def test_tcpmux_names_services_and_numbers_mean_wide_ports(tmp_path: Path) -> None:
    text = """
        [[listen]]
        {0}
        protocols = ["tcpmux"]
        [[service]]
        name = "clock"
        target = "unix:{folder}/clock"
        [[service]]
        name = "far.example"
        target = "unix:{folder}/far"
        wide_port = 4294967295
    """
    with broker(tmp_path, text, "clock", "far") as ((port,), printed):
        # The line is the broker's, and + its answer (RFC 1078).
        assert said(port, b"CLOCK\r\nhello") == b"+\r\nclock heard hello"
        assert said(port, b"4294967295\r\nhello") == b"+\r\nfar heard hello"
        assert said(port, b"far.example\r\nhello") == b"+\r\nfar heard hello"
        assert said(port, b"4294967294\r\n") == b""
        assert said(port, b"absent\r\n") == b""
        assert said(port, b"no name\r\n") == b""
    ended = json.loads(printed[0])["ended"]
    assert (ended["relayed"], ended["no_route"]) == (3, 3)


def test_patterns_are_named_in_a_registry_too(tmp_path: Path) -> None:
    store = tmp_path / "registry"
    run(
        *SERVE[:3],
        "services",
        "route",
        "add",
        f"unix:{tmp_path}/socks",
        "--protocol",
        "pattern:socks5",
        "--store",
        str(store),
    )
    port, file = free_port(), tmp_path / "broker.toml"
    file.write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\n[[pattern]]\nname = "socks5"\nhex = "05"\n')
    with echoing(tmp_path / "socks"), process(*SERVE, "-c", str(file), "--store", str(store)):
        wait_for(lambda: listens(port))
        assert said(port, b"\x05\x01\x00") == b"socks heard \x05\x01\x00"


@pytest.mark.parametrize("what", ["pattern:x", "gopher"])
def test_a_route_wants_a_pattern_that_may_be(tmp_path: Path, what: str) -> None:
    added = run(
        *SERVE[:3], "services", "route", "add", "unix:/x", "--protocol", what, "--store", str(tmp_path / "store")
    )
    assert ("is not one of" in added) == (what == "gopher")
