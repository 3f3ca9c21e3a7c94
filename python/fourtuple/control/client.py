"""A client of the control socket, of the standard library alone, so that a command starts at once.

Decides how long an answer is waited for, and what an error of the API becomes here. Knows no command.
"""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fourtuple.errors import MissingFeature, MissingPrivilege

PATIENCE_S = 30.0
_MOST_BYTES = 64 << 20
_WHO = "[control] of broker.toml says who may"


class Declined(Exception):  # the broker's answer
    """The broker says no: `status` of HTTP, and the problem as it said it."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        """`problem` is RFC 9457's, as far as there is one."""
        self.status, self.problem = status, problem
        told = str(problem.get("detail") or f"HTTP {status}")
        field, value, remedy = (problem.get(key) for key in ("field", "value", "remedy"))
        blamed = f"{field}={value}: " if field and value else f"{field}: " if field else ""
        super().__init__(f"{blamed}{told}" + (f"; {remedy}" if remedy else ""))


class Client:
    """One request after another to the socket at `path`."""

    def __init__(self, path: Path, patience_s: float = PATIENCE_S) -> None:
        """Connects with the first request."""
        self.path, self._patience_s = path, patience_s

    def ask(self, method: str, path: str, body: object = None, **query: str | float | None) -> Any:  # noqa: ANN401
        """A request and its answer, out of JSON; Declined, MissingPrivilege, or MissingFeature if nobody answers."""
        given = {key: value for key, value in query.items() if value is not None}
        data = self.raw(method, path + ("?" + urlencode(given) if given else ""), body)
        return json.loads(data)

    def raw(self, method: str, path: str, body: object = None) -> bytes:
        """The same, with the answer's bytes as they are."""
        connection = _UnixConnection(self.path, self._patience_s)
        headers = {"Connection": "close", "Accept": "application/json"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            # Who refuses may have answered and gone without having read it all.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, data, headers)
            answer = connection.getresponse()
            text = answer.read(_MOST_BYTES)
        except (FileNotFoundError, ConnectionRefusedError):
            raise MissingFeature(
                f"no broker listens at {self.path}; name its control socket with --socket or FOURTUPLE_CONTROL"
            ) from None
        except PermissionError:
            raise MissingPrivilege(f"this user may not connect to {self.path}; {_WHO}", "") from None
        except TimeoutError:
            raise MissingFeature(f"the broker at {self.path} does not answer within {self._patience_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise MissingFeature(f"the broker at {self.path} broke off: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if answer.status < 400:
            return text
        try:
            problem = json.loads(text)
        except ValueError:
            problem = {}
        declined = Declined(answer.status, problem if isinstance(problem, dict) else {})
        if answer.status == 403:
            raise MissingPrivilege(str(declined), "") from None
        raise declined


def segment(text: str) -> str:
    """A text as a part of a path."""
    return quote(text, safe="")


class _UnixConnection(http.client.HTTPConnection):
    """http.client over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path, self._timeout_s = path, timeout_s

    def connect(self) -> None:
        """To the path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))
