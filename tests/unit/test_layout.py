"""Structures on disk: what is encoded comes back, what is damaged is refused, and no size ever changes."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cowstore import layout
from cowstore.digest import checksum
from cowstore.layout import (
    CLONE,
    IMAGE,
    Commit,
    DeviceRecord,
    Identity,
    LeaseRecord,
    Root,
    State,
    UnknownFormatError,
)

U8, U32, U56, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 32, 56, 64))
NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True)
IDS16 = st.binary(min_size=16, max_size=16)
ROOTS = st.builds(Root, U56, st.integers(1, layout.MAX_HEIGHT), U64)
RUNS = st.lists(st.tuples(U56, U32), max_size=600).map(tuple)
DEVICES = st.builds(
    DeviceRecord, U64, NAMES, st.sampled_from([IMAGE, CLONE]), ROOTS, ROOTS, st.integers(0, 7), U64, U32, U64,
    U64, U64, IDS16,
)  # fmt: skip
STATES = st.builds(State, **{one.name: U64 for one in fields(State)})
LEASES = st.builds(LeaseRecord, U64, U32, U64, IDS16, RUNS)
KINDS = st.sampled_from(sorted(layout.KIND_NAMES))

A_DEVICE = DeviceRecord(
    7,
    "a.name",
    CLONE,
    Root(0x112233, 2, 0x445566),
    Root(0x778899, 3, 0xAABBCC),
    1,
    5,
    6,
    8,
    9,
    10,
    bytes(range(16)),
)
A_LEASE = LeaseRecord(7, 1234, 5678, bytes(range(16)), ((1, 2), (3 << 18, 4)))
A_STATE = State(1, 2, 3, 4, 5, 6, 7)
A_COMMIT = Commit(replace(A_DEVICE, children=0), A_DEVICE.sequence, ((1, 2), (3 << 18, 4)), 99)


def flips(data: bytes) -> list[bytes]:
    """The data with one bit turned over, at every byte."""
    return [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]


def cuts(data: bytes) -> list[bytes]:
    """The data cut off and made longer."""
    return [data[:length] for length in range(len(data))] + [data + b"\0", data + bytes(8)]


# ------------------------------------------------------------------------------------------------- nothing moves


def test_places_never_change():
    assert (layout.FORMAT_VERSION, layout.SLOTS_PER_SEGMENT, layout.FANOUT) == (1, 262_144, 512)
    assert (layout.DIGESTS_OFFSET, layout.SLOTS_OFFSET, layout.STAMP_OFFSETS) == (4096, 4_198_400, (512, 1024))
    assert layout.SEGMENT_SIZE == 4_198_400 + (1 << 30)
    assert (layout.CHUNK_SLOTS, layout.CHUNKS_PER_SEGMENT, layout.CHUNK_BYTES) == (4096, 64, 1024)
    assert (layout.FREE, layout.RESERVED, layout.USED, layout.DOOMED) == (0, 1, 2, 3)
    assert (layout.IMAGE, layout.CLONE, layout.EPHEMERAL, layout.HIDDEN, layout.DELETED) == (1, 2, 1, 2, 4)
    assert (layout.DATA, layout.MAP, layout.EPHEMERAL_DATA, layout.EPHEMERAL_MAP) == (1, 2, 3, 4)
    assert (layout.NAME_LIMIT, layout.MAX_SIZE, layout.MAX_HEIGHT, layout.COMMIT_RUNS) == (128, 1 << 60, 6, 319)


SAMPLES: dict[str, tuple[bytes, int, str]] = {
    "segment header": (layout.encode_segment_header(3, layout.MAP, bytes(range(16))), 48, "a9a8edea7d927698"),
    "stamp": (layout.encode_stamp(77), 24, "fe5f3b49fae1ac8f"),
    "record": (layout.seal_record(b"names", b"key", b"payload")[0], 15, "8f4487bb2b577d83"),
    "state": (A_STATE.encode(), 64, "e1b36183e7c96080"),
    "device": (A_DEVICE.encode(), 102, "a7b8fa1a15dd610e"),
    "lease": (A_LEASE.encode(), 56, "3301fa59efa11b85"),
    "segment record": (layout.encode_segment_record(layout.DATA, 5), 8, "16136435a3a0668f"),
    "chunk key": (layout.chunk_key(5, 6), 10, "d101e5903fed6955"),
    "number key": (layout.number_key(5), 8, "c28f1f5e73700506"),
    "commit": (layout.encode_commit(A_COMMIT, 1)[0], 4096, "82cba9513ec3f276"),
    "identity": (
        layout.encode_identity(Identity(bytes(range(16)), 0xABC, ("new",), ("old",))),
        194,
        "a24f06af1df685a4",
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_never_change(name):
    """A change here is another format: it needs another version, and stores of this one must still be read."""
    data, size, digest = SAMPLES[name]
    assert (len(data), f"{xxhash.xxh3_64_intdigest(data):016x}") == (size, digest)


# --------------------------------------------------------------------------------------- there and back


@given(U64, KINDS, IDS16)
def test_segment_header(number, kind, store_id):
    header = layout.encode_segment_header(number & 0xFFFFFFFF, kind, store_id)
    assert layout.decode_segment_header(header.ljust(4096, b"\0")) == (number & 0xFFFFFFFF, kind, store_id)


@given(st.lists(U64.filter(bool), max_size=6, unique=True).map(sorted))
def test_stamps_take_turns(erasures):
    header = bytearray(4096)
    for erasure in erasures:
        before, at = bytes(header), layout.next_stamp_offset(bytes(header))
        header[at : at + 24] = layout.encode_stamp(erasure)
        assert layout.decode_stamps(bytes(header)) == erasure
        for torn in range(24):  # whatever of it reaches the disk, the one before is still there
            half = before[: at + torn] + bytes([header[at + torn] ^ 1]) + before[at + torn + 1 :]
            assert layout.decode_stamps(half) in (layout.decode_stamps(before), erasure)
    assert layout.decode_stamps(bytes(header)) == max(erasures, default=0)


@given(st.binary(max_size=10), st.binary(max_size=40), st.binary(max_size=100))
def test_record(table, key, payload):
    value, check = layout.seal_record(table, key, payload)
    assert (
        layout.open_record(table, key, value)
        == layout.open_record(table, key, memoryview(value))
        == (payload, check)
    )
    for other in ((table + b"x", key), (table, key + b"x"), (table, b"x" + key)):
        with pytest.raises(ValueError, match="checksum"):
            layout.open_record(*other, value)


@given(STATES)
def test_state(state):
    assert State.decode(state.encode()) == state


@given(DEVICES)
def test_device(device):
    assert DeviceRecord.decode(device.number, device.encode()) == device
    assert device.visible == (device.flags & 6 == 0)
    assert device.ephemeral == (device.flags & 1 == 1)


@given(LEASES)
def test_lease(lease):
    assert LeaseRecord.decode(lease.number, lease.encode()) == lease


@given(RUNS)
def test_runs(runs):
    assert layout.decode_runs(layout.encode_runs(runs)) == runs


@given(U8, U32)
def test_segment_record(kind, free):
    assert layout.decode_segment_record(layout.encode_segment_record(kind, free)) == (kind, free)


@given(st.tuples(U64, st.integers(0, 63)), st.tuples(U64, st.integers(0, 63)))
def test_keys_sort_like_what_they_stand_for(one, two):
    assert layout.key_chunk(layout.chunk_key(*one)) == one
    assert (layout.chunk_key(*one) < layout.chunk_key(*two)) == (one < two)
    assert layout.key_number(layout.number_key(one[0])) == one[0]
    assert (layout.number_key(one[0]) < layout.number_key(two[0])) == (one[0] < two[0])


@given(DEVICES, U64, st.lists(st.tuples(U56, U32), max_size=1500).map(tuple), U56)
def test_commit(device, sequence, runs, next_block):
    device = replace(device, children=0, sequence=sequence)
    parts = layout.commit_parts(len(runs))
    blocks = layout.encode_commit(Commit(device, sequence, runs, next_block), parts)
    assert [len(block) for block in blocks] == [4096] * parts
    found = [layout.decode_commit(block) for block in blocks]
    assert [place[1:] for place in found] == [(part, parts) for part in range(parts)]
    assert {replace(commit, runs=()) for commit, _, _ in found} == {Commit(device, sequence, (), next_block)}
    assert tuple(run for commit, _, _ in found for run in commit.runs) == runs


@given(IDS16, U64, st.lists(st.text(max_size=9), max_size=3).map(tuple))
def test_identity(store_id, seed, compatible):
    identity = Identity(store_id, seed, (), compatible)
    assert layout.decode_identity(layout.encode_identity(identity)) == identity


@given(st.integers(0, layout.MAX_SIZE))
def test_height_is_the_least_that_holds_the_blocks(size):
    height, blocks = layout.height_for(size), -(-size // 4096)
    assert 1 <= height <= layout.MAX_HEIGHT
    assert blocks <= 512**height
    assert height == 1 or blocks > 512 ** (height - 1)


@pytest.mark.parametrize(
    ("size", "height"),
    [
        (0, 1),
        (1, 1),
        (2 << 20, 1),
        ((2 << 20) + 1, 2),
        (1 << 30, 2),
        ((1 << 30) + 1, 3),
        (1 << 39, 3),
        (1 << 60, 6),
    ],
)
def test_height(size, height):
    assert layout.height_for(size) == height


# --------------------------------------------------------------------------------------------------- damaged


CHECKED: dict[str, Any] = {
    "segment header": layout.decode_segment_header,
    "record": lambda data: layout.open_record(b"names", b"key", data),
    "commit": layout.decode_commit,
    "identity": layout.decode_identity,
}
UNCHECKED: dict[str, Any] = {
    "state": State.decode,
    "device": lambda data: DeviceRecord.decode(7, data),
    "lease": lambda data: LeaseRecord.decode(7, data),
    "segment record": layout.decode_segment_record,
}


@pytest.mark.parametrize("name", CHECKED)
def test_no_flipped_bit_passes(name):
    data = SAMPLES[name][0]
    known = layout.encode_identity(Identity(bytes(range(16)), 0xABC, (), ("old",))) if name == "identity" else data
    CHECKED[name](known)
    for damaged in flips(known):
        if name == "identity":
            try:  # white space of the text may change, nothing else
                assert layout.decode_identity(damaged) == layout.decode_identity(known)
                assert json.loads(damaged) == json.loads(known)
            except ValueError:
                pass
            continue
        with pytest.raises(ValueError, match=r"."):
            CHECKED[name](damaged)


@pytest.mark.parametrize("name", CHECKED | UNCHECKED)
def test_a_wrong_length_is_refused(name):
    data, decode = SAMPLES[name][0], (CHECKED | UNCHECKED)[name]
    for damaged in cuts(data):
        if name == "segment header" and len(damaged) > len(data):
            continue  # a header is followed by other things
        if name == "identity" and damaged.strip() == data.strip():
            continue
        if name == "lease" and len(damaged) >= 32 and (len(damaged) - 32) % 12 == 0:
            continue  # a whole number of runs
        with pytest.raises(ValueError, match=r"."):
            decode(damaged)


@given(st.sampled_from(sorted(CHECKED | UNCHECKED)), st.binary(max_size=200))
def test_rubbish_is_a_value_error_or_nothing(name, data):
    try:
        (CHECKED | UNCHECKED)[name](data)
    except ValueError:
        return
    assert name in UNCHECKED


@given(st.binary(max_size=5000))
def test_rubbish_has_no_stamps(data):
    assert layout.decode_stamps(data) == 0
    assert layout.next_stamp_offset(data) == 512


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3}, {"kind": 0}, {"root": Root(1, 0, 1)}, {"root": Root(1, 7, 1)}, {"base": Root(1, 0, 1)},
        {"base": Root(1, 7, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_a_device_that_makes_no_sense_is_refused(change):
    device = replace(A_DEVICE, **change)
    with pytest.raises(ValueError, match="no sense"):
        DeviceRecord.decode(7, device.encode())
    with pytest.raises(ValueError, match="no sense"):
        layout.decode_commit(layout.encode_commit(Commit(device, 1), 1)[0])


def test_a_name_that_is_no_text_is_refused():
    record = A_DEVICE.encode()
    with pytest.raises(ValueError, match="utf-8"):
        DeviceRecord.decode(7, record[:-1] + b"\xff")


def test_another_version_is_refused():
    record = struct.pack("<H", 2) + A_STATE.encode()[2:]
    with pytest.raises(ValueError, match="version 2"):
        State.decode(record)


@pytest.mark.parametrize(("fact", "value"), [("format", 2), ("incompatible", ["later"])])
def test_a_newer_store_says_what_it_needs(fact, value):
    facts = json.loads(layout.encode_identity(Identity(bytes(16), 5)))
    del facts["checksum"]
    facts[fact] = value
    newer = {**facts, "checksum": f"{checksum(json.dumps(facts, sort_keys=True).encode()):016x}"}
    with pytest.raises(UnknownFormatError, match=r"format 2|feature later"):
        layout.decode_identity(json.dumps(newer).encode())
    facts[fact] = value
    with pytest.raises(ValueError, match=r"."):
        layout.decode_identity(json.dumps(facts).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"\xff", b"7", b'"a"', b"[" * 100_000])
def test_what_is_no_identity_is_refused(text):
    with pytest.raises(ValueError, match=r".") as caught:
        layout.decode_identity(text)
    assert not isinstance(caught.value, UnknownFormatError)
