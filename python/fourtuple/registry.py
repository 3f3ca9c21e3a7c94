"""The registry of services and routes, from Python: a folder that any number of processes read and write.

Decides where the registry is when nobody says, how many rows a transaction takes, and what text from outside goes
through before Rust reads it. Knows no format and no precedence: `crates/registry` does, and is the only opener of the
file.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

from msgspec import Struct

from fourtuple import _core
from fourtuple.errors import BadConfig
from fourtuple.services import HIGHEST, Delivery, Match, Outcome, Route, Seen, Service, canonical_name, whole_or_none

BATCH_ROWS = 1_000_000
"""Services in one transaction of an import, and so what an interrupted one may lose: a hundred megabytes of memory."""
_OBJECT_ROWS = 20_000
"""Of `Service` objects, which are larger."""
_BLOCK_BYTES = 1 << 20
_PAGE_ROWS = 5_000
_MOST_LINE_BYTES = 1 << 16
"""More than Rust takes, so that it is Rust that says so."""
FORMATS = ("csv", "jsonl")
COLUMNS = ("name", "target", "delivery", "wide_port", "patience_ms", "connections", "proxy", "start")


def usual_path() -> Path:
    """FOURTUPLE_STORE; else /var/lib/fourtuple/registry for root and the XDG state folder for others."""
    if named := os.environ.get("FOURTUPLE_STORE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/fourtuple/registry")
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification has relative ones ignored.
    base = Path(state) if Path(state).is_absolute() else Path.home() / ".local/state"
    return base / "fourtuple/registry"


class Counts(Struct, frozen=True, kw_only=True):
    """What was written."""

    added: int = 0
    replaced: int = 0
    lines: int = 0
    """Of text, with headers and empty ones."""


class Sizes(Struct, frozen=True, kw_only=True):
    """How large a registry is, in one snapshot."""

    services: int
    wide_ports: int
    routes: int
    services_bytes: int
    """Pages of the services."""
    file_bytes: int
    """What was ever used of the file."""
    version: int
    """Grows with every change of any process."""
    readers: int
    most_readers: int


class Registry:
    """An open registry; a context manager. Changes are on the disk when a method returns, and seen by every process at
    its next lookup. Any number of threads and processes may use the same folder; after fork(), open it again in a
    process that was started afresh."""

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, create: bool = True, most_bytes: int | None = None
    ) -> None:
        """Open the folder `path`, by default `usual_path()`; `create` makes one where there is none.

        `most_bytes` bounds the file; by default it may grow to 64 GiB.
        """
        self.path = usual_path() if path is None else Path(path)
        if "\0" in str(self.path):
            raise BadConfig("store", f"{str(self.path)!r} holds a NUL, which no path may")
        whole_or_none("most_bytes", most_bytes, 1 << 20, 1 << 46)
        self._core = _core.Registry.open(self.path, create, most_bytes)

    def add(self, services: Iterable[Service]) -> Counts:
        """Add services; a name that is there already is an error, before which whole batches may have been kept."""
        return self._put(services, "add")

    def set(self, services: Iterable[Service]) -> Counts:
        """Add services or replace them."""
        return self._put(services, "set")

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove services, all in one transaction; gives back which names there were not."""
        return self._core.remove([canonical_name(name) for name in names])

    def service(self, name: str) -> Service | None:
        """The service of that name."""
        row = self._core.service(canonical_name(name))
        return None if row is None else Service.from_row(row)

    def service_at(self, wide_port: int) -> Service | None:
        """The service with that wide port."""
        whole_or_none("wide_port", wide_port, 0, HIGHEST)
        row = self._core.service_at(wide_port)
        return None if row is None else Service.from_row(row)

    def services(self, after: str | None = None) -> Iterator[Service]:
        """All services, or those after a text, by their names, as they were when the first was asked for."""
        pages = self._core.pages(after)
        while rows := pages.rows(_PAGE_ROWS):
            yield from map(Service.from_row, rows)

    def add_route(self, route: Route, *, replace: bool = False) -> None:
        """Add a route; with `replace` one of equal conditions gives way, else it is an error."""
        self._core.add_routes([route.row], replace)

    def add_routes(self, routes: Iterable[Route], *, replace: bool = False) -> None:
        """Add routes, all or none."""
        self._core.add_routes([route.row for route in routes], replace)

    def remove_route(self, match: Match) -> bool:
        """Remove the route with these conditions; says whether there was one."""
        return self._core.remove_route(match.row)

    def routes(self) -> list[Route]:
        """All routes: those that begin with the same condition in the order of their precedence."""
        return [_route(row) for row in self._core.routes()]

    def resolve(self, seen: Seen) -> Outcome:
        """Which service a connection means, now."""
        kind, name, to = self._core.resolve(seen)
        if to is None:
            return Outcome(kind=kind, why=name) if kind == "refused" else Outcome(kind=kind, service=name)
        target, delivery, patience_ms, connections, proxy, start = to
        return Outcome(
            kind=kind,
            service=name,
            target=target,
            delivery=Delivery(delivery),
            patience_ms=patience_ms,
            connections=connections,
            proxy=proxy,
            start=start,
        )

    def import_text(
        self,
        stream: BinaryIO,
        text_format: str,
        *,
        replace: bool = True,
        batch_rows: int = BATCH_ROWS,
        progress: Callable[[Counts], None] | None = None,
    ) -> Counts:
        """Services from CSV or JSON lines, a transaction per `batch_rows`. An error names line and field; what came in
        whole transactions before it, or before Ctrl-C, stays, and `progress` was told so."""
        whole_or_none("batch_rows", batch_rows, 1, 100_000_000)
        importer = self._core.importer(_known(text_format), "set" if replace else "add", batch_rows)
        blocks = _ascii_names(iter(lambda: stream.read(_BLOCK_BYTES), b""), text_format)
        try:
            for block in blocks:
                importer.feed(block)
                if progress is not None:
                    progress(_counts(importer))
            importer.finish()
        finally:
            if progress is not None:
                progress(_counts(importer))
        return _counts(importer)

    def export_text(self, text_format: str) -> Iterator[bytes]:
        """All services as CSV with a header or as JSON lines, in blocks, from one snapshot."""
        return self._exported(_known(text_format))

    def _exported(self, text_format: str) -> Iterator[bytes]:
        pages = self._core.pages(None)
        if text_format == "csv":
            yield ",".join(COLUMNS).encode() + b"\n"
        while block := pages.text(text_format, _PAGE_ROWS):
            yield block

    def sizes(self) -> Sizes:
        """How large it is."""
        return Sizes(**self._core.sizes())

    def reach(self) -> tuple[list[str], list[int], bool]:
        """Where the targets of all services lie: folders of unix sockets, TCP ports, whether any name is abstract. In
        one walk: of a million in some 0.03 s."""
        return self._core.reach()

    def addresses(self) -> Container[bytes]:
        """The TCP addresses that targets of services name, as they are now: an address of 4 or 16 bytes and the port in
        two. A million take some 0.1 s and 6 MB."""
        return self._core.addresses()

    @property
    def version(self) -> int:
        """Number of the last transaction of any process: if it is the same as before, nothing has changed."""
        return self._core.version

    def lookup_times_ns(self, names: Sequence[bytes], *, snapshot_each: bool = False) -> list[int]:
        """What each lookup by these names takes in Rust; with a new snapshot for each, or one for all."""
        return self._core.time_lookups(names, snapshot_each)

    def clear_stale_readers(self) -> int:
        """Free the places of readers whose processes are gone; opening does that too."""
        return self._core.clear_stale_readers()

    def close(self) -> None:
        """Let go of the file."""
        self._core.close()

    def __contains__(self, name: str) -> bool:
        return self._core.service(canonical_name(name)) is not None

    def __len__(self) -> int:
        return self.sizes().services

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, services: Iterable[Service], mode: str) -> Counts:
        added = replaced = 0
        waiting = iter(services)
        while batch := [one.row for one in islice(waiting, _OBJECT_ROWS)]:
            new, old = self._core.put(batch, mode)
            added, replaced = added + new, replaced + old
        return Counts(added=added, replaced=replaced)


Sealed: TypeAlias = _core.Registry


def sealed(services: Iterable[Service], routes: Iterable[Route]) -> Sealed:
    """A registry of these services and routes in memory alone, for a `BrokerConfig`. Nobody can change it, and it is
    gone with the process, however that ends."""
    memory = os.memfd_create("fourtuple-services")
    try:
        path = f"/proc/self/fd/{memory}"
        return _core.Registry.sealed(path, [one.row for one in services], [one.row for one in routes])
    finally:
        # It has its own descriptor by now.
        os.close(memory)


def service_in(store: Registry | Sealed, name: str) -> Service | None:
    """The service of that name, in either kind of registry; BadConfig if it is no name."""
    if isinstance(store, Registry):
        return store.service(name)
    row = store.service(canonical_name(name))
    return None if row is None else Service.from_row(row)


def services_in(store: Registry | Sealed) -> int:
    """How many services there are, in either kind of registry."""
    return store.sizes().services if isinstance(store, Registry) else store.sizes()["services"]


def check(services: Iterable[Service], routes: Iterable[Route]) -> None:
    """Raise for the first service or route that no registry would take."""
    _core.check_rows([one.row for one in services], [one.row for one in routes])


def _route(
    row: tuple[Sequence[tuple[str, str]], str, str, int | None, int | None, int | None, str | None],
) -> Route:
    conditions, to, delivery, patience_ms, connections, proxy, start = row
    given: dict[str, Any] = {name: int(text) if name.endswith("_port") else text for name, text in conditions}
    return Route(
        match=Match(**given),
        to=to,
        delivery=Delivery(delivery),
        patience_ms=patience_ms,
        connections=connections,
        proxy=proxy,
        start=start,
    )


def _known(text_format: str) -> str:
    if text_format not in FORMATS:
        raise BadConfig("format", f"{text_format!r} is not one of {', '.join(FORMATS)}")
    return text_format


def _counts(importer: _core.Importer) -> Counts:
    lines, added, replaced = importer.counts
    return Counts(lines=lines, added=added, replaced=replaced)


def _ascii_names(blocks: Iterator[bytes], text_format: str) -> Iterator[bytes]:
    """The same text in whole lines, with names of other scripts encoded: Rust reads ASCII names only. Text without any
    goes through untouched, and costs no more than a look."""
    rest, name_at, begun = b"", 0 if text_format == "csv" else -1, False
    for block in blocks:
        whole, end, rest = (rest + block).rpartition(b"\n")
        if len(rest) > _MOST_LINE_BYTES:
            whole, end, rest = rest, b"", b""
        if end and not begun and text_format == "csv":
            name_at = _name_column(whole.partition(b"\n")[0])
        begun = begun or bool(end)
        yield _encoded_names(whole, name_at) + end
    yield _encoded_names(rest, name_at)


def _name_column(first_line: bytes) -> int:
    """Which column of CSV is the name: the header says, or it is the first."""
    columns = first_line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r").split(b",")
    return columns.index(b"name") if b"name" in columns and b"target" in columns else 0


def _encoded_names(text: bytes, name_at: int) -> bytes:
    """`name_at` is a column of CSV, or -1 for JSON. What cannot be read stays as it is: Rust names line and field."""
    if text.isascii():
        return text
    return b"\n".join(line if line.isascii() else _encoded_name(line, name_at) for line in text.split(b"\n"))


def _encoded_name(line: bytes, name_at: int) -> bytes:
    try:
        text = line.decode().rstrip("\r")
        if name_at < 0:
            row = json.loads(text)
            row["name"] = canonical_name(row["name"])
            return json.dumps(row).encode()
        fields = next(csv.reader([text], strict=True))
        fields[name_at] = canonical_name(fields[name_at])
        written = io.StringIO()
        csv.writer(written, lineterminator="").writerow(fields)
        return written.getvalue().encode()
    except (ValueError, TypeError, LookupError, csv.Error, RecursionError):
        return line
