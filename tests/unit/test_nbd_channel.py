"""Channels on real sockets: whose turn it is, what waits for whom, and what becomes of it when nobody reads."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cowstore.nbd import channel as channels
from cowstore.nbd.channel import Channel
from tests.unit.nbd_lines import until

MIB = 1 << 20
PATIENCE = 30.0


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel after its handshake, and its client."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    channel = Channel(ours)
    channel.settle(PATIENCE)
    yield channel, theirs
    channel.drop()
    theirs.close()
    until(lambda: not senders())
    channel.close()


def senders() -> list[threading.Thread]:
    """Threads that wait for clients that do not read."""
    return [thread for thread in threading.enumerate() if thread.name == "cowstore-sender"]


def take(client: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, if they come."""
    data = b""
    while len(data) < count and (part := client.recv(count - len(data))):
        data += part
    return data


def fill(channel: Channel) -> int:
    """Sends until nothing goes out without waiting, bytes of ``f``; returns how many."""
    count = 0
    while not (rest := channel.start([b"f" * 1000])):
        count += 1000
    finishing = threading.Thread(target=channel.finish, args=[rest])
    finishing.start()
    return count + 1000


# ------------------------------------------------------------------------------------------------------- sending


def test_parts_go_out_in_their_order(pair):
    channel, client = pair
    parts = [bytes([number % 256]) * (number % 50) for number in range(3000)]
    sending = threading.Thread(target=lambda: channel.finish(channel.start(parts)))
    sending.start()
    assert take(client, sum(map(len, parts))) == b"".join(parts)
    sending.join()


def test_what_is_begun_is_ended_before_anything_else(pair):
    channel, client = pair
    rest = channel.start([b"a" * 2 * MIB])
    assert rest
    channel.post(b"posted")
    finishing = threading.Thread(target=channel.finish, args=[rest])
    finishing.start()
    assert take(client, 2 * MIB + 6) == b"a" * 2 * MIB + b"posted"
    finishing.join()


def test_what_others_send_waits_for_its_turn(pair):
    channel, client = pair
    rest = channel.start([b"a" * MIB])
    sending = threading.Thread(target=channel.send, args=[b"sent"])
    sending.start()
    channel_finish = threading.Thread(target=channel.finish, args=[rest])
    channel_finish.start()
    assert take(client, MIB + 4) == b"a" * MIB + b"sent"
    sending.join()
    channel_finish.join()


def test_many_threads_send_whole_messages(pair):
    channel, client = pair
    size, count = 300, 400

    def own(dice: random.Random) -> None:
        for _ in range(count):
            rest = channel.start([b"o" * size] * dice.randint(1, 1))
            if rest:
                channel.finish(rest)

    def others(letter: bytes) -> None:
        for _ in range(count):
            channel.post(letter * size)

    threads = [threading.Thread(target=own, args=[random.Random(1)])]
    threads += [threading.Thread(target=others, args=[letter]) for letter in (b"x", b"y", b"z")]
    for thread in threads:
        thread.start()
    data = take(client, 4 * count * size)
    for thread in threads:
        thread.join()
    messages = [data[at : at + size] for at in range(0, len(data), size)]
    assert {message for message in messages if len(set(message)) != 1} == set()
    assert [messages.count(letter * size) for letter in (b"o", b"x", b"y", b"z")] == [count] * 4


# ------------------------------------------------------------------------------------------------------- posting


def test_posting_does_not_wait_for_a_client_that_does_not_read(pair):
    channel, client = pair
    count = fill(channel)
    for number in range(100):
        channel.post(number.to_bytes(4, "big"))
    assert take(client, count) == b"f" * count
    assert take(client, 400) == b"".join(number.to_bytes(4, "big") for number in range(100))
    until(lambda: not senders())


def test_what_is_posted_meanwhile_goes_out_in_its_order(pair):
    channel, client = pair
    posted = 0
    while not senders():
        channel.post(posted.to_bytes(4, "big") * 50)
        posted += 1
    for number in range(posted, posted + 1000):
        channel.post(number.to_bytes(4, "big") * 50)
    posted += 1000
    assert take(client, 200 * posted) == b"".join(number.to_bytes(4, "big") * 50 for number in range(posted))
    assert len(senders()) <= 1


def test_client_that_never_reads_what_was_posted_is_dropped():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel.settle(0.2)
    while not senders():
        channel.post(b"x" * 200)
    until(lambda: channel.is_dropped)
    until(lambda: not senders())
    channel.post(b"to nobody")
    theirs.close()
    channel.close()


def test_posting_to_a_client_that_is_gone_drops_it(pair):
    channel, client = pair
    client.close()
    channel.post(b"x")
    assert channel.is_dropped


def test_turn_is_given_back_where_no_thread_can_be_had(pair, monkeypatch):
    channel, _ = pair
    begin = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "cowstore-sender":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(5000):  # more than any socket holds
        channel.post(b"x" * 200)
    channel.drop()
    with pytest.raises(OSError, match="Broken pipe"):
        channel.start([b"y"])


# ----------------------------------------------------------------------------------------------------- receiving


def test_what_came_before_hanging_up_can_be_taken(pair):
    channel, client = pair
    client.sendall(b"x" * 1000)
    channel.hang_up(PATIENCE)
    space, got = memoryview(bytearray(300)), 0
    while count := channel.receive_into(space):
        got += count
    assert got == 1000


def test_hanging_up_wakes_who_waits(pair):
    channel, _ = pair
    got: list[int] = []
    receiving = threading.Thread(target=lambda: got.append(channel.receive_into(memoryview(bytearray(10)))))
    receiving.start()
    time.sleep(0.05)  # it waits now, or will find the end at once
    channel.hang_up(PATIENCE)
    receiving.join(PATIENCE)
    assert got == [0]


def test_dropping_wakes_who_sends(pair):
    channel, _ = pair
    rest = channel.start([b"a" * 4 * MIB])
    failed: list[BaseException] = []

    def finish() -> None:
        try:
            channel.finish(rest)
        except OSError as error:
            failed.append(error)

    sending = threading.Thread(target=finish)
    sending.start()
    channel.drop()
    sending.join(PATIENCE)
    assert failed


def test_handshake_ends_by_its_deadline(pair):
    channel, _ = pair
    with pytest.raises(TimeoutError):
        channel.receive_before(time.monotonic() + 0.1)
    with pytest.raises(TimeoutError):
        channel.receive_before(time.monotonic() - 1)


@pytest.mark.parametrize("sent", range(7))
def test_what_is_left_of_parts(sent):
    parts = [b"ab", b"", b"c", b"def"]
    assert b"".join(channels.after(parts, sent)) == b"abcdef"[sent:]
