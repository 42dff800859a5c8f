"""Every numbered line of FORMAT.md is quoted by a test, and no test quotes a line that is not there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
FORMAT = TESTS.parents[2] / "checkpoint" / "FORMAT.md"


def test_every_line_is_quoted() -> None:
    lines = set(re.findall(r"^(\d+\.\d+) ", FORMAT.read_text(), re.MULTILINE))
    quoted = {
        number
        for path in TESTS.glob("test_*.py")
        for text in re.findall(r'^    """(§.*)', path.read_text(), re.MULTILINE)
        for number in re.findall(r"§(\d+\.\d+)", text)
    }
    assert len(lines) > 60
    assert sorted(lines - quoted) == [], "say in a test's docstring which line it holds: §4.3"
    assert sorted(quoted - lines) == []
