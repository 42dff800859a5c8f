"""Storages without a server keep what every storage promises; and how the parts of an upload are made up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from fakes.storage_promises import StoragePromises, pattern
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import AlreadyThere, NotThere, StorageDenied, StorageError, StorageFull
from stormjib_checkpoint.format import PIECE_BYTES
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.stores import parts, refusals
from stormjib_checkpoint.stores.parts import MAX_PARTS, Parts, part_bytes
from stormjib_checkpoint.stores.refusals import Refusal
from stormjib_checkpoint.stores.store import Store
from stormjib_checkpoint.stores.urls import open_storage
from stormjib_checkpoint.stores.with_obstore import Obstore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stormjib_checkpoint.storage import Storage

TIB = 1 << 40


class TestLocal(StoragePromises):
    @pytest.fixture
    def open_place(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: open_storage(f"file://{tmp_path}/job")


class TestObstoreInMemory(StoragePromises):
    @pytest.fixture
    def open_place(self) -> Callable[[], Storage]:
        memory = MemoryStore()
        return lambda: Store("memory://", "team/job", lambda: Obstore(memory, "memory://", lends=False))


class Lossy(Obstore):
    """Each answer to a put that was carried out is lost, and the client has asked again."""

    def put(self, key: str, data: bytes, token: str) -> bool:
        super().put(key, data, token)
        return super().put(key, data, token)


def test_an_answer_lost_on_the_way_is_no_conflict() -> None:
    memory = MemoryStore()
    store = Store("memory://", "", lambda: Lossy(memory, "memory://", lends=False))
    store.create("a", [b"mine"])
    with pytest.raises(AlreadyThere):
        store.create("a", [b"mine"])
    with store.new("big", 4) as file:
        file.write(0, memoryview(b"mine"))
    assert store.names("") == ["a", "big"]
    assert memory.list().collect()[0]["path"] == "a"
    assert len(memory.list().collect()) == 2  # the claim is gone


class Mute(Obstore):
    """As `Lossy`, but the client does not ask again."""

    def put(self, key: str, data: bytes, token: str) -> bool:
        super().put(key, data, token)
        raise StorageError(key, "no answer in time", "")


def test_a_put_that_is_not_answered_counts_if_it_is_there() -> None:
    store = Store("memory://", "", lambda: mute)
    mute = Mute(MemoryStore(), "memory://", lends=False)
    store.create("a", [b"mine"])
    with pytest.raises(StorageError, match="no answer in time"):
        store.create("a", [b"mine"])
    assert store.read("a", 4) == b"mine"


class Silent(Obstore):
    """The upload ends, but its answer never comes: the store says an error instead."""

    done = True

    def send(self, key: str, parts: Any, length: int, token: str) -> None:
        if self.done:
            super().send(key, parts, length, token)
        else:
            list(parts)
        raise TimeoutError("no answer")


def test_an_upload_whose_end_is_not_answered_counts_if_it_is_there() -> None:
    memory, client = MemoryStore(), None
    client = Silent(memory, "memory://", lends=False)
    store = Store("memory://", "", lambda: client)
    with store.new("big", 4) as file:
        file.write(0, memoryview(b"mine"))
    assert store.read("big", 4) == b"mine"
    client.done = False
    with pytest.raises(StorageError, match="second: no answer"), store.new("second", 4) as file:
        file.write(0, memoryview(b"mine"))
    # The store may yet end it: until then nobody else gets the name.
    with pytest.raises(AlreadyThere, match="second"), store.new("second", 4):
        pass
    assert store.names("") == ["big"]


class Broken(Obstore):
    """A fault of the client itself, when all parts are there."""

    def send(self, key: str, parts: Any, length: int, token: str) -> None:
        list(parts)
        raise RuntimeError("no error of ours")


def test_a_fault_of_the_client_is_no_success() -> None:
    store = Store("memory://", "", lambda: Broken(MemoryStore(), "memory://", lends=False))
    with pytest.raises(RuntimeError, match="no error of ours"), store.new("big", 4) as file:
        file.write(0, memoryview(b"mine"))
    assert store.names("") == []


def test_a_file_with_a_hole_is_never_there() -> None:
    store = Store("memory://", "", lambda: Obstore(MemoryStore(), "memory://", lends=False))
    with pytest.raises(StorageError, match="fewer than its 10 bytes"), store.new("big", 10) as file:
        file.write(0, memoryview(b"123456789"))
    assert store.names("") == []


@given(st.integers(0, 200), st.integers(1, 40), st.randoms(), st.integers(1, 23))
def test_parts_are_whole_each_once_and_in_place(size: int, length: int, random: Any, piece: int) -> None:
    made, data = Parts(size, length), memoryview(pattern(size + 10))
    cuts = [(at, data[at : at + piece]) for at in range(0, size, piece)]
    random.shuffle(cuts)
    found = {}
    for at, cut in cuts:
        assert not made.whole
        for part in made.put(at, cut):
            assert part.number not in found
            found[part.number] = bytes(part.source[part.start : part.end])
    assert made.whole
    assert b"".join(found[number] for number in range(made.count)) == data[:size]


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 140 * 1024**3, 5 * TIB])
def test_there_are_never_too_many_parts(size: int) -> None:
    length = part_bytes(size)
    assert length % PIECE_BYTES == 0
    assert -(-size // length) <= MAX_PARTS
    assert length == PIECE_BYTES or -(-size // (length - PIECE_BYTES)) > MAX_PARTS


def test_parts_of_several_pieces_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PARTS", 3)
    monkeypatch.setattr(parts, "PIECE_BYTES", 1000)
    memory, data = MemoryStore(), memoryview(pattern(8500))
    store = Store("memory://", "", lambda: Obstore(memory, "memory://", lends=False))
    assert part_bytes(8500) == 3000
    with store.new("big", 8500) as file:
        for start in range(0, 8500, 1000):
            file.write(start, data[start : start + 1000])
    assert store.read("big", 8500) == data


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refusal("NoSuchKey", 404), NotThere),
        (Refusal("", 404), NotThere),
        (Refusal("NoSuchBucket", 404), StorageError),
        (Refusal("XAdminUserNotFound", 404), StorageDenied),
        (Refusal("AccessDenied", 403), StorageDenied),
        (Refusal("ExpiredToken", 400), StorageDenied),
        (Refusal("", 401), StorageDenied),
        (Refusal("SlowDown", 503), StorageError),
        (Refusal("QuotaExceeded", 403), StorageFull),
        (Refusal("", 507), StorageFull),
        (Refusal(text="no connection"), StorageError),
    ],
)
def test_each_refusal_is_the_error_that_it_is(refusal: Refusal, kind: type[StorageError]) -> None:
    error = refusals.error("s3://b/k", refusal)
    assert type(error) is kind
    assert str(error).startswith("s3://b/k: ")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", r"ftp://host/x: no checkpoints can be kept there\. Name a folder, or a URL"),
        (
            "s3://key:hunter2@bucket/x",
            "s3://...: a checkpoint URL holds a bucket and a prefix, no credentials",
        ),
        (
            "s3://bucket/x?X-Amz-Signature=hunter2",
            "s3://...: a checkpoint URL holds a bucket and a prefix, no credentials",
        ),
        (
            "s3://key:to/hunter2@bucket/x",
            "s3://...: a checkpoint URL holds a bucket and a prefix, no credentials",
        ),
        ("s3:///x", "no bucket"),
        ("s3://bucket/a//b", "an empty name"),
        ("s3://bucket/../b", "an empty name"),
    ],
)
def test_an_odd_url_is_refused_and_shows_no_secret(url: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught:
        Engine(url)
    assert "hunter2" not in str(caught.value)


def test_plain_paths_stay_folders(tmp_path: Path) -> None:
    for root in (str(tmp_path / "a"), tmp_path / "a", f"file://{tmp_path}/a"):
        storage = open_storage(root)
        assert isinstance(storage, Local)
        assert storage.root == str(tmp_path / "a")


@pytest.mark.parametrize(("url", "package"), [("s3://b/x", "obstore"), ("fsspec+s3://b/x", "s3fs")])
def test_without_its_client_a_url_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.store", None)
    with pytest.raises(StorageError, match=rf"{package}.*pip install 'stormjib\[s3\]'"):
        open_storage(url)


def test_a_client_is_imported_for_its_urls_only(tmp_path: Path) -> None:
    """A rank that keeps its checkpoints in a folder pays for none; nor does the agent's child."""
    code = (
        "import sys; from stormjib_checkpoint.stores.urls import open_storage; import stormjib_checkpoint.child\n"
        f"open_storage({str(tmp_path)!r})\n"
        "print([m for m in ('obstore', 's3fs', 'fsspec', 'botocore', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_after_a_fork_the_client_is_refused_and_does_not_hang() -> None:
    code = (
        "import os, sys\n"
        "from obstore.store import MemoryStore\n"
        "from stormjib_checkpoint.errors import StorageError\n"
        "from stormjib_checkpoint.stores.store import Store\n"
        "from stormjib_checkpoint.stores.with_obstore import Obstore\n"
        "make = lambda: Store('memory://', '', lambda: Obstore(MemoryStore(), 'memory://', lends=False))\n"
        "early, used = make(), make()\n"
        "if os.fork() == 0:\n"
        "    early.create('a', [b'']); os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
        "used.create('a', [b''])\n"
        "if os.fork() == 0:\n"
        "    try: early.create('a', [b''])\n"
        "    except StorageError as error: print(error, flush=True); os._exit(8)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 8\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
    )
    assert "used a store, and forked this one. Fork before a store is first used" in done.stdout


def test_a_store_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from stormjib_checkpoint.stores import urls

    never, before = threading.Event(), os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(urls, "PROBE_S", 0.1)
    monkeypatch.setattr(Store, "probe", lambda _: never.wait())
    with pytest.raises(StorageError, match="s3://bucket/x: no answer in"):
        open_storage("s3://bucket/x")
    never.set()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before  # only the thread's, not ours
