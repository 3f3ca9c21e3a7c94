"""The catalogue as a table: complete, unique, documented, every signature findable, every page current."""

from __future__ import annotations

import errno
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fourtuple import limits
from fourtuple.limits import LIMITS, Limit
from fourtuple.limits.pages import page, pages

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = [
    f"{family}{number}"
    for family, entries in zip("ABCDEFGHIJKL", (22, 11, 12, 9, 3, 5, 7, 6, 7, 6, 10, 5), strict=True)
    for number in range(1, entries + 1)
]
CALLS = {
    "accept", "bind", "bpf", "clone", "connect", "dup", "epoll_create", "epoll_ctl", "inotify_init", "io_setup",
    "io_uring_register", "io_uring_setup", "listen", "mmap", "send", "sendmsg", "sendto", "setrlimit", "setsockopt",
    "socket", "unshare", "write",
}  # fmt: skip
COUNTERS_OUTSIDE_NETSTAT = {
    "arp_cache.table_fulls",
    "cgroup.memory_failcnt",
    "cgroup.memory_max",
    "cgroup.memory_oom_kill",
    "cgroup.pids_max",
    "conntrack.chaintoolong",
    "conntrack.drop",
    "conntrack.early_drop",
    "conntrack.insert_failed",
    "softnet.dropped",
    "softnet.time_squeeze",
}
each_limit = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.id)


def test_the_catalogue_is_the_103_entries_in_order() -> None:
    assert [limit.id for limit in LIMITS] == IDS
    assert len(IDS) == 103


def test_names_are_unique_and_spelt_alike() -> None:
    names = [limit.name for limit in LIMITS]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []
    assert not {name.lower() for name in names} & {limit.id.lower() for limit in LIMITS}


def test_at_least_seventy_are_held_against_a_host() -> None:
    assert sum(bool(limit.bound or limit.usage or limit.check) for limit in LIMITS) >= 70


@each_limit
def test_only_what_is_measured_or_read_in_source_is_held_against_a_host(limit: Limit) -> None:
    if not limit.evidence.gives_numbers:
        assert (limit.bound, limit.usage, limit.check) == (None, None, None)


@each_limit
def test_every_part_of_a_page_is_there(limit: Limit) -> None:
    for text in (limit.title, limit.why, limit.default, limit.formula, limit.bounds, limit.since, limit.side_effects):
        assert text.strip() == text
        assert text
        assert "  " not in text
    for parts in (limit.read, limit.hit, limit.remedies, limit.sources):
        assert parts
        assert all(parts)


@each_limit
def test_every_signature_is_one_that_can_be_seen(limit: Limit) -> None:
    for hit in limit.hit:
        assert sum(map(bool, (hit.errno, hit.log, hit.counter))) + bool(hit.note and not hit.call) >= 1
        assert sum(map(bool, (hit.errno, hit.log, hit.counter))) <= 1
        assert bool(hit.errno) == bool(hit.call)
        if hit.errno:
            assert hit.errno in errno.errorcode.values()
            assert hit.call in CALLS
        if hit.log:
            assert re.compile(hit.log)
        if hit.counter and not hit.counter.startswith("TcpExt."):
            assert hit.counter in COUNTERS_OUTSIDE_NETSTAT


def test_every_counter_of_tcp_exists_in_this_kernel() -> None:
    try:
        lines = Path("/proc/net/netstat").read_text(encoding="ascii").splitlines()
    except OSError as problem:
        pytest.skip(f"/proc/net/netstat: {problem}")
    known = {f"TcpExt.{name}" for line in lines if line.startswith("TcpExt:") for name in line.split()[1:]}
    wanted = {hit.counter for limit in LIMITS for hit in limit.hit if hit.counter.startswith("TcpExt.")}
    assert wanted - known == set()


@each_limit
def test_a_remedy_with_a_command_says_how_it_lasts(limit: Limit) -> None:
    for remedy in limit.remedies:
        assert remedy.text
        if remedy.command:
            assert remedy.persist, remedy.command
        if remedy.command.startswith("sysctl -w "):
            assert re.fullmatch(r"sysctl -w [a-z0-9_.-]+=(\S+|\"[^\"]+\")", remedy.command, re.IGNORECASE)


@each_limit
def test_references_lead_to_entries(limit: Limit) -> None:
    for reference in re.findall(r"\(([A-L]\d+)(?:,| |\))", page(limit)):
        assert reference in IDS


@each_limit
def test_a_limit_is_found_by_what_is_seen_of_it(limit: Limit) -> None:
    assert limits.by_name(limit.id) is limits.by_name(limit.name.upper()) is limit
    for hit in limit.hit:
        if hit.errno:
            assert limit in limits.suspects(hit.call, hit.errno)
            assert limit in limits.by_errno(hit.errno.lower())
        if hit.counter:
            assert limit in limits.suspects_by_counter(hit.counter)


@pytest.mark.parametrize(
    ("call", "error", "first"),
    [
        ("connect", "EADDRNOTAVAIL", ["A1", "A2", "A8", "A12", "A4"]),
        ("bind", "EADDRNOTAVAIL", ["A17"]),
        ("bind", "EADDRINUSE", ["A7"]),
        ("connect", "ETIMEDOUT", ["D1", "G1", "H3", "I1", "I3", "G4"]),
        ("connect", "ECONNREFUSED", ["G7"]),
        ("connect", "EPERM", ["K3", "K4"]),
        ("connect", "EACCES", ["K4", "H6"]),
        ("connect", "ENETUNREACH", ["H6", "H1"]),
        ("connect", "EHOSTUNREACH", ["H6", "H1"]),
        ("connect", "EAGAIN", ["K1"]),
        ("socket", "EMFILE", ["B1", "B10"]),
        ("accept4", "EMFILE", ["B1", "B10"]),
        ("accept", "ENFILE", ["B4", "B5"]),
        ("socket", "ENOBUFS", ["C1", "C6", "C8"]),
        ("socket", "ENOMEM", ["C1", "C6", "C8"]),
        ("setrlimit", "EPERM", ["B2", "B3"]),
        ("epoll_ctl", "ENOSPC", ["B7"]),
        ("unshare", "ENOSPC", ["K5"]),
        ("clone", "EAGAIN", ["J1", "J2", "J3", "J4", "J5"]),
        ("sendto", "EPERM", ["G1"]),
    ],
)
def test_an_error_leads_to_its_suspects_in_order(call: str, error: str, first: list[str]) -> None:
    assert [limit.id for limit in limits.suspects(call, error)][: len(first)] == first


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("TCP: out of memory -- consider tuning tcp_mem", "C3"),
        ("TCP: too many orphaned sockets", "E1"),
        ("TCP: request_sock_TCP: Possible SYN flooding on port 0.0.0.0:443. Sending cookies.", "D2"),
        ("VFS: file-max limit 2466170 reached", "B4"),
        ("nf_conntrack: nf_conntrack: table full, dropping packet", "G1"),
        ("nf_conntrack: nf_conntrack: table full in netns 4026531840, dropping packet", "G1"),
        ("neighbour: arp_cache: neighbor table overflow!", "H1"),
        ("ip_local_port_range: prefer different parity for start/end values.", "A2"),
        ("cgroup: fork rejected by pids controller in /system.slice/x.service", "J4"),
        ("Memory cgroup out of memory: Killed process 1 (x)", "C6"),
        ("IPv4: martian source 10.0.0.1 from 10.0.0.2, on dev eth0", "H3"),
    ],
)
def test_a_log_line_leads_to_its_limit(line: str, expected: str) -> None:
    assert limits.suspects_by_log(f"[ 12.3] {line}")[0].id == expected


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("ListenOverflows", ["D1"]),
        ("TcpExt.ListenDrops", ["D1"]),
        ("TCPReqQFullDoCookies", ["D2"]),
        ("TCPReqQFullDrop", ["D2"]),
        ("TCPTimeWaitOverflow", ["A13"]),
        ("TCPMemoryPressures", ["C3"]),
        ("PruneCalled", ["C3"]),
        ("TCPRcvQDrop", ["C3"]),
        ("TCPAbortOnMemory", ["E1", "C3"]),
        ("TCPBacklogDrop", ["C8"]),
        ("IPReversePathFilter", ["H3"]),
        ("TCPSynRetrans", ["A15", "D1", "G1"]),
        ("softnet.dropped", ["I1"]),
        ("softnet.time_squeeze", ["I2"]),
        ("conntrack.drop", ["G1"]),
        ("conntrack.insert_failed", ["G4"]),
        ("arp_cache.table_fulls", ["H1"]),
    ],
)
def test_a_counter_leads_to_its_suspects_in_order(name: str, first: list[str]) -> None:
    assert [limit.id for limit in limits.suspects_by_counter(name)][: len(first)] == first


def test_what_is_unknown_leads_nowhere() -> None:
    assert limits.by_name("no-such-limit") is None
    assert limits.suspects("connect", "") == limits.suspects("connect", "ENOSUCH") == ()
    assert limits.suspects_by_log("") == limits.suspects_by_counter("") == ()


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current() -> None:
    assert _generator().differences(REPOSITORY / "docs" / "limits") == [], "run python docs/generate.py"


def test_the_tables_of_the_recorded_run_are_current() -> None:
    assert _generator().stale_records() == [], "run python docs/generate.py"


def test_a_file_without_a_place_for_the_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 places"):
        _generator().with_record("no place", {})


def test_stale_missing_and_foreign_pages_are_found(tmp_path: Path) -> None:
    generator = _generator()
    generator.write(tmp_path)
    assert generator.differences(tmp_path) == []
    (tmp_path / "A2-ephemeral-ports.md").write_text("old")
    (tmp_path / "README.md").unlink()
    (tmp_path / "Z9-gone.md").write_text("")
    assert generator.differences(tmp_path) == ["A2-ephemeral-ports.md", "README.md", "Z9-gone.md"]
    generator.write(tmp_path)
    assert generator.differences(tmp_path) == []


@each_limit
def test_a_page_has_all_headings_and_the_index_links_it(limit: Limit) -> None:
    headings = [line[3:] for line in page(limit).splitlines() if line.startswith("## ")]
    assert headings == [
        "What it bounds",
        "How it is read",
        "Default",
        "Formula",
        "What you see",
        "Way past",
        "Since",
        "Side effects",
        "Source and evidence",
    ]
    assert f"({limit.id}-{limit.name}.md)" in pages()["README.md"]
