"""Patterns of names: `*` stays within one part of a name, `**` crosses dots, `{a,b}` is either, `{i}` is one part that has a name. Pure."""

from __future__ import annotations

import re
from functools import cache

_TOKEN = re.compile(r"\*\*|\*|\{[^{}]*\}|[^*{}]+|.", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression, to be used with `fullmatch`. Raises ValueError on braces that do not close."""
    seen: set[str] = set()
    return re.compile("".join(_piece(token, seen) for token in _TOKEN.findall(pattern)), re.DOTALL)


def _piece(token: str, seen: set[str]) -> str:
    if token == "**":
        return ".*"
    if token == "*":
        return "[^.]*"
    if token in "{}":
        raise ValueError("a brace is not closed")
    if not token.startswith("{"):
        return re.escape(token)
    inner = token[1:-1]
    if "," in inner:
        return f"(?:{'|'.join(re.escape(one.strip()) for one in inner.split(','))})"
    if not _NAME.fullmatch(inner):
        raise ValueError(f"{token} is neither a name nor several ones with commas between")
    if inner in seen:
        return f"(?P={inner})"
    seen.add(inner)
    return f"(?P<{inner}>[^.]+)"


def variables(pattern: str) -> frozenset[str]:
    """The names in braces."""
    return frozenset(compiled(pattern).groupindex)


def bound(pattern: str, name: str) -> dict[str, str] | None:
    """What the variables of a pattern are in a name that it matches whole; None where it does not."""
    match = compiled(pattern).fullmatch(name)
    return match.groupdict() if match is not None else None


def filled(pattern: str, binding: dict[str, str]) -> str:
    """The name that a pattern of variables alone stands for."""
    return pattern.format_map(binding)
