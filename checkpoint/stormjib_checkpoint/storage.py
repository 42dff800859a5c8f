"""Where checkpoints lie: one small protocol, and the local file system behind it.

Every write is durable when it returns, and create-only but for hints: a temporary name, fsync of the file, link() to the final name
(which never replaces), fsync of the folder and of every new folder up to the root. All operations of the file system
go through `Files`, so that tests can fail or cut each one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from stormjib_checkpoint.errors import (
    AlreadyThere,
    MediumFailed,
    NotThere,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageReadOnly,
)
from stormjib_checkpoint.files import Files, Posix
from stormjib_checkpoint.keys import checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Chunk = bytes | memoryview


class Opened(Protocol):
    """A file opened for ranged reads."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; returns how many bytes there were before the end of the file."""


class NewFile(Protocol):
    """A file that is being written and has no name yet."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset, in any order and from any thread; each byte of the file once. The memory is free again on return.
        Fast where the writers take turns through whole pieces of 16 MiB, from front to back."""


class Storage(Protocol):
    """What the library needs of a store. Paths are relative, with `/`, and come from `layout` only."""

    @property
    def key(self) -> bytes | None:
        """What the records in it are signed with and proved by; None: they are not signed."""

    @property
    def writers(self) -> int:
        """How many threads that write, or read, at once keep it busy."""

    @property
    def request_bytes(self) -> int:
        """So many bytes take about as long to read as one more request."""

    def new(self, path: str, size: int) -> contextlib.AbstractContextManager[NewFile]:
        """A new file of `size` bytes: what is written behind them is cut off. It is there, durable and whole, when the block ends;
        where the block raises, nothing is. Raises AlreadyThere where the name is taken, and changes nothing."""

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        """Write a new file, durable on return. Raises AlreadyThere where the name is taken, and changes nothing."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a file, or write over it, durable on return: a reader finds the old bytes or the new ones. For hints only."""

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a small file. Raises NotThere; raises StorageError above `limit` bytes."""

    def open(self, path: str) -> contextlib.AbstractContextManager[Opened]:
        """A file for ranged reads. Raises NotThere."""

    def past_cache(self) -> Storage:
        """The same files, read from where they lie and not from a copy in this machine's memory: for whoever wants to know whether they
        are still whole."""

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder, none where it does not exist; unfinished writes are left out."""

    def remove(self, folder: str, names: Iterable[str]) -> None:
        """Delete files of one folder, durable on return; a name that is gone already is fine."""

    def remove_folder(self, folder: str) -> None:
        """Delete a folder with what unfinished writes left in it; it stays where it holds anything else.

        Not synced: an empty folder that comes back means nothing.
        """


class _LocalFile:
    def __init__(self, files: Files, descriptor: int, path: str) -> None:
        self._files = files
        self._descriptor = descriptor
        self._path = path
        self.size = files.size(descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with _typed(self._path):
            while done < len(buffer):
                count = self._files.read_into(self._descriptor, buffer[done:], offset + done)
                if count == 0:
                    break
                done += count
        return done

    def forget(self, offset: int = 0, length: int = 0) -> None:
        with _typed(self._path):
            self._files.forget(self._descriptor, offset, length)


class _Reread:
    """A file of which nothing is taken from the page cache, and nothing left in it."""

    def __init__(self, file: _LocalFile) -> None:
        file.forget()
        self._file, self.size = file, file.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = self._file.read_into(offset, buffer)
        self._file.forget(offset, len(buffer))
        return done


class _LocalNewFile:
    def __init__(self, files: Files, descriptor: int, path: str) -> None:
        self._files = files
        self.descriptor = descriptor
        self.path = path

    def write(self, offset: int, data: memoryview) -> None:
        with _typed(self.path):
            while data:
                count = self._files.write_at(self.descriptor, data, offset)
                data, offset = data[count:], offset + count


class Local:
    """A folder of a file system that every rank and committer of the job sees."""

    writers = 2
    request_bytes = 16 * 1024

    def __init__(
        self, root: str | os.PathLike[str], files: Files | None = None, key: bytes | None = None
    ) -> None:
        """Raises BadKey."""
        self.key = checked(key)
        self.root = os.path.abspath(os.fspath(root))
        self._files: Files = files if files is not None else Posix()
        self._durable: set[str] = set()

    @contextlib.contextmanager
    def new(self, path: str, size: int) -> Iterator[NewFile]:
        with self._new(path, self._files.open_new_direct) as file:
            with _typed(file.path):
                self._files.reserve(file.descriptor, size)
            yield file
            with _typed(file.path):
                self._files.truncate(file.descriptor, size)

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        with self._new(path, self._files.open_new) as file:
            offset = 0
            for chunk in chunks:
                data = memoryview(chunk).cast("B")
                file.write(offset, data)
                offset += len(data)

    def replace(self, path: str, data: bytes) -> None:
        with self._new(path, self._files.open_new, self._files.rename) as file:
            file.write(0, memoryview(data))

    @contextlib.contextmanager
    def _new(
        self,
        path: str,
        open_new: Callable[[str], int],
        publish: Callable[[str, str], None] | None = None,
    ) -> Iterator[_LocalNewFile]:
        """A file with a temporary name, which gets its own when the block has ended well."""
        target = self._at(path)
        folder, name = os.path.split(target)
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}"
        with _typed(target):
            self._ensure(folder)
            descriptor = open_new(temporary)
        try:
            yield _LocalNewFile(self._files, descriptor, target)
            with _typed(target):
                self._files.sync(descriptor)
                (publish or self._publish)(temporary, target)
        except AlreadyThere:
            # Whoever took the name may have died before this sync, and our caller may build on the file.
            self._discard(temporary)
            with _typed(target):
                self._files.sync_folder(folder)
            raise
        except BaseException:
            self._discard(temporary)
            raise
        finally:
            self._close(descriptor, target)
        self._discard(temporary)
        with _typed(target):
            self._files.sync_folder(folder)

    def read(self, path: str, limit: int) -> bytes:
        with self.open(path) as file:
            if file.size > limit:
                raise StorageError(
                    self._at(path),
                    f"{file.size} bytes; at most {limit} are read",
                    "It is not a file of ours.",
                )
            data = bytearray(file.size)
            return bytes(memoryview(data)[: file.read_into(0, memoryview(data))])

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        with self._opened(path) as file:
            yield file

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[_LocalFile]:
        target = self._at(path)
        with _typed(target):
            descriptor = self._files.open_to_read(target)
        try:
            with _typed(target):
                file = _LocalFile(self._files, descriptor, target)
            yield file
        finally:
            self._close(descriptor, target)

    def past_cache(self) -> Local:
        return _PastCache(self.root, self._files, self.key)

    def names(self, folder: str) -> list[str]:
        target = self._at(folder) if folder else self.root
        with _typed(target):
            try:
                return sorted(name for name in self._files.names(target) if not name.startswith("."))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def remove(self, folder: str, names: Iterable[str]) -> None:
        target = self._at(folder)
        with _typed(target):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.unlink(f"{target}/{name}")
            with contextlib.suppress(FileNotFoundError):
                self._files.sync_folder(target)

    def remove_folder(self, folder: str) -> None:
        target = self._at(folder)
        self._durable.discard(target)
        with _typed(target), contextlib.suppress(FileNotFoundError):
            for name in self._files.names(target):
                if name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        self._files.unlink(f"{target}/{name}")
            try:
                self._files.rmdir(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _at(self, path: str) -> str:
        if not path or any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
            raise ValueError(f"{path!r} is no path below a root")
        return f"{self.root}/{path}"

    def _ensure(self, folder: str) -> None:
        """Make the folder, and make it last: each `Local` syncs every folder that it uses once, up to the volume's.

        A folder that is there already may have been made by a process that died before its sync, so being there is
        not enough.
        """
        if folder in self._durable:
            return
        if folder == self.root:
            self._ensure_root()
        else:
            parent = os.path.dirname(folder)
            self._ensure(parent)
            self._make(folder)
            self._files.sync_folder(parent)
        self._durable.add(folder)

    def _ensure_root(self) -> None:
        above = [str(path) for path in PurePosixPath(self.root).parents]
        for folder in (*reversed(above), self.root):
            self._make(folder)
        for parent, folder in zip(above, (self.root, *above), strict=False):
            if not self._files.same_volume(parent, folder):
                break
            with contextlib.suppress(PermissionError):  # then it is not ours, and no name in it is
                self._files.sync_folder(parent)

    def _make(self, folder: str) -> None:
        if not self._files.is_folder(folder):
            with contextlib.suppress(FileExistsError):
                self._files.mkdir(folder)

    def _close(self, descriptor: int, path: str) -> None:
        with _typed(path):
            self._files.close(descriptor)

    def _discard(self, temporary: str) -> None:
        with contextlib.suppress(OSError):
            self._files.unlink(temporary)

    def _publish(self, temporary: str, target: str) -> None:
        try:
            self._files.link(temporary, target)
        except FileExistsError:
            # NFS repeats a request whose answer was lost: then the name that is taken is our own file.
            if not self._files.same(temporary, target):
                raise


class _PastCache(Local):
    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        with self._opened(path) as file:
            yield _Reread(file)


@contextlib.contextmanager
def _typed(path: str) -> Iterator[None]:
    """An OSError as an error of ours that names the path and the fix."""
    try:
        yield
    except OSError as error:
        raise _error(path, error) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEDIUM = (errno.EIO, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG)


def _error(path: str, error: OSError) -> StorageError:
    problem = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return StorageFull(
            path, problem, "Free space, enlarge the volume or quota, or keep fewer checkpoints."
        )
    if error.errno == errno.EROFS:
        return StorageReadOnly(
            path, problem, "Mount the volume read-write, or name another checkpoint folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        fix = f"Let uid {os.getuid()} write there (volume ownership or fsGroup), or name another checkpoint folder."
        return StorageDenied(path, problem, fix)
    if error.errno == errno.ENOENT:
        return NotThere(path, problem, "It was deleted, or never written.")
    if error.errno == errno.EEXIST:
        return AlreadyThere(
            path, "the name is taken", "It is never overwritten; take the next generation or step."
        )
    kind = MediumFailed if error.errno in _MEDIUM else StorageError
    return kind(path, f"{problem} (errno {error.errno})", "Look at the health of the volume.")
