"""The registry from Python and from the command line: rows and text in and out, errors, other processes, full disks."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fourtuple.cli.main import main
from fourtuple.errors import BadConfig, LimitReached
from fourtuple.registry import Counts, Registry, usual_path
from fourtuple.services import Delivery, Match, Route, Seen, Service

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line on a registry of its own: status, output, errors."""
    monkeypatch.setenv("FOURTUPLE_STORE", str(tmp_path / "store"))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["services", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def service(name: str, target: str = "unix:/run/a", **more: Any) -> Service:  # noqa: ANN401 - handed on
    return Service(name=name, target=target, **more)


def test_what_was_put_is_there(registry: Registry) -> None:
    full = service("B.x", delivery=Delivery.HANDOFF, wide_port=70_000, patience_ms=0, connections=5)
    assert registry.add([full, service("a", "tcp:[::1]:80", proxy=2)]) == Counts(added=2)
    assert registry.set([service("a", "tcp:db.example:1")]) == Counts(replaced=1)
    assert list(registry.services()) == [service("a", "tcp:db.example:1"), full]
    assert list(registry.services(after="a")) == [full]
    assert registry.service("b.X.") == registry.service_at(70_000) == full
    assert ("b.x" in registry, "c" in registry, len(registry)) == (True, False, 2)
    assert registry.remove(["a", "c"]) == ["c"]
    with pytest.raises(BadConfig, match="already"):
        registry.add([full])


def test_closed_and_absent_ones(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no registry"):
        Registry(tmp_path / "none", create=False)
    with Registry(tmp_path / "one") as registry:
        pass
    with pytest.raises(BadConfig, match="closed"):
        len(registry)
    for bad in (0, 1 << 50, True, "1"):
        with pytest.raises(BadConfig, match="most_bytes"):
            Registry(tmp_path / "one", most_bytes=bad)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below", "\0"):
        with pytest.raises(BadConfig, match="store"):
            Registry(path)


def test_routes(registry: Registry) -> None:
    registry.add([service("www")])
    routes = [
        Route(match=Match(name="www.example", path="/api/"), to="service:www"),
        Route(match=Match(database="*"), to="unix:/db/{database}", delivery=Delivery.HANDOFF, connections=9),
        Route(to="service:www"),
    ]
    registry.add_routes(routes)
    assert [route.to for route in registry.routes()] == [route.to for route in routes]
    found = registry.resolve(Seen(database=b"orders"))
    assert (found.kind, found.target, found.delivery) == ("found", "unix:/db/orders", Delivery.HANDOFF)
    assert registry.resolve(Seen(database=b"../x")).kind == "refused"
    assert registry.resolve(Seen(name=b"www.example", path=b"/api")).service == "www"
    registry.remove(["www"])
    assert registry.resolve(Seen()).kind == "no-service"
    assert registry.remove_route(Match())
    assert not registry.remove_route(Match())
    assert registry.resolve(Seen()).kind == "no-route"
    with pytest.raises(BadConfig, match="there is no service"):
        registry.add_route(Route(to="service:nobody"))
    with pytest.raises(BadConfig, match="already"):
        registry.add_route(routes[1])
    registry.add_route(routes[1], replace=True)


ROWS = 'name,target\na,unix:/a\nstraße.de,unix:/ü\nb,"unix:/x,y"\n'


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("text_format", ["csv", "jsonl"])
def test_text_in_and_out(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, block_bytes: int, text_format: str
) -> None:
    monkeypatch.setattr("fourtuple.registry._BLOCK_BYTES", block_bytes)
    objects = (
        {"name": "a", "target": "unix:/a"},
        {"target": "unix:/ü", "name": "straße.de"},
        {"name": "b", "target": "unix:/x,y"},
    )
    lines = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in objects)
    text = {"csv": ROWS, "jsonl": lines}[text_format]
    told: list[Counts] = []
    counts = registry.import_text(io.BytesIO(text.encode()), text_format, batch_rows=2, progress=told.append)
    assert (counts.added, counts.replaced) == (3, 0)
    assert told[-1] == counts
    assert [one.target for one in registry.services()] == ["unix:/a", "unix:/x,y", "unix:/ü"]
    assert "xn--strae-oqa.de" in registry
    again = b"".join(registry.export_text(text_format))
    assert registry.import_text(io.BytesIO(again), text_format).replaced == 3
    assert b"".join(registry.export_text(text_format)) == again


def test_an_error_keeps_whole_transactions(registry: Registry) -> None:
    text = b"a,unix:/a\nb,unix:/b\nc,unix:/c\nd,nowhere\n"
    with pytest.raises(BadConfig, match="line 4, target"):
        registry.import_text(io.BytesIO(text), "csv", batch_rows=2)
    assert [one.name for one in registry.services()] == ["a", "b"]
    with pytest.raises(BadConfig, match="already"):
        registry.import_text(io.BytesIO(text[:20]), "csv", replace=False)
    for bad in (b"\xff,unix:/a\n", "ä/b,unix:/a\n".encode(), b"x" * 3_000_000, b"a\0,unix:/a"):
        with pytest.raises(BadConfig, match="line 1"):
            registry.import_text(io.BytesIO(bad), "csv")
    with pytest.raises(BadConfig, match="format"):
        registry.import_text(io.BytesIO(), "xml")
    assert len(registry) == 2


def test_a_full_registry(tmp_path: Path) -> None:
    with Registry(tmp_path / "small", most_bytes=1 << 20) as small:
        small.add([service("first")])
        with pytest.raises(LimitReached, match="registry-size"):
            small.add(service(f"s{number}") for number in range(50_000))
        assert "first" in small


def test_another_process_sees_a_change_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from fourtuple.registry import Registry; r = Registry(sys.argv[1]); print(flush=True)\n"
        "for line in sys.stdin: print(r.version, line.strip() in r, flush=True)"
    )
    with (
        Registry(tmp_path / "r") as registry,
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "r")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        for number in range(20):
            registry.add([service(f"s{number}")])
            other.stdin.write(f"s{number}\n")
            other.stdin.flush()
            assert other.stdout.readline().split() == [str(registry.version), "True"]
        other.stdin.close()


def test_after_fork_it_says_what_to_do(registry: Registry) -> None:
    registry.add([service("a")])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            registry.service("a")
        except BadConfig as refused:
            os.write(writer, str(refused).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        assert "fork" in said.read()
    assert "a" in registry


def test_a_full_disk_keeps_what_was_committed(tmp_path: Path) -> None:
    program = """
import io, sys
from fourtuple.registry import Registry
from fourtuple.errors import LimitReached
registry = Registry(sys.argv[1] + "/registry")
rows = [f"s{number:06},unix:/run/s{number:06}\\n" for number in range(200_000)]
try:
    registry.import_text(io.BytesIO("".join(rows).encode()), "csv", batch_rows=5_000)
except LimitReached as full:
    print(full.limit, len(registry) % 5_000, len(registry) > 0, "s000000" in registry, flush=True)
registry.close()
registry = Registry(sys.argv[1] + "/registry", create=False)
print(sum(1 for _ in registry.services()) == len(registry))
try:
    Registry(sys.argv[1] + "/another")
except Exception as full:
    print(type(full).__name__)
"""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed (util-linux)")
    script = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    namespaces = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-root-user"]
    command = ["unshare", *namespaces, "sh", "-c", script, "sh", str(tmp_path), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.split("\n")[:3] == ["disk-space 0 True True", "True", "LimitReached"], done.stdout + done.stderr


def test_ctrl_c_leaves_whole_transactions(tmp_path: Path) -> None:
    program = "import sys; from fourtuple.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "services", "import", "-", "--format", "csv", "--batch", "1000"]
    arguments = [*command, "--store", str(tmp_path / "r")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as importing:
        assert importing.stdin is not None
        for number in range(60_000):
            importing.stdin.write(f"s{number},unix:/run/s{number}\n")
        importing.stdin.flush()
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            try:
                with Registry(tmp_path / "r", create=False) as registry:
                    if len(registry):
                        break
            except BadConfig:
                time.sleep(0.05)
        # One that comes right before read() begins is seen when that returns, which is never: so it comes again.
        for _ in range(6):
            importing.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                importing.wait(10)
                break
        said = importing.stdout.read() if importing.stdout else ""
        importing.stdin.close()
        assert importing.wait(60) == 130
    with Registry(tmp_path / "r", create=False) as registry:
        assert len(registry) % 1_000 == 0
        assert said.startswith(f"{len(registry):,} services added")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOURTUPLE_STORE", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert usual_path() == Path("/var/lib/fourtuple/registry")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert usual_path() == Path("/state/fourtuple/registry")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert usual_path() == Path.home() / ".local/state/fourtuple/registry"
    monkeypatch.setenv("FOURTUPLE_STORE", "/x")
    assert usual_path() == Path("/x")


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    assert run("list")[0] == 64
    assert run("add", "Bücher.example", "unix:/run/b.sock", "--wide-port", "70000")[0] == 0
    status, _, error = run("add", "bücher.example", "unix:/run/c.sock")
    assert status == 64
    assert "set replaces it" in error
    assert "before: " in run("set", "bücher.example", "unix:/run/c.sock", "--wide-port", "70000")[1]
    assert json.loads(run("show", "70000", "--json")[1])["target"] == "unix:/run/c.sock"
    (tmp_path / "broker.toml").write_text(
        '[[service]]\nname = "a.b"\ntarget = "tcp:[::1]:1"\n[[route]]\nname = "*.c"\nto = "unix:/run/{label}"\n'
    )
    assert run("import", str(tmp_path / "broker.toml"))[1].startswith("1 services added, 0 replaced, 1 routes")
    assert [json.loads(line)["name"] for line in run("list", "--json")[1].splitlines()] == [
        "a.b",
        "xn--bcher-kva.example",
    ]
    assert run("list", "--under", "b")[1].split()[0] == "a.b"
    assert len(run("list", "--limit", "1")[1].splitlines()) == 1
    assert run("export", str(tmp_path / "all.jsonl"))[0] == 0
    assert run("export")[1].startswith("name,target,")
    assert run("remove", "a.b", "nobody")[0] == 1
    assert "1 services added, 1 replaced" in run("import", str(tmp_path / "all.jsonl"))[1]
    assert json.loads(run("status", "--json")[1])["services"] == 2
    assert run("check", str(tmp_path / "broker.toml"))[0] == 0
    assert run("show", "nobody")[0] == 1


def test_routes_on_the_command_line(run: Run) -> None:
    run("add", "www", "unix:/run/www", "--delivery", "handoff")
    assert run("route", "add", "service:www", "--name", "www.example.com", "--path", "/api")[0] == 0
    assert run("route", "add", "unix:/db/{database}", "--database", "*", "--patience-ms", "5")[0] == 0
    assert (
        "www -> unix:/run/www  handoff" in run("route", "match", "--name", "WWW.example.com", "--path", "/api/x?y")[1]
    )
    assert json.loads(run("route", "match", "--database", "x", "--json")[1])["patience_ms"] == 5
    assert run("route", "match", "--source", "10.0.0.1:5", "--alpn", "h2")[:2] == (
        1, "no-route: nothing matches, and there is no default\n",
    )  # fmt: skip
    assert len(run("route", "list", "--json")[1].splitlines()) == 2
    assert run("route", "remove", "--database", "*")[0] == 0
    assert run("route", "remove", "--database", "*")[0] == 1
    assert run("route", "remove")[0] == 64


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("add", "a", "b"), "target"), (("add", "a/b", "unix:/a"), "name"),
        (("add", "a", "tcp:[::1]:1", "--delivery", "x"), "--delivery"),
        (("add", "a", "unix:/a", "--wide-port", "0"), "wide_port"),
        (("import", "x.xml"), "--format"), (("import", "x"), "--format"),
        (("import", "/nowhere.csv"), "FILE"), (("check", "/nowhere.toml"), "/nowhere.toml"),
        (("list", "--store", ""), "--store"),
        (("route", "match", "--source", "x"), "--source"), (("route", "add", "x"), "to"), (("show", "a b"), "name"),
        (("list", "--under", "a b"), "--under"),
    ],
)  # fmt: skip
def test_bad_options_are_named(run: Run, arguments: tuple[str, ...], named: str) -> None:
    run("add", "there", "unix:/a")
    status, _, error = run(*arguments)
    assert status == 64
    assert named in error
    assert "Traceback" not in error


def test_an_export_that_cannot_be_empties_no_file(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "broker.toml"
    mine.write_text("mine")
    run("add", "there", "unix:/a")
    status, _, error = run("export", str(mine))
    assert (status, "format" in error, mine.read_text()) == (64, True, "mine")


def test_completion(run: Run) -> None:
    from fourtuple.cli.services import complete_names

    assert complete_names("a") == []
    for name in ("a", "ab", "b"):
        run("add", name, "unix:/a")
    assert complete_names("a") == ["a", "ab"]
    assert complete_names("") == ["a", "ab", "b"]
