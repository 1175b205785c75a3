"""Templates by checkpoint: built once, kept while that may be of use, closed otherwise."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

import cowstore
from cowstore.machines import template as template_module
from cowstore.machines import templates as templates_module
from cowstore.machines.template import Template
from cowstore.machines.templates import Templates
from tests.unit.memories import MIB, Memory, noise, take

CONTENT = {number: noise(number, 4096) for number in range(0, 256, 3)}


@dataclass
class Moment:
    """As much of a checkpoint as templates look at."""

    number: int
    name: str
    memory_size: int = MIB
    automatic: bool = False
    images: tuple[int, ...] = ()
    configuration: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def store(tmp_path):
    with cowstore.open(tmp_path / "s", create=True) as store:
        yield store


@pytest.fixture
def moments(store):
    made = [take(store, f"moment-{number}", Memory(CONTENT, MIB)) for number in range(6)]
    return [Moment(one.number, one.name) for one in made]


@pytest.fixture
def templates(store):
    templates = Templates(store.checkpoints, lambda _: [])
    yield templates
    templates.close()


def content(template: Template) -> bytes:
    with template.map() as ram:
        return bytes(ram)


def is_open(template: Template) -> bool:
    return template.fd >= 0


def test_one_is_built_and_used_again(templates, moments):
    with templates.held(moments[0]) as first:
        assert content(first) == Memory(CONTENT, MIB).content()
    with templates.held(moments[0]) as second:
        assert second is first


def test_many_at_once_build_one(templates, moments, monkeypatch):
    built = []
    genuine = Template.build

    def build(*words: Any) -> Template:
        built.append(words)
        return genuine(*words)

    monkeypatch.setattr(Template, "build", build)

    def use(_: int) -> int:
        with templates.held(moments[0]) as template:
            return template.fd

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(32)))) == 1
    assert len(built) == 1


def test_few_are_kept_that_nobody_uses(templates, moments):
    made = []
    for moment in moments:
        with templates.held(moment) as template:
            made.append(template)
    assert [is_open(one) for one in made] == [False, False, True, True, True, True]


def test_one_in_use_is_not_dropped(templates, moments):
    with templates.held(moments[0]) as first:
        for moment in moments[1:]:
            with templates.held(moment):
                pass
        assert is_open(first)
        templates.forget(moments[0].number)
        assert is_open(first), "its fork goes on"


def test_where_memory_is_short_only_the_newest_is_kept(templates, moments, monkeypatch):
    monkeypatch.setattr(templates_module, "available", lambda: MIB)
    monkeypatch.setattr(template_module, "available", lambda: 1 << 40)
    made = []
    for moment in moments[:3]:
        with templates.held(moment) as template:
            made.append(template)
    assert [is_open(one) for one in made] == [False, False, True]


def test_one_that_was_put_there_is_used(templates, moments):
    fd = os.memfd_create("made", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    made = Template.seal(fd, MIB)
    templates.put(moments[0].number, made)
    with templates.held(moments[0]) as template:
        assert template is made


def test_that_of_a_child_that_lives_is_found(store, moments):
    fd = os.memfd_create(templates_module.NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    os.pwrite(fd, b"a child's", 0)
    with_child = Templates(store.checkpoints, lambda number: [os.getpid()] if number == moments[0].number else [])
    mine = Template.seal(fd, MIB)
    try:
        with with_child.held(moments[0]) as template:
            assert content(template)[:9] == b"a child's"
        with with_child.held(moments[1]) as template:
            assert content(template)[:9] != b"a child's"
    finally:
        with_child.close()
        mine.close()


def test_a_failure_leaves_the_next_one_free_to_try(templates, moments, monkeypatch):
    monkeypatch.setattr(template_module, "available", lambda: 0)
    with pytest.raises(cowstore.MachineError, match="no memory left"), templates.held(moments[0]):
        pass
    monkeypatch.undo()
    with templates.held(moments[0]) as template:
        assert content(template) == Memory(CONTENT, MIB).content()
