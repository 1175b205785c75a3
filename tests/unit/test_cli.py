"""The command's verbs: what they do, and what they print for people and for programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cowstore
from tests.sample import CONTENT, MIB, facts

# ------------------------------------------------------------------------------- the verbs, one by one


def test_init_makes_a_store_once(run):
    assert facts(run("init", "--json"))["path"].endswith("/s")
    assert "exists already" in run("init", code=4).stderr


def test_init_takes_a_path(run):
    run("init", "other")
    assert run("--store", "other", "ls").stdout.split() == ["NAME", "KIND", "SIZE", "PARENT", "CREATED"]


def test_store_is_named_before_or_after_the_command(run):
    run("init", "other")
    run("--store", "other", "create", "a", "1M")
    run("create", "b", "1M", "--store", "other")
    assert [one["name"] for one in facts(run("ls", "-s", "other", "--json"))] == ["a", "b"]


def test_import_tells_the_device(run):
    run("init")
    Path("disk.raw").write_bytes(CONTENT)
    image = facts(run("import", "disk.raw", "debian", "--json"))
    assert (image["name"], image["kind"], image["size"]) == ("debian", "image", len(CONTENT))


def test_import_reads_standard_input(run, stocked):
    run("import", "-", "piped", stdin=CONTENT)
    run("export", "piped", "out.raw")
    assert Path("out.raw").read_bytes() == CONTENT


def test_create_takes_a_size(run, stocked):
    blank = facts(run("create", "scratch", "1.5M", "--json"))
    assert (blank["kind"], blank["size"], blank["parent"]) == ("clone", 3 * MIB // 2, None)


def test_clone_by_names(run, stocked):
    made = facts(run("clone", "debian", "desk-1", "desk-2", "--json"))
    assert [(one["name"], one["parent"], one["ephemeral"]) for one in made] == [
        ("desk-1", "debian", False),
        ("desk-2", "debian", False),
    ]


def test_clone_by_numbers(run, stocked):
    run("clone", "debian", "--count", "100", "--prefix", "desk-", "--start", "3")
    names = {one["name"] for one in facts(run("ls", "--json"))}
    assert names == {"debian"} | {f"desk-{number}" for number in range(3, 103)}


def test_clone_numbers_follow_the_parents_name(run, stocked):
    assert [one["name"] for one in facts(run("clone", "debian", "--count", "2", "--json"))] == [
        "debian-1",
        "debian-2",
    ]


@pytest.mark.parametrize("words", [[], ["a", "--count", "2"], ["a", "--prefix", "b-"], ["--count", "0"]])
def test_clone_wants_names_or_numbers(run, stocked, words):
    run("clone", "debian", *words, code=2)


def test_clone_enlarges(run, stocked):
    (made,) = facts(run("clone", "debian", "big", "--size", "1M", "--json"))
    assert made["size"] == MIB
    assert run("read", "big").stdout_bytes == CONTENT.ljust(MIB, b"\0")


def test_clones_that_cannot_all_be_made_are_not_made(run, stocked):
    for extra in ([], ["--size", "1M"]):
        run("clone", "debian", "new", "debian", *extra, code=4)
        assert [one["name"] for one in facts(run("ls", "--json"))] == ["debian"]


def test_ephemeral_clones_are_told_apart(run, stocked):
    run("clone", "debian", "kiosk", "--ephemeral")
    assert "ephemeral" in run("ls").stdout
    assert facts(run("show", "kiosk", "--json"))["ephemeral"] is True


def test_write_and_read(run, stocked):
    run("clone", "debian", "desk-1")
    done = facts(run("write", "desk-1", "--offset", "4K", "--json", stdin=b"hello"))
    assert (done["name"], done["offset"], done["length"]) == ("desk-1", 4096, 5)
    assert (
        run("read", "desk-1", "--offset", "4095", "--length", "7").stdout_bytes
        == CONTENT[4095:4096] + b"hello\1"[:5] + CONTENT[4101:4102]
    )


def test_write_takes_a_file(run, stocked):
    run("clone", "debian", "desk-1")
    Path("patch").write_bytes(b"patched")
    run("write", "desk-1", "--input", "patch")
    assert run("read", "desk-1").stdout_bytes == b"patched" + CONTENT[7:]


@pytest.mark.parametrize("as_file", [True, False])
def test_write_that_does_not_fit_writes_nothing(run, stocked, as_file):
    run("clone", "debian", "desk-1")
    Path("long").write_bytes(b"x" * len(CONTENT))
    where = ["--input", "long"] if as_file else []
    run("write", "desk-1", "--offset", "1", *where, stdin=b"x" * len(CONTENT), code=2)
    assert run("read", "desk-1").stdout_bytes == CONTENT


def test_write_to_an_image_is_refused(run, stocked):
    error = run("write", "debian", stdin=b"x", code=8).stderr
    assert error == "cowstore: image 'debian' is read-only (clone it and write to the clone)\n"


def test_read_outside_the_device_is_refused_before_a_byte_is_printed(run, stocked):
    result = run("read", "debian", "--offset", "1", "--length", str(len(CONTENT)), code=2)
    assert result.stdout_bytes == b""


def test_fork_seal_reset(run, stocked):
    run("clone", "debian", "desk-1")
    run("write", "desk-1", stdin=b"mine")
    assert [one["parent"] for one in facts(run("fork", "desk-1", "a", "b", "--json"))] == ["desk-1", "desk-1"]
    assert facts(run("seal", "desk-1", "v2", "--json"))["kind"] == "image"
    assert facts(run("reset", "desk-1", "--json"))["name"] == "desk-1"
    read = {name: run("read", name, "--length", "4").stdout_bytes for name in ("desk-1", "a", "b", "v2")}
    assert read == {"desk-1": CONTENT[:4], "a": b"mine", "b": b"mine", "v2": b"mine"}


def test_resize_shrinks_only_when_told_to(run, stocked):
    run("clone", "debian", "desk-1")
    assert facts(run("resize", "desk-1", "1M", "--json"))["size"] == MIB
    assert "--shrink" in run("resize", "desk-1", "4K", code=2).stderr
    assert facts(run("resize", "desk-1", "4K", "--shrink", "--json"))["size"] == 4096


def test_rename(run, stocked):
    assert facts(run("rename", "debian", "debian-12", "--json"))["name"] == "debian-12"
    run("show", "debian", code=3)


def test_export_is_the_disk(run, stocked):
    told = facts(run("export", "debian", "out.raw", "--json"))
    assert (told["name"], told["file"]) == ("debian", "out.raw")
    assert Path("out.raw").read_bytes() == CONTENT


def test_export_replaces_a_file_only_when_told_to(run, stocked):
    Path("out.raw").write_bytes(b"precious")
    assert "--force" in run("export", "debian", "out.raw", code=4).stderr
    assert Path("out.raw").read_bytes() == b"precious"
    run("export", "debian", "out.raw", "--force")
    assert Path("out.raw").read_bytes() == CONTENT


def test_export_to_standard_output(run, stocked):
    assert run("export", "debian", "-").stdout_bytes == CONTENT
    run("export", "debian", "-", "--json", code=2)


def test_rm_deletes_all_or_none(run, stocked):
    run("clone", "debian", "desk-1", "desk-2")
    run("rm", "desk-1", "nobody", code=3)
    gone = facts(run("rm", "desk-1", "desk-2", "desk-1", "--json"))
    assert [one["name"] for one in gone["devices"]] == ["desk-1", "desk-2"]
    assert [one["name"] for one in facts(run("ls", "--json"))] == ["debian"]


def test_rm_dry_run_says_exactly_what_gc_frees(run, stocked):
    run("clone", "debian", "desk-1", "desk-2")
    run("gc")
    run("write", "desk-1", stdin=os.urandom(12000))
    run("fork", "desk-1", "desk-1a")
    plan = facts(run("rm", "--dry-run", "desk-1", "desk-1a", "--json"))
    assert plan["dry_run"] is True
    assert len(facts(run("ls", "--json"))) == 4
    assert f"{plan['freed']:,} bytes" in run("rm", "--dry-run", "desk-1", "desk-1a").stdout.splitlines()[-1]
    assert plan["freed"] > max(one["exclusive"] for one in plan["devices"])
    run("gc")
    run("rm", "desk-1", "desk-1a")
    assert facts(run("gc", "--json"))["freed"] * 4096 == plan["freed"]


# ------------------------------------------------------------------------------------------- the facts


def test_ls_is_a_table_of_words(run, stocked):
    run("clone", "debian", "desk-1")
    run("clone", "desk-1", "desk-1a")
    run("rm", "debian")
    rows = [line.split() for line in run("ls").stdout.splitlines()]
    assert rows[0] == ["NAME", "KIND", "SIZE", "PARENT", "CREATED"]
    assert [row[:4] for row in rows[1:]] == [
        ["desk-1", "clone", "20KiB", "(debian)"],
        ["desk-1a", "clone", "20KiB", "desk-1"],
    ]


def test_tree_shows_who_descends_from_whom(run, stocked):
    run("clone", "debian", "desk-1", "desk-2")
    run("fork", "desk-2", "desk-2a")
    run("write", "desk-1", stdin=os.urandom(4096))
    lines = run("tree").stdout.splitlines()
    titles = [line.rpartition("  ")[0] for line in lines]
    assert titles == ["debian", "|-- desk-1", "`-- desk-2", "    `-- desk-2a"]
    assert lines[1].endswith("clone, 4KiB own")


def test_tree_keeps_deleted_ancestors(run, stocked):
    run("clone", "debian", "desk-1")
    run("rm", "debian")
    assert run("tree").stdout.splitlines() == ["debian  deleted", "`-- desk-1  clone, 0B own"]
    ancestors = facts(run("tree", "--json"))
    assert {(one["name"], one["deleted"], one["own"]) for one in ancestors} == {
        ("debian", True, 0),
        ("desk-1", False, 0),
    }


def test_tree_tells_a_thousand_fresh_clones_in_one_line(run, stocked):
    run("clone", "debian", "--count", "1000", "--prefix", "desk-")
    run("clone", "debian", "kiosk")
    run("write", "desk-10", stdin=b"x")
    assert [line.split("  ")[0] for line in run("tree").stdout.splitlines()] == [
        "debian",
        "|-- desk-10",
        "|-- kiosk",
        "`-- desk-1 ... desk-1000",
    ]
    assert len(run("tree", "--all").stdout.splitlines()) == 1002


def test_show_has_every_fact(run, stocked):
    run("clone", "debian", "desk-1")
    shown = facts(run("show", "debian", "--json"))
    fields = set(cowstore.DeviceInfo.__dataclass_fields__)
    assert set(shown) == fields | {"usage", "children"}
    assert set(shown["usage"]) == set(cowstore.Usage.__dataclass_fields__)
    assert shown["children"] == ["desk-1"]
    printed = run("show", "debian").stdout
    assert "20KiB (20,506 bytes)" in printed
    assert "freed if it were deleted" in printed


def test_diff_lists_ranges(run, stocked):
    run("clone", "debian", "desk-1")
    assert facts(run("diff", "debian", "desk-1", "--json"))["changes"] == []
    run("write", "desk-1", "--offset", "4096", stdin=b"x" * 4096)
    found = facts(run("diff", "debian", "desk-1", "--json"))
    assert found == {
        "old": "debian",
        "new": "desk-1",
        "bytes": 4096,
        "changes": [{"offset": 4096, "length": 4096}],
    }
    assert run("diff", "debian", "desk-1").stdout.split() == ["OFFSET", "LENGTH", "4096", "4096"]


def test_du(run, stocked):
    run("clone", "debian", "desk-1")
    everything = facts(run("du", "--json"))
    assert [one["name"] for one in everything] == ["debian", "desk-1"]
    (one,) = facts(run("du", "desk-1", "--json"))
    assert (one["virtual"], one["own"]) == (len(CONTENT), 0)
    assert run("du", "desk-1").stdout.split()[:6] == [
        "NAME",
        "VIRTUAL",
        "ALLOCATED",
        "INHERITED",
        "OWN",
        "EXCLUSIVE",
    ]


def test_stats(run, stocked):
    run("clone", "debian", "--count", "10")
    found = facts(run("stats", "--json"))
    assert (found["images"], found["clones"]) == (1, 10)
    assert found["virtual"] == 11 * len(CONTENT)
    assert run("stats").stdout.startswith("images ")


def test_gc_frees(run, stocked):
    run("rm", "debian")
    would = facts(run("gc", "--dry-run", "--json"))
    assert would["dry_run"] is True
    assert would["freed"] == 0
    done = facts(run("gc", "--json"))
    assert done["freed"] == would["doomed"] >= 3  # two different blocks, and the leaf that names them
    assert run("gc").stdout.startswith("freed nothing")


def test_backup_is_a_store(run, stocked):
    assert facts(run("backup", "copy", "--json")) == {"path": "copy"}
    run("--store", "copy", "export", "debian", "out.raw")
    assert Path("out.raw").read_bytes() == CONTENT
