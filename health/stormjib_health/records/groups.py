"""The groups file: which process groups a rank has, one JSON line each, in the order of their index.

Beside the ring, because a group's ranks fit no 64-byte record. The rank appends, its agent follows. Bounded on both
sides: a rank with more groups than `layout.MAX_GROUPS`, or longer lines, has its further groups unrecorded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from stormjib_health.records.layout import MAX_GROUPS, MAX_RANK
from stormjib_health.wire import Group

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINE = 1 << 17
"""Bytes of one line: a group of 16,000 ranks."""
MAX_FILE = 1 << 22
"""Bytes of all lines."""
MAX_NAME = 256
KEY_BITS = 48


def groups_path(folder: Path, local_rank: int) -> Path:
    """Where the groups of a local rank are, in the folder of the pages (`STORMJIB_PAGE_DIR`)."""
    return folder / f"{local_rank}.groups"


def group_key(name: str, ranks: tuple[int, ...], before: int) -> int:
    """48 bits, equal on all ranks of a group. `before`: groups of that name and these ranks that came before it."""
    words = json.dumps([name, ranks, before], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=KEY_BITS // 8).digest(), "little")


class GroupsWriter:
    """The rank's side."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        self._size = 0
        self._seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def add(self, name: str, ranks: tuple[int, ...]) -> int | None:
        """Index of a group that was made just now; None where the file is full. Raises OSError."""
        name = name[:MAX_NAME]
        before = self._seen[name, ranks]
        self._seen[name, ranks] += 1
        line = (
            json.dumps([group_key(name, ranks, before), name, ranks], separators=(",", ":")).encode() + b"\n"
        )
        if self._count >= MAX_GROUPS or len(line) > MAX_LINE or self._size + len(line) > MAX_FILE:
            return None
        with open(self._path, "ab", buffering=0) as file:
            file.write(line)
        self._count += 1
        self._size += len(line)
        return self._count - 1


class GroupsReader:
    """The agent's side: gives each group once. `groups[i]` is what call records name as group `i`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.groups: list[Group | None] = []
        """None: a line that no correct rank writes."""

    def read(self) -> tuple[Group, ...]:
        """Groups that are new since the last read. Never raises for what the rank has written."""
        lines = self._news().split(b"\n")[:-1][: MAX_GROUPS - len(self.groups)]
        self._read += sum(len(line) + 1 for line in lines)
        new = [_group(line) for line in lines]
        self.groups.extend(new)
        return tuple(group for group in new if group is not None)

    def group(self, index: int) -> Group | None:
        """The group that a call record names; None where its line has not come, or is bad."""
        return self.groups[index] if index < len(self.groups) else None

    def _news(self) -> bytes:
        try:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(self._read)
                return file.read(max(0, MAX_FILE - self._read)) or b""
        except OSError:  # not there yet
            return b""


def _group(line: bytes) -> Group | None:
    try:
        value: Any = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or len(value) != 3:
        return None
    key, name, ranks = value
    if (
        type(key) is not int
        or not 0 <= key < 1 << KEY_BITS
        or not isinstance(name, str)
        or len(name) > MAX_NAME
    ):
        return None
    if not isinstance(ranks, list) or not all(type(rank) is int and 0 <= rank < MAX_RANK for rank in ranks):
        return None
    return Group.of(key, name, ranks) if ranks and len(set(ranks)) == len(ranks) else None
