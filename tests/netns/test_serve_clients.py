"""Real clients of what a broker can tell apart by first bytes, through `fourtuple serve` to services that answer them.

Each service says enough of its protocol for the client to know whom it has reached; what it heard shows that it has got
every byte that is for it, and none that was for the broker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.netns.brokering import PATIENCE_S, SERVE, echoing, free_port, listens, needed, process, run, wait_for

Answer = Callable[[socket.socket], None]


@contextmanager
def broker(folder: Path, text: str, listen: str = "") -> Iterator[tuple[int, list[str]]]:
    """The port of its only listener, and its last line when it has ended; targets are `{folder}/NAME`."""
    port, file, printed = free_port(), folder / "broker.toml", list[str]()
    head = f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 2000\n{listen}\n'
    file.write_text(head + text.format(folder=folder))
    with process(*SERVE, "-c", str(file), "--json", "--grace", "1") as started:
        wait_for(lambda: listens(port) or started.poll() is not None)
        yield port, printed
        started.send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=PATIENCE_S)
        printed.append(output.splitlines()[-1])
    assert started.returncode == 0, output


@contextmanager
def answering(path: Path, answer: Answer) -> Iterator[None]:
    """A service at a path, one connection after the other."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.settimeout(PATIENCE_S)
                answer(client)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)


def python(script: str, *arguments: object) -> str:
    """What a script of this interpreter prints, in a process of its own: client libraries have loops and threads."""
    return run(sys.executable, "-c", script, *map(str, arguments))


# SOCKS

WEB = """
    [[service]]
    name = "shop.example.com"
    target = "unix:{folder}/shop"
    [[service]]
    name = "localhost"
    target = "unix:{folder}/local"
    [[route]]
    name = "192.0.2.7"
    to = "unix:{folder}/address"
    [[route]]
    user = "alice"
    protocol = "socks4"
    to = "unix:{folder}/alice"
"""


def test_curl_names_its_service_to_a_socks_proxy(tmp_path: Path) -> None:
    needed("curl")
    with ExitStack() as stack:
        for name in ("shop", "local", "address", "alice", "rest"):
            stack.enter_context(echoing(tmp_path / name))
        listen = f'protocols = ["socks4", "socks5", "http1"]\ndefault = "unix:{tmp_path}/rest"'
        port, printed = stack.enter_context(broker(tmp_path, WEB, listen))

        def fetched(proxy: str, url: str) -> str:
            # The services answer with no head.
            return run("curl", "-s", "--http0.9", "-x", proxy.replace("HERE", f"127.0.0.1:{port}"), url)

        heard = "shop heard GET /x HTTP/1.1\nHost: shop.example.com"
        for scheme in ("socks4a", "socks5h"):
            assert fetched(f"{scheme}://HERE", "http://shop.example.com/x").startswith(heard), scheme
            assert fetched(f"{scheme}://HERE", "http://elsewhere.example/").startswith("rest heard GET / ")
        for scheme in ("socks4", "socks5"):
            assert fetched(f"{scheme}://HERE", "http://192.0.2.7/").startswith("address heard GET / ")
        assert fetched("socks4a://alice@HERE", "http://elsewhere.example/").startswith("alice heard GET / ")
        # With a password it may go without one, too.
        assert fetched("socks5h://alice:secret@HERE", "http://shop.example.com/x").startswith(heard)
        assert fetched("http://HERE", "http://shop.example.com/x").startswith(
            "shop heard GET http://shop.example.com/x "
        )
    assert json.loads(printed[0])["ended"].keys() == {"relayed"}


def test_a_socks_client_that_does_not_wait_is_served(tmp_path: Path) -> None:
    """What nmap's probe does: greeting, request and what is for the service in one segment."""
    greeting, request = b"\x05\x01\x00", b"\x05\x01\x00\x03\x10shop.example.com\x00\x50"
    with (
        echoing(tmp_path / "shop"),
        broker(tmp_path, WEB, 'protocols = ["socks5"]') as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client,
    ):
        client.sendall(greeting + request + b"hello")
        heard = b""
        while block := client.recv(4096):
            heard += block
    assert heard == b"\x05\x00" + b"\x05\x00\x00\x01" + bytes(6) + b"shop heard hello"


def test_a_socks_client_is_left_to_its_service(tmp_path: Path) -> None:
    listen = f'protocols = ["socks5"]\nsocks = "left"\ndefault = "unix:{tmp_path}/proxy"'

    def answer(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(b"\x05\x00")
        asked = client.recv(4096)
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))
        client.sendall(b"proxy heard " + asked[5:-2] + b" and " + client.recv(4096))

    needed("curl")
    with answering(tmp_path / "proxy", answer), broker(tmp_path, WEB, listen) as (port, _):
        said = run("curl", "-s", "--http0.9", "-x", f"socks5h://127.0.0.1:{port}", "http://shop.example.com/x")
    assert said.startswith("proxy heard shop.example.com and GET /x ")


# AMQP

PIKA = """
import sys, pika
parameters = pika.ConnectionParameters("127.0.0.1", int(sys.argv[1]), "shop", heartbeat=0)
connection = pika.BlockingConnection(parameters)
print(connection._impl.server_capabilities)
connection.close()
"""


def test_pika_reaches_a_server_of_amqp(tmp_path: Path) -> None:
    pytest.importorskip("pika")
    from pika import frame, spec

    heard = bytearray()

    def await_method(client: socket.socket, method: type) -> None:
        """They come in as many segments as they like; each has its class and number in front."""
        while method.INDEX.to_bytes(4) not in heard:  # type: ignore[attr-defined]
            block = client.recv(4096)
            assert block, heard
            heard.extend(block)

    def answer(client: socket.socket) -> None:
        heard.extend(client.recv(8, socket.MSG_WAITALL))
        for method, then in (
            (spec.Connection.Start(server_properties={"capabilities": {"ours": True}}), spec.Connection.StartOk),
            (spec.Connection.Tune(1, 4096, 0), spec.Connection.Open),
            (spec.Connection.OpenOk(), spec.Connection.Close),
        ):
            client.sendall(frame.Method(0, method).marshal())
            await_method(client, then)
        client.sendall(frame.Method(0, spec.Connection.CloseOk()).marshal())
        client.recv(4096)

    text = '[[route]]\nprotocol = "amqp"\nto = "unix:{folder}/rabbit"'
    with answering(tmp_path / "rabbit", answer), broker(tmp_path, text) as (port, _):
        assert python(PIKA, port) == "{'ours': True}\n"
    assert (bytes(heard[:8]), b"guest" in heard) == (b"AMQP\x00\x00\x09\x01", True)


DEBIAN_PYTHON = "/usr/bin/python3"
PROTON_SERVER = """
import sys
from proton.handlers import MessagingHandler
from proton.reactor import Container
class Server(MessagingHandler):
    def on_start(self, event):
        event.container.listen(f"127.0.0.1:{sys.argv[1]}")
    def on_link_opening(self, event):
        event.link.target.address = event.link.remote_target.address
    def on_message(self, event):
        print(event.receiver.target.address, event.message.body, flush=True)
Container(Server()).run()
"""
PROTON_CLIENT = """
import sys
from proton import Message
from proton.utils import BlockingConnection
with_sasl = sys.argv[2] == "sasl"
connection = BlockingConnection(f"127.0.0.1:{sys.argv[1]}", timeout=20, sasl_enabled=with_sasl)
connection.create_sender("orders").send(Message(body=f"with {sys.argv[2]}"))
connection.close()
"""


def test_proton_reaches_a_server_of_amqp_1_0(tmp_path: Path) -> None:
    """Of both there is Debian's: its library has no wheel. With SASL in front, and without."""
    if subprocess.run([DEBIAN_PYTHON, "-c", "import proton"], capture_output=True, check=False).returncode:
        pytest.skip("python3-qpid-proton is not installed")
    target = free_port()
    text = (
        f'[[route]]\nprotocol = "amqp1"\nto = "tcp:127.0.0.1:{target}"\n[[route]]\nprotocol = "amqp"\nto = "unix:/none"'
    )
    with process(DEBIAN_PYTHON, "-c", PROTON_SERVER, str(target)) as server:
        wait_for(lambda: listens(target))
        with broker(tmp_path, text) as (port, printed):
            for manner in ("sasl", "none"):
                run(DEBIAN_PYTHON, "-c", PROTON_CLIENT, str(port), manner)
        server.terminate()
        assert server.communicate(timeout=PATIENCE_S)[0] == "orders with sasl\norders with none\n"
    assert json.loads(printed[0])["ended"]["relayed"] == 2


# XMPP

SLIXMPP = """
import sys, slixmpp
class Client(slixmpp.ClientXMPP):
    def __init__(self):
        super().__init__("juliet@capulet.example", "secret")
        self.enable_direct_tls, self.enable_starttls, self.enable_plaintext = False, False, True
        self.add_event_handler("stream_error", lambda error: print(error["condition"], error["text"]))
client = Client()
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop.run_until_complete(client.wait_until("stream_error", 20))
"""
STREAM = b"""<?xml version='1.0'?><stream:stream from='capulet.example' id='1' version='1.0' xmlns='jabber:client'
xmlns:stream='http://etherx.jabber.org/streams'><stream:error><reset xmlns='urn:ietf:params:xml:ns:xmpp-streams'/><text
xmlns='urn:ietf:params:xml:ns:xmpp-streams'>from the right one</text></stream:error></stream:stream>"""


def test_slixmpp_reaches_the_domain_of_its_address(tmp_path: Path) -> None:
    pytest.importorskip("slixmpp")
    heard: list[bytes] = []

    def answer(client: socket.socket) -> None:
        heard.append(client.recv(4096))
        client.sendall(STREAM)
        client.recv(4096)

    text = """
        [[service]]
        name = "capulet.example"
        target = "unix:{folder}/capulet"
    """
    with answering(tmp_path / "capulet", answer), broker(tmp_path, text) as (port, _):
        assert "reset from the right one\n" in python(SLIXMPP, port)
    assert heard[0].startswith((b"<stream:stream", b"<?xml"))
    assert b"capulet.example" in heard[0]


# RTSP

PYCURL = """
import sys, pycurl
def ask(request, session):
    curl = pycurl.Curl()
    curl.setopt(pycurl.URL, f"rtsp://127.0.0.1:{sys.argv[1]}/")
    curl.setopt(pycurl.OPT_RTSP_REQUEST, request)
    curl.setopt(pycurl.OPT_RTSP_STREAM_URI, "rtsp://cam.example.com/live/1")
    curl.setopt(pycurl.HEADERFUNCTION, lambda line: print(line.decode().strip()) if b"Server" in line else None)
    curl.setopt(pycurl.TIMEOUT, 20)
    if session:
        curl.setopt(pycurl.OPT_RTSP_SESSION_ID, session)
    curl.perform()
    curl.close()
ask(pycurl.RTSPREQ_DESCRIBE, "")
ask(pycurl.RTSPREQ_PLAY, "4711")
"""


def test_libcurl_reaches_a_stream_and_its_session(tmp_path: Path) -> None:
    pytest.importorskip("pycurl")

    def answer(name: str) -> Answer:
        def one(client: socket.socket) -> None:
            words = client.recv(4096).split(b"\r\n")
            cseq = next(line for line in words if line.startswith(b"CSeq"))
            session = b"\r\nSession: 4711" if b"PLAY" in words[0] else b""
            client.sendall(b"RTSP/1.0 200 OK\r\n" + cseq + session + f"\r\nServer: {name}\r\n\r\n".encode())
            client.recv(4096)

        return one

    text = """
        [[route]]
        name = "cam.example.com"
        path = "/live"
        to = "unix:{folder}/camera"
        [[route]]
        name = "cam.example.com"
        path = "/live"
        client = "4711"
        to = "unix:{folder}/player"
    """
    with (
        answering(tmp_path / "camera", answer("camera")),
        answering(tmp_path / "player", answer("player")),
        broker(tmp_path, text) as (port, _),
    ):
        assert python(PYCURL, port).split("\n") == ["Server: camera", "Server: player", ""]


# RDP


@contextmanager
def display() -> Iterator[str]:
    """A screen that nobody sees."""
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-nolisten", "tcp", "-screen", "0", "640x480x16"],
        pass_fds=[writing],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            os.close(writing)
            with os.fdopen(reading) as told:
                number = told.readline().strip()
            assert number, "Xvfb has ended"
            yield f":{number}"
        finally:
            server.terminate()


def test_rdesktop_reaches_the_host_of_its_user(tmp_path: Path) -> None:
    needed("rdesktop", "Xvfb")
    heard: list[bytes] = []

    def answer(client: socket.socket) -> None:
        heard.append(client.recv(4096))
        # SSL_NOT_ALLOWED_BY_SERVER (MS-RDPBCGR 2.2.1.2.2), and nothing more once it comes without.
        if len(heard) == 1:
            client.sendall(bytes.fromhex("03000013 0ed0000012340003 0008000200 0000"))

    text = '[[route]]\nprotocol = "rdp"\nuser = "alice"\nto = "unix:{folder}/desk"'
    with (
        display() as screen,
        answering(tmp_path / "desk", answer),
        broker(tmp_path, text) as (port, printed),
        process("rdesktop", "-u", "alice", f"127.0.0.1:{port}", environment={"DISPLAY": screen}) as client,
    ):
        told, _ = client.communicate("", timeout=PATIENCE_S)
    assert b"Cookie: mstshash=alice\r\n" in heard[0], told
    assert json.loads(printed[0])["ended"].get("relayed", 0) >= 1


# Minecraft

MCSTATUS = """
import sys, mcstatus
server = mcstatus.JavaServer("localhost", int(sys.argv[1]), timeout=20)
print(server.status().motd.to_plain())
"""


def test_mcstatus_sees_the_server_of_its_name(tmp_path: Path) -> None:
    pytest.importorskip("mcstatus")
    heard = bytearray()

    def answer(client: socket.socket) -> None:
        # Handshake and request, then a ping, each behind its length.
        while len(heard) < 2 or len(heard) < heard[0] + 1 + 2:
            heard.extend(client.recv(4096))
        players = '"players":{"max":9,"online":1}'
        status = f'{{"version":{{"name":"x","protocol":47}},{players},"description":"the right one"}}'.encode()
        packet = b"\x00" + bytes([len(status)]) + status
        client.sendall(bytes([len(packet)]) + packet)
        client.sendall(client.recv(4096))

    text = """
        [[route]]
        protocol = "minecraft"
        name = "localhost"
        to = "unix:{folder}/craft"
    """
    with answering(tmp_path / "craft", answer), broker(tmp_path, text) as (port, _):
        assert python(MCSTATUS, port) == "the right one\n"
    assert b"\x09localhost" in heard


# LDAP

SLAPD = """\
include /etc/ldap/schema/core.schema
modulepath /usr/lib/ldap
moduleload back_null
database null
suffix "dc=example,dc=com"
rootdn "cn=admin,dc=example,dc=com"
rootpw secret
"""


def test_ldap_clients_reach_the_directory_that_they_bind_to(tmp_path: Path) -> None:
    needed("slapd", "ldapwhoami")
    (tmp_path / "slapd.conf").write_text(SLAPD)
    socket_path = tmp_path / "directory"
    address = "ldapi://" + str(socket_path).replace("/", "%2F")
    text = """
        [[route]]
        protocol = "ldap"
        user = "cn=admin,dc=example,dc=com"
        to = "unix:{folder}/directory"
        [[route]]
        protocol = "ldap"
        to = "unix:{folder}/rest"
    """
    slapd = ("/usr/sbin/slapd", "-d", "0", "-h", address, "-f", str(tmp_path / "slapd.conf"))
    with (
        process(*slapd) as started,
        echoing(tmp_path / "rest"),
        broker(tmp_path, text) as (port, _),
    ):
        wait_for(lambda: socket_path.is_socket() or started.poll() is not None)
        client = ("ldapwhoami", "-x", "-H", f"ldap://127.0.0.1:{port}")
        assert run(*client, "-D", "cn=admin,dc=example,dc=com", "-w", "secret") == "dn:cn=admin,dc=example,dc=com\n"
        # Another, and one that asks for TLS first: the echo is no LDAP.
        assert "Can't contact LDAP server" in run(*client, "-D", "cn=other", "-w", "secret")
        assert "Can't contact LDAP server" in run(*client, "-ZZ")
