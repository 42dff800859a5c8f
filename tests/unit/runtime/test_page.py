"""The page: its layout is a contract between processes of different versions, so it is written out here."""

from __future__ import annotations

import math
import struct
import time
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime import rank
from stormjib_runtime.page import Page, PageError
from stormjib_runtime.wire import Env, GenerationId, RankPhase

if TYPE_CHECKING:
    from pathlib import Path

GENERATION = GenerationId(2, 7)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page.create(tmp_path / "0", GENERATION)


def slots(path: Path) -> list[int]:
    return list(struct.unpack("<512q", path.read_bytes()))


def test_layout_of_a_fresh_page(page: Page) -> None:
    data = page.path.read_bytes()
    assert len(data) == 4096
    assert data[:8] == b"STJBPAGE"
    assert slots(page.path)[1:8] == [1, 2, 7, -1, 0, 0, -1]
    assert math.isnan(struct.unpack_from("<d", data, 64)[0])
    assert not any(slots(page.path)[9:])


def test_each_value_has_its_slot(page: Page) -> None:
    before = time.monotonic_ns()
    page.step, page.phase, page.saved, page.loss = 41, RankPhase.DATA, 40, 2.5
    page.listens = page.owns_clock = True
    page.save_at, page.stop_after = 50, 60
    found = slots(page.path)
    assert [found[i] for i in (4, 5, 7, 9, 10, 32, 33)] == [41, 3, 40, 1, 1, 50, 60]
    assert struct.unpack("<d", struct.pack("<q", found[8])) == (2.5,)
    assert before <= found[11] <= found[6] <= time.monotonic_ns()


def test_a_phase_is_a_sign_of_life_but_no_step(page: Page) -> None:
    page.step = 1
    step_ns = page.read().step_ns
    page.phase = RankPhase.EVALUATION
    assert page.read().step_ns == step_ns < page.read().written_ns


def test_two_processes_see_each_other(page: Page) -> None:
    other = Page.open(page.path)
    other.step, page.stop_after = 3, 5
    assert (page.step, other.stop_after, other.generation) == (3, 5, GENERATION)
    assert page.read().step == 3
    other.close()


def test_a_fresh_page_says_nothing(page: Page) -> None:
    said = page.read()
    assert (said.step, said.saved, said.loss, said.listens) == (-1, -1, None, False)
    assert (said.phase, said.written_ns) == (RankPhase.UNKNOWN, 0)


def test_what_a_rank_writes_is_never_trusted(page: Page) -> None:
    page._slots[5] = 10**12
    page.loss = math.inf
    assert (page.phase, page.loss) == (RankPhase.UNKNOWN, None)


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"STJBPAGE" + b"\2" + b"\0" * 4087])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0").write_bytes(content)
    with pytest.raises(PageError, match="is no page"):
        Page.open(tmp_path / "0")


def test_a_page_is_never_made_twice(page: Page) -> None:
    with pytest.raises(FileExistsError):
        Page.create(page.path, GENERATION)


def test_a_rank_finds_its_page_by_its_environment(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Page.from_env({}) is None
    assert Page.from_env({Env.PAGE_DIR: str(page.path.parent)}) is None
    monkeypatch.setenv(Env.PAGE_DIR, str(page.path.parent))
    monkeypatch.setenv("LOCAL_RANK", "0")
    rank.page.cache_clear()
    found = rank.page()
    assert found is not None
    assert found.generation == GENERATION
    rank.page.cache_clear()
