"""What a machine is, may become, and what somebody wants of it: `Host` (facts, JSON round trip), `Change`, `Goal`.

Decides which facts exist, their types and units. Knows nothing of how they are read (`host/`) or what they mean
(`limits/`). A fact that could not be read is None (or absent from its mapping), and `unread` says why; the doctor never
guesses it. Every model is frozen and validated, so a `host.json` from elsewhere is either a `Host` or a clear error.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fourtuple.tuples import Endpoint

LARGEST = 2**64 - 1
"""No number of a kernel interface is larger; a larger one in a file is garbage, and would only make arithmetic slow."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Total = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
"""A counter: some that the kernel keeps as signed numbers go below zero for a moment."""
UNLIMITED = None
"""An rlimit or cgroup limit of "infinity" or "max" is None inside a fact that was read."""


class Facts(BaseModel):
    """Base of all fact models: frozen, and strict about unknown fields, so that a typing error in a file is seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Kernel(Facts):
    """The running kernel. `release` as uname says it ("6.18.44-amd64"); `version` its numbers, (0,) if not parsable."""

    release: str
    version: tuple[Count, ...]
    architecture: str
    page_bytes: Count = 4096


class Machine(Facts):
    """Processors and memory, in bytes; None where /proc/meminfo does not say."""

    cpus: Count
    memory_total_bytes: Count | None = None
    memory_available_bytes: Count | None = None
    slab_unreclaimable_bytes: Count | None = None


class RLimit(Facts):
    """One resource limit; None is unlimited."""

    soft: Count | None
    hard: Count | None


class Process(Facts):
    """The process that was examined: this one, or the one of `--pid`."""

    pid: Count
    name: str = ""
    rlimits: dict[str, RLimit] = {}
    """By the name in getrlimit(2) without RLIMIT_: NOFILE, NPROC, MEMLOCK, ..."""
    open_descriptors: Count | None = None
    threads: Count | None = None
    effective_uid: Count = 0
    capabilities: tuple[str, ...] = ()
    """Effective ones, CAP_NET_ADMIN style."""


class Cgroup(Facts):
    """The tightest limits from the process's cgroup to the root, v1, v2 or both mixed."""

    version: int
    path: str = ""
    memory_max_bytes: Count | None = None
    memory_current_bytes: Count | None = None
    memory_reclaimable_bytes: Count | None = None
    """Of the current: page cache and reclaimable slab (memory.stat inactive_file + active_file + slab_reclaimable)."""
    memory_socket_bytes: Count | None = None
    pids_max: Count | None = None
    pids_current: Count | None = None
    kmem_tcp_limit_bytes: Count | None = None
    kmem_tcp_usage_bytes: Count | None = None
    kmem_tcp_failures: Count | None = None


class Isolation(Facts):
    """Where the process stands: which container runtime, and whether its namespaces are the host's own."""

    container: str | None = None
    initial_network_namespace: bool | None = None
    initial_user_namespace: bool | None = None
    seccomp: bool | None = None


class Sockets(Facts):
    """Sockets in this network namespace; `*_host` numbers are host-wide even when read inside (catalogue L1)."""

    tcp_in_use: Count | None = None
    tcp6_in_use: Count | None = None
    time_wait: Count | None = None
    orphans_host: Count | None = None
    allocated_host: Count | None = None
    memory_pages_host: Count | None = None
    by_state: dict[str, Count] = {}
    """TCP sockets by state name (ESTABLISHED, TIME_WAIT, CLOSE_WAIT, BOUND_INACTIVE, ...)."""


class Flow(Facts):
    """Connections that share all but the source port: the group whose size is bounded by the source ports."""

    source: str
    destination: Endpoint
    connections: Count
    """In any state that holds the tuple, TIME_WAIT included."""
    time_wait: Count = 0
    """Of them, those in TIME_WAIT: net.ipv4.tcp_tw_reuse may give their tuples away (A12)."""


class Listener(Facts):
    """A listening TCP socket: `queue` connections wait, at most `backlog` (+1) may."""

    local: Endpoint
    queue: Count
    backlog: Count


class Address(Facts):
    """A local address, or (prefix) a whole local route that makes each of its addresses bindable (AnyIP, A17)."""

    interface: str
    address: str
    prefix_length: Count
    any_ip: bool = False


class Conntrack(Facts):
    """Connection tracking as seen from this namespace. `active` is None when it cannot be told from here."""

    loaded: bool
    active: bool | None = None
    count: Count | None = None
    maximum: Count | None = None
    buckets: Count | None = None


class SourceNat(Facts):
    """A rule that rewrites source addresses: `addresses` it may use (0 for masquerade: the interface's own)."""

    table: str
    rule: str
    addresses: Count
    ports: tuple[int, int] | None = None


class IoUring(Facts):
    """Whether io_uring can be used by this process; `reason` says why not."""

    available: bool
    reason: str = ""
    direct_descriptors: bool = False
    multishot: bool = False


class Host(Facts):
    """What is known of a machine as one process sees it; `model_validate_json` reads what `model_dump_json` wrote."""

    schema_version: int = 1
    label: str = ""
    origin: str = "recorded"
    """"recorded" on a machine, or "constructed" from documentation (then `label` says from which)."""
    taken_at: str = ""
    kernel: Kernel
    machine: Machine
    process: Process
    isolation: Isolation = Isolation()
    cgroup: Cgroup | None = None
    sysctl: dict[str, str] = {}
    """Raw text by dotted name, whitespace folded to one blank: "net.ipv4.ip_local_port_range" -> "32768 60999"."""
    sockets: Sockets = Sockets()
    flows: tuple[Flow, ...] = ()
    """The largest groups first, at most 64."""
    listeners: tuple[Listener, ...] = ()
    """At most 4,096; ports of all of them are in `poisoned_ports` where they are in range."""
    addresses: tuple[Address, ...] = ()
    poisoned_ports: tuple[tuple[int, int], ...] | None = None
    """First and last of each run of ephemeral ports that automatic choice skips (A8); None if not probed."""
    conntrack: Conntrack = Conntrack(loaded=False)
    source_nat: tuple[SourceNat, ...] = ()
    rule_limits: tuple[str, ...] = ()
    """Firewall rules that bound connections by themselves (ct count, connlimit, limit rate), as text (G7)."""
    io_uring: IoUring = IoUring(available=False, reason="not tried")
    features: dict[str, bool] = {}
    """Tried, not guessed from the version: bind_address_no_port, local_port_range, bound_inactive, ..."""
    counters: dict[str, Total] = {}
    """Totals since this namespace began: "TcpExt.ListenOverflows", "softnet.dropped", "conntrack.insert_failed", ..."""
    unread: dict[str, str] = {}
    """What could not be read, and why: {"dmesg": "needs CAP_SYSLOG"}."""

    def sysctl_int(self, name: str) -> int | None:
        """The value of a one-number sysctl; None if it was not read or is not a whole number."""
        numbers = self.sysctl_ints(name)
        return numbers[0] if len(numbers) == 1 else None

    def sysctl_ints(self, name: str) -> tuple[int, ...]:
        """The values of a sysctl of whole numbers; empty if it was not read or is anything else."""
        try:
            numbers = tuple(int(word) for word in self.sysctl[name].split())
        except (KeyError, ValueError):
            return ()
        return numbers if all(abs(number) <= LARGEST for number in numbers) else ()


class Role(Enum):
    """What the host does with its connections; the port term of the arithmetic depends on it (catalogue section 1)."""

    CLIENT_ONE = "client to one destination"
    CLIENT_MANY = "client to many destinations"
    SERVER = "server on one port"
    PROXY = "proxy"
    NAT = "NAT box"


class Goal(Facts):
    """What is wanted of a host: a role and its numbers. `connections` None asks for the ceiling."""

    role: Role
    connections: Count | None = None
    sources: Annotated[int, Field(ge=1, le=2**128)] = 1
    """Source addresses that the program uses (one, unless it binds; A18)."""
    destinations: Annotated[int, Field(ge=1, le=2**144)] = 1
    """Distinct (address, port) pairs connected to; for a proxy, its backends."""
    bytes_queued: Count = 0
    """Unread or unsent bytes per connection that the kernel has to hold."""
    user_bytes: Count = 0
    """Memory of the program itself per connection."""
    descriptors_per_connection: Count = 1
    """0 for io_uring direct descriptors."""
    threads_per_connection: Count = 0
    """0 for an event loop."""
    ipv6: bool = False
    uses_epoll: bool = True
    accepts: bool = True
    """Server: whether the program accepts; if not, the accept queue is all there is (D1)."""
    backlog: Count | None = None
    """What the program passes to listen(); None is "at least somaxconn"."""
    binds_first: bool = False
    """Client: bind() before connect() without IP_BIND_ADDRESS_NO_PORT (A7)."""
    searches_all_ports: bool = False
    """Client: sets IP_LOCAL_PORT_RANGE to the whole range, so that connect() looks at every port of it (A4)."""
    rate_per_s: Count = 0
    """New connections per second that are wanted; 0 leaves rates out."""


class ChangeKind(Enum):
    """Who makes a change, and where. `tune` makes the first two; the rest it shows, and writes files for."""

    SYSCTL = "sysctl"
    LOCAL_PREFIX = "local prefix"
    """A route of type local that makes each address of a prefix this host's own (AnyIP, A17)."""
    UNIT = "unit"
    """A setting of the service: systemd unit or container; it counts when the program starts anew."""
    RULES = "rules"
    """nftables rules of the host's own set, that only a person can join into it."""
    PROGRAM = "program"
    """What the program itself has to do."""
    ELSEWHERE = "elsewhere"
    """Outside of this machine or this namespace: the host of a container, the network."""


class Change(Facts):
    """One knob, from what it is to what a goal needs."""

    kind: ChangeKind
    knob: str
    scope: str
    """Who shares it, in the catalogue's words."""
    old: str
    new: str
    limit: str
    """Catalogue id of the limit that it raises, such as A2."""
    name: str
    """That limit's name, such as ephemeral-ports: its page."""
    arithmetic: str
    persist: str
    """Where it is made to last."""
