"""Real servers, unmodified, behind `fourtuple serve`: each is handed its clients, and sees where they come from.

The servers are told to listen on the port that the broker has, so that what comes through can only have been handed
over. Clients come from 127.0.0.7, those that cannot choose by `fourtuple run --from`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fourtuple.preload import LIBRARY
from tests.unit.handing import hand_over

PATIENCE_S = 60
PROGRAMS = Path(__file__).parent / "programs"
FOURTUPLE = [sys.executable, "-m", "fourtuple"]
HERE, ELSEWHERE = "127.0.0.7", "127.0.0.8"
FROM_HERE = [*FOURTUPLE, "run", "--from", HERE, "--"]
SERVICES = ("nginx", "nginx.tls", "redis", "postgres", "mqtt", "gunicorn", "uvicorn", "asgi")
# One for all, so that no test waits for a patience or a sniff deadline that is longer than it has to be.
BROKER = """
[[listen]]
address = "127.0.0.1:{port}"
sniff_ms = 5000
[[service]]
name = "ssh"
target = "tcp:127.0.0.1:{ssh_port}"
[[route]]
protocol = "ssh"
to = "service:ssh"
[[route]]
name = "nginx"
protocol = "tls"
to = "service:nginx.tls"
[[route]]
protocol = "redis"
to = "service:redis"
[[route]]
protocol = "postgres"
to = "service:postgres"
[[route]]
protocol = "mqtt"
to = "service:mqtt"
"""


def needed(*programs: str) -> list[str]:
    """Where they are; skips with the reason where one is not."""
    folders = [os.environ["PATH"], "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = [shutil.which(program, path=":".join(folders)) for program in programs]
    missing = [program for program, path in zip(programs, found, strict=True) if path is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [path for path in found if path is not None]


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout + done.stderr


def wait_for(ready: Callable[[], bool], server: subprocess.Popen[str] | None = None) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not ready():
        assert server is None or server.poll() is None, server.stdout.read() if server.stdout else "it has ended"
        assert time.monotonic() < until_s, "it does not come up"
        time.sleep(0.02)


@contextmanager
def process(*command: str, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    ) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.terminate()
                try:
                    started.communicate(timeout=PATIENCE_S)
                except subprocess.TimeoutExpired:
                    started.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """`fourtuple serve`, and the folder in which services have their socket files."""

    folder: Path
    port: int
    ssh_port: int

    @contextmanager
    def served(self, *names: str, command: Sequence[str], listeners: Sequence[str] = ()) -> Iterator[Path]:
        """A daemon that listens on the broker's port, once its socket files are there; its output, in a file."""
        paths = [self.folder / name for name in names]
        words = [*FOURTUPLE, "run"]
        for path, listener in zip(paths, listeners or [f"127.0.0.1:{self.port}"], strict=True):
            words += ["--handoff", f"{listener}={path}"]
        with self.started(*words, "--", *command, paths=paths) as (said, _):
            yield said

    @contextmanager
    def started(self, *command: str, paths: Sequence[Path]) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
        said = self.folder / "said"
        with (
            said.open("w") as output,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, cwd=self.folder
            ) as started,
        ):
            try:
                until_s = time.monotonic() + PATIENCE_S
                while not all(path.is_socket() for path in paths):
                    assert started.poll() is None, said.read_text()
                    assert time.monotonic() < until_s, said.read_text()
                    time.sleep(0.02)
                yield said, started
            finally:
                started.terminate()
                try:
                    started.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    started.kill()
                for path in paths:
                    path.unlink(missing_ok=True)

    def curl(self, name: str) -> str:
        return run(*self.curl_words(name))

    def curl_words(self, name: str, path: str = "/", scheme: str = "http") -> list[str]:
        (curl,) = needed("curl")
        resolve = ("--resolve", f"{name}:{self.port}:127.0.0.1", "--noproxy", "*", "--interface", HERE)
        return [curl, "-sSkm", str(PATIENCE_S), *resolve, f"{scheme}://{name}:{self.port}{path}"]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="fourtuple-handoff-") as name:
        folder, port, ssh_port = Path(name), free_port(), free_port()
        # PostgreSQL is another user.
        folder.chmod(0o777)
        file = folder / "broker.toml"
        services = "".join(
            f'[[service]]\nname = "{name}"\ntarget = "unix:{folder}/{name}"\ndelivery = "handoff"\n'
            "patience_ms = 20000\n"
            for name in SERVICES
        )
        file.write_text(BROKER.format(port=port, ssh_port=ssh_port) + services)
        with process(*FOURTUPLE, "serve", "-c", str(file), "--grace", "0") as serving:

            def listens() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_for(listens, serving)
            yield Broker(folder=folder, port=port, ssh_port=ssh_port)


def make_certificate(folder: Path) -> None:
    (openssl,) = needed("openssl")
    run(
        *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=example.com", "-days", "2", "-keyout", str(folder / "key"), "-out", str(folder / "cert")),
    )


def nginx_file(folder: Path, listen: str) -> Path:
    make_certificate(folder)
    path = folder / "nginx.conf"
    path.write_text(
        f"""daemon off; worker_processes 2; pid {folder}/pid; error_log stderr;
        events {{ worker_connections 200; }}
        http {{
            access_log {folder}/access.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
            server {{
                {listen}
                ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;
                location / {{ return 200 "$scheme $remote_addr $server_addr $pid\\n"; }}
            }}
        }}"""
    )
    return path


def test_nginx_over_http_and_tls(broker: Broker, tmp_path: Path) -> None:
    nginx, openssl = needed("nginx", "openssl")
    listen = f"listen 127.0.0.1:{broker.port} reuseport; listen [::1]:{broker.port}; listen 127.0.0.1:1 ssl;"
    listeners = [f"127.0.0.1:{broker.port}", f"[::1]:{broker.port}", "127.0.0.1:1"]
    with broker.served(
        *("nginx", "nginx", "nginx.tls"),
        command=[nginx, "-c", str(nginx_file(tmp_path, listen))],
        listeners=listeners,
    ):
        said = [broker.curl("nginx").split() for _ in range(20)]
        words = ("s_client", "-connect", f"127.0.0.1:{broker.port}", "-servername", "nginx", "-bind", HERE, "-quiet")
        hello = run(openssl, *words, stdin="GET / HTTP/1.0\r\n\r\n")
        assert f"https {HERE} 127.0.0.1 " in hello
    assert {tuple(words[:3]) for words in said} == {("http", HERE, "127.0.0.1")}
    assert len({words[3] for words in said}) == 2, "both workers take clients"
    lines = (tmp_path / "access.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [HERE] * 21


def test_nginx_on_a_unix_socket_sees_the_client_as_well(broker: Broker, tmp_path: Path) -> None:
    (nginx,) = needed("nginx")
    listener = tmp_path / "nginx.sock"
    file = nginx_file(tmp_path, f"listen unix:{listener};")
    with broker.served("nginx", command=[nginx, "-c", str(file)], listeners=[str(listener)]) as said:
        assert broker.curl("nginx").split()[1] == HERE
        assert "emerg" not in said.read_text(), "the file whose mode it changes is there"
        test = run(*FOURTUPLE, "run", "--handoff", f"{listener}={broker.folder}/nginx", "--", nginx, "-tc", str(file))
        assert "test is successful" in test
        assert broker.curl("nginx").split()[1] == HERE, "nobody has taken its place"


def test_haproxy_in_front_of_others(broker: Broker, tmp_path: Path) -> None:
    """A daemon with threads and an accept loop of its own kind."""
    (haproxy,) = needed("haproxy")
    file = tmp_path / "haproxy.cfg"
    file.write_text(
        f"""
global
  nbthread 2
defaults
  mode http
  timeout client 60s
frontend here
  bind 127.0.0.1:{broker.port}
  http-request return status 200 content-type text/plain lf-string "%ci %fp"
"""
    )
    with broker.served("nginx", command=[haproxy, "-db", "-f", str(file)]):
        assert [broker.curl("nginx") for _ in range(4)] == [f"{HERE} {broker.port}"] * 4


def test_redis(broker: Broker, tmp_path: Path) -> None:
    redis, client = needed("redis-server", "redis-cli")
    # Protected mode lets 127.0.0.1 in and nobody else: Redis would see that the client is not there.
    words = ["--bind", "127.0.0.1", "::1", "--port", str(broker.port), "--protected-mode", "no"]
    words += ["--save", "", "--dir", str(tmp_path)]
    listeners = [f"127.0.0.1:{broker.port}", f"[::1]:{broker.port}"]
    with broker.served("redis", "redis", command=[redis, *words], listeners=listeners):
        cli = [*FROM_HERE, client, "-p", str(broker.port)]
        assert run(*cli, "set", "key", "value").strip() == "OK"
        assert run(*cli, "get", "key").strip() == "value"
        assert re.search(rf" addr={re.escape(HERE)}:\d+ laddr=127.0.0.1:{broker.port} ", run(*cli, "client", "list"))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_postgresql(broker: Broker, kind: str) -> None:
    postgres, initdb, psql = needed("postgres", "initdb", "psql")
    data = broker.folder / "data"
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
    if user:
        needed("setpriv")
        if subprocess.run([*user, "test", "-r", LIBRARY], check=False).returncode != 0:
            pytest.skip(f"the user postgres may not read {LIBRARY}")
        data.mkdir()
        shutil.chown(data, "postgres", "postgres")
    said = run(*user, initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync")
    assert "Success" in said
    (data / "pg_hba.conf").write_text(f"host all all {HERE}/32 trust\n")
    # pg_hba.conf goes by the client's address, also where the listener is a unix socket.
    listener = f"127.0.0.1:{broker.port}" if kind == "tcp" else f"{data}/.s.PGSQL.{broker.port}"
    where = ("127.0.0.1", "") if kind == "tcp" else ("", str(data))
    options = [
        f"port={broker.port}",
        f"listen_addresses={where[0]}",
        f"unix_socket_directories={where[1]}",
        "fsync=off",
    ]
    words = [word for option in options for word in ("-c", option)]

    def ask(source: str) -> str:
        uri = f"postgresql://postgres@127.0.0.1:{broker.port}/postgres?sslmode=disable"
        question = "select inet_client_addr(), inet_server_port()"
        return run(*FOURTUPLE, "run", "--from", source, "--", psql, "-Atc", question, uri)

    command = [*user, postgres, "-D", str(data), *words]
    with broker.served("postgres", command=command, listeners=[listener]) as output:
        wait_for(lambda: "ready to accept connections" in output.read_text())
        assert ask(HERE).strip() == f"{HERE}|{broker.port}"
        assert f'no pg_hba.conf entry for host "{ELSEWHERE}"' in ask(ELSEWHERE)
    shutil.rmtree(data)


def test_mosquitto(broker: Broker, tmp_path: Path) -> None:
    mosquitto, pub, sub = needed("mosquitto", "mosquitto_pub", "mosquitto_sub")
    file = tmp_path / "mosquitto.conf"
    file.write_text(f"listener {broker.port} 127.0.0.1\nallow_anonymous true\nlog_dest stdout\nuser root\n")
    reach = ["-h", "127.0.0.1", "-p", str(broker.port), "-t", "topic"]
    with broker.served("mqtt", command=[mosquitto, "-c", str(file)]) as said:
        assert run(pub, *reach, "-A", HERE, "-i", "publisher", "-m", "value", "-r") == ""
        assert run(sub, *reach, "-A", ELSEWHERE, "-i", "subscriber", "-C", "1", "-W", str(PATIENCE_S)) == "value\n"
    # Its output comes when it ends.
    connected = re.findall(r"New client connected from ([0-9.]+):\d+ as (\w+)", said.read_text())
    assert connected == [(HERE, "publisher"), (ELSEWHERE, "subscriber")]


def test_ssh_is_relayed(broker: Broker, tmp_path: Path) -> None:
    sshd, ssh, keygen = needed("sshd", "ssh", "ssh-keygen")
    if os.geteuid() != 0:
        pytest.skip("sshd changes to the user that logs in, which needs root")
    for name in ("host", "user"):
        run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name))
    file = tmp_path / "sshd_config"
    file.write_text(
        f"ListenAddress 127.0.0.1:{broker.ssh_port}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        # A login shell must not read what this machine's root has in ~/.bashrc: it may take long.
        f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nSetEnv HOME={tmp_path}\n"
    )
    separation = Path("/run/sshd")
    made = not separation.exists()
    separation.mkdir(0o755, exist_ok=True)
    try:
        with process(sshd, "-D", "-e", "-f", str(file)):
            options = ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "LogLevel=ERROR", "BatchMode=yes"]
            words = [word for option in options for word in ("-o", option)]
            words += ["-F", "none", "-i", str(tmp_path / "user"), "-p", str(broker.port), "root@127.0.0.1"]
            assert run(ssh, *words, "echo $((6 * 7))") == "42\n"
    finally:
        if made:
            separation.rmdir()


WSGI = """
import os
def app(environ, respond):
    respond("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['REMOTE_ADDR']} {environ['SERVER_PORT']} {os.getpid()}".encode()]
"""
ASGI = """
import asyncio, os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            heard = (await receive())["type"]
            print(heard, flush=True)
            await send({"type": f"{heard}.complete"})
            if heard.endswith("shutdown"):
                return
    if scope["path"] == "/slow":
        print("slow", flush=True)
        await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    body = f"{scope['client'][0]} {scope['server'][1]} {os.getpid()}"
    await send({"type": "http.response.body", "body": body.encode()})
"""


def from_both_workers(broker: Broker, name: str) -> None:
    seen: set[str] = set()
    until_s = time.monotonic() + PATIENCE_S
    while len(seen) < 2:
        assert time.monotonic() < until_s, seen
        client, port, pid = broker.curl(name).split()
        assert (client, port) == (HERE, str(broker.port))
        seen.add(pid)


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_gunicorn(broker: Broker, kind: str) -> None:
    (gunicorn,) = needed("gunicorn")
    (broker.folder / "wsgi.py").write_text(WSGI)
    words = ["-w", "2", "-k", kind, "-b", f"127.0.0.1:{broker.port}"]
    with broker.served("gunicorn", command=[gunicorn, *words, "wsgi:app"]):
        from_both_workers(broker, "gunicorn")


def test_uvicorn_with_workers(broker: Broker) -> None:
    pytest.importorskip("uvicorn", reason="extra asgi is not installed")
    (broker.folder / "asgi.py").write_text(ASGI)
    words = ["--workers", "2", "--port", str(broker.port)]
    with broker.served("uvicorn", command=[sys.executable, "-m", "uvicorn", *words, "asgi:app"]):
        from_both_workers(broker, "uvicorn")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_application_by_the_adapter(broker: Broker, loop: str) -> None:
    pytest.importorskip("uvicorn", reason="extra asgi is not installed")
    pytest.importorskip(loop, reason=f"{loop} is not installed")
    (broker.folder / "asgi.py").write_text(ASGI)
    path = broker.folder / "asgi"
    words = [sys.executable, "-m", "fourtuple.asgi", "asgi:app", "--handoff", str(path), "--loop", loop]
    with broker.started(*words, paths=[path]) as (said, server):
        assert broker.curl("asgi") == f"{HERE} {broker.port} {server.pid}"
        with subprocess.Popen(broker.curl_words("asgi", "/slow"), stdout=subprocess.PIPE, text=True) as slow:
            wait_for(lambda: "slow" in said.read_text())
            # While it does not run, others come to its queue. Told to end, it serves them as well.
            server.send_signal(signal.SIGSTOP)
            queued = [hand_over(path) for _ in range(3)]
            for client in queued:
                client.sendall(b"GET / HTTP/1.1\r\nHost: asgi\r\n\r\n")
            server.send_signal(signal.SIGTERM)
            server.send_signal(signal.SIGCONT)
            assert slow.communicate(timeout=PATIENCE_S)[0] == f"{HERE} {broker.port} {server.pid}"
        for client in queued:
            with client, client.makefile("rb") as reading:
                assert reading.readline() == b"HTTP/1.1 200 OK\r\n"
        assert server.wait(PATIENCE_S) == -signal.SIGTERM
        assert not path.exists()
        heard = said.read_text()
    assert f"{HERE}:" in heard, "its access log"
    places = [heard.index(word) for word in ("lifespan.startup", "slow", "lifespan.shutdown")]
    assert places == sorted(places)


def test_an_application_within_tls(broker: Broker, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="extra asgi is not installed")
    make_certificate(tmp_path)
    (broker.folder / "asgi.py").write_text(ASGI)
    path = broker.folder / "asgi"
    words = ["--ssl-keyfile", str(tmp_path / "key"), "--ssl-certfile", str(tmp_path / "cert")]
    command = [sys.executable, "-m", "fourtuple.asgi", "asgi:app", "--handoff", str(path), *words]
    with broker.started(*command, paths=[path]) as (said, server):
        # One that speaks no TLS disturbs nobody.
        with hand_over(path) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(100)[:1] != b"H"
        assert run(*broker.curl_words("asgi", scheme="https")) == f"{HERE} {broker.port} {server.pid}"
        assert "Traceback" not in said.read_text()


def test_an_application_that_does_not_start(broker: Broker) -> None:
    pytest.importorskip("uvicorn", reason="extra asgi is not installed")
    words = [sys.executable, "-m", "fourtuple.asgi"]
    assert "Missing option '--handoff'" in run(*words, "no_such:app")
    path = broker.folder / "asgi"
    done = subprocess.run(
        [*words, "no_such:app", "--handoff", str(path)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode not in (0, 2)
    assert 'Could not import module "no_such"' in done.stderr
    assert not path.exists()
    path.write_text("mine")
    (broker.folder / "asgi.py").write_text(ASGI)
    done = subprocess.run(
        [*words, "--app-dir", str(broker.folder), "asgi:app", "--handoff", str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    path.unlink()
    assert (done.returncode, "already in use" in done.stderr) == (2, True)


def test_a_daemon_that_comes_late_and_one_that_dies(broker: Broker, tmp_path: Path) -> None:
    """Clients wait for a service that is absent; a file that a killed one left behind is replaced."""
    (nginx,) = needed("nginx")
    file = nginx_file(tmp_path, f"listen 127.0.0.1:{broker.port};")
    path = broker.folder / "nginx"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(path))
    with subprocess.Popen(broker.curl_words("nginx"), stdout=subprocess.PIPE, text=True) as early:
        command = [*FOURTUPLE, "run", "--handoff", f"127.0.0.1:{broker.port}={path}", "--", nginx, "-c", str(file)]
        with broker.started(*command, paths=[path]) as (_, server):
            assert early.communicate(timeout=PATIENCE_S)[0].startswith(f"http {HERE} ")
            taken = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert taken.returncode == 1
            assert f"nothing can be handed over at {path}: another process is there" in taken.stderr
            server.terminate()
            server.wait(PATIENCE_S)
            assert path.is_socket()
            with broker.started(*command, paths=[path]):
                assert broker.curl("nginx").startswith(f"http {HERE} ")
