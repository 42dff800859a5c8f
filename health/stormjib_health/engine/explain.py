"""A verdict for people: a sentence, and the evidence as a small table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.verdict import Scope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.verdict import Verdict

HEAD = ("what", "who", "value", "others / before")
WIDTH = 48
"""Of a column; what is longer is cut, with an ellipsis."""


def explain(verdict: Verdict) -> str:
    """Headline, sentence, table and stack, without a newline at the end."""
    parts = [headline(verdict), verdict.sentence]
    if verdict.evidence:
        parts += ["", table([(row.name, row.who, row.value, row.others) for row in verdict.evidence])]
    if verdict.stack:
        parts += ["", "stack:", *(f"  {line}" for line in verdict.stack.rstrip().splitlines())]
    return "\n".join(parts)


def headline(verdict: Verdict) -> str:
    """`NonCommunicationHang @ rank 5 (slot 2): 90 %, confirmed, after 1.3 s`."""
    words = [f"{verdict.confidence:.0%}".replace("%", " %")]
    words += ["confirmed"] if verdict.confirmed else []
    words += ["the program's fault"] if verdict.software else []
    words += [f"steps x {verdict.severity:.2f}"] if verdict.severity > 1 else []
    words.append(f"after {verdict.lasted_s:.1f} s")
    return f"{verdict.syndrome} @ {whom(verdict)}: {', '.join(words)}"


def whom(verdict: Verdict) -> str:
    """The culprits in words; `nobody` for none."""
    if not verdict.culprits:
        return "nobody"
    slots = ", ".join(map(str, verdict.slots))
    if verdict.scope is Scope.NODE:
        return f"slot {slots}"
    if verdict.scope is Scope.LINK:
        return "link " + " -> ".join(f"rank {rank}" for rank in verdict.culprits) + f" (slots {slots})"
    noun = "rank" if len(verdict.culprits) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, verdict.culprits))} (slot {slots})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under their heads, columns as wide as they need."""
    cut = [[_cell(cell) for cell in row] for row in (HEAD, *rows)]
    widths = [max(len(row[i]) for row in cut) for i in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(text: str) -> str:
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 1] + "…"
