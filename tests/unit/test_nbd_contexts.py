"""What the handshake keeps in mind: metadata contexts, and what the start of TLS makes it forget."""

from __future__ import annotations

import pytest

from cowstore.nbd import CONTEXTS, Handshake
from cowstore.nbd.exports import Exports
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_handshakes import ABORT, LIST, STRUCTURED, devices, go, info, play
from tests.unit.nbd_memory import MemoryDevices

BOTH = ["base:allocation", "cowstore:own"]
either = pytest.mark.parametrize("code", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])


def listing(name: str | bytes, *queries: str | bytes) -> bytes:
    return nbd.option(nbd.LIST_META_CONTEXT, nbd.context_data(name, *queries))


def setting(name: str | bytes, *queries: str | bytes) -> bytes:
    return nbd.option(nbd.SET_META_CONTEXT, nbd.context_data(name, *queries))


def found(ask: bytes) -> list[str]:
    """The contexts that an option leads to."""
    return list(nbd.contexts_of(play(STRUCTURED, ask).replies[1:]))


def chosen(*asks: bytes) -> list[str]:
    """The contexts that count in the end."""
    outcome = play(STRUCTURED, *asks)
    assert outcome.chosen
    names = {number: name for name, number in CONTEXTS.items()}
    return [names[number] for number in outcome.chosen.contexts]


# ------------------------------------------------------------------------------------------------------- queries


def test_list_without_a_query_names_all():
    assert found(listing("desk")) == BOTH


def test_set_without_a_query_selects_none():
    assert found(setting("desk")) == []


@pytest.mark.parametrize(("query", "names"), [("base:", BOTH[:1]), ("cowstore:", BOTH[1:]), ("base:all", [])])
def test_namespace_alone_lists_what_is_in_it_and_selects_nothing(query, names):
    assert found(listing("desk", query)) == names
    assert found(setting("desk", query)) == []


@pytest.mark.parametrize("ask", [listing, setting])
def test_queries_that_are_not_known_are_passed_over(ask):
    queries = ["x-other:thing", "qemu:dirty-bitmap:a", "base:unknown", "BASE:ALLOCATION", "nocolon", ""]
    assert found(ask("desk", *queries)) == []
    assert found(ask("desk", *queries, "base:allocation")) == ["base:allocation"]


@pytest.mark.parametrize("ask", [listing, setting])
def test_context_asked_for_twice_comes_once(ask):
    assert found(ask("desk", "cowstore:own", "base:allocation", "cowstore:own")) == BOTH


def test_selected_contexts_have_numbers_of_their_own():
    numbers = nbd.contexts_of(play(STRUCTURED, setting("desk", *BOTH)).replies[1:])
    assert len(set(numbers.values())) == 2


def test_listed_contexts_have_the_number_zero():
    assert set(nbd.contexts_of(play(STRUCTURED, listing("desk")).replies[1:]).values()) == {0}


@either
def test_structured_replies_come_first(code):
    assert play(nbd.option(code, nbd.context_data("desk", *BOTH)), go()).kinds[0] == nbd.INVALID


@either
def test_contexts_of_an_unknown_export(code):
    assert play(STRUCTURED, nbd.option(code, nbd.context_data("gone", *BOTH))).kinds[1:] == [nbd.UNKNOWN]


@either
def test_data_that_is_cut_off_or_too_long(code):
    whole = nbd.context_data("desk", "base:", "cowstore:own")
    wrong = [*(whole[:length] for length in range(len(whole))), whole + b"\0"]
    for some in (wrong[:30], wrong[30:]):  # as many as one client may send
        outcome = play(STRUCTURED, *(nbd.option(code, data) for data in some), LIST)
        assert outcome.kinds == [nbd.ACK, *[nbd.INVALID] * len(some), nbd.SERVER, nbd.SERVER, nbd.ACK]


@either
@pytest.mark.parametrize("count", [3, 1 << 16, (1 << 32) - 1])
def test_more_queries_announced_than_there_are(code, count):
    data = nbd.string("desk") + count.to_bytes(4, "big") + nbd.string("base:") * 2
    assert play(STRUCTURED, nbd.option(code, data)).kinds[1:] == [nbd.INVALID]


@either
def test_query_of_4096_bytes_and_of_one_more(code):
    allowed = nbd.context_data("desk", "x:" + "y" * 4094, "base:allocation")
    assert play(STRUCTURED, nbd.option(code, allowed)).kinds[1:] == [nbd.META_CONTEXT, nbd.ACK]
    beyond = nbd.context_data("desk", "x:" + "y" * 4095, "base:allocation")
    assert play(STRUCTURED, nbd.option(code, beyond)).kinds[1:] == [nbd.INVALID]


@either
def test_name_of_one_byte_too_many(code):
    assert play(STRUCTURED, nbd.option(code, nbd.context_data("d" * 4097))).kinds[1:] == [nbd.INVALID]


@either
def test_strings_that_are_no_text(code):
    for data in (nbd.context_data(b"\xff", "base:"), nbd.context_data("desk", b"base:\xff")):
        assert play(STRUCTURED, nbd.option(code, data)).kinds[1:] == [nbd.INVALID]


# ------------------------------------------------------------------------------------------ what counts in the end


def test_selected_contexts_count_for_the_same_export():
    assert chosen(setting("desk", *BOTH), go("desk")) == BOTH
    assert chosen(setting("desk", BOTH[1]), nbd.option(nbd.EXPORT_NAME, b"desk")) == BOTH[1:]


def test_selected_contexts_count_for_no_other_export():
    assert chosen(setting("desk", *BOTH), go("base")) == []


def test_what_is_set_replaces_what_was_set():
    assert chosen(setting("desk", *BOTH), setting("desk", BOTH[0]), go("desk")) == BOTH[:1]
    assert chosen(setting("desk", *BOTH), setting("desk"), go("desk")) == []
    assert chosen(setting("base", *BOTH), setting("desk", BOTH[0]), go("base")) == []


@pytest.mark.parametrize(
    "failing",
    [setting("gone", *BOTH), nbd.option(nbd.SET_META_CONTEXT, b"\0"), setting("desk", b"\xff")],
    ids=["unknown export", "cut off", "no text"],
)
def test_setting_that_fails_leaves_nothing_selected(failing):
    assert chosen(setting("desk", *BOTH), failing, go("desk")) == []


def test_listing_selects_nothing_and_keeps_what_is_selected():
    assert chosen(listing("desk", *BOTH), go("desk")) == []
    assert chosen(setting("desk", *BOTH), listing("base"), info("base"), go("desk")) == BOTH


def test_default_export_keeps_its_contexts():
    outcome = play(STRUCTURED, setting("", *BOTH), go(""), names=("desk",))
    assert outcome.chosen
    assert len(outcome.chosen.contexts) == 2


# ----------------------------------------------------------------------------------------------------------- TLS

STARTTLS = nbd.option(nbd.STARTTLS)


def test_server_without_a_certificate_refuses_tls_and_goes_on():
    outcome = play(STARTTLS, go())
    assert outcome.kinds == [nbd.POLICY, nbd.INFORMATION, nbd.ACK]
    assert not outcome.wants_tls


@pytest.mark.parametrize(
    "ask",
    [LIST, STRUCTURED, info(), go(), go("gone"), listing("desk"), setting("desk", *BOTH), nbd.option(99, b"data")],
    ids=["list", "structured", "info", "go", "go to nothing", "list contexts", "set contexts", "unknown"],
)
def test_nothing_goes_on_in_the_clear_where_tls_is_required(ask):
    offered = devices()
    outcome = play(ask, ABORT, tls_required=True, offered=offered)
    assert outcome.kinds == [nbd.TLS_REQD, nbd.ACK]
    assert outcome.ended
    assert not offered.opened


def test_export_name_in_the_clear_ends_the_session_without_a_word():
    outcome = play(nbd.option(nbd.EXPORT_NAME, b"desk"), tls_required=True)
    assert outcome.error
    assert outcome.said == b""


def test_what_follows_starttls_belongs_to_tls():
    """An option smuggled in behind STARTTLS is not taken for one that came in TLS."""
    outcome = play(STARTTLS, STRUCTURED, go(), tls_required=True)
    assert outcome.kinds == [nbd.ACK]
    assert outcome.wants_tls
    assert outcome.rest == STRUCTURED + go()


def test_starttls_with_data_is_refused_and_may_be_tried_again():
    outcome = play(nbd.option(nbd.STARTTLS, b"x"), STARTTLS, tls_required=True)
    assert outcome.kinds == [nbd.INVALID, nbd.ACK]


def secured(offered: MemoryDevices | None = None, *, required: bool = True) -> Handshake:
    handshake = Handshake(Exports(offered or devices()), tls_required=required)
    handshake.receive(nbd.client_flags() + STARTTLS)
    assert handshake.wants_tls
    handshake.output.clear()
    handshake.secured()
    return handshake


def answers(handshake: Handshake, *asks: bytes) -> list[int]:
    """The kinds of the replies."""
    handshake.receive(b"".join(asks))
    take, left, kinds = nbd.taking(bytes(handshake.output)), len(handshake.output), []
    while left:
        reply = nbd.read_option_reply(take)
        kinds.append(reply.kind)
        left -= 20 + len(reply.data)
    return kinds


def test_everything_goes_on_in_tls():
    assert answers(secured(), LIST, STRUCTURED, setting("desk", *BOTH), go()) == [
        nbd.SERVER, nbd.SERVER, nbd.ACK, nbd.ACK, nbd.META_CONTEXT, nbd.META_CONTEXT, nbd.ACK, nbd.INFORMATION,
        nbd.ACK,
    ]  # fmt: skip


def test_tls_begins_once():
    assert answers(secured(), STARTTLS, nbd.option(nbd.STARTTLS, b"x"), LIST)[:2] == [nbd.INVALID, nbd.INVALID]


def test_nothing_that_was_agreed_in_the_clear_counts_in_tls():
    """No server here lets a client agree on something first; what follows does not rely on it."""
    handshake = Handshake(Exports(devices()), tls_required=False)
    handshake.receive(nbd.client_flags() + STRUCTURED + setting("desk", *BOTH))
    handshake.tls_required = True
    handshake.receive(STARTTLS)
    handshake.secured()
    handshake.output.clear()
    handshake.receive(go())
    assert handshake.chosen
    assert not handshake.chosen.structured
    assert handshake.chosen.contexts == ()


def test_client_flags_are_kept_in_tls():
    handshake = secured()
    handshake.receive(nbd.option(nbd.EXPORT_NAME, b"desk"))
    assert len(handshake.output) == 10


@pytest.mark.parametrize("ask", [STARTTLS, LIST], ids=["starttls", "list"])
def test_client_of_the_older_handshake_is_not_led_into_tls(ask):
    """The specification: NOTLS unless both sides set the flag, and in NOTLS no answer is TLS_REQD."""
    outcome = play(ask, tls_required=True, flags=0)
    assert not outcome.wants_tls
    assert nbd.TLS_REQD not in outcome.kinds
