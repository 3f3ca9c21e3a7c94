"""What a value given to an engine has to be: BadConfig, by the name of its setting, for what it is not."""

from __future__ import annotations

from fourtuple.errors import BadConfig

HIGHEST_COUNT = 2**32 - 1
"""Connections are numbered by 32 bits in each worker."""


def instance(path: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadConfig(path, f"is {value!r}; a {names} is needed")


def whole(path: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadConfig(path, f"is {value!r}; a whole number from {least} to {most} is needed")


def whole_or_none(path: str, value: object, least: int, most: int) -> None:
    if value is not None:
        whole(path, value, least, most)


def seconds(path: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= HIGHEST_COUNT:
        raise BadConfig(path, f"is {value!r}; a number of seconds from {least:g} to {HIGHEST_COUNT} is needed")
