"""The ledger accepts what a crash may leave, and nothing else."""

from __future__ import annotations

import pytest

from .integrity import BLOCK, Change, IntegrityError, Ledger, Loss, labelled

ZERO = bytes(BLOCK)


class Scene:
    """A clone of four blocks, the last of which is zero in the beginning."""

    def __init__(self) -> None:
        self.ledger = Ledger(1, [True, True, True, False])
        self.content = [labelled(1, block, 0) for block in range(3)] + [ZERO]

    def sent(self, *blocks: int, zero: bool = False) -> Change:
        return self.ledger.send(range(blocks[0], blocks[-1] + 1), zero=zero)

    def answered(self, *blocks: int, zero: bool = False) -> Change:
        change = self.sent(*blocks, zero=zero)
        self.ledger.answer(change)
        return change

    def promised(self, *blocks: int, zero: bool = False) -> Change:
        change = self.answered(*blocks, zero=zero)
        self.ledger.promise(self.ledger.coverage())
        return change

    def done(self, change: Change, *blocks: int) -> None:
        """The disk takes a change, or some blocks of it."""
        for block in blocks or change.blocks:
            self.content[block] = self.ledger.content(change, [block])

    def settle(self) -> Loss:
        return self.ledger.settle(b"".join(self.content))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_beginning_is_known(scene):
    assert scene.ledger.start() == b"".join(scene.content)
    assert scene.settle() == Loss()


def test_promised_is_there(scene):
    scene.done(scene.promised(0, 1))
    scene.done(scene.promised(1, 2, zero=True))
    assert scene.settle() == Loss()


def test_later_than_promised_may_be_there_or_not(scene):
    scene.done(scene.promised(0))
    scene.done(scene.answered(0))
    scene.sent(0)
    assert scene.settle() == Loss(missing=1, kept=1)


def test_answered_after_the_flush_was_sent_may_be_missing(scene):
    change = scene.sent(0)
    covered = scene.ledger.coverage()
    scene.ledger.answer(change)
    scene.ledger.promise(covered)
    assert scene.settle() == Loss(missing=1)


def test_what_was_there_stays(scene):
    change = scene.sent(0)
    scene.done(change)
    scene.settle()
    scene.content[0] = labelled(1, 0, 0)
    with pytest.raises(IntegrityError, match="generation 0 is none of its changes"):
        scene.settle()


def test_zeros_may_be_of_any_change_that_made_zeros(scene):
    scene.done(scene.answered(0))
    scene.answered(3)
    scene.answered(3, zero=True)
    scene.done(scene.answered(1))
    scene.settle()


def test_older_zeros_are_found(scene):
    scene.promised(3)
    with pytest.raises(IntegrityError, match=r"block 3: zeros is older than the promised generation 1"):
        scene.settle()


def test_torn_block_is_found(scene):
    scene.done(scene.promised(0))
    scene.content[0] = scene.content[0][:512] + labelled(1, 0, 0)[512:]
    with pytest.raises(IntegrityError, match="block 0: is torn"):
        scene.settle()


@pytest.mark.parametrize("other", [labelled(1, 2, 0), labelled(2, 1, 0)])
def test_foreign_block_is_found(scene, other):
    scene.content[1] = other
    with pytest.raises(IntegrityError, match="block 1: foreign"):
        scene.settle()


def test_what_was_never_sent_is_found(scene):
    scene.content[1] = labelled(1, 1, 7)
    with pytest.raises(IntegrityError, match="block 1: generation 7 is none of its changes"):
        scene.settle()


def test_overtaken_change_is_found(scene):
    scene.answered(0)
    scene.done(scene.answered(1))
    with pytest.raises(IntegrityError, match="was never like this"):
        scene.settle()


def test_overtaken_zeros_are_found(scene):
    """Zeros of the beginning would be too old, and of the last change too new."""
    scene.answered(3)
    scene.done(scene.answered(0))
    scene.answered(1)
    scene.answered(3, zero=True)
    with pytest.raises(IntegrityError, match="was never like this"):
        scene.settle()


def test_changes_at_the_same_time_have_no_order(scene):
    first, second = scene.sent(0), scene.sent(1)
    scene.ledger.answer(second)
    scene.ledger.answer(first)
    scene.done(first)
    assert scene.settle() == Loss(missing=1, kept=1)


def test_part_of_a_request_is_found(scene):
    scene.done(scene.answered(0, 1, 2), 0, 2)
    with pytest.raises(IntegrityError, match="only a part of generation 1"):
        scene.settle()


def test_old_read_is_found(scene):
    scene.answered(0)
    with pytest.raises(IntegrityError, match="generation 0 is read instead of generation 1"):
        scene.ledger.check_read(range(2), b"".join(scene.content[:2]))
