"""What a rank reads from its environment and page, how it cuts its share, and how it refuses a bad command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stormjib_checkpoint.order import Micro
from stormjib_health.integrity.judge import Policy
from stormjib_health.verdict import OnRecurrence, OnSpike
from stormjib_runtime.page import Page
from stormjib_runtime.wire import Env, GenerationId, RankPhase, ResumePoint
from stormjib_trainer import environment
from stormjib_trainer.__main__ import EXIT_USAGE, main
from stormjib_trainer.control import Control
from stormjib_trainer.errors import ConfigError
from stormjib_trainer.step import Share

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page.create(tmp_path / "0", GenerationId(1, 1))
    yield page
    page.close()


def test_without_a_launcher_it_is_a_job_of_one_rank() -> None:
    assert environment.read({}) == environment.Environment()


def test_under_an_agent_the_generation_is_given() -> None:
    env = environment.read(
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "10.0.0.1",
            "TORCHELASTIC_RESTART_COUNT": "6",
            Env.GENERATION: "2.7",
            Env.PAGE_DIR: "/dev/shm/pages",
            Env.RESUME: '{"step":120,"generation":{"incarnation":2,"number":6},"digest":"ab"}',
            Env.CHECKPOINT_ROOT: "/stormjib/storage/here/job",
            Env.CHECKPOINT_INTERVAL: "20",
            Env.REPLICATE: "2",
        }
    )
    assert (env.rank, env.world, env.local_rank, env.launched) == (3, 4, 1, True)
    assert env.generation == GenerationId(2, 7)
    assert env.resume == ResumePoint(120, GenerationId(2, 6), "ab")
    assert (env.checkpoint_interval, env.replicate) == (20, 2)


def test_what_is_wanted_against_corruption_is_read_or_named() -> None:
    assert environment.read({}).integrity == Policy()
    wanted = Policy(False, False, OnSpike.REPLAY, OnRecurrence.SKIP)
    env: dict[str, str] = {
        Env.INTEGRITY_NORMS: "Off",
        Env.INTEGRITY_DIGESTS: "Off",
        Env.INTEGRITY_ON_SPIKE: "Replay",
        Env.INTEGRITY_ON_RECURRENCE: "Skip",
    }
    assert environment.read(env).integrity == wanted
    for name in env:
        with pytest.raises(ConfigError, match=f"{name} = 'on'; wanted one of"):
            environment.read({name: "on"})


def test_a_stop_is_asked_for_once_its_step_is_reached(page: Page) -> None:
    control = Control(page)
    assert not control.stop(10)
    page.stop_after = 12
    assert [control.stop(step) for step in (11, 12, 13)] == [False, True, True]


def test_a_save_is_asked_for_until_it_has_begun(page: Page) -> None:
    control = Control(page)
    assert not control.save(10)
    page.save_at = 12
    assert [control.save(step) for step in (11, 12, 13)] == [False, True, True]
    control.saving(13)
    assert not control.save(14)
    assert page.saved < 13, "it is on its way"
    for durable in (13, 12):
        control.saved(durable)
        assert page.saved == 13, "the newest, in whatever order they are told"


def test_the_page_says_what_the_rank_does(page: Page) -> None:
    control = Control(page)
    control.phase(RankPhase.STEP)
    control.finished(4, 2.5)
    assert (page.phase, page.step, page.loss) == (RankPhase.STEP, 4, 2.5)


def test_without_a_page_nothing_is_asked_and_nothing_said() -> None:
    control = Control(None)
    control.phase(RankPhase.STEP)
    control.finished(1, 2.0)
    control.saved(1)
    assert not control.stop(1)
    assert not control.save(1)


@given(total=st.integers(1, 60), world=st.integers(1, 20), most=st.integers(1, 20), size=st.integers(1, 3))
def test_ranks_make_equally_many_passes_and_lose_no_window(
    total: int, world: int, most: int, size: int
) -> None:
    lmb = Micro(size, total)
    windows = torch.arange(lmb.batch).unsqueeze(1)
    fed: dict[int, list[int]] = {}
    counts = set()
    for rank in range(world):
        share = Share(lmb, rank, world)
        own = torch.cat([windows[:0], *(windows[n * size : (n + 1) * size] for n in share.numbers)])
        assert len(own) == share.sequences
        passes = [*share.passes(own, most)]
        counts.add(len(passes))
        for one in passes:
            assert len(one.numbers) <= most
            assert one.weight == bool(one.numbers)
            assert len(one.windows) == max(1, len(one.numbers) * size)
            rows = one.windows.flatten().tolist()
            fed |= {n: rows[i * size : (i + 1) * size] for i, n in enumerate(one.numbers)}
    assert len(counts) == 1
    assert fed == {n: windows.flatten().tolist()[n * size : (n + 1) * size] for n in range(total)}


@given(total=st.integers(1, 60), world=st.integers(1, 20))
def test_passes_of_one_go_through_a_step_in_the_order_of_its_micro_batches(total: int, world: int) -> None:
    """What exact mode sums in one pass are neighbours, and ranks that have none are the last."""
    windows = torch.zeros(total, 1)
    ranks = [Share(Micro(1, total), rank, world) for rank in range(world)]
    passes = [[*share.passes(windows[: share.sequences], 1)] for share in ranks]
    taken = [[*one.numbers] for together in zip(*passes, strict=True) for one in together]
    assert [numbers for numbers in taken if numbers] == [[n] for n in range(total)]
    assert all(taken[:total])


def test_a_bad_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", "train.step=4"]) == EXIT_USAGE
    assert "did you mean train.steps?" in capsys.readouterr().err
