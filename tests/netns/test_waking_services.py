"""Services of all kinds that sleep until a client comes, stop when nobody uses them, and are woken again: Redis,
PostgreSQL with a cluster for each tenant, ASGI, sshd, a shell script, a C program; and some that do not come up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.brokering import PATIENCE_S, free_port, get, needed, run, said, wait_for
from tests.netns.loading import program
from tests.netns.waking import NOBODY, Waking, command_of, open_folder, owned, table, user_of, waking

SLEEPER = Path(__file__).parents[2] / "bench" / "peers" / "sleeper.c"
IDLE_S = 1.0
TENANT = r"""#!/bin/sh
# A cluster for each tenant, made when it is woken for the first time. postgres-tenant SOCKET DATABASE [ADDRESS PORT]
set -eu
data="${1%/*}/data"
if [ ! -e "$data/PG_VERSION" ]; then
    POSTGRES/initdb -D "$data.new" -U postgres -A trust --no-sync --no-instructions --locale=C >/dev/null
    echo "host all all 127.0.0.0/8 trust" >>"$data.new/pg_hba.conf"
    echo "create database \"$2\"" | POSTGRES/postgres --single -D "$data.new" -F postgres >/dev/null
    mv "$data.new" "$data"
fi
set -- "${1%/*}" "${2}" "${3:-}" "${4:-5432}" CERTIFICATE
exec POSTGRES/postgres -D "$data" -k "$1" -c listen_addresses="$3" -p "$4" -c cluster_name="$2" -c fsync=off \
    -c shared_buffers=1MB -c max_connections=10 -c logging_collector=off ${3:+-c ssl=on -c ssl_cert_file="$5/cert" \
    -c ssl_key_file="$5/key"}
"""
SHELL = r"""#!/bin/sh
# Answers one request of HTTP; inetd starts one for each connection.
IFS= read -r line
text="$FOURTUPLE_SERVICE heard $line from ${REMOTE_ADDR:-nobody} ${REMOTE_PORT:-0} as $$"
printf 'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s\n' "$((${#text} + 1))" "$text"
while IFS= read -r line && [ "$line" != "$(printf '\r')" ]; do :; done
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            heard = (await receive())["type"]
            await send({"type": f"{heard}.complete"})
            if heard.endswith("shutdown"):
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{scope['path']} for {scope['client']}".encode()})
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Of listeners, and of services that listen on TCP."""

    main: int
    other: int
    """With TLS for PostgreSQL, `sshd -i` for SSH, and only services that do not come up for Redis and HTTP."""
    sshd: int
    postgres: int


def broker_file(folder: Path, ports: Ports) -> str:
    """All services; what they need is in `folder`."""
    mine = {"idle_s": IDLE_S, "output": "null"}
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    tables = [
        table("listen", address=f"127.0.0.1:{ports.main}", postgres_tls="declined", sniff_ms=1000),
        table("listen", address=f"127.0.0.1:{ports.other}", sniff_ms=1000),
        table("template", name="c", argv=[f"{folder}/sleeper", "{name}"], socket="pass", ready="started", **mine),
        table(
            "template",
            name="shell",
            argv=["socat", "UNIX-LISTEN:{socket},fork", f"EXEC:{folder}/shell"],
            **mine,
        ),
        table(
            "template",
            name="redis",
            argv=["redis-server", "--port", "0", "--unixsocket", "{socket}", "--unixsocketperm", "777", "--save", ""],
            cwd=f"{folder}/redis",
            **user,
            **mine,
        ),
        table(
            "template",
            name="postgres",
            argv=[f"{folder}/postgres-tenant", "{socket}", "{database}"],
            ready="notify",
            stop_signal="INT",
            **user,
            **mine,
        ),
        table(
            "template",
            name="postgres-tls",
            argv=[f"{folder}/postgres-tenant", f"{folder}/pg/{{label}}/socket", "{label}", "{address}", "{port}"],
            ready="notify",
            stop_signal="INT",
            **user,
            **mine,
        ),
        table(
            "template",
            name="asgi",
            argv=[sys.executable, "-m", "uvicorn", "--fd", "3", "app:app", "--log-level", "warning"],
            cwd=str(folder / "app"),
            socket="pass",
            **mine,
        ),
        table(
            "template",
            name="asgi-handoff",
            argv=[sys.executable, "-m", "fourtuple.asgi", "app:app", "--handoff", "{socket}", "--log-level", "warning"],
            cwd=str(folder / "app"),
            **mine,
        ),
        table("template", name="sshd", argv=[program("sshd"), "-D", "-f", f"{folder}/sshd_config"], **mine),
        table("template", name="sshd-inetd", argv=[program("sshd"), "-i", "-f", f"{folder}/sshd_config"], **mine),
        table("template", name="shell-inetd", argv=[f"{folder}/shell"], **user, **mine),
        table("template", name="crashing", argv=["false"], backoff_s=30, **mine),
        table("template", name="silent", argv=["sleep", "1000"], start_timeout_s=0.5, backoff_s=30, **mine),
    ]
    services = {
        "c": ("c", "unix", "relay"),
        "shell": ("shell", "unix", "relay"),
        "redis": ("redis", "redis", "relay"),
        "asgi": ("asgi", "unix", "relay"),
        "handoff": ("asgi-handoff", "unix", "handoff"),
        "inetd": ("shell-inetd", "unix", "inetd"),
        "ssh-inetd": ("sshd-inetd", "unix", "inetd"),
        "crashing": ("crashing", "unix", "relay"),
        "silent": ("silent", "unix", "relay"),
    }
    for name, (start, where, delivery) in services.items():
        target = f"unix:{folder}/{where}/{name}"
        tables.append(table("service", name=f"{name}.example.com", target=target, start=start, delivery=delivery))
    for name, start, port in (("sshd", "sshd", ports.sshd), ("acme.pg", "postgres-tls", ports.postgres)):
        tables.append(table("service", name=f"{name}.example.com", target=f"tcp:127.0.0.1:{port}", start=start))
    tables += [
        table("route", protocol="redis", destination_port=ports.main, to="service:redis.example.com"),
        table("route", protocol="redis", destination_port=ports.other, to="service:crashing.example.com"),
        table("route", protocol="ssh", destination_port=ports.main, to="service:sshd.example.com"),
        table("route", protocol="ssh", destination_port=ports.other, to="service:ssh-inetd.example.com"),
        table("route", database="broken", to="service:crashing.example.com"),
        table("route", database="*", to=f"unix:{folder}/pg/{{database}}/.s.PGSQL.5432", start="postgres"),
    ]
    return "".join(tables)


@pytest.fixture(scope="module")
def ports() -> Ports:
    return Ports(main=free_port(), other=free_port(), sshd=free_port(), postgres=free_port())


@pytest.fixture(scope="module")
def broker(ports: Ports) -> Iterator[Waking]:
    needed("gcc", "socat", "redis-server", "redis-cli", "psql", "ssh-keygen", "openssl", "curl")
    pytest.importorskip("uvicorn", reason="extra asgi is not installed")
    if os.geteuid() != 0:
        pytest.skip("services become other users here, which takes root")
    with open_folder() as folder, ExitStack() as stack:
        subprocess.run(["gcc", "-O2", "-o", folder / "sleeper", SLEEPER], check=True)
        for name in ("unix", "redis", "pg", "pg/acme", "pg/one", "pg/two", "certificate"):
            owned(folder / name)
        (folder / "app").mkdir()
        (folder / "app" / "app.py").write_text(ASGI)
        postgres = Path(program("postgres")).parent
        tenant = TENANT.replace("POSTGRES", str(postgres)).replace("CERTIFICATE", f"{folder}/certificate")
        for name, text in (("postgres-tenant", tenant), ("shell", SHELL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        pair = folder / "certificate"
        run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=acme.pg.example.com", "-days", "2", "-keyout", f"{pair}/key", "-out", f"{pair}/cert"),
        )
        os.chown(pair / "key", NOBODY, NOBODY)
        (pair / "key").chmod(0o600)
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{ports.sshd}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
            # bash reads the user's .bashrc under sshd unless it is no first shell, and what stands there is anybody's.
            "SetEnv SHLVL=2\n"
        )
        separation = Path("/run/sshd")
        if not separation.exists():
            separation.mkdir(0o755)
            stack.callback(separation.rmdir)
        text = broker_file(folder, ports)
        yield stack.enter_context(waking(text, "--patience", "60", folder=folder, ports=(ports.main, ports.other)))


def psql(port: int, database: str, *, name: str = "localhost", tls: str = "disable") -> str:
    where = f"host={name} hostaddr=127.0.0.1 port={port} sslmode={tls} gssencmode=disable connect_timeout=60"
    query = "select current_setting('cluster_name')"
    return run("psql", "-XqAt", f"{where} user=postgres dbname={database}", "-c", query)


def ssh(broker: Waking, port: int, command: str) -> str:
    options = ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "LogLevel=ERROR", "BatchMode=yes"]
    words = [word for option in options for word in ("-o", option)]
    return run("ssh", *words, "-F", "none", "-i", f"{broker.folder}/user", "-p", str(port), "root@127.0.0.1", command)


def curl(port: int, name: str, *more: str) -> str:
    resolve = ("--resolve", f"{name}:{port}:127.0.0.1")
    return run("curl", "-sm", str(PATIENCE_S), *resolve, *more, f"http://{name}:{port}/it")


def test_each_kind_is_started_for_a_client_and_stopped_when_nobody_comes(broker: Waking, ports: Ports) -> None:
    folder, main = broker.folder, ports.main
    one, two = (f"unix:{folder}/pg/{name}/.s.PGSQL.5432" for name in ("one", "two"))
    kinds: dict[str, tuple[Callable[[], str], str, int]] = {
        "c.example.com": (lambda: said(main, get("c.example.com")).decode(), "c.example.com heard GET /", 0),
        "shell.example.com": (lambda: curl(main, "shell.example.com"), "shell.example.com heard GET /it", 0),
        "redis.example.com": (lambda: run("redis-cli", "-p", str(main), "ping"), "PONG", NOBODY),
        "asgi.example.com": (lambda: curl(main, "asgi.example.com"), "/it for", 0),
        "sshd.example.com": (lambda: ssh(broker, main, "echo $((6 * 7))"), "42", 0),
        one: (lambda: psql(main, "one"), "one", NOBODY),
        two: (lambda: psql(main, "two"), "two", NOBODY),
        "acme.pg.example.com": (
            lambda: psql(ports.other, "acme", name="acme.pg.example.com", tls="require"),
            "acme",
            NOBODY,
        ),
    }
    for round_ in (1, 2):
        for service, (ask, answer, user) in kinds.items():
            heard = ask()
            assert heard.startswith(answer), (service, heard, broker.events("service_failed", service=service))
            assert broker.count("service_up", service, round_) == round_, service
            assert user_of(broker.pid_of(service)) == user, (service, command_of(broker.pid_of(service)))
        for service in kinds:
            broker.until_asleep(service, round_)
        left = sorted(str(path) for path in folder.rglob("*") if path.is_socket())
        assert left == []
        for port in (ports.sshd, ports.postgres):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_connection_that_was_handed_over_keeps_its_service_awake(broker: Waking, ports: Ports) -> None:
    service = "handoff.example.com"
    with socket.create_connection(("127.0.0.1", ports.main), timeout=PATIENCE_S) as client:
        for _ in range(2):
            client.sendall(get(service, "/kept"))
            host, port = client.getsockname()
            heard = client.recv(65_536).decode()
            while "/kept for" not in heard:
                heard += client.recv(65_536).decode()
            assert f"/kept for ('{host}', {port})" in heard
            # Other services come and go meanwhile; uvicorn itself keeps an idle connection for five seconds.
            stopped = len(broker.events("service_stopped", service="c.example.com"))
            assert said(ports.main, get("c.example.com")).startswith(b"c.example.com heard")
            broker.until_asleep("c.example.com", stopped + 1)
            assert broker.events("service_stopped", service=service) == []
        pid = broker.pid_of(service)
        assert Path(f"/proc/{pid}").exists()
    broker.until_asleep(service)
    assert not (broker.folder / "unix" / "handoff").exists()


def test_inetd_starts_a_process_for_each_connection(broker: Waking, ports: Ports) -> None:
    service, seen = "inetd.example.com", set()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", ports.main), timeout=PATIENCE_S))
            for _ in range(3)
        ]
        for client in clients:
            client.sendall(get(service))
        for client in clients:
            heard = b""
            while block := client.recv(65_536):
                heard += block
            host, port = client.getsockname()
            words = heard.decode().split()
            assert " ".join(words[-10:-2]) == f"{service} heard GET / HTTP/1.1 from {host} {port}"
            seen.add(int(words[-1]))
    assert len(seen) == 3
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen))
    where = ssh(broker, ports.other, "echo $SSH_CLIENT").split()
    assert (where[0], where[2]) == ("127.0.0.1", str(ports.other))


def test_who_waits_for_one_that_does_not_come_up_is_told_in_its_protocol(broker: Waking, ports: Ports) -> None:
    # It ends at once; it never listens. Of HTTP with the time after which one may come again (RFC 9110 15.6.4).
    for service in ("crashing.example.com", "silent.example.com"):
        answer = said(ports.main, get(service))
        assert answer.startswith(b"HTTP/1.1 503 "), (service, answer)
        assert b"\r\nRetry-After: " in answer
        assert b"could not be started" in answer
        # While it backs off, nothing is started, and who comes is told the same.
        failures = broker.count("service_failed", service)
        assert said(ports.main, get(service)) == answer
        assert broker.count("service_failed", service, failures + 1) == failures + 1
        assert "not tried again" in broker.events("service_failed", service=service)[-1]["why"]
        assert broker.events("service_up", service=service) == []
    refused = psql(ports.main, "broken")
    assert "could not be started" in refused
    sqlstate = said(ports.main, startup("postgres", "broken"))
    assert sqlstate.startswith(b"E")
    assert b"\0C57P03\0" in sqlstate
    assert "LOADING" in run("redis-cli", "-p", str(ports.other), "ping")


def startup(user: str, database: str) -> bytes:
    """StartupMessage of version 3.0 (PostgreSQL 55.7)."""
    body = b"\0\3\0\0" + f"user\0{user}\0database\0{database}\0\0".encode()
    return (len(body) + 4).to_bytes(4, "big") + body


def test_nothing_of_it_is_left(broker: Waking) -> None:
    """Of all that the others have woken, once it sleeps."""
    wait_for(lambda: len(broker.events("service_stopped")) == len(broker.events("service_up")))
    children = Path(f"/proc/{broker.pid}/task/{broker.pid}/children").read_text().split()
    # The broker process alone.
    assert len(children) == 1, [command_of(int(pid)) for pid in children]
    assert [path for path in broker.folder.rglob("*") if path.is_socket()] == []
