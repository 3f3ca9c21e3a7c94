"""`fourtuple run` with real programs: past one address's ports to one destination, and nothing else changed for them.

The client's ephemeral range is 100 ports, so that 28,232 + 1 is 100 + 1 here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.cli import Exit
from fourtuple.engine import EchoConfig
from fourtuple.hook import cgroup_with
from fourtuple.lab import Lab
from fourtuple.preload import Sources
from fourtuple.tuples import Endpoint

PROGRAMS = Path(__file__).parent / "programs"
RUN = [sys.executable, "-m", "fourtuple", "run"]
PORTS = 100
SERVER = "10.77.0.2"
ECHO, ECHO_6, WEB, REDIS = f"{SERVER}:7000", "[fd77::2]:7000", f"{SERVER}:8000", 6379
EIGHT = "10.81.0.0-10.81.0.7"
SOURCE_TEXTS = [
    *("127.0.0.0/8", "::1", "10.0.0.0/8", "1.0.0.0-126.255.255.255", "126.0.0.0-128.0.0.9", "128.0.0.0/2"),
    *("fd81::/64", "fd82::/32", "2001:db8::ffff:ffff:ffff:fff0-2001:db8:0:1::9", "fe80::/10"),
    *(f"10.{number}.0.1" for number in range(1, 30)),
    *(f"fd{number:02x}::1" for number in range(1, 30)),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(("client", "server")) as made:
        client, server = made["client"], made["server"]
        client.set_sysctl("net.ipv4.ip_local_port_range", f"40000 {40_000 + PORTS - 1}")
        # TIME_WAIT would hold the tuples of one test against the next: here each ends at once.
        for host in (client, server):
            host.set_sysctl("net.ipv4.tcp_max_tw_buckets", 0)
        client.add_any_ip("10.81.0.0/24")
        client.add_any_ip("fd81::/64")
        listening = [
            Endpoint.parse(ECHO),
            *([Endpoint.parse(ECHO_6)] if len(client.links["server"].addresses) > 1 else []),
        ]
        echo = server.start_engine(EchoConfig(listen=tuple(listening), backlog=4_096), workers=1)
        echo.wait_for(lambda now: now.listening_now == len(listening), 30)
        yield made


def inside(lab: Lab, host: str) -> list[str]:
    """The words that run a program on this host of the lab."""
    pid = lab[host].pid
    namespaces = [f"--net=/proc/{pid}/ns/net"]
    if lab.in_user_namespace:
        namespaces += [f"--user=/proc/{pid}/ns/user", "--preserve-credentials"]
    return ["nsenter", *namespaces, "--"]


def on_client(lab: Lab, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False} | options
    return subprocess.run([*inside(lab, "client"), *map(str, words)], **settings)


def naive(lab: Lab, sources: str | None, *words: str, before: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """What the naive client reports, with `fourtuple run --from sources` before it or without, or other words."""
    if before is None:
        before = [*RUN, "--from", sources, "--"] if sources else []
    done = on_client(lab, *before, sys.executable, PROGRAMS / "naive_client.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer: dict[str, dict[str, int]] = json.loads(done.stdout)
    return answer


def needs(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return found


class TestTupleSpace:
    def test_without_it_one_address_is_all_there_is(self, lab: Lab) -> None:
        answer = naive(lab, None, ECHO, "110")
        assert answer == {"sources": {"10.77.0.1": PORTS}, "errors": {"EADDRNOTAVAIL": 10}}

    @pytest.mark.parametrize("way", [[], ["nonblocking"], ["threads=4"], ["processes=4"], ["mapped"]])
    def test_every_port_of_every_address_to_one_destination(self, lab: Lab, way: list[str]) -> None:
        answer = naive(lab, EIGHT, ECHO, str(8 * PORTS), *way)
        mapped = "::ffff:" if "mapped" in way else ""
        assert answer == {"sources": {f"{mapped}10.81.0.{last}": PORTS for last in range(8)}, "errors": {}}

    def test_one_more_fails_as_it_does_without(self, lab: Lab) -> None:
        answer = naive(lab, "10.81.0.0/31", ECHO, str(2 * PORTS + 1))
        assert answer["errors"] == {"EADDRNOTAVAIL": 1}
        assert sum(answer["sources"].values()) == 2 * PORTS

    def test_ipv6_out_of_a_64(self, lab: Lab) -> None:
        if len(lab["client"].links["server"].addresses) < 2:
            pytest.skip("this kernel has no IPv6")
        answer = naive(lab, "fd81::/64", ECHO_6, str(3 * PORTS))
        assert answer["errors"] == {}
        assert len(answer["sources"]) == 3 * PORTS, "each connection has an address of its own"
        assert all(source.startswith("fd81::") for source in answer["sources"])

    def test_a_chosen_address_serves_every_destination(self, lab: Lab) -> None:
        """bind(address, 0) before connect: without help the port is taken for all destinations (A7)."""
        second = Endpoint.parse(f"{SERVER}:7002")
        lab["server"].listen(second, backlog=1_000)
        try:
            words = (f"{ECHO},{second}", str(PORTS), "bind=10.81.0.9")
            assert naive(lab, None, *words) == {"sources": {"10.81.0.9": PORTS}, "errors": {"EADDRINUSE": PORTS}}
            assert naive(lab, EIGHT, *words) == {"sources": {"10.81.0.9": 2 * PORTS}, "errors": {}}
        finally:
            lab["server"].release()

    def test_nobody_else_is_disturbed(self, lab: Lab) -> None:
        """No port is poisoned: while every port of eight addresses is held, a plain program has all of its own."""
        client = [*RUN, "--from", EIGHT, "--", sys.executable, str(PROGRAMS / "naive_client.py")]
        with subprocess.Popen(
            [*inside(lab, "client"), *client, ECHO, str(8 * PORTS), "bind=10.81.0.3", "hold"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holding:
            assert holding.stdin is not None
            assert holding.stdout is not None
            assert json.loads(holding.stdout.readline())["sources"] == {"10.81.0.3": PORTS}
            assert naive(lab, None, ECHO, str(PORTS)) == {"sources": {"10.77.0.1": PORTS}, "errors": {}}
            holding.stdin.close()

    def test_the_range_that_is_asked_for(self, lab: Lab) -> None:
        words = [sys.executable, str(PROGRAMS / "naive_client.py"), ECHO, "60"]
        done = on_client(lab, *RUN, "--from", "10.81.0.0/30", "--range", "40010-40019", "--", *words)
        answer = json.loads(done.stdout)
        assert answer == {
            "sources": {f"10.81.0.{last}": 10 for last in range(4)},
            "errors": {"EADDRNOTAVAIL": 20},
        }


@contextmanager
def nginx(lab: Lab, folder: Path) -> Iterator[Path]:
    """nginx on the server; its log has the address of each client, one to a line."""
    log = folder / "clients"
    (folder / "conf").write_text(
        f"""daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
        events {{ worker_connections 4096; }}
        http {{
            log_format clients "$remote_addr"; access_log {log} clients;
            client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
            uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
            server {{ listen {WEB} backlog=4096; keepalive_requests 1000000; location / {{ return 200 "hello\\n"; }} }}
        }}"""
    )
    server = [needs("nginx", "nginx-light"), "-c", str(folder / "conf"), "-p", str(folder)]
    with listening(lab, [*inside(lab, "server"), *server], Endpoint.parse(WEB)):
        yield log


@contextmanager
def listening(lab: Lab, words: list[str], endpoint: Endpoint) -> Iterator[None]:
    """A server, once it takes connections; ended by its own pid."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            while lab["client"].connect_once(endpoint) != "ok":
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
            yield
        finally:
            server.kill()


class TestRealPrograms:
    def test_curl(self, lab: Lab, tmp_path: Path) -> None:
        curl = needs("curl", "curl")
        with nginx(lab, tmp_path) as log:
            for _ in range(8):
                done = on_client(lab, *RUN, "--from", "10.81.0.0/24", "--", curl, "-sS", f"http://{WEB}/")
                assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)
            seen = log.read_text().split()
        assert len(seen) == 8
        assert len(set(seen)) > 3, "eight processes of one connection each spread, too"
        assert all(source.startswith("10.81.0.") for source in seen)

    def test_curl_with_many_at_once(self, lab: Lab, tmp_path: Path) -> None:
        curl = [needs("curl", "curl"), "-sS", "-Z", "--parallel-immediate", "--parallel-max", str(2 * PORTS + 50)]
        curl.append(f"http://{WEB}/[1-{2 * PORTS + 50}]")
        with nginx(lab, tmp_path) as log:
            assert "Couldn't connect" in on_client(lab, *curl).stderr
            done = on_client(lab, *RUN, "--from", EIGHT, "--", *curl)
            assert done.returncode == 0, done.stderr
            assert done.stdout == "hello\n" * (2 * PORTS + 50)
        assert set(log.read_text().split()) >= {f"10.81.0.{last}" for last in range(8)}

    def test_wrk(self, lab: Lab, tmp_path: Path) -> None:
        wrk = [needs("wrk", "wrk"), "-t", "2", "-c", str(3 * PORTS), "-d", "1s", f"http://{WEB}/"]
        with nginx(lab, tmp_path):
            without = on_client(lab, *wrk)
        assert re.search(r"connect [1-9]", without.stdout), without.stdout
        (tmp_path / "clients").unlink()
        with nginx(lab, tmp_path) as log:
            done = on_client(lab, *RUN, "--from", EIGHT, "--", *wrk)
            assert done.returncode == 0, done.stderr
            assert "Socket errors" not in done.stdout
        seen = set(log.read_text().split())
        assert seen == {f"10.81.0.{last}" for last in range(8)}

    def test_redis_benchmark(self, lab: Lab, tmp_path: Path) -> None:
        words = ["-h", SERVER, "-c", str(3 * PORTS), "-n", "3000", "-t", "ping", "-q"]
        benchmark = [needs("redis-benchmark", "redis-tools"), *words]
        server = [needs("redis-server", "redis-server"), "--bind", SERVER, "--port", str(REDIS), "--save", ""]
        server += ["--dir", str(tmp_path), "--protected-mode", "no", "--tcp-backlog", "511"]
        with listening(lab, [*inside(lab, "server"), *server], Endpoint.parse(f"{SERVER}:{REDIS}")):
            assert "Cannot assign requested address" in (without := on_client(lab, *benchmark)).stdout + without.stderr
            done = on_client(lab, *RUN, "--from", EIGHT, "--", *benchmark)
        assert done.returncode == 0, done.stderr
        assert "requests per second" in done.stdout
        assert "Cannot" not in done.stdout + done.stderr


def by_cgroup(sources: str) -> list[str]:
    return [*RUN, "--by", "cgroup", "--from", sources, "--"]


@pytest.fixture(scope="module")
def hooked(lab: Lab) -> Lab:
    """The lab, where BPF programs may be attached; skips where not."""
    done = on_client(lab, *by_cgroup(EIGHT), "true")
    if done.returncode == Exit.UNABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return lab


class TestByCgroup:
    def test_programs_that_no_library_can_be_loaded_into(self, hooked: Lab, tmp_path: Path) -> None:
        hey = needs("hey", "hey")
        with nginx(hooked, tmp_path) as log:
            words = [hey, "-n", "3000", "-c", str(3 * PORTS), f"http://{WEB}/"]
            assert "[200]\t3000 responses" not in on_client(hooked, *words).stdout, "one address has too few ports"
            done = on_client(hooked, *by_cgroup("10.81.0.0/26"), *words)
            assert "[200]\t3000 responses" in done.stdout, done.stdout + done.stderr
        assert len({source for source in log.read_text().split() if source.startswith("10.81.0.")}) > 50

    @pytest.mark.parametrize("way", [["processes=4"], ["mapped"]])
    def test_more_than_one_range_to_one_destination(self, hooked: Lab, way: list[str]) -> None:
        answer = naive(hooked, EIGHT, ECHO, str(4 * PORTS), *way, before=by_cgroup(EIGHT))
        mapped = "::ffff:" if "mapped" in way else ""
        # By chance, 50 of 100 ports of each address: all 100 would be seven standard deviations away.
        assert answer["errors"] == {}
        assert set(answer["sources"]) == {f"{mapped}10.81.0.{last}" for last in range(8)}

    def test_ipv6_out_of_a_64(self, hooked: Lab) -> None:
        if len(hooked["client"].links["server"].addresses) < 2:
            pytest.skip("this kernel has no IPv6")
        answer = naive(hooked, "fd81::/64", ECHO_6, str(3 * PORTS), before=by_cgroup("fd81::/64,10.81.0.1"))
        assert answer["errors"] == {}
        assert len(answer["sources"]) == 3 * PORTS
        assert all(source.startswith("fd81::") for source in answer["sources"])

    def test_every_answer_is_the_same(self, hooked: Lab) -> None:
        words = [sys.executable, str(PROGRAMS / "refusals.py"), SERVER]
        without, done = on_client(hooked, *words), on_client(hooked, *by_cgroup("10.81.0.0/24,fd81::/64"), *words)
        assert done.stdout.splitlines() == without.stdout.splitlines()

    def test_a_chosen_address_is_kept(self, hooked: Lab) -> None:
        answer = naive(hooked, EIGHT, ECHO, "10", "bind=10.81.0.99", before=by_cgroup(EIGHT))
        assert answer == {"sources": {"10.81.0.99": 10}, "errors": {}}

    def test_on_loopback_from_loopback(self, hooked: Lab) -> None:
        here = Endpoint.parse("127.0.0.1:7004")
        hooked["client"].listen(here, backlog=1_000)
        try:
            assert naive(hooked, EIGHT, str(here), "10", before=by_cgroup(EIGHT))["sources"] == {"127.0.0.1": 10}
            answer = naive(hooked, EIGHT, str(here), str(4 * PORTS), before=by_cgroup("127.5.0.0/29"))
            assert (set(answer["sources"]), answer["errors"]) == ({f"127.5.0.{last}" for last in range(8)}, {})
        finally:
            hooked["client"].release()

    def test_it_ends_as_the_program_does_and_leaves_nothing(self, hooked: Lab) -> None:
        where = on_client(hooked, *by_cgroup(EIGHT), "sh", "-c", "cat /proc/self/cgroup; exit 7")
        assert where.returncode == 7
        (name,) = re.findall(r"fourtuple-run-\d+", where.stdout)
        assert on_client(hooked, *by_cgroup(EIGHT), "sh", "-c", "kill -9 $$").returncode == -signal.SIGKILL
        words = [*inside(hooked, "client"), *by_cgroup(EIGHT), "sh", "-c", "echo started; exec sleep 60"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "started\n"
            waiting.terminate()
            assert waiting.wait(30) == -signal.SIGTERM
        assert not [folder for folder in Path("/sys/fs/cgroup").rglob("fourtuple-run-*") if folder.name == name]

    def test_who_stays_keeps_it_until_the_next_one_clears_up(self, hooked: Lab) -> None:
        staying = on_client(
            hooked, *by_cgroup(EIGHT), "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!; cat /proc/$!/cgroup"
        )
        pid = int(staying.stdout.split()[0])
        try:
            (name,) = re.findall(r"fourtuple-run-\d+", staying.stdout)
            (folder,) = Path("/sys/fs/cgroup").rglob(name)
            on_client(hooked, *by_cgroup(EIGHT), "true")
            assert folder.exists(), "somebody is still in it"
        finally:
            os.kill(pid, signal.SIGKILL)
        while Path("/proc", str(pid)).exists() and "State:\tZ" not in Path("/proc", str(pid), "status").read_text():
            time.sleep(0.01)
        on_client(hooked, *by_cgroup(EIGHT), "true")
        assert not folder.exists()

    def test_without_the_right_it_says_so(self, hooked: Lab) -> None:
        setpriv = [needs("setpriv", "util-linux"), "--inh-caps=-all", "--bounding-set=-all"]
        done = on_client(hooked, *setpriv, *by_cgroup(EIGHT), "echo", "ran")
        assert (done.stdout, done.returncode) == ("", Exit.UNABLE)
        assert "CAP_BPF" in done.stderr

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from(SOURCE_TEXTS), min_size=1, max_size=40))
    def test_the_kernel_verifies_what_is_assembled(self, hooked: Lab, texts: list[str]) -> None:
        with cgroup_with(Sources.parse(texts)) as folder:
            assert (folder / "cgroup.procs").read_text() == ""
        assert not folder.exists()

    def test_ports_are_not_its_business(self, hooked: Lab) -> None:
        words = ["--by", "cgroup", "--from", EIGHT, "--range", "40000-40009", "--", "true"]
        done = on_client(hooked, *RUN, *words)
        assert done.returncode == Exit.USAGE
        assert "IP_LOCAL_PORT_RANGE" in done.stderr


class TestNothingElseChanges:
    def test_every_answer_is_the_same(self, lab: Lab) -> None:
        words = [sys.executable, str(PROGRAMS / "refusals.py"), SERVER]
        without = on_client(lab, *words)
        done = on_client(lab, *RUN, "--from", "10.81.0.0/24,fd81::/64", "--", *words)
        assert without.returncode == 0, without.stderr
        assert without.stdout.count("\n") > 30
        assert done.stdout.splitlines() == without.stdout.splitlines()

    def test_on_loopback_from_loopback(self, lab: Lab) -> None:
        here = Endpoint.parse("127.0.0.1:7003")
        lab["client"].listen(here, backlog=1_000)
        try:
            assert naive(lab, EIGHT, str(here), "10")["sources"] == {"127.0.0.1": 10}, "left alone"
            answer = naive(lab, "127.5.0.0/29", str(here), str(8 * PORTS))
            assert answer == {"sources": {f"127.5.0.{last}": PORTS for last in range(8)}, "errors": {}}
        finally:
            lab["client"].release()

    def test_a_thread_can_be_cancelled_in_connect(self, lab: Lab, tmp_path: Path) -> None:
        program = tmp_path / "cancelled"
        gcc = needs("gcc", "gcc")
        subprocess.run([gcc, "-O2", "-w", "-o", program, PROGRAMS / "cancelled.c", "-lpthread"], check=True, timeout=60)
        # The server is asked to forward, which it does not do: nobody ever answers.
        lab["client"].route("198.18.0.0/24", SERVER)
        done = on_client(lab, *RUN, "--from", EIGHT, "--", program, "198.18.0.1")
        assert (done.stdout, done.stderr, done.returncode) == ("cleaned up\ncancelled\n", "", 0)

    def test_the_exit_status_is_the_commands(self, lab: Lab) -> None:
        assert on_client(lab, *RUN, "--from", EIGHT, "--", "sh", "-c", "exit 7").returncode == 7
        assert on_client(lab, *RUN, "--from", EIGHT, "sh", "-c", "kill -9 $$").returncode == -signal.SIGKILL
        ignored = ["grep", "SigIgn", "/proc/self/status"]
        without, done = on_client(lab, *ignored), on_client(lab, *RUN, "--from", EIGHT, "--", *ignored)
        assert done.stdout == without.stdout, "Python's own ignored signals do not reach the program"

    def test_an_address_of_another_host_is_refused_before_anything_runs(self, lab: Lab) -> None:
        done = on_client(lab, *RUN, "--from", "10.81.0.0/23", "--", "echo", "ran")
        assert (done.stdout, done.returncode) == ("", Exit.USAGE)
        assert "10.81.1.0-10.81.1.255" in done.stderr
        assert "ip route add local" in done.stderr

    def test_ports_outside_the_hosts_range_are_refused(self, lab: Lab) -> None:
        done = on_client(lab, *RUN, "--from", EIGHT, "--range", "1024-65535", "--", "echo", "ran")
        assert (done.stdout, done.returncode) == ("", Exit.USAGE)
        assert "net.ipv4.ip_local_port_range, 40000-40099 here" in done.stderr
