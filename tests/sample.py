"""What the tests of the command start from, and how they read what it prints."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result

MIB = 1 << 20
CONTENT = bytes(range(256)) * 16 * 5 + b"a tail that fills no block"
"""A disk of five equal blocks and a tail."""


def facts(result: Result) -> Any:
    """What a command printed with --json."""
    return json.loads(result.stdout)
