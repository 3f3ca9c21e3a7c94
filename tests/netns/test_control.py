"""The control socket of a broker that runs: who is heard, what is said, and that a dormant API costs nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_metrics

from fourtuple.control.client import Declined
from fourtuple.control.exposition import LOADS_ONLY
from fourtuple.errors import MissingFeature
from fourtuple.metrics import COUNTERS
from fourtuple.registry import Registry
from tests.netns.brokering import PATIENCE_S, needed, wait_for
from tests.netns.controlling import Controlled, as_nobody, controlled, over_tcp, raw

READER, IN_READERS, ADMIN = 12_001, 12_002, 12_003
GROUP = 12_009


@pytest.fixture(scope="module")
def broker() -> Iterator[Controlled]:
    needed("curl", "setpriv")
    with controlled(
        *("--readers", str(READER), "--readers", f"group:{GROUP}", "--admins", str(ADMIN)), services=1_000
    ) as made:
        yield made


def run(*command: str, socket: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`fourtuple` with these arguments."""
    done = subprocess.run(
        (sys.executable, "-m", "fourtuple", *command, "--socket", str(socket)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_what_it_tells_and_can_be_told(broker: Controlled) -> None:
    status = broker.ask("GET", "/v1/status")
    assert (status["state"], status["workers"], status["services"]["known"]) == ("serving", 2, 1_000)
    assert status["listeners"] == [f"127.0.0.1:{broker.port}"]
    roles = {one["role"]: one for one in status["processes"]}
    assert set(roles) == {"broker", "control"}
    broker.wait_for_event("control_started")
    assert [roles["control"]["pid"]] == broker.api_pids()
    assert set(broker.ask("GET", "/v1/reasons")) == {
        row.name.removeprefix("ended_") for row in COUNTERS if row.name.startswith("ended_")
    }
    found = broker.ask("GET", "/v1/services/s7.example.com")
    assert (found["name"], found["standing"]) == ("s7.example.com", "unmanaged")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field", "value"),
    [
        ("GET", "/v1/nothing", None, 404, "path", "/v1/nothing"),
        ("PUT", "/v1/status", None, 405, "method", "PUT"),
        ("GET", "/v1/services/none.example.com", None, 404, "name", "none.example.com"),
        ("GET", "/v1/connections?most=0", None, 422, "most", "'0'"),
        ("GET", "/v1/connections?source=192.0.2.300", None, 422, "source", "192.0.2.300"),
        ("DELETE", "/v1/connections/zz", None, 422, "id", "'zz'"),
        ("PATCH", "/v1/limits", {}, 422, "body", "{}"),
        ("PATCH", "/v1/limits", {"most_connections": -5}, 422, "most_connections", "-5"),
        ("PATCH", "/v1/limits", {"colour": 5}, 422, "colour", "5"),
        ("POST", "/v1/upgrade", {"executable": "python"}, 422, "executable", "'python'"),
        ("POST", "/v1/services/s1.example.com/wake", None, 409, "name", "s1.example.com"),
    ],
)
def test_an_error_names_field_value_and_remedy(
    broker: Controlled, method: str, path: str, body: object, status: int, field: str, value: str
) -> None:
    with pytest.raises(Declined) as declined:
        broker.ask(method, path, body)
    problem = declined.value.problem
    assert (declined.value.status, problem["status"], problem["field"], problem["value"]) == (
        status,
        status,
        field,
        value,
    )
    assert problem["detail"]
    assert problem["remedy"]


def test_others_are_not_heard_and_counted(broker: Controlled) -> None:
    before = broker.metrics("fourtuple_control_denied_total")
    assert as_nobody(broker.socket, "/v1/status") == (
        403,
        {
            "type": "about:blank",
            "title": "Forbidden",
            "status": 403,
            "detail": "the control socket is not for this user",
            "field": "user",
            "value": "65534",
            "remedy": "have it named among readers or admins in [control] of broker.toml",
        },
    )
    # What is no HTTP is answered the same, and a body of any size: it is not looked at.
    said = subprocess.run(
        (
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            sys.executable,
            "-c",
            UNHEARD,
            str(broker.socket),
        ),
        capture_output=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert said.stdout.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    wait_for(lambda: broker.metrics("fourtuple_control_denied_total") == before + 2)
    wait_for(lambda: [one["uid"] for one in broker.events("control_denied")].count(65_534) == 2)


UNHEARD = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(30)
    client.connect(sys.argv[1])
    client.sendall(b"\\x16\\x03\\x01" + bytes(100_000))
    while data := client.recv(65_536):
        sys.stdout.buffer.write(data)
"""


def test_readers_read_and_admins_change(broker: Controlled) -> None:
    change = ("-X", "PATCH", "-H", "Content-Type: application/json", "-d", '{"most_per_source": 77}')
    for user, group in ((READER, 65_534), (IN_READERS, GROUP)):
        status, told = as_nobody(broker.socket, "/v1/limits", user=user, group=group)
        assert (status, set(told)) == (200, {"most_connections", "most_per_source", "most_per_service"})
        status, told = as_nobody(broker.socket, "/v1/limits", *change, user=user, group=group)
        assert (status, told["detail"], told["value"]) == (403, "this user may only read", str(user))
    # Among groups, one that is not the first counts as well.
    who = ("setpriv", "--reuid=12005", "--regid=65534", f"--groups=5,{GROUP}")
    curl = ("curl", "-s", "--unix-socket", str(broker.socket), "http://localhost/v1/limits")
    listed = subprocess.run((*who, *curl), capture_output=True, check=True, timeout=PATIENCE_S)
    assert "most_connections" in json.loads(listed.stdout)
    status, told = as_nobody(broker.socket, "/v1/limits", *change, user=ADMIN)
    assert (status, told["most_per_source"]) == (200, 77)
    assert broker.ask("PATCH", "/v1/limits", {"most_per_source": 0})["most_per_source"] == 0

    def changes() -> list[tuple[int, dict[str, int]]]:
        return [
            (one["uid"], one["with_changes"]) for one in broker.events("control_told") if one["verb"] == "set_limits"
        ]

    # The last of them; events are written some time later, in their order.
    wait_for(lambda: (os.getuid(), {"most_per_source": 0}) in changes())
    assert (ADMIN, {"most_per_source": 77}) in changes()
    assert not any(uid in (READER, IN_READERS) for uid, _ in changes())


def test_requests_are_bounded(broker: Controlled) -> None:
    head = b"PATCH /v1/limits HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    assert raw(broker.socket, head + b"Content-Length: 999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    chunks = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + (b"8000\r\n" + b"1" * 32_768 + b"\r\n") * 3
    assert raw(broker.socket, head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert raw(broker.socket, b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n").startswith(b"HTTP/1.1 400 ")


def test_the_command_line(broker: Controlled) -> None:
    socket = broker.socket
    assert json.loads(run("status", "--json", socket=socket).stdout)["state"] == "serving"
    changed = run("control", "limits", "--most", "5000", "--json", socket=socket).stdout
    assert json.loads(changed)["most_connections"] == 5_000
    assert "no bound (was 5,000)" in run("control", "limits", "--most", "0", socket=socket).stdout
    assert "there is no such service" in run("wake", "none.example.com", socket=socket, status=1).stderr
    assert "source" in run("connections", "--source", "nowhere", socket=socket, status=64).stderr
    nothing = run("drain", socket=socket.with_name("nothing"), status=69).stderr
    assert f"no broker listens at {socket.with_name('nothing')}" in nothing


def test_metrics_are_what_prometheus_reads(broker: Controlled) -> None:
    text = broker.client.raw("GET", "/metrics").decode()
    families = {family.name: family for family in plain_metrics(text)}
    _, answer = as_nobody(broker.socket, "/v1/status", user=READER)
    assert families["fourtuple_accepts_succeeded"].type == "counter"
    assert families["fourtuple_sniffing_now"].type == "gauge"
    assert families["fourtuple_delivery_seconds"].type == "summary"
    ended = families["fourtuple_connections_ended"].samples
    assert {one.labels["reason"] for one in ended} == set(broker.ask("GET", "/v1/reasons"))
    for row in COUNTERS:
        is_told = f"fourtuple_{row.name}" in families or row.name.startswith("ended_")
        assert is_told != row.name.startswith(LOADS_ONLY), row.name
    build = families["fourtuple_build_info"].samples[0]
    assert (build.value, build.labels["version"]) == (1, answer["version"])
    memory = {one.labels["role"]: one.value for one in families["fourtuple_process_resident_memory_bytes"].samples}
    assert set(memory) == {"broker", "control"}
    assert min(memory.values()) > 1e6

    headers = ("-H", "Accept: application/openmetrics-text; version=1.0.0", "-o", "-")
    curl = ("curl", "-si", "--unix-socket", str(broker.socket), *headers, "http://localhost/metrics")
    head, _, body = subprocess.run(curl, capture_output=True, text=True, check=True).stdout.partition("\n\n")
    assert "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8" in head
    assert {family.name for family in open_metrics(body)} == set(families)  # type: ignore[no-untyped-call]


def test_there_are_as_many_series_with_many_services_as_with_few(tmp_path: Path) -> None:
    series = []
    for number in (100, 100_000):
        lines = (f"s{one}.example.com,unix:/run/s{one}\n" for one in range(number))
        with Registry(tmp_path / str(number)) as registry:
            registry.import_text(io.BytesIO("".join(lines).encode()), "csv")
        with controlled("--store", str(tmp_path / str(number)), services=0) as broker:
            text = broker.client.raw("GET", "/metrics").decode()
        assert f'fourtuple_services{{standing="known"}} {number}\n' in text
        families = plain_metrics(text)
        series.append(sorted((one.name, *sorted(one.labels)) for family in families for one in family.samples))
    assert len(series[0]) == len(series[1]) > 60
    assert series[0] == series[1]


def test_a_dormant_api_is_no_process_and_loses_nobody() -> None:
    with controlled("--idle", "0.3", services=10) as broker:
        assert broker.api_pids() == []
        assert broker.events("control_started") == []
        wrong: list[object] = []

        def ask() -> None:
            for _ in range(4):
                try:
                    broker.ask("GET", "/v1/limits")
                except (Declined, MissingFeature) as problem:
                    wrong.append(problem)
                # Some of them come just as the process ends.
                threading.Event().wait(0.35)

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(PATIENCE_S)
        assert wrong == []
        wait_for(lambda: broker.events("control_started") != [] and broker.api_pids() == [])
        started = len(broker.events("control_started"))
        assert all(one["status"] == 0 for one in broker.events("control_ended"))
        # Whoever comes later is served by another one.
        broker.ask("GET", "/v1/limits")
        broker.wait_for_event("control_started", started + 1)
        assert len(broker.api_pids()) == 1


def test_an_api_that_dies_or_hangs_is_replaced() -> None:
    with controlled("--stuck", "0.6", services=10) as broker:
        broker.ask("GET", "/v1/limits")
        broker.wait_for_event("control_started")
        (first,) = broker.api_pids()
        os.kill(first, signal.SIGKILL)
        broker.wait_for_event("control_failed")
        wait_for(lambda: _answers(broker))
        broker.wait_for_event("control_started", 2)
        (second,) = broker.api_pids()
        assert second != first
        os.kill(second, signal.SIGSTOP)
        with pytest.raises(Declined, match="ended with an error"):
            broker.ask("GET", "/v1/limits")
        wait_for(lambda: _answers(broker))
        assert second not in broker.api_pids()
        assert [one["status"] for one in broker.events("control_failed")] == [-signal.SIGKILL] * 2


def _answers(broker: Controlled) -> bool:
    """Whether there is an API again; until then, who asks is told that there is none."""
    try:
        broker.ask("GET", "/v1/limits")
    except Declined as declined:
        if declined.status != 503 or "fourtuple[control]" not in declined.problem["remedy"]:
            raise
        return False
    return True


def test_an_api_that_cannot_start_is_said_to_who_asks() -> None:
    with controlled("--command", "/bin/false", services=10) as broker:
        # Who waits for the process that fails is told once it has.
        with pytest.raises(Declined, match="ended with an error") as declined:
            broker.ask("GET", "/v1/status")
        assert declined.value.status == 503
        broker.wait_for_event("control_failed")
        assert broker.events("control_failed")[0]["pause_s"] == 1


def test_schemathesis_finds_nothing(broker: Controlled, tmp_path: Path) -> None:
    with over_tcp(broker.socket) as port:
        url = f"http://127.0.0.1:{port}/openapi.json"
        bounds = ("--max-examples=3", "--seed=1", "--request-timeout=20", "--checks=all", "--no-color")
        done = subprocess.run(
            (sys.executable, "-m", "schemathesis.cli", "run", url, *bounds),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=20 * PATIENCE_S,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr
    assert "15 selected / 15 total" in done.stdout
