"""The numbers and structures of the protocol, against the specification's own, byte for byte."""

from __future__ import annotations

import pytest

from cowstore.nbd import wire
from tests.unit import nbd_messages as nbd

HANDSHAKE_MAGICS = {
    "GREETING_MAGIC": b"NBDMAGIC",
    "OPTION_MAGIC": b"IHAVEOPT",
    "OPTION_REPLY_MAGIC": bytes.fromhex("0003e889045565a9"),
}
MAGICS = {
    "REQUEST_MAGIC": bytes.fromhex("25609513"),
    "SIMPLE_REPLY_MAGIC": bytes.fromhex("67446698"),
    "CHUNK_MAGIC": bytes.fromhex("668e33ef"),
}
# As the specification counts them, in bits.
FLAGS = {
    "FLAG_FIXED_NEWSTYLE": 0,
    "FLAG_NO_ZEROES": 1,
    "HAS_FLAGS": 0,
    "READ_ONLY": 1,
    "SEND_FLUSH": 2,
    "SEND_FUA": 3,
    "SEND_TRIM": 5,
    "SEND_WRITE_ZEROES": 6,
    "SEND_DF": 7,
    "CAN_MULTI_CONN": 8,
    "SEND_CACHE": 10,
    "SEND_FAST_ZERO": 11,
    "FUA": 0,
    "NO_HOLE": 1,
    "DF": 2,
    "REQ_ONE": 3,
    "FAST_ZERO": 4,
    "DONE": 0,
    "STATE_HOLE": 0,
    "STATE_ZERO": 1,
}
OPTIONS = {
    "EXPORT_NAME": 1,
    "ABORT": 2,
    "LIST": 3,
    "STARTTLS": 5,
    "INFO": 6,
    "GO": 7,
    "STRUCTURED_REPLY": 8,
    "LIST_META_CONTEXT": 9,
    "SET_META_CONTEXT": 10,
}
ANSWERS = {"ACK": 1, "SERVER": 2, "INFO": 3, "META_CONTEXT": 4, "ERROR": 1 << 31}
ERROR_ANSWERS = {
    "ERR_UNSUP": 1,
    "ERR_POLICY": 2,
    "ERR_INVALID": 3,
    "ERR_TLS_REQD": 5,
    "ERR_UNKNOWN": 6,
    "ERR_SHUTDOWN": 7,
    "ERR_TOO_BIG": 9,
}
INFOS = {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3}
COMMANDS = {
    "READ": 0, "WRITE": 1, "DISC": 2, "FLUSH": 3, "TRIM": 4, "CACHE": 5, "WRITE_ZEROES": 6, "BLOCK_STATUS": 7,
}  # fmt: skip
CHUNKS = {"CHUNK_NONE": 0, "CHUNK_DATA": 1, "CHUNK_HOLE": 2, "CHUNK_STATUS": 5, "CHUNK_ERROR": 0x8001}
ERRORS = {
    "EPERM": 1,
    "EIO": 5,
    "ENOMEM": 12,
    "EINVAL": 22,
    "ENOSPC": 28,
    "EOVERFLOW": 75,
    "ENOTSUP": 95,
    "ESHUTDOWN": 108,
}


@pytest.mark.parametrize(("name", "magic"), [*HANDSHAKE_MAGICS.items(), *MAGICS.items()])
def test_magics(name, magic):
    assert getattr(wire, name).to_bytes(len(magic), "big") == magic


@pytest.mark.parametrize(("name", "bit"), FLAGS.items())
def test_flags(name, bit):
    assert getattr(wire, name) == 1 << bit


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (wire.Option, OPTIONS),
        (wire.Answer, {**ANSWERS, **{name: number | 1 << 31 for name, number in ERROR_ANSWERS.items()}}),
        (wire.Info, INFOS),
        (wire.Command, COMMANDS),
        (wire.Error, ERRORS),
    ],
)
def test_numbers(numbers, expected):
    assert {one.name: one.value for one in numbers} == expected


@pytest.mark.parametrize(("name", "number"), CHUNKS.items())
def test_chunk_types(name, number):
    assert getattr(wire, name) == number


@pytest.mark.parametrize("name", [*OPTIONS, *COMMANDS, *ERRORS])
def test_the_clients_numbers_are_the_same(name):
    """Both were typed from the specification; a slip in one of them shows here."""
    assert getattr(nbd, name) == {**OPTIONS, **COMMANDS, **ERRORS}[name]


@pytest.mark.parametrize("name", ERROR_ANSWERS)
def test_the_clients_errors_of_options_are_the_same(name):
    assert getattr(nbd, name.removeprefix("ERR_")) == ERROR_ANSWERS[name] | 1 << 31


def test_reply_to_an_option():
    head = "0003e889045565a9 00000003 00000002 00000005"
    assert wire.option_reply(3, 2, b"hello") == bytes.fromhex(head) + b"hello"


def test_simple_reply():
    assert wire.simple_reply(0x1122334455667788, 5) == bytes.fromhex("67446698 00000005 1122334455667788")


def test_error_chunk():
    expected = bytes.fromhex("668e33ef 0001 8001 1122334455667788 00000009 0000001c 0003") + b"why"
    assert wire.error_chunk(0x1122334455667788, 28, "why") == expected


@pytest.mark.parametrize(
    ("structure", "values", "expected"),
    [
        (wire.GREETING, (1, 2, 3), "0000000000000001 0000000000000002 0003"),
        (wire.OPTION_HEADER, (1, 2, 3), "0000000000000001 00000002 00000003"),
        (wire.EXPORT, (1, 2), "0000000000000001 0002"),
        (wire.INFO_EXPORT, (0, 1, 2), "0000 0000000000000001 0002"),
        (wire.INFO_BLOCK_SIZE, (3, 1, 2, 4), "0003 00000001 00000002 00000004"),
        (wire.REQUEST, (1, 2, 3, 4, 5, 6), "00000001 0002 0003 0000000000000004 0000000000000005 00000006"),
        (wire.CHUNK, (1, 2, 3, 4, 5), "00000001 0002 0003 0000000000000004 00000005"),
        (wire.DATA_CHUNK, (1, 2, 3, 4, 5, 6), "00000001 0002 0003 0000000000000004 00000005 0000000000000006"),
        (wire.DESCRIPTOR, (1, 2), "00000001 00000002"),
    ],
)
def test_structures(structure, values, expected):
    assert structure.pack(*values) == bytes.fromhex(expected)


def error_of(message: str) -> nbd.Answer:
    replies = nbd.Replies(structured=True)
    replies.expect(nbd.Request(nbd.READ, 7, 0, 1))
    return replies.read(nbd.taking(wire.error_chunk(7, nbd.EIO, message)))


@pytest.mark.parametrize("message", ["", "why", "x" * 4096, "é" * 2048])
def test_message_of_an_error_comes_whole(message):
    assert error_of(message).message == message


def test_message_that_is_too_long_is_cut():
    assert error_of("x" * 5000).message == "x" * 4096


def test_message_without_an_encoding_is_told_all_the_same():
    assert error_of("a file named \udcff").message.startswith("a file named")


def test_message_is_not_cut_within_a_character():
    assert error_of("x" + "é" * 3000).message == "x" + "é" * 2047
