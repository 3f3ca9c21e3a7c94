"""`fourtuple load` within TLS against real servers in a lab, and against whatever can go wrong with a handshake."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint
from tests.netns.certificates import Authority, Files
from tests.netns.loading import START_S, inside, run_load, server_address, serving
from tests.netns.test_load import FIRST_PORT, HERE, MANNERS

NAME = "server.test"
CUT_PORT = 7_100


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(("client", "server")) as made:
        yield made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def good(lab: Lab, authority: Authority) -> Files:
    return authority.sign(server_address(lab), NAME)


@pytest.fixture(scope="module")
def nginx(lab: Lab, authority: Authority, good: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ports: 8080 without TLS, 8443 TLS 1.2 only, 8444 TLS 1.3 only, from 8445 on one fault each."""
    folder = tmp_path_factory.mktemp("nginx")
    stranger = Authority.made(folder, "stranger")
    faults = (
        stranger.sign(server_address(lab)),
        authority.sign("other.test"),
        authority.sign(server_address(lab), age_days=200),
        authority.sign(server_address(lab), age_days=-5),
        authority.own(),
    )

    def server(port: int, files: Files, options: str = "") -> str:
        return f"""
            server {{
              listen {port} ssl backlog=1024; ssl_certificate {files.chain}; ssl_certificate_key {files.key}; {options}
              location / {{ return 200 "hello\\n"; }}
              location /no {{ return 503; }}
              location /large {{ root {folder}; }}
            }}"""

    (folder / "large").write_bytes(b"x" * 300_000)
    servers = [
        server(8443, good, "ssl_protocols TLSv1.2;"),
        server(8444, good, "ssl_protocols TLSv1.3;"),
        *(server(8445 + place, files) for place, files in enumerate(faults)),
    ]
    configuration = folder / "nginx.conf"
    configuration.write_text(
        textwrap.dedent(f"""
            daemon off; master_process off; user root; pid {folder}/pid; error_log {folder}/error.log;
            events {{ worker_connections 1000; }}
            http {{
              access_log off; keepalive_requests 1000000;
              client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
              uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
              server {{ listen 8080; location / {{ return 200 "plain\\n"; }} }}
              {"".join(servers)}
            }}
            """)
    )
    with serving(lab, "nginx", "-e", f"{folder}/error.log", "-c", str(configuration), port=8080) as address:
        yield address


@pytest.fixture(scope="module")
def trouble(lab: Lab) -> Iterator[str]:
    address = server_address(lab)
    command = [sys.executable, str(HERE / "troublemaker.py"), address, str(FIRST_PORT)]
    with subprocess.Popen(inside(lab, lab["server"], command), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield address
        server.kill()


@pytest.fixture(scope="module")
def cut(lab: Lab) -> Iterator[None]:
    """A server that says the beginning of a ServerHello, and ends."""
    yield from start_python(
        lab,
        f"""
        async def serve(reader, writer):
            await reader.read(65_536)
            writer.write(bytes((22, 3, 3, 0, 90, 2, 0, 0, 86, 3, 3)))
            writer.close()
        async def main():
            await asyncio.start_server(serve, "{server_address(lab)}", {CUT_PORT}, backlog=1_024)
            print("ready", flush=True)
            await asyncio.Event().wait()
        """,
    )


def start_python(lab: Lab, program: str) -> Iterator[None]:
    """A server that is an asyncio program: its `main` prints that it is ready."""
    whole = f"import asyncio, ssl\n{textwrap.dedent(program)}\nasyncio.run(main())\n"
    command = inside(lab, lab["server"], [sys.executable, "-c", whole])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.kill()


def load(lab: Lab, *options: str) -> dict[str, Any]:
    return run_load(lab, lab["client"], *options)


# Real servers


@pytest.mark.parametrize("port", [8443, 8444])
def test_nginx_keeps_secured_connections_alive(lab: Lab, nginx: str, authority: Authority, port: int) -> None:
    report = load(
        lab, f"https://{nginx}:{port}/", "--tls-ca", str(authority.ca), "-c", "200", "--duration", "1",
        "--ping-every", "0.2", "--fail-if", "p50_opening_ms <= 0 or openings_failed > 0",
    )  # fmt: skip
    assert (report["status"], report["held"], report["openings_right"]) == (0, 200, 200)
    assert report["causes"] == []
    assert (report["rounds_failed"], report["connected"]) == (0, 200), "not one was made anew"
    assert report["rounds_right"] >= 400
    assert report["opening"]["count"] == 200


def test_answers_of_many_records_and_one_that_says_no(lab: Lab, nginx: str, authority: Authority) -> None:
    options = ("--tls-ca", str(authority.ca), "--tls-server-name", NAME, "-c", "20", "--duration", "0.5", "--fin")
    large = load(lab, f"https://{nginx}:8444/large", *options)
    assert (large["status"], large["rounds_failed"]) == (0, 0)
    assert large["bytes_in"] > large["rounds_right"] * 300_000 > 0
    refused = load(lab, f"https://{nginx}:8443/no", *options)
    assert (refused["held"], refused["rounds_right"]) == (20, 0)
    assert refused["rounds_failed"] == refused["rounds"] > 0


def test_haproxy_ends_tls(lab: Lab, nginx: str, authority: Authority, good: Files, tmp_path: Path) -> None:
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(
        textwrap.dedent(f"""
            global
                maxconn 2000
            defaults
                mode http
                timeout connect 5s
                timeout client 30s
                timeout server 30s
            frontend tls
                bind {nginx}:9443 ssl crt {good.both} alpn http/1.1
                default_backend plain
            backend plain
                server nginx {nginx}:8080
            """)
    )
    with serving(lab, "haproxy", "-db", "-f", str(configuration), port=9443):
        report = load(
            lab, f"https://{nginx}:9443/", "--tls-ca", str(authority.ca), "-c", "100", "--duration", "1",
            "--ping-every", "0.2", "--carrier", "epoll",
        )  # fmt: skip
    assert (report["status"], report["held"], report["rounds_failed"]) == (0, 100, 0)
    assert report["rounds_right"] >= 200


def test_websockets_within_tls(lab: Lab, authority: Authority, good: Files) -> None:
    pytest.importorskip("websockets")
    address = server_address(lab)
    server = contextmanager(start_python)(
        lab,
        f"""
        from websockets.asyncio.server import serve
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain({str(good.chain)!r}, {str(good.key)!r})
        async def handler(connection):
            await connection.wait_closed()
        async def main():
            async with serve(handler, "{address}", 8765, ping_interval=0.3, ping_timeout=2, ssl=context):
                print("ready", flush=True)
                await asyncio.Event().wait()
        """,
    )
    with server:
        report = load(
            lab, f"wss://{address}:8765/chat", "--tls-ca", str(authority.ca), "-c", "50", "--duration", "1.5",
            "--ping-every", "0.3", "--size", "40",
        )  # fmt: skip
    assert (report["status"], report["openings_right"], report["held"]) == (0, 50, 50)
    assert report["rounds_right"] >= 100
    assert (report["rounds_failed"], report["closed_by_peer"]) == (0, 0), "its pings were answered"


@contextmanager
def s_server(lab: Lab, port: int, *options: str) -> Iterator[str]:
    """OpenSSL's own server, which serves one connection at a time and sends each line back reversed."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    command = [program, "s_server", "-accept", str(port), "-rev", *options]
    address = server_address(lab)
    with subprocess.Popen(
        inside(lab, lab["server"], command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        deadline_s = time.monotonic() + START_S
        while lab["client"].connect_once(Endpoint.parse(f"{address}:{port}")) != "ok":
            assert server.poll() is None, f"openssl ended with {server.returncode}"
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        try:
            yield address
        finally:
            server.kill()


def test_a_typed_dialogue_within_tls_and_a_certificate_of_ours(lab: Lab, authority: Authority, good: Files) -> None:
    client = authority.sign("client.test")
    verifying = ("-Verify", "1", "-verify_return_error", "-CAfile", str(authority.ca))
    said = ("--say", r"abc\n", "--expect", r"cba\n", "--tls-ca", str(authority.ca), "-c", "1", "--duration", "0.6")
    shown = ("--tls-cert", str(client.chain), "--tls-key", str(client.key))
    with s_server(
        lab, 4433, "-cert_chain", str(good.chain), "-cert", str(good.chain), "-key", str(good.key), *verifying
    ) as address:
        report = load(lab, f"tls://{address}:4433", *said, *shown, "--ping-every", "0.1")
        assert (report["status"], report["rounds_failed"]) == (0, 0)
        assert report["rounds_right"] >= 2
        without = load(lab, f"tls://{address}:4433", *said, "--no-replace")
    assert "--tls-cert" in cause(without, "it wants a certificate of ours")["evidence"]


# Whatever can go wrong


def cause(report: dict[str, Any], what: str) -> dict[str, Any]:
    """The first cause whose text begins so."""
    for found in report["causes"]:
        if found["what"].startswith(what):
            return dict(found)
    raise AssertionError(f"{what} is none of {report['causes']}")


BOTH, THERE = "not to be told from here", "the other side"
FAULTS = (
    ("stranger", 8445, (), BOTH, "its certificate leads to no authority that is trusted here", "--tls-ca"),
    ("other-name", 8446, (), BOTH, "its certificate is for another name", "--tls-server-name"),
    ("expired", 8447, (), THERE, "its certificate has expired", "--tls-insecure"),
    ("early", 8448, (), BOTH, "its certificate is not valid yet", "clock"),
    ("self-signed", 8449, (), THERE, "its certificate is that of an authority", "--tls-insecure"),
    ("plain", 8080, (), THERE, "what it says is not TLS", "http://"),
    ("garbage", FIRST_PORT + MANNERS.index("garbage"), (), THERE, "what it says is not TLS", ""),
    ("stall", FIRST_PORT + MANNERS.index("stall"), ("--connect-timeout", "0.4"), THERE, "it stalls in the TLS", ""),
    ("reset", FIRST_PORT + MANNERS.index("reset"), (), THERE, "the connection breaks in the TLS handshake", ""),
    ("cut", CUT_PORT, (), THERE, "it closes the connection in the TLS handshake", ""),
    ("echo", FIRST_PORT + MANNERS.index("echo"), (), THERE, "it breaks the rules of TLS", ""),
)


@pytest.fixture(scope="module")
def faulty(lab: Lab, nginx: str, trouble: str, cut: None, authority: Authority) -> list[dict[str, Any]]:
    """A report per row, all run at once: each spends most of its time waiting."""

    def one(row: tuple[str, int, tuple[str, ...], str, str, str]) -> dict[str, Any]:
        options = ("-c", "30", "--duration", "0.3", "--no-replace", "--workers", "1", "--tls-ca", str(authority.ca))
        return load(lab, f"https://{nginx}:{row[1]}/", *options, *row[2])

    assert nginx == trouble
    with ThreadPoolExecutor(max_workers=4) as threads:
        return list(threads.map(one, FAULTS))


@pytest.mark.parametrize("row", range(len(FAULTS)), ids=[row[0] for row in FAULTS])
def test_a_handshake_that_fails_is_named(faulty: list[dict[str, Any]], row: int) -> None:
    report, (_, _, _, side, what, remedy) = faulty[row], FAULTS[row]
    found = cause(report, what)
    assert (found["side"], found["count"], report["held"]) == (side, 30, 0)
    assert remedy in found["evidence"]
    assert (report["openings_failed"], report["openings_right"], report["status"]) == (30, 0, 1)
    assert report["stopped_by"] is not None


def test_nothing_in_common(lab: Lab, authority: Authority, good: Files) -> None:
    identity = ("-cert", str(good.chain), "-key", str(good.key))
    options = ("-c", "1", "--duration", "0.1", "--no-replace", "--tls-ca", str(authority.ca))
    with s_server(lab, 4434, *identity, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA") as address:
        report = load(lab, f"tls://{address}:4434", *options)
    assert cause(report, "it says that no TLS version")["side"] == THERE
    with s_server(lab, 4435, *identity, "-alpn", "h2") as address:
        report = load(lab, f"tls://{address}:4435", *options, "--tls-alpn", "http/1.1,foo")
    assert "--tls-alpn" in cause(report, "it speaks none of the protocols")["evidence"]


def test_any_certificate_will_do_if_asked(lab: Lab, nginx: str) -> None:
    for port in (8446, 8449):
        report = load(lab, f"https://{nginx}:{port}/", "--tls-insecure", "-c", "10", "--duration", "0.2")
        assert (report["status"], report["openings_right"]) == (0, 10)


def test_a_websocket_that_did_not_read_our_key(lab: Lab) -> None:
    address = server_address(lab)
    server = contextmanager(start_python)(
        lab,
        f"""
        async def serve(reader, writer):
            await reader.readuntil(b"\\r\\n\\r\\n")
            writer.write(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
                         b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\\r\\n\\r\\n")
            await reader.read()
        async def main():
            await asyncio.start_server(serve, "{address}", 8766)
            print("ready", flush=True)
            await asyncio.Event().wait()
        """,
    )
    with server:
        report = load(lab, f"ws://{address}:8766/", "-c", "20", "--duration", "0.2", "--no-replace")
    assert cause(report, "its Sec-WebSocket-Accept does not prove")["count"] == 20
    assert (report["held"], report["status"]) == (0, 1)
