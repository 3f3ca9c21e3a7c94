"""`fourtuple serve` behind HAProxy and in front of nginx: PROXY headers in and out, and whose address is told."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.brokering import listens, needed, process, run, wait_for

PATIENCE_S = 30


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def haproxy_file(folder: Path, broker: int, version_1: int, version_2: int) -> Path:
    """Two doors to the broker, each with its version of the header; health checks come as `LOCAL`."""
    path = folder / "haproxy.cfg"
    path.write_text(
        "global\n  maxconn 100\n"
        f"defaults\n  mode tcp\n  timeout connect 10s\n  timeout client {PATIENCE_S}s\n  timeout server {PATIENCE_S}s\n"
        f"listen one\n  bind 127.0.0.1:{version_1}\n  server s 127.0.0.1:{broker} source 127.0.0.3 send-proxy\n"
        f"listen two\n  bind 127.0.0.1:{version_2}\n"
        f"  server s 127.0.0.1:{broker} source 127.0.0.3 send-proxy-v2 check inter 200ms check-send-proxy\n"
    )
    return path


def nginx_file(folder: Path) -> Path:
    """Says whom the PROXY header names."""
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{ worker_connections 200; }}\nhttp {{ access_log off; client_body_temp_path {folder}/body;\n"
        f"proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;\n"
        f"scgi_temp_path {folder}/scgi; server {{ listen unix:{folder}/web proxy_protocol;\n"
        'location / { return 200 "$proxy_protocol_addr to $proxy_protocol_server_port\\n"; } } }\n'
    )
    return path


@pytest.mark.parametrize(("version", "carrier"), [(1, "uring"), (2, "epoll")])
def test_the_client_is_known_behind_two_proxies(tmp_path: Path, carrier: str, version: int) -> None:
    needed("haproxy", "nginx", "curl")
    port, one, two = free_ports(3)
    log, path = tmp_path / "log", tmp_path / "broker.toml"
    path.write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\nproxy_from = ["127.0.0.3"]\nsniff_ms = 2000\n'
        f'[[service]]\nname = "web.example.com"\ntarget = "unix:{tmp_path}/web"\nproxy = {version}\n'
        f'[[route]]\nname = "web.example.com"\nsource = "127.0.0.66"\nto = "unix:{tmp_path}/nowhere"\npatience_ms = 0\n'
    )
    serve = [sys.executable, "-m", "fourtuple", "serve", "-c", str(path), "--carrier", carrier, "--json"]
    with ExitStack() as stack:
        stack.enter_context(process("nginx", "-c", str(nginx_file(tmp_path))))
        wait_for(lambda: (tmp_path / "web").exists())
        broker = stack.enter_context(process(*serve, "--log", str(log)))
        wait_for(lambda: listens(port))
        stack.enter_context(process("haproxy", "-f", str(haproxy_file(tmp_path, port, one, two))))
        wait_for(lambda: listens(one) and listens(two))

        def asked(door: int, source: str) -> str:
            where = ("--resolve", f"web.example.com:{door}:127.0.0.1", "--interface", source)
            return run("curl", "-sm", str(PATIENCE_S), *where, f"http://web.example.com:{door}/")

        for door in (one, two):
            for source in ("127.0.0.7", "127.0.0.8"):
                assert asked(door, source) == f"{source} to {door}\n"
            # A route by source sees the client, too.
            assert asked(door, "127.0.0.66") == ""
        # Who comes by himself is himself, and cannot say otherwise.
        assert asked(port, "127.0.0.7") == f"127.0.0.7 to {port}\n"
        assert run("curl", "-sm", str(PATIENCE_S), "--haproxy-protocol", f"http://127.0.0.1:{port}/") == ""
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == 0, output
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    served = [entry for entry in entries if entry["service"] == "web.example.com"]
    peers = Counter(entry["peer"].rpartition(":")[0] for entry in served)
    assert peers == {"127.0.0.7": 3, "127.0.0.8": 2}
    assert sum(entry["reason"] == "service_absent" for entry in entries) == 2
    # Health checks say that they are the proxy's own, and leave.
    assert {entry["reason"] for entry in entries if (entry["peer"] or "").startswith("127.0.0.3:")} <= {"client_left"}
