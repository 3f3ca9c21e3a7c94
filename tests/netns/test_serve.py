"""`fourtuple serve` between real clients and real services: curl, openssl and redis-cli; nginx and Redis."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.netns.brokering import PATIENCE_S, free_port, listens, needed, process, run, wait_for

NAMES = ("one.example.com", "two.example.com")


@pytest.fixture
def port() -> int:
    return free_port()


@contextmanager
def greeting(path: Path) -> Iterator[None]:
    """A service that speaks first, to everybody who comes; also to those who have left already."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.sendall(b"220 hello\r\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield
        # close() alone does not end an accept() in another thread.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def nginx_file(folder: Path) -> Path:
    run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=example.com", "-days", "2", "-keyout", str(folder / "key"), "-out", str(folder / "cert")),
    )
    servers = "".join(
        f"""
        server {{
            listen unix:{folder}/{name}.tls ssl; listen unix:{folder}/{name}.http;
            ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;
            location / {{ return 200 "{name} over $scheme\\n"; }}
        }}"""
        for name in NAMES
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{ worker_connections 200; }}\nhttp {{ access_log off; client_body_temp_path {folder}/body;\n"
        f"proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;\n"
        f"scgi_temp_path {folder}/scgi; {servers} }}\n"
    )
    return path


def broker_file(folder: Path, port: int) -> Path:
    routes = "".join(
        f'[[route]]\nname = "{name}"\nprotocol = "{protocol}"\nto = "unix:{folder}/{name}.{kind}"\n'
        for name in NAMES
        for protocol, kind in (("tls", "tls"), ("http1", "http"))
    )
    path = folder / "broker.toml"
    path.write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 300\ndefault = "unix:{folder}/banner"\n{routes}'
        f'[[route]]\nprotocol = "redis"\nto = "unix:{folder}/redis"\n'
        f'[[service]]\nname = "late.example.com"\ntarget = "unix:{folder}/late"\n'
    )
    return path


@pytest.mark.parametrize("carrier", ["uring", "epoll"])
def test_one_port_serves_nginx_redis_and_a_server_that_speaks_first(tmp_path: Path, port: int, carrier: str) -> None:
    needed("nginx", "redis-server", "redis-cli", "openssl", "curl")
    log = tmp_path / "log"
    serve = [sys.executable, "-m", "fourtuple", "serve", "-c", str(broker_file(tmp_path, port))]
    with ExitStack() as stack:
        stack.enter_context(process("nginx", "-c", str(nginx_file(tmp_path))))
        redis = (
            "redis-server",
            "--port",
            "0",
            "--unixsocket",
            f"{tmp_path}/redis",
            "--save",
            "",
            "--dir",
            str(tmp_path),
        )
        stack.enter_context(process(*redis))
        stack.enter_context(greeting(tmp_path / "banner"))
        broker = stack.enter_context(process(*serve, "--carrier", carrier, "--log", str(log), "--json", "--grace", "5"))
        wait_for(
            lambda: listens(port) and (tmp_path / "redis").exists() and (tmp_path / "two.example.com.tls").exists()
        )
        for name in NAMES:
            resolve = ("--resolve", f"{name}:{port}:127.0.0.1", "-sm", str(PATIENCE_S))
            assert run("curl", *resolve, "-k", f"https://{name}:{port}/") == f"{name} over https\n"
            assert run("curl", *resolve, f"http://{name}:{port}/") == f"{name} over http\n"
            hello = run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", name)
            assert "CN = example.com" in hello or "CN=example.com" in hello
        assert run("redis-cli", "-p", str(port), "set", "key", "value").strip() == "OK"
        assert run("redis-cli", "-p", str(port), "get", "key").strip() == "value"
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as silent:
            assert silent.recv(100) == b"220 hello\r\n"
        # Nothing goes to the default that names what there is not, or breaks what it speaks.
        broken = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            client.sendall(broken)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == 0, output
    last = json.loads(output.splitlines()[-1])
    assert (last["relaying"], last["ended"]["garbage"]) == (0, 1)
    assert sum(last["ended"].values()) == last["accepted"]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(entries) == last["accepted"]
    assert {entry["reason"] for entry in entries} == set(last["ended"])
    assert sum(entry["service"] == f"unix:{tmp_path}/redis" for entry in entries) == 2


def test_what_cannot_be_served_is_said(tmp_path: Path, port: int) -> None:
    serve = [sys.executable, "-m", "fourtuple", "serve", "-c"]
    with socket.create_server(("127.0.0.1", port)):
        taken = subprocess.run(
            [*serve, str(broker_file(tmp_path, port))], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert taken.returncode == 64
    assert "Address already in use" in taken.stderr
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    nothing = subprocess.run([*serve, str(empty)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert nothing.returncode == 64
    assert "[[listen]]" in nothing.stderr


def test_no_ring_where_all_of_the_sandbox_is_required_and_a_target_is_tcp(tmp_path: Path, port: int) -> None:
    serve = [sys.executable, "-m", "fourtuple", "serve", "-c", str(tmp_path / "broker.toml"), "--carrier"]
    said = b"\xff" * 16
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        target = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        (tmp_path / "broker.toml").write_text(
            f'[confine]\nuser = "nobody"\nsandbox = "required"\n'
            f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 50\ndefault = "{target}"\n'
        )
        refused = subprocess.run([*serve, "uring"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert (refused.returncode, "carrier" in refused.stderr, "epoll" in refused.stderr) == (69, True, True)
        with process(*serve, "auto") as broker:
            wait_for(lambda: listens(port) or broker.poll() is not None)
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
                client.sendall(said)
                heard = b""
                # Whoever has only looked whether it listens may be relayed, too, and says nothing.
                while not heard:
                    service, _ = listener.accept()
                    with service:
                        heard = service.recv(100)
                assert heard == said
            broker.send_signal(signal.SIGTERM)
            assert "(epoll," in broker.communicate(timeout=PATIENCE_S)[0]
