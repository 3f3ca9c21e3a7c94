"""The command line of doctor and limits: exit statuses, output, and files and terminals that mean harm."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourtuple.cli import Exit, count
from fourtuple.cli.doctor import LARGEST_HOST_BYTES, RoleName, load_host
from fourtuple.cli.main import main
from fourtuple.errors import BadConfig
from fourtuple.facts import Host, Role
from fourtuple.host.sysctls import is_known
from fourtuple.limits import LIMITS

SOURCES = Path(__file__).parents[2] / "python"
HOSTS = Path(__file__).parents[1] / "hosts"
STOCK, EXHAUSTED = str(HOSTS / "stock_distribution.json"), str(HOSTS / "exhausted_client.json")
ENVIRONMENT = {"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"], "COLUMNS": "100"}


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - passed on
    """The real command in a process of its own."""
    settings: dict[str, Any] = {"env": ENVIRONMENT, "capture_output": True, "timeout": 60, "check": False} | options
    return subprocess.run([sys.executable, "-m", "fourtuple", *arguments], text=True, **settings)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a usage error."""
    assert main(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.startswith("fourtuple: ")
    return captured.err


# Exit statuses.


def test_exit_status_tells_health(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--host", STOCK]) == Exit.HEALTHY
    assert "HEALTHY" in capsys.readouterr().out
    assert main(["doctor", "--host", EXHAUSTED]) == Exit.CRITICAL
    assert "CRITICAL" in capsys.readouterr().out
    assert main(["doctor", "--host", STOCK, "--role", "server", "--connections", "2M"]) == Exit.WARNING
    shown = capsys.readouterr().out
    assert "2,000,000 connections wanted" in shown
    assert "1,021" in shown


def test_usage_errors_are_no_critical_findings() -> None:
    assert Exit.USAGE not in (Exit.HEALTHY, Exit.WARNING, Exit.CRITICAL)
    ran = run("doctor", "--nonsense")
    assert ran.returncode == 64
    assert "No such option" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["doctor", "--role", "king"], ["--role", "'king'", "client-one"]),
        (["doctor", "--connections", "many"], ["--connections", "'many'", "2M"]),
        (["doctor", "--connections", "0"], ["--connections", "'0'", "from 1"]),
        (["doctor", "--sources", "-1"], ["--sources", "'-1'"]),
        (["doctor", "--to", "9" * 50], ["--destinations", "2^64 - 1"]),
        (["doctor", "--pid", "x"], ["--pid", "'x'"]),
        (["doctor", "--pid", "0"], ["--pid", "there is no process 0"]),
        (["doctor", "--pid", "4194305"], ["--pid", "there is no process"]),
        (["doctor", "--pid", "1", "--host", STOCK], ["--pid", "--host"]),
        (["doctor", "--host", "-", "--since", "-"], ["--since", "once"]),
        (["doctor", "--host", "/nowhere/h.json"], ["/nowhere/h.json", "No such file"]),
        (["doctor", "--host", "/"], ["cannot be read", "Is a directory"]),
        (["doctor", "--host", ""], ["cannot be read"]),
        (["doctor", "--host", STOCK, "--save", "/nowhere/h.json"], ["--save", "/nowhere/h.json", "No such file"]),
        (["limits", "show", "ephemeral-prots"], ["ephemeral-prots", "ephemeral-ports"]),
        (["limits", "show"], ["NAME"]),
        (["limits", "errno", "EWHAT"], ["'EWHAT'", "EADDRNOTAVAIL"]),
        (["lmits"], ["lmits"]),
    ],
)
def test_wrong_use_names_the_option_the_value_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    message = complaint(capsys, *arguments)
    for word in words:
        assert word.lower() in message.lower()


@pytest.mark.parametrize(
    ("text", "number"),
    [("65535", 65_535), ("65,535", 65_535), ("65_535", 65_535), ("100k", 100_000), ("2M", 2_000_000)],
)
def test_counts(text: str, number: int) -> None:
    assert count(text) == number


@given(text=st.text(max_size=40))
def test_any_count_is_a_number_or_refused(text: str) -> None:
    try:
        number = count(text)
    except ValueError:
        return
    assert 1 <= number < 2**64


# Host files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["JSON"]),
        (b"{", ["JSON"]),
        (b"\x7fELF\0\0\xff\xfe", ["JSON"]),
        (b"null", ["object", "None"]),
        (b"[]", ["object", "[]"]),
        (b"{}", ["kernel", "required"]),
        (b"[" * 100_000, ["JSON"]),
        (b'{"kernel": {"release": "x", "version": [-1], "architecture": "x"}}', ["kernel.version.0", "-1"]),
        (b'{"kernel": 1e999}', ["kernel"]),
        (b'{"sysctl": {"a": ' + b"9" * 10_000 + b"}}", ["number out of range"]),
        (b'{"ke\\u001b[31mrnel": 1}', ["required"]),
    ],
)
def test_a_malformed_file_is_named_with_its_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, words: list[str]
) -> None:
    file = tmp_path / "host.json"
    file.write_bytes(content)
    message = complaint(capsys, "doctor", "--host", str(file))
    assert str(file) in message
    assert "\x1b" not in message
    assert len(message) < 1_000
    for word in words:
        assert word in message


def test_every_prefix_of_a_host_file_is_refused(tmp_path: Path) -> None:
    whole = Path(STOCK).read_bytes().rstrip()
    file = tmp_path / "host.json"
    for end in range(0, len(whole) - 1, 97):
        file.write_bytes(whole[:end])
        with pytest.raises(BadConfig, match=r"host\.json"):
            load_host(str(file))


def test_other_schema_versions_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    file.write_text(json.dumps(json.loads(Path(STOCK).read_text()) | {"schema_version": 2}))
    assert "schema_version: 2" in complaint(capsys, "doctor", "--host", str(file))


def test_a_file_of_a_gigabyte_is_refused_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 30)
    began = time.monotonic()
    assert "16 MiB" in complaint(capsys, "doctor", "--host", str(file))
    assert "16 MiB" in complaint(capsys, "doctor", "--host", "/dev/zero")
    assert time.monotonic() - began < 10
    assert LARGEST_HOST_BYTES == 16 << 20


def test_a_host_comes_through_a_pipe() -> None:
    ran = run("doctor", "--host", "-", input=Path(EXHAUSTED).read_text())
    assert ran.returncode == Exit.CRITICAL
    assert "28,100 of 28,200" in ran.stdout


GOOD: dict[str, Any] = json.loads(Path(EXHAUSTED).read_text())
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(["-1", "9" * 4_000, "1 2 3", "0 0", "65535 1", "-5 70000", "\x1b[2J", "1e9", "max", "\u0663"]),
    st.lists(st.integers(-9, 70_000), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A good host in which some values, at any depth, are something else."""
    document: dict[str, Any] = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(1, 4))):
        node: Any = document
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or draw(st.integers(0, 3)) == 0:
                if draw(st.integers(0, 9)) == 0:
                    del node[key]
                else:
                    node[key] = draw(odd)
                break
            node = node[key]
    return document


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=mutated())
def test_any_host_file_is_diagnosed_or_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, document: dict[str, Any]
) -> None:
    file = tmp_path / "host.json"
    file.write_text(json.dumps(document))
    status = main(["doctor", "--host", str(file), "--myths"])
    captured = capsys.readouterr()
    assert status in (Exit.HEALTHY, Exit.WARNING, Exit.CRITICAL, Exit.USAGE)
    assert "\x1b" not in captured.out + captured.err
    assert (status == Exit.USAGE) == bool(captured.err)


NUMBERS = ["-1", "0", "9" * 4_000, "1 2 3", "0 0", "65535 1", "-5 70000", "18446744073709551615", "7 7"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.sampled_from(sorted(GOOD["sysctl"])), st.text(max_size=20) | st.sampled_from(NUMBERS), max_size=8
    )
)
def test_odd_sysctls_are_diagnosed(capsys: pytest.CaptureFixture[str], tmp_path: Path, values: dict[str, str]) -> None:
    # Valid files all: whatever a strange kernel answers, there is a diagnosis.
    file = tmp_path / "host.json"
    file.write_text(json.dumps(GOOD | {"sysctl": GOOD["sysctl"] | values}))
    assert main(["doctor", "--host", str(file), "--json"]) in (Exit.HEALTHY, Exit.WARNING, Exit.CRITICAL)
    assert json.loads(capsys.readouterr().out)["roles"]


def test_a_host_file_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J[bold red]markup[/bold red]\u202e"
    document = json.loads(json.dumps(GOOD))
    document |= {"label": evil, "unread": {evil: evil}, "rule_limits": [evil]}
    document["kernel"]["release"] = document["process"]["name"] = document["flows"][0]["source"] = evil
    document["isolation"]["container"] = evil
    file = tmp_path / "host.json"
    file.write_text(json.dumps(document))
    assert main(["doctor", "--host", str(file), "--myths"]) in (Exit.WARNING, Exit.CRITICAL)
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert "[bold red]markup" in shown, "markup is text"


# Saving, comparing, JSON.


def test_save_then_host_is_the_same_diagnosis(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    status = main(["doctor", "--save", str(file), "--json"])
    here = json.loads(capsys.readouterr().out)
    assert main(["doctor", "--host", str(file), "--json"]) == status
    assert json.loads(capsys.readouterr().out) == here
    assert [path.name for path in tmp_path.iterdir()] == ["host.json"]


def test_save_to_standard_output_prints_facts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--host", STOCK, "--save", "-"])
    assert Host.model_validate_json(capsys.readouterr().out) == load_host(STOCK)


def test_since_shows_what_rose(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    later = tmp_path / "later.json"
    document = json.loads(Path(STOCK).read_text())
    document["counters"]["TcpExt.ListenOverflows"] += 7
    later.write_text(json.dumps(document))
    assert main(["doctor", "--host", str(later), "--since", STOCK]) == Exit.WARNING
    assert "TcpExt.ListenOverflows rose by 7: accept-queue" in capsys.readouterr().out


def test_roles_and_counts_reach_the_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    assert [name.name for name in RoleName] == [role.name for role in Role]
    main(
        [
            "doctor",
            "--host",
            STOCK,
            "--role",
            "client-many",
            "--role",
            "proxy",
            "--sources",
            "2",
            "--to",
            "10",
            "--json",
        ]
    )
    goals = [role["goal"] for role in json.loads(capsys.readouterr().out)["roles"]]
    assert [(it["role"], it["sources"], it["destinations"]) for it in goals] == [
        (Role.CLIENT_MANY.value, 2, 10),
        (Role.PROXY.value, 2, 10),
    ]


def test_the_doctor_of_this_machine_takes_less_than_it_may() -> None:
    began = time.perf_counter()
    ran = run("doctor")
    took = time.perf_counter() - began
    assert ran.returncode in (Exit.HEALTHY, Exit.WARNING, Exit.CRITICAL), ran.stderr
    for role in Role:
        assert role.value in ran.stdout
    print(f"fourtuple doctor: {took:.2f} s wall, load {os.getloadavg()[0]:.1f}")


def test_pid_of_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["sleep", "60"], preexec_fn=lower_descriptors) as child:
        try:
            main(["doctor", "--pid", str(child.pid), "--role", "server"])
        finally:
            child.kill()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"as process {child.pid} sleep" in shown
    # 77 soft, of which standard input, output and error are open, and what pytest handed down.
    assert "77 soft - " in shown


def lower_descriptors() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))


# The terminal.


def test_a_reader_that_leaves_is_success() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = run("doctor", "--host", EXHAUSTED, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (Exit.HEALTHY, "")


def test_a_full_disk_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        ran = run("limits", "list", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == Exit.OUTPUT
    assert os.strerror(errno.ENOSPC) in ran.stderr
    assert "Traceback" not in ran.stderr


def in_terminal(**environment: str) -> bytes:
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "fourtuple", "doctor", "--host", EXHAUSTED],
        env=ENVIRONMENT | {"TERM": "xterm-256color"} | environment,
        stdin=child,
        stdout=child,
        stderr=child,
    ) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65_536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.wait(60) == Exit.CRITICAL
    os.close(parent)
    return shown


def test_colour_is_for_terminals_that_want_it() -> None:
    assert b"\x1b[1;31mCRITICAL" in in_terminal()
    assert b"\x1b[31" not in in_terminal(NO_COLOR="1")
    assert "\x1b" not in run("doctor", "--host", EXHAUSTED).stdout


def test_an_old_terminal_gets_ascii() -> None:
    ran = run("limits", "list", env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert ran.returncode == 0, ran.stderr


def test_interrupted_is_130() -> None:
    code = "import fourtuple.host.reader as r, sys\ndef stop(*_, **__): raise KeyboardInterrupt\n"
    code += "import fourtuple.host; fourtuple.host.read_host = stop\nfrom fourtuple.cli.main import main\n"
    ran = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['doctor']))"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (Exit.INTERRUPTED, "")


def test_without_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    # The first run imports what the second needs: the interpreter itself may lie where only root can read it.
    code = (
        "import os, sys\nfrom fourtuple.cli.main import main\n"
        "sys.stdout = open(os.devnull, 'w'); main(['doctor']); sys.stdout = sys.__stdout__\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nsys.exit(main(['doctor']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode in (Exit.HEALTHY, Exit.WARNING, Exit.CRITICAL), ran.stderr
    assert "uid 65534" in ran.stdout
    assert "Could not read" in ran.stdout
    assert "nft" in ran.stdout
    assert ran.stderr == ""


# The catalogue.


def test_the_list_names_every_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [it["id"] for it in listed] == [limit.id for limit in LIMITS]
    assert main(["limits"]) == 0
    shown = capsys.readouterr().out
    assert all(limit.name in shown for limit in LIMITS)


def test_every_limit_has_a_page_by_name_and_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    for limit in LIMITS:
        assert main(["limits", "show", limit.name]) == 0
        by_name = capsys.readouterr().out
        assert main(["limits", "show", limit.id.lower()]) == 0
        assert capsys.readouterr().out == by_name
        assert limit.title in by_name


def test_an_error_leads_to_its_suspects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", "errno", "EADDRNOTAVAIL", "--call", "connect", "--json"]) == 0
    names = [it["name"] for it in json.loads(capsys.readouterr().out)]
    # The order of catalogue section 4: the tuple is full, then poisoned ports, then TIME_WAIT.
    assert names.index("ephemeral-ports") < names.index("poisoned-ports") < names.index("time-wait")
    assert main(["limits", "errno", "24"]) == 0
    assert "EMFILE (24): Too many open files" in capsys.readouterr().out
    assert main(["limits", "errno", "EXDEV"]) == 0
    assert "No limit in the catalogue" in capsys.readouterr().out


def test_every_sysctl_that_a_limit_reads_is_read_from_the_host() -> None:
    pattern = re.compile(r"\b(?:net|fs|kernel|vm|user)\.[a-z0-9_*-]+(?:\.[a-z0-9_*-]+)*")
    named = {name for limit in LIMITS for text in limit.read for name in pattern.findall(text)}
    assert len(named) > 40
    # Settings of interfaces are written with braces, which the pattern stops at.
    assert {name for name in named - {"net.ipv4.conf"} if not is_known(name)} == set()


def test_help_is_quick_and_documents_exit_statuses() -> None:
    ran = run("doctor", "--help")
    assert ran.returncode == 0
    assert "0 healthy, 1 warning, 2 critical; 64" in " ".join(ran.stdout.split())
    probe = "import sys; from fourtuple.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True
    )
    for heavy in ("'pydantic'", "'fourtuple.limits'", "'pyroute2'"):
        assert heavy not in loaded.stdout
