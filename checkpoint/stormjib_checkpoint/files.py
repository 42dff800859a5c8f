"""Every call to the file system that the library makes, as one port: tests put a failing or a forgetful one in its place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Protocol

FILE_MODE = 0o640
FOLDER_MODE = 0o750

# Linux: rename without replacing, for file systems that have no hard links.
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class Files(Protocol):
    """The file system, one method per call that can fail or be cut. All raise OSError."""

    def open_new(self, path: str) -> int: ...
    def open_new_direct(self, path: str) -> int: ...
    def reserve(self, descriptor: int, size: int) -> None: ...
    def open_to_read(self, path: str) -> int: ...
    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int: ...
    def truncate(self, descriptor: int, size: int) -> None: ...
    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int: ...
    def size(self, descriptor: int) -> int: ...
    def forget(self, descriptor: int, offset: int, length: int) -> None: ...
    def sync(self, descriptor: int) -> None: ...
    def close(self, descriptor: int) -> None: ...
    def link(self, source: str, target: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def same(self, one: str, other: str) -> bool: ...
    def unlink(self, path: str) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def is_folder(self, path: str) -> bool: ...
    def same_volume(self, one: str, other: str) -> bool: ...
    def names(self, path: str) -> list[str]: ...
    def sync_folder(self, path: str) -> None: ...


class Posix:
    """The real one."""

    def open_new(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def open_new_direct(self, path: str) -> int:
        """As `open_new`, past the page cache where the file system can: copying into it costs more than writing."""
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, FILE_MODE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        with contextlib.suppress(FileNotFoundError):  # some kernels have made the file before they refuse
            os.unlink(path)
        return self.open_new(path)

    def reserve(self, descriptor: int, size: int) -> None:
        """Take the space now, so that a full disk is found before anything is copied. Nothing where it cannot be told."""
        import ctypes  # here, because the checkpoint child needs none of it and an image may lack libffi

        libc = ctypes.CDLL(None, use_errno=True)
        # Not os.posix_fallocate: where the file system cannot, the C library writes into every block itself.
        if libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(number, os.strerror(number))

    def open_to_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Direct where file, memory and offset allow it; what is not aligned as the device wants goes through the cache."""
        try:
            return os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        # Another thread may have done it already. If it was not this, the second try says so.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def forget(self, descriptor: int, offset: int, length: int) -> None:
        """Have these bytes (0: all from `offset`) read from the medium next time. Not those that are not written out yet."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: str, target: str) -> None:
        """Give `source` the name `target` too, or instead; never replaces. Raises FileExistsError."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_no_replace(source, target)

    def rename(self, source: str, target: str) -> None:
        """Give `source` the name `target`, whatever had it."""
        os.replace(source, target)

    def same(self, one: str, other: str) -> bool:
        try:
            return os.path.samefile(one, other)
        except FileNotFoundError:
            return False

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, FOLDER_MODE)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def same_volume(self, one: str, other: str) -> bool:
        return os.stat(one).st_dev == os.stat(other).st_dev

    def names(self, path: str) -> list[str]:
        return os.listdir(path)

    def sync_folder(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Some network file systems know no sync of a folder: their names are durable at once, or never.
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(descriptor)


def _rename_no_replace(source: str, target: str) -> None:
    import ctypes  # here, because hardly any volume needs it and an image may lack libffi

    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, target)
