"""The text: split by file, cut into windows that do not overlap, named by a digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from stormjib_trainer import data
from stormjib_trainer.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, count: int) -> None:
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"<{i}>" + "x" * 40)


def test_every_20th_file_is_for_validation_and_for_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 45)
    text = data.load(str(tmp_path), context=8)
    train, validation = bytes(text.train.tolist()), bytes(text.validation.tolist())
    assert {i for i in range(45) if b"<%d>" % i in validation} == {19, 39}
    assert {i for i in range(45) if b"<%d>" % i in train} == set(range(45)) - {19, 39}


def test_one_file_is_cut_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(1, 201)))
    text = data.load(str(file), context=4)
    assert text.train.tolist() == list(range(1, 192))
    assert text.validation.tolist() == [*range(192, 201), 0]


def test_windows_tile_the_text_and_hold_the_byte_that_follows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 251)))
    text = data.load(str(tmp_path), context=10)
    windows = text.batch(range(text.samples))
    assert windows.dtype == torch.int64
    assert windows.shape == (23, 11)
    assert windows[:, :10].flatten().tolist() == list(range(1, 231))
    assert torch.equal(windows[:-1, 10], windows[1:, 0])


def test_a_second_epoch_takes_the_same_windows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 251)))
    text = data.load(str(tmp_path), context=10)
    assert torch.equal(text.batch([3 + text.samples]), text.batch([3]))
    assert text.batch([]).shape == (0, 11)


def test_the_digest_tells_texts_apart(tmp_path: Path) -> None:
    write(tmp_path, 3)
    one = data.load(str(tmp_path), context=4).sha256
    assert data.load(str(tmp_path), context=4).sha256 == one
    (tmp_path / "001.txt").write_text("y" * 43)
    assert data.load(str(tmp_path), context=4).sha256 != one


def test_the_standard_library_is_there_and_long_enough() -> None:
    text = data.load("stdlib", context=64)
    assert text.samples > 50_000
    assert text.validation_samples > 2_000
    assert b"import " in bytes(text.train[:100_000].tolist())


def test_validation_windows_are_spread_evenly(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"a" * 1900 + bytes(range(1, 101)))
    text = data.load(str(tmp_path), context=9)
    windows = text.validation_batch(range(5), of=5)
    assert windows[:, 0].tolist() == [2, 20, 38, 56, 74]


def test_too_little_text_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        data.load(str(tmp_path / "nothing"), context=4)
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(DataError, match=r"model\.context = 64"):
        data.load(str(tmp_path), context=64)
