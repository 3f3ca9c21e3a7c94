"""Messages between supervisor and broker process: whole, in order, with descriptors; and what is none."""

from __future__ import annotations

import array
import json
import os
import socket
from pathlib import Path

import pytest

from fourtuple.supervisor.channel import MOST_BYTES, Channel, ChannelBroken


def descriptors_open() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_messages_come_whole_and_in_order_with_their_descriptors() -> None:
    before = descriptors_open()
    ours, theirs = Channel.pair()
    reading, writing = os.pipe()
    ours.send("first", {"text": "ä" * 1_000, "number": 1}, [writing])
    ours.send("second")
    os.close(writing)
    first, second = theirs.receive()
    assert (first.kind, first.fields) == ("first", {"text": "ä" * 1_000, "number": 1})
    assert (second.kind, second.fields, list(second.descriptors)) == ("second", {}, [])
    os.write(first.descriptors[0], b"!")
    first.close()
    assert os.read(reading, 2) == b"!"
    assert os.read(reading, 2) == b""
    os.close(reading)
    assert theirs.receive() == []
    ours.close()
    with pytest.raises(ChannelBroken):
        theirs.receive()
    theirs.close()
    assert descriptors_open() == before


def test_what_there_is_no_room_for_waits() -> None:
    before = descriptors_open()
    ours, theirs = Channel.pair()
    sent = 40
    for number in range(sent):
        ours.send("long", {"number": number, "rest": "x" * 60_000}, [0])
    assert ours.has_more_to_send
    heard: list[int] = []
    while len(heard) < sent:
        for message in theirs.receive():
            heard.append(message.fields["number"])
            message.close()
        ours.flush()
    assert heard == list(range(sent))
    assert not ours.has_more_to_send
    for number in range(sent):
        ours.send("long", {"number": number, "rest": "x" * 60_000}, [0])
    # What has not been sent is not left open.
    ours.close()
    theirs.close()
    assert descriptors_open() == before


def test_a_message_may_not_be_too_long() -> None:
    ours, theirs = Channel.pair()
    with pytest.raises(ValueError, match="possible"):
        ours.send("long", {"rest": "x" * MOST_BYTES})
    assert not ours.has_more_to_send
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b"1",
        b'{"no":"kind"}',
        b"\xff\xfe",
        b"[" * 50_000,
        json.dumps({"kind": "x"}).encode() + b"x" * MOST_BYTES,
    ],
)
def test_what_is_no_message_breaks_the_channel_and_leaves_nothing_open(packet: bytes) -> None:
    before = descriptors_open()
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(other)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))
    raw.sendmsg([packet], [rights])
    with pytest.raises(ChannelBroken):
        channel.receive()
    raw.close()
    channel.close()
    assert descriptors_open() == before


def test_who_does_not_read_is_noticed() -> None:
    ours, theirs = Channel.pair()

    def flood() -> None:
        for _ in range(200_000):
            ours.send("flood")

    with pytest.raises(ChannelBroken, match="does not read"):
        flood()
    ours.close()
    theirs.close()
