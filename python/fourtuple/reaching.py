"""Where the services of a registry lie, found by a thread while its program is still being loaded.

Decides nothing: `Registry.reach` tells the same. A module of its own, because `fourtuple.registry` loads more than
there is time for.
"""

from __future__ import annotations

from fourtuple._core import Reaching

__all__ = ["Reaching"]
