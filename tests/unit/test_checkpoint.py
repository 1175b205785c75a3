"""The record of a checkpoint: it comes back as it was, and what is no such record is refused."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowstore
from cowstore import catalog
from cowstore.checkpoint import AUTOMATIC, CheckpointRecord
from cowstore.environment import CHECKPOINTS
from cowstore.layout import number_key

NUMBERS = st.integers(0, (1 << 64) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.builds(
    CheckpointRecord,
    number=NUMBERS,
    name=st.text(min_size=1, max_size=40),
    created=NUMBERS,
    memory=NUMBERS,
    state=NUMBERS,
    disks=st.lists(NUMBERS, max_size=5).map(tuple),
    configuration=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    flags=st.integers(0, (1 << 16) - 1),
)
SAMPLE = CheckpointRecord(9, "morning", 1_700_000_000_000_000_000, 5, 6, (7, 8), {"cpus": 2}, AUTOMATIC)


@given(RECORDS)
def test_it_comes_back_as_it_was(record):
    assert CheckpointRecord.decode(record.number, record.encode()) == record


def test_its_fields_lie_where_the_document_says():
    payload = SAMPLE.encode()
    assert struct.unpack_from("<QQQ", payload) == (SAMPLE.created, 5, 6)
    assert struct.unpack_from("<HHH", payload, 24) == (AUTOMATIC, 2, 7)
    assert struct.unpack_from("<QQ", payload, 32) == (7, 8)
    assert payload[48:55] == b"morning"
    assert json.loads(payload[55:]) == {"cpus": 2}
    assert SAMPLE.images == (5, 6, 7, 8)


def test_what_is_cut_off_is_refused():
    payload = SAMPLE.encode()
    for length in range(len(payload)):
        with pytest.raises(ValueError, match=r"cut off|Expecting|Unterminated|delimiter"):
            CheckpointRecord.decode(9, payload[:length])


NONSENSE = {
    "no configuration": SAMPLE.encode()[:55],
    "a list": SAMPLE.encode()[:55] + b"[1, 2]",
    "a number": SAMPLE.encode()[:55] + b"7",
    "more behind it": SAMPLE.encode() + b"}",
    "no text": SAMPLE.encode()[:55] + b"\xff\xfe{",
    "a name that is no text": SAMPLE.encode().replace(b"morning", b"morn\xffng"),
    "too many disks": SAMPLE.encode()[:26] + b"\xff\xff" + SAMPLE.encode()[28:],
    "a name that is too long": SAMPLE.encode()[:28] + b"\xff\xff" + SAMPLE.encode()[30:],
    "too deep": SAMPLE.encode()[:55] + b'{"a":' + b"[" * 60000,
    "nothing": b"",
}


@pytest.mark.parametrize("payload", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_damage_of_the_catalog(store, payload):
    """With a checksum that is right: a record of somebody else's, or of a program with a mistake."""
    with pytest.raises(ValueError, match=r".") as refused:
        CheckpointRecord.decode(9, payload)
    assert not isinstance(refused.value, cowstore.StoreError)
    with store._environment.write() as writer:
        writer.put(CHECKPOINTS, number_key(9), payload)
    for call in (store.checkpoints.all, lambda: store.checkpoints.info("morning")):
        with pytest.raises(cowstore.CatalogCorruptError, match=r"record 0*90*:"):
            call()
    with store._environment.write() as writer:
        writer.delete(CHECKPOINTS, number_key(9))
    assert store.checkpoints.all() == []


@given(st.binary(max_size=120))
def test_any_bytes_are_a_record_or_a_value_error(payload):
    try:
        record = CheckpointRecord.decode(1, payload)
    except ValueError:
        return
    assert isinstance(record.configuration, dict)


def test_a_name_is_found_and_a_missing_one_is_not(store):
    with store._environment.write() as writer:
        catalog.save_checkpoint(writer, SAMPLE)
    with store._environment.read() as snapshot:
        assert catalog.find_checkpoint(snapshot, "morning") == SAMPLE
        with pytest.raises(cowstore.NotFoundError, match="no checkpoint named 'evening'"):
            catalog.find_checkpoint(snapshot, "evening")
        with pytest.raises(cowstore.ExistsError, match="checkpoint 'morning' exists"):
            catalog.check_free_checkpoint(snapshot, "morning")
