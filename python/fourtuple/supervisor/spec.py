"""What a broker process is to be: everything that it needs to know, as one message can carry it.

Decides its form, so that a process of another version of the program can read it or say that it cannot. Knows no process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fourtuple.broker import Limits
from fourtuple.brokerfile import BrokerFile
from fourtuple.engine import CarrierName
from fourtuple.errors import BadConfig
from fourtuple.registry import Sealed
from fourtuple.supervisor.channel import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """The services of `fourtuple serve --demo` instead of a file's or a registry's."""

    services: int
    pages: str
    """The path where their pages are served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A broker, as `fourtuple serve` is asked for one."""

    named: str
    """What messages call the file."""
    text: str
    """The file."""
    store: str | None = None
    """The folder of a registry, whose services these are instead of the file's."""
    demonstration: Demonstration | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    ledger: str | None = None
    ledger_every: int = 1
    carrier: str = CarrierName.AUTO.value
    workers: int = 1
    grace_s: float = 10.0
    sandbox: bool = True

    def file(self) -> BrokerFile:
        """What the text says; raises BadConfig."""
        return BrokerFile.parse(self.text.encode(), self.named)

    def services(self) -> Path | Sealed | None:
        """Where services come from; None is the file."""
        if self.demonstration is not None:
            from fourtuple import demo

            return demo.registry(self.demonstration.services, Path(self.demonstration.pages))
        return Path(self.store) if self.store is not None else None

    def fields(self) -> Fields:
        """As a message has it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> Spec:
        """As `fields` says it; raises BadConfig for what this version does not know."""
        try:
            given = dict(fields)
            shown = given.pop("demonstration", None)
            demonstration = Demonstration(**shown) if shown is not None else None
            return cls(**{**given, "limits": Limits(**given.pop("limits")), "demonstration": demonstration})
        except (TypeError, KeyError) as error:
            raise BadConfig("spec", f"is of another version: {error}") from None
