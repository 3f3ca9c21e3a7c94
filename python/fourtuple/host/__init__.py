"""Reading one Linux machine into a `Host`: procfs, sysctl, limits, cgroups, netlink, and what can only be tried.

Decides how each fact is read and what is said where it cannot be. Knows no limit and no advice. Nothing here changes
the machine, and nothing here fails: what cannot be read is named in `Host.unread` with the reason.
"""

from fourtuple.host.reader import read_host

__all__ = ["read_host"]
