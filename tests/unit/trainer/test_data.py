"""The text: split by file, cut into windows that do not overlap, named by a digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from stormjib_checkpoint.order import Source
from stormjib_trainer import data
from stormjib_trainer.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def load(path: Path | str, context: int) -> data.Corpus:
    """One source alone."""
    return data.load({"text": str(path)}, context)


def text_of(path: Path | str, context: int) -> data.Text:
    return load(path, context).texts["text"]


def places(*indices: int, source: int = 0) -> list[tuple[int, int]]:
    return [(source, index) for index in indices]


def write(folder: Path, count: int) -> None:
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"<{i}>" + "x" * 40)


def test_every_20th_file_is_for_validation_and_for_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 45)
    text = text_of(tmp_path, 8)
    train, validation = bytes(text.train.tolist()), bytes(text.validation.tolist())
    assert {i for i in range(45) if b"<%d>" % i in validation} == {19, 39}
    assert {i for i in range(45) if b"<%d>" % i in train} == set(range(45)) - {19, 39}


def test_one_file_is_cut_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(1, 201)))
    text = text_of(file, 4)
    assert text.train.tolist() == list(range(1, 192))
    assert text.validation.tolist() == [*range(192, 201), 0]


def test_windows_tile_the_text_and_hold_the_byte_that_follows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 251)))
    text = load(tmp_path, 10)
    windows = text.batch(places(*range(text.texts["text"].samples)))
    assert windows.dtype == torch.int64
    assert windows.shape == (23, 11)
    assert windows[:, :10].flatten().tolist() == list(range(1, 231))
    assert torch.equal(windows[:-1, 10], windows[1:, 0])


def test_no_places_are_no_windows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 251)))
    assert load(tmp_path, 10).batch([]).shape == (0, 11)


def test_the_digest_tells_texts_apart(tmp_path: Path) -> None:
    write(tmp_path, 3)
    one = load(tmp_path, 4).sha256
    assert load(tmp_path, 4).sha256 == one
    (tmp_path / "001.txt").write_text("y" * 43)
    assert load(tmp_path, 4).sha256 != one


def test_the_standard_library_is_there_and_long_enough() -> None:
    text = text_of("stdlib", 64)
    assert text.samples > 50_000
    assert text.validation_samples > 2_000
    assert b"import " in bytes(text.train[:100_000].tolist())


def test_validation_windows_are_spread_evenly(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"a" * 1900 + bytes(range(1, 101)))
    text = load(tmp_path, 9)
    windows = text.validation_batch(range(5), of=5)
    assert windows[:, 0].tolist() == [2, 20, 38, 56, 74]


def test_too_little_text_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.text\.path = .*nothing: no such file or folder"):
        load(tmp_path / "nothing", 4)
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(DataError, match=r"model\.context = 64"):
        load(tmp_path, 64)


def test_sources_are_read_apart_in_the_order_of_their_names(tmp_path: Path) -> None:
    paths = {}
    for name, letter in (("b", b"b"), ("a", b"a")):
        paths[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(letter * 400)
    corpus = data.load(paths, 10)
    assert corpus.sources({"a": 7, "b": 3}) == (Source("a", 38, 7), Source("b", 38, 3))
    windows = corpus.batch([(1, 0), (0, 36), (1, 36)])
    assert [bytes(row.tolist()) for row in windows[:, :10]] == [b"b" * 10, b"a" * 10, b"b" * 10]
    assert corpus.validation_samples == 2
    assert bytes(corpus.validation_batch(range(2), of=2)[:, 0].tolist()) == b"ab"
    assert corpus.fingerprints().keys() == {"a", "b"}
    assert data.load({"a": paths["b"], "b": paths["a"]}, 10).sha256 != corpus.sha256


@pytest.mark.parametrize("inside", [False, True])
def test_a_stream_is_refused_unread(tmp_path: Path, inside: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        DataError, match=r"pipe is no regular file\. A stream can only be read from its start"
    ):
        load(tmp_path if inside else tmp_path / "pipe", 4)
