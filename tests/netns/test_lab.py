"""The lab on the real kernel: isolation, wiring, errors across the process boundary, deaths, with root and without."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

import fourtuple
from fourtuple.engine import CarrierName, EchoConfig, LoadConfig
from fourtuple.errors import BadConfig, EngineStopped, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.lab import Lab, kernel_memory_bytes, leftovers, slabs
from fourtuple.lab.channel import Failure
from fourtuple.lab.namespaces import IO_URING_SETUP, refuse_io_uring
from fourtuple.tuples import AddressSet, Endpoint, PortSet, Protocol, TupleSpace

PORT_RANGE = "net.ipv4.ip_local_port_range"
SOURCE_TREE = Path(fourtuple.__file__ or "").parents[2]


@pytest.fixture(params=[False, True], ids=["as-we-are", "user-namespace"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(("client", "server"), user_namespaces=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """For tests that leave a lab as they found it."""
    with Lab(("client", "server")) as made:
        yield made


def endpoint(text: str) -> Endpoint:
    return Endpoint.parse(text)


def anywhere(version: int, port: int) -> Endpoint:
    return Endpoint(ip_address("0.0.0.0" if version == 4 else "::"), port)


class TestIsolation:
    def test_each_host_has_sysctls_of_its_own(self, lab: Lab) -> None:
        outside = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        lab["client"].set_sysctl(PORT_RANGE, "41000 41009")
        lab["server"].set_sysctl(PORT_RANGE, "42000\t42009")
        assert lab["client"].sysctl(PORT_RANGE) == "41000 41009"
        assert lab["server"].sysctl(PORT_RANGE) == "42000 42009"
        assert Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split() == outside

    def test_reserved_ports_that_the_kernel_merges_count_as_set(self, lab: Lab) -> None:
        lab["client"].set_sysctl("net.ipv4.ip_local_reserved_ports", "5001,5002,5003,7000")
        assert lab["client"].sysctl("net.ipv4.ip_local_reserved_ports") == "5001-5003,7000"

    def test_another_process_shares_the_namespaces_and_not_the_limits(self, lab: Lab) -> None:
        client = lab["client"]
        client.set_sysctl(PORT_RANGE, "43000 43009")
        client.limit_descriptors(64)
        further = client.another()
        assert further.pid != client.pid
        assert further.sysctl(PORT_RANGE) == "43000 43009"
        assert further.open_sockets(100).count == 100
        further.listen(endpoint("127.0.0.1:7000"))
        assert client.connect_once(endpoint("127.0.0.1:7000")) == "ok"

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            (PORT_RANGE, "70000 80000", BadConfig),
            (PORT_RANGE, "", BadConfig),
            ("kernel.pid_max", "100000", BadConfig),
            ("fs.file-max", "100000", BadConfig),
            ("net/../kernel/pid_max", "100000", BadConfig),
            ("net..ipv4", "1", BadConfig),
            ("net.\0", "1", BadConfig),
            ("net.ipv4.no_such_thing", "1", MissingFeature),
            ("net.ipv4.tcp_mem", "1 2 3", MissingFeature),
            ("net.core.rmem_max", "1000000", MissingPrivilege),
        ],
    )
    def test_what_cannot_be_set_is_named(self, shared: Lab, name: str, value: str, error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            shared["client"].set_sysctl(name, value)
        assert name in str(caught.value) or repr(name) in str(caught.value)


class TestWiring:
    def test_hosts_reach_each_other_at_once_by_both_families(self, lab: Lab) -> None:
        client, server = lab["client"], lab["server"]
        versions = {address.version for address in client.links["server"].peer_addresses}
        for version in versions:
            server.listen(anywhere(version, 7000 + version))
        begun = time.monotonic()
        for address in client.links["server"].peer_addresses:
            assert client.connect_once(Endpoint(address, 7000 + address.version)) == "ok"
        # A neighbour that is not answered, or a link that IPv6 takes for down, costs a whole second.
        assert time.monotonic() - begun < 0.8

    @pytest.mark.parametrize(
        ("ours", "theirs", "source", "destination"),
        [
            ("10.81.0.0/16", "10.82.0.0/16", "10.81.200.7", "10.82.9.9:7004"),
            ("fd81::/64", "fd82::/64", "fd81::1:2:3:4", "[fd82::ffff:1]:7006"),
        ],
    )
    def test_every_address_of_a_prefix_is_local_and_reached(
        self, lab: Lab, ours: str, theirs: str, source: str, destination: str
    ) -> None:
        client, server = lab["client"], lab["server"]
        client.add_any_ip(ours)
        server.add_any_ip(theirs)
        to = endpoint(destination)
        server.listen(anywhere(to.address.version, to.port))
        assert client.connect_once(to, source=ip_address(source)) == "ok"
        beyond = ip_address("10.83.0.1" if to.address.version == 4 else "fd83::1")
        if to.address.version == 4:
            assert client.connect_once(to, source=beyond) == "EADDRNOTAVAIL"
        assert client.connect_once(Endpoint(beyond, to.port)) in ("ENETUNREACH", "EHOSTUNREACH")

    def test_aliases_are_local_and_reached(self, lab: Lab) -> None:
        client, server = lab["client"], lab["server"]
        client.add_addresses(AddressSet.parse("10.91.0.1-10.91.0.200"))
        server.add_addresses(AddressSet.parse("10.92.0.1-10.92.0.3"))
        server.listen(anywhere(4, 7000))
        assert client.connect_once(endpoint("10.92.0.3:7000"), source=ip_address("10.91.0.200")) == "ok"
        assert client.connect_once(endpoint("10.92.0.3:7000"), source=ip_address("10.91.0.201")) == "EADDRNOTAVAIL"

    def test_one_host_alone_has_its_loopback(self) -> None:
        with Lab(("alone",)) as lab:
            alone = lab["alone"]
            assert alone.links == {}
            alone.listen(anywhere(4, 7000))
            assert alone.connect_once(endpoint("127.77.1.2:7000"), source=ip_address("127.1.2.3")) == "ok"

    def test_three_hosts_are_joined_pairwise(self) -> None:
        with Lab(("one", "two", "three")) as lab:
            for host in lab.hosts:
                host.listen(anywhere(4, 7000))
            for host in lab.hosts:
                for peer, link in host.links.items():
                    address = link.peer_address(4)
                    assert address is not None
                    assert host.connect_once(Endpoint(address, 7000)) == "ok", (host, peer)

    def test_a_duplicate_of_a_live_pair_is_refused_by_the_kernel(self, lab: Lab) -> None:
        client, server = lab["client"], lab["server"]
        server.listen(anywhere(4, 7000))
        address = client.links["server"].peer_address(4)
        assert address is not None
        to = Endpoint(address, 7000)
        assert client.connect_once(to, source_port=5555, keep=True) == "ok"
        assert client.connect_once(to, source_port=5555) in ("EADDRNOTAVAIL", "EADDRINUSE")
        assert client.release() == 1

    @pytest.mark.parametrize("prefix", ["", "10.0.0.0/33", "10.0.0.1/8", "fd81::/200", "nonsense", "10.0.0.0/8\n"])
    def test_a_wrong_prefix_is_named(self, shared: Lab, prefix: str) -> None:
        with pytest.raises(BadConfig, match="prefix"):
            shared["client"].add_any_ip(prefix)

    def test_what_the_kernel_refuses_says_what_was_wanted(self, shared: Lab) -> None:
        with pytest.raises(OSError, match=r"10\.99\.0\.0/16 via 192\.0\.2\.1") as caught:
            shared["client"].route("10.99.0.0/16", "192.0.2.1")
        assert caught.value.errno == errno.ENETUNREACH

    @pytest.mark.parametrize(
        "hosts", [(), ("",), ("A",), ("a b",), ("x" * 12,), ("twice", "twice"), tuple(f"h{n}" for n in range(17))]
    )
    def test_wrong_hosts_are_named(self, hosts: tuple[str, ...]) -> None:
        with pytest.raises(BadConfig, match="hosts"):
            Lab(hosts)


class TestLimits:
    def test_descriptors_end_with_emfile(self, lab: Lab) -> None:
        client = lab["client"]
        assert client.limit_descriptors(128)[0] == 128
        before = client.descriptors_open()
        opened = client.open_sockets(1_000)
        assert (opened.count, opened.error) == (128 - before, "EMFILE")
        assert client.release() == opened.count
        assert client.descriptors_open() == before

    def test_descriptors_can_be_limited_for_all_hosts(self) -> None:
        with Lab(("client",), descriptors=50) as lab:
            assert lab["client"].open_sockets(100).error == "EMFILE"

    def test_a_limit_out_of_reach_is_named(self, lab: Lab) -> None:
        with pytest.raises(BadConfig, match="hard limit"):
            lab["client"].limit_descriptors(10**12)
        with pytest.raises(MissingPrivilege, match="CAP_SYS_RESOURCE"):
            lab["client"].limit_descriptors(1_000, 10**12)

    def test_memory_is_read(self, shared: Lab) -> None:
        memory = shared["client"].memory()
        assert 4 * 2**20 < memory.private_bytes < memory.rss_bytes < 2**30
        assert shared["client"].rss_bytes() > 0
        assert kernel_memory_bytes() > 2**20
        if os.geteuid() == 0:
            assert slabs()["TCP"].object_bytes > 1_000

    def test_slabs_say_who_may_read_them(self, tmp_path: Path) -> None:
        with pytest.raises(MissingPrivilege, match="slabinfo"):
            slabs(tmp_path)

    def test_io_uring_is_refused(self) -> None:
        with Lab(("client",), refuse_io_uring=True) as lab:
            assert "Seccomp:\t2" in Path(f"/proc/{lab['client'].pid}/status").read_text()
            assert lab["client"].connect_once(endpoint("127.0.0.1:7000")) == "ECONNREFUSED"

    @pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this architecture")
    def test_the_filter_refuses_io_uring_setup_and_nothing_else(self) -> None:
        child = os.fork()
        if child == 0:  # the filter stays for ever: install it in a process that ends
            libc = ctypes.CDLL(None, use_errno=True)
            libc.syscall(IO_URING_SETUP, 0, None)
            without = ctypes.get_errno()  # EINVAL or EFAULT where io_uring is there
            refuse_io_uring()
            libc.syscall(IO_URING_SETUP, 0, None)
            refused = ctypes.get_errno() == errno.EPERM and os.getpid() > 0
            os._exit(0 if refused and without != errno.EPERM else 1 if not refused else 2)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 2:
            pytest.skip("io_uring is refused here already")
        assert os.waitstatus_to_exitcode(status) == 0


class TestEngines:
    def test_two_hosts_talk_through_their_engines(self, lab: Lab) -> None:
        lab["server"].add_any_ip("10.82.0.0/16")
        with (
            lab["server"].start_engine(ECHO, CarrierName.EPOLL, workers=1) as echo,
            lab["client"].start_engine(load(connections=500), CarrierName.EPOLL, workers=1) as engine,
        ):
            engine.wait_for(lambda now: now.open_now == 500, 20)
            engine.ping()
            now = engine.wait_for(lambda now: now.pings_right == 500, 20)
            assert (now.pings_wrong, now.pings_missing) == (0, 0)
            # A worker tells its numbers between turns, which may be after it has answered.
            echo.wait_for(lambda now: now.accepts_succeeded == 500, 20)
            engine.close()
            assert engine.join(20)
            assert not engine.running
            assert engine.snapshot().closed_by_us == 500
            assert not echo.join(0.1)

    def test_an_engine_that_is_refused_io_uring_runs_on_epoll_and_says_so(self) -> None:
        with Lab(("client",), refuse_io_uring=True) as lab:
            with lab["client"].start_engine(ECHO) as engine:
                assert engine.carrier is CarrierName.EPOLL
                assert engine.fallback_reason
            with pytest.raises((MissingFeature, MissingPrivilege)):
                lab["client"].start_engine(ECHO, CarrierName.URING)

    def test_a_host_is_examined_from_inside(self, lab: Lab) -> None:
        lab["client"].set_sysctl(PORT_RANGE, "44000 44009")
        lab["client"].limit_descriptors(321)
        facts = lab["client"].facts()
        assert facts.process.pid == lab["client"].pid
        assert facts.sysctl[PORT_RANGE] == "44000 44009"
        assert facts.process.rlimits["NOFILE"].soft == 321

    def test_a_dead_lab_frees_its_namespaces_though_sockets_outlive_processes(self) -> None:
        """A link ends with the namespace at its other end, so that a third host sees the end of the first two."""
        with Lab(("client", "server", "watch")) as lab:
            lab["server"].add_any_ip("10.82.0.0/16")
            lab["server"].start_engine(ECHO, CarrierName.EPOLL)
            engine = lab["client"].start_engine(load(connections=5_000), CarrierName.EPOLL)
            engine.wait_for(lambda now: now.open_now == 5_000, 30)
            os.kill(lab["client"].pid, signal.SIGKILL)
            os.kill(lab["server"].pid, signal.SIGKILL)
            begun = time.monotonic()
            while "to-" in Path(f"/proc/{lab['watch'].pid}/net/dev").read_text():
                assert time.monotonic() - begun < 20
                time.sleep(0.05)


ECHO = EchoConfig(listen=(Endpoint(ip_address("0.0.0.0"), 7000),))


def load(*, connections: int) -> LoadConfig:
    space = TupleSpace(
        protocol=Protocol.TCP,
        sources=AddressSet.parse("10.77.0.1"),
        source_ports=PortSet.parse("20000-29999"),
        destinations=AddressSet.parse("10.82.0.1"),
        destination_ports=PortSet.of(7000),
    )
    return LoadConfig(space=space, connections=connections)


class TestErrors:
    def test_an_error_is_of_the_same_class_and_says_where(self, lab: Lab) -> None:
        with pytest.raises(OSError, match="Cannot assign") as caught:
            lab["client"].listen(endpoint("192.0.2.1:80"))
        assert caught.value.errno == errno.EADDRNOTAVAIL
        notes = "\n".join(caught.value.__notes__)
        assert "operations.py" in notes
        assert str(lab["client"].pid) in notes
        assert lab["client"].sysctl(PORT_RANGE)  # it goes on

    @pytest.mark.parametrize(
        "error",
        [
            LimitReached("ephemeral-ports", 10, 20, "widen it"),
            BadConfig("where", "why"),
            FileNotFoundError(2, "No such file", "/nowhere"),
            UnicodeDecodeError("ascii", b"\xff", 0, 1, "not ascii"),
            KeyError("key"),
        ],
    )
    def test_errors_survive_the_crossing(self, error: Exception) -> None:
        error.add_note("first")
        again = Failure.of(error, "the trace").exception()
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__notes__ == ["first", "the trace"]
        assert {name: value for name, value in vars(again).items() if name != "__notes__"} == {
            name: value for name, value in vars(error).items() if name != "__notes__"
        }

    def test_an_error_that_cannot_cross_becomes_its_text(self) -> None:
        error = ValueError("about", threading.Lock())
        again = Failure.of(error, "the trace").exception()
        assert type(again) is RuntimeError
        assert "ValueError: ('about'" in str(again)


class TestDeath:
    def test_a_killed_agent_is_named_with_its_signal(self, lab: Lab) -> None:
        client = lab["client"]
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineStopped, match=rf"'client' \(process {client.pid}\) was killed by SIGKILL"):
            client.open_sockets(1)
        assert lab["server"].open_sockets(1).count == 1

    def test_agents_leave_ctrl_c_to_their_parent(self, lab: Lab) -> None:
        os.kill(lab["client"].pid, signal.SIGINT)
        time.sleep(0.05)
        assert lab["client"].open_sockets(1).count == 1
        assert os.getpgid(lab["client"].pid) != os.getpgid(0)

    def test_a_closed_lab_answers_no_more(self, lab: Lab) -> None:
        client = lab["client"]
        assert lab.close() == ()
        assert lab.close() == ()
        with pytest.raises(EngineStopped, match="closed"):
            client.descriptors_open()
        assert not Path(f"/proc/{client.pid}").exists()

    def test_a_lab_made_in_a_thread_outlives_the_thread(self) -> None:
        made: list[Lab] = []
        thread = threading.Thread(target=lambda: made.append(Lab(("client",))))
        thread.start()
        thread.join()
        time.sleep(0.1)
        with made[0] as lab:
            assert lab["client"].descriptors_open() > 0

    def test_an_agent_is_no_leftover_while_its_lab_lives(self, shared: Lab) -> None:
        assert not {left.pid for left in leftovers()} & {host.pid for host in shared.hosts}

    def test_a_leftover_would_be_seen(self, tmp_path: Path) -> None:
        process = tmp_path / "4711"
        process.mkdir()
        (process / "cmdline").write_bytes(b"python\0-P\0-m\0fourtuple.lab.agent\0client\00012\0005\0")
        (process / "stat").write_text("4711 (python) (x)) S 1 4711 4711 0")
        (tmp_path / "self").mkdir()
        (tmp_path / "4712").mkdir()
        assert [(left.pid, left.host, left.parent_pid) for left in leftovers(tmp_path)] == [(4711, "client", 12)]


class TestWithoutRoot:
    LAB_SCRIPT = """
import os
from ipaddress import ip_address
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint
assert os.geteuid() != 0
with Lab(("client", "server")) as lab:
    assert lab.in_user_namespace
    lab["server"].add_any_ip("10.82.0.0/16")
    lab["client"].add_any_ip("10.81.0.0/16")
    lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
    lab["server"].listen(Endpoint(ip_address("0.0.0.0"), 80))
    print(lab["client"].another().connect_once(Endpoint.parse("10.82.1.1:80"), source=ip_address("10.81.1.1")))
"""

    def test_an_unprivileged_user_has_a_lab(self) -> None:
        done = subprocess.run(as_nobody("-c", self.LAB_SCRIPT), capture_output=True, text=True, timeout=60)
        if done.returncode != 0 and "MissingPrivilege" in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)

    def test_where_user_namespaces_are_forbidden_the_setting_is_named(self) -> None:
        # A user namespace of one's own has a user.max_user_namespaces of its own: 0 there forbids what it would allow.
        if shutil.which("unshare") is None:
            pytest.skip("unshare(1) is not installed")
        script = "echo 0 > /proc/sys/user/max_user_namespaces; echo 0 > /proc/sys/user/max_net_namespaces; exec " + (
            shlex.join([sys.executable, "-c", "from fourtuple.lab import Lab; Lab(('client',))"])
        )
        command = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=with_source_tree())
        assert "MissingPrivilege" in done.stderr
        assert "user.max_net_namespaces is 0 (remedy: sysctl -w user.max_net_namespaces=" in done.stderr


def with_source_tree() -> dict[str, str]:
    """This environment, with the package under test first."""
    return {**os.environ, "PYTHONPATH": str(SOURCE_TREE / "python"), "PYTHONDONTWRITEBYTECODE": "1"}


def as_nobody(*arguments: str) -> list[str]:
    """The command that runs this Python as an unprivileged user.

    Where the interpreter or the sources lie behind a directory that only root may enter, they are shown to that user in
    a mount namespace of the command's own.
    """
    python = ["env", f"PYTHONPATH={SOURCE_TREE / 'python'}", "PYTHONDONTWRITEBYTECODE=1", sys.executable, *arguments]
    if os.geteuid() != 0:
        return python
    for tool in ("setpriv", "unshare", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool}(1) is not installed")
    python = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *python]
    trees = list(dict.fromkeys(Path(tree).resolve() for tree in (sys.base_prefix, sys.prefix, SOURCE_TREE)))
    closed = {
        tree: next((above for above in reversed(tree.parents) if not above.stat().st_mode & 1), None) for tree in trees
    }
    hidden = {tree: above for tree, above in closed.items() if above is not None}
    lines = ["set -e", "mount -t tmpfs -o mode=755 tmpfs /mnt"]
    for number, tree in enumerate(hidden):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(tree))} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(above))}" for above in dict.fromkeys(hidden.values())]
    for number, tree in enumerate(hidden):
        lines += [f"mkdir -p {shlex.quote(str(tree))}", f"mount --bind /mnt/{number} {shlex.quote(str(tree))}"]
    script = "\n".join([*lines, f"cd / && exec {shlex.join(python)}"])
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
