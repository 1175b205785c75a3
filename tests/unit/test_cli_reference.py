"""docs/cli.md against the commands: nothing is missing in it, and nothing stands in it that is not there."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from cowstore_cli.main import COMMANDS as TOP
from cowstore_cli.main import cli
from cowstore_cli.vm import COMMANDS as MACHINES
from tools import cli_reference

COMMANDS = [name for top in TOP for name in (top, *(f"vm {one}" for one in MACHINES if top == "vm"))]
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])")


def section(name: str) -> str:
    found = re.search(rf"^### cowstore {name}\n(.*?)(?=^### |\Z)", cli_reference.PAGE.read_text(), re.M | re.S)
    assert found, f"docs/cli.md has no section for {name}; run `make docs`"
    return found[1]


def test_page_is_up_to_date():
    written = cli_reference.PAGE.read_text()
    assert written == cli_reference.page(written), "run `make docs`"


def test_every_command_and_no_other_has_a_section():
    found = re.findall(r"^### cowstore (.+)$", cli_reference.PAGE.read_text(), re.M)
    assert found == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_section_lists_the_options_of_the_help(name):
    """The page is compared with what click prints too, not only with the script that made the page."""
    shown = CliRunner().invoke(cli, [*name.split(), "--help"]).stdout
    listed = [
        line.partition("|")[2].partition("|")[0] for line in section(name).splitlines() if line.startswith("| `")
    ]
    options = {option for line in listed for option in OPTION.findall(line)}
    in_help = {
        option
        for line in shown.partition("Options:")[2].splitlines()
        for option in OPTION.findall(re.split(r"\s{2,}", line.strip())[0])
    }
    assert options == in_help


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself(name):
    command: click.Command | None = cli
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    assert command.help
    assert all(one.help for one in command.params if isinstance(one, click.Option))
