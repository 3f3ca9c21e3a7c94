"""What the tests of `fourtuple load` share: a run in a lab and its report, and real servers there.

Decides how a server of the system is found, started and ended; skips, with the reason, where it is not installed. Knows
nothing of what a test expects.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.lab import Lab, LabHost
from fourtuple.tuples import Endpoint

START_S = 20.0
RUN_S = 120.0
"""Far longer than a run takes: a machine that others use is slow."""
PACKAGES = {"nginx": "nginx-light", "postgres": "postgresql", "initdb": "postgresql"}
"""Debian's, where it is not called as the program is."""


def server_address(lab: Lab) -> str:
    """Where the lab's host `server` is reached from its host `client`."""
    return str(lab["client"].links["server"].peer_address(4))


def inside(lab: Lab, host: LabHost, command: Sequence[str]) -> list[str]:
    """The command that runs another one in the network of a lab's host."""
    users = ["--user", "--preserve-credentials"] if lab.in_user_namespace else []
    return ["nsenter", "--target", str(host.pid), "--net", *users, *command]


def run_load(lab: Lab, client: LabHost, *options: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """The report, with the exit status as `status`."""
    command = [*prefix, sys.executable, "-m", "fourtuple", "load", *options, "--json"]
    done = subprocess.run(inside(lab, client, command), capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"status": done.returncode}


def cause(report: Mapping[str, Any], **wanted: object) -> dict[str, Any]:
    """The first cause that is as wanted."""
    for found in report["causes"]:
        if all(found[key] == value for key, value in wanted.items()):
            return dict(found)
    raise AssertionError(f"{wanted} is none of {report['causes']}")


def program(name: str) -> str:
    """Where a program of the system is; Debian keeps the server of PostgreSQL off PATH, one folder per version."""
    places = ["/usr/sbin", "/usr/local/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))
    if path is None:
        pytest.skip(f"{name} is not installed (make system, or apt-get install {PACKAGES.get(name, name)})")
    return path


@contextmanager
def serving(
    lab: Lab, name: str, *options: str, port: int, prefix: Sequence[str] = (), host: str = "server"
) -> Iterator[str]:
    """A server of the system in the lab, until the end of the block; its address."""
    address = server_address(lab)
    command = inside(lab, lab[host], [*prefix, program(name), *options])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            deadline_s = time.monotonic() + START_S
            while lab["client"].connect_once(Endpoint.parse(f"{address}:{port}")) != "ok":
                assert server.poll() is None, f"{name} ended with {server.returncode}"
                assert time.monotonic() < deadline_s, f"{name} does not listen"
                time.sleep(0.05)
            yield address
        finally:
            server.terminate()


@contextmanager
def web_server(lab: Lab, folder: Path) -> Iterator[str]:
    """nginx in one process of 1,000 places, on ports 8080 to 8083: "hello" at /, status 503 at /no; its address."""
    configuration = folder / "nginx.conf"
    configuration.write_text(
        textwrap.dedent(f"""
            daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
            events {{ worker_connections 1000; }}
            http {{
              access_log off; keepalive_requests 1000000;
              client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
              uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
              server {{
                listen 8080-8083 backlog=4096;
                location / {{ return 200 "hello\\n"; }}
                location /no {{ return 503; }}
              }}
            }}
            """)
    )
    with serving(lab, "nginx", "-e", f"{folder}/error.log", "-c", str(configuration), port=8080) as address:
        yield address
