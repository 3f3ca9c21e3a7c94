"""What is in packaging/: units as systemd reads them, users, folders and the image's recipe, held to the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from fourtuple.brokerfile import BrokerFile

ROOT = Path(__file__).parent.parent.parent
PACKAGING = ROOT / "packaging"
UNITS = ("fourtuple.service", "fourtuple.socket")
INSTRUCTIONS = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "STOPSIGNAL", "USER", "VOLUME"),
    "WORKDIR",
}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there."""
    for name in UNITS:
        text = (PACKAGING / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/fourtuple", shutil.which("true") or "/bin/true"))
    return tmp_path


def test_systemd_understands_every_line(units: Path) -> None:
    done = analyze("verify", "--man=no", *(str(units / name) for name in UNITS))
    # Of other units of this machine it speaks, too.
    ours = [line for line in done.stderr.splitlines() if "fourtuple" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr
    (units / UNITS[0]).write_text((units / UNITS[0]).read_text().replace("TasksMax", "TaskMax"))
    assert "TaskMax" in analyze("verify", "--man=no", str(units / UNITS[0])).stderr, "the test cannot fail"


def test_the_service_has_what_its_supervisor_needs() -> None:
    text = (PACKAGING / "fourtuple.service").read_text()
    capabilities = set(re.findall(r"CAP_\w+", text))
    # To become another user, to empty the bounding set, to make namespaces, to end services, to bind low ports.
    assert {
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SYS_ADMIN",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
    } <= capabilities
    # These would hold for services and for the broker's own namespaces.
    for never in ("NoNewPrivileges=yes", "RestrictNamespaces", "PrivateTmp", "ProtectSystem", "MemoryDenyWrite"):
        assert never not in text
    program, command = re.findall(r"^ExecStart=(\S+) (\w+)", text, re.MULTILINE)[0]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(program).name in scripts
    assert command == "serve"


def test_the_installed_file_is_read_and_its_ports_are_the_units() -> None:
    file = BrokerFile.read(PACKAGING / "broker.toml")
    streams = re.findall(r"^ListenStream=(.*)$", (PACKAGING / "fourtuple.socket").read_text(), re.MULTILINE)
    assert [table.address for table in file.listen] == streams
    users = (PACKAGING / "sysusers.d" / "fourtuple.conf").read_text()
    assert file.confine.user in re.findall(r"^u (\w+)", users, re.MULTILINE)


def test_users_and_folders_are_of_five_and_more_fields() -> None:
    for line in (PACKAGING / "tmpfiles.d" / "fourtuple.conf").read_text().splitlines():
        if not line.startswith("#"):
            kind, path, mode, user, group, age = line.split()
            assert (kind, age) == ("d", "-")
            assert path.startswith("/")
            assert re.fullmatch(r"0[0-7]{3}", mode)
            assert user in ("fourtuple", "root")
            assert group


def test_the_recipe_of_the_image_copies_what_there_is() -> None:
    text = (PACKAGING / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in lines} <= INSTRUCTIONS
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    for word, rest in lines:
        if word == "FROM":
            assert re.match(r"docker\.io/library/\w+:\S+", rest), "a name without registry and tag means many images"
        if word != "COPY":
            continue
        if rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
    version = re.search(r"rust:(\d+)\.(\d+)", text)
    least = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["rust-version"]
    assert version is not None
    assert tuple(map(int, version.groups())) >= tuple(map(int, least.split(".")))
