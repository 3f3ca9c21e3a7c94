"""`fourtuple serve` where somebody has to speak before the service is known: real clients, two real servers each."""

from __future__ import annotations

import imaplib
import json
import os
import poplib
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.netns.brokering import SERVE, listens, needed, process, run, wait_for
from tests.netns.test_serve_postgres import free_port

PATIENCE_S = 30
NAMES = ("one.example.com", "two.example.com")

SMTP = """
import signal, ssl, sys
from aiosmtpd.controller import Controller

class Answers:
    async def handle_DATA(self, server, session, envelope):
        said = envelope.content.decode().strip()
        return f"250 {sys.argv[1]} tls={session.ssl is not None} heard {session.host_name} {said}"

context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(sys.argv[3], sys.argv[4])
controller = Controller(Answers(), "127.0.0.1", int(sys.argv[2]), server_hostname=sys.argv[1], tls_context=context)
controller.start()
signal.pause()
"""

DOVECOT = """
base_dir = {folder}/run
state_dir = {folder}/run
log_path = {folder}/log
protocols = imap pop3
listen = 127.0.0.1
ssl = yes
ssl_cert = <{certificate}
ssl_key = <{key}
disable_plaintext_auth = no
login_greeting = {name} is ready
mail_location = maildir:{folder}/mail/%u
first_valid_uid = 1
first_valid_gid = 1
default_vsz_limit = 256 M
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
passdb {{
  driver = static
  args = password=of-{name}
}}
userdb {{
  driver = static
  args = uid=65534 gid=65534 home={folder}/mail
}}
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    needed("openssl")
    # Not below pytest's folder, which is root's alone.
    with tempfile.TemporaryDirectory(prefix="fourtuple-doors-") as text:
        path = Path(text)
        path.chmod(0o755)
        run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=example.com", "-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in NAMES)),
            *("-days", "2", "-keyout", str(path / "key"), "-out", str(path / "cert")),
        )
        (path / "key").chmod(0o644)
        yield path


@pytest.fixture
def context(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "cert"))


@contextmanager
def broker(tmp_path: Path, door: str, targets: dict[str, int], rest: str = "", carrier: str = "uring") -> Iterator[Any]:
    """Its port; and, once it has ended, how connections have."""
    port = free_port()
    services = "".join(f'[[service]]\nname = "{name}"\ntarget = "tcp:127.0.0.1:{at}"\n' for name, at in targets.items())
    path = tmp_path / "broker.toml"
    path.write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\ndoor = "{door}"\n{rest}{services}')
    ended: dict[str, int] = {}
    with process(*SERVE, "-c", str(path), "--carrier", carrier, "--json") as running:
        wait_for(lambda: listens(port))
        yield port, ended
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 0, output
        ended |= json.loads(output.splitlines()[-1])["ended"]


def relayed(ended: dict[str, int]) -> int:
    """How many were, however that ended: an alert at the end may meet somebody who has closed."""
    return sum(ended.get(reason, 0) for reason in ("relayed", "client_broke", "service_broke"))


def said_by_openssl(port: int, protocol: str, name: str, folder: Path) -> str:
    """What `openssl s_client -starttls` says of who is behind the door."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-starttls", protocol, "-servername", name]
    return run(*command, "-CAfile", str(folder / "cert"), "-verify_hostname", name, "-verify_return_error", "-brief")


# ---- SMTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mail(folder: Path) -> Iterator[dict[str, int]]:
    pytest.importorskip("aiosmtpd", reason="aiosmtpd is not installed")
    ports = {name: free_port() for name in NAMES}
    with ExitStack() as stack:
        for name, port in ports.items():
            words = (name, str(port), str(folder / "cert"), str(folder / "key"))
            stack.enter_context(process(sys.executable, "-c", SMTP, *words))
        for port in ports.values():
            wait_for(partial(listens, port))
        yield ports


def sent(client: smtplib.SMTP, text: bytes) -> str:
    client.mail("a@example.com")
    client.rcpt("b@example.com")
    return client.data(text)[1].decode()


@pytest.mark.parametrize("carrier", ["uring", "epoll"])
def test_smtp_by_server_name_and_without_tls_to_the_default(
    tmp_path: Path, mail: dict[str, int], folder: Path, context: ssl.SSLContext, carrier: str
) -> None:
    rest = f'door_name = "mx.example.com"\ndefault = "service:{NAMES[1]}"\n'
    with broker(tmp_path, "smtp", mail, rest, carrier) as (port, ended):
        for name in NAMES:
            with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as client:
                assert client.ehlo("first.example.com")[1] == b"mx.example.com\nSTARTTLS"
                client._host = name  # type: ignore[attr-defined]
                client.starttls(context=context)
                client.ehlo("second.example.com")
                assert sent(client, b"hello") == f"{name} tls=True heard second.example.com hello"
            assert "Verification: OK" in said_by_openssl(port, "smtp", name, folder)
        with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as client:
            client.ehlo("plain.example.com")
            assert client.noop() == (250, b"OK")
            assert sent(client, b"in the clear") == f"{NAMES[1]} tls=False heard plain.example.com in the clear"
        with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as client:
            assert client.quit()[0] == 221
    assert ended["client_left"] >= 1
    # Whoever looked whether the port listens may have been the default's.
    assert relayed(ended) in (6 - 1, 6)


def test_smtp_where_tls_is_required(tmp_path: Path, mail: dict[str, int], context: ssl.SSLContext) -> None:
    with broker(tmp_path, "smtp", mail, 'door_tls = "required"\n') as (port, ended):
        with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as client:
            assert client.mail("a@example.com")[0] == 530
            client._host = NAMES[0]  # type: ignore[attr-defined]
            client.starttls(context=context)
            client.ehlo("again.example.com")
            assert sent(client, b"hello").startswith(NAMES[0])
        with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as client:
            client._host = "nobody.example.com"  # type: ignore[attr-defined]
            with pytest.raises(ConnectionResetError):
                client.starttls(context=context)
        # Said in the clear behind STARTTLS, it would be taken for what was said inside (CVE-2011-0411).
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
            assert raw.recv(100).startswith(b"220 ")
            raw.sendall(b"STARTTLS\r\nMAIL FROM:<a@example.com>\r\n")
            with pytest.raises(ConnectionResetError):
                raw.recv(1)
    assert (ended["no_route"], ended["garbage"]) == (1, 1)


def test_a_service_that_says_no_is_told_nothing_more(tmp_path: Path, context: ssl.SSLContext) -> None:
    """One without TLS, and one that answers before it is asked."""
    heard: list[bytes] = []
    answers = {b"EHLO": b"250 plain\r\n", b"STAR": b"502 not here\r\n"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        targets = {NAMES[0]: listener.getsockname()[1]}
        with broker(tmp_path, "smtp", targets) as (port, ended):
            for greeting in (b"220 plain\r\n", b"220 plain\r\n250 early\r\n"):
                client = smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S)
                client._host = NAMES[0]  # type: ignore[attr-defined]
                client.ehlo("me.example.com")
                client.docmd("STARTTLS")
                hello = ssl.MemoryBIO()
                with pytest.raises(ssl.SSLWantReadError):
                    context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=NAMES[0]).do_handshake()
                assert client.sock is not None
                client.sock.sendall(hello.read())
                service, _ = listener.accept()
                with service, client.sock:
                    service.sendall(greeting)
                    while line := _received(service):
                        heard.append(line)
                        service.sendall(answers[line[:4].upper()])
                    with pytest.raises(ConnectionResetError):
                        client.sock.recv(1)
    assert heard == [b"ehlo me.example.com\r\n", b"STARTTLS\r\n"]
    assert ended == {"service_declined": 2, "client_left": ended["client_left"]}


def _received(service: socket.socket) -> bytes:
    try:
        return service.recv(1000)
    except ConnectionResetError:
        return b""


# ---- IMAP and POP3 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mailboxes(folder: Path) -> Iterator[dict[str, dict[str, int]]]:
    needed("dovecot")
    if os.geteuid() != 0:
        pytest.skip("dovecot's processes are to be its own users: that takes root")
    ports: dict[str, dict[str, int]] = {"imap": {}, "pop3": {}}
    with ExitStack() as stack:
        for name in NAMES:
            here = folder / name
            (here / "mail").mkdir(parents=True)
            shutil.chown(here / "mail", 65_534, 65_534)
            imap, pop3 = free_port(), free_port()
            ports["imap"][name], ports["pop3"][name] = imap, pop3
            words = {"certificate": folder / "cert", "key": folder / "key", "folder": here, "name": name}
            (here / "conf").write_text(DOVECOT.format(**words, imap=imap, pop3=pop3))
            stack.enter_context(process("dovecot", "-F", "-c", str(here / "conf")))
        for port in (*ports["imap"].values(), *ports["pop3"].values()):
            wait_for(partial(listens, port))
        yield ports


def test_imap_by_server_name_and_by_user(
    tmp_path: Path, mailboxes: dict[str, dict[str, int]], folder: Path, context: ssl.SSLContext
) -> None:
    rest = f'default = "service:{NAMES[1]}"\n[[route]]\nprotocol = "imap"\nuser = "alice"\nto = "service:{NAMES[0]}"\n'
    with broker(tmp_path, "imap", mailboxes["imap"], rest) as (port, ended):
        for name in NAMES:
            client = imaplib.IMAP4("127.0.0.1", port, timeout=PATIENCE_S)
            assert client.capabilities == ("IMAP4REV1", "STARTTLS")
            client.host = name
            client.starttls(context)
            client.login("bob", f"of-{name}")
            assert client.select() == ("OK", [b"0"])
            client.logout()
            assert "Verification: OK" in said_by_openssl(port, "imap", name, folder)
        for user, name in (("alice", NAMES[0]), ("bob", NAMES[1])):
            client = imaplib.IMAP4("127.0.0.1", port, timeout=PATIENCE_S)
            client.noop()
            client.login(user, f"of-{name}")
            client.logout()
    assert relayed(ended) in (7 - 1, 7)


def test_pop3_by_server_name(
    tmp_path: Path, mailboxes: dict[str, dict[str, int]], folder: Path, context: ssl.SSLContext
) -> None:
    with broker(tmp_path, "pop3", mailboxes["pop3"], f'default = "service:{NAMES[1]}"\n') as (port, ended):
        for name in NAMES:
            client = poplib.POP3("127.0.0.1", port, timeout=PATIENCE_S)
            assert set(client.capa()) == {"STLS", "USER"}
            client.host = name
            client.stls(context)
            client.user("bob")
            client.pass_(f"of-{name}")
            assert client.stat() == (0, 0)
            client.quit()
            assert "Verification: OK" in said_by_openssl(port, "pop3", name, folder)
        client = poplib.POP3("127.0.0.1", port, timeout=PATIENCE_S)
        client.user("bob")
        assert client.pass_(f"of-{NAMES[1]}").startswith(b"+OK")
        client.quit()
    assert relayed(ended) in (6 - 1, 6)


# ---- MySQL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def databases(folder: Path) -> Iterator[dict[str, int]]:
    needed("mariadbd", "mariadb-install-db", "mariadb")
    if os.geteuid() != 0:
        pytest.skip("MariaDB's files are to be nobody's: that takes root")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    home = folder / "mariadb"
    home.mkdir()
    shutil.chown(home, 65_534, 65_534)
    install = ["mariadb-install-db", "--no-defaults", f"--datadir={home}/template", "--skip-test-db"]
    subprocess.run(
        [*nobody, *install, "--auth-root-authentication-method=normal"], check=True, capture_output=True, timeout=120
    )
    ports = {name: free_port() for name in NAMES}
    with ExitStack() as stack:
        for name, port in ports.items():
            subprocess.run([*nobody, "cp", "-r", f"{home}/template", f"{home}/{name}"], check=True)
            settings = (f"datadir={home}/{name}", f"port={port}", "bind-address=127.0.0.1", f"ssl-cert={folder}/cert",
                        f"ssl-key={folder}/key", f"socket={home}/{name}.socket", "performance-schema=off",
                        "innodb-buffer-pool-size=8M", "innodb-log-file-size=4M")  # fmt: skip
            options = [f"--{setting}" for setting in settings]
            stack.enter_context(
                process(*nobody, shutil.which("mariadbd") or "/usr/sbin/mariadbd", "--no-defaults", *options)
            )
        for name, port in ports.items():
            wait_for(partial(listens, port))
            label = name.partition(".")[0]
            setup = (
                f"create database d_{label}; create user alice@'%' identified by 'of-{label}'; "
                "grant all on *.* to alice@'%'; create user bare@'%'; grant all on *.* to bare@'%'"
            )
            assert run("mariadb", "--no-defaults", "-S", f"{home}/{name}.socket", "-uroot", "-e", setup) == ""
        yield ports


def queried(port: int, label: str, *options: str, user: str = "alice", password: str = "") -> str:
    words = ("-h127.0.0.1", f"-P{port}", f"-u{user}", f"-p{password}" if password else "--skip-password")
    return run("mariadb", "--no-defaults", *words, *options, f"d_{label}", "-BNe", "select database(), @@port").strip()


def test_mysql_by_database_and_by_server_name(
    tmp_path: Path, databases: dict[str, int], folder: Path, context: ssl.SSLContext
) -> None:
    pymysql = pytest.importorskip("pymysql", reason="PyMySQL is not installed")
    routes = (
        f'default = "service:{NAMES[1]}"\n'
        f'[[route]]\nprotocol = "mysql"\ndatabase = "d_one"\nto = "service:{NAMES[0]}"\n'
    )
    with broker(tmp_path, "mysql", databases, routes) as (port, ended):
        ports = {label: databases[f"{label}.example.com"] for label in ("one", "two")}
        for label, at in ports.items():
            assert queried(port, label, "--skip-ssl", password=f"of-{label}") == f"d_{label}\t{at}"
            assert queried(port, label, "--skip-ssl", user="bare") == f"d_{label}\t{at}"
        # A proof that is wrong for the service is wrong, whoever greeted.
        assert "Access denied" in queried(port, "one", "--skip-ssl", password="of-two")
        # The client of MariaDB 10.11 says no server name: with TLS it is the default's.
        assert queried(port, "two", f"--ssl-ca={folder}/cert", password="of-two") == f"d_two\t{ports['two']}"
        for label, at in ports.items():
            with (
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw,
                pymysql.connect(
                    host=f"{label}.example.com", user="alice", password=f"of-{label}", database=f"d_{label}",
                    ssl=context, defer_connect=True,
                ) as client,
            ):  # fmt: skip
                client.connect(raw)
                with client.cursor() as cursor:
                    cursor.execute("select database(), @@port")
                    assert cursor.fetchone() == (f"d_{label}", at)
            assert "Verification: OK" in said_by_openssl(port, "mysql", f"{label}.example.com", folder)
    assert relayed(ended) in (11 - 1, 11)


# ---- LDAP ------------------------------------------------------------------------------------------------------------


def test_ldap_by_server_name(tmp_path: Path, folder: Path) -> None:
    needed("slapd", "ldapsearch")
    ports = {name: free_port() for name in NAMES}
    with ExitStack() as stack:
        for name, port in ports.items():
            here = tmp_path / name
            here.mkdir()
            settings = f"pidfile {here}/pid\nTLSCertificateFile {folder}/cert\nTLSCertificateKeyFile {folder}/key\n"
            (here / "conf").write_text(settings)
            where = f"ldap://127.0.0.1:{port}/"
            stack.enter_context(process("/usr/sbin/slapd", "-f", str(here / "conf"), "-h", where, "-d", "0"))
        for port in ports.values():
            wait_for(partial(listens, port))
        with broker(tmp_path, "ldap", ports, f'default = "service:{NAMES[1]}"\n') as (port, ended):
            for name in NAMES:
                assert "Verification: OK" in said_by_openssl(port, "ldap", name, folder)
            found = run("ldapsearch", "-x", "-H", f"ldap://127.0.0.1:{port}", "-s", "base", "-b", "", "+")
            assert "supportedExtension: 1.3.6.1.4.1.1466.20037" in found
    assert relayed(ended) in (4 - 1, 4)
