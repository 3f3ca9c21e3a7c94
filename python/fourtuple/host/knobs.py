"""Reading and writing one knob: a sysctl, a local route, a file. Whoever reads a knob here also writes and restores it.

Decides which knobs may be written at all: a named table, so that a plan or a journal from elsewhere cannot reach
another, whatever it says. Knows no plan, and no order. Below a root that is not "/", sysctls are plain files and there
are no routes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from enum import Enum
from ipaddress import ip_network
from pathlib import Path

from fourtuple.errors import BadConfig, FourtupleError, MissingFeature, MissingPrivilege

TUNABLE = frozenset(
    {
        "fs.epoll.max_user_watches",
        "fs.file-max",
        "fs.nr_open",
        "net.core.somaxconn",
        "net.ipv4.ip_forward",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_mem",
        "net.ipv4.tcp_tw_reuse",
        "net.ipv6.ip_nonlocal_bind",
        "net.netfilter.nf_conntrack_buckets",
        "net.netfilter.nf_conntrack_max",
        "net.netfilter.nf_conntrack_tcp_timeout_time_wait",
    }
)
"""Sysctls that a plan turns; a test holds the rules of `fourtuple.plan` to it."""

SERVICE_NAME = re.compile(r"[A-Za-z0-9:_.@-]{1,200}")
"""systemd.unit(5), without the backslash."""
FILES = re.compile(
    r"etc/sysctl\.d/60-fourtuple\.conf"
    r"|etc/modules-load\.d/60-fourtuple\.conf"
    r"|etc/systemd/system/fourtuple-addresses\.service"
    rf"|etc/systemd/system/{SERVICE_NAME.pattern}\.service\.d/60-fourtuple\.conf"
)
LARGEST_BYTES = 1 << 20
LOCAL = b"local"
"""The value of a prefix that is local; one that is not has none."""
_LOCAL_TABLE, _HOST_SCOPE, _LOOPBACK_INDEX = 255, 254, 1


class KnobKind(Enum):
    """What a knob is."""

    SYSCTL = "sysctl"
    ROUTE = "route"
    FILE = "file"


def check(kind: KnobKind, name: str, value: bytes | None) -> None:
    """BadConfig unless this knob is one that may have this value; "" and None for a value are absence."""
    allowed = ""
    match kind:
        case KnobKind.SYSCTL if name not in TUNABLE:
            allowed = f"is not a sysctl that fourtuple sets: {', '.join(sorted(TUNABLE))}"
        case KnobKind.SYSCTL if value is None or not re.fullmatch(rb"[0-9,\- \t]*\n?", value):
            allowed = "a value has digits, blanks, commas and dashes"
        case KnobKind.ROUTE if not _is_prefix(name):
            allowed = "a prefix such as 10.77.0.0/16, beyond this host's loopback, is wanted"
        case KnobKind.ROUTE if value not in (None, LOCAL):
            allowed = "a prefix is local or it is not"
        case KnobKind.FILE if not FILES.fullmatch(name) or ".." in name:
            allowed = "is not a file that fourtuple writes"
        case KnobKind.FILE if value is not None and len(value) > LARGEST_BYTES:
            allowed = f"is longer than {LARGEST_BYTES:,} bytes"
    if allowed:
        raise BadConfig(f"{kind.value} {name[:80]!r}", allowed)


def read(root: Path, kind: KnobKind, name: str) -> bytes | None:
    """The value, byte for byte; None for a file or route that is not there."""
    match kind:
        case KnobKind.SYSCTL:
            try:
                return _bytes(_sysctl(root, name))
            except FileNotFoundError:
                raise MissingFeature(_no_such_sysctl(name)) from None
            except OSError as error:
                raise MissingPrivilege(f"{name} cannot be read: {error.strerror}") from None
        case KnobKind.ROUTE:
            return LOCAL if _is_local(root, name) else None
        case KnobKind.FILE:
            try:
                return _bytes(root / name)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise BadConfig(
                    f"/{name}", f"cannot be read: {error.strerror}; fourtuple replaces plain files"
                ) from None


def write(root: Path, kind: KnobKind, name: str, value: bytes | None) -> None:
    """Set it and read it back. An error names the knob, and what the kernel or the file system said."""
    check(kind, name, value)
    try:
        match kind:
            case KnobKind.SYSCTL:
                _write_sysctl(root, name, value or b"")
            case KnobKind.ROUTE:
                _write_route(root, name, add=value is not None)
            case KnobKind.FILE:
                _write_file(root / name, value)
    except FileNotFoundError:
        raise MissingFeature(_no_such_sysctl(name)) from None
    except OSError as error:
        raise _refusal(name, value, error) from None
    found = read(root, kind, name)
    if not same(kind, name, found, value):
        why = f"{value!r} was written and {found!r} is read back: the kernel does not take this value"
        raise BadConfig(name, why)


def same(kind: KnobKind, name: str, one: bytes | None, other: bytes | None) -> bool:
    """Whether two values mean the same: the kernel folds blanks, and merges the ports of a list into ranges."""
    if kind is not KnobKind.SYSCTL or one is None or other is None:
        return one == other
    if not name.endswith("_reserved_ports"):
        return one.split() == other.split()
    return _ports(one) == _ports(other)


def made_directories(root: Path, kind: KnobKind, name: str) -> tuple[str, ...]:
    """Directories, the deepest first, that writing this file would make."""
    if kind is not KnobKind.FILE:
        return ()
    parents = [parent for parent in Path(name).parents if parent != Path()]
    return tuple(str(parent) for parent in parents if not (root / parent).exists())


def tidy(root: Path, kind: KnobKind, name: str, made: tuple[str, ...]) -> None:
    """Remove what an interrupted write may have left: its partial file, and the directories that it had made."""
    if kind is KnobKind.ROUTE or (kind is KnobKind.SYSCTL and root == Path("/")):
        return
    path = root / name if kind is KnobKind.FILE else _sysctl(root, name)
    _partial(path).unlink(missing_ok=True)
    for directory in made:
        # Not empty: something else is in it, or another of our files still is.
        with suppress(OSError):
            (root / directory).rmdir()


def replace_file(path: Path, value: bytes, mode: int = 0o644) -> None:
    """Have a file be these bytes at once or not at all, on the disk when this returns."""
    partial = _partial(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        left = memoryview(value)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.fourtuple")


def _sysctl(root: Path, name: str) -> Path:
    return root.joinpath("proc/sys", *name.split("."))


def _write_sysctl(root: Path, name: str, value: bytes) -> None:
    path, text = _sysctl(root, name), value if value.endswith(b"\n") else value + b"\n"
    if root != Path("/"):
        _bytes(path)
        replace_file(path, text)
        return
    # One write: the kernel takes each as a whole value, and a zero-length one changes nothing (catalogue A5).
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def _write_file(path: Path, value: bytes | None) -> None:
    if value is None:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_directory(path.parent)
        return
    mode = stat.S_IMODE(path.lstat().st_mode) if path.exists() else 0o644
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, value, mode)


def _bytes(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        pieces = []
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
            if sum(map(len, pieces)) > LARGEST_BYTES:
                raise OSError(errno.EFBIG, f"longer than {LARGEST_BYTES:,} bytes")
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def _is_prefix(name: str) -> bool:
    try:
        network = ip_network(name)
    except ValueError:
        return False
    # 0.0.0.0/0 as a local route would have the host take every address for its own.
    return str(network) == name and network.prefixlen > 0 and not (network.is_loopback or network.is_multicast)


def _is_local(root: Path, prefix: str) -> bool:
    if root != Path("/"):
        raise MissingFeature(f"{prefix}: there are no routes below {root}, which is not the running machine")
    from pyroute2 import IPRoute

    network = ip_network(prefix)
    family = 2 if network.version == 4 else 10
    with IPRoute() as routes:
        found = routes.get_routes(family=family, table=_LOCAL_TABLE, dst_len=network.prefixlen)
        return any(
            one.get_attr("RTA_DST") == str(network.network_address) and one["dst_len"] == network.prefixlen
            for one in found
        )


def _write_route(root: Path, prefix: str, *, add: bool) -> None:
    if _is_local(root, prefix) == add:
        return
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as routes:
            routes.route(
                "add" if add else "del",
                dst=prefix,
                family=2 if ip_network(prefix).version == 4 else 10,
                type="local",
                table=_LOCAL_TABLE,
                scope=_HOST_SCOPE,
                oif=_LOOPBACK_INDEX,
            )
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None


def _refusal(name: str, value: bytes | None, error: OSError) -> FourtupleError:
    code = errno.errorcode.get(error.errno or 0, "?")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MissingPrivilege(f"{name} cannot be changed here ({code}): root in the host's own namespaces is needed")
    if error.errno == errno.ENETDOWN:
        return BadConfig(name, "is refused, for the loopback interface is down here: ip link set lo up")
    return BadConfig(name, f"{(value or b'').decode(errors='replace').strip()!r} is refused ({code})")


def _no_such_sysctl(name: str) -> str:
    if name.startswith("net.netfilter."):
        return f"{name} does not exist before its module is loaded: modprobe nf_conntrack"
    return f"{name} does not exist here: it is the whole host's, or this kernel has none"


def _ports(value: bytes) -> set[int]:
    found: set[int] = set()
    for first, last in re.findall(rb"(\d{1,5})(?:-(\d{1,5}))?", value):
        found.update(range(int(first), int(last or first) + 1))
    return found
