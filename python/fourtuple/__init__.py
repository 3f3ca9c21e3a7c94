"""fourtuple takes a Linux host past 65,535 connections. Public names, re-exported; this file defines nothing."""

from fourtuple.errors import BadConfig, EngineStopped, FourtupleError, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.tuples import AddressSet, Endpoint, FourTuple, PortSet, Protocol, TupleSpace, TupleSpaces

__all__ = [
    "AddressSet",
    "BadConfig",
    "Endpoint",
    "EngineStopped",
    "FourTuple",
    "FourtupleError",
    "LimitReached",
    "MissingFeature",
    "MissingPrivilege",
    "PortSet",
    "Protocol",
    "TupleSpace",
    "TupleSpaces",
]
