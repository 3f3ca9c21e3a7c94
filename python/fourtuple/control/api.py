"""The HTTP API: paths, what a request may say, and what an error looks like (problem+json, RFC 9457).

Decides paths and bounds. Knows no socket and no engine: every answer is a `Controlled`'s.
"""

from __future__ import annotations

import dataclasses
import http
import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_network
from typing import Annotated, Any, Literal

import pydantic
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from fourtuple.control import exposition
from fourtuple.control.peers import Role
from fourtuple.control.processes import view
from fourtuple.control.remote import CALLER, Remote
from fourtuple.control.verbs import (
    HIGHEST,
    MOST_ROWS,
    MOST_TEXT,
    MOST_WAIT_S,
    Connections,
    FailureRow,
    Limits,
    ProcessView,
    Refused,
    ServiceView,
    Status,
    Top,
    Upgrade,
    plain,
)

MOST_BODY_BYTES = 65_536
PROBLEM = "application/problem+json"
_STATUSES = {"invalid": 422, "absent": 404, "conflict": 409, "unavailable": 503, "slow": 504}
_SEE = "/openapi.json says what is allowed"
_BLAMED: dict[int, tuple[str, Callable[[Request], str | None]]] = {
    404: ("path", lambda request: request.url.path),
    405: ("method", lambda request: request.method),
}
_READS = frozenset({"GET", "HEAD"})
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_PREFIXES: list[dict[str, Any]] = [
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "pattern": rf"^({_BYTE}\.){{3}}{_BYTE}/(3[0-2]|[12]?[0-9])$"},
    {"type": "string", "pattern": "^([0-9a-f]{1,4}:){1,6}:/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$"},
]
"""What a source may be, in the words of a schema; other ways to write the same are understood, too."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Problem(pydantic.BaseModel):
    """What went wrong, and what would help."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = Field(default=None, description="What in the request is to blame, if something is.")
    value: str | None = Field(default=None, description="What it was.")
    remedy: str | None = Field(default=None, description="What would help.")


def problem(
    status: int, detail: str, *, field: str | None = None, value: str | None = None, remedy: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    title = http.HTTPStatus(status).phrase
    shown = None if value is None else value[:MOST_TEXT]
    return Problem(title=title, status=status, detail=detail, field=field, value=shown, remedy=remedy).model_dump()


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


def _whole(value: object) -> object:
    # 5.0 is a whole number in JSON (JSON Schema 2020-12, validation, 6.1.1).
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, pydantic.BeforeValidator(_whole)]


class LimitsChange(_Body):
    """Limits to change; those that are not named stay. 0 is no bound."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, json_schema_extra={"minProperties": 1})
    most_connections: _Whole = Field(default=0, ge=0, le=HIGHEST // 4)
    most_per_source: _Whole = Field(default=0, ge=0, le=HIGHEST)
    most_per_service: _Whole = Field(default=0, ge=0, le=HIGHEST)

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> LimitsChange:
        if not self.model_fields_set:
            raise ValueError("one limit at least is needed")
        return self


class DrainRequest(_Body):
    """How long there is."""

    grace_s: float | None = Field(default=None, ge=0, le=HIGHEST, description="None: as the broker was started.")


class UpgradeRequest(_Body):
    """To what."""

    executable: str | None = Field(
        default=None,
        min_length=2,
        max_length=MOST_TEXT,
        pattern=r"^/[^\x00]+$",
        description="The Python of the new installation, as a path from /; None: the one that runs.",
    )


class Done(pydantic.BaseModel):
    """It is done, or begun."""

    done: str


ConnectionId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="As in the survey and in the log.")]
ServiceName = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._-]+$", description="Its name.")]
WaitS = Annotated[float, Query(ge=0, le=MOST_WAIT_S, description="How long to wait for it, in seconds.")]


def _says(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    every = (400, 403, 413, 422, 503, 504, *statuses)
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in every}


def made(controlled: Remote) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application, within its guard."""
    return _Guard(_application(controlled))


def document() -> dict[str, Any]:
    """The OpenAPI document, of nobody's application."""
    idle, other = socket.socketpair()
    with idle, other:
        return _application(Remote(idle)).openapi()


def _application(controlled: Remote) -> FastAPI:
    app = FastAPI(
        title="fourtuple control",
        version="1",
        description="What a running broker tells, and what it can be told.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=_says(),
    )
    _add_reads(app, controlled)
    _add_changes(app, controlled)
    _add_problems(app)
    inner = app.openapi

    def openapi() -> dict[str, Any]:
        schema = inner()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components["Problem"] = Problem.model_json_schema()
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
    return app


def _add_reads(app: FastAPI, controlled: Remote) -> None:
    @app.get("/v1/status")
    async def status() -> Status:
        """The broker in short."""
        told = await controlled.status()
        return dataclasses.replace(told, processes=(*told.processes, *_itself()))

    @app.get("/v1/connections")
    async def connections(
        after: Annotated[
            str | None, Query(pattern=r"^[0-9]{1,4}\.[0-9]{1,10}$", description="`next` of the page before.")
        ] = None,
        most: Annotated[int, Query(ge=1, le=MOST_ROWS, description="Rows.")] = 100,
        service: Annotated[
            str | None, Query(min_length=1, max_length=MOST_TEXT, description="Only those of this service.")
        ] = None,
        source: Annotated[
            str | None,
            Query(
                json_schema_extra={"anyOf": _PREFIXES},
                description="Only those from this address or prefix.",
            ),
        ] = None,
    ) -> Connections:
        """A page of the connections that the broker holds."""
        return await controlled.connections(after, most, service, _prefix(source))

    @app.get("/v1/services")
    async def top(
        by: Annotated[
            Literal["live", "total", "bytes"],
            Query(description="Connections now, connections that have ended, or bytes that those carried."),
        ] = "live",
        most: Annotated[int, Query(ge=1, le=MOST_ROWS, description="Rows.")] = 20,
    ) -> Top:
        """The busiest services."""
        return await controlled.top(by, most)

    @app.get("/v1/services/{name}", responses=_says(404))
    async def service(name: ServiceName) -> ServiceView:
        """One service, and how it stands."""
        return await controlled.service(name)

    @app.get("/v1/reasons")
    async def reasons() -> dict[str, int]:
        """How connections have ended, by reason."""
        return await controlled.reasons()

    @app.get("/v1/failures")
    async def failures() -> list[FailureRow]:
        """System calls that failed, by step and error."""
        return list(await controlled.failures())

    @app.get("/v1/limits")
    async def limits() -> Limits:
        """How many connections there may be."""
        return await controlled.limits()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {name: {"schema": {"type": "string"}} for name in exposition.CONTENT_TYPES}}},
    )
    async def metrics(request: Request) -> Response:
        """All numbers, for Prometheus; as many with a million services as with one."""
        numbers = await controlled.raw_numbers()
        numbers["processes"] += [plain(one) for one in _itself()]
        body, content_type = exposition.text(numbers, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


def _add_changes(app: FastAPI, controlled: Remote) -> None:
    @app.delete("/v1/connections/{id}", responses=_says(404))
    async def close_connection(id: ConnectionId) -> Done:  # the path's word
        """Close a connection now."""
        await controlled.close_connection(id)
        return Done(done=f"closed {id}")

    @app.post("/v1/services/{name}/wake", responses=_says(404, 409))
    async def wake(name: ServiceName, wait_s: WaitS = 0.0) -> ServiceView:
        """Start a service that is asleep."""
        return await controlled.wake(name, wait_s)

    @app.post("/v1/services/{name}/stop", responses=_says(404, 409))
    async def stop(name: ServiceName, wait_s: WaitS = 0.0) -> ServiceView:
        """Stop a service; who comes then wakes it again."""
        return await controlled.stop(name, wait_s)

    @app.post("/v1/drain", status_code=202, responses=_says(409))
    async def drain(body: DrainRequest) -> Done:
        """Accept no more, and end when what there is has ended."""
        await controlled.drain(body.grace_s)
        return Done(done="draining")

    @app.patch("/v1/limits", responses=_says(409))
    async def set_limits(body: LimitsChange) -> Limits:
        """Change limits, from now on; what there is may stay."""
        return await controlled.set_limits({name: getattr(body, name) for name in body.model_fields_set})

    @app.post("/v1/upgrade", status_code=202, responses=_says(409))
    async def upgrade(body: UpgradeRequest) -> Upgrade:
        """Begin an upgrade; how it ends is in the status."""
        return await controlled.upgrade(body.executable)

    @app.post("/v1/reload", status_code=202, responses=_says(409))
    async def reload() -> Done:
        """Read the file again."""
        await controlled.reload()
        return Done(done="reloaded")


def _itself() -> tuple[ProcessView, ...]:
    found = view("control", os.getpid())
    return () if found is None else (found,)


def _prefix(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return str(ip_network(text, strict=False))
    except ValueError:
        remedy = "give an address, or a prefix such as 192.0.2.0/24 or 2001:db8::/64"
        raise Refused("invalid", "is no address and no prefix", field="source", value=text, remedy=remedy) from None


# ---- errors --------------------------------------------------------------------------------------------------------


def _answered(body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body, status_code=body["status"], headers=headers, media_type=PROBLEM)


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        shown = None if error.value is None else str(error.value)
        status = _STATUSES[error.kind]
        return _answered(problem(status, error.detail, field=error.field, value=shown, remedy=error.remedy))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first, *others = error.errors()
        where, *names = map(str, first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        field = ".".join(names) or where
        shown = None if first["type"] == "missing" else re.sub(r"[\x00-\x1f]", "?", repr(first.get("input")))
        return _answered(
            problem(
                422,
                f"{where}: {first['msg']}{more}",
                field=field,
                value=shown,
                remedy=_SEE,
            )
        )

    @app.exception_handler(HTTPException)
    async def refused_before(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        blamed, value = _BLAMED.get(error.status_code, ("body", lambda _: None))
        if error.status_code == 405:
            # Each route names its own methods alone.
            matching = [one for one in app.router.routes if one.matches(request.scope)[0] is not Match.NONE]
            methods = {method for one in matching for method in getattr(one, "methods", None) or ()}
            headers["allow"] = ", ".join(sorted(methods))
        told = problem(error.status_code, str(error.detail), field=blamed, value=value(request), remedy=_SEE)
        return _answered(told, headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return _answered(problem(500, f"a bug of ours: {type(error).__name__}", remedy="please report it"))


class _Guard:
    """In front of every path: who may only read reads, and no body is large."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        state = scope.get("state", {})
        if state.get("role") is not Role.ADMIN and scope["method"] not in _READS:
            state["deny"](state.get("uid"))
            remedy = "have the user named among admins in [control] of broker.toml"
            refused = problem(403, "this user may only read", field="user", value=str(state.get("uid")), remedy=remedy)
            return await _answered(refused, {"connection": "close"})(scope, receive, send)
        CALLER.set(state.get("uid"))
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            return await _too_large(length.decode("latin-1"))(scope, receive, send)
        taken = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BODY_BYTES:
                raise HTTPException(413, f"more than {MOST_BODY_BYTES} bytes")
            return message

        return await self.app(scope, bounded, send)


def _too_large(value: str) -> JSONResponse:
    detail = f"a body of more than {MOST_BODY_BYTES:,} bytes"
    return _answered(problem(413, detail, field="content-length", value=value), {"connection": "close"})
