"""Reading one Linux machine into a `Host`: procfs, sysctl, limits, cgroups, netlink, and what can only be tried.

Decides how each fact is read and what is said where it cannot be. Knows no limit and no advice. Nothing here changes
the machine, and nothing here fails: what cannot be read is named in `Host.unread` with the reason.

`read_host` loads when it is first used: a broker asks netlink, and should not pay for what a `Host` is made of.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourtuple.host.reader import read_host

__all__ = ["read_host"]

if not TYPE_CHECKING:  # a type checker that saw it would believe that every name exists

    def __getattr__(name: str) -> object:
        if name != "read_host":
            raise AttributeError(f"module 'fourtuple.host' has no attribute {name!r}")
        from fourtuple.host.reader import read_host

        return read_host
