"""`[control]` of broker.toml: where the socket is, for whom, and what cannot be used is said with line and key."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from fourtuple.brokerfile import BrokerFile, ControlTable
from fourtuple.control import default_socket, door
from fourtuple.control.client import Client, Declined
from fourtuple.errors import BadConfig


def table(text: str) -> ControlTable:
    found = BrokerFile.parse(f"[control]\n{text}".encode(), "broker.toml").control
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "permissions"),
    [
        ("", 0o600),
        ('group = "root"', 0o660),
        ('readers = ["root"]', 0o666),
        ('admins = ["group:root"]\ngroup = "root"', 0o666),
        ('mode = "0640"\nreaders = ["root"]', 0o640),
    ],
)
def test_permissions(text: str, permissions: int) -> None:
    found = table(text)
    assert found.permissions == permissions
    assert found.access.owner == os.geteuid()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('socket = "run/control"', "line 2, control.socket"),
        ('mode = "rw"', "line 2, control.mode"),
        ('mode = "0999"', "line 2, control.mode"),
        ('\nreaders = "root"', "line 3, control.readers"),
        ('writers = ["root"]', "line 2, control.writers"),
    ],
)
def test_what_cannot_be_used_is_said(text: str, why: str) -> None:
    with pytest.raises(BadConfig, match=why):
        table(text)


def test_names_are_looked_up_when_they_are_used() -> None:
    found = table('readers = ["no-such-user"]\ngroup = "no-such-group"')
    with pytest.raises(BadConfig, match=r"control\.readers: there is no user 'no-such-user' here"):
        _ = found.access
    with pytest.raises(BadConfig, match=r"control\.group: there is no group 'no-such-group' here"):
        _ = found.group_id


def test_where_the_socket_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_socket({"FOURTUPLE_CONTROL": "/a/b", "XDG_RUNTIME_DIR": "/c"}) == Path("/a/b")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket({"XDG_RUNTIME_DIR": "/c"}) == Path("/run/fourtuple/control")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert default_socket({"XDG_RUNTIME_DIR": "/c"}) == Path("/c/fourtuple/control")
    assert default_socket({}) == Path("/tmp/fourtuple-1234/control")
    assert table('socket = "/x"').path == Path("/x")


def test_the_socket_is_made_with_its_mode_and_taken_from_nobody(tmp_path: Path) -> None:
    path = tmp_path / "run" / "control"
    with door.listen(path, mode=0o640) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with pytest.raises(BadConfig, match="of a broker that runs"):
            door.listen(path)
        # Its file is there and it answers: it is not another's to remove.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        listener.accept()[0].close()
        listener.accept()[0].close()
    # Whoever had it is gone, and left the file.
    assert path.exists()
    listener = door.listen(path)
    door.unlink(path, listener)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(BadConfig, match="is no socket"):
        door.listen(path)
    assert path.read_text() == "mine"
    with pytest.raises(BadConfig, match="cannot be the control socket"):
        door.listen(tmp_path / ("x" * 200))


def test_who_is_refused_before_all_of_it_is_read_hears_why(tmp_path: Path) -> None:
    body = json.dumps({"detail": "there is no API"}).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def refuse() -> None:
            with listener.accept()[0] as client:
                client.sendall(head + body)

        refusing = threading.Thread(target=refuse)
        refusing.start()
        # More than its receive buffer takes, so that some of it comes to nobody.
        with pytest.raises(Declined, match="there is no API"):
            Client(path).ask("POST", "/v1/upgrade", {"executable": "x" * (4 << 20)})
        refusing.join()
