"""What `fourtuple run` accepts and refuses, and that its library accepts the same; no connection is made here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourtuple.cli import Exit
from fourtuple.cli.main import main
from fourtuple.errors import BadConfig, MissingFeature
from fourtuple.facts import Address
from fourtuple.host.programs import read_program
from fourtuple.preload import (
    HANDOFF,
    LIBRARY,
    MODE,
    MOST_HANDOFFS,
    MOST_RANGES,
    PORTS,
    PRELOAD,
    SOURCES,
    SOURCES_OTHERWISE,
    Handoffs,
    Sources,
    environment,
    require_loadable,
)
from fourtuple.tuples import AddressSet

TRUE = shutil.which("true") or "/bin/true"


def complaint_of_library(variables: dict[str, str | bytes]) -> str:
    """Standard error of a program that the library was loaded into; the program itself says nothing and succeeds."""
    known = {b"PATH": os.environb[b"PATH"], PRELOAD.encode(): os.fsencode(LIBRARY)}
    known |= {name.encode(): os.fsencode(value) for name, value in variables.items()}
    done = subprocess.run([TRUE], env=known, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
    return done.stderr.decode(errors="replace")


# Sources.

parts = st.one_of(
    st.builds(IPv4Address, st.integers(0x0100_0000, 0xDFFF_FFFF)).map(str),
    st.builds(IPv6Address, st.integers(0x2000 << 112, 0x3FFF << 112)).map(str),
    st.builds("{}-{}".format, st.builds(IPv4Address, st.integers(0, 2**32 - 1)), st.just("198.51.100.1")),
    st.builds("10.{}.0.0/{}".format, st.integers(0, 300), st.integers(0, 40)),
    st.builds("2001:db8:{:x}::/{}".format, st.integers(0, 2**17), st.integers(0, 140)),
    st.text("0123456789abcdef:./-, ", max_size=30),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(parts, max_size=5).map(",".join))
@example("10.0.0.1-10.0.0.0")
@example("::1,127.0.0.1")
@example("126.0.0.0-128.255.255.255")
@example("::2-::fffe:ffff:ffff")
@example("ffff::")
@example("10.0.0.0/08")
@example(",".join(f"10.0.{number}.1" for number in range(MOST_RANGES)))
def test_what_the_command_accepts_the_library_accepts(text: str) -> None:
    try:
        found = Sources.parse([text]).environment()
    except BadConfig:
        return
    assert complaint_of_library({SOURCES: found[SOURCES]}) == ""


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300).filter(lambda value: b"\0" not in value))
@example(b"")
@example(b"0.0.0.0/0")
@example(b"10.0.0.0/-1")
@example(b"10.0.0.1," * 1000)
@example("10.0.0.१".encode())
@example(b"fe80::1%eth0")
def test_any_bytes_leave_a_program_as_it_was(value: bytes) -> None:
    said = complaint_of_library({SOURCES: value})
    assert said == "" or said.startswith("fourtuple: FOURTUPLE_SOURCES ")


@pytest.mark.parametrize("value", ["", "1", "0-9", "9-1", "1-65536", "a-b", "1-2-3", "-1-5", "1024 65535"])
def test_any_ports_leave_a_program_as_it_was(value: str) -> None:
    said = complaint_of_library({SOURCES: "10.0.0.1", PORTS: value})
    assert said.startswith("fourtuple: FOURTUPLE_PORTS needs LOW-HIGH")


def test_both_families_and_both_ways_of_saying_more() -> None:
    sources = Sources.parse(["10.0.0.0/31,fd81::/64", "10.0.0.2"], "40000-49999")
    old = {"HOME": "/", PRELOAD: "other.so:" + str(LIBRARY), PORTS: "1-2"}
    assert environment(old, sources) == {
        "HOME": "/",
        PRELOAD: f"{LIBRARY}:other.so",
        SOURCES: "10.0.0.0-10.0.0.2,fd81::-fd81::ffff:ffff:ffff:ffff",
        PORTS: "40000-49999",
    }
    assert PORTS not in environment({PORTS: "1-2"}, Sources.parse(["10.0.0.1"])), "an outer one's ports are not ours"


@pytest.mark.parametrize(
    ("addresses", "ports", "says"),
    [
        ("10.0.0.1/8", None, "host bits"),
        ("10.0.0.1,", None, "None of them empty".lower()),
        ("0.0.0.0", None, "no connection can come from 0.0.0.0"),
        ("239.0.0.1", None, "no connection can come from 239.0.0.1"),
        ("::ffff:10.0.0.1", None, "no connection can come from ::ffff:"),
        ("localhost", None, "ADDRESS"),
        (",".join(f"10.0.{number}.1" for number in range(65)), None, "65 separate ranges; up to 64 are allowed"),
        ("10.0.0.1", "0-9", "a port is"),
        ("10.0.0.1", "9-1", "goes upward"),
        ("10.0.0.1", "1-2,5-6", "one range is allowed"),
    ],
)
def test_a_mistake_is_named(addresses: str, ports: str | None, says: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Sources.parse([addresses], ports)
    assert caught.value.path == ("--range" if ports else "--from")
    assert says in caught.value.why


def test_a_source_has_to_be_local() -> None:
    own = [
        Address(interface="eth0", address="192.0.2.7", prefix_length=24),
        Address(interface="lo", address="10.81.0.0", prefix_length=16, any_ip=True),
    ]
    Sources.parse(["192.0.2.7,10.81.0.0/16,127.9.9.9,::1"]).require_local(own)
    with pytest.raises(BadConfig, match=r"not an address of this host: 192\.0\.2\.0-192\.0\.2\.6, 192\.0\.2\.8"):
        Sources.parse(["192.0.2.0/24"]).require_local(own)
    with pytest.raises(BadConfig, match="fd81::/64 dev lo"):
        Sources.parse(["2001:db8::1"]).require_local(own)


def test_ports_have_to_be_within_the_hosts_range() -> None:
    Sources.parse(["10.0.0.1"], "32768-60999").require_within(32_768, 60_999)
    Sources.parse(["10.0.0.1"]).require_within(1, 1)
    with pytest.raises(BadConfig, match="32768-60999 here"):
        Sources.parse(["10.0.0.1"], "32767-60999").require_within(32_768, 60_999)


# Programs.


def compiled(folder: Path, compiler: str, *words: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian: {'musl-tools' if 'musl' in compiler else 'gcc'})")
    program = folder / "program"
    (folder / "program.c").write_text("int main(void) { return 0; }\n")
    subprocess.run([compiler, *words, "-o", program, folder / "program.c"], check=True, timeout=60)
    return program


def refusal(path: Path) -> str:
    with pytest.raises(MissingFeature) as caught:
        require_loadable(path, SOURCES_OTHERWISE)
    assert "SNAT" in str(caught.value), "what can be done instead"
    return str(caught.value)


def test_this_python_is_loadable() -> None:
    assert require_loadable(Path(sys.executable), "").libc in ("glibc", "musl")


def test_a_static_program(tmp_path: Path) -> None:
    assert "is linked statically" in refusal(compiled(tmp_path, "gcc", "-static"))


def test_a_program_of_another_libc(tmp_path: Path) -> None:
    program = compiled(tmp_path, "musl-gcc")
    assert read_program(program).libc == "musl"
    if read_program(Path(sys.executable)).libc == "musl":
        pytest.skip("this Python uses musl, too")
    assert "uses musl" in refusal(program)


def test_a_program_for_another_processor(tmp_path: Path) -> None:
    program = tmp_path / "program"
    content = bytearray(Path(sys.executable).resolve().read_bytes()[:65_536])
    content[18:20] = (243).to_bytes(2, sys.byteorder)  # EM_RISCV
    program.write_bytes(content)
    assert "another processor" in refusal(program)


def test_a_program_in_go() -> None:
    program = shutil.which("hey") or shutil.which("go")
    if program is None:
        pytest.skip("no program written in Go is installed (Debian: hey)")
    assert read_program(Path(program)).made_by_go
    refusal(Path(program))


def test_a_program_that_takes_on_rights(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy(TRUE, program)
    require_loadable(program, "")
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user needs root")
    os.chown(program, 65_534, -1)
    program.chmod(0o4755)
    assert "takes on other rights" in refusal(program)


def test_a_script_is_what_runs_it(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable} -I\nprint(1)\n")
    assert require_loadable(script, "").path == Path(sys.executable)
    static = compiled(tmp_path, "gcc", "-static")
    script.write_text(f"#!{static}\n")
    assert f"{script} runs {static}, which is linked statically" in refusal(script)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(10), b"\x7fELF\x02\x01" + b"\xff" * 90, b"echo\n", b"#!\n", b"#! "],
)
def test_what_is_no_program(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises((BadConfig, MissingFeature)):
        require_loadable(path, "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_program_is_read_or_refused(damage: list[tuple[int, int]]) -> None:
    content = bytearray(Path(TRUE).read_bytes())
    for place, value in damage:
        content[place] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with suppress(BadConfig):
            read_program(Path(file.name))


def test_a_script_that_runs_itself(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    with pytest.raises(BadConfig, match="names no program"):
        require_loadable(script, "")


# Handoffs.

listeners = st.one_of(
    st.builds("{}:{}".format, st.builds(IPv4Address, st.integers(0, 2**32 - 1)), st.integers(0, 70_000)),
    st.builds("[{}]:{}".format, st.builds(IPv6Address, st.integers(0, 2**128 - 1)), st.integers(1, 65_535)),
    st.text("0123456789abcdef:./-,=[]% ", max_size=30),
    st.text(max_size=150).map("/run/{}".format),
)
paths = st.text(max_size=120).map("/run/{}".format)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds("{}={}".format, listeners, paths), min_size=1, max_size=4))
@example(["0.0.0.0:80=/run/web", "[::]:80=/run/web", "/run/web.sock=/run/web"])
@example(["[::ffff:10.0.0.1]:80=/run/web"])
@example(["[fe80::1%lo]:80=/run/web"])
@example(["127.0.0.1:80= /run/web "])
@example(["127.0.0.1:80=/run/" + "ä" * 52, "127.0.0.1:81=/run/" + "ä" * 51])
@example([f"127.0.0.1:{1 + number}=/run/web" for number in range(MOST_HANDOFFS)])
@example([f"127.0.0.1:{1 + number}=/run/web" for number in range(MOST_HANDOFFS + 1)])
def test_handoffs_that_the_command_accepts_the_library_accepts(texts: list[str]) -> None:
    try:
        found = Handoffs.parse(texts, "660").environment()
    except BadConfig:
        return
    assert complaint_of_library({HANDOFF: found[HANDOFF], MODE: found[MODE]}) == ""


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300).filter(lambda value: b"\0" not in value))
@example(b"")
@example(b"127.0.0.1:80=/run/" + b"a" * 200)
@example(b"127.0.0.1:80=/run/a," * 17)
@example(b"127.0.0.1:80=/run/\xff")
def test_any_bytes_for_handoffs_leave_a_program_as_it_was(value: bytes) -> None:
    said = complaint_of_library({HANDOFF: value})
    assert said == "" or said.startswith("fourtuple: FOURTUPLE_HANDOFF ")


@pytest.mark.parametrize("value", ["", "8", "1000", "-1", "+6", "rw"])
def test_any_mode_leaves_a_program_as_it_was(value: str) -> None:
    said = complaint_of_library({HANDOFF: "127.0.0.1:80=/run/web", MODE: value})
    assert said.startswith("fourtuple: FOURTUPLE_HANDOFF_MODE needs permissions")


def test_handoffs_go_with_sources_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handoffs = Handoffs.parse(["127.0.0.1:80=web", "/run/web.sock=/run/web"])
    expected = {PRELOAD: str(LIBRARY), HANDOFF: f"127.0.0.1:80={tmp_path}/web,/run/web.sock=/run/web"}
    assert environment({MODE: "666"}, handoffs) == expected, "an outer one's mode is not ours"
    both = environment({}, Sources.parse(["10.0.0.1"]), handoffs)
    assert both == expected | {SOURCES: "10.0.0.1"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1:80", "LISTENER=PATH is needed"),
        ("80=/run/web", "`ss -ltn`"),
        ("localhost:80=/run/web", "`ss -ltn`"),
        ("127.0.0.1:0=/run/web", "`ss -ltn`"),
        ("[fe80::1%lo]:80=/run/web", "one link only"),
        ("127.0.0.1:80=", "no path for a socket"),
        ("127.0.0.1:80=/run/a=b", "no path for a socket"),
        ("127.0.0.1:80=/run/a,b", "no path for a socket"),
        ("127.0.0.1:80=/run/" + "a" * 103, "107 bytes"),
        ("/run/web=/run/web", "the same on both sides"),
    ],
)
def test_a_mistake_in_a_handoff_is_named(text: str, says: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Handoffs.parse([text])
    assert caught.value.path == "--handoff"
    assert says in caught.value.why


# The command.


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--from", "127.0.0.1", "--", "no-such-program"], Exit.USAGE, "'no-such-program' is not found"),
        (["--from", "10.0.0.1/8", "--", "true"], Exit.USAGE, "--from: '10.0.0.1/8'"),
        (["--from", "127.0.0.1", "--range", "x", "--", "true"], Exit.USAGE, "--range: 'x'"),
        (["--from", "127.0.0.1"], Exit.USAGE, "Missing argument"),
        (["--", "true"], Exit.USAGE, "--from ADDRESSES or --handoff LISTENER=PATH is needed"),
        (["--range", "1-2", "--handoff", "127.0.0.1:80=/run/a", "--", "true"], Exit.USAGE, "--from is needed"),
        (["--mode", "660", "--from", "127.0.0.1", "--", "true"], Exit.USAGE, "--handoff is needed"),
        (["--mode", "9", "--handoff", "127.0.0.1:80=/run/a", "--", "true"], Exit.USAGE, "--mode: '9'"),
        (["--handoff", "80=/run/a", "--", "true"], Exit.USAGE, "--handoff: '80'"),
        (["--handoff", "[::1]:80=/a", "--handoff", "[0::1]:80=/b", "--", "true"], Exit.USAGE, "is there twice"),
        (["--by", "cgroup", "--handoff", "127.0.0.1:80=/run/a", "--", "true"], Exit.USAGE, "not possible with --by"),
        (["--from", "127.0.0.1", "--", ""], Exit.USAGE, "'' is not found"),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], arguments: list[str], status: Exit, says: str) -> None:
    assert main(["run", *arguments]) == status
    captured = capsys.readouterr()
    assert (captured.out, says in captured.err) == ("", True), captured.err


def test_what_can_be_done_instead_is_what_was_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = str(compiled(tmp_path, "gcc", "-static"))
    assert main(["run", "--handoff", "127.0.0.1:80=/run/a", "--", program]) == Exit.UNABLE
    assert 'delivery = "relay"' in capsys.readouterr().err.replace("\n", " ")
    assert main(["run", "--from", "127.0.0.1", "--", program]) == Exit.UNABLE
    assert "SNAT" in capsys.readouterr().err


def test_a_set_of_sources_is_one_of_each_family() -> None:
    assert Sources.parse(["10.0.0.1", "10.0.0.1"]).addresses == (AddressSet.parse("10.0.0.1"),)
