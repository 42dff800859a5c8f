"""What every storage promises, as tests: a class that inherits them gives `open_place`, and with it each storage has its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from fakes.training import loads, save, train
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import AlreadySaved, AlreadyThere, NotThere, StorageError
from stormjib_checkpoint.history import committed, newest
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.retention import retain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stormjib_checkpoint.storage import Storage

MIB = 1024 * 1024
RACES = 12
SOON_S = 30.0


def pattern(size: int) -> bytes:
    """Bytes of which no two stretches are the same."""
    words = torch.arange(-(-size // 4), dtype=torch.int32)
    return bytes(words.numpy().tobytes()[:size])


def pieces(size: int, length: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of `length`."""
    return [(start, min(start + length, size)) for start in range(0, size, length)]


def everywhere(storage: Storage, folder: str = "") -> Iterator[str]:
    """Every path that a listing shows."""
    for name in storage.names(folder):
        path = f"{folder}/{name}" if folder else name
        yield path
        yield from everywhere(storage, path)


class Stop(Exception):
    pass


class StoragePromises:
    """`size`: of a large file. It has several parts on a store, the last one short."""

    size = 33 * MIB + 999

    @pytest.fixture
    def open_place(self) -> Callable[[], Storage]:
        """Storages on one and the same empty place."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, open_place: Callable[[], Storage]) -> Storage:
        return open_place()

    @pytest.fixture
    def both(self, open_place: Callable[[], Storage]) -> tuple[Storage, Storage]:
        """Two that race for a name."""
        return open_place(), open_place()

    def test_a_hint_is_written_over_and_all_else_of_its_folder_stays(self, storage: Storage) -> None:
        storage.create("a/b", [b"b"])
        for data in (b"one", b"a longer one", b""):
            storage.replace("a/hint", data)
            assert storage.read("a/hint", 20) == data
        assert storage.names("a") == ["b", "hint"]
        assert storage.read("a/b", 1) == b"b"

    def test_what_is_read_past_the_cache_is_the_same(self, storage: Storage) -> None:
        storage.create("a/b", [pattern(5000)])
        fresh = storage.past_cache()
        assert fresh.read("a/b", 5000) == pattern(5000)
        with fresh.open("a/b") as file:
            buffer = bytearray(3000)
            assert (file.size, file.read_into(3000, memoryview(buffer))) == (5000, 2000)
            assert bytes(buffer[:2000]) == pattern(5000)[3000:]
        with pytest.raises(NotThere):
            fresh.read("a/c", 1)

    def test_a_small_file_is_read_back_and_listed(self, storage: Storage) -> None:
        storage.create("a/b/c.json", [b"one", memoryview(b"two"), b""])
        storage.create("a/empty", [])
        assert storage.read("a/b/c.json", 6) == b"onetwo"
        assert storage.read("a/empty", 6) == b""
        assert (storage.names(""), storage.names("a"), storage.names("a/b")) == (
            ["a"],
            ["b", "empty"],
            ["c.json"],
        )
        assert storage.names("x") == []
        with pytest.raises(StorageError, match="6 bytes; at most 5"):
            storage.read("a/b/c.json", 5)

    def test_a_folder_is_no_prefix_of_a_name(self, storage: Storage) -> None:
        storage.create("step-1/a", [b""])
        storage.create("step-10/b", [b""])
        assert storage.names("step-1") == ["a"]

    def test_a_long_listing_is_whole(self, storage: Storage) -> None:
        wanted = [f"rank-{rank:05d}.json" for rank in range(40)]
        for name in wanted:
            storage.create(f"step/{name}", [b"{}"])
        assert storage.names("step") == wanted

    def test_what_is_not_there_is_told(self, storage: Storage) -> None:
        with pytest.raises(NotThere, match="nothing"):
            storage.read("nothing", 10)
        with pytest.raises(NotThere, match="a/nothing"), storage.open("a/nothing"):
            pass

    def test_no_path_leads_out_of_the_root(self, storage: Storage) -> None:
        for path in ("", "/etc/passwd", "../x", "a/../b", "a//b", "a\0b"):
            with pytest.raises(ValueError, match="no path below a root"):
                storage.create(path, [b""])
            with pytest.raises(ValueError, match="no path below a root"):
                storage.read(path, 10)

    def test_a_name_is_given_once(self, storage: Storage, open_place: Callable[[], Storage]) -> None:
        storage.create("a.json", [b"first"])
        for other in (storage, open_place()):
            with pytest.raises(AlreadyThere, match=r"a\.json: the name is taken"):
                other.create("a.json", [b"second"])
            with pytest.raises(AlreadyThere), other.new("a.json", 3) as file:
                file.write(0, memoryview(b"new"))
        assert storage.read("a.json", 10) == b"first"

    def test_of_two_writers_one_gets_the_name(self, both: tuple[Storage, Storage]) -> None:
        def one(who: int, name: str, together: threading.Barrier) -> bool:
            together.wait(SOON_S)
            try:
                both[who].create(name, [b"same bytes, or one would not know"])
            except AlreadyThere:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            for number in range(RACES):
                barrier = threading.Barrier(2)
                won = list(pool.map(one, (0, 1), [f"race-{number}"] * 2, [barrier] * 2))
                assert sum(won) == 1

    def test_of_two_writers_of_a_large_file_one_gets_the_name(self, both: tuple[Storage, Storage]) -> None:
        def one(who: int, name: str, together: threading.Barrier) -> bool:
            together.wait(SOON_S)
            try:
                with both[who].new(name, 5000) as file:
                    file.write(0, memoryview(bytes([who]) * 5000))
            except AlreadyThere:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            for number in range(RACES):
                barrier = threading.Barrier(2)
                won = list(pool.map(one, (0, 1), [f"race-{number}"] * 2, [barrier] * 2))
                assert sum(won) == 1
                assert both[0].read(f"race-{number}", 5000) == bytes([won.index(True)]) * 5000

    def test_a_large_file_is_whole_and_is_read_in_any_range(self, storage: Storage) -> None:
        """Whole pieces from a few threads, as the engine has them; the last one longer than the file."""
        data = pattern(self.size + 4096)
        with storage.new("a/big", self.size) as file, ThreadPoolExecutor(storage.writers) as pool:
            cuts = pieces(len(data), 16 * MIB)
            list(pool.map(lambda cut: file.write(cut[0], memoryview(data)[slice(*cut)]), cuts))
        assert storage.names("a") == ["big"]
        with storage.open("a/big") as opened:
            assert opened.size == self.size
            for start, length in (
                (0, 1),
                (16 * MIB - 1, 3),
                (self.size - 5, 50),
                (self.size, 9),
                (7, self.size),
            ):
                buffer = bytearray(length)
                count = opened.read_into(start, memoryview(buffer))
                assert buffer[:count] == data[start : min(start + length, self.size)]

    def test_pieces_may_come_in_any_order_and_of_any_length(self, storage: Storage) -> None:
        data = memoryview(pattern(self.size))
        with storage.new("back", self.size) as file:
            for start, end in reversed(pieces(self.size, 16 * MIB)):
                file.write(start, data[start:end])
        assert storage.read("back", self.size) == data
        with storage.new("odd", self.size) as file, ThreadPoolExecutor(8) as pool:
            cuts = pieces(self.size, 999_999)
            list(pool.map(lambda cut: file.write(cut[0], data[slice(*cut)]), cuts))
        assert storage.read("odd", self.size) == data

    def test_the_memory_is_free_when_a_write_returns(self, storage: Storage) -> None:
        data = bytearray(pattern(16 * MIB))
        wanted = bytes(data) * 2
        with storage.new("twice", len(wanted)) as file:
            for start in (0, len(data)):
                file.write(start, memoryview(data))
                kept, data = data, bytearray(data)
                kept[:] = bytes(len(kept))
        assert storage.read("twice", len(wanted)) == wanted

    @pytest.mark.parametrize("written", [0, 1, 3], ids=["nothing", "a part", "everything"])
    def test_where_the_block_raises_nothing_is_there(self, storage: Storage, written: int) -> None:
        data = memoryview(pattern(self.size))

        def torn() -> None:
            with storage.new("a/big", self.size) as file:
                for start, end in pieces(self.size, 16 * MIB)[:written]:
                    file.write(start, data[start:end])
                assert list(everywhere(storage)) in ([], ["a"])
                raise Stop

        with pytest.raises(Stop):
            torn()
        assert storage.names("a") == []
        with storage.new("a/big", 3) as file:  # and the name is free
            file.write(0, memoryview(b"new"))
        assert storage.read("a/big", 3) == b"new"

    def test_what_is_deleted_is_gone(self, storage: Storage) -> None:
        for name in ("one", "two", "keep"):
            storage.create(f"a/{name}", [b""])
        storage.remove("a", ["one", "two", "gone already"])
        storage.remove("a", ["one", "two"])
        storage.remove("b", ["nothing"])
        assert storage.names("a") == ["keep"]

    def test_a_folder_goes_with_what_unfinished_writes_left_and_never_with_anything_else(
        self, storage: Storage
    ) -> None:
        storage.create("a/keep", [b""])
        storage.create("a/.left.by.a.dead.writer", [b""])
        assert storage.names("a") == ["keep"]
        storage.remove_folder("a")
        assert storage.names("a") == ["keep"]
        with pytest.raises(NotThere):
            storage.read("a/.left.by.a.dead.writer", 10)
        storage.remove("a", ["keep"])
        storage.remove_folder("a")
        storage.remove_folder("a")
        assert list(everywhere(storage)) == []

    def test_steps_are_committed_kept_and_deleted(
        self, storage: Storage, open_place: Callable[[], Storage]
    ) -> None:
        open_generation(storage, "1.1", "uid")
        points = [train(storage, "1.1", step - 10, step) for step in (10, 20, 30, 40)]
        assert retain(storage, "1.1", 2) == ["step-00000010/g1.1", "step-00000020/g1.1"]
        assert storage.names("step-00000010") == []
        other = open_place()
        assert committed(other) == points[:1:-1]
        with pytest.raises(AlreadySaved):
            save(storage, "1.1", 30, 40)
        assert open_generation(other, "1.2", "uid").resume == points[-1]
        loads(other, points[-1])

    def test_an_engine_saves_and_loads_bit_for_bit(self, open_place: Callable[[], Storage]) -> None:
        table = torch.arange(self.size // 4, dtype=torch.int32)
        engine = Engine(open_place())
        for step in (1, 2):
            table += step
            engine.async_save({"table": table, "note": "x"}, step=step, train={"step": step})
            engine.guard()
        engine.wait()
        engine.close()
        found: dict[str, torch.Tensor | str] = {"table": torch.zeros_like(table), "note": ""}
        again = Engine(open_place())
        assert again.load(found) == {"step": 2}
        again.close()
        assert isinstance(found["table"], torch.Tensor)
        assert torch.equal(found["table"], table)
        assert found["note"] == "x"
        point = newest(open_place())
        assert point is not None
        assert point.step == 2
