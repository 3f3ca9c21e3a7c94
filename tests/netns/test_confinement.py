"""A confined broker: what code that got into it can do, and that the broker serves all the same."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement import Addresses, Connector, Report, StepName, moved
from fourtuple.confinement import addresses as places
from fourtuple.registry import Registry
from fourtuple.service import Listener
from fourtuple.services import Delivery, Service
from tests.netns.brokering import PATIENCE_S, answering, echoing, free_port, get, said, wait_for

PROGRAM = (sys.executable, "-m", "tests.netns.programs.confined")
NOBODY = 65_534
WORKERS = 2
# x86_64
LANDLOCK_CREATE_RULESET, SECCOMP, UNSHARE, MOUNT_SETATTR = 444, 317, 272, 442


class Confined:
    """The program, and what it says."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path, complaints: Path) -> None:
        self._process, self.port, self.log, self._complaints = process, port, log, complaints
        self.said: Any = self._line()

    def _line(self) -> Any:  # noqa: ANN401 - whatever it prints
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it has ended: {self._process.wait(PATIENCE_S)}: {self._complaints.read_text()}"
        return json.loads(line)

    def wait(self) -> None:
        assert self._line() == "ready"

    def ask(self, word: str) -> Any:  # noqa: ANN401
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._line()

    def crashed(self) -> str:
        """What it says when it has to end itself."""
        assert self._process.stdin is not None
        print("crash", file=self._process.stdin, flush=True)
        assert self._process.wait(PATIENCE_S) == -signal.SIGABRT
        return self._complaints.read_text()

    @property
    def report(self) -> Report:
        return Report.from_json(self.said)

    def detail(self, name: StepName) -> str:
        (step,) = (step for step in self.report.steps if step.name is name)
        return step.detail

    @property
    def applied(self) -> set[StepName]:
        return {step.name for step in self.report.steps if step.applied}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That other users may pass through, unlike pytest's own."""
    made = tmp_path_factory.mktemp("confined")
    above = [path for path in (made, *made.parents) if path.stat().st_mode & 0o077 == 0]
    for path in above:
        path.chmod(0o711)
    yield made
    for path in above:
        path.chmod(0o700)


@contextmanager
def confined(folder: Path, carrier: str, *, inherited: bool = True, **settings: object) -> Iterator[Confined]:
    """A broker of the registry `folder/store` whose services are in `folder/inside`, and listeners for its attacks."""
    inside, elsewhere = folder / "inside", folder / "elsewhere"
    elsewhere.mkdir()
    secret = folder / "secret"
    secret.write_text("secret")
    (inside / "file").write_text("")
    for link, text in (("link", secret), ("socket-link", elsewhere / "socket")):
        (inside / link).symlink_to(text)
    port, elsewhere_port, free = free_port(), free_port(), free_port()
    file = folder / "broker.toml"
    confine = "" if "confine" not in settings else f"[confine]\n{settings.pop('confine')}\n"
    file.write_text(
        f'{confine}[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 300\ndefault = "unix:{inside}/echo"\n'
    )
    log = folder / "log" / "broker.log"
    log.parent.mkdir()
    if "first" in settings:
        os.chown(log.parent, NOBODY, NOBODY)
    with ExitStack() as stack:
        for address, kind in (
            (str(elsewhere / "socket"), socket.SOCK_STREAM),
            (str(elsewhere / "socket.dgram"), socket.SOCK_DGRAM),
            ("\0fourtuple-test", socket.SOCK_STREAM),
            ("\0fourtuple-test.dgram", socket.SOCK_DGRAM),
        ):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listener.bind(address)
            if kind is socket.SOCK_STREAM:
                listener.listen()
            if address.startswith("/"):
                Path(address).chmod(0o777)
        tcp = stack.enter_context(socket.socket())
        tcp.bind(("127.0.0.1", elsewhere_port))
        tcp.listen()
        doors = []
        for _ in range(WORKERS if inherited else 0):
            door = stack.enter_context(socket.socket())
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            door.bind(("127.0.0.1", port))
            doors.append(door.fileno())
        everything = {
            "file": str(file),
            "carrier": carrier,
            "store": str(folder / "store"),
            "log": str(log),
            "first": None,
            "user": str(NOBODY) if os.geteuid() == 0 and settings.get("first") is None else None,
            "refuse": {},
            "fds": doors,
            "served": None,
            "given": {
                "carrier": carrier,
                "secret": str(secret),
                "inside": str(inside),
                "elsewhere": str(elsewhere / "socket"),
                "name": "fourtuple-test",
            },
            "ports": {"elsewhere": elsewhere_port, "allowed": settings.pop("allowed", elsewhere_port), "free": free},
            **settings,
        }
        passed = [one for one in (*doors, everything["served"]) if isinstance(one, int)]
        process = stack.enter_context(
            subprocess.Popen(
                [*PROGRAM, json.dumps(everything)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context((folder / "complaints").open("w")),
                text=True,
                pass_fds=passed,
            )
        )
        stack.callback(process.terminate)
        yield Confined(process, port, log, folder / "complaints")


@contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """With two services, whose owner is the broker's user."""
    inside = folder / "inside"
    inside.mkdir()
    with Registry(folder / "store") as store:
        store.set(
            [
                Service(name="echo.example.com", target=f"unix:{inside}/echo"),
                Service(name="hand.example.com", target=f"unix:{inside}/hand", delivery=Delivery.HANDOFF),
            ]
        )
        if os.geteuid() == 0:
            for path in (store.path, *store.path.iterdir()):
                os.chown(path, NOBODY, NOBODY)
        yield store


@contextmanager
def open_to_all(path: Path) -> Iterator[None]:
    """A service that any user may come to; the file of the socket is gone afterwards."""
    with echoing(path):
        path.chmod(0o777)
        yield
    path.unlink()


@contextmanager
def handed(path: Path) -> Iterator[None]:
    """A service that is handed its clients."""

    def serve(listener: Listener) -> None:
        client = listener.accept().socket
        with client:
            client.sendall(b"handed " + client.recv(4096))

    with Listener(path, mode=0o777) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield
        thread.join(PATIENCE_S)


def not_refused(outcomes: Mapping[str, str]) -> list[str]:
    """But for the known gaps."""
    return [name for name, what in outcomes.items() if what == "done" and not name.startswith("gap: ")]


def heard(port: int, host: str) -> bytes:
    return said(port, get(host)).partition(b" ")[0]


@pytest.mark.parametrize(("carrier", "inherited"), [("epoll", True), ("uring", True), ("uring", False)])
def test_code_that_got_in_reaches_nothing_and_the_broker_serves_on(folder: Path, carrier: str, inherited: bool) -> None:
    inside = folder / "inside"
    with registry(folder) as store, confined(folder, carrier, inherited=inherited) as broker:
        broker.wait()
        assert broker.applied == set(StepName) - (set() if inherited else {StepName.NETWORK}), broker.said
        assert not broker.report.missing
        with open_to_all(inside / "echo"), socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S) as old:
            old.sendall(b"GET / HTTP/1.1\r\nHost: echo.")
            outcomes = broker.ask("attack")
            assert not not_refused(outcomes), outcomes
            known = " ".join(gap for step in broker.report.steps for gap in step.gaps)
            open_gaps = [name for name, what in outcomes.items() if name.startswith("gap: ") and what == "done"]
            # In a network of one's own there are none.
            assert not (inherited and open_gaps), outcomes
            assert all(name.removeprefix("gap: ") in known for name in open_gaps), (open_gaps, known)
            assert broker.ask("import")
            old.sendall(b"example.com\r\n\r\n")
            assert old.recv(100).startswith(b"echo heard GET")
            assert heard(broker.port, "echo.example.com") == b"echo"
        # Another process behind the same path, another inode.
        with open_to_all(inside / "echo"), handed(inside / "hand"), open_to_all(inside / "new"):
            assert heard(broker.port, "echo.example.com") == b"echo"
            assert heard(broker.port, "hand.example.com") == b"handed"
            store.set([Service(name="new.example.com", target=f"unix:{inside}/new")])
            assert heard(broker.port, "new.example.com") == b"new"
            store.set([Service(name="out.example.com", target=f"unix:{folder}/elsewhere/socket")])
            assert heard(broker.port, "out.example.com") == b""
        wait_for(lambda: broker.log.read_text().count("\n") == 6)
        reasons = Counter(json.loads(line)["reason"] for line in broker.log.read_text().splitlines())
        assert reasons == {"relayed": 4, "handed_off": 1, "service_absent": 1}
        if carrier == "uring":
            before = broker.ask("report")["rings"]
            with ExitStack() as many:
                for _ in range(100):
                    many.enter_context(socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S))
                wait_for(lambda: broker.ask("report")["rings"] > before)
        assert not broker.ask("report")["errors"]
        assert "Fatal Python error: Aborted" in broker.crashed()
        assert moved(broker.report) == ()
        inside.rename(folder / "before")
        assert moved(broker.report) == (str(inside),)


@contextmanager
def tcp_service(host: str) -> Iterator[int]:
    """A service that listens there; its port."""
    with socket.create_server((host, 0)) as listener, answering(listener, "tcp"):
        yield listener.getsockname()[1]


class Serving:
    """As the supervisor does it: connections of a process that asks for them, in a thread."""

    def __init__(self, file: Path, registry: Registry) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._file, self._registry = file, registry
        self.connector: Connector | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        _, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
        addresses = Addresses(
            lambda: places(BrokerFile.read(self._file), self._registry), lambda: self._registry.version, lambda: ()
        )
        with ExitStack() as stack:
            self.connector = Connector(descriptors[0], addresses)
            stack.callback(self.connector.close)
            while True:
                poll = select.poll()
                poll.register(self.connector, select.POLLIN)
                # POLLHUP: nobody is left who could ask.
                if any(events & select.POLLHUP for _, events in poll.poll()) or not self.connector.serve():
                    return

    def over(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._ours.close()
        self.theirs.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="all of the sandbox includes another user, which only root can become")
def test_where_a_target_is_tcp_code_that_got_in_reaches_that_target_and_nothing_else(folder: Path) -> None:
    # In an empty network of its own; the connections to targets are made for it.
    with registry(folder) as store, tcp_service("127.0.0.2") as allowed, tcp_service("127.0.0.2") as later:
        store.set([Service(name="tcp.example.com", target=f"tcp:127.0.0.2:{allowed}")])
        serving = Serving(folder / "broker.toml", store)
        required, served = 'sandbox = "required"', serving.theirs.fileno()
        with confined(folder, "epoll", confine=required, served=served, allowed=allowed) as broker:
            broker.wait()
            assert broker.applied == set(StepName)
            assert not [gap for step in broker.report.steps for gap in step.gaps]
            assert heard(broker.port, "tcp.example.com") == b"tcp"
            assert serving.connector is not None
            assert serving.connector.made == 1
            outcomes = broker.ask("attack")
            assert not not_refused(outcomes), outcomes
            assert (outcomes["ask for a port"], outcomes["ask for a host"]) == ("EACCES", "EACCES")
            assert (serving.connector.made, serving.connector.refused) == (1, 2)
            store.set([Service(name="later.example.com", target=f"tcp:127.0.0.2:{later}")])
            assert heard(broker.port, "later.example.com") == b"tcp"
            store.set([Service(name="absent.example.com", target=f"tcp:127.0.0.2:{free_port()}")])
            assert heard(broker.port, "absent.example.com") == b""
            with open_to_all(folder / "inside" / "echo"):
                assert heard(broker.port, "echo.example.com") == b"echo"
            assert not broker.ask("report")["errors"]
            wait_for(lambda: broker.log.read_text().count("\n") == 4)
            reasons = Counter(json.loads(line)["reason"] for line in broker.log.read_text().splitlines())
            assert reasons == {"relayed": 3, "service_absent": 1}
        serving.over()


def test_a_user_without_any_capability_confines_itself_as_far(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("is about a user without capabilities, and needs root to become one here")
    inside = folder / "inside"
    with registry(folder), confined(folder, "uring", first=NOBODY) as broker:
        broker.wait()
        if StepName.MOUNTS not in broker.applied:
            pytest.skip(f"no user namespaces here: {broker.detail(StepName.MOUNTS)}")
        assert broker.applied == set(StepName)
        assert "user namespace" in broker.detail(StepName.MOUNTS)
        with open_to_all(inside / "echo"), handed(inside / "hand"):
            assert not not_refused(broker.ask("attack"))
            assert heard(broker.port, "echo.example.com") == b"echo"
            assert heard(broker.port, "hand.example.com") == b"handed"


def test_what_a_container_lacks_is_said_and_the_rest_applies(folder: Path) -> None:
    refused = {
        str(LANDLOCK_CREATE_RULESET): errno.ENOSYS,
        str(SECCOMP): errno.EPERM,
        str(UNSHARE): errno.EPERM,
    }
    with registry(folder), confined(folder, "epoll", refuse=refused) as broker:
        broker.wait()
        assert {step.name for step in broker.report.missing} == {
            StepName.MOUNTS,
            StepName.NETWORK,
            StepName.LANDLOCK,
            StepName.SECCOMP,
        }
        assert "ENOSYS" in broker.detail(StepName.LANDLOCK)
        assert "EPERM" in broker.detail(StepName.SECCOMP)
        with open_to_all(folder / "inside" / "echo"):
            assert heard(broker.port, "echo.example.com") == b"echo"


def test_a_mount_view_that_fails_half_way_leaves_everything_visible(folder: Path) -> None:
    with registry(folder), confined(folder, "epoll", refuse={str(MOUNT_SETATTR): errno.ENOSYS}) as broker:
        broker.wait()
        assert {step.name for step in broker.report.missing} == {StepName.MOUNTS}
        with open_to_all(folder / "inside" / "echo"):
            assert heard(broker.port, "echo.example.com") == b"echo"


def test_what_is_required_and_cannot_be_had_is_no_start(folder: Path) -> None:
    refused = {str(LANDLOCK_CREATE_RULESET): errno.EOPNOTSUPP}
    with registry(folder), confined(folder, "epoll", refuse=refused, confine='sandbox = "required"') as broker:
        assert "landlock: Operation not supported" in broker.said


def test_the_attacks_succeed_where_nothing_is_confined(folder: Path) -> None:
    """Those that leave nothing behind; else their failing would say nothing."""
    off = 'sandbox = "off"'
    with registry(folder), confined(folder, "uring", confine=off, user=None) as broker:
        broker.wait()
        assert not broker.applied & {StepName.MOUNTS, StepName.NETWORK, StepName.LANDLOCK, StepName.SECCOMP}
        assert not broker.report.missing or {step.name for step in broker.report.missing} == {StepName.IDENTITY}
        outcomes = broker.ask("attack harmless")
        # Of a kernel without such a module, of a user who may not, of a first process with a root of its own.
        may_fail = {"socket: raw", "socket: packet", "socket: vsock", "gap: Multipath TCP", "open by /proc/1/root"}
        failed = {name for name, what in outcomes.items() if what != "done"} - may_fail
        assert not failed, outcomes
        assert len(outcomes) > 20
