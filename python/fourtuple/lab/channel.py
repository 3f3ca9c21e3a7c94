"""The conversation between a lab and one of its agents: a request by name, one answer, over an inherited socket pair.

Decides how a call and its result or error cross. Knows no namespace and no particular request. Both ends are our own
processes, and nobody else can reach the pair, so pickle is safe here.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call: `operation` is a key of the table in `operations`."""

    serial: int
    operation: str
    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception on its way to the other process.

    Taken apart, because exceptions with an __init__ of their own do not survive pickle: it would call that with `args`,
    which are those of the base class.
    """

    kind: type[BaseException]
    arguments: tuple[Any, ...]
    attributes: dict[str, Any]
    trace: str

    @classmethod
    def of(cls, error: BaseException, trace: str) -> Failure:
        """Take an exception apart; one that cannot be sent becomes a RuntimeError with its text."""
        arguments = error.__reduce__()[1]  # for an OSError this has the file's name, which `args` has not
        failure = cls(kind=type(error), arguments=tuple(arguments), attributes=dict(vars(error)), trace=trace)
        try:
            pickle.loads(pickle.dumps(failure)).exception()
        except Exception:
            text = f"{type(error).__name__}: {error}"
            return cls(kind=RuntimeError, arguments=(text,), attributes={}, trace=trace)
        return failure

    def exception(self) -> BaseException:
        """The exception again: same class, arguments and attributes; where it happened is in its notes."""
        if self.kind.__module__ == "builtins":
            error = self.kind(*self.arguments)
        else:
            error = self.kind.__new__(self.kind, *self.arguments)
        for name, value in self.attributes.items():
            if name != "__notes__":
                setattr(error, name, value)
        for note in self.attributes.get("__notes__", ()):
            error.add_note(note)
        error.add_note(self.trace)
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of the request with this serial."""

    serial: int
    value: Any = None
    failure: Failure | None = None


class Asker:
    """The parent's end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._serial = 0

    def begin(self, birth: object, timeout_s: float) -> object:
        """Send what the other end waits for first; its answer comes as to any request."""
        self._connection.send(birth)
        return self._await("its birth", timeout_s)

    def ask(self, operation: str, positional: tuple[Any, ...], named: dict[str, Any], timeout_s: float) -> object:
        """Call and wait. EOFError or OSError if the other end is gone, TimeoutError if it does not answer in time."""
        self._serial += 1
        request = Request(serial=self._serial, operation=operation, positional=positional, named=named)
        self._connection.send(request)
        return self._await(operation, timeout_s)

    def _await(self, operation: str, timeout_s: float) -> object:
        answer: Answer | None = None
        # An answer to an earlier question that was given up (Ctrl-C, a timeout) may still be on its way.
        while answer is None or answer.serial != self._serial:
            if not self._connection.poll(timeout_s):
                raise TimeoutError(f"no answer to {operation} within {timeout_s:g} s")
            answer = self._connection.recv()
        if answer.failure is not None:
            raise answer.failure.exception()
        return answer.value

    def close(self) -> None:
        """Hang up; the agent ends when it notices."""
        self._connection.close()
