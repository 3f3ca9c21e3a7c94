"""The launcher: services of all manners are started, known to be there, and ended without anything left of them."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from fourtuple.launcher import Failure, Launcher, Phase, StartFailed
from fourtuple.launcher.cgroups import root
from fourtuple.launcher.processes import mark_of
from fourtuple.launcher.spawn import PATH
from fourtuple.templates import Call, Missing, Ready, Socket
from tests.unit.handing import hand_over, open_descriptors
from tests.unit.launching import answer, call, eventually, handed, launching, program, runs, template

NOBODY = 65_534


async def failure(launcher: Launcher, wanted: Call) -> StartFailed:
    with pytest.raises(StartFailed) as caught:
        await launcher.start(wanted)
    return caught.value


def born(tmp_path: Path, **more: object) -> dict[str, object]:
    """What a service with such a template finds when it begins."""
    asked = template("born", "report", str(tmp_path / "report"), "{label}", socket=Socket.PASS, **more)

    async def scene() -> None:
        async with launching(asked) as (launcher, _):
            started = await launcher.start(call(tmp_path, "born", "shop.example"))
            assert await asyncio.to_thread(answer, tmp_path / "shop.example") == started.pid
            await launcher.stop("shop.example")
            assert not (tmp_path / "shop.example").exists()
            assert not runs(started.pid)

    asyncio.run(scene())
    found: dict[str, object] = json.loads((tmp_path / "report").read_text())
    return found


def test_a_service_has_its_socket_and_nothing_else(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        found = born(tmp_path, env={"GREETING": "hello {label}"}, umask=0o027, rlimits={"nofile": (100, 200)}, nice=3)
    environment = found["environment"]
    assert isinstance(environment, dict)
    assert environment.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"
    assert environment == {
        "PATH": PATH,
        "GREETING": "hello shop",
        "FOURTUPLE_SERVICE": "shop.example",
        "LISTEN_PID": str(found["pid"]),
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "service",
    }
    assert found["descriptors"] == [0, 1, 2, 3]
    assert found["arguments"] == ["shop"]
    assert found["group"] == found["pid"]
    assert found["nofile"] == [100, 200]
    assert found["nice"] == os.nice(0) + 3
    assert found["umask"] == 0o027
    assert found["folder"] == "/"
    assert found["no_new_privileges"] == "1"
    # As Python ignores them itself, in the service as in the launcher.
    assert found["ignored"] == 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    assert found["blocked"] == 0


def test_what_the_launcher_ignores_or_blocks_a_service_does_not(tmp_path: Path) -> None:
    """As /bin/sh sees it, which ignores nothing by itself."""
    script = f"exec cat /proc/self/status >{tmp_path}/status"

    async def scene() -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            async with launching(program("sh", "/bin/sh", "-c", script)) as (launcher, _):
                await launcher.start(call(tmp_path, "sh"))
                await eventually(lambda: "SigIgn" in _text(tmp_path / "status"))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    asyncio.run(scene())
    lines = dict(line.split(":\t") for line in _text(tmp_path / "status").splitlines())
    assert (int(lines["SigIgn"], 16), int(lines["SigBlk"], 16)) == (0, 0)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("another user, or namespaces: that takes root")


def test_a_service_is_its_user(tmp_path: Path) -> None:
    _needs_root()
    script = f"(id -u; id -G; id -g; echo $HOME $USER) >/dev/shm/{tmp_path.name}; exec sleep 1000"
    report = Path("/dev/shm", tmp_path.name)
    before = _dumpable()

    async def scene() -> None:
        asked = program("sh", "sh", "-c", script, user="nobody")
        async with launching(asked, replace(asked, name="group", group="daemon")) as (launcher, _):
            for name, groups in (("sh", "65534\n65534"), ("group", "1\n1")):
                await launcher.start(call(tmp_path, name))
                with suppress(AssertionError):
                    await eventually(lambda: _text(report).count("\n") == 4)
                assert _text(report) == f"65534\n{groups}\n/nonexistent nobody\n"
                report.unlink()

    try:
        asyncio.run(scene())
    finally:
        report.unlink(missing_ok=True)
    assert _dumpable() == before


def _dumpable() -> str:
    """Who may look into this process shows in whose its files in /proc are."""
    return str(Path("/proc/self/fd").stat().st_uid)


def test_a_service_in_namespaces_of_its_own(tmp_path: Path) -> None:
    _needs_root()
    found = born(
        tmp_path,
        private_network=True,
        private_tmp=False,
        read_only=True,
        writable=(str(tmp_path),),
        ready=Ready.STARTED,
    )
    assert found["writable"] == {"/etc": False, "/tmp": False, "/dev/shm": os.path.ismount("/dev/shm")}
    assert found["network"] == 1


def test_a_temporary_folder_of_its_own(tmp_path: Path) -> None:
    _needs_root()
    script = f"touch /tmp/mine && ls /tmp >/dev/shm/{tmp_path.name} && exec sleep 1000"
    report = Path("/dev/shm", tmp_path.name)

    async def scene() -> None:
        async with launching(program("sh", "/bin/sh", "-c", script, private_tmp=True)) as (launcher, _):
            await launcher.start(call(tmp_path, "sh"))
            await eventually(lambda: _text(report) == "mine\n")

    try:
        asyncio.run(scene())
    finally:
        report.unlink(missing_ok=True)
    assert not Path("/tmp/mine").exists()


def test_a_cgroup_for_each_start(tmp_path: Path) -> None:
    _needs_root()
    if not os.access(root(), os.W_OK):
        pytest.skip(f"{root()} cannot be written")
    folder = root() / f"fourtuple-test-{os.getpid()}"
    try:
        found = born(tmp_path, cgroup=f"/{folder.name}/{{name}}")
        assert f"0::/{folder.name}/shop.example\n" in str(found["cgroup"])
        assert list(folder.glob("*/")) == []
    finally:
        if folder.exists():
            folder.rmdir()


def test_where_no_cgroup_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourtuple.launcher.cgroups.root", lambda: Path("/proc"))
    asked = program("sleep", "sleep", "1000", cgroup="/services/{name}")

    async def scene() -> None:
        async with launching(asked, replace(asked, name="ignore", cgroup_missing=Missing.IGNORE)) as (launcher, _):
            error = await failure(launcher, call(tmp_path, "sleep"))
            assert (error.failure, "cannot be made" in error.why) == (Failure.BAD_VALUE, True)
            await launcher.start(call(tmp_path, "ignore"))
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scene())


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_tcp_socket_is_passed(tmp_path: Path, family: int) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    target = f"tcp:{host if family == socket.AF_INET else f'[{host}]'}:{port}"
    asked = template("report", "report", str(tmp_path / "report"), "{port}", "{target}", socket=Socket.PASS)

    async def scene() -> None:
        async with launching(asked) as (launcher, _):
            started = await launcher.start(call(tmp_path, "report", target=target))

            def said() -> int:
                with socket.create_connection((host, port)) as client:
                    return int(client.recv(100))

            assert await asyncio.to_thread(said) == started.pid
        assert json.loads((tmp_path / "report").read_text())["arguments"] == [str(port), target]

    asyncio.run(scene())


@pytest.mark.parametrize("slow_s", ["0", "0.3"])
def test_a_service_makes_its_own_socket(tmp_path: Path, slow_s: str) -> None:
    async def scene() -> None:
        async with launching(template("own", "own", "{socket}", slow_s)) as (launcher, exits):
            # What nobody is behind any more is no obstacle.
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(tmp_path / "own"))
            first, *others = await asyncio.gather(*(launcher.start(call(tmp_path, "own")) for _ in range(5)))
            assert others == [first] * 4
            assert first.ready_s - first.since_s >= float(slow_s)
            assert answer(tmp_path / "own") == first.pid
            assert await launcher.start(call(tmp_path, "own")) == first
            await launcher.stop("own")
            assert list(tmp_path.iterdir()) == []
            assert (await launcher.start(call(tmp_path, "own"))).pid != first.pid
        assert list(tmp_path.iterdir()) == []
        assert exits == []

    asyncio.run(scene())


def test_a_tcp_service_is_ready_when_it_listens(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = program(
        "socat", "socat", "TCP-LISTEN:{port},bind={address}", "SYSTEM:'cat'", socket=Socket.OWN, ready=Ready.LISTENING
    )

    async def scene() -> None:
        async with launching(asked) as (launcher, exits):
            wanted = call(tmp_path, "socat", target=f"tcp:127.0.0.1:{port}")
            await launcher.start(wanted)
            # It serves one client and ends: to look whether it is there was none.
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"hello")
                assert await asyncio.to_thread(client.recv, 5) == b"hello"
            ended = await exits.next()
            assert (ended.service, ended.crashed) == ("socat", False)
            assert launcher.services() == ()

    asyncio.run(scene())


def test_services_that_do_not_come_up(tmp_path: Path) -> None:
    away = tmp_path / "taken"
    (tmp_path / "text").write_text("no program")
    templates = [
        program("never", "sleep", "1000", socket=Socket.OWN, ready=Ready.LISTENING, start_timeout_s=0.2),
        program("silent", "sleep", "1000", ready=Ready.NOTIFY, start_timeout_s=0.2),
        program("crash", "sh", "-c", "exit 3", socket=Socket.OWN, ready=Ready.LISTENING),
        program("killed", "sh", "-c", "kill -SEGV $$", socket=Socket.OWN, ready=Ready.LISTENING),
        program("settling", "sh", "-c", "sleep 0.05; exit 3", settle_ms=30_000),
        program("done", "true", socket=Socket.OWN, ready=Ready.LISTENING),
        program("absent", "/nowhere/at/all"),
        program("script", str(tmp_path / "text")),
        program("stranger", "sleep", "1000", user="nobody-of-this-name"),
        program("folder", "sleep", "1000", cwd="/nowhere/at/all"),
        program("unnamed", "echo", "{user}"),
        program("taken", "sleep", "1000"),
    ]
    wanted = {
        "never": (Failure.TIMEOUT, "not ready after 0.2 s"),
        "silent": (Failure.TIMEOUT, "not ready after 0.2 s"),
        "crash": (Failure.ENDED, "status 3"),
        "killed": (Failure.ENDED, "Segmentation fault"),
        "settling": (Failure.ENDED, "status 3"),
        "done": (Failure.ENDED, "forks = true"),
        "absent": (Failure.BAD_VALUE, "no such program"),
        "script": (Failure.BAD_VALUE, "no such program"),
        "stranger": (Failure.BAD_VALUE, "there is no user"),
        "folder": (Failure.NOT_EXECUTED, "cannot change to its folder: No such file"),
        "unnamed": (Failure.BAD_VALUE, "{user} is not known"),
        "taken": (Failure.TARGET_TAKEN, "in use"),
        "nothing": (Failure.NO_TEMPLATE, "no template"),
    }

    async def scene() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(away))
            listener.listen()
            async with launching(*templates) as (launcher, exits):
                for name, (kind, words) in wanted.items():
                    error = await failure(launcher, call(tmp_path, name))
                    assert (error.failure, words in error.why) == (kind, True), (name, error.failure, error.why)
                    counts = kind in (Failure.TIMEOUT, Failure.ENDED, Failure.NOT_EXECUTED)
                    assert (error.retry_after_s > 0) == counts
                assert launcher.services() == ()
                assert exits == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "text"]

    asyncio.run(scene())


def test_who_crashes_is_held_back_and_each_time_longer(tmp_path: Path) -> None:
    failing = program("failing", "false", ready=Ready.NOTIFY, backoff_s=0.2, backoff_most_s=0.5, backoff_reset_s=0.3)
    dying = template("dying", "dying", "{socket}", backoff_s=100, backoff_most_s=100)

    async def scene() -> None:
        async with launching(failing, dying) as (launcher, exits):
            for pause_s in (0.2, 0.4, 0.5, 0.5):
                error = await failure(launcher, call(tmp_path, "failing"))
                assert (error.failure, error.retry_after_s) == (Failure.ENDED, pause_s)
                await eventually(lambda: launcher._crashes["failing"].until_s <= time.monotonic())
            # Forgotten after a quiet time, as if it had never been.
            await eventually(lambda: launcher._crashes == {})
            assert (await failure(launcher, call(tmp_path, "failing"))).retry_after_s == 0.2
            await launcher.start(call(tmp_path, "dying"))
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "dying"))
                ended = await exits.next()
            assert (ended.status, ended.crashed) == (-signal.SIGSEGV, True)
            assert list(tmp_path.iterdir()) == []
            error = await failure(launcher, call(tmp_path, "dying"))
            assert (error.failure, 0 < error.retry_after_s <= 100) == (Failure.BACKING_OFF, True)

    asyncio.run(scene())


def test_a_service_that_forks_away(tmp_path: Path) -> None:
    asked = template("daemon", "daemon", "{socket}", forks=True)

    async def scene() -> None:
        async with launching(asked, replace(asked, name="lost", forks=False)) as (launcher, exits):
            error = await failure(launcher, call(tmp_path, "lost"))
            assert (error.failure, "forks = true" in error.why) == (Failure.ENDED, True)
            assert list(tmp_path.iterdir()) == []

            async def away() -> int:
                await launcher.start(call(tmp_path, "daemon"))
                pid = answer(tmp_path / "daemon")
                # Its first process has ended by now, and perhaps the second has not.
                await eventually(lambda: [one.pid for one in launcher.services()] == [pid])
                return pid

            pid = await away()
            await launcher.stop("daemon")
            assert not runs(pid)
            assert list(tmp_path.iterdir()) == []
            os.kill(await away(), signal.SIGKILL)
            ended = await exits.next()
            assert (ended.service, ended.status) == ("daemon", -signal.SIGKILL)

    asyncio.run(scene())


@pytest.mark.parametrize("manners", ["leaky", "deaf"])
def test_what_does_not_want_to_end_is_ended(tmp_path: Path, manners: str) -> None:
    """A grandchild in a session of its own that holds the socket; and a service that ignores SIGTERM."""

    async def scene() -> None:
        async with launching(template(manners, manners, "{socket}", stop_timeout_s=0.3)) as (launcher, exits):
            for _ in range(2):
                started = await launcher.start(call(tmp_path, manners))
                assert answer(tmp_path / manners) == started.pid
                mark = mark_of(started.pid)
                assert launcher.knows(mark)
                await launcher.stop(manners)
                left = [int(one.name) for one in Path("/proc").glob("[0-9]*") if mark_of(int(one.name)) == mark]
                assert left == []
                assert list(tmp_path.iterdir()) == []
            # It crashes: what it has left is ended all the same.
            started = await launcher.start(call(tmp_path, manners))
            os.kill(started.pid, signal.SIGKILL)
            assert (await exits.next()).status == -signal.SIGKILL

    asyncio.run(scene())


def test_a_service_that_says_much(tmp_path: Path) -> None:
    async def scene() -> None:
        async with launching(template("noisy", "noisy", "{socket}")) as (launcher, _):
            started = await launcher.start(call(tmp_path, "noisy"))
            assert answer(tmp_path / "noisy") == started.pid

    asyncio.run(scene())


def test_a_service_says_itself_that_it_is_ready(tmp_path: Path) -> None:
    asked = template("notify", "notify", "0.3", socket=Socket.PASS, ready=Ready.NOTIFY)

    async def scene() -> None:
        async with launching(asked) as (launcher, _):
            start = asyncio.create_task(launcher.start(call(tmp_path, "notify")))
            await eventually(lambda: any(one.phase is Phase.STARTING for one in launcher.services()))
            (state,) = launcher.services()
            environment = Path(f"/proc/{state.pid}/environ")
            # Before it executes the service, the process has ours.
            await eventually(lambda: b"NOTIFY_SOCKET=@" in environment.read_bytes())
            name = environment.read_bytes().partition(b"NOTIFY_SOCKET=@")[2].partition(b"\0")[0]
            # Ours is a word of another process, which does not count.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(b"READY=1", b"\0" + name)
            assert (await start).ready_s - state.since_s >= 0.3

    asyncio.run(scene())


def test_many_at_once_start_a_few_at_a_time_in_their_order(tmp_path: Path) -> None:
    asked = program("socat", "socat", "UNIX-LISTEN:{socket}", "EXEC:cat", socket=Socket.OWN, ready=Ready.LISTENING)

    async def scene() -> None:
        async with launching(asked, most_starting=6, most_running=200) as (launcher, _):
            done: list[int] = []

            async def one(number: int) -> None:
                await launcher.start(call(tmp_path, "socat", f"s{number}"))
                done.append(number)

            most = 0
            starts = [asyncio.create_task(one(number)) for number in range(200)]
            while not all(start.done() for start in starts):
                phases = [state.phase for state in launcher.services()]
                most = max(most, phases.count(Phase.STARTING))
                await asyncio.sleep(0.001)
            await asyncio.gather(*starts)
            assert 2 <= most <= 6
            # Six at a time, so none overtakes another by more than that and those beside it.
            assert all(abs(place - number) < 18 for place, number in enumerate(done))
            error = await failure(launcher, call(tmp_path, "socat", "more"))
            assert error.failure is Failure.OVER_RUNNING
            assert len(list(tmp_path.iterdir())) == 200
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scene())


def test_who_waits_may_leave_and_a_start_can_be_stopped(tmp_path: Path) -> None:
    asked = template("own", "own", "{socket}", "0.3")

    async def scene() -> None:
        async with launching(asked, replace(asked, name="never", argv=("sleep", "1000")), most_starting=1) as (
            launcher,
            _,
        ):
            start = asyncio.create_task(launcher.start(call(tmp_path, "own")))
            await eventually(lambda: any(state.pid for state in launcher.services()))
            queued = asyncio.create_task(launcher.start(call(tmp_path, "own", "queued")))
            await asyncio.sleep(0)
            start.cancel()
            await launcher.stop("queued")
            with pytest.raises(StartFailed) as caught:
                await queued
            assert caught.value.failure is Failure.STOPPED
            # Nobody waits any more; it is there all the same.
            await eventually(lambda: [one.phase for one in launcher.services()] == [Phase.RUNNING])
            start = asyncio.create_task(launcher.start(call(tmp_path, "never")))
            await eventually(lambda: any(state.phase is Phase.STARTING for state in launcher.services()))
            await launcher.aclose()
            with pytest.raises(StartFailed) as caught:
                await start
            assert caught.value.failure is Failure.STOPPED
            assert launcher.services() == ()
            assert (await failure(launcher, call(tmp_path, "own"))).failure is Failure.STOPPED
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scene())


def test_many_starts_leave_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with launching(program("true", "/bin/true"), most_starting=4) as (launcher, exits):
            await launcher.start(call(tmp_path, "true", "first"))
            await exits.next()
            before = open_descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            async def cycles(name: str) -> None:
                for _ in range(20):
                    await launcher.start(call(tmp_path, "true", name))
                    await launcher.stop(name)

            await asyncio.gather(*(cycles(f"s{number}") for number in range(10)))
            assert open_descriptors() == before[0]
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before[1] + 8_192
            assert (launcher._units, launcher._pids, launcher._crashes) == ({}, {}, {})
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scene())


def test_a_service_is_busy_while_it_holds_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(port: int) -> None:
        async with launching(template("held", "held", socket=Socket.PASS), ports=frozenset({port})) as (launcher, _):
            await launcher.start(handed(tmp_path, "held"))
            assert not launcher.busy("held")
            with hand_over(tmp_path / "held") as client:
                assert await asyncio.to_thread(client.recv, 4) == b"held"
                # A connection, but not of one of those listeners.
                assert not launcher.busy("held")
                launcher.ports = frozenset({client.getpeername()[1]})
                assert launcher.busy("held")
                # Where no descriptor can be borrowed, the kernel's list says the same.
                with monkeypatch.context() as patch:
                    patch.setattr("fourtuple.launcher.clients._GETFD", 100_000)
                    assert launcher.busy("held")
                    launcher.ports = frozenset({port})
                    assert not launcher.busy("held")
                launcher.ports = frozenset({client.getpeername()[1]})
                client.shutdown(socket.SHUT_WR)
                await eventually(lambda: not launcher.busy("held"))
            assert not launcher.busy("nobody")

    asyncio.run(scene(1))


LAUNCHING = """
import asyncio, os, sys
from pathlib import Path
from fourtuple.launcher import Launcher
from tests.unit.launching import call, program, template

async def scene(folder):
    away = program("away", "sh", "-c", "setsid -f sleep 1000; exec sleep 1000")
    launcher = Launcher([template("own", "own", "{socket}"), away], instance=str(folder))
    pids = [(await launcher.start(call(folder, name))).pid for name in ("own", "away")]
    print(*pids, flush=True)
    await asyncio.sleep(1000)

asyncio.run(scene(Path(sys.argv[1])))
"""


def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Its services die with it; what they had left behind goes when the next launcher of that name starts one."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHING, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as killed:
        assert killed.stdout is not None
        try:
            pids = [int(pid) for pid in killed.stdout.readline().split()]
            mark = mark_of(pids[1])
            sleepers: list[int] = []

            def two() -> bool:
                # Which are no shells any more.
                numbers = [int(one.name) for one in Path("/proc").glob("[0-9]*") if mark_of(int(one.name)) == mark]
                sleepers[:] = [pid for pid in numbers if _text(Path(f"/proc/{pid}/comm")) == "sleep\n"]
                return len(sleepers) == 2

            asyncio.run(eventually(two))
        finally:
            killed.kill()

    async def scene() -> None:
        await eventually(lambda: not any(runs(pid) for pid in pids))
        (left,) = (pid for pid in sleepers if runs(pid))
        async with launching(template("own", "own", "{socket}"), instance="another") as (launcher, _):
            await launcher.start(call(tmp_path, "own"))
            assert runs(left)
        async with launching(template("own", "own", "{socket}"), instance=str(tmp_path)) as (launcher, _):
            await launcher.start(call(tmp_path, "own"))
            await eventually(lambda: not runs(left))

    asyncio.run(scene())


REPLACED = """
import asyncio, json, os, sys
from pathlib import Path
from fourtuple.launcher import Launcher, Phase, Saved
from tests.unit.launching import SERVICE, call, eventually, program, template
from fourtuple.templates import Ready, Socket

PHASES = ["running", "starting", "stopping"]
folder = Path(sys.argv[1])
templates = [
    template("own", "own", "{socket}"),
    template("notify", "notify", "2", socket=Socket.PASS, ready=Ready.NOTIFY),
    template("deaf", "deaf", "{socket}", stop_timeout_s=2),
    program("crash", "false", socket=Socket.OWN, ready=Ready.LISTENING, backoff_s=100, backoff_most_s=100),
]

async def first():
    launcher = Launcher(templates)
    own, deaf = [await launcher.start(call(folder, name)) for name in ("own", "deaf")]
    try:
        await launcher.start(call(folder, "crash"))
    except Exception as error:
        assert error.retry_after_s > 99
    asyncio.create_task(launcher.start(call(folder, "notify")))
    asyncio.create_task(launcher.stop("deaf"))
    await eventually(lambda: sorted(one.phase.value for one in launcher.services()) == PHASES)
    saved, descriptors = launcher.save()
    text = json.dumps(saved.row())
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    pids = {one.service: one.pid for one in launcher.services()}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], text, json.dumps(descriptors), json.dumps(pids)])

async def second(saved, descriptors, pids):
    exits = []
    saved, descriptors = Saved.read(json.loads(saved)), json.loads(descriptors)
    launcher = Launcher(templates, saved=saved, descriptors=descriptors, exited=exits.append)
    pids = json.loads(pids)
    assert {one.service: one.pid for one in launcher.services()} == pids
    assert (await launcher.start(call(folder, "own"))).pid == pids["own"]
    started = await launcher.start(call(folder, "notify"))
    assert started.pid == pids["notify"] and started.ready_s - started.since_s >= 2
    await launcher.stop("deaf")
    try:
        await launcher.start(call(folder, "crash"))
    except Exception as error:
        assert error.failure.value == "backing_off", error
    os.kill(pids["own"], 9)
    await eventually(lambda: len(exits) == 1)
    assert exits[0].status == -9
    await launcher.aclose()
    assert list(folder.iterdir()) == []
    try:
        os.waitpid(-1, os.WNOHANG)
        print("children are left")
    except ChildProcessError:
        print("all is well")

asyncio.run(second(*sys.argv[2:]) if len(sys.argv) > 2 else first())
"""


def test_services_outlive_the_image_that_started_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPLACED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "all is well\n", done.stdout + done.stderr
