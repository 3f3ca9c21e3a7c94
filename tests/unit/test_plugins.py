"""Sniffers in Python: what they may say, and a process of theirs that raises, blocks, eats memory or dies."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from fourtuple.errors import BadConfig
from fourtuple.plugin import Match, More, No, judge, sniffer
from fourtuple.supervisor.plugins import Plugin, PluginProcess
from tests.netns.brokering import SERVE, echoing, listens, process, wait_for

MODULE = """
import os, time
from fourtuple import sniffer
from fourtuple.plugin import Match, More, No

@sniffer("trouble")
def trouble(opening: bytes) -> Match | More | No:
    match opening[:6]:
        case b"raise!":
            raise RuntimeError("a bug of its own")
        case b"block!":
            while True:
                pass
        case b"memory":
            return Match(name="x" * len(bytearray(1 << 40)))
        case b"killed":
            os._exit(3)
        case b"slowly":
            time.sleep(0.3)
        case b"rubbis":
            return "gopher"
        case b"noname":
            return Match(name="")
    return No()

@sniffer("gopher")
def gopher(opening: bytes) -> Match | More | No:
    if not opening.startswith(b"/"):
        return No()
    line, end, _ = opening.partition(b"\\r\\n")
    return Match(name=line[1:].decode()) if end else More()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "trouble_sniffers.py").write_text(MODULE)
    (tmp_path / "broken_sniffers.py").write_text("raise ValueError('not today')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "trouble_sniffers"


def asked(
    openings: list[bytes], *, module: str = "trouble_sniffers", limit_ms: int = 10_000
) -> tuple[list[str], dict[str, int]]:
    """The verdicts on these, one after another, and what was counted."""

    async def ask() -> tuple[list[str], dict[str, int]]:
        running = PluginProcess(Plugin(module=module, limit_ms=limit_ms), lambda *_, **__: None)
        try:
            # The first is answered when the module is loaded.
            told = [(await running.ask(opening, is_all=False)) for opening in openings]
            return [f"{it.get('protocol', '')}{it['verdict']}" for it in told], dict(running.counts)
        finally:
            running.close()

    return asyncio.run(ask())


def test_who_matches_first_is_right_and_who_wants_more_is_asked_again() -> None:
    verdicts, counts = asked([b"/shop\r\n", b"/sh", b"EHLO"])
    assert verdicts == ["plugin:gophermatch", "more", "no"]
    assert counts == {"asked": 3, "matched": 1, "more": 1, "no": 1}


def test_one_that_raises_or_says_nonsense_has_said_no() -> None:
    verdicts, counts = asked([b"raise!", b"rubbish", b"noname", b"memory", b"/shop\r\n"])
    assert verdicts == ["no", "no", "no", "no", "plugin:gophermatch"]
    assert counts == {"asked": 5, "raised": 4, "no": 4, "matched": 1}


def test_one_that_blocks_is_killed_and_made_anew() -> None:
    verdicts, counts = asked([b"/shop\r\n", b"block!", b"down", b"/shop\r\n"], limit_ms=2_000)
    assert verdicts[:3] == ["plugin:gophermatch", "no", "no"]
    assert counts["late"] == 1


def test_one_that_dies_is_made_anew_after_a_pause() -> None:
    async def ask() -> list[str]:
        running = PluginProcess(Plugin(module="trouble_sniffers", limit_ms=10_000), lambda *_, **__: None)
        try:
            verdicts = [(await running.ask(opening, is_all=False))["verdict"] for opening in (b"killed", b"/a\r\n")]
            assert (running.counts["died"], running.counts["down"]) == (1, 1)
            await asyncio.sleep(0.2)
            return [*verdicts, (await running.ask(b"/a\r\n", is_all=False))["verdict"]]
        finally:
            running.close()

    assert asyncio.run(ask()) == ["no", "no", "match"]


def test_a_module_that_cannot_be_loaded_knows_nothing() -> None:
    for module in ("broken_sniffers", "there_is_no_such_module"):
        verdicts, counts = asked([b"/shop\r\n", b"/shop\r\n"], module=module)
        assert verdicts == ["no", "no"]
        assert counts == {"asked": 2, "failed": 1, "down": 1}


def test_more_questions_than_may_wait_are_answered_at_once() -> None:
    async def ask() -> dict[str, int]:
        running = PluginProcess(Plugin(module="trouble_sniffers", limit_ms=10_000), lambda *_, **__: None)
        try:
            await asyncio.gather(*(running.ask(b"EHLO", is_all=False) for _ in range(300)))
            return dict(running.counts)
        finally:
            running.close()

    assert asyncio.run(ask()) == {"asked": 300, "busy": 44, "no": 256}


def test_what_is_all_there_is_needs_no_more() -> None:
    def wants(_: bytes) -> Match | More | No:
        return More()

    rows = [("wants", wants)]
    assert judge(b"x", is_all=False, sniffers=rows)["verdict"] == "more"
    assert judge(b"x", is_all=True, sniffers=rows)["verdict"] == "no"


def test_a_name_is_one_and_is_taken_once() -> None:
    def other(_: bytes) -> Match | More | No:
        return No()

    for name in ("", "Two Words", "x" * 33):
        with pytest.raises(BadConfig, match="a name of 1 to 32"):
            sniffer(name)
    assert sniffer("taken-once")(other) is other
    with pytest.raises(BadConfig, match="is taken"):
        sniffer("taken-once")(lambda _: No())


# ---- in a broker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_broker_asks_and_goes_on_whatever_a_plugin_does(tmp_path: Path, free_port: int) -> None:
    services = "".join(
        f'[[service]]\nname = "{name}"\ntarget = "unix:{tmp_path}/{name}"\n' for name in ("shop", "default")
    )
    (tmp_path / "broker.toml").write_text(
        f'[[listen]]\naddress = "127.0.0.1:{free_port}"\nsniff_ms = 20000\ndefault = "service:default"\n'
        f'[[plugin]]\nmodule = "trouble_sniffers"\nlimit_ms = 5000\n{services}'
        f'[[route]]\nprotocol = "plugin:gopher"\nname = "cellar"\nto = "unix:{tmp_path}/shop"\n'
    )

    def said(*parts: bytes) -> str:
        with socket.create_connection(("127.0.0.1", free_port), timeout=30) as client:
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            return client.recv(4096).decode()

    with (
        echoing(tmp_path / "shop"),
        echoing(tmp_path / "default"),
        process(*SERVE, "-c", str(tmp_path / "broker.toml"), "--json", "--workers", "2") as running,
    ):
        wait_for(lambda: listens(free_port))
        assert said(b"/shop\r\n") == "shop heard /shop\r\n"
        assert said(b"/ce", b"ll", b"ar\r\n") == "shop heard /cellar\r\n"
        assert said(b"something else") == "default heard something else"
        for trouble in (b"raise!", b"memory", b"slowly"):
            assert said(trouble) == f"default heard {trouble.decode()}"
        assert said(b"block!") == "default heard block!"
        # While there is no process, nobody knows; then there is another.
        assert said(b"/shop\r\n") in ("default heard /shop\r\n", "shop heard /shop\r\n")
        wait_for(lambda: said(b"/shop\r\n") == "shop heard /shop\r\n")
        running.terminate()
        output, _ = running.communicate(timeout=30)
        counts = json.loads(output.splitlines()[-1])["plugins"]["trouble_sniffers"]
    assert counts["late"] == 1
    assert counts["raised"] == 2
    assert counts["matched"] >= 3
