"""The five exceptions of the package. What a peer does is never one of them: it is a counted reason in a `Snapshot`.

Knows nothing of sockets, files or limits. Rust imports these classes, so that documentation and `isinstance` are as
usual.
"""


class FourtupleError(Exception):
    """Base of the package's exceptions; never raised itself."""


class LimitReached(FourtupleError):
    """A limit stops the work: `limit` is its name in the catalogue, `have` what it allows, `need` what was wanted."""

    def __init__(self, limit: str, have: int | None = None, need: int | None = None, remedy: str = "") -> None:
        self.limit, self.have, self.need, self.remedy = limit, have, need, remedy
        numbers = "" if have is None else f": have {have:,}" + ("" if need is None else f", need {need:,}")
        super().__init__(f"{limit}{numbers}" + (f"; {remedy}" if remedy else ""))


class MissingPrivilege(FourtupleError):
    """The process may not do this; the message names the capability or the setting that would allow it.

    `limit` is the catalogue's name for what forbids it.
    """

    def __init__(self, why: str, limit: str = "security-modules") -> None:
        self.limit = limit
        super().__init__(why)


class MissingFeature(FourtupleError):
    """The kernel or the system lacks something; the message names it, and what is done without it."""


class BadConfig(FourtupleError, ValueError):
    """An option, file or plan has a value that cannot be used: `path` says where, `why` what is allowed.

    A ValueError too, so that a model that holds the value (`facts`) can say which of its fields it was.
    """

    def __init__(self, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path}: {why}")


class EngineStopped(FourtupleError):
    """The engine ended before its work did: it panicked, or its process is gone."""
