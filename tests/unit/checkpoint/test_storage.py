"""FORMAT.md §1 on real file systems: create-only, modes, and errors that name path and fix."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from fakes.disk import Disk
from fakes.storage_promises import pattern
from fakes.training import loads, save, train
from stormjib_checkpoint.errors import (
    AlreadyThere,
    NotThere,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageReadOnly,
)
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.history import newest
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "stormjib-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def everything(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_files_are_complete_private_and_leave_nothing_temporary(tmp_path: Path) -> None:
    """§1.1, §1.2, §1.3"""
    storage = Local(tmp_path / "team" / "job")
    before = os.umask(0o022)
    try:
        storage.create("a/b/c.json", [b"one", memoryview(b"two"), b""])
    finally:
        os.umask(before)
    assert storage.read("a/b/c.json", 10) == b"onetwo"
    assert storage.names("a") == ["b"]
    assert storage.names("a/b") == ["c.json"]
    assert storage.names("x") == []
    assert everything(tmp_path) == [tmp_path / "team/job/a/b/c.json"]
    assert stat.S_IMODE((tmp_path / "team/job/a/b/c.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "team/job/a/b").stat().st_mode) == 0o750


def test_a_name_is_given_once(tmp_path: Path) -> None:
    """§1.1"""
    storage = Local(tmp_path)
    storage.create("a.json", [b"first"])
    with pytest.raises(AlreadyThere, match=r"a\.json: the name is taken"):
        storage.create("a.json", [b"second"])
    assert storage.read("a.json", 10) == b"first"
    assert everything(tmp_path) == [tmp_path / "a.json"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_name_is_given_once_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    refused = []

    def no_links(source: str, target: str) -> None:
        refused.append(target)
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", no_links)
    test_a_name_is_given_once(tmp_path)
    assert len(refused) == 2


def test_an_answer_lost_on_the_way_is_no_conflict() -> None:
    class Repeating(Disk):
        """NFS: the server did it, the answer was lost, the repeated request finds the name taken."""

        def link(self, source: str, target: str) -> None:
            super().link(source, target)
            raise FileExistsError(errno.EEXIST, "exists", target)

    storage = Local("/job", Repeating())
    storage.create("a.json", [b"mine"])
    assert storage.read("a.json", 10) == b"mine"
    with pytest.raises(AlreadyThere):
        storage.create("a.json", [b"other"])


def fill(storage: Local) -> None:
    for step in range(20, 500, 10):
        train(storage, "1.1", step - 10, step)


@as_root
def test_a_full_volume_says_so_and_the_newest_step_stays(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=200k"):
        storage = Local(tmp_path / "small" / "job")
        open_generation(storage, "1.1", "uid")
        first = train(storage, "1.1", 0, 10)
        with pytest.raises(StorageFull, match=r"small/job/.*No space left.*Free space") as caught:
            fill(storage)
        assert caught.value.path.startswith(str(tmp_path))
        point = newest(storage)
        assert point is not None
        assert point >= first
        loads(storage, point)
        assert not [path for path in everything(tmp_path) if path.name.startswith(".")]


def test_a_file_size_limit_is_told_as_a_full_volume(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageFull, match="File too large"):
            save(storage, "1.1", 0, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loads(storage, train(storage, "1.1", 0, 10))


@as_root
def test_a_read_only_volume_says_so_and_can_still_be_read(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "volume", "size=1m"):
        storage = Local(tmp_path / "volume" / "job")
        open_generation(storage, "1.1", "uid")
        point = train(storage, "1.1", 0, 10)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "volume")], check=True)
        with pytest.raises(StorageReadOnly, match="Mount the volume read-write"):
            open_generation(storage, "1.2", "uid")
        loads(storage, point)


def test_denied_names_path_and_uid(tmp_path: Path) -> None:
    class Foreign(Posix):
        def mkdir(self, path: str) -> None:
            raise PermissionError(errno.EACCES, "denied", path)

    with pytest.raises(StorageDenied, match=rf"generations.*Permission denied.*uid {os.getuid()}"):
        open_generation(Local(tmp_path, Foreign()), "1.1", "uid")


def test_other_refusals_are_errors_of_ours_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        Local(tmp_path / "file").create("a.json", [b""])
    with pytest.raises(NotThere, match="never written"):
        Local(tmp_path).read("nothing", 10)
    Local(tmp_path).create("long", [b"x" * 11])
    with pytest.raises(StorageError, match="11 bytes; at most 10"):
        Local(tmp_path).read("long", 10)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\0b"])
def test_no_path_leads_out_of_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="no path below a root"):
        Local(tmp_path).read(path, 10)


def test_a_folder_is_removed_with_unfinished_writes_but_never_with_anything_else(tmp_path: Path) -> None:
    """§1.2"""
    storage = Local(tmp_path)
    storage.create("a/keep", [b""])
    (tmp_path / "a" / ".x.123").write_text("torn")
    storage.remove_folder("a")
    assert storage.names("a") == ["keep"]
    storage.remove("a", ["keep", "gone already"])
    storage.remove_folder("a")
    storage.remove_folder("a")
    assert not (tmp_path / "a").exists()


def test_what_is_not_aligned_goes_through_the_cache_also_from_many_threads(tmp_path: Path) -> None:
    """Direct I/O refuses it; of two threads that are refused, one only takes the flag away."""
    storage = Local(tmp_path)
    data = bytes(range(256)) * 4000
    with storage.new("a/b", len(data)) as file, ThreadPoolExecutor(8) as pool:
        parts = [(start, memoryview(data)[start : start + 999]) for start in range(0, len(data), 999)]
        list(pool.map(lambda part: file.write(*part), parts))
    assert storage.read("a/b", len(data)) == data


def test_a_file_read_past_the_cache_is_read_from_the_medium_and_leaves_the_cache_alone(
    tmp_path: Path,
) -> None:
    storage, size = Local(tmp_path), 4 * 1024 * 1024
    storage.create("folder/file", [pattern(size)])
    assert storage.read("folder/file", size) == pattern(size)
    if not cached(tmp_path / "folder" / "file"):
        pytest.skip("this file system has no page cache that could be asked")
    buffer = bytearray(size)
    with storage.past_cache().open("folder/file") as file:
        assert not cached(tmp_path / "folder" / "file")
        assert file.read_into(0, memoryview(buffer)) == size
    assert bytes(buffer) == pattern(size)
    assert not cached(tmp_path / "folder" / "file")
    assert storage.past_cache().read("folder/file", size) == pattern(size)


def cached(path: Path) -> bool:
    """Whether the first page can be had without asking the medium."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            return False
