"""A disk that forgets: what a power cut leaves of files and names that were not synced. Implements `Files`."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class Disk:
    """Volatile and durable state of a small file system.

    `before` is called before every operation that changes something, with its number; `fail_at`
    lets the operation of that number fail once with `error`. `syncs_files` and `syncs_folders` off: a disk whose fsync does nothing, to show
    that the tests would notice.
    """

    def __init__(self) -> None:
        self.before: Callable[[int], None] | None = None
        self.fail_at: int | None = None
        self.error = errno.ENOSPC
        self.syncs_files = True
        self.syncs_folders = True
        self.operations = 0
        self._folders: dict[str, dict[str, _File | None]] = {"/": {}}  # None: a folder
        self._durable: dict[str, dict[str, _File | None]] = {}
        self._open: dict[int, _File] = {}
        self._next = 3

    def cut(self, survives: Callable[[str], bool]) -> None:
        """The power comes back. Of each name that was given or taken away and not synced, `survives` says whether
        that reached the disk; data that was not synced did not."""
        self._folders = self._reachable(survives)
        for file in self._files():
            file.data = bytearray(file.synced)
        self._durable = {folder: dict(entries) for folder, entries in self._folders.items()}
        self._open.clear()
        self.before, self.fail_at = None, None

    def _reachable(self, survives: Callable[[str], bool]) -> dict[str, dict[str, _File | None]]:
        kept: dict[str, dict[str, _File | None]] = {}
        todo = ["/"]
        while todo:
            folder = todo.pop()
            kept[folder] = self._after_cut(folder, survives)
            todo += [os.path.join(folder, name) for name, file in kept[folder].items() if file is None]
        return kept

    def _after_cut(self, folder: str, survives: Callable[[str], bool]) -> dict[str, _File | None]:
        now, synced = self._folders.get(folder, {}), self._durable.get(folder, {})
        kept: dict[str, _File | None] = {}
        for name in sorted(now.keys() | synced.keys()):
            changed = (name in now) != (name in synced)
            source = now if not changed or survives(os.path.join(folder, name)) else synced
            if name in source:
                kept[name] = source[name]
        return kept

    def copy(self) -> Disk:
        """The disk as it is at this moment, apart from this one."""
        twin = self.fresh()
        files = {id(file): _File(bytearray(file.data), file.synced) for file in self._files()}
        twin._folders = _twins(self._folders, files)
        twin._durable = _twins(self._durable, files)
        return twin

    def fresh(self) -> Disk:
        """An empty one that behaves like this."""
        return Disk()

    def _files(self) -> list[_File]:
        tables = (*self._folders.values(), *self._durable.values())
        return [file for entries in tables for file in entries.values() if file is not None]

    def _change(self) -> None:
        self.operations += 1
        if self.before is not None:
            self.before(self.operations)
        if self.operations == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))

    def _in(self, path: str) -> tuple[dict[str, _File | None], str]:
        """The entries of the folder of `path`, and its name there."""
        folder, name = os.path.split(path)
        return self._entries(folder), name

    def _entries(self, folder: str) -> dict[str, _File | None]:
        if folder not in self._folders:
            raise FileNotFoundError(errno.ENOENT, "no such folder", folder)
        return self._folders[folder]

    def _file(self, path: str) -> _File:
        entries, name = self._in(path)
        file = entries.get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return file

    def _add(self, path: str, file: _File | None) -> None:
        entries, name = self._in(path)
        if name in entries:
            raise FileExistsError(errno.EEXIST, "exists", path)
        entries[name] = file

    def _descriptor(self, file: _File) -> int:
        self._next += 1
        self._open[self._next] = file
        return self._next

    def open_new(self, path: str) -> int:
        self._change()
        file = _File()
        self._add(path, file)
        return self._descriptor(file)

    open_new_direct = open_new

    def open_to_read(self, path: str) -> int:
        return self._descriptor(self._file(path))

    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._change()
        part = data[: max(1024, len(data) // 2)]  # short writes are the rule here
        held = self._open[descriptor].data
        held.extend(bytes(max(0, offset + len(part) - len(held))))
        held[offset : offset + len(part)] = part
        return len(part)

    def reserve(self, descriptor: int, size: int) -> None:
        self._change()
        held = self._open[descriptor].data
        held.extend(bytes(max(0, size - len(held))))

    def truncate(self, descriptor: int, size: int) -> None:
        self._change()
        del self._open[descriptor].data[size:]

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        found = bytes(self._open[descriptor].data[offset : offset + len(buffer)])
        buffer[: len(found)] = found
        return len(found)

    def size(self, descriptor: int) -> int:
        return len(self._open[descriptor].data)

    def sync(self, descriptor: int) -> None:
        self._change()
        if self.syncs_files:
            self._open[descriptor].synced = bytes(self._open[descriptor].data)

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def link(self, source: str, target: str) -> None:
        self._change()
        self._add(target, self._file(source))

    def same(self, one: str, other: str) -> bool:
        entries, name = self._in(other)
        return entries.get(name) is self._file(one)

    def unlink(self, path: str) -> None:
        self._change()
        self._file(path)
        entries, name = self._in(path)
        del entries[name]

    def mkdir(self, path: str) -> None:
        self._change()
        self._add(path, None)
        self._folders[path] = {}

    def rmdir(self, path: str) -> None:
        self._change()
        if self._entries(path):
            raise OSError(errno.ENOTEMPTY, "not empty", path)
        entries, name = self._in(path)
        del entries[name], self._folders[path]

    def is_folder(self, path: str) -> bool:
        return path in self._folders

    def same_volume(self, one: str, other: str) -> bool:
        return True

    def names(self, path: str) -> list[str]:
        return list(self._entries(path))

    def sync_folder(self, path: str) -> None:
        self._change()
        if self.syncs_folders:
            self._durable[path] = dict(self._entries(path))


def _twins(
    folders: dict[str, dict[str, _File | None]], files: dict[int, _File]
) -> dict[str, dict[str, _File | None]]:
    return {
        folder: {name: None if file is None else files[id(file)] for name, file in entries.items()}
        for folder, entries in folders.items()
    }
