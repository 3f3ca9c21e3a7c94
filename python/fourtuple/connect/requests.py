"""requests: an adapter for `session.mount("https://", SourceAdapter(pool))`. Mount it for "http://" as well.

Decides nothing; see `fourtuple.connect.urllib3`.
"""

from __future__ import annotations

from typing import Any

from requests.adapters import HTTPAdapter

from fourtuple.connect.urllib3 import pool_classes
from fourtuple.sources import SourcePool


class SourceAdapter(HTTPAdapter):
    """An HTTPAdapter whose connections come from the pool's sources; `options` are its own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        self._source_pool = pool
        super().__init__(**options)

    def init_poolmanager(self, *positional: Any, **named: Any) -> None:
        """Called by HTTPAdapter when it is made."""
        super().init_poolmanager(*positional, **named)
        self.poolmanager.pool_classes_by_scheme = pool_classes(self._source_pool)
