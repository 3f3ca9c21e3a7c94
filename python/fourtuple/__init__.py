"""fourtuple takes a Linux host past 65,535 connections. The public names, re-exported; nothing is defined here.

Every name loads when it is first used: counting tuples costs only the standard library, and a command only its own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourtuple.doctor import Diagnosis, diagnose
    from fourtuple.engine import CarrierName, EchoConfig, Engine, LoadConfig, Snapshot
    from fourtuple.errors import (
        BadConfig,
        EngineStopped,
        FourtupleError,
        LimitReached,
        MissingFeature,
        MissingPrivilege,
    )
    from fourtuple.facts import Goal, Host, Role
    from fourtuple.host import read_host
    from fourtuple.limits import LIMITS
    from fourtuple.plan import Means, Plan
    from fourtuple.plugin import sniffer
    from fourtuple.registry import Registry
    from fourtuple.services import Match, Route, Seen, Service
    from fourtuple.sources import SourcePool
    from fourtuple.tuples import AddressSet, Endpoint, FourTuple, PortSet, Protocol, TupleSpace, TupleSpaces

__all__ = [
    "LIMITS",
    "AddressSet",
    "BadConfig",
    "CarrierName",
    "Diagnosis",
    "EchoConfig",
    "Endpoint",
    "Engine",
    "EngineStopped",
    "FourTuple",
    "FourtupleError",
    "Goal",
    "Host",
    "LimitReached",
    "LoadConfig",
    "Match",
    "Means",
    "MissingFeature",
    "MissingPrivilege",
    "Plan",
    "PortSet",
    "Protocol",
    "Registry",
    "Role",
    "Route",
    "Seen",
    "Service",
    "Snapshot",
    "SourcePool",
    "TupleSpace",
    "TupleSpaces",
    "diagnose",
    "read_host",
    "sniffer",
]

_LATER = {
    "AddressSet": "fourtuple.tuples",
    "BadConfig": "fourtuple.errors",
    "CarrierName": "fourtuple.engine",
    "Diagnosis": "fourtuple.doctor",
    "EchoConfig": "fourtuple.engine",
    "Endpoint": "fourtuple.tuples",
    "Engine": "fourtuple.engine",
    "EngineStopped": "fourtuple.errors",
    "FourTuple": "fourtuple.tuples",
    "FourtupleError": "fourtuple.errors",
    "Goal": "fourtuple.facts",
    "Host": "fourtuple.facts",
    "LIMITS": "fourtuple.limits",
    "LimitReached": "fourtuple.errors",
    "LoadConfig": "fourtuple.engine",
    "Match": "fourtuple.services",
    "Means": "fourtuple.plan",
    "MissingFeature": "fourtuple.errors",
    "MissingPrivilege": "fourtuple.errors",
    "Plan": "fourtuple.plan",
    "PortSet": "fourtuple.tuples",
    "Protocol": "fourtuple.tuples",
    "Registry": "fourtuple.registry",
    "Role": "fourtuple.facts",
    "Route": "fourtuple.services",
    "Seen": "fourtuple.services",
    "Service": "fourtuple.services",
    "Snapshot": "fourtuple.engine",
    "SourcePool": "fourtuple.sources",
    "TupleSpace": "fourtuple.tuples",
    "TupleSpaces": "fourtuple.tuples",
    "diagnose": "fourtuple.doctor",
    "read_host": "fourtuple.host",
    "sniffer": "fourtuple.plugin",
}

if not TYPE_CHECKING:  # a type checker that saw it would believe that every name exists

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module 'fourtuple' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
