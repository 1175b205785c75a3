"""The handshake without a socket: every option, and every way to get it wrong."""

from __future__ import annotations

import random

import pytest

from cowstore.errors import InUseError, StoreError
from cowstore.nbd import Handshake, Limits
from cowstore.nbd.exports import Exports
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_handshakes import ABORT, CLONE, GREETING, IMAGE, LIST, STRUCTURED, devices, go, info, play
from tests.unit.nbd_memory import MemoryDevices

# ---------------------------------------------------------------------------------------------- the first bytes


def test_greeting_comes_first():
    assert bytes(Handshake(Exports(devices())).output) == GREETING


@pytest.mark.parametrize("flags", range(4))
def test_known_client_flags(flags):
    assert play(LIST, flags=flags).kinds[-1] == nbd.ACK


@pytest.mark.parametrize("bit", range(2, 32))
def test_unknown_client_flags_end_the_session(bit):
    outcome = play(LIST, flags=3 | 1 << bit)
    assert outcome.error.startswith("unknown client flags")
    assert outcome.said == b""


@pytest.mark.parametrize("magic", [b"IHAVEOPS", bytes(8), nbd.OPTION_REPLY_MAGIC])
def test_option_without_its_magic_ends_the_session(magic):
    outcome = play(LIST, magic + LIST[8:], LIST)
    assert "magic" in outcome.error
    assert outcome.kinds == [nbd.SERVER, nbd.SERVER, nbd.ACK]


@pytest.mark.parametrize("code", [0, nbd.PEEK_EXPORT, 11, 12, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("data", [b"", b"some data" * 100])
def test_unknown_option_is_answered_and_the_next_one_understood(code, data):
    outcome = play(nbd.option(code, data), LIST)
    assert outcome.replies[0].option == code
    assert outcome.kinds == [nbd.UNSUP, nbd.SERVER, nbd.SERVER, nbd.ACK]


# -------------------------------------------------------------------------------------------------- LIST, ABORT


def test_list_names_all_exports():
    assert nbd.exports_of(play(LIST).replies) == ["base", "desk"]


def test_list_names_what_is_offered():
    assert nbd.exports_of(play(LIST, names=("desk", "gone")).replies) == ["desk"]


def test_list_of_nothing():
    assert play(LIST, offered=MemoryDevices()).kinds == [nbd.ACK]


@pytest.mark.parametrize("code", [nbd.LIST, nbd.STRUCTURED_REPLY, nbd.STARTTLS])
def test_data_where_none_may_be(code):
    assert play(nbd.option(code, b"x")).kinds == [nbd.INVALID]


def test_structured_replies_refused_are_not_agreed():
    outcome = play(nbd.option(nbd.STRUCTURED_REPLY, b"x"), go())
    assert outcome.chosen
    assert not outcome.chosen.structured


@pytest.mark.parametrize("data", [b"", b"because"])
def test_abort_is_acknowledged_and_nothing_follows(data):
    outcome = play(nbd.option(nbd.ABORT, data), LIST)
    assert outcome.ended
    assert outcome.kinds == [nbd.ACK]


# -------------------------------------------------------------------------------------------------- EXPORT_NAME


@pytest.mark.parametrize("flags", range(4))
def test_export_name_says_size_and_flags_and_zeroes_unless_declined(flags):
    outcome = play(nbd.option(nbd.EXPORT_NAME, b"desk"), b"rest", flags=flags)
    assert outcome.chosen
    assert outcome.said[:8] == len(CLONE).to_bytes(8, "big")
    assert outcome.said[10:] == (b"" if flags & nbd.NO_ZEROES else bytes(124))
    assert outcome.rest == b"rest"


@pytest.mark.parametrize("name", [b"gone", b"", b"\xff\xfe", b"d" * 4096, b"d" * 4097])
def test_export_name_that_is_not_there_ends_the_session_without_a_word(name):
    outcome = play(nbd.option(nbd.EXPORT_NAME, name), LIST)
    assert outcome.error
    assert outcome.said == b""
    assert outcome.chosen is None


def test_export_name_that_is_far_too_long_ends_the_session_without_a_word():
    """A client takes what follows EXPORT_NAME for the export's size and flags."""
    assert play(nbd.option(nbd.EXPORT_NAME, bytes(65537))).said == b""


def test_export_name_that_cannot_be_opened_ends_the_session():
    offered = devices()
    offered.failures["desk"] = InUseError("clone 'desk'", 4711)
    outcome = play(nbd.option(nbd.EXPORT_NAME, b"desk"), offered=offered)
    assert "4711" in outcome.error
    assert outcome.said == b""


@pytest.mark.parametrize("ask", [nbd.option(nbd.EXPORT_NAME), go("")], ids=["export name", "go"])
def test_empty_name_is_the_only_export_where_there_is_one(ask):
    outcome = play(ask, names=("desk",))
    assert outcome.chosen
    assert outcome.chosen.export.disk.size == len(CLONE)


def test_empty_name_is_nothing_where_there_are_several():
    assert play(go("")).kinds == [nbd.UNKNOWN]
    assert play(go(""), names=("base", "desk")).kinds == [nbd.UNKNOWN]


# ------------------------------------------------------------------------------------------------------ INFO, GO


def test_go_leads_to_the_transmission():
    outcome = play(go(), b"the first request")
    assert nbd.export_of(outcome.replies).size == len(CLONE)
    assert outcome.chosen
    assert outcome.chosen.export.writable
    assert outcome.rest == b"the first request"


@pytest.mark.parametrize("flags", range(4))
def test_go_is_never_followed_by_zeroes(flags):
    assert play(go(), flags=flags).kinds == [nbd.INFORMATION, nbd.ACK]


def test_info_tells_the_same_and_opens_nothing():
    offered = devices()
    wanted = [nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE]
    outcome = play(STRUCTURED, info("desk", *wanted), go("desk", *wanted), offered=offered)
    replies = outcome.replies[1:]
    half = len(replies) // 2
    assert [one.data for one in replies[:half]] == [one.data for one in replies[half:]]
    assert [name for name, _ in offered.opened] == ["desk"]
    assert not play(info(), offered=(untouched := devices())).chosen
    assert not untouched.opened


def test_what_is_asked_for_is_told():
    wanted = [nbd.INFO_BLOCK_SIZE, nbd.INFO_DESCRIPTION, nbd.INFO_NAME, nbd.INFO_EXPORT]
    export = nbd.export_of(play(info("", *wanted), names=("base",)).replies)
    assert (export.name, export.description, export.size) == ("base", "image", len(IMAGE))
    assert export.block_sizes == (1, 4096, 32 << 20)


@pytest.mark.parametrize("wanted", [(), (4,), (0x8000, 0xFFFF)])
def test_what_is_not_asked_for_or_not_known_is_not_told(wanted):
    assert play(info("desk", *wanted)).kinds == [nbd.INFORMATION, nbd.ACK]


def test_maximum_block_size_is_the_limit():
    sizes = nbd.export_of(play(info("desk", 3), limits=Limits(payload_bytes=12345)).replies).block_sizes
    assert sizes == (1, 4096, 12345)


EVERY = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.MULTI_CONN | nbd.SEND_CACHE
CHANGING = nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO


@pytest.mark.parametrize(("name", "own"), [("base", nbd.READ_ONLY), ("desk", CHANGING)])
@pytest.mark.parametrize("structured", [False, True])
def test_transmission_flags(name, own, structured):
    expected = EVERY | own | (nbd.SEND_DF if structured else 0)
    before = STRUCTURED if structured else b""
    assert nbd.export_of(play(before, go(name)).replies[int(structured) :]).flags == expected
    said = play(before, nbd.option(nbd.EXPORT_NAME, name.encode())).said
    assert int.from_bytes(said[-2:], "big") == expected


@pytest.mark.parametrize("code", [nbd.GO, nbd.INFO])
def test_unknown_export_is_told_and_the_client_can_go_on(code):
    outcome = play(nbd.option(code, nbd.info_data("gone")), LIST)
    assert outcome.kinds == [nbd.UNKNOWN, nbd.SERVER, nbd.SERVER, nbd.ACK]


def test_export_that_is_not_offered_is_unknown():
    assert play(go("base"), names=("desk",)).kinds == [nbd.UNKNOWN]


@pytest.mark.parametrize("code", [nbd.GO, nbd.INFO])
def test_name_of_4096_bytes_is_looked_up_and_a_longer_one_is_not(code):
    refused = play(nbd.option(code, nbd.info_data("d" * 4097)))
    assert refused.kinds == [nbd.INVALID]
    name = "é" * 2048
    offered = MemoryDevices({}, {name: CLONE})
    assert play(nbd.option(code, nbd.info_data(name)), offered=offered).kinds[-1] == nbd.ACK


@pytest.mark.parametrize("name", ["d" * 4000, "\1" * 2000])
def test_message_about_a_long_name_is_a_string_of_the_specification(name):
    assert play(go(name + "d" * 96)).replies[0].message


@pytest.mark.parametrize("code", [nbd.GO, nbd.INFO])
def test_name_that_is_no_text(code):
    assert play(nbd.option(code, nbd.info_data(b"\xff\xfe"))).kinds == [nbd.INVALID]


@pytest.mark.parametrize("code", [nbd.GO, nbd.INFO])
def test_data_that_is_cut_off_or_too_long(code):
    whole = nbd.info_data("desk", 1, 3)
    wrong = [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + b"\0\3"]
    outcome = play(*(nbd.option(code, data) for data in wrong), LIST)
    assert outcome.kinds == [nbd.INVALID] * len(wrong) + [nbd.SERVER, nbd.SERVER, nbd.ACK]


@pytest.mark.parametrize("length", [5, 1 << 16, 1 << 31, (1 << 32) - 1])
def test_length_of_a_name_that_reaches_beyond_the_data(length):
    data = length.to_bytes(4, "big") + b"desk" + bytes(2)
    assert play(nbd.option(nbd.GO, data)).kinds[-1] == nbd.INVALID


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (InUseError("clone 'desk'", 4711), "4711"),
        (StoreError("something else"), "something else"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_export_that_cannot_be_opened_is_told_and_the_client_can_go_on(failure, word):
    offered = devices()
    offered.failures["desk"] = failure
    outcome = play(go(), go("base"), offered=offered)
    assert outcome.kinds == [nbd.POLICY, nbd.INFORMATION, nbd.ACK]
    assert word in outcome.replies[0].message
    assert outcome.chosen
    assert offered.open_names == ["base"]


def test_failure_that_names_a_file_which_is_no_text_is_told():
    offered = devices()
    offered.failures["desk"] = StoreError("cannot open /srv/\udcff")
    assert play(go(), offered=offered).kinds == [nbd.POLICY]


# -------------------------------------------------------------------------------------------------------- limits


def test_option_of_the_greatest_length_and_of_one_more():
    assert play(nbd.option(99, bytes(65536))).kinds == [nbd.UNSUP]
    outcome = play(nbd.option(99, length=65537), LIST)
    assert outcome.kinds == [nbd.TOO_BIG]
    assert "65537" in outcome.error


def test_as_many_options_as_are_allowed_and_one_more():
    allowed = play(*[STRUCTURED] * 63, go())
    assert allowed.chosen
    beyond = play(*[STRUCTURED] * 64, go())
    assert beyond.kinds == [nbd.ACK] * 64
    assert "more than 64 options" in beyond.error
    assert not beyond.chosen


# ------------------------------------------------------------------------------------------- the server is ending


@pytest.mark.parametrize("code", [nbd.LIST, nbd.GO, nbd.INFO, nbd.STRUCTURED_REPLY, nbd.STARTTLS, 99])
def test_server_that_ends_refuses_every_option_but_abort(code):
    outcome = play(nbd.option(code), ABORT, stopping=lambda: True)
    assert outcome.kinds == [nbd.SHUTDOWN, nbd.ACK]
    assert outcome.ended


def test_server_that_ends_takes_no_export_name():
    outcome = play(nbd.option(nbd.EXPORT_NAME, b"desk"), stopping=lambda: True)
    assert outcome.error
    assert outcome.said == b""


# -------------------------------------------------------------------------------------------------------- pieces

SESSIONS = {
    "go": [LIST, STRUCTURED, info("desk", 1, 2, 3), go("desk", 3), b"rest" * 20],
    "export name": [nbd.option(nbd.EXPORT_NAME, b"base"), b"rest"],
    "abort": [nbd.option(77, b"data"), ABORT, b"more"],
    "errors": [go("gone"), nbd.option(nbd.GO, b"\0"), nbd.option(nbd.LIST, b"x"), LIST],
    "contexts": [
        STRUCTURED,
        nbd.option(nbd.LIST_META_CONTEXT, nbd.context_data("desk")),
        nbd.option(nbd.SET_META_CONTEXT, nbd.context_data("desk", "base:allocation", "cowstore:own")),
        go(),
    ],
    "bad magic": [LIST, b"IHAVEOPX" + LIST[8:], LIST],
    "too big": [LIST, nbd.option(1, length=1 << 31), LIST],
    "too many": [STRUCTURED] * 65,
}


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_pieces_make_no_difference(session):
    length = 4 + sum(map(len, session))
    whole = play(*session, pieces=[length])
    cuts = [[1] * length]
    for seed in range(20):
        dice = random.Random(seed)
        cuts.append([dice.randint(1, 40) for _ in range(length)])
    for pieces in cuts:
        outcome = play(*session, pieces=pieces)
        assert (outcome.output, outcome.rest, outcome.error) == (whole.output, whole.rest, whole.error)
        assert bool(outcome.chosen) == bool(whole.chosen)


def test_each_beginning_of_a_session_is_waited_on():
    data = LIST + go()
    for length in range(len(data)):
        outcome = play(data[:length])
        assert not outcome.error
        assert not outcome.chosen
