"""The TLS matrix as `make matrix` runs it, a part of it: ours in every cut, and the others where all are right.

The hellos are first shown to OpenSSL's own server: what it does not take proves nothing about a broker.
"""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench import matrix
from bench.hellos import CONTENTS, RECORDS, SIZES, hello, records
from tests.netns.certificates import Authority

NAME = "one.example.com"
SERVER_HELLO = 2
FIRST = next(one for one in matrix.PROGRAMS if one.ours)
STEP = 11
"""Prime to the numbers of cuts, so that each occurs."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    files = Authority.made(tmp_path_factory.mktemp("matrix"), "authority").sign(NAME)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.chain, files.key)
    return context


def answered(server: ssl.SSLContext, stream: bytes) -> tuple[str | None, int]:
    """Which name OpenSSL has heard, and the kind of message that it answers with."""
    heard: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: heard.append(name)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(stream)
    with pytest.raises(ssl.SSLWantReadError):
        server.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    return heard[0], outgoing.read()[5]


@pytest.mark.parametrize("content", CONTENTS)
def test_openssl_takes_each_hello(server: ssl.SSLContext, content: str) -> None:
    for size, name_last in ((0, False), *((size, last) for size in SIZES for last in (False, True))):
        message = hello(content, NAME, size, name_last=name_last)
        assert len(message) == (size or len(message))
        stream, _ = records(message, "as few as can be")
        assert answered(server, stream) == (NAME, SERVER_HELLO), f"{size}, {name_last}"


@pytest.mark.parametrize("cut", RECORDS)
def test_openssl_takes_each_cut(server: ssl.SSLContext, cut: str) -> None:
    for size in (0, *SIZES):
        stream, ends = records(hello("TLS 1.3", NAME, size), cut)
        assert ends[-1] == len(stream)
        assert answered(server, stream) == (NAME, SERVER_HELLO), f"{size}"


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with much else to do says a hello slowly, too."""
    monkeypatch.setattr(matrix, "SNIFF_S", 30)
    monkeypatch.setattr(matrix, "PATIENCE_S", 60.0)


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("program", [one for one in matrix.PROGRAMS if one.ours], ids=lambda one: one.name)
def test_ours_is_right_in_every_cut(program: matrix.Program) -> None:
    # A hello is understood the same whatever carries it, so that the other carrier is shown a part of them.
    cells = matrix.some_cells()[:: 1 if program is FIRST else STEP]
    outcomes = matrix.run(program, cells)
    wrong = [f"{what}: {cell}" for cell, what in outcomes.items() if what != "right"]
    assert len(outcomes) == (630 if program is FIRST else 630 // STEP + 1)
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("program", [one for one in matrix.PROGRAMS if not one.ours], ids=lambda one: one.name)
def test_the_others_are_configured_to_be_right(program: matrix.Program) -> None:
    """In one record and one segment, each of them is: the comparison is with a program that knows the names."""
    if reason := matrix.absent(program):
        pytest.skip(reason)
    assert matrix.version(program)[:1].isdigit()
    plain = [
        cell for cell in matrix.CELLS
        if (cell.size, cell.records, cell.segments) == (0, "as few as can be", "at once")
    ]  # fmt: skip
    outcomes = Counter(matrix.run(program, plain).values())
    if program.name == "sslh-select":
        del outcomes["closed"]  # one now and then, whatever it says
    assert set(outcomes) == {"right"}
    assert outcomes["right"] > len(CONTENTS) // 2


def test_a_program_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.matrix.shutil.which", lambda *_, **__: None)
    others = [one for one in matrix.PROGRAMS if not one.ours]
    assert {one.package.split()[0] for one in others} == {"haproxy", "nginx-light", "sslh"}
    for one in others:
        assert one.package in matrix.absent(one) != ""


@pytest.mark.parametrize(
    ("leads_to", "outcomes"),
    [
        (matrix.NAMES, ["right", "right"]),
        ((matrix.NAMES[1], matrix.NAMES[1]), ["other", "right"]),
        ((matrix.NAMES[0], matrix.DEFAULT), ["right", "default"]),
        ((matrix.NAMES[0], ""), ["right", "closed"]),
    ],
)
def test_outcomes_are_told_apart(leads_to: tuple[str, str], outcomes: list[str]) -> None:
    """With services behind the wrong name, or none."""
    ours = matrix.PROGRAMS[1]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))

        def command(binary: str, folder: Path, ports: matrix.Ports) -> list[str]:
            places = ports.services | {"": nobody.getsockname()[1]}
            services = {name: places[to] for name, to in zip(matrix.NAMES, leads_to, strict=True)}
            changed = replace(ports, services=ports.services | services)
            return [*ours.command(binary, folder, changed), "--patience", "0.1"]

        cells = matrix.CELLS[:2]
        assert list(matrix.run(replace(ours, command=command), cells).values()) == outcomes
