"""A program that a supervisor executes: `--broker` is a broker process, `--check FD` says whether this program could
take the supervisor's place, `--resume FD` does.

For the supervisor alone, which leaves what it has behind that descriptor (`succession`); `fourtuple serve` begins one.
A broker process is to listen before it loads what only a supervisor needs.
"""

from __future__ import annotations

import socket
import sys


def main(arguments: list[str]) -> int:
    """Exit status 0: understood, or ended as asked."""
    match arguments:
        case ["--broker"]:
            from fourtuple.supervisor import brokerprocess
            from fourtuple.supervisor.channel import Channel

            return brokerprocess.main(Channel(socket.socket(fileno=brokerprocess.CHANNEL)))
        case ["--check" | "--resume" as wish, number] if number.isdecimal():
            from fourtuple.supervisor import successor

            return (successor.check if wish == "--check" else successor.resume)(int(number))
        case _:
            print("fourtuple serve starts a supervisor; this is for its successor alone", file=sys.stderr)
            return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
