"""What a broker process is to be: everything that it needs to know, as one message can carry it.

Decides its form, so that a process of another version of the program can read it or say that it cannot. Knows no
process.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import asdict

from fourtuple.broker import Limits
from fourtuple.brokerfile import BrokerFile
from fourtuple.engine import CarrierName
from fourtuple.errors import BadConfig
from fourtuple.registry import Sealed
from fourtuple.supervisor.channel import Fields


class Demonstration(Struct, frozen=True, kw_only=True):
    """The services of `fourtuple serve --demo` instead of a file's or a registry's."""

    services: int
    pages: str
    """The path where their pages are served."""


class Spec(Struct, frozen=True, kw_only=True):
    """A broker, as `fourtuple serve` is asked for one."""

    named: str
    """What messages call the file."""
    text: str
    """The file."""
    store: str | None = None
    """The folder of a registry, whose services these are instead of the file's."""
    demonstration: Demonstration | None = None
    limits: Limits = field(default_factory=Limits)
    ledger: str | None = None
    ledger_every: int = 1
    ledger_steps: bool = False
    carrier: str = CarrierName.AUTO.value
    workers: int = 1
    grace_s: float = 10.0
    inetd: str | None = None
    """Where sockets go of services with a process for each connection."""
    extra_sockets: tuple[str, ...] = ()
    """Folders of sockets that have become known since, besides those of the file and the registry."""
    is_confined: bool = True
    soft_descriptors: int | None = None
    """RLIMIT_NOFILE of services, as the supervisor found it: having a descriptor for each, it has raised its own."""

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self.named)

    @property
    def inetd_path(self) -> Path:
        """Where sockets for processes of their own are brought: one place for one file, so that what a supervisor has
        left that was killed is found and replaced."""
        folder = Path("/run/fourtuple") if os.geteuid() == 0 else Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))
        name = "".join(letter if letter.isalnum() else "-" for letter in self.named)[-60:]
        return folder / f"inetd-{os.geteuid()}-{name.strip('-')}"

    def file(self) -> BrokerFile:
        """What the text says; raises BadConfig."""
        return BrokerFile.parse(self.text.encode(), self.named)

    def services(self) -> Path | Sealed | None:
        """Where services come from; None is the file."""
        if self.demonstration is not None:
            from fourtuple import demo

            return demo.registry(self.demonstration.services, Path(self.demonstration.pages))
        return Path(self.store) if self.store is not None else None

    def sockets(self) -> tuple[str, ...]:
        """Folders of sockets that neither file nor registry names."""
        own = [path for path in (self.inetd, self.demonstration and self.demonstration.pages) if path]
        return (*self.extra_sockets, *(str(Path(path).parent) for path in own))

    def fields(self) -> Fields:
        """As a message has it."""
        shown = None if self.demonstration is None else asdict(self.demonstration)
        return asdict(self) | {"limits": asdict(self.limits), "demonstration": shown}

    @classmethod
    def from_fields(cls, fields: Fields) -> Spec:
        """As `fields` says it; raises BadConfig for what this version does not know."""
        try:
            given = dict(fields)
            shown = given.pop("demonstration", None)
            demonstration = Demonstration(**shown) if shown is not None else None
            limits, extra = Limits(**given.pop("limits")), tuple(given.pop("extra_sockets"))
            return cls(**given, limits=limits, extra_sockets=extra, demonstration=demonstration)
        except (TypeError, KeyError) as error:
            raise BadConfig("spec", f"is of another version: {error}") from None
