"""`fourtuple serve` between psql and PostgreSQL clusters, with TLS and without: by server name, user and database.

And requests to cancel: a query of one of two clusters is cancelled, whose key the broker has overheard, or could not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fourtuple.preload import LIBRARY
from tests.netns.brokering import listens, needed, process, run, wait_for
from tests.netns.loading import program

NOBODY = 65_534
PATIENCE_S = 30
CLUSTERS = ("one", "two", "bare")
"""By `cluster_name`; the last has no TLS."""
WHO = "select current_setting('cluster_name'), (select ssl from pg_stat_ssl where pid = pg_backend_pid())"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Where they listen, on 127.0.0.1, and the certificate of those with TLS."""

    ports: dict[str, int]
    certificate: Path
    folder: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def owned(path: Path) -> None:
    for entry in (path, *path.rglob("*")):
        os.chown(entry, NOBODY, NOBODY)


def copied(template: Path, data: Path) -> None:
    shutil.copytree(template, data)
    owned(data)
    data.chmod(0o700)


def nobody(folder: Path) -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", f"HOME={folder}"]


def server(folder: Path, name: str, port: int, *, tls: bool) -> list[str]:
    """The command of a cluster."""
    secrets = ("ssl=on", f"ssl_cert_file={folder}/cert", f"ssl_key_file={folder}/key") if tls else ()
    settings = ("listen_addresses=127.0.0.1", f"port={port}", f"cluster_name={name}", "fsync=off",
                "shared_buffers=16MB", "unix_socket_directories=", "max_wal_senders=0", "autovacuum=off",
                "logging_collector=off", "log_min_messages=panic", *secrets)  # fmt: skip
    options = [word for setting in settings for word in ("-c", setting)]
    return [*nobody(folder), program("postgres"), "-D", str(folder / name), *options]


@pytest.fixture(scope="module")
def clusters() -> Iterator[Clusters]:
    needed("psql", "openssl")
    if os.geteuid() != 0:
        pytest.skip("PostgreSQL's files are to be nobody's: that takes root")
    # Not below pytest's folder, which is root's alone.
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-postgres-"))
    as_nobody = nobody(folder)
    names = ",".join(f"DNS:{name}.pg.example.com" for name in CLUSTERS)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=pg.example.com", "-addext", f"subjectAltName={names}", "-days", "2"),
            *("-keyout", str(folder / "key"), "-out", str(folder / "cert")),
        )
        (folder / "key").chmod(0o600)
        template = str(folder / "template")
        os.chown(folder, NOBODY, NOBODY)
        made = [*as_nobody, program("initdb"), "-D", template, "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run([*made, "--locale=C"], check=True, capture_output=True, timeout=120)
        Path(template, "pg_hba.conf").write_text("host all all 127.0.0.0/8 trust\n")
        owned(folder)
        ports = {}
        for name in CLUSTERS:
            data = folder / name
            copied(Path(template), data)
            ports[name] = free_port()
            started = stack.enter_context(process(*server(folder, name, ports[name], tls=name != "bare")))
            # At once, without a checkpoint: nobody needs the data.
            stack.callback(started.send_signal, signal.SIGQUIT)
        for name, port in ports.items():
            wait_for(partial(answers, port))
            setup = ("-c", "create role alice superuser login", "-c", f"create database d_{name}")
            assert run(*psql(port, "localhost", "disable"), *setup) == ""
        yield Clusters(ports=ports, certificate=folder / "cert", folder=folder)


def answers(port: int) -> bool:
    return run(*psql(port, "localhost", "disable"), "-c", "select 1").startswith("1")


def psql(port: int, host: str, sslmode: str, user: str = "postgres", database: str = "postgres") -> list[str]:
    """With `host` as server name, on the loopback address whatever it is."""
    where = f"host={host} hostaddr=127.0.0.1 port={port} sslmode={sslmode} gssencmode=disable connect_timeout=20"
    return ["psql", "-XqAt", "-F", " ", f"{where} user={user} dbname={database}"]


def asked(port: int, host: str, sslmode: str, query: str = WHO, **who: str) -> str:
    return run(*psql(port, host, sslmode, **who), "-c", query).strip()


@contextmanager
def broker(folder: Path, clusters: Clusters, carrier: str, listen: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Its port; and what it has counted, once it has ended."""
    port = free_port()
    services = "".join(
        f'[[service]]\nname = "{name}.pg.example.com"\ntarget = "tcp:127.0.0.1:{at}"\n'
        f'[[route]]\nprotocol = "postgres"\ndatabase = "d_{name}"\nto = "service:{name}.pg.example.com"\n'
        for name, at in clusters.ports.items()
    )
    rest = '[[route]]\nprotocol = "postgres"\nto = "service:two.pg.example.com"\n'
    path = folder / "broker.toml"
    path.write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\n{listen}{services}{rest}')
    serve = [sys.executable, "-m", "fourtuple", "serve", "-c", str(path), "--carrier", carrier, "--json"]
    last: dict[str, Any] = {}
    with process(*serve, "--log", str(folder / "log")) as running:
        wait_for(lambda: listens(port) or running.poll() is not None)
        assert running.poll() is None, running.communicate()[0]
        yield port, last
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 0, output
        last |= json.loads(output.splitlines()[-1])


def served(counted: dict[str, Any]) -> int:
    """How many were relayed. An alert at the end may meet somebody who has closed, and is then answered with RST;
    whoever only looked whether the port listens has left."""
    ended = counted["ended"]
    assert set(ended) <= {"relayed", "service_broke", "client_broke", "client_left"}
    return sum(int(ended.get(reason, 0)) for reason in ("relayed", "service_broke", "client_broke"))


CARRIERS = pytest.mark.parametrize("carrier", ["uring", "epoll"])


@CARRIERS
def test_clusters_are_told_apart_by_the_server_name(tmp_path: Path, clusters: Clusters, carrier: str) -> None:
    with broker(tmp_path, clusters, carrier) as (port, counted):
        for name in ("one", "two"):
            host = f"{name}.pg.example.com"
            for sslmode in ("require", "prefer"):
                assert asked(port, host, sslmode) == f"{name} t"
            # What the client verifies is the cluster's own certificate: the broker has none.
            strict = f"verify-full sslrootcert={clusters.certificate}"
            assert asked(port, host, strict) == f"{name} t"
            wide = asked(port, host, "require", "select repeat('x', 1000) from generate_series(1, 5000)")
            assert wide == "\n".join(["x" * 1000] * 5000)
        # A name that nothing is called goes where the protocol does.
        assert asked(port, "nobody.example.com", "require") == "two t"
    assert served(counted) == 9


def test_a_cluster_without_tls_breaks_the_promise_and_libpq_comes_again(tmp_path: Path, clusters: Clusters) -> None:
    with broker(tmp_path, clusters, "epoll") as (port, counted):
        host, database = "bare.pg.example.com", "d_bare"
        assert "bare" not in asked(port, host, "require", database=database)
        # The second connection says in the clear which database is meant.
        assert asked(port, host, "prefer", database=database) == "bare f"
        for name in CLUSTERS:
            assert asked(port, "localhost", "disable", database=f"d_{name}", user="alice") == f"{name} f"
    assert counted["ended"].pop("service_declined") == 2
    assert served(counted) == 4


def test_a_listener_without_tls_sees_user_and_database(tmp_path: Path, clusters: Clusters) -> None:
    with broker(tmp_path, clusters, "uring", 'postgres_tls = "declined"\n') as (port, _):
        for name in CLUSTERS:
            for sslmode in ("prefer", "disable"):
                assert asked(port, "localhost", sslmode, database=f"d_{name}") == f"{name} f"
        assert "does not support SSL" in asked(port, "one.pg.example.com", "require", database="d_one")


def test_a_listener_that_leaves_it_to_the_service_knows_the_protocol_alone(tmp_path: Path, clusters: Clusters) -> None:
    with broker(tmp_path, clusters, "epoll", 'postgres_tls = "left"\n') as (port, _):
        assert asked(port, "one.pg.example.com", "require", database="d_two") == "two t"
        assert asked(port, "one.pg.example.com", "disable", database="d_one") == "one f"


@CARRIERS
def test_a_cluster_that_is_handed_its_clients(tmp_path: Path, clusters: Clusters, carrier: str) -> None:
    """PostgreSQL, unchanged, with TLS that it negotiates itself, or none; before 17 not with a TLS that is promised."""
    if subprocess.run([*nobody(clusters.folder), "test", "-r", LIBRARY], check=False).returncode != 0:
        pytest.skip(f"nobody may not read {LIBRARY}")
    copied(clusters.folder / "template", clusters.folder / "handed")
    listener, path = f"127.0.0.1:{free_port()}", clusters.folder / "handed.socket"
    daemon = server(clusters.folder, "handed", int(listener.rpartition(":")[2]), tls=True)
    ports = {answer: free_port() for answer in ("left", "declined", "offered")}
    listens_at = "".join(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\npostgres_tls = "{answer}"\n' for answer, port in ports.items()
    )
    file = tmp_path / "broker.toml"
    file.write_text(
        # Its socket is nobody's alone, and a broker has no capabilities that would replace that right.
        f'{listens_at}[confine]\nuser = "nobody"\n'
        f'[[service]]\nname = "handed"\ntarget = "unix:{path}"\ndelivery = "handoff"\n'
        '[[route]]\nprotocol = "postgres"\nto = "service:handed"\n'
    )
    run_it = [sys.executable, "-m", "fourtuple", "run", "--handoff", f"{listener}={path}", "--", *daemon]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, clusters.folder / "handed")
        stack.callback(path.unlink, missing_ok=True)
        stack.enter_context(process(*run_it))
        stack.enter_context(process(sys.executable, "-m", "fourtuple", "serve", "-c", str(file), "--carrier", carrier))
        wait_for(lambda: path.exists() and all(map(listens, ports.values())))
        wait_for(partial(answers, ports["left"]))
        for answer, sslmode, said in (
            ("left", "require", "handed t"),
            ("left", "disable", "handed f"),
            ("declined", "prefer", "handed f"),
            ("offered", "disable", "handed f"),
            ("offered", "prefer", "handed f"),
        ):
            assert asked(ports[answer], "localhost", sslmode) == said, (answer, sslmode)


def test_what_comes_behind_the_request_before_its_answer_is_refused(tmp_path: Path, clusters: Clusters) -> None:
    request = bytes([0, 0, 0, 8, 4, 210, 22, 47])
    with broker(tmp_path, clusters, "uring") as (port, counted):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            client.sendall(request + b"\x16\x03\x01")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            for byte in request:
                client.sendall(bytes([byte]))
            assert client.recv(10) == b"S"
            client.sendall(b"Q")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert counted["ended"]["garbage"] == 2


# ---- requests to cancel ----------------------------------------------------------------------------------------------

SLEEPS = "select pg_sleep(60)"


def sleeping(clusters: Clusters, name: str) -> int:
    """How many sleep there."""
    where = f"host=127.0.0.1 port={clusters.ports[name]} sslmode=disable gssencmode=disable user=postgres"
    with psycopg.connect(where) as connection:
        query = "select count(*) from pg_stat_activity where query = %s and state = 'active'"
        found = connection.execute(query, [SLEEPS]).fetchone()
    assert found is not None
    return int(found[0])


@contextmanager
def query(port: int, name: str, sslmode: str) -> Iterator[Any]:
    """A connection in which a query sleeps that has to be cancelled."""
    where = f"host={name}.pg.example.com hostaddr=127.0.0.1 port={port} sslmode={sslmode} gssencmode=disable"
    ended: list[BaseException] = []

    def run() -> None:
        try:
            connection.execute(SLEEPS)
        except psycopg.Error as error:
            ended.append(error)

    with psycopg.connect(f"{where} user=postgres dbname=d_{name}", autocommit=True) as connection:
        thread = threading.Thread(target=run)
        thread.start()
        yield connection
        thread.join(30)
        assert not thread.is_alive()
        assert isinstance(ended[0], psycopg.errors.QueryCanceled), ended


@pytest.mark.parametrize(("sslmode", "carrier"), [("disable", "uring"), ("require", "epoll")])
def test_a_query_is_cancelled_in_its_cluster(tmp_path: Path, clusters: Clusters, carrier: str, sslmode: str) -> None:
    with broker(tmp_path, clusters, carrier) as (port, counted):
        queries = (query(port, name, sslmode) for name in ("one", "two"))
        with next(queries) as first, next(queries) as second:
            wait_for(lambda: sleeping(clusters, "one") == 1 and sleeping(clusters, "two") == 1)
            for connection, name, other in ((first, "one", "two"), (second, "two", "one")):
                before = sleeping(clusters, other)
                connection.cancel()
                wait_for(lambda name=name: sleeping(clusters, name) == 0)  # type: ignore[misc]
                assert sleeping(clusters, other) == before
    assert served(counted) == 4


def test_a_wrong_key_cancels_nothing(tmp_path: Path, clusters: Clusters) -> None:
    with broker(tmp_path, clusters, "uring") as (port, counted), query(port, "one", "disable") as connection:
        wait_for(lambda: sleeping(clusters, "one") == 1)
        process = connection.info.backend_pid
        for secret in (0, 0xFFFFFFFF):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(struct.pack("!IIII", 16, 80_877_102, process, secret))
                assert client.recv(1) == b""
        assert sleeping(clusters, "one") == 1
        connection.cancel()
    assert served(counted) == 4


def test_the_usual_psql_is_cancelled(tmp_path: Path, clusters: Clusters) -> None:
    """Ctrl-C of psql, which opens a connection of its own."""
    with broker(tmp_path, clusters, "uring") as (port, _):
        command = [*psql(port, "two.pg.example.com", "require", database="d_two"), "-c", SLEEPS]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            wait_for(lambda: sleeping(clusters, "two") == 1)
            running.send_signal(signal.SIGINT)
            output, _ = running.communicate(timeout=30)
        assert "canceling statement due to user request" in output
