"""What a SourcePool's sockets have to do in one situation each. source_scenarios SCENARIO HOST:PORT, inside a lab.

The lab's automatic range is 20000-20009, of which 20004 is reserved; an echo server (nginx for http_...) listens at
HOST:PORT. `test_sources.py` runs each function of `SCENARIOS` in a process of its own, so the libraries that take long
to import are imported where they are needed.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fourtuple.connect import asyncio as connect_asyncio
from fourtuple.connect import automatic_ports, blocking
from fourtuple.connect.sockets import SourceSocket
from fourtuple.errors import BadConfig, LimitReached, MissingPrivilege
from fourtuple.sources import Mechanism, SourcePool, Usage
from fourtuple.tuples import Endpoint, Protocol

SKIPPED = 77
SOURCE = "127.0.0.1"
Target = tuple[str, int]


def usage(pool: SourcePool, target: Target) -> Usage:
    return pool.usage(Endpoint.parse(f"{target[0]}:{target[1]}"), time.monotonic())


def abort(one: socket.socket) -> None:
    """Close with a reset, so that no TIME_WAIT is left."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    one.close()


def blocking_waits_and_then_says_why(target: Target) -> None:
    pool = SourcePool(SOURCE, "20000-20001")
    held = [blocking.create_connection(pool, target) for _ in range(2)]
    with pytest.raises(LimitReached) as reached:
        blocking.create_connection(pool, target, 0.05)
    assert (reached.value.limit, reached.value.have, reached.value.need) == ("four-tuple", 2, 3)
    assert "2 by this pool, 0 in TIME_WAIT, 0 by others" in str(reached.value)
    assert usage(pool, target).waiting == 0
    port = held[0].getsockname()[1]
    threading.Timer(0.05, abort, held[:1]).start()
    with blocking.create_connection(pool, target, 10) as third:
        assert third.getsockname()[1] == port
        assert third.gettimeout() == 10
    held[1].close()
    # The peer closes after us, so both tuples rest; on loopback the kernel lets them be used again after a second.
    assert usage(pool, target).resting == 2
    blocking.create_connection(pool, target, 5).close()


def asyncio_waits_in_line(target: Target) -> None:
    async def work() -> None:
        pool = SourcePool(SOURCE, "20000-20001", patience_s=10)
        held = [await connect_asyncio.open_connection(pool, *target) for _ in range(2)]
        waiting = [asyncio.create_task(connect_asyncio.open_connection(pool, *target)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert usage(pool, target).waiting == 3
        waiting[1].cancel()
        await asyncio.sleep(0.05)
        assert usage(pool, target).waiting == 2
        for _, writer in held:
            abort_transport(writer)
        for task in (waiting[0], waiting[2]):
            _, writer = await task
            writer.write(b"echo")
            abort_transport(writer)
        await asyncio.sleep(0.05)
        assert usage(pool, target).held == 0
        pool.patience_s = 0.05
        held = [await connect_asyncio.open_connection(pool, *target) for _ in range(2)]
        with pytest.raises(LimitReached):
            await connect_asyncio.open_connection(pool, *target)
        for _, writer in held:
            abort_transport(writer)

    def abort_transport(writer: asyncio.StreamWriter) -> None:
        one = writer.get_extra_info("socket")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        writer.transport.abort()

    asyncio.run(work())


def trio_waits(target: Target) -> None:
    import trio

    from fourtuple.connect import trio as connect_trio

    pool = SourcePool(SOURCE, "20000", patience_s=10)

    async def one_more() -> None:
        stream = await connect_trio.open_tcp_stream(pool, *target)
        await stream.aclose()

    async def work() -> None:
        first = await connect_trio.open_tcp_stream(pool, *target)
        await first.send_all(b"token")
        assert await first.receive_some(5) == b"token"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_more)
            await trio.sleep(0.05)
            assert usage(pool, target).waiting == 1
            first.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            await first.aclose()
            await first.aclose()
        assert usage(pool, target).held == 0

    trio.run(work)


def a_descriptor_that_left_our_sight_is_missed_when_it_closes(target: Target) -> None:
    pool = SourcePool(SOURCE, "20000", patience_s=10)
    ours = blocking.create_connection(pool, target)
    plain = socket.socket(fileno=ours.detach())  # as TLS does, and anyio on trio
    assert usage(pool, target).held == 1
    threading.Timer(0.1, abort, [plain]).start()
    with blocking.create_connection(pool, target) as again:
        assert again.getsockname()[1] == 20000
    # A million of them one after the other leave no trace but the last few.
    for _ in range(200):
        one = SourcePool.take(pool, Endpoint.parse("127.0.0.9:9"), time.monotonic())
        assert one is not None
        pool.doubt(one, lambda: True)
        del one
    assert len(pool._doubts) < 10


def what_is_dropped_is_given_back(target: Target) -> None:
    pool = SourcePool(SOURCE, "20000-20001")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        held = [blocking.create_connection(pool, target) for _ in range(2)]
        for one in held:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        del one
        held.clear()
        gc.collect()
    assert usage(pool, target).held == 0
    assert not pool._towards


def makefile_keeps_the_tuple(target: Target) -> None:
    pool = SourcePool(SOURCE, "20000-20001")
    one = blocking.create_connection(pool, target)
    reader = one.makefile("rb")
    one.close()
    assert usage(pool, target).held == 1
    reader.close()
    assert usage(pool, target).held == 0


def a_refused_connection_costs_no_tuple(target: Target) -> None:
    pool = SourcePool(SOURCE, "20000-20001")
    for _ in range(10):
        with pytest.raises(ConnectionRefusedError):
            blocking.create_connection(pool, (target[0], 9))
    assert usage(pool, (target[0], 9)).held == 0
    one = SourceSocket(pool)
    assert one.connect_ex((target[0], 9)) == errno.ECONNREFUSED
    assert one.connect_ex(target) == 0, "the same socket, elsewhere"
    one.close()


def tuples_of_others_are_gone_around(target: Target) -> None:
    """A plain client has some tuples, another program has bound some ports by number."""
    with ExitStack() as others:
        for port in (20000, 20001):
            plain = others.enter_context(socket.socket())
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind((SOURCE, port))
            plain.connect(target)
        listener = others.enter_context(socket.socket())
        listener.bind(("127.0.0.5", 20002))
        listener.listen()
        pool = SourcePool(SOURCE, "20000-20003")
        with blocking.create_connection(pool, target) as one:
            assert one.getsockname()[1] == 20003
            with pytest.raises(LimitReached) as reached:
                blocking.create_connection(pool, target, 0.05)
            assert "1 by this pool, 0 in TIME_WAIT, 3 by others" in str(reached.value)


def many_tuples_of_others_are_gone_around_in_turns(target: Target) -> None:
    """More than one connect() tries at a stretch; one of them becomes free while it is looked for."""
    for by_asyncio in (False, True):
        with ExitStack() as others:
            listeners = [others.enter_context(socket.socket()) for _ in range(400)]
            for number, listener in enumerate(listeners):
                listener.bind((SOURCE, 30000 + number))
                listener.listen()
            pool = SourcePool(SOURCE, "30000-30399", patience_s=10)
            threading.Timer(0.2, listeners[7].close).start()
            if by_asyncio:
                asyncio.run(by_name_of(pool, target, 30007))
            else:
                with blocking.create_connection(pool, target) as one:
                    assert one.getsockname()[1] == 30007
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))


async def by_name_of(pool: SourcePool, target: Target, port: int) -> None:
    _, writer = await connect_asyncio.open_connection(pool, *target)
    assert writer.get_extra_info("sockname")[1] == port
    writer.close()


def ports_outside_the_range_are_bound(target: Target) -> None:
    """Automatic choice never goes outside its range, nor to a reserved port: binding there poisons nothing."""
    pool = SourcePool(SOURCE, "20003-20005,30000-30001")
    assert 20004 not in automatic_ports()
    with ExitStack() as held:
        ports = {
            held.enter_context(blocking.create_connection(pool, (target[0], target[1]))).getsockname()[1]
            for _ in range(5)
        }
    assert ports == {20003, 20004, 20005, 30000, 30001}


def every_mechanism_fills(target: Target) -> None:
    for mechanism in (Mechanism.SINGLE_PORT, Mechanism.NO_PORT, Mechanism.BIND):
        # Binding last: what it leaves is in the way of the others. The kernel's own choice is among all nine ports.
        pool = SourcePool("127.0.0.1", "20000-20003,20005-20009", mechanism=mechanism, patience_s=0)
        with ExitStack() as held:
            made = [blocking.create_connection(pool, (target[0], target[1])) for _ in range(9)]
            for one in made:
                held.callback(abort, one)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            assert {one.getsockname()[1] for one in made} == set(pool.ports), mechanism
            with pytest.raises(LimitReached):
                blocking.create_connection(pool, target)


def options_survive_a_second_try(target: Target) -> None:
    """A port bound by number stays bound: the next try is with another descriptor, under the same number."""
    with socket.socket() as other:
        other.bind((SOURCE, 30000))
        other.listen()
        for _ in range(20):  # whichever port comes first
            pool = SourcePool(SOURCE, "30000-30001")
            with SourceSocket(pool) as one:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                one.settimeout(5)
                number = one.fileno()
                one.connect(target)
                assert one.fileno() == number
                assert one.getsockname() == (SOURCE, 30001)
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert one.gettimeout() == 5
                assert not os.get_inheritable(number)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))


def a_narrowed_range_is_noticed(target: Target) -> None:
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    pool = SourcePool(SOURCE, "20006-20008")
    blocking.create_connection(pool, target).close()
    before = setting.read_text()
    setting.write_text("20000 20005")
    try:
        with blocking.create_connection(pool, target) as astray, blocking.create_connection(pool, target) as again:
            assert astray.getsockname()[1] <= 20005, "the kernel ignores what is outside the range, without an error"
            assert again.getsockname()[1] >= 20006, "and is not asked for it a second time"
    finally:
        setting.write_text(before)


def an_address_that_is_not_ours_is_named(target: Target) -> None:
    for source, to in (("192.0.2.7", target[0]), ("2001:db8::7", "::1")):
        pool = SourcePool(source, "20000-20009")
        with pytest.raises(BadConfig) as bad:
            blocking.create_connection(pool, (to, target[1]))
        assert bad.value.path == "sources"
        assert source in bad.value.why
    with pytest.raises(OSError, match=r"no IPv4 address|Address family"):
        blocking.create_connection(SourcePool(SOURCE, "20000"), ("::1", target[1]))


def a_port_below_the_unprivileged_start_is_named(target: Target) -> None:
    """As a program without CAP_NET_BIND_SERVICE; other ports serve it."""

    async def by_asyncio(port: int) -> None:
        pool = SourcePool(SOURCE, str(port))
        try:
            _, writer = await connect_asyncio.open_connection(pool, *target)
            writer.close()
            await writer.wait_closed()
        finally:
            assert usage(pool, target).held == 0

    # Python loads the rest of itself at the first look-up, from files that perhaps only this user may read.
    blocking.create_connection(SourcePool(SOURCE, "80"), target).close()
    asyncio.run(by_asyncio(81))
    try:
        os.setresuid(65_534, 65_534, 65_534)
    except OSError as error:
        skip(f"no other user is to be had here: {error}")
    with pytest.raises(MissingPrivilege, match=r"port 80 .*ip_unprivileged_port_start") as missing:
        blocking.create_connection(SourcePool(SOURCE, "80"), target)
    assert missing.value.limit == "unprivileged-port-start"
    with pytest.raises(MissingPrivilege, match="port 81"):
        asyncio.run(by_asyncio(81))
    asyncio.run(by_asyncio(30000))


def a_prefix_of_ipv6_needs_no_setting(target: Target) -> None:
    if not Path("/proc/sys/net/ipv6").is_dir():
        skip("this kernel has no IPv6")
    assert Path("/proc/sys/net/ipv6/ip_nonlocal_bind").read_text().strip() == "0"
    with socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=200) as server:
        pool = SourcePool("fd90::/64", "20000-20003")
        with ExitStack() as held:
            made = [
                held.enter_context(blocking.create_connection(pool, ("::1", server.getsockname()[1])))
                for _ in range(100)
            ]
            assert len({one.getsockname()[0] for one in made}) == 100, "each from the address with most room"


def udp_flows_share_ports_and_never_a_tuple(target: Target) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        servers = [one, other]
        for server in servers:
            server.bind(("127.0.0.2", 0))
        pools = [SourcePool(SOURCE, "20000-20003", patience_s=0) for _ in range(2)]  # as two processes have them
        with ExitStack() as held:
            flows = [
                held.enter_context(blocking.create_connection(pools[0], server.getsockname(), protocol=Protocol.UDP))
                for server in servers
                for _ in range(4)
            ]
            assert len({(flow.getsockname(), flow.getpeername()) for flow in flows}) == 8
            with pytest.raises(LimitReached) as reached:
                blocking.create_connection(pools[1], one.getsockname(), protocol=Protocol.UDP)
            assert "4 by others" in str(reached.value)
            for number, flow in enumerate(flows):
                flow.send(b"%d" % number)
            for server in servers:
                for _ in range(4):
                    datagram, sender = server.recvfrom(16)
                    server.sendto(datagram, sender)
            assert [int(flow.recv(16)) for flow in flows] == list(range(8)), "each hears its own answer"
        blocking.create_connection(pools[0], one.getsockname(), protocol=Protocol.UDP).close()


def udp_flows_in_asyncio(target: Target) -> None:
    async def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.2", 0))
            pool = SourcePool(SOURCE, "20000-20003")
            transport, _ = await connect_asyncio.create_datagram_endpoint(
                pool, asyncio.DatagramProtocol, *server.getsockname()
            )
            transport.sendto(b"flow")
            assert server.recvfrom(16)[1] == transport.get_extra_info("sockname")
            transport.close()
            await asyncio.sleep(0)

    asyncio.run(work())


def udp_flows_in_trio_and_anyio(target: Target) -> None:
    """Both flows of one port at once, each hears its own answer; a third waits until one is closed."""
    import anyio
    import trio

    from fourtuple.connect import anyio as connect_anyio
    from fourtuple.connect import trio as connect_trio

    with ExitStack() as servers:
        answering = [servers.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)]
        names: list[Target] = []
        for server in answering:
            server.bind(("127.0.0.2", 0))
            names.append(server.getsockname())
            threading.Thread(target=answer_datagrams, args=(server,), daemon=True).start()

        def used(pool: SourcePool) -> list[int]:
            now = time.monotonic()
            ends = [Endpoint.parse(f"{host}:{port}") for host, port in names]
            return [pool.usage(end, now, protocol=Protocol.UDP).held for end in ends]

        async def by_trio() -> None:
            pool = SourcePool(SOURCE, "20000", patience_s=10)
            flows = [await connect_trio.open_udp_flow(pool, *name) for name in names]
            assert [flow.socket.getsockname() for flow in flows] == [(SOURCE, 20000)] * 2
            for number, flow in enumerate(flows):
                await flow.send(b"%d" % number)
            assert [await flow.receive() for flow in flows] == [b"0 heard", b"1 heard"]
            assert used(pool) == [1, 1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one_more, pool)
                await trio.sleep(0.05)
                waiting = pool.usage(Endpoint.parse(f"{names[0][0]}:{names[0][1]}"), 0.0, protocol=Protocol.UDP).waiting
                assert waiting == 1
                await flows[0].aclose()
                await flows[0].aclose()
            with pytest.raises(trio.ClosedResourceError):
                await flows[0].send(b"late")
            with pytest.raises(trio.ClosedResourceError):
                await flows[0].receive()
            async with flows[1]:
                pass
            assert used(pool) == [0, 0]

        async def one_more(pool: SourcePool) -> None:
            async with await connect_trio.open_udp_flow(pool, *names[0]) as flow:
                await flow.send(b"more")
                assert await flow.receive() == b"more heard"

        async def by_anyio() -> None:
            pool = SourcePool(SOURCE, "20001", patience_s=10)
            flows = [await connect_anyio.create_connected_udp_socket(pool, *name) for name in names]
            for number, flow in enumerate(flows):
                await flow.send(b"%d" % number)
            assert [await flow.receive() for flow in flows] == [b"0 heard", b"1 heard"]
            assert used(pool) == [1, 1]
            for flow in flows:
                await flow.aclose()
            async with await connect_anyio.create_connected_udp_socket(pool, *names[0]):
                pass
            await anyio.sleep(0.05)
            assert used(pool) == [0, 0]

        trio.run(by_trio)
        anyio.run(by_anyio, backend="asyncio")
        anyio.run(by_anyio, backend="trio")


def answer_datagrams(server: socket.socket) -> None:
    with suppress(OSError):  # closed: the scenario is over
        while True:
            datagram, sender = server.recvfrom(64)
            server.sendto(datagram + b" heard", sender)


def the_doctor_names_what_a_socket_uses(target: Target) -> None:
    from fourtuple.doctor import diagnose
    from fourtuple.host import read_host

    named = diagnose(read_host(probe_ports=False)).source_pool
    assert named is not None
    for port, mechanism in ((20000, named.inside), (20004, named.outside), (30000, named.outside)):
        with SourceSocket(SourcePool(SOURCE, str(port))) as one:
            one.connect(target)
            assert (one.getsockname()[1], one._mechanism) == (port, mechanism)


def tls_is_the_librarys_own(target: Target) -> None:
    """TLS over our socket, blocking and not: what fails here is the peer, an echo server, and not the pool."""
    import anyio

    from fourtuple.connect import anyio as connect_anyio

    pool = SourcePool(SOURCE, "20000-20003")
    context = ssl.create_default_context()
    with blocking.create_connection(pool, target, 5) as one, pytest.raises(ssl.SSLError):
        context.wrap_socket(one, server_hostname="localhost")

    async def by_asyncio() -> None:
        with pytest.raises(ssl.SSLError):
            await connect_asyncio.open_connection(pool, *target, ssl=context)

    async def by_anyio() -> None:
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await connect_anyio.connect_tcp(pool, *target, tls=True, ssl_context=context)

    asyncio.run(by_asyncio())
    anyio.run(by_anyio)
    assert usage(pool, target).held == 0


def tls_gives_its_tuple_back_in_every_library(target: Target) -> None:
    """TLS in the blocking libraries takes the descriptor out of our socket; its end is found out all the same."""
    import aiohttp
    import httpx
    import requests

    from fourtuple.connect import aiohttp as connect_aiohttp
    from fourtuple.connect import httpx as connect_httpx
    from fourtuple.connect import requests as connect_requests

    if shutil.which("openssl") is None:
        skip("openssl is not installed")
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = f"{folder}/certificate", f"{folder}/key"
        for_ip = ("-addext", "subjectAltName=IP:127.0.0.2", "-addext", "basicConstraints=critical,CA:FALSE")
        new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=here")
        command = ["openssl", *new, *for_ip, "-days", "2", "-keyout", key, "-out", certificate]
        subprocess.run(command, check=True, capture_output=True)
        server = ThreadingHTTPServer(("127.0.0.2", 0), Whole)
        at_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        at_server.load_cert_chain(certificate, key)
        server.socket = at_server.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        secure: Target = ("127.0.0.2", server.server_address[1])
        url = f"https://127.0.0.2:{secure[1]}/"
        context = ssl.create_default_context(cafile=certificate)
        pool = SourcePool(SOURCE, "20000-20002", patience_s=10)

        async def by_aiohttp() -> None:
            connector = connect_aiohttp.SourceConnector(pool, ssl=context)
            async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
                assert await response.text() == "whole"
                assert usage(pool, secure).held == 1
            await asyncio.sleep(0.05)

        async def by_httpx() -> None:
            transport = connect_httpx.AsyncSourceTransport(pool, verify=context)
            async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
                assert (await client.get(url)).text == "whole"

        # Four connections from three ports.
        with requests.Session() as session:
            session.trust_env = False
            session.mount("https://", connect_requests.SourceAdapter(pool))
            assert session.get(url, verify=certificate, timeout=10).text == "whole"
        transport = connect_httpx.SourceTransport(pool, verify=context)
        with httpx.Client(transport=transport, trust_env=False, timeout=10) as client:
            assert client.get(url).text == "whole"
            assert usage(pool, secure).held == 1
        asyncio.run(by_httpx())
        asyncio.run(by_aiohttp())
        assert usage(pool, secure).held == 0
        server.shutdown()
        server.server_close()


class Whole(BaseHTTPRequestHandler):
    """Answers "whole" to each request and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"whole")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def http_kept_alive_connections_stay_with_their_pool(target: Target) -> None:
    import aiohttp
    import httpx
    import requests

    from fourtuple.connect import aiohttp as connect_aiohttp
    from fourtuple.connect import httpx as connect_httpx
    from fourtuple.connect import requests as connect_requests

    url = f"http://{target[0]}:{target[1]}/whole"
    pools = [SourcePool(SOURCE, "20000-20001"), SourcePool("127.0.0.7", "20000-20001")]
    for pool in pools:
        with httpx.Client(transport=connect_httpx.SourceTransport(pool), trust_env=False) as client:
            names = {local_name(client, url) for _ in range(5)}
            assert len(names) == 1
            assert names.pop()[0] == str(pool.sources)
            assert usage(pool, target).held == 1
        assert usage(pool, target).held == 0
        with requests.Session() as session:
            session.trust_env = False
            session.mount("http://", connect_requests.SourceAdapter(pool))
            for _ in range(5):
                assert session.get(url, timeout=5).text == "whole"
            assert usage(pool, target).held == 1

    async def by_aiohttp() -> None:
        pool = SourcePool("127.0.0.8", "20000-20001", patience_s=10)
        async with aiohttp.ClientSession(connector=connect_aiohttp.SourceConnector(pool)) as session:
            # Ten at once through two ports: eight wait for a connection to end, and none fails.
            answers = await asyncio.gather(*(fetch(session) for _ in range(10)))
            assert answers == ["whole"] * 10
            assert usage(pool, target).held <= 2

    async def fetch(session: aiohttp.ClientSession) -> str:
        async with session.get(url, headers={"Connection": "close"}) as response:
            return await response.text()

    asyncio.run(by_aiohttp())


def local_name(client: Any, url: str) -> Any:  # noqa: ANN401
    with client.stream("GET", url) as response:
        name = response.extensions["network_stream"].get_extra_info("client_addr")
        assert response.read() == b"whole"
    return name


def skip(reason: str) -> None:
    print(reason)
    raise SystemExit(SKIPPED)


SCENARIOS: dict[str, Callable[[Target], None]] = {
    scenario.__name__: scenario
    for scenario in (
        blocking_waits_and_then_says_why,
        asyncio_waits_in_line,
        trio_waits,
        a_descriptor_that_left_our_sight_is_missed_when_it_closes,
        what_is_dropped_is_given_back,
        makefile_keeps_the_tuple,
        a_refused_connection_costs_no_tuple,
        tuples_of_others_are_gone_around,
        many_tuples_of_others_are_gone_around_in_turns,
        ports_outside_the_range_are_bound,
        every_mechanism_fills,
        options_survive_a_second_try,
        a_narrowed_range_is_noticed,
        an_address_that_is_not_ours_is_named,
        a_port_below_the_unprivileged_start_is_named,
        a_prefix_of_ipv6_needs_no_setting,
        udp_flows_share_ports_and_never_a_tuple,
        udp_flows_in_asyncio,
        udp_flows_in_trio_and_anyio,
        the_doctor_names_what_a_socket_uses,
        tls_is_the_librarys_own,
        tls_gives_its_tuple_back_in_every_library,
        http_kept_alive_connections_stay_with_their_pool,
    )
}

if __name__ == "__main__":
    _host, _, _port = sys.argv[2].rpartition(":")
    SCENARIOS[sys.argv[1]]((_host, int(_port)))
