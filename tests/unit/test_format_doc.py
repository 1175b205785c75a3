"""docs/format.md against the code: its tables are read, and every size, offset and field in them is compared.

For each structure there is a table marked `<!-- struct: NAME -->`. Its rows have to be the items of that struct,
one by one and without a gap. Then a record with a different value in every field is encoded, and each field of
the table is decoded from those bytes by the table alone.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash

import cowstore
from cowstore import checkpoint, index, layout
from cowstore.digest import BLOCK_SIZE, DIGEST_SIZE
from cowstore.files import Disk
from cowstore.layout import Commit, DeviceRecord, LeaseRecord, Root, State

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
ITEM = re.compile(r"(\d*)([a-zA-Z])")
TYPES = {"Q": "u64", "I": "u32", "H": "u16", "B": "u8", "s": "bytes", "x": "zero"}
STORE_ID = bytes(range(1, 17))
BOOT = bytes(range(101, 117))


@dataclass(frozen=True)
class Row:
    offset: int
    size: int
    type: str
    field: str

    def read(self, record: bytes) -> Any:
        """The field's value, by nothing but what the page says."""
        raw = record[self.offset : self.offset + self.size]
        assert len(raw) == self.size, f"{self.field} reaches beyond the record"
        if self.type == "bytes":
            return raw
        return int.from_bytes(raw, "big" if self.type.endswith("be") else "little")


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


def table(marker: str) -> list[list[str]]:
    """The rows of the table that follows a marker."""
    text = PAGE.read_text()
    assert text.count(f"<!-- {marker} -->") == 1, f"the page needs one table marked {marker}"
    lines = text.partition(f"<!-- {marker} -->")[2].lstrip().splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def number(text: str) -> int | None:
    plain = text.replace(",", "")
    return int(plain) if plain.isdigit() else None


def fields(name: str) -> list[Row]:
    """The rows of a struct's table; those whose size is not a number are left out."""
    rows = []
    for offset, size, kind, field, _ in table(f"struct: {name}"):
        at, length = number(offset), number(size)
        assert at is not None, f"{name}.{field} has no offset"
        if length is not None:
            rows.append(Row(at, length, kind, field))
    return rows


def items(one: struct.Struct) -> list[tuple[int, int, str]]:
    """Offset, size and type of every item of a struct without alignment, padding too."""
    order, found, offset = one.format[0], [], 0
    assert order in "<>=", "a struct of the format must not be aligned by the compiler"
    for count, letter in ITEM.findall(one.format[1:]):
        sizes = [int(count or 1)] if letter in "sx" else [struct.calcsize("=" + letter)] * int(count or 1)
        for size in sizes:
            suffix = " be" if order == ">" and letter in "QIH" else ""
            found.append((offset, size, TYPES[letter] + suffix))
            offset += size
    assert offset == one.size
    return found


STRUCTS = {name: one for name, one in vars(layout).items() if isinstance(one, struct.Struct)} | {
    "index._HEADER": index._HEADER,
    "checkpoint._CHECKPOINT": checkpoint._CHECKPOINT,
    "checkpoint._DISK": checkpoint._DISK,
}
TABLED = {name: one for name, one in STRUCTS.items() if name != "_CHECKSUM"}  # the checksum is a row of the others


def test_every_struct_has_a_table_and_every_table_a_struct():
    assert set(re.findall(r"<!-- struct: (\S+) -->", PAGE.read_text())) == TABLED.keys()


@pytest.mark.parametrize("name", TABLED)
def test_rows_are_the_items_of_the_struct(name):
    listed = [(row.offset, row.size, row.type) for row in fields(name)]
    expected = items(STRUCTS[name])
    assert listed[: len(expected)] == expected


@pytest.mark.parametrize("name", TABLED)
def test_nothing_overlaps(name):
    rows = fields(name)
    for before, after in pairwise(rows):
        assert before.offset + before.size <= after.offset


DEVICE = DeviceRecord(
    0x1111111111, "desk-1", layout.CLONE, Root(0x2222222222, 3, 0x3333333333), Root(0x4444444444, 5, 0x5555555555),
    6, 0x6666666666, 0x77777777, 0x8888888888, 0x9999999999, 0xAAAAAAAAAA, BOOT,
)  # fmt: skip
RUNS = ((0xBBBBBBBBBB, 0xCCCCCCCC), (0xDDDDDDDDDD, 0xEEEE))
COMMIT = Commit(DEVICE, 0x8888888888, RUNS, 0xABABABABAB)
STATE = State(*(0x1010101010101010 * factor + factor for factor in range(1, 8)))
LEASE = LeaseRecord(1, 0x12345678, 0x2345678923, BOOT, RUNS)
NAMED = {"length": len(DEVICE.name), "version": 1, "reserved": 0}

CHECKPOINT = checkpoint.CheckpointRecord(
    7, "morning", 0x1234567890, 0x2345678901, 0x3456789012, (0x4567890123, 5), {"cpus": 2}, checkpoint.AUTOMATIC
)

EXAMPLES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "_SEGMENT_HEADER": (
        layout.encode_segment_header(0x123456789A, layout.EPHEMERAL_DATA, STORE_ID),
        {"magic": b"COWSEGMT", "kind": 3, "number": 0x123456789A, "store_id": STORE_ID} | NAMED,
    ),
    "checkpoint._CHECKPOINT": (
        CHECKPOINT.encode(),
        {"created": 0x1234567890, "memory": 0x2345678901, "state": 0x3456789012, "flags": 1, "disks": 2}
        | {"length": 7, "reserved": 0},
    ),
    "checkpoint._DISK": (CHECKPOINT.encode()[32:40], {"disk": 0x4567890123}),
    "_STAMP": (layout.encode_stamp(0x123456789A), {"magic": b"COWERASE", "erasure": 0x123456789A}),
    "_COMMIT": (
        layout.encode_commit(COMMIT, 1)[0],
        {"magic": b"COWCOMIT", "part": 0, "parts": 1, "count": 2, "sequence": COMMIT.sequence,
         "next_block": COMMIT.next_block, "device.name": b"desk-1".ljust(128, b"\0")} | NAMED,
    ),
    "_RUN": (layout.encode_runs(RUNS), {"first": RUNS[0][0], "count": RUNS[0][1]}),
    "_NUMBER": (layout.number_key(0x123456789A), {"number": 0x123456789A}),
    "_CHUNK_KEY": (layout.chunk_key(0x123456789A, 63), {"segment": 0x123456789A, "chunk": 63}),
    "_STATE": (STATE.encode(), NAMED),
    "_DEVICE": (DEVICE.encode(), NAMED),
    "_SEGMENT": (layout.encode_segment_record(2, 0x12345678), {"kind": 2, "free": 0x12345678}),
    "_LEASE": (LEASE.encode(), {}),
    "_JOURNAL_HEADER": (
        layout.encode_journal_header(BOOT, 0x123456789A),
        {"magic": b"COWJOURN", "boot": BOOT, "number": 0x123456789A} | NAMED,
    ),
    "CHANGE": (
        layout.CHANGE.pack(layout.JOURNAL_ZEROS, 0x123456789A, 0x2345678923),
        {"kind": 2, "offset": 0x123456789A, "length": 0x2345678923},
    ),
}  # fmt: skip
OBJECTS = {"_COMMIT": COMMIT, "_STATE": STATE, "_DEVICE": DEVICE, "_LEASE": LEASE}


def expected(name: str, field: str) -> Any:
    """The value that a field has to have, told by its name."""
    given = EXAMPLES[name][1]
    return given[field] if field in given else attrgetter(field)(OBJECTS[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_field_is_where_the_page_says(name):
    record = EXAMPLES[name][0]
    for row in fields(name):
        if row.field == "checksum":
            assert row.read(record) == xxhash.xxh3_64_intdigest(record[: row.offset])
        elif row.type == "zero":
            assert record[row.offset : row.offset + row.size] == bytes(row.size)
        elif row.type != "runs":
            assert row.read(record) == expected(name, row.field), row.field


def test_examples_cover_the_structs():
    assert EXAMPLES.keys() | {"index._HEADER"} == TABLED.keys()


@pytest.mark.parametrize("name", ["_COMMIT", "_LEASE"])
def test_runs_stand_where_the_page_says(name):
    record = EXAMPLES[name][0]
    (at,) = (number(row[0]) for row in table(f"struct: {name}") if row[3] == "runs")
    assert record[at:].startswith(layout.encode_runs(RUNS))


def test_name_follows_the_device_record():
    (row,) = (row for row in table("struct: _DEVICE") if row[3] == "name")
    assert DEVICE.encode()[number(row[0]) :] == b"desk-1"


def test_room_for_runs():
    (row,) = (row for row in fields("_COMMIT") if row.field == "runs")
    assert row.size == layout.COMMIT_RUNS * layout._RUN.size


def test_constants():
    listed = table("constants")
    assert {row[0]: number(row[1]) for row in listed} == {row[0]: getattr(layout, row[0]) for row in listed}
    capitals = {name for name, value in vars(layout).items() if name.isupper() and isinstance(value, int)}
    derived = {"SLOT_MASK", "FANOUT_BITS", "DIGESTS_OFFSET", "SLOTS_OFFSET", "SEGMENT_SIZE"}
    assert {name for name in capitals if not name.startswith("_")} == {row[0] for row in listed} | derived


def test_regions_of_a_segment():
    regions = [(number(offset), number(size)) for offset, size, _ in table("regions")]
    first, second = layout.STAMP_OFFSETS
    stamp = layout._STAMP.size
    assert regions == [
        (0, layout._SEGMENT_HEADER.size),
        (first, stamp),
        (second, stamp),
        (layout.DIGESTS_OFFSET, layout.SLOTS_PER_SEGMENT * DIGEST_SIZE),
        (layout.SLOTS_OFFSET, layout.SLOTS_PER_SEGMENT * BLOCK_SIZE),
        (layout.SEGMENT_SIZE, 0),
    ]


@pytest.fixture
def store(tmp_path):
    """A store in which something has happened; it is open meanwhile."""
    path = tmp_path / "s"
    with cowstore.open(path, create=True) as store, store.create("desk", 1 << 20) as desk:
        desk.pwrite(b"x" * 4096, 0)
        desk.flush()
        desk.reset()
        store.collect()
        desk.pwrite(b"y" * 8192, 0)
        desk.flush()
        desk.keep_journal()
        desk.pwrite(b"z", 0)
        with store.serving():
            yield store


def test_every_file_of_a_store_is_listed(store):
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text().partition("## Constants")[0], re.M)
    patterns = [
        re.compile(re.escape(one).replace("NUMBER", r"\d+").replace(r"\.N/", "[.][01]/")) for one in listed
    ]
    found = [str(one.relative_to(store.path)) for one in store.path.rglob("*") if one.is_file()]
    assert [one for one in found if not any(pattern.fullmatch(one) for pattern in patterns)] == []
    unused = [pattern for pattern in patterns if not any(map(pattern.fullmatch, found))]
    assert unused == []


def test_store_json(store):
    text = PAGE.read_text().partition("## store.json")[2].partition("##")[0]
    facts = json.loads((store.path / "store.json").read_text())
    assert list(re.findall(r"^\| `(\w+)` \|", text, re.M)) == list(facts)
    check = facts.pop("checksum")
    assert check == f"{xxhash.xxh3_64_intdigest(json.dumps(facts, sort_keys=True).encode()):016x}"


def test_lock_files(store):
    for path in (store.path / "leases").iterdir():
        content = path.read_bytes()
        assert len(content) == 21
        assert content[:20].strip().isdigit()
        assert content[20:] == b"\n"


def test_index_header(store):
    record = (store.path / "index" / "table").read_bytes()
    found = {row.field: row.read(record) for row in fields("index._HEADER")}
    assert found["checksum"] == xxhash.xxh3_64_intdigest(record[:40])
    assert found["seed"] == int(json.loads((store.path / "store.json").read_text())["seed"], 16)
    assert found["inode"] == (store.path / "index" / "table").stat().st_ino
    assert len(record) == 4096 + 64 * found["buckets"]
    assert (found["magic"], found["version"], found["bucket_size"]) == (b"COWINDEX", 1, index.BUCKET_SIZE)
    assert found["put"] - found["removed"] == 1, "two equal blocks, one entry"
    offsets = {row.field: row.offset for row in fields("index._HEADER")}
    assert (offsets["boot"], offsets["put"] // 8, offsets["removed"] // 8) == (
        index._BOOT.start, index._PUT, index._REMOVED,
    )  # fmt: skip


def test_catalog_read_by_the_page_alone(store, tmp_path):
    """From a name to the bytes of a block, with nothing but LMDB, XXH3 and the page."""
    copy = tmp_path / "copy"
    copy.mkdir()
    file = Disk().open(copy / "data.mdb", write=True, exclusive=True)
    store._environment.copy(file)
    file.close()
    store_id = bytes.fromhex(json.loads((store.path / "store.json").read_text())["id"])
    with lmdb.open(str(copy), max_dbs=8, readonly=True, lock=False) as env, env.begin() as txn:
        tables = {name: env.open_db(name.encode(), txn, create=False) for name in
                  ("state", "names", "devices", "segments", "slots", "leases", "checkpoints")}  # fmt: skip

        def get(name: str, key: bytes) -> bytes:
            value = bytes(txn.get(key, b"", tables[name]))
            signed = name.encode() + b"\0" + key + b"\0" + value[:-8]
            assert int.from_bytes(value[-8:], "little") == xxhash.xxh3_64_intdigest(signed)
            return value[:-8]

        names = {row.field: row for row in fields("_DEVICE")}
        device = get("devices", get("names", b"desk"))
        assert names["root.size"].read(device) == 1 << 20
        total = sum(
            int.from_bytes(bytes(value)[-8:], "little")
            for name, handle in tables.items() if name != "state"
            for _, value in txn.cursor(db=handle)
        )  # fmt: skip
        state = {row.field: row.read(get("state", b"state")) for row in fields("_STATE") if row.size == 8}
        assert (state["total"], state["erasure"]) == (total % 2**64, 1)

        def block(block_id: int, kind: int) -> bytes:
            segment, slot = block_id >> 18, block_id & 0x3FFFF
            record = get("segments", segment.to_bytes(8, "big"))
            assert record[0] == kind
            states = get("slots", segment.to_bytes(8, "big") + (slot // 4096).to_bytes(2, "big"))
            bit = slot % 4096
            low, high = states[bit >> 3] >> (bit & 7) & 1, states[512 + (bit >> 3)] >> (bit & 7) & 1
            assert low + 2 * high == layout.USED
            data = np.memmap(store.path / "segments" / f"{segment:08d}.seg", np.uint8, "r")
            assert data[24:40].tobytes() == store_id
            return data[4198400 + 4096 * slot :][:4096].tobytes()

        leaf = block(names["root.node"].read(device), layout.MAP)
        first, second = struct.unpack_from("<QQ", leaf)
        assert first == second, "equal blocks are stored once"
        assert block(first, layout.DATA) == b"y" * 4096
