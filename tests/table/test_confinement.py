"""The tables of a confinement: system calls and their program, rights of Landlock; and what a file comes to."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement import (
    Confinement,
    Identity,
    Reach,
    StepName,
    landlock,
    outside,
    plan,
    reach_of,
    reach_of_registry,
    stays_readable,
)
from fourtuple.confinement.connecting import MARK
from fourtuple.confinement.model import MOST_FOLDERS, _together
from fourtuple.confinement.seccomp import CALLS, Call, left, program
from fourtuple.errors import BadConfig
from fourtuple.reaching import Reaching
from fourtuple.registry import Registry
from fourtuple.services import Match, Route, Service

ALLOW, KILL, REFUSED, ABSENT = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | errno.EPERM, 0x0005_0000 | errno.ENOSYS
HANDED_OVER = 0x7FC0_0000
AUDIT = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
PROCESS = 4_711
EVERYTHING = Confinement(bind_ports=frozenset({1}))
LEAST = Confinement(uring=False)
ASKING = Confinement(uring=False, asks=True, connect_ports=frozenset({80}))


def answer(code: bytes, machine: int, number: int, arguments: Sequence[int]) -> int:
    """What the kernel's interpreter of such programs would come to (Documentation/networking/filter.rst)."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    at, accumulator = 0, 0
    while True:
        operation, true, false, value = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                at += true if accumulator == value else false
            case 0x35:
                at += true if accumulator >= value else false
            case 0x25:
                at += true if accumulator > value else false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"operation {operation:#x}")


def fitting(row: Call) -> list[tuple[int, ...]]:
    """Arguments that a row allows, with nothing and with everything in the bits that it does not look at."""
    found = []
    for noise in (0, 2**64 - 1):
        choices: list[list[int]] = [[noise]] * 6
        for one in row.conditions:
            values = [PROCESS if value == -1 else value for value in one.values]
            choices[one.place] = [value | (noise & ~one.mask) for value in values]
            if one.is_upper:
                choices[one.place] = [value << 32 | (noise & 0xFFFF_FFFF) for value in values]
        found += list(product(*choices))
    return found


@pytest.mark.parametrize("machine", AUDIT)
@pytest.mark.parametrize("confinement", [EVERYTHING, LEAST, ASKING], ids=["everything", "least", "asking"])
def test_the_program_does_what_the_table_says(machine: str, confinement: Confinement) -> None:
    code = program(confinement, machine, PROCESS)
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4_096, "BPF_MAXINSNS"
    allowed: dict[int, list[Call]] = {}
    for row in left(confinement):
        if (number := row.number(machine)) is not None:
            allowed.setdefault(number, []).append(row)
    for number in range(520):
        rows = allowed.get(number, [])
        for row in rows:
            action = HANDED_OVER if row.is_asked else ALLOW
            assert all(answer(code, AUDIT[machine], number, some) == action for some in fitting(row)), row
        if all(row.conditions for row in rows):
            wanted = ABSENT if number == 435 or number > 462 else REFUSED
            assert answer(code, AUDIT[machine], number, [0xFEAD_BEEF] * 6) == wanted, number
    assert answer(code, AUDIT[machine] ^ 1, 0, []) == KILL
    assert answer(code, 0x4000_0003, 1, []) == KILL, "int 0x80 of a 32-bit program"
    if machine == "x86_64":
        assert answer(code, AUDIT[machine], 0x4000_0000, []) == KILL, "x32"


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (1, 2 | 0o2000000, 0), ALLOW),
        ("socket", (2, 1 | 0o4000, 6), ALLOW),
        ("socket", (2, 1, 262), REFUSED),
        ("socket", (2, 2, 0), REFUSED),
        ("socket", (16, 3, 0), REFUSED),
        ("socket", (17, 1, 0), REFUSED),
        ("clone", (0x3D0F00,), ALLOW),
        ("clone", (17,), REFUSED),
        ("clone", (0x3D0F00 | 0x1000_0000,), REFUSED),
        ("clone", (0x3D0F00 | 0x0002_0000,), REFUSED),
        ("kill", (PROCESS, 6), ALLOW),
        ("kill", (1, 0), REFUSED),
        ("kill", (2**64 - 1, 9), REFUSED),
        ("fcntl", (3, 4), ALLOW),
        ("fcntl", (3, 8), REFUSED),
        ("prctl", (15,), ALLOW),
        ("prctl", (4,), REFUSED),
        ("sendmsg", (3, 0, 0x4000), ALLOW),
        ("sendmsg", (3, 0, 0x2000_0000), REFUSED),
        ("ioctl", (0, 0x5412), REFUSED),
    ],
)
def test_some_of_it_in_plain_numbers(name: str, arguments: tuple[int, ...], wanted: int) -> None:
    numbers = {row.x86_64 for row in CALLS if row.name == name}
    (number,) = numbers
    assert number is not None
    assert answer(program(EVERYTHING, "x86_64", PROCESS), AUDIT["x86_64"], number, arguments) == wanted


def test_a_connect_is_handed_over_where_it_says_where_to() -> None:
    said = (3, 0xFFFF_0000, 16, 0, 0x7F00_0001, MARK << 32 | 4 << 16 | 80)
    for confinement, wanted in ((ASKING, HANDED_OVER), (EVERYTHING, ALLOW), (LEAST, ALLOW)):
        code = program(confinement, "x86_64", PROCESS)
        assert answer(code, AUDIT["x86_64"], 42, said) == wanted
        # To a unix socket, or by code that does not ask: that goes where this process may.
        assert answer(code, AUDIT["x86_64"], 42, (3, 0xFFFF_0000, 110, 0, 0, 0)) == ALLOW
        assert answer(code, AUDIT["x86_64"], 42, (3, 0xFFFF_0000, 110, 0, 0, MARK)) == ALLOW


@pytest.mark.parametrize("machine", AUDIT)
def test_the_numbers_are_the_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed (linux-libc-dev)")
    found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", HEADERS[machine].read_text())
    numbers = {name: int(number) for name, number in found}
    # Of the generic table, whose names differ there (__SC_3264).
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    for row in CALLS:
        number = row.number(machine)
        assert numbers.get(row.name) == number or (number is None and machine == "aarch64"), row.name


def test_rows_are_told_once() -> None:
    names = [row.name for row in CALLS]
    assert {name for name in names if names.count(name) > 1} == {"socket", "connect"}
    never = {"execve", "execveat", "fork", "ptrace", "mount", "unshare", "bpf", "setuid", "memfd_create", "pidfd_open"}
    assert not never & set(names)


def test_the_page_counts_them_right() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "confinement.md").read_text()
    rows = left(Confinement())
    names, limited = {row.name for row in rows}, {row.name for row in rows if row.conditions}
    assert f"{len(names)} system calls of some 460, {len(limited)} of them with certain arguments only" in page
    assert all(f"\n| {step.value} |" in page for step in StepName)


def test_what_landlock_takes_away_grows_with_its_abi() -> None:
    before = (0, 0, 0)
    for version in range(1, landlock.NEWEST + 1):
        now = landlock.handled(version, Confinement())
        assert all(old & new == old for old, new in zip(before, now, strict=True))
        before = now
    assert landlock.handled(1, Confinement()) == (0x1FFF, 0, 0)
    assert landlock.handled(7, Confinement()) == (0xFFFF, 3, 3)
    assert landlock.handled(9, Confinement()) == (0x1FFFF, 3, 3)
    assert landlock.handled(99, Confinement()) == (0x1FFFF, 15, 3)
    assert landlock.handled(99, Confinement(abstract=True))[2] == 2
    rights = [
        right for _, right in landlock.rules(Confinement(read=frozenset("a"), append="b", sockets=frozenset("c")))
    ]
    assert not any(right & landlock.EXECUTE for right in rights)


def test_a_gap_is_told_unless_another_step_closes_it() -> None:
    both = frozenset({StepName.MOUNTS, StepName.NETWORK})
    assert landlock.gaps(7, Confinement(), both) == ()
    assert len(landlock.gaps(7, Confinement(), frozenset())) == 4
    assert any("UDP" in gap for gap in landlock.gaps(7, Confinement(), frozenset()))
    assert not any("UDP" in gap for gap in landlock.gaps(7, Confinement(uring=False), frozenset()))
    assert any("hosts" in gap for gap in landlock.gaps(10, Confinement(connect_ports=frozenset({80})), frozenset()))
    assert not landlock.gaps(7, ASKING, both)
    assert len(landlock.gaps(1, Confinement(), frozenset())) > len(landlock.gaps(9, Confinement(), frozenset()))


FILE = b"""
[confine]
user = "www-data"
allow_folders = ["/srv/sockets"]
allow_ports = [5432]
without = ["mounts"]
[[listen]]
address = "[::]:443"
default = "unix:/run/default/socket"
[[service]]
name = "shop.example.com"
target = "unix:/run/shop/app/socket"
[[service]]
name = "db.example.com"
target = "tcp:db.internal:3306"
[[route]]
name = "*.pg.example.com"
to = "unix:/run/pg/{label}"
[[route]]
protocol = "ssh"
to = "service:shop.example.com"
"""


def test_a_file_becomes_what_is_left_to_its_broker() -> None:
    who = Identity(name="www-data", uid=33, gid=33)
    found = plan(BrokerFile.parse(FILE, "broker.toml"), log=Path("/var/log/broker"), identity=who, read=["/lib"])
    assert found == Confinement(
        read=frozenset({"/lib"}),
        append="/var/log/broker",
        sockets=frozenset({"/run/default", "/run/shop/app", "/run/pg", "/srv/sockets"}),
        connect_ports=frozenset({3306, 5432}),
        identity=who,
        without=frozenset({StepName.MOUNTS}),
    )
    assert Confinement.from_json(found.as_json) == found
    assert Confinement.from_json(ASKING.as_json) == ASKING
    assert plan(BrokerFile.parse(FILE, ""), inherited=False).bind_ports == {443}


def test_a_registry_becomes_what_is_left_to_its_broker(tmp_path: Path) -> None:
    with Registry(tmp_path / "store") as registry:
        registry.add(
            [
                Service(name="one.example.com", target="unix:/run/one/a b,c"),
                Service(name="two.example.com", target='unix:/run/two"/x'),
                Service(name="three.example.com", target="unix:@three"),
                Service(name="four.example.com", target="tcp:[::1]:80"),
            ]
        )
        registry.add_route(Route(match=Match(name="*.example.com"), to="unix:/run/users/{label}/socket"))
        found = plan(BrokerFile(), registry=registry)
        assert found.sockets == {"/run/one", '/run/two"', "/run/users"}
        assert found.write == {str(tmp_path / "store")}
        assert found.abstract
        assert found.connect_ports == {80}
        assert not outside(found, "unix:/run/one/other")
        assert not outside(found, "unix:/run/users/a/socket")
        assert outside(found, "unix:/run/onex/socket")
        assert outside(found, "tcp:127.0.0.1:81")
        assert not outside(found, "tcp:127.0.0.1:80")
        assert outside(Confinement(), "unix:@name")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('sandbox = "on"', "one of 'auto', 'required', 'off' is needed, not 'on'"),
        ('group = "www-data"', "needs a user"),
        ('sandbox = "required"\nwithout = ["seccomp"]', "requires them all"),
        ('allow_folders = ["run"]', "no absolute path"),
        ('allow_folders = ["/run/../etc"]', "no absolute path"),
        ("allow_ports = [0]", "allow_ports[0]: int >= 1 is needed, not 0"),
        ('without = ["identity"]', "one of 'mounts', 'network'"),
    ],
)
def test_what_a_file_may_not_say(text: str, why: str) -> None:
    with pytest.raises(BadConfig, match=re.escape(why)):
        BrokerFile.parse(f"[confine]\n{text}\n".encode(), "broker.toml")


def test_off_leaves_the_user_to_be_changed() -> None:
    file = BrokerFile.parse(b'[confine]\nsandbox = "off"\n', "broker.toml")
    assert plan(file).without == set(StepName) - {StepName.IDENTITY}


@pytest.mark.parametrize(
    ("sandbox", "target", "served", "asks"),
    [
        ("required", "tcp:127.0.0.1:80", True, True),
        # Nobody would make them; all are the kernel's; nothing is to be connected to; nor can a name be asked for.
        ("required", "tcp:127.0.0.1:80", False, False),
        ("auto", "tcp:127.0.0.1:80", True, False),
        ("required", "unix:/run/a/socket", True, False),
        ("required", "unix:@name", True, False),
    ],
)
def test_who_makes_connections(sandbox: str, target: str, served: bool, asks: bool) -> None:
    text = f'[confine]\nuser = "33"\nsandbox = "{sandbox}"\n[[listen]]\naddress = "127.0.0.1:9"\ndefault = "{target}"\n'
    found = plan(BrokerFile.parse(text.encode(), "broker.toml"), served=served)
    assert found.asks is asks
    assert outside(found, "tcp:127.0.0.1:81") is not asks


@given(st.lists(st.lists(st.sampled_from("ab-"), min_size=1, max_size=4), min_size=1, max_size=40))
def test_folders_taken_together_still_hold_all(parts: list[list[str]]) -> None:
    folders = frozenset("/" + "/".join(one) for one in parts)
    found = _together(folders)
    assert not any(one != other and one.startswith(other + "/") for one in found for other in found)
    assert all(not outside(Confinement(sockets=found), f"unix:{folder}/socket") for folder in folders)


def test_very_many_folders_become_few() -> None:
    folders = frozenset(f"/run/tenants/{number}/run" for number in range(100_000)) | {"/run/other"}
    assert _together(folders) == {"/run/other", "/run/tenants"}
    assert len(_together(frozenset(f"/{number}/a" for number in range(10_000)))) > MOST_FOLDERS


def test_targets_that_are_no_place() -> None:
    assert reach_of(["service:shop", "unix:/socket", "unix:/{label}"]).folders == {"/"}


_LABEL = st.text("abcx-", min_size=1, max_size=3).filter(lambda text: text.strip("-") == text)
_SERVICES = st.lists(
    st.builds(
        lambda name, target, wide_port, options: Service(
            name=name, target=target.replace("NAME", name), wide_port=wide_port, **options
        ),
        name=_LABEL,
        target=st.one_of(
            st.builds("unix:/{}NAME/{}".format, st.sampled_from(("", "run/", "run/x")), _LABEL),
            st.builds("unix:/{}{}".format, st.sampled_from(("", "run/", "run/x/y/")), st.sampled_from(("NAME", "é.s"))),
            st.just("unix:@NAME"),
            st.builds("tcp:{}:{}".format, st.sampled_from(("10.0.0.1", "[::1]", "db.x")), st.integers(1, 65_535)),
        ),
        wide_port=st.none(),
        options=st.fixed_dictionaries(
            {},
            optional={
                "patience_ms": st.integers(0, 9),
                "connections": st.integers(1, 9),
                "start": st.sampled_from(("a", "long-name")),
            },
        ),
    ),
    unique_by=lambda service: service.name,
    max_size=8,
)


@given(services=_SERVICES, has_wide_ports=st.booleans())
def test_the_reach_of_a_registry_is_that_of_its_targets(services: list[Service], has_wide_ports: bool) -> None:
    if has_wide_ports:
        services = [replace(service, wide_port=number) for number, service in enumerate(services, 1)]
    routes = [Route(match=Match(name="*.pg"), to="unix:/pg/{label}"), Route(match=Match(name="x.y"), to="tcp:[::2]:7")]
    with TemporaryDirectory(prefix="fourtuple-test-") as folder, Registry(Path(folder) / "store") as registry:
        registry.add(services)
        registry.add_routes(routes)
        expected = reach_of([service.target for service in services] + [route.to for route in routes])
        assert reach_of_registry(registry) == expected
        beside = Reaching(Path(folder) / "store")
        found = beside.join(wanted=True)
        assert found is not None
        assert reach_of_registry(registry, Reach.of_services(found)) == expected
        assert beside.join(wanted=True) is None


def test_a_walk_that_is_not_wanted_tells_nothing_and_no_error(tmp_path: Path) -> None:
    assert Reaching(tmp_path / "nowhere").join(wanted=False) is None
    with pytest.raises(BadConfig, match="nowhere"):
        Reaching(tmp_path / "nowhere").join(wanted=True)


@pytest.mark.parametrize(
    ("mode", "who", "is_readable"),
    [
        (0o700, (0, 0, ()), True),
        (0o700, (7, 0, ()), False),
        (0o750, (7, 5, ()), True),
        (0o750, (7, 6, (5,)), True),
        (0o705, (7, 5, ()), False),
        (0o705, (7, 6, ()), True),
        (0o701, (7, 6, ()), False),
        (0o077, (0, 5, ()), False),
    ],
)
def test_what_is_loaded_later_has_to_be_readable_by_who_it_then_is(
    mode: int, who: tuple[int, int, tuple[int, ...]], is_readable: bool
) -> None:
    """Without a capability: root of no capability reads what is its own, or everybody's."""
    uid, gid = os.geteuid(), os.getegid()
    other = Identity(name="x", uid=uid + who[0], gid=gid + who[1], groups=tuple(gid + one for one in who[2]))
    # Everybody gets there; where tests have their folders, perhaps not.
    with TemporaryDirectory(prefix="fourtuple-test-", dir="/var/tmp") as name:
        (outer := Path(name)).chmod(0o711)
        (library := outer / "library").mkdir()
        if uid == 0:
            os.chown(library, 0, gid + 5)
        elif 5 in (who[1], *who[2]):
            pytest.skip("only root gives a folder to another group")
        library.chmod(mode)
        assert stays_readable(other, [str(library)]) is is_readable
        outer.chmod(0o700)
        assert stays_readable(other, [str(library)]) is (is_readable and who[0] == 0)
        library.chmod(0o700)


def test_what_is_not_there_cannot_be_read_later(tmp_path: Path) -> None:
    assert not stays_readable(None, [str(tmp_path / "nowhere")])
