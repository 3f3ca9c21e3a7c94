"""The control socket: what a running broker tells, and what it can be told, over HTTP on a unix socket.

Decides where the socket is if nobody says. The supervisor holds the socket (`door`) and answers verbs (`verbs`); the
API (`api`, `server`) is a process of its own that lives only while there are clients, so that a dormant one costs
nothing; `client` is the other end of the socket, of the standard library alone. Who may do what is in `peers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT = "FOURTUPLE_CONTROL"
"""Names the socket, for who asks and for who serves, unless an option or a file says it."""


def default_socket(environment: Mapping[str, str] = os.environ) -> Path:
    """$FOURTUPLE_CONTROL; or /run/fourtuple/control for root; or fourtuple/control in $XDG_RUNTIME_DIR, or in /tmp."""
    if named := environment.get(ENVIRONMENT):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/run/fourtuple/control")
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "fourtuple/control"
    return Path(f"/tmp/fourtuple-{os.geteuid()}/control")
