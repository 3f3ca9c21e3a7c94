"""What the preload library makes of a listener that a broker serves; real servers are in tests/netns."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import handed

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "fourtuple", "run"]


def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    known = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60, check=False, env=known)


@pytest.fixture(params=["127.0.0.1", "[::1]", "unix"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "unix":
        return str(tmp_path / "listener")
    host = request.param.strip("[]")
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return f"{request.param}:{probe.getsockname()[1]}"


def test_every_answer_is_a_listeners(listener: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.unit.listener_answers", listener]
    without = python(*words)
    assert (without.returncode, without.stderr) == (0, "")
    assert without.stdout.count("\n") > 50
    done = python(*RUN, "--handoff", f"{listener}={tmp_path}/here", "--", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == without.stdout.splitlines()
    assert (tmp_path / "here").is_socket(), "it has stepped in"


@pytest.mark.parametrize("listener", ["127.0.0.1", "unix"], indirect=True)
@pytest.mark.parametrize("scene", handed.SCENES)
def test_scene(scene: str, listener: str, tmp_path: Path) -> None:
    path = tmp_path / "here"
    words = [sys.executable, handed.__file__, scene, listener, str(path)]
    done = python(*RUN, "--handoff", f"{listener}={path}", "--", *words)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_without_the_variable_nothing_is_different(listener: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.unit.listener_answers", listener]
    with_sources = python(*RUN, "--from", "127.0.0.1", "--", *words)
    assert with_sources.stdout.splitlines() == python(*words).stdout.splitlines()


BIND = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 1)); s.listen(); print('listens')"


@pytest.mark.parametrize(("mode", "expected"), [([], 0o600), (["--mode", "660"], 0o660)])
def test_the_mode_of_the_socket_file(tmp_path: Path, mode: list[str], expected: int) -> None:
    path = tmp_path / "here"
    words = [*RUN, "--handoff", f"127.0.0.1:1={path}", *mode, "--", "sh", "-c", 'umask 77; exec "$@"', "sh"]
    assert python(*words, sys.executable, "-c", BIND).stdout == "listens\n"
    assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        ("folder", "there is no such folder"),
        ("file", "something that is no socket"),
        ("stream", "another process is there"),
        ("link", "something that is no socket"),
    ],
)
def test_what_is_at_the_path_stays(tmp_path: Path, prepare: str, why: str) -> None:
    path = tmp_path / "folder" / "here" if prepare == "folder" else tmp_path / "here"
    with socket.socket(socket.AF_UNIX) as live:
        if prepare == "file":
            path.write_text("mine")
        elif prepare == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif prepare == "stream":
            live.bind(str(path))
            live.listen()
        before = path.lstat() if prepare != "folder" else None
        done = python(*RUN, "--handoff", f"127.0.0.1:1={path}", "--", sys.executable, "-c", BIND)
        assert done.returncode == 1
        assert f"fourtuple: nothing can be handed over at {path}: " in done.stderr
        assert why in done.stderr
        assert before is None or path.lstat().st_ino == before.st_ino


def test_two_families_have_one_queue(tmp_path: Path) -> None:
    path = tmp_path / "here"
    program = f"""
import os, socket
from pathlib import Path
from tests.unit.handing import hand_over
one, two = socket.socket(), socket.socket(socket.AF_INET6)
one.bind(("127.0.0.1", 1)), two.bind(("::1", 1))
one.listen(), two.listen()
one.setblocking(False)
for listener in (one, two):
    with hand_over(Path({str(path)!r})) as client, listener.accept()[0] as taken:
        assert taken.getpeername() == client.getsockname()
"""
    words = [*RUN, "--handoff", f"127.0.0.1:1={path}", "--handoff", f"[::1]:1={path}", "--"]
    done = python(*words, sys.executable, "-c", program)
    assert (done.returncode, done.stderr) == (0, "")


CANCELLED = """
#include <pthread.h>
#include <stdio.h>
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

static int started[2];
static void clean(void *nothing) { puts("cleaned up"); }
static void *wait_for_nobody(void *nothing) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(1), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 1)) perror("listen");
    pthread_cleanup_push(clean, NULL);
    write(started[1], "", 1);
    accept(listener, NULL, NULL);
    perror("accept came back");
    pthread_cleanup_pop(0);
    return NULL;
}

int main(void) {
    pthread_t thread;
    void *result;
    char byte;
    pipe(started);
    pthread_create(&thread, NULL, wait_for_nobody, NULL);
    read(started[0], &byte, 1);
    usleep(200000); /* cancelled before or in accept(): both are to end well, the second is what is meant */
    pthread_cancel(thread);
    pthread_join(thread, &result);
    puts(result == PTHREAD_CANCELED ? "cancelled" : "not cancelled");
    return 0;
}
"""


def test_a_thread_can_be_cancelled_in_accept(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed (Debian: gcc)")
    source, program = tmp_path / "cancelled.c", tmp_path / "cancelled"
    source.write_text(CANCELLED)
    subprocess.run([gcc, "-O2", "-w", "-o", program, source, "-lpthread"], check=True, timeout=60)
    done = python(*RUN, "--handoff", f"127.0.0.1:1={tmp_path}/here", "--", program)
    assert (done.stdout, done.stderr, done.returncode) == ("cleaned up\ncancelled\n", "", 0)
