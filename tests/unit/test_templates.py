"""Templates: what they may say, and that nothing a client or the registry says leaves its place in a command."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fourtuple.brokerfile import BrokerFile
from fourtuple.errors import BadConfig
from fourtuple.launcher import Saved
from fourtuple.templates import Call, Ready, Socket, Template, by_name

ARGV = (
    "/bin/x",
    "{name}",
    "--label={label}",
    "{user}",
    "{database}",
    "{socket}",
    "{target}",
    "/srv/{user}/{name}",
    "{{x}}",
)
TEMPLATE = Template(
    name="x", argv=ARGV, cwd="/srv/{label}", env={"WHO": "{user}"}, user="svc-{label}", cgroup="/s/{name}"
)
CALL = Call(service="shop.example", template="x", target="unix:/run/shop", user="ann", database="db1")


def test_placeholders_are_filled() -> None:
    command = TEMPLATE.fill(CALL)
    assert command.argv == (
        *("/bin/x", "shop.example", "--label=shop", "ann", "db1", "/run/shop", "unix:/run/shop"),
        *("/srv/ann/shop.example", "{x}"),
    )
    assert (command.cwd, command.env, command.user, command.cgroup) == (
        *("/srv/shop", {"WHO": "ann"}, "svc-shop", "/s/shop.example"),
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"user": "../x"}, "user"),
        ({"user": "-x"}, "user"),
        ({"user": ".x"}, "user"),
        ({"user": "a b"}, "user"),
        ({"user": "a\n"}, "user"),
        ({"user": ""}, "user"),
        ({"user": "a" * 64}, "user"),
        ({"user": "é"}, "user"),
        ({"user": None}, "argv"),
        ({"database": "$(x)"}, "database"),
        ({"label": "a/b"}, "label"),
        ({"service": "-x"}, "label"),
        ({"service": "a..b"}, "name"),
        ({"service": "a/../../b", "label": "a"}, "name"),
        ({"target": "unix:/run/../etc/x"}, "target"),
        ({"target": "unix:run"}, "target"),
        ({"target": "unix:/run/" + "a" * 103}, "target"),
        ({"target": "unix:/run/a;reboot"}, "argv"),
        ({"target": "unix:/run/$(reboot)"}, "argv"),
        ({"target": "unix:/run/a\nb"}, "target"),
        ({"target": "tcp:a.example:80"}, "target"),
        ({"target": "tcp:127.0.0.1:0"}, "target"),
        ({"target": "tcp:127.0.0.1:80"}, "argv"),
    ],
)
def test_what_may_not_be_in_a_command(change: dict[str, str], key: str) -> None:
    with pytest.raises(BadConfig) as caught:
        TEMPLATE.fill(replace(CALL, **change))
    assert caught.value.path == key


@given(*[st.text(max_size=80) | st.text("ab-._/ ;$", max_size=8)] * 4)
def test_whatever_is_said_stays_in_its_place(service: str, user: str, database: str, path: str) -> None:
    said = Call(service=service, template="x", target=f"unix:/{path}", label="l", user=user, database=database)
    try:
        command = TEMPLATE.fill(said)
    except BadConfig:
        return
    assert len(command.argv) == len(ARGV)
    assert all(not one.startswith("-") for place, one in enumerate(command.argv) if place != 2)
    for one in (*command.argv, command.cwd, *command.env.values(), command.cgroup or ""):
        assert ".." not in one.split("/")
        assert not set(one) & set(" ;$`'\"\n\\|&<>()*?")


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"name": "A"}, "name"),
        ({"argv": ()}, "argv"),
        ({"argv": ("{user}",)}, "argv"),
        ({"argv": ("x", "{nothing}")}, "argv"),
        ({"argv": ("x", "{user")}, "argv"),
        ({"argv": ("x", "user}")}, "argv"),
        ({"argv": ("x", "a\0b")}, "argv"),
        ({"argv": "x"}, "argv"),
        ({"argv": ("x",) * 257}, "argv"),
        ({"user": "{user}"}, "user"),
        ({"group": "{label}x"}, "group"),
        ({"cwd": "srv"}, "cwd"),
        ({"cwd": "/srv/../etc"}, "cwd"),
        ({"writable": ("x",)}, "writable"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"env": {"LISTEN_FDS": "9"}}, "env"),
        ({"env": {"NOTIFY_SOCKET": "x"}}, "env"),
        ({"umask": 0o1000}, "umask"),
        ({"rlimits": {"locks": 1}}, "rlimits"),
        ({"rlimits": {"nofile": (2, 1)}}, "rlimits"),
        ({"rlimits": {"nofile": (-1, 1)}}, "rlimits"),
        ({"rlimits": {"nofile": (1, 2, 3)}}, "rlimits"),
        ({"nice": 20}, "nice"),
        ({"cgroup": "/"}, "cgroup"),
        ({"cgroup": "/a/../b"}, "cgroup"),
        ({"start_timeout_s": 0}, "start_timeout_s"),
        ({"stop_timeout_s": float("nan")}, "stop_timeout_s"),
        ({"idle_s": -1}, "idle_s"),
        ({"stop_signal": "SIGTERM"}, "stop_signal"),
        ({"ready": "started"}, "ready"),
        ({"private_network": True}, "private_network"),
        ({"private_network": True, "ready": Ready.NOTIFY, "socket": Socket.PASS}, "private_network"),
    ],
)
def test_what_a_template_may_not_say(keys: dict[str, object], key: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Template(**{"name": "x", "argv": ("/bin/x",), **keys})  # type: ignore[arg-type]
    assert caught.value.path == key


def test_two_of_one_name() -> None:
    with pytest.raises(BadConfig, match="taken"):
        by_name([TEMPLATE, replace(TEMPLATE, cwd="/")])


def test_as_json_and_back() -> None:
    full = replace(
        TEMPLATE, rlimits={"nofile": 7, "core": (0, -1)}, idle_s=None, writable=("/srv",), socket=Socket.PASS
    )
    assert Template.from_row(json.loads(json.dumps(full.row()))) == full


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "marks": [1], "records": 3}']
)
def test_a_state_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadConfig):
        Saved.read(json.loads(text))


def test_in_a_file() -> None:
    text = """
[[template]]
name = "pg"
argv = ["postgres", "-D", "/srv/{label}"]
umask = 0o077
rlimits = { nofile = 4096, core = [0, 0] }
ready = "notify"
idle_s = 0
"""
    (found,) = BrokerFile.parse(text.encode(), "broker.toml").templates
    assert found == Template(
        name="pg",
        argv=("postgres", "-D", "/srv/{label}"),
        umask=0o077,
        rlimits={"nofile": 4_096, "core": (0, 0)},
        ready=Ready.NOTIFY,
        idle_s=None,
    )
    for line, words in {
        'argv = ["a"]\nname = "pg"': "name: 'pg' is taken by an earlier template",
        'argv = ["{user}"]\nname = "b"': "template[1].argv: '{user}'",
        'argv = ["a"]\nname = "b"\nnoise = 1': "template[1].noise",
        'argv = ["a"]\nname = "b"\nnice = "3"': "template[1].nice",
    }.items():
        with pytest.raises(BadConfig) as caught:
            BrokerFile.parse(f"{text}[[template]]\n{line}\n".encode(), "broker.toml")
        assert words in str(caught.value)
