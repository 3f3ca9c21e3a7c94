"""Killing whatever holds a lab, at any moment, leaves the host as it was.

`kill_somewhere` starts a command, kills one process of its tree at a random moment and compares the host before and
after. A process belongs to the tree if it carries a mark in its environment, which survives any change of parent.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import pytest

import fourtuple
from fourtuple.lab import leftovers
from fourtuple.prove import STEPS

MARK = "FOURTUPLE_KILL_TEST"
KILLS = int(os.environ.get("FOURTUPLE_KILLS", "10"))
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
PACKAGE_PARENT = Path(fourtuple.__file__ or "").parents[1]

VOLATILE_SYSCTLS = {
    "fs/aio-nr",
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-nr",
    "fs/inode-state",
    "net/netfilter/nf_conntrack_count",
}
"""Counters among the settings: they change by themselves."""

LAB_AT_WORK = """
import time
from ipaddress import ip_address
from fourtuple.lab import Lab
from fourtuple.tuples import AddressSet, Endpoint
end = time.monotonic() + 4
while time.monotonic() < end:
    with Lab(("client", "server")) as lab:
        client, server = lab["client"], lab["server"]
        server.add_any_ip("10.82.0.0/16")
        client.add_any_ip("fd81::/64")
        client.add_addresses(AddressSet.parse("10.91.0.1-10.91.0.100"))
        client.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        client.set_sysctl("net.ipv4.tcp_tw_reuse", 1)
        server.listen(Endpoint(ip_address("0.0.0.0"), 80), backlog=1000)
        further = client.another()
        for _ in range(500):
            further.connect_once(Endpoint.parse("10.82.1.1:80"), source=ip_address("10.91.0.7"), keep=True)
        time.sleep(0.2)
"""
"""Wiring, sysctls, sockets and further processes over and over, so that a random moment may be any of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """What a run could leave behind on this host, as text that can be compared."""

    links: frozenset[str]
    addresses_and_routes: frozenset[str]
    sysctls: dict[str, str]
    named_namespaces: frozenset[str]
    firewall: str
    files: frozenset[str]

    @classmethod
    def now(cls) -> HostState:
        """Read it, in this process's namespaces."""
        return cls(
            links=frozenset(name for _, name in socket.if_nameindex()),
            addresses_and_routes=_routes(),
            sysctls=_sysctls(),
            named_namespaces=_named_namespaces(),
            firewall=_firewall(),
            files=_files(),
        )

    def differences(self, before: HostState) -> list[str]:
        """What is not as it was before, one line each; settings of modules loaded meanwhile are not changes."""
        found = []
        for row in fields(self):
            old, new = getattr(before, row.name), getattr(self, row.name)
            if isinstance(old, dict):
                found += [f"{name}: {old[name]!r} -> {new.get(name)!r}" for name in old if old[name] != new.get(name)]
            elif isinstance(old, frozenset):
                found += [f"{row.name}: {'+' if one in new else '-'} {one}" for one in sorted(old ^ new)]
            elif old != new:
                found.append(f"{row.name}: {old!r} -> {new!r}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What was done to whom, and what came of it."""

    victim: str
    how: signal.Signals
    after_s: float
    gone_after_s: float
    leftovers: list[str]

    def __str__(self) -> str:
        left = f", left {self.leftovers}" if self.leftovers else ""
        done = f"{self.how.name} to {self.victim} after {self.after_s:.2f} s"
        return f"{done}; all gone {self.gone_after_s:.2f} s later{left}"


def kill_somewhere(command: Sequence[str], chance: random.Random, *, within_s: float, patience_s: float) -> Kill:
    """Start a command, send a random signal to a random process of its tree within `within_s`, and see what is left.

    A victim may ignore the signal (an agent ignores SIGINT) and the command then goes on: after `patience_s` the
    command itself gets SIGINT, and as long again to end. Whatever is left then is listed, and killed.
    """
    before = HostState.now()
    mark = secrets.token_hex(8)
    after_s = chance.uniform(0.0, within_s)
    how = chance.choice(SIGNALS)
    with tempfile.TemporaryFile() as output:
        environment = {**os.environ, MARK: mark, "PYTHONPATH": str(PACKAGE_PARENT)}
        root = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        time.sleep(after_s)
        victim = chance.choice(_marked(mark) or [root.pid])
        name = "the command" if victim == root.pid else _command_line(victim)
        with suppress(ProcessLookupError):
            os.kill(victim, how)
        killed_s = time.monotonic()
        if not _ended(root, mark, patience_s):
            root.send_signal(signal.SIGINT)
            _ended(root, mark, patience_s)
        gone_after_s = time.monotonic() - killed_s
    left = [f"process {pid}: {_command_line(pid)}, namespaces {_namespaces(pid)}" for pid in _marked(mark)]
    for pid in _marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    root.poll()
    left += HostState.now().differences(before)
    return Kill(victim=name, how=how, after_s=after_s, gone_after_s=gone_after_s, leftovers=left)


PROVE = ["-m", "fourtuple", "prove", "--quick", "--only", "one-port", "--only", "descriptors", "--only", "server"]
"""Three labs: twenty thousand sockets in the first second, two hundred thousand a few seconds later."""
OTHER_STEPS = {"exhaust": 6.0, "addresses": 5.0, "listeners": 3.0, "cliff": 5.0}
"""The other steps by themselves, and how long each is at work at least."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kills_wanted", "within_s"),
    [
        (["-c", LAB_AT_WORK], -(-KILLS // 2), 2.0),
        (PROVE, KILLS, 5.0),
        *(([*PROVE[:4], "--only", step], -(-KILLS // 5), within_s) for step, within_s in OTHER_STEPS.items()),
    ],
    ids=["lab", "prove", *OTHER_STEPS],
)
def test_random_kills_leave_nothing(command: list[str], kills_wanted: int, within_s: float) -> None:
    seed = int(os.environ.get("FOURTUPLE_SEED", str(random.randrange(2**32))))
    print(f"FOURTUPLE_SEED={seed}")
    chance = random.Random(seed)
    kills = []
    for _ in range(kills_wanted):
        kills.append(kill_somewhere([sys.executable, *command], chance, within_s=within_s, patience_s=3.0))
        print(kills[-1])
    assert [str(kill) for kill in kills if kill.leftovers] == []
    assert leftovers() == ()


def test_every_step_of_the_proof_is_killed() -> None:
    named = {name for option, name in pairwise(PROVE) if option == "--only"}
    assert named | set(OTHER_STEPS) == {step.name for step in STEPS}


def test_an_agent_ends_in_the_middle_of_an_operation_when_its_lab_is_killed() -> None:
    """The accept queue is full and connect() waits; the agent looks at no request, and ends all the same."""
    script = """
from ipaddress import ip_address
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint
with Lab(("client", "server")) as lab:
    lab["server"].listen(Endpoint(ip_address("10.77.0.2"), 80), backlog=1)
    outcome = "ok"
    while outcome == "ok":
        outcome = lab["client"].connect_once(Endpoint.parse("10.77.0.2:80"), timeout_s=0.2, keep=True)
    print(outcome, flush=True)
    lab["client"].connect_once(Endpoint.parse("10.77.0.2:80"), timeout_s=60)
"""
    mark = secrets.token_hex(8)
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(PACKAGE_PARENT)}
    lab = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert lab.stdout is not None
    with lab.stdout:
        assert lab.stdout.readline() == "ETIMEDOUT\n"
    time.sleep(0.2)
    assert len(_marked(mark)) == 3
    lab.kill()
    assert _ended(lab, mark, 2.0), [_command_line(pid) for pid in _marked(mark)]


def test_the_comparison_sees_what_is_left() -> None:
    before = HostState.now()
    assert before.differences(before) == []
    changed = HostState(
        links=before.links | {"veth-left"},
        addresses_and_routes=frozenset(sorted(before.addresses_and_routes)[1:]),
        sysctls={**before.sysctls, "net/ipv4/ip_forward": "changed", "net/new": "1"},
        named_namespaces=before.named_namespaces,
        firewall="table inet left",
        files=before.files,
    )
    kinds = {line.split(":")[0] for line in changed.differences(before)}
    assert {"links", "net/ipv4/ip_forward", "firewall"} <= kinds
    assert not any("net/new" in line for line in changed.differences(before))


def test_a_process_that_escaped_its_parent_is_still_found() -> None:
    mark = secrets.token_hex(8)
    script = "(setsid sleep 30 &) ; exit 0"
    subprocess.run(["sh", "-c", script], env={**os.environ, MARK: mark}, check=True)
    deadline = time.monotonic() + 5.0
    found: list[int] = []
    while not found and time.monotonic() < deadline:  # in the middle of its exec it has no environment for a moment
        found = _marked(mark)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert len(found) == 1


def _ended(root: subprocess.Popen[str] | subprocess.Popen[bytes], mark: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while root.poll() is None or _marked(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _marked(mark: str) -> list[int]:
    """Living processes with this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with suppress(OSError):
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
    return found


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f"process {pid}"
    return words.replace("\n", " ")[-60:]


def _namespaces(pid: int) -> list[str]:
    with suppress(OSError):
        return [str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "user", "mnt")]
    return []


def _routes() -> frozenset[str]:
    lines: list[str] = []
    for name in ("route", "if_inet6", "fib_trie"):
        with suppress(OSError):
            lines += [f"{name} {line}" for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    with suppress(OSError):
        for line in Path("/proc/net/ipv6_route").read_text().splitlines():
            words = line.split()
            lines.append("ipv6_route " + " ".join([*words[:6], *words[8:]]))  # without the use counts
    return frozenset(lines)


def _sysctls() -> dict[str, str]:
    found = {}
    for top in ("net", "fs"):
        for path in Path("/proc/sys", top).rglob("*"):
            name = str(path.relative_to("/proc/sys"))
            if name not in VOLATILE_SYSCTLS and not name.startswith("fs/quota/"):
                with suppress(OSError):
                    found[name] = path.read_text(errors="replace")
    return found


def _named_namespaces() -> frozenset[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    names = {line.split()[4] for line in mounts if " - nsfs " in line}
    with suppress(OSError):
        names |= {str(path) for path in Path("/run/netns").iterdir()}
    return frozenset(names)


def _firewall() -> str:
    if os.geteuid() != 0 or shutil.which("nft") is None:
        return ""
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, timeout=10).stdout


def _files() -> frozenset[str]:
    places = (Path("/tmp"), Path("/run"), Path("/dev/shm"), Path.cwd())
    return frozenset(str(path) for place in places for path in place.glob("*fourtuple*"))
