"""Real servers under the launcher: Redis, PostgreSQL, uvicorn, sshd; and one process per connection."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from fourtuple.launcher import Inetd
from fourtuple.service import Note
from fourtuple.services import Delivery
from fourtuple.templates import Call, Ready, Socket
from fourtuple.tuples import Endpoint
from tests.unit.handing import VECTOR, connection, open_descriptors, send
from tests.unit.launching import PATIENCE_S, call, eventually, launching, program

PROGRAMS = os.pathsep.join(
    [
        "/usr/local/sbin:/usr/sbin:/usr/bin:/bin",
        *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
    ]
)
CLUSTER = """
umask 077
[ -e "$1/data/PG_VERSION" ] || initdb -D "$1/data" -A trust -U postgres --no-sync >"$1/initdb" || exit 1
exec postgres -D "$1/data" -c listen_addresses= -c unix_socket_directories="$1" -c fsync=off -c shared_buffers=16MB
"""
APPLICATION = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
"""


LEAVES = "echo hello; setsid -f sleep 1000 </dev/null >/dev/null 2>&1"


def found(name: str) -> str:
    path = shutil.which(name, path=PROGRAMS)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said(to: socket.socket, request: bytes, until: bytes) -> bytes:
    """What is heard up to `until`."""
    to.settimeout(PATIENCE_S)
    to.sendall(request)
    heard = b""
    while until not in heard:
        block = to.recv(65_536)
        if not block:
            break
        heard += block
    return heard


def unix(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


@pytest.fixture
def world_folder() -> Iterator[Path]:
    """Not below pytest's folder, which is root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-launched-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_redis(tmp_path: Path) -> None:
    server = found("redis-server")
    options = ("--save", "", "--daemonize", "no", "--dir", str(tmp_path))
    listens = {"socket": Socket.OWN, "ready": Ready.LISTENING}
    templates = [
        program("unix", server, "--port", "0", "--unixsocket", "{socket}", *options, **listens),
        program("tcp", server, "--bind", "{address}", "--port", "{port}", *options, **listens),
    ]
    port = free_port()

    async def scene() -> None:
        async with launching(*templates) as (launcher, exits):
            await launcher.start(call(tmp_path, "unix"))
            await launcher.start(call(tmp_path, "tcp", target=f"tcp:127.0.0.1:{port}"))
            for client in (unix(tmp_path / "unix"), socket.create_connection(("127.0.0.1", port))):
                with client:
                    assert await asyncio.to_thread(said, client, b"PING\r\n", b"\r\n") == b"+PONG\r\n"
            await launcher.stop("unix")
            assert not (tmp_path / "unix").exists()
            # SHUTDOWN ends it with status 0: it sleeps again, and has not crashed.
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"SHUTDOWN NOSAVE\r\n")
                ended = await exits.next()
            assert (ended.service, ended.crashed) == ("tcp", False)

    asyncio.run(scene())


def test_a_cluster_of_postgresql_per_tenant(world_folder: Path) -> None:
    psql = found("psql")
    found("postgres")
    user = None
    if os.geteuid() == 0:
        user = "nobody"
        os.chown(world_folder, 65_534, 65_534)
    asked = program(
        *("postgres", "sh", "-c", CLUSTER, "cluster", f"{world_folder}/{{label}}"),
        socket=Socket.OWN,
        # It listens before it takes clients: until it has read its journal it tells them that it is starting up.
        ready=Ready.NOTIFY,
        user=user,
        env={"PATH": PROGRAMS},
        stop_signal="INT",
    )
    tenants = ("acme", "zoo")
    for tenant in tenants:
        (world_folder / tenant).mkdir()
        if user is not None:
            os.chown(world_folder / tenant, 65_534, 65_534)

    def asks(tenant: str, query: str) -> str:
        command = [psql, "-XAtq", "-h", str(world_folder / tenant), "-U", "postgres", "-c", query]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return done.stdout + done.stderr

    async def scene() -> None:
        calls = [
            call(world_folder, "postgres", f"{tenant}.pg", target=f"unix:{world_folder / tenant}/.s.PGSQL.5432")
            for tenant in tenants
        ]
        async with launching(asked) as (launcher, _):
            await asyncio.gather(*(launcher.start(one) for one in calls))
            for tenant in tenants:
                assert await asyncio.to_thread(asks, tenant, f"create table t as select '{tenant}' as who") == ""
            await launcher.stop("acme.pg")
            assert [one.service for one in launcher.services()] == ["zoo.pg"]
            assert not list((world_folder / "acme").glob(".s.*"))
            # It sleeps and comes back with what it had.
            await launcher.start(calls[0])
            for tenant in tenants:
                assert await asyncio.to_thread(asks, tenant, "select who from t") == f"{tenant}\n"

    asyncio.run(scene())


def test_uvicorn_takes_the_socket_that_it_is_passed(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    (tmp_path / "application.py").write_text(APPLICATION)
    python = (sys.executable, "-m")
    where = ("--app-dir", str(tmp_path), "application:app")
    templates = [
        program("fd", *python, "uvicorn", "--fd", "3", *where),
        program(
            "handoff",
            *python,
            "fourtuple.asgi",
            "--handoff",
            "{socket}",
            *where,
            socket=Socket.OWN,
            ready=Ready.LISTENING,
        ),
    ]

    async def scene() -> None:
        async with launching(*templates) as (launcher, _):
            await asyncio.gather(
                launcher.start(call(tmp_path, "fd")),
                launcher.start(call(tmp_path, "handoff", delivery=Delivery.HANDOFF)),
            )
            request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            with unix(tmp_path / "fd") as client:
                assert b"hello" in await asyncio.to_thread(said, client, request, b"hello")
            with connection() as (client, accepted):
                send(tmp_path / "handoff", VECTOR, accepted.fileno())
                accepted.close()
                launcher.ports = frozenset({client.getpeername()[1]})
                await eventually(lambda: launcher.busy("handoff"))
                assert b"hello" in await asyncio.to_thread(said, client, request, b"hello")

    asyncio.run(scene())


def note(service: str, peer: Endpoint, local: Endpoint) -> bytes:
    """As a broker writes it (docs/handoff.md)."""
    name = service.encode()
    both = [b"\0" * 10 + b"\xff\xff" + one.address.packed for one in (peer, local)]
    ports = peer.port.to_bytes(2) + local.port.to_bytes(2)
    body = ports + bytes(4) + both[0] + both[1] + bytes([len(name)]) + name + b"\0"
    return b"4TUP\x01\x04" + (len(body) + 8).to_bytes(2) + body


PEER, LOCAL = Endpoint(ip_address("192.0.2.7"), 1000), Endpoint(ip_address("198.51.100.1"), 443)


def test_a_process_per_connection(tmp_path: Path) -> None:
    script = (
        "echo $PROTO $TCPREMOTEIP:$TCPREMOTEPORT $TCPLOCALIP:$TCPLOCALPORT $REMOTE_HOST $REMOTE_ADDR $REMOTE_PORT "
        "$FOURTUPLE_SERVICE {label}; ls /proc/self/fd; read line; echo heard $line"
    )
    # A shell's own `ls` has the folder open as 3.
    begins = f"TCP {PEER} {LOCAL} 192.0.2.7 192.0.2.7 1000 shop.example shop\n0\n1\n2\n3\n".encode()
    path = tmp_path / "inetd"

    def called(seen: Note) -> Call | None:
        known = seen.service in ("shop.example", "other", "broken")
        template = "broken" if seen.service == "broken" else "sh"
        return call(tmp_path, template, seen.service, target=f"unix:{path}") if known else None

    async def scene() -> None:
        templates = [program("sh", "sh", "-c", script), program("broken", "/nowhere")]
        async with launching(*templates) as (launcher, _):
            inetd = Inetd(launcher, path, called, most=4, most_per_service=3, most_per_source=3)
            before = open_descriptors()

            def client(service: str, peer: Endpoint = PEER) -> socket.socket:
                with connection() as (ours, accepted):
                    send(path, note(service, peer, LOCAL), accepted.fileno())
                    return ours.dup()

            with client("shop.example") as first:
                assert await asyncio.to_thread(said, first, b"", b"3\n") == begins
                assert inetd.live("shop.example") == 1
                assert await asyncio.to_thread(said, first, b"hello\n", b"\n") == b"heard hello\n"
                assert first.recv(1) == b""
            await eventually(lambda: not launcher.services())
            await eventually(lambda: inetd.live("shop.example") == 0)
            assert open_descriptors() == before

            elsewhere = Endpoint(ip_address("192.0.2.8"), 1)
            # Three from one source, one more of that; another source is served, and then four are enough.
            order = [("shop.example", PEER)] * 2 + [("other", PEER)] * 2 + [("other", elsewhere)] * 2
            order += [("nobody", PEER)]
            clients = [client(*one) for one in order]
            await eventually(lambda: sum(inetd.counts.values()) == 1 + len(order))
            assert Counter(inetd.counts) == Counter(
                served=5, over_source=1, over_total=1, unknown=1, over_service=0, not_started=0
            )
            assert len(launcher.services()) == 4
            for one in clients:
                one.settimeout(PATIENCE_S)
                one.shutdown(socket.SHUT_WR)
                heard = b""
                while block := one.recv(4_096):
                    heard += block
                one.close()
            # The launcher is done with a process a turn of the loop before its connection no longer counts.
            await eventually(lambda: not launcher.services())
            await eventually(lambda: not any(map(inetd.live, ("shop.example", "other"))))
            with client("broken") as one:
                one.settimeout(PATIENCE_S)
                assert await asyncio.to_thread(one.recv, 1) == b""
            assert inetd.counts["not_started"] == 1
            # Who is connected when it closes is ended.
            with client("shop.example") as one:
                await asyncio.to_thread(said, one, b"", b"3\n")
                await inetd.aclose()
                await eventually(lambda: not launcher.services())
            assert not path.exists()

    asyncio.run(scene())


def test_sshd_is_started_for_a_connection(world_folder: Path) -> None:
    sshd, ssh, keygen = found("sshd"), found("ssh"), found("ssh-keygen")
    if os.geteuid() != 0:
        pytest.skip("sshd logs somebody in: that takes root")
    folder = world_folder
    for name in ("host", "client"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "client.pub", folder / "authorized")
    settings = (
        *(f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/authorized", "PermitRootLogin=yes"),
        # A login shell must not read what this machine's root has in ~/.bashrc: it may take long.
        *("UsePAM=no", "StrictModes=no", "PidFile=none", f"SetEnv=HOME={folder}"),
    )
    options = [word for setting in settings for word in ("-o", setting)]
    asked = program("sshd", sshd, "-i", "-e", "-f", "/dev/null", *options, no_new_privileges=False)
    Path("/run/sshd").mkdir(exist_ok=True)

    async def scene() -> None:
        async with launching(asked) as (launcher, _):
            path = folder / "inetd"
            inetd = Inetd(launcher, path, lambda seen: call(folder, "sshd", seen.service, target=f"unix:{path}"))
            with socket.create_server(("127.0.0.1", 0)) as listener:
                command = [
                    *(ssh, "-F", "/dev/null", "-p", str(listener.getsockname()[1]), "-i", str(folder / "client")),
                    *("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known"),
                    *("-o", "BatchMode=yes", "root@127.0.0.1", LEAVES),
                ]
                nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
                with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe) as client:
                    accepted, _ = await asyncio.to_thread(listener.accept)
                    with accepted:
                        send(path, note("login", PEER, LOCAL), accepted.fileno())
                    heard, errors = await asyncio.to_thread(client.communicate, timeout=PATIENCE_S)
            assert heard == b"hello\n", errors
            await eventually(lambda: not launcher.services())
            assert inetd.counts["served"] == 1
            await inetd.aclose()

    asyncio.run(scene())
