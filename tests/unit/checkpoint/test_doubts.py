"""FORMAT.md §3.7: a generation that doubts its own steps is followed by one that resumes before them."""

from __future__ import annotations

import pytest

from fakes.disk import Disk
from fakes.training import train
from stormjib_checkpoint import layout
from stormjib_checkpoint.doubts import doubt_above, doubt_of, write_doubt
from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.format import DoubtFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation, open_next
from stormjib_checkpoint.storage import Local


@pytest.fixture
def storage() -> Local:
    """Generation 1.1 has trained 30 steps and saved three of them."""
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    return storage


def doubt(storage: Local, trusted: int, step: int = 33, generation: str = "1.1") -> None:
    numbers = {"recorded": {"33": "00" * 16}}
    write_doubt(storage, DoubtFile(GenerationId.parse(generation), step, trusted, numbers))


def resumed(storage: Local, generation: str = "1.2") -> int | None:
    resume = open_generation(storage, generation, "uid").resume
    return resume.step if resume else None


@pytest.mark.parametrize(("trusted", "wanted"), [(33, 30), (30, 30), (29, 20), (10, 10), (9, 10), (0, 10)])
def test_the_newest_trusted_step_or_else_the_oldest(storage: Local, trusted: int, wanted: int) -> None:
    """§3.7"""
    doubt(storage, trusted)
    assert resumed(storage) == wanted


def test_a_trusted_step_that_is_refused_falls_back_to_an_older_one(storage: Local) -> None:
    doubt(storage, 25)
    twenty = open_generation(storage, "1.2", "uid").resume
    assert twenty is not None
    assert twenty.step == 20
    doubt(storage, 25, generation="1.2")
    ten = open_generation(storage, "1.3", "uid", refused=[twenty.digest]).resume
    assert ten is not None
    assert ten.step == 10


def test_only_the_parents_doubt_counts_when_a_step_is_chosen(storage: Local) -> None:
    doubt(storage, 15)
    assert resumed(storage) == 10
    forty = train(storage, "1.2", 10, 40)
    assert open_next(storage).resume == forty


def test_it_is_found_by_whoever_does_the_step_again_and_by_nobody_after(storage: Local) -> None:
    assert doubt_above(storage, 0) is None
    doubt(storage, 15)
    open_generation(storage, "1.2", "uid")
    open_generation(storage, "1.3", "uid")
    found = doubt_above(storage, 10)
    assert found is not None
    assert (found.generation, found.step) == (GenerationId(1, 1), 33)
    assert found.numbers == {"recorded": {"33": "00" * 16}}
    assert doubt_above(storage, 33) is None


def test_the_first_word_stands(storage: Local) -> None:
    doubt(storage, 15)
    doubt(storage, 30)
    first = doubt_of(storage, GenerationId(1, 1))
    assert first is not None
    assert first.trusted == 15


def test_one_that_cannot_be_read_is_told_and_ignored(storage: Local) -> None:
    """§3.7"""
    storage.create(layout.doubt_file(GenerationId(1, 1)), [b'{"format":"0.1","trusted":"x"}\n'])
    opening = open_generation(storage, "1.2", "uid")
    assert opening.resume is not None
    assert opening.resume.step == 30
    assert any("doubts/g1.1.json" in note for note in opening.notes)
    with pytest.raises(FormatError):
        doubt_above(storage, 0)
