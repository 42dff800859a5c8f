"""A disk that writes down every call, so that a test can see what a power cut would leave. Implements `Files`.

A `Tree` is what lies on a disk: names in folders, and the bytes of files. Calls that change it are `Change`s; what makes them last are
`Synced`s. `fakes.power` takes changes away again.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from typing import NamedTuple

ROOT = 0
SECTOR = 512
"""What a disk writes whole or not at all."""


class Named(NamedTuple):
    """A name of a folder leads to another node now; None: to nothing."""

    node: int
    name: str
    target: int | None


class Wrote(NamedTuple):
    """Bytes of a file."""

    node: int
    offset: int
    data: bytes


class Sized(NamedTuple):
    """A file has this length now; where it was shorter, zeros are added."""

    node: int
    size: int


class Synced(NamedTuple):
    """What was changed before of this file, or of this folder's own names, lasts. `line` of the library asked for it."""

    node: int
    line: str


Change = Named | Wrote | Sized
Entry = Change | Synced


class Tree:
    """Folders and files by number; names lead to them. A file whose last name is gone stays, but nobody finds it."""

    def __init__(self) -> None:
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}
        self.files: dict[int, bytes] = {}

    def copy(self) -> Tree:
        twin = Tree()
        twin.folders = {node: dict(entries) for node, entries in self.folders.items()}
        twin.files = dict(self.files)
        return twin

    def apply(self, change: Change) -> None:
        match change:
            case Named(node, name, target):
                entries = self.folders.setdefault(node, {})
                if target is None:
                    entries.pop(name, None)
                else:
                    entries[name] = target
                    if target < ROOT:
                        self.folders.setdefault(target, {})
            case Wrote(node, offset, data):
                old = self.files.get(node, b"").ljust(offset, b"\0")
                self.files[node] = old[:offset] + data + old[offset + len(data) :]
            case Sized(node, size):
                self.files[node] = self.files.get(node, b"")[:size].ljust(size, b"\0")

    def key(self, node: int = ROOT) -> tuple[object, ...]:
        """Equal for trees in which the library finds the same. Names that begin with a dot it does not open: `Disk` sees to it."""
        return tuple(
            (name, self._key_of(name, child)) for name, child in sorted(self.folders.get(node, {}).items())
        )

    def _key_of(self, name: str, node: int) -> object:
        if node < 0:
            return self.key(node)
        return "" if name.startswith(".") else self.files.get(node, b"")


class Disk:
    """A small file system whose calls are written down in `log`. Folders have numbers up to 0, files from 1 on."""

    def __init__(self, tree: Tree | None = None, log: list[Entry] | None = None) -> None:
        self.tree = tree if tree is not None else Tree()
        self.log: list[Entry] = log if log is not None else []
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        self._next = 1_000 + max(self.tree.files, default=0) - min(self.tree.folders)

    def content(self, path: str) -> bytes:
        """What a file holds."""
        return self.tree.files[self._file(path)]

    def damage(self, path: str, data: bytes) -> None:
        """A file holds this now, and nobody has written it."""
        self.tree.files[self._file(path)] = data

    def _change(self, change: Change) -> None:
        with self._lock:
            self.tree.apply(change)
            self.log.append(change)

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def _folder(self, path: str) -> int:
        node = ROOT
        for name in filter(None, path.split("/")):
            found = self.tree.folders.get(node, {}).get(name)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "no such folder", path)
            if found > ROOT:
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
            node = found
        return node

    def _entries(self, path: str) -> dict[str, int]:
        return self.tree.folders.get(self._folder(path), {})

    def _file(self, path: str) -> int:
        folder, name = os.path.split(path)
        node = self._entries(folder).get(name, ROOT)
        if node <= ROOT:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return node

    def _name(self, path: str, target: int) -> None:
        folder, name = os.path.split(path)
        if name in self._entries(folder):
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._change(Named(self._folder(folder), name, target))

    def _unname(self, path: str) -> None:
        folder, name = os.path.split(path)
        self._change(Named(self._folder(folder), name, None))

    def _descriptor(self, node: int) -> int:
        descriptor = self._number()
        self._open[descriptor] = node
        return descriptor

    def _synced(self, node: int) -> None:
        caller = sys._getframe(2)
        line = f"{caller.f_code.co_name}, line {caller.f_lineno - caller.f_code.co_firstlineno}"
        self.log.append(Synced(node, line))

    def open_new(self, path: str) -> int:
        node = self._number()
        self._name(path, node)
        self._change(Sized(node, 0))
        return self._descriptor(node)

    open_new_direct = open_new

    def open_to_read(self, path: str) -> int:
        assert not os.path.basename(path).startswith("."), f"{path} is unfinished, and read"
        return self._descriptor(self._file(path))

    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        part = bytes(data[: max(1024, len(data) // 2)])  # short writes are the rule here
        self._change(Wrote(self._open[descriptor], offset, part))
        return len(part)

    def reserve(self, descriptor: int, size: int) -> None:
        self._change(Sized(self._open[descriptor], max(size, self.size(descriptor))))

    def truncate(self, descriptor: int, size: int) -> None:
        self._change(Sized(self._open[descriptor], size))

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        found = self.tree.files[self._open[descriptor]][offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def size(self, descriptor: int) -> int:
        return len(self.tree.files.get(self._open[descriptor], b""))

    def forget(self, descriptor: int, offset: int, length: int) -> None:
        assert descriptor in self._open

    def sync(self, descriptor: int) -> None:
        self._synced(self._open[descriptor])

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def link(self, source: str, target: str) -> None:
        self._name(target, self._file(source))

    def rename(self, source: str, target: str) -> None:
        folder, name = os.path.split(target)
        self._change(Named(self._folder(folder), name, self._file(source)))
        self._unname(source)

    def same(self, one: str, other: str) -> bool:
        return self._file(other) == self._file(one)

    def unlink(self, path: str) -> None:
        self._file(path)
        self._unname(path)

    def mkdir(self, path: str) -> None:
        node = -self._number()
        self._name(path, node)

    def rmdir(self, path: str) -> None:
        if self._entries(path):
            raise OSError(errno.ENOTEMPTY, "not empty", path)
        self._unname(path)

    def is_folder(self, path: str) -> bool:
        try:
            self._folder(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def same_volume(self, one: str, other: str) -> bool:
        return True

    def names(self, path: str) -> list[str]:
        return list(self._entries(path))

    def sync_folder(self, path: str) -> None:
        self._synced(self._folder(path))
