"""The brokers that are compared: how each is told its services, started, and weighed while it runs.

Decides which there are and that all are given the same work: names of TLS hellos to one target. Knows no traffic.
HAProxy and nginx have as many threads or workers as there are processors, as ours has; sslh has one process, and its
version in Debian 12 reaches services over TCP alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fourtuple.engine import uring_abilities
from fourtuple.errors import FourtupleError

PATIENCE_S = 60.0
DESCRIPTORS = min(19_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] * 19 // 20)
"""For each process of a peer that is to hold many connections; the machines of the figures allow 20,000."""
MOST_HELD = DESCRIPTORS // 2 - 200
"""Connections of each process that takes two descriptors for one, and some for itself."""
_BARE = Path(__file__).with_name("peers") / "bare.c"
_MODULES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """One broker, set up in one way."""

    name: str
    program: str
    """haproxy, nginx, sslh-select or bare; else the carrier of ours."""
    delivery: str = "relay"
    options: tuple[str, ...] = ()
    """Lines that a peer's configuration has beside what is needed."""

    @property
    def is_ours(self) -> bool:
        """Whether it is the one that is measured."""
        return self.program in ("uring", "epoll")


HAPROXY = Broker(name="HAProxy, relay", program="haproxy")
NGINX = Broker(name="nginx stream, relay", program="nginx")
SSLH = Broker(name="sslh-select, relay, TCP", program="sslh-select")
URING = Broker(name="fourtuple uring, relay", program="uring")
EPOLL = Broker(name="fourtuple epoll, relay", program="epoll")
URING_HANDOFF = Broker(name="fourtuple uring, handoff", program="uring", delivery="handoff")
BARE = Broker(name="a handoff's system calls alone", program="bare", delivery="handoff")
EPOLL_HANDOFF = Broker(name="fourtuple epoll, handoff", program="epoll", delivery="handoff")


def absent(broker: Broker) -> str:
    """Why it cannot run here; empty if it can."""
    match broker.program:
        case "haproxy":
            return "" if _program("haproxy") else "haproxy is not installed"
        case "nginx":
            if not _program("nginx"):
                return "nginx is not installed"
            return "" if _stream_module() is not None else "nginx has no stream module (libnginx-mod-stream)"
        case "sslh-select":
            return "" if _program("sslh-select") else "sslh-select is not installed (sslh)"
        case "bare":
            return "" if shutil.which("gcc") else "gcc is not installed, with which it is made"
        case "uring":
            return _no_uring()
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A broker that listens."""

    pid: int
    port: int
    started_s: float
    """When its process was started, by the monotonic clock."""

    @property
    def processes(self) -> list[int]:
        """Its processes: the one that was started, and those that it has started (the workers of nginx)."""
        return [self.pid, *_children(self.pid)]

    def cpu_ns(self) -> int:
        """What all threads of all of its processes have run, in nanoseconds; stat has only hundredths of a second."""
        tasks = (task for pid in self.processes for task in _tasks(pid))
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def resident_bytes(self) -> int:
        """User memory of all of its processes, files that they map included: for what it grows by."""
        return self._rollup("Rss")

    def own_bytes(self) -> int:
        """User memory that is no file's, pages that several processes map counted once: for what it is."""
        return self._rollup("Pss_Anon")

    def _rollup(self, field: str) -> int:
        texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.processes)
        found = (re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE) for text in texts)
        return sum(int(one[1]) for one in found if one is not None) * 1024


@contextmanager
def running(
    broker: Broker, target: str, names: Sequence[str] = (), *, store: Path | None = None, patience_s: float = PATIENCE_S
) -> Iterator[Running]:
    """The broker in front of the service at `target`, for hellos with one of `names`; ours may have a registry."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder:
        port = free_port()
        command, words = _command(broker, Path(folder), port, target, names, store), Path(folder) / "words"
        started_s = time.monotonic()
        with (
            words.open("wb") as file,
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as process,
        ):
            try:
                _await_port(port, process, words, patience_s)
                yield Running(pid=process.pid, port=port, started_s=started_s)
            finally:
                process.terminate()
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(
    broker: Broker, folder: Path, port: int, target: str, names: Sequence[str], store: Path | None
) -> list[str]:
    match broker.program:
        case "haproxy":
            file = folder / "haproxy.cfg"
            file.write_text(_haproxy(broker, folder, port, target, names))
            return [_program("haproxy"), "-db", "-f", str(file)]
        case "nginx":
            file = folder / "nginx.conf"
            file.write_text(_nginx(folder, port, target, names))
            return [_program("nginx"), "-c", str(file), "-e", "stderr"]
        case "sslh-select":
            file = folder / "sslh.cfg"
            file.write_text(_sslh(port, target, names))
            return [_program("sslh-select"), "-f", "-F" + str(file)]
        case "bare":
            program = folder / "bare"
            subprocess.run(["gcc", "-O2", "-o", program, _BARE], check=True)
            return [str(program), str(port), target.removeprefix("unix:")]
    file = folder / "broker.toml"
    services = [f'[[service]]\nname = "{name}"\ntarget = "{target}"\ndelivery = "{broker.delivery}"' for name in names]
    file.write_text("\n".join([f'[[listen]]\naddress = "127.0.0.1:{port}"', *services]) + "\n")
    from_store = [] if store is None else ["--store", str(store)]
    # As it is typed; `python -m` would first load what finds a module by its name.
    program = Path(sys.executable).with_name("fourtuple")
    command = [str(program), "serve", "-c", str(file), "--carrier", broker.program, "--json"]
    return [*command, "--grace", "0", *from_store]


def _haproxy(broker: Broker, folder: Path, port: int, target: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        chosen = f"use_backend service if {{ req.ssl_sni -i {names[0]} }}"
    else:
        (folder / "names.map").write_text("".join(f"{name} service\n" for name in names))
        chosen = f"use_backend %[req.ssl_sni,lower,map({folder}/names.map)]"
    address = target.replace("unix:", "unix@").replace("tcp:", "")
    options = "".join(f"    {line}\n" for line in broker.options)
    return textwrap.dedent(f"""
        global
            nbthread {_processors()}
            maxconn {MOST_HELD}
            maxpipes 64
        defaults
            mode tcp
            timeout connect 5s
            timeout client 1h
            timeout server 1h
        frontend all
            bind 127.0.0.1:{port} backlog 4096
            tcp-request inspect-delay 5s
            tcp-request content accept if {{ req.ssl_hello_type 1 }}
            {chosen}
        backend service
            server one {address}
    """).replace("    mode tcp\n", f"    mode tcp\n{options}")


def _nginx(folder: Path, port: int, target: str, names: Sequence[str]) -> str:
    module, address = _stream_module() or "", target.removeprefix("tcp:")
    (folder / "names.map").write_text("".join(f"{name} {address};\n" for name in names))
    # Its workers would be nobody's otherwise, who may not reach into the folder.
    user = f"user {'root' if os.geteuid() == 0 else 'nobody'};"
    return textwrap.dedent(f"""
        {f"load_module {module};" if module else ""}
        {user if os.geteuid() == 0 else ""}
        daemon off;
        pid {folder}/pid;
        worker_processes {_processors()};
        worker_rlimit_nofile {DESCRIPTORS};
        error_log stderr crit;
        events {{ worker_connections {DESCRIPTORS}; }}
        stream {{
            map_hash_max_size {max(2_048, 2 * len(names))};
            map_hash_bucket_size 128;
            map $ssl_preread_server_name $target {{ include {folder}/names.map; }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                ssl_preread on;
                proxy_timeout 1h;
                proxy_pass $target;
            }}
        }}
    """)


def _sslh(port: int, target: str, names: Sequence[str]) -> str:
    host, _, service_port = target.removeprefix("tcp:").rpartition(":")
    listed = ", ".join(f'"{name}"' for name in names)
    return textwrap.dedent(f"""
        foreground: true; inetd: false; numeric: true; transparent: false; timeout: 5;
        listen: ( {{ host: "127.0.0.1"; port: "{port}"; }} );
        protocols: (
            {{ name: "tls"; host: "{host}"; port: "{service_port}"; log_level: 0; sni_hostnames: [ {listed} ]; }}
        );
    """)


def _program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


@functools.cache
def _stream_module() -> str | None:
    """Where nginx's stream module lies; empty if it is built in, None if there is none."""
    built = subprocess.run([_program("nginx"), "-V"], capture_output=True, text=True, check=False).stderr
    if "--with-stream_ssl_preread_module" not in built:
        return None
    if "--with-stream=dynamic" not in built:
        return ""
    files = (Path(folder) / "ngx_stream_module.so" for folder in _MODULES)
    return next((str(file) for file in files if file.exists()), None)


@functools.cache
def _no_uring() -> str:
    try:
        can_lend = uring_abilities()["lent_descriptors"]
    except FourtupleError as problem:
        return str(problem)
    return "" if can_lend else "io_uring here cannot lend a descriptor (IORING_OP_FIXED_FD_INSTALL, Linux 6.8)"


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _children(pid: int) -> list[int]:
    """By the parent that each process names after its own name (proc_pid_stat(5)); not every kernel lists them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _await_port(port: int, process: subprocess.Popen[bytes], words: Path, patience_s: float) -> None:
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            said = words.read_text(errors="replace").strip()
            raise RuntimeError(said[:500] or f"the broker ended with status {process.returncode}")
        time.sleep(0.001)
    raise RuntimeError(f"the broker does not listen within {patience_s:g} s")
