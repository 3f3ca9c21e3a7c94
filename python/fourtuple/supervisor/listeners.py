"""The sockets that the broker listens on, held by the supervisor for as long as it lives.

Decides how many there are of an endpoint, and which of those that an init system has passed is which. Broker processes
come and go on them: what waits in their queues waits for the next one. Knows no broker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from fourtuple.errors import BadConfig
from fourtuple.tuples import Endpoint


class Listeners:
    """Of each endpoint as many sockets as there are workers: SO_REUSEPORT shares connections out among them, and each
    worker has a queue of its own. An endpoint of which sockets were passed has those, and workers share them."""

    def __init__(self, sockets: Mapping[Endpoint, Sequence[socket.socket]]) -> None:
        self._sockets = {endpoint: tuple(of_it) for endpoint, of_it in sockets.items()}

    @classmethod
    def bound(cls, endpoints: Iterable[Endpoint], workers: int, passed: Iterable[socket.socket] = ()) -> Listeners:
        """Bind those that were not passed; raises BadConfig naming the endpoint and why."""
        sockets: dict[Endpoint, list[socket.socket]] = {endpoint: [] for endpoint in endpoints}
        try:
            for one in passed:
                endpoint = endpoint_of(one)
                if endpoint not in sockets:
                    raise BadConfig("listen", f"a socket at {endpoint} was passed, and no [[listen]] is there")
                sockets[endpoint].append(one)
            for endpoint, of_it in sockets.items():
                if not of_it:
                    of_it.extend(_bound(endpoint, workers))
        except BaseException:
            for of_it in sockets.values():
                for one in of_it:
                    one.close()
            raise
        return cls(sockets)

    @classmethod
    def adopted(cls, descriptors: Mapping[str, Sequence[int]]) -> Listeners:
        """Those of `descriptors_by_name`, in a program that has taken this one's place."""
        return cls(
            {Endpoint.parse(name): [socket.socket(fileno=one) for one in of_it] for name, of_it in descriptors.items()}
        )

    def descriptors(self, endpoint: Endpoint, workers: int) -> list[int]:
        """One for each worker."""
        of_it = self._sockets[endpoint]
        return [of_it[worker % len(of_it)].fileno() for worker in range(workers)]

    def descriptors_by_name(self) -> dict[str, list[int]]:
        """All of them."""
        return {str(endpoint): [one.fileno() for one in of_it] for endpoint, of_it in self._sockets.items()}

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where they listen."""
        return tuple(self._sockets)

    def close(self) -> None:
        """Stop listening."""
        for of_it in self._sockets.values():
            for one in of_it:
                with suppress(OSError):
                    one.close()


def endpoint_of(listener: socket.socket) -> Endpoint:
    """Where it is bound; raises BadConfig if it is no TCP listener."""
    accepts = listener.type is socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or not accepts:
        raise BadConfig("listen", f"descriptor {listener.fileno()} was passed and is no listening TCP socket")
    host, port = listener.getsockname()[:2]
    return Endpoint.parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _bound(endpoint: Endpoint, workers: int) -> list[socket.socket]:
    """The engine listens, after it has set what connections inherit."""
    family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
    sockets: list[socket.socket] = []
    try:
        # SO_REUSEPORT would share the port with whoever of this user listens there; without it, that is an error.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            _bind(probe, endpoint, socket.SO_REUSEADDR)
        for _ in range(workers):
            sockets.append(socket.socket(family, socket.SOCK_STREAM))
            _bind(sockets[-1], endpoint, socket.SO_REUSEADDR, *([socket.SO_REUSEPORT] if workers > 1 else []))
    except OSError as error:
        for one in sockets:
            one.close()
        why = os.strerror(error.errno or 0)
        raise BadConfig("listen", f"cannot listen on {endpoint}: {why}") from None
    return sockets


def _bind(one: socket.socket, endpoint: Endpoint, *options: int) -> None:
    for option in options:
        one.setsockopt(socket.SOL_SOCKET, option, 1)
    one.bind((str(endpoint.address), endpoint.port))
