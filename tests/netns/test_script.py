"""Scripts with a `session` in `fourtuple load`, good ones and bad ones: what they do is bounded and named, the number
of connections is exact, and no process is left, whatever ends the run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fourtuple.engine import EchoConfig
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint
from tests.netns.loading import RUN_S, cause, inside, run_load, server_address
from tests.netns.troublemaker import MANNERS

HERE = Path(__file__).parent
ECHO, QUIET, WATCHED, FRESH, FIRST_PORT = 6_999, 6_998, 6_997, 6_996, 7_000
AT_ONCE = 4
THIS, OTHER = "this side", "the other side"
TOLD = ("--duration", "1", "--answer-timeout", "0.4", "--workers", "1")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A client and a server, with an echo and a server that misbehaves."""
    with Lab(("client", "server")) as made:
        address = server_address(made)
        listen = tuple(Endpoint.parse(f"{address}:{port}") for port in (ECHO, QUIET, WATCHED, FRESH))
        engine = made["server"].start_engine(EchoConfig(listen=listen), workers=1)
        engine.wait_for(lambda now: now.listening_now == 4, 20)
        command = [sys.executable, str(HERE / "troublemaker.py"), address, str(FIRST_PORT)]
        with subprocess.Popen(inside(made, made["server"], command), stdout=subprocess.PIPE, text=True) as trouble:
            assert trouble.stdout is not None
            assert trouble.stdout.readline() == "ready\n"
            yield made
            trouble.kill()


def url(lab: Lab, manners: str = "") -> str:
    port = FIRST_PORT + list(MANNERS).index(manners) if manners else ECHO
    return f"tcp://{server_address(lab)}:{port}"


def written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A script, and what has to be said of it. FOLDER in its text is an empty one."""

    name: str
    text: str
    side: str
    what: str
    evidence: str = ""
    manners: str = ""
    options: tuple[str, ...] = ("-c", "20")
    status: int = 1


GOOD = """
    async def session(connection):
        open(f"FOLDER/{connection.serial}.{connection.turn}", "x").close()  # fails if two have the same serial
        while True:
            with connection.round():
                await connection.send(b"%d\\n" % connection.serial)
                assert await connection.receive_until(b"\\n") == b"%d\\n" % connection.serial
            await connection.sleep(0.1)
"""
ROWS = (
    Row(
        name="raises",
        text="""
            async def session(connection):
                await connection.send(b"x")
                raise ValueError("no good")
        """,
        side=THIS,
        what="the script raises ValueError",
        evidence='line 4: raise ValueError("no good") (no good)',
    ),
    Row(
        name="exits",
        text="""
            import sys
            async def session(connection):
                sys.exit(3)
        """,
        side=THIS,
        what="the script raises SystemExit",
        evidence="line 4: sys.exit(3) (3)",
    ),
    Row(
        name="ends_its_process",
        text="""
            import os
            async def session(connection):
                await connection.sleep(0.4)
                os._exit(7)
        """,
        side=THIS,
        what="a worker process is gone",
        evidence="a worker ended with status 7",
    ),
    Row(
        name="exits_in_a_task",
        text="""
            import asyncio, sys
            async def leave():
                sys.exit(4)
            async def session(connection):
                task = asyncio.create_task(leave())
                await connection.sleep(5)
        """,
        side=THIS,
        what="the script raises SystemExit",
        evidence="line 4: sys.exit(4) (4)",
    ),
    Row(
        name="blocks",
        text="""
            import time
            async def session(connection):
                await connection.sleep(0.3)
                time.sleep(60)
        """,
        side=THIS,
        what="the script keeps all other sessions of its process waiting",
        evidence="line 5, in session, for ",
        options=("-c", "20", "--duration", "2"),
        status=0,
    ),
    Row(
        name="spins",
        text="""
            async def session(connection):
                await connection.sleep(0.3)
                while True:
                    pass
        """,
        side=THIS,
        what="the script keeps all other sessions of its process waiting",
        evidence="in session, for ",
        options=("-c", "20", "--duration", "2"),
        status=0,
    ),
    Row(
        name="never_ends",
        text="""
            import asyncio
            async def session(connection):
                while True:
                    try:
                        await asyncio.sleep(60)
                    except BaseException:
                        pass
        """,
        side=THIS,
        what="sessions do not end when they are told to",
        status=0,
    ),
    Row(
        name="eats_memory",
        text="""
            kept = []
            async def session(connection):
                while True:
                    kept.append(bytearray(1 << 28))
                    await connection.sleep(0.01)
        """,
        side=THIS,
        what="the script raises MemoryError",
        evidence="line 5: kept.append(bytearray(1 << 28))",
    ),
    Row(
        name="leaks_descriptors",
        text="""
            kept = []
            async def session(connection):
                while True:
                    kept.append(open("/dev/null"))
                    if len(kept) % 100 == 0:
                        await connection.sleep(0)
        """,
        side=THIS,
        what="the script raises OSError",
        evidence="Too many open files",
    ),
    Row(
        name="wrong_answer",
        text="""
            async def session(connection):
                with connection.round():
                    await connection.send(b"abc")
                    await connection.expect(b"abd")
        """,
        side=OTHER,
        what="it answers with other bytes",
        options=("-c", "20", "--no-replace"),
    ),
    Row(
        name="no_answer",
        text="""
            async def session(connection):
                with connection.round():
                    await connection.send(b"abc")
                    await connection.receive()
        """,
        side=OTHER,
        what="connected, but it does not answer in time",
        manners="stall",
        options=("-c", "20", "--no-replace"),
    ),
    Row(
        name="peer_ends",
        text="async def session(connection): await connection.sleep(60)",
        side=OTHER,
        what="it closes connections that we hold",
        manners="finish",
        options=("-c", "20", "--no-replace"),
    ),
    Row(
        name="peer_resets",
        text="async def session(connection): await connection.receive()",
        side=OTHER,
        what="the peer reset the connection",
        manners="reset",
        options=("-c", "20", "--no-replace"),
    ),
)


@pytest.fixture(scope="module")
def outcomes(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The report of each row, several runs side by side."""

    def one(row: Row) -> dict[str, Any]:
        script = written(tmp_path_factory.mktemp(row.name), "script", row.text)
        return run_load(lab, lab["client"], url(lab, row.manners), "--script", script, *TOLD, *row.options)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return dict(zip((row.name for row in ROWS), threads.map(one, ROWS), strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_a_script_does_is_bounded_and_named(outcomes: dict[str, dict[str, Any]], row: Row) -> None:
    report = outcomes[row.name]
    found = next((one for one in report["causes"] if one["what"].startswith(row.what)), None)
    assert found is not None, report["causes"]
    assert found["side"] == row.side
    assert row.evidence in found["evidence"]
    assert report["status"] == row.status
    assert report["seconds"] < 30


@pytest.fixture
def load(lab: Lab, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(text: str, *options: str, prefix: tuple[str, ...] = (), port: int = QUIET) -> dict[str, Any]:
        script = written(tmp_path, "script", text.replace("FOLDER", str(tmp_path)))
        # Not where the bad scripts were: what they left behind may hold a tuple for a while.
        target = f"tcp://{server_address(lab)}:{port}"
        return run_load(lab, lab["client"], target, "--script", script, *options, prefix=prefix)

    return run


def test_each_connection_has_its_session(load: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = load(GOOD, "-c", "301", "--duration", "1", "--workers", "2")
    assert (report["status"], report["held"], report["connected"], report["causes"]) == (0, 301, 301, [])
    assert (report["carrier"], report["workers"], report["script"]["sessions_ended"]) == ("asyncio", 2, 0)
    assert report["rounds_right"] == report["answer"]["count"] >= 301
    assert {path.name for path in tmp_path.glob("*.0")} == {f"{serial}.0" for serial in range(301)}
    assert report["ports"][0]["used"] == 301
    assert report["bytes_in"] > 301 * 2


def test_a_session_that_returns_is_followed_by_the_next(load: Callable[..., dict[str, Any]]) -> None:
    text = """
        async def session(connection):
            await connection.send(b"x" * 100_000)
            assert len(await connection.receive_exactly(100_000)) == 100_000
            print("said", connection.turn)
    """
    report = load(text, "-c", "20", "--duration", "1", "--fail-if", "sessions_ended < 60 or script_errors > 0")
    assert (report["status"], report["held"], report["causes"], report["failed_if"]) == (0, 20, [], [])
    assert report["script"]["sessions_ended"] >= 60
    assert report["script"]["said"].startswith("said 0"), "and none of it is in the report's JSON"
    assert len(report["script"]["said"]) <= 2_000


def test_the_rate_is_the_whole_runs(load: Callable[..., dict[str, Any]]) -> None:
    report = load(GOOD, "-c", "50", "--rate", "50", "--duration", "0.1", "--workers", "2")
    assert (report["status"], report["held"]) == (0, 50)
    assert report["ramp_s"] >= 0.9


def test_all_tuples_are_used_and_not_one_more(load: Callable[..., dict[str, Any]], lab: Lab) -> None:
    before = lab["client"].sysctl("net.ipv4.ip_local_port_range")
    lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "40000 40100")
    try:
        # A port that nobody has used yet: what rests in TIME_WAIT counts as used.
        full = load(GOOD, "-c", "101", "--duration", "0.3", "--workers", "3", port=FRESH)
        over = load(GOOD.replace('"x"', '"w"'), "-c", "150", "--duration", "0.3", "--workers", "3", port=FRESH)
    finally:
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", before)
    assert (full["status"], full["held"], full["ports"][0]["used"]) == (0, 101, 101)
    assert (over["status"], over["held"], over["stopped_by"]) == (1, 101, THIS)
    assert cause(over, error="EADDRNOTAVAIL", step="connect")["limits"][0] == "ephemeral-ports"


def test_as_many_processes_as_descriptors_need(load: Callable[..., dict[str, Any]]) -> None:
    limited = ("prlimit", "--nofile=164:164")
    report = load(GOOD, "-c", "250", "--duration", "0.3", prefix=limited)
    assert (report["status"], report["held"], report["workers"]) == (0, 250, 3)
    assert report["script"]["most_connections_each"] <= 100


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("x = 1", (), "has to set `dialogue`, or to have an `async def session(connection)`"),
        ("def session(connection): ...", (), "has to be an `async def session(connection)`"),
        ("async def session(): ...", (), "has to be an `async def session(connection)`"),
        ("async def session(", (), "cannot be run: SyntaxError"),
        ("import sys; sys.exit(5)", (), "cannot be run: SystemExit: 5"),
        ("1 / 0", (), "cannot be run: ZeroDivisionError"),
        ("async def session(connection): ...", ("--ping-every", "1"), "--ping-every"),
        ("async def session(connection): ...", ("--carrier", "epoll"), "--carrier"),
        ("async def session(connection): ...", ("-c", "30k", "--workers", "1"), "processes hold at most"),
        (
            "import __main__\nif hasattr(__main__, 'Worker'): raise RuntimeError('not here')\n"
            "async def session(connection): ...",
            (),
            "cannot be loaded in a worker: RuntimeError: not here",
        ),
    ],
)
def test_a_script_that_cannot_be_played(
    lab: Lab, tmp_path: Path, text: str, options: tuple[str, ...], named: str
) -> None:
    script = written(tmp_path, "script", text)
    command = [sys.executable, "-m", "fourtuple", "load", url(lab), "--script", script, *options]
    done = subprocess.run(
        inside(lab, lab["client"], command), capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 64, done.stdout
    assert named in " ".join(done.stderr.split())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_whatever_ends_the_run_leaves_no_process(lab: Lab, tmp_path: Path, how: signal.Signals) -> None:
    """Not even one whose script blocks, nor what a script started, unless the run itself is killed."""
    started = "subprocess.Popen(['sleep', '3600'], stdin=subprocess.DEVNULL)" if how is signal.SIGINT else ""
    text = f"""
        import subprocess, sys, time
        async def session(connection):
            with connection.round():
                await connection.send(b"x")
                await connection.receive()
            if connection.serial == 0:
                {started}
                time.sleep(3600)
            await connection.sleep(3600)
    """
    script = written(tmp_path, "script", text)
    watched = Endpoint.parse(f"{server_address(lab)}:{WATCHED}")
    command = [sys.executable, "-m", "fourtuple", "load", f"tcp://{watched}", "-c", "20", "--workers", "2", "--json"]
    with subprocess.Popen(
        inside(lab, lab["client"], [*command, "--script", script, "--duration", "600"]), stdout=subprocess.PIPE
    ) as running:
        try:
            deadline_s = time.monotonic() + RUN_S
            # Of the first worker one at least, which blocks it, and all ten of the second.
            while len(groups := children_of(running.pid)) < 2 or connections(lab, watched) < 11:
                assert running.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            time.sleep(0.5)
            running.send_signal(how)
            output, _ = running.communicate(timeout=RUN_S)
        finally:
            running.kill()
    deadline_s = time.monotonic() + 10
    while any(group_lives(group) for group in groups):
        assert time.monotonic() < deadline_s, "a process was left"
        time.sleep(0.05)
    if how is signal.SIGINT:
        report = json.loads(output)
        assert (running.returncode, report["interrupted"]) == (130, True)


def connections(lab: Lab, destination: Endpoint) -> int:
    """That the client has there."""
    return sum(flow.connections for flow in lab["client"].facts().flows if flow.destination == destination)


def children_of(pid: int) -> list[int]:
    """The workers of a run, which `nsenter` became; each leads a process group."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def group_lives(group: int) -> bool:
    """Whether a process of that group is left, other than as a zombie that waits for its parent."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False
