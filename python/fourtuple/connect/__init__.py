"""Sockets whose local name comes from a `SourcePool`: one file per client library, all on one socket class.

    pool = SourcePool("10.0.0.0/28", ports="1024-65535")
    with fourtuple.connect.blocking.create_connection(pool, ("192.0.2.1", 443)) as connection: ...

`blocking` and `asyncio` need nothing else; `trio`, `anyio`, `aiohttp`, `httpx` (and httpcore), `httpx2`, `urllib3` (and
requests) need that library: `pip install fourtuple[clients]`. Importing this package imports none of them.
"""

from fourtuple.connect.kernel import automatic_ports
from fourtuple.connect.sockets import SourceSocket

__all__ = ["SourceSocket", "automatic_ports"]
