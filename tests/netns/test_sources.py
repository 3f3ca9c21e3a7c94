"""SourcePool on the real kernel: every port to every destination, in every client library, and nobody else disturbed.

FOURTUPLE_FULL=1 takes the numbers of the promise for every library (1,000 ports to 15 destinations in one process, and
to 50 over three) and prints them with -s; without it, libraries that need long for that get smaller ones or none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bench.arena import TIMEOUT_S, Client, entering, started, web_server
from bench.peers.source_clients import CLIENTS
from fourtuple.engine import EchoConfig
from fourtuple.errors import MissingFeature
from fourtuple.lab import Lab, LabHost
from fourtuple.sources import SourcePool
from fourtuple.tuples import Endpoint
from tests.netns.source_scenarios import SCENARIOS, SKIPPED

FULL = os.environ.get("FOURTUPLE_FULL", "") not in ("", "0")
QUICK = ("blocking", "asyncio")
"""The libraries that get large numbers in every run of the tests."""
PROCESSES = 3
"""For 50,000 connections: 16,700 each, and one process may have 20,000 descriptors where these numbers were set."""
DESTINATIONS_PER_NGINX = 16
FIRST_PORT = 20_000
SOURCE, HOST = "127.0.0.1", "127.0.0.2"
BYSTANDER = Endpoint(ip_address("127.0.0.3"), 699)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """A host of a lab with servers on it: `tcp` echo ports and `http` ports, as many as there are destinations."""

    lab: Lab
    host: LabHost
    destinations: dict[bool, tuple[str, ...]]
    """By whether they speak HTTP."""

    def client(self, name: str, how: str, ports: str, count: int, *, source: str = SOURCE, first: int = 0) -> Client:
        """A client of the library `name`, to all destinations from number `first` on."""
        to = self.destinations[CLIENTS[name].speaks_http][first:]
        return started(self.lab, self.host, "source_client", name, how, source, ports, str(count), *to)

    def plain_connects(self, most: int) -> int:
        """How many connections another program gets from the kernel's own choice, to a destination of its own."""
        other = self.host.another()
        other.limit_descriptors(most + 100)
        count = 0
        while count <= most and other.connect_once(BYSTANDER, keep=True) == "ok":
            count += 1
        other.release()
        other.kill()
        return count


@contextmanager
def arena(port_count: int, destination_count: int, *, http: bool) -> Iterator[Arena]:
    """A lab whose automatic port range is FIRST_PORT and so many."""
    tcp = tuple(Endpoint(ip_address(HOST), 700 + number) for number in range(destination_count))
    web = tuple(Endpoint(ip_address(HOST), 800 + number) for number in range(destination_count))
    with Lab(("here",)) as lab, ExitStack() as servers:
        here = lab["here"]
        here.set_sysctl("net.core.somaxconn", 65_535)
        echo = here.start_engine(EchoConfig(listen=(*tcp, BYSTANDER), backlog=65_535), workers=1)
        echo.wait_for(lambda now: now.listening_now == len(tcp) + 1, TIMEOUT_S)
        if http:
            try:
                for number in range(0, destination_count, DESTINATIONS_PER_NGINX):
                    servers.enter_context(web_server(lab, here, web[number : number + DESTINATIONS_PER_NGINX]))
            except MissingFeature as missing:
                pytest.skip(str(missing))
        here.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST_PORT} {FIRST_PORT + port_count - 1}")
        names = {False: tuple(map(str, tcp)), True: tuple(map(str, web))}
        yield Arena(lab=lab, host=here, destinations=names)


def ports(count: int) -> str:
    return f"{FIRST_PORT}-{FIRST_PORT + count - 1}"


def filled(client: Client) -> dict[str, Any]:
    """Run a client until it holds what it can."""
    client.step()
    return client.step().numbers


@pytest.mark.parametrize("name", CLIENTS)
def test_every_port_serves_every_destination_and_none_is_poisoned(name: str) -> None:
    port_count, destination_count = (1_000, 15) if FULL else (1_000, 3) if name in QUICK else (100, 3)
    with (
        arena(port_count, destination_count, http=CLIENTS[name].speaks_http) as here,
        here.client(name, "ours", ports(port_count), port_count) as client,
    ):
        numbers = filled(client)
        assert numbers["errors"] == {}
        assert numbers["connected"] == port_count * destination_count, "each by a name of its own"
        assert numbers["reached"] == [port_count] * destination_count
        assert f"have {port_count:,}, need {port_count + 1:,}" in numbers["one_more"]
        assert f"({port_count:,} by this pool, 0 in TIME_WAIT, 0 by others)" in numbers["one_more"]
        assert here.plain_connects(port_count) == port_count, "another program has every port, while ours use it"
        assert client.step().numbers["still_held"] == 0
        if FULL:
            print(f"{name}: {numbers['connected']:,} connections in {numbers['seconds']:.1f} s")


@pytest.mark.parametrize(
    ("name", "apart"),
    [("blocking", False), *((name, True) for name in (CLIENTS if FULL else ("uvloop",)))],
)
def test_fifty_destinations_over_several_processes(name: str, apart: bool) -> None:
    """All processes use the same address: each a share of the ports, or all the same ports, around each other."""
    pool = SourcePool(SOURCE, ports(1_000))
    with arena(1_000, 50, http=CLIENTS[name].speaks_http) as here, ExitStack() as running:
        counts = [pool.share(index, of=PROCESSES).ports.size for index in range(PROCESSES)]
        clients = [
            running.enter_context(here.client(name, f"{index}/{PROCESSES}" if apart else "ours", ports(1_000), count))
            for index, count in enumerate(counts)
        ]
        for client in clients:
            client.step()
        for client in clients:
            client.go()
        numbers = [client.step().numbers for client in clients]
        assert [one["errors"] for one in numbers] == [{}] * PROCESSES
        assert sum(one["connected"] for one in numbers) == 50_000
        assert [one["reached"] for one in numbers] == [[count] * 50 for count in counts]
        assert here.plain_connects(1_000) == 1_000, "another program has every port, while all of ours use it"
        for client in clients:
            client.go()
        assert [client.step().numbers["still_held"] for client in clients] == [0] * PROCESSES
        if FULL:
            seconds = max(one["seconds"] for one in numbers)
            print(f"{name}: 50,000 connections from 1,000 ports, {PROCESSES} processes, in {seconds:.1f} s")


def test_the_example_of_the_page_on_eaddrnotavail() -> None:
    page = (Path(__file__).parents[2] / "docs/eaddrnotavail.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with Lab(("here",)) as lab:
        here = lab["here"]
        here.add_any_ip("10.0.0.0/28")
        here.add_any_ip("192.0.2.1/32")
        here.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        here.listen(Endpoint(ip_address("192.0.2.1"), 5432))
        done = subprocess.run(
            [
                *entering(lab, here),
                sys.executable,
                "-W",
                "error",
                "-c",
                f"{example}    print(connection.getsockname())",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("('10.0.0.")


NAIVE = {
    "blocking": [100, 0],
    "asyncio": [100, 0],
    "asyncio-protocol": [100, 0],
    "uvloop": [100, 0],
    "trio": [100, 100],  # the one library that sets IP_BIND_ADDRESS_NO_PORT itself
    "anyio": [100, 0],
    "anyio-trio": [100, 0],
    "aiohttp": [100, 0],
    "httpx": [100, 0],
    "httpx-async": [100, 0],
    "httpx-trio": [100, 100],
    "httpx2": [100, 0],
    "httpx2-async": [100, 0],
    "urllib3": [100, 0],
    "requests": [100, 0],
}
"""What each library's own source option reaches of 100 ports to two destinations."""


def test_what_the_libraries_own_options_reach() -> None:
    assert set(NAIVE) == set(CLIENTS)
    found = {}
    for name in NAIVE:
        speaks_http = CLIENTS[name].speaks_http
        with arena(100, 2, http=speaks_http) as here, here.client(name, "naive", ports(100), 100) as one:
            numbers = filled(one)
            found[name] = numbers["reached"]
            if found[name] == [100, 0]:
                assert numbers["errors"] == {"EADDRINUSE": 1}, name
                # It holds them all while the bystander tries: the client is paused between its steps.
                assert here.plain_connects(100) == 0, f"{name}: its ports are poisoned for everybody else"
    assert found == NAIVE


@pytest.mark.parametrize("apart", [False, True], ids=["same-ports", "shares"])
def test_two_processes_and_a_plain_client_share_an_address(apart: bool) -> None:
    pool = SourcePool(SOURCE, ports(1_000))
    theirs = [str(pool.share(index, of=2).ports) if apart else ports(1_000) for index in range(2)]
    with (
        arena(1_000, 2, http=False) as here,
        here.client("blocking", "ours", theirs[0], 400) as one,
        here.client("asyncio", "ours", theirs[1], 400) as other,
    ):
        for client in (one, other):
            client.step()
            client.go()  # from here on both run at once, and the plain client beside them
        assert here.plain_connects(199) == 200
        for client in (one, other):
            numbers = client.step().numbers
            assert numbers["errors"] == {}
            assert numbers["reached"] == [400, 400]
        assert here.plain_connects(199) == 200, "and again when both hold what they have"


def test_addresses_of_a_prefix_are_used_alike() -> None:
    with arena(100, 2, http=False) as here:
        here.host.add_any_ip("10.90.0.0/28")
        with here.client("asyncio", "ours", ports(100), 1_600, source="10.90.0.0/28") as client:
            numbers = filled(client)
            assert numbers["errors"] == {}
            assert numbers["reached"] == [1_600, 1_600]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str) -> None:
    """Each in a process and a lab of its own: `source_scenarios.py` says what it has to find."""
    http = scenario.startswith("http_")
    with arena(10, 1, http=http) as here:
        here.host.set_sysctl("net.ipv4.ip_local_reserved_ports", "20004")
        if Path("/proc/sys/net/ipv6").is_dir():
            here.host.add_any_ip("fd90::/64")
            here.host.set_sysctl("net.ipv6.ip_nonlocal_bind", 0)
        script = [sys.executable, "-W", "error", str(Path(__file__).with_name("source_scenarios.py"))]
        done = subprocess.run(
            [*entering(here.lab, here.host), *script, scenario, here.destinations[http][0]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
