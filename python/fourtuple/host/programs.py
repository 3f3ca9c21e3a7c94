"""What kind of program a file is: which dynamic loader it asks for, what it was made with, whose rights it takes on.

Decides by the file's own headers (elf(5)), following a script to its interpreter as execve(2) does. Runs nothing. Knows
nothing of what the answer is for.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fourtuple.errors import BadConfig

_MOST_SCRIPTS = 5
"""How often a script may name a script (exec_binprm allows as many)."""
_SHEBANG_BYTES = 256
"""BINPRM_BUF_SIZE: what the kernel reads of a script's first line."""
_IDENTIFICATION = struct.Struct("=4sBB10x")
_HEADERS = {1: "HHIIIIIHHH", 2: "HHIQQQIHHH"}
"""The header after its identification, by class (32 and 64 bits), up to e_phnum."""
_SEGMENTS = {1: "IIIIIIII", 2: "IIQQQQQQ"}
_SEGMENT_LENGTH_FIELD = {1: 4, 2: 5}
_SEGMENT_OFFSET_FIELD = {1: 1, 2: 2}
_INTERPRETER, _NOTE = 3, 4
_MOST_SEGMENTS = 512
_MOST_SEGMENT_BYTES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The file that the kernel would run, after any scripts."""

    path: Path
    bits: int
    machine: int
    """e_machine: 62 is x86-64, 183 is AArch64."""
    loader: str
    """The dynamic loader that it asks for, such as /lib64/ld-linux-x86-64.so.2; "" if it is linked statically."""
    made_by_go: bool
    takes_on_rights: bool
    """Whether starting it gives this process rights of the file: set-user-id, set-group-id or file capabilities."""

    @property
    def libc(self) -> str:
        """ "musl", "glibc", or "" if it is linked statically. Anything but musl's loader is taken for glibc's."""
        if not self.loader:
            return ""
        return "musl" if Path(self.loader).name.startswith("ld-musl") else "glibc"


def read_program(path: Path) -> Program:
    """Read what a program is; BadConfig if the kernel could not run it, or it cannot be read."""
    for _ in range(_MOST_SCRIPTS):
        try:
            with path.open("rb") as file:
                first_line = file.read(_SHEBANG_BYTES).partition(b"\n")[0]
                if not first_line.startswith(b"#!"):
                    return _elf(path, file)
        except OSError as error:
            raise BadConfig("COMMAND", f"{path} cannot be read: {error.strerror}") from None
        words = first_line[2:].split()
        if not words:
            break
        path = Path(os.fsdecode(words[0]))
    raise BadConfig("COMMAND", f"{path} is a script whose first line names no program that runs it")


def _elf(path: Path, file: BinaryIO) -> Program:
    file.seek(0)
    try:
        magic, kind, order = _IDENTIFICATION.unpack(file.read(_IDENTIFICATION.size))
        if magic != b"\x7fELF" or kind not in _HEADERS or order not in (1, 2):
            raise ValueError
        byte_order = "<" if order == 1 else ">"
        header = struct.Struct(byte_order + _HEADERS[kind])
        _, machine, _, _, table, _, _, _, length, count = header.unpack(file.read(header.size))
        loader, made_by_go = "", False
        for segment, content in _segments(file, byte_order + _SEGMENTS[kind], kind, table, length, count):
            if segment == _INTERPRETER:
                loader = os.fsdecode(content.rstrip(b"\0"))
            elif b"Go\0\0" in content:
                made_by_go = True
    except (struct.error, ValueError, OverflowError):
        raise BadConfig("COMMAND", f"{path} is neither an ELF program nor a script with a #! line") from None
    return Program(
        path=path,
        bits=32 * kind,
        machine=machine,
        loader=loader,
        made_by_go=made_by_go,
        takes_on_rights=_takes_on_rights(path),
    )


def _segments(file: BinaryIO, form: str, kind: int, table: int, length: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Type and content of each segment that names the loader, or holds notes (Go writes one of its own)."""
    layout = struct.Struct(form)
    for number in range(min(count, _MOST_SEGMENTS)):
        file.seek(table + number * length)
        fields = layout.unpack(file.read(layout.size))
        if fields[0] in (_INTERPRETER, _NOTE):
            file.seek(fields[_SEGMENT_OFFSET_FIELD[kind]])
            yield fields[0], file.read(min(fields[_SEGMENT_LENGTH_FIELD[kind]], _MOST_SEGMENT_BYTES))


def _takes_on_rights(path: Path) -> bool:
    """As the kernel decides AT_SECURE (bprm_fill_uid, cap_bprm_creds_from_file); rights it has already do not count."""
    status = path.stat()
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        return True
    if status.st_mode & stat.S_ISGID and status.st_gid != os.getegid():
        return True
    if os.geteuid() == 0:
        return False
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False
