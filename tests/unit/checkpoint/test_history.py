"""FORMAT.md §3 and §5: which steps exist, whoever goes on writing."""

from __future__ import annotations

import pytest
import torch

from fakes.disk import Disk
from fakes.saving import save_rank
from fakes.training import WORLD, loads, plan, save, train
from stormjib_checkpoint import layout
from stormjib_checkpoint.commit import Pending, commit_step, commit_when_complete
from stormjib_checkpoint.errors import (
    AlreadySaved,
    DamagedCheckpoint,
    GenerationExists,
    Incomplete,
    Inconsistent,
    NoUsableCheckpoint,
    StepPassed,
    Superseded,
    UnknownGeneration,
)
from stormjib_checkpoint.format import GenerationFile, ResumePoint
from stormjib_checkpoint.history import committed, highest, newest, spans
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation, open_next
from stormjib_checkpoint.storage import Local


@pytest.fixture
def storage() -> Local:
    return Local("/job", Disk())


def steps(storage: Local) -> list[tuple[int, str]]:
    return [(point.step, point.generation) for point in committed(storage)]


def test_a_fresh_root_has_nothing_and_starts_from_nothing(storage: Local) -> None:
    assert newest(storage) is None
    assert highest(storage) is None
    assert audit(storage).last == -1
    assert open_generation(storage, "1.1", "uid").resume is None
    assert newest(storage) is None


def test_a_cut_node_that_goes_on_committing_is_neither_loaded_nor_counted(storage: Local) -> None:
    """§3.5"""
    open_generation(storage, "1.1", "uid")
    ten = train(storage, "1.1", 0, 10)
    assert open_generation(storage, "1.2", "uid").resume == ten
    zombie = [train(storage, "1.1", 10, 20, mark=9), train(storage, "1.1", 20, 30, mark=9)]
    assert all(loads(storage, point) == 9 for point in zombie), "the zombie did commit"
    assert newest(storage) == ten
    twelve = train(storage, "1.2", 10, 12)
    assert steps(storage) == [(12, "1.2"), (10, "1.1")]
    assert open_generation(storage, "1.3", "uid").resume == twelve
    found = audit(storage)
    assert (found.last, found.differences(plan), found.twice()) == (12, [], [])


def test_a_zombie_may_save_the_very_same_step(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 90)
    open_generation(storage, "2.1", "uid")
    train(storage, "1.1", 90, 100, mark=1)
    new = train(storage, "2.1", 90, 100, mark=2)
    assert steps(storage) == [(100, "2.1"), (90, "1.1")]
    assert loads(storage, new) == 2


def test_fall_back_100_to_90_train_again_save_100_again(storage: Local) -> None:
    """§3.3, §3.4"""
    open_generation(storage, "1.1", "uid")
    ninety, hundred = train(storage, "1.1", 80, 90), train(storage, "1.1", 90, 100, mark=1)
    opening = open_generation(storage, "1.2", "uid", refused=[hundred.digest])
    assert opening.resume == ninety
    again = train(storage, "1.2", 90, 100, mark=2)
    assert loads(storage, again) == 2
    assert open_generation(storage, "1.3", "uid").resume == again
    assert steps(storage) == [(100, "1.2"), (90, "1.1")]


def test_after_a_roll_back_and_a_crash_the_old_history_is_not_resumed(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    first = train(storage, "1.1", 0, 500)
    later = [train(storage, "1.1", step - 100, step) for step in (600, 700, 800, 900, 1000)]
    rolled = open_generation(storage, "1.2", "uid", refused=[point.digest for point in later])
    assert rolled.resume == first
    one = train(storage, "1.2", 500, 501)
    assert open_generation(storage, "1.3", "uid").resume == one
    assert newest(storage) == one


def test_a_refused_step_stays_refusable_when_nothing_was_trained_since(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    ninety, hundred = train(storage, "1.1", 80, 90), train(storage, "1.1", 90, 100)
    assert open_generation(storage, "1.2", "uid").resume == hundred
    assert open_generation(storage, "1.3", "uid", refused=[hundred.digest]).resume == ninety
    # The history of the highest generation is what exists: 100 is gone from it.
    assert open_generation(storage, "1.4", "uid").resume == ninety


def test_a_generation_is_opened_once(storage: Local) -> None:
    """§3.1"""
    open_generation(storage, "1.1", "uid")
    with pytest.raises(GenerationExists, match="next number"):
        open_generation(storage, "1.1", "uid")


def test_a_lower_generation_is_refused(storage: Local) -> None:
    open_generation(storage, "2.1", "uid")
    with pytest.raises(Superseded, match=r"2\.1 exists"):
        open_generation(storage, "1.9", "uid")
    assert [p for p in storage.names(layout.GENERATIONS)] == ["g2.1.json"]


def test_of_two_openers_at_once_the_lower_gives_way(storage: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """§3.1"""
    create = storage.create

    def overtaken(path: str, chunks: object) -> None:
        monkeypatch.setattr(storage, "create", create)
        open_generation(storage, "2.1", "other")
        create(path, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "create", overtaken)
    with pytest.raises(Superseded):
        open_generation(storage, "1.1", "uid")
    record = highest(storage)
    assert record is not None
    assert record.job_uid == "other"


def test_a_job_applied_again_goes_on_from_its_predecessor(storage: Local) -> None:
    """§3.2"""
    open_generation(storage, "3.4", "first")
    ten = train(storage, "3.4", 0, 10)
    record = highest(storage)
    assert record is not None
    assert (str(record.generation), record.job_uid) == ("3.4", "first")
    assert open_generation(storage, "4.1", "second").resume == ten
    again = highest(storage)
    assert again is not None
    assert (str(again.parent), again.job_uid) == ("3.4", "second")


def test_a_script_without_a_coordinator_counts_by_itself(storage: Local) -> None:
    assert open_next(storage).generation == "0.1"
    ten = train(storage, "0.1", 0, 10)
    opening = open_next(storage)
    assert (opening.generation, opening.resume) == ("0.2", ten)
    save(storage, "0.2", 10, 20)
    assert commit_when_complete(storage, "0.2", WORLD, 20, wait_s=0).step == 20
    with pytest.raises(Incomplete, match=r"rank-00000\.json, rank-00001\.json"):
        commit_when_complete(storage, "0.2", WORLD, 30, wait_s=0)


def test_what_the_parent_left_complete_is_finished_and_what_is_not_is_left(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 10)
    save(storage, "1.1", 10, 20)
    save(storage, "1.1", 20, 30)
    storage.remove(layout.folder(30, GenerationId(1, 1)), ["rank-00001.json"])
    opening = open_generation(storage, "1.2", "uid")
    assert opening.resume is not None
    assert opening.resume.step == 20
    assert any("rank-00001.json" in note for note in opening.notes)
    assert loads(storage, opening.resume) == 0
    assert audit(storage).differences(plan) == []


def test_a_damaged_newest_step_is_passed_over_and_said(storage: Local) -> None:
    """§3.6"""
    open_generation(storage, "1.1", "uid")
    ten, twenty = train(storage, "1.1", 0, 10), train(storage, "1.1", 10, 20)
    storage.remove(layout.folder(20, GenerationId(1, 1)), ["rank-00001.safetensors"])
    opening = open_generation(storage, "1.2", "uid")
    assert opening.resume == ten
    assert f"step {twenty.step} of 1.1 passed over" in opening.notes[0]
    assert "rank-00001.safetensors is missing" in opening.notes[0]


def test_nothing_usable_is_an_error_and_not_a_fresh_start(storage: Local) -> None:
    """§3.6"""
    open_generation(storage, "1.1", "uid")
    ten = train(storage, "1.1", 0, 10)
    with pytest.raises(NoUsableCheckpoint, match="all refused"):
        open_generation(storage, "1.2", "uid", refused=[ten.digest])
    assert [str(g) for g in (GenerationId(1, 1),)] == [n[1:-5] for n in storage.names(layout.GENERATIONS)]
    storage.remove(layout.folder(10, GenerationId(1, 1)), ["atoms.json"])
    with pytest.raises(NoUsableCheckpoint, match=r"atoms\.json"):
        open_generation(storage, "1.2", "uid")


def test_commit_is_repeatable_and_in_order(storage: Local) -> None:
    """§5.2, §5.3, §5.4"""
    open_generation(storage, "1.1", "uid")
    save(storage, "1.1", 0, 10)
    twenty = train(storage, "1.1", 0, 20)
    assert commit_step(storage, "1.1", WORLD, 20) == twenty
    with pytest.raises(StepPassed, match="step 20 is committed"):
        commit_step(storage, "1.1", WORLD, 10)
    assert steps(storage) == [(20, "1.1")]


def test_samples_of_a_step_that_was_passed_over_are_not_lost(storage: Local) -> None:
    """§6.1"""
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 10)
    save(storage, "1.1", 10, 20)  # never committed; the ranks have told these samples and forget them
    train(storage, "1.1", 20, 30)
    found = audit(storage)
    assert found.differences(plan) == []
    assert found.gaps() == []


def test_commit_needs_an_opened_generation(storage: Local) -> None:
    save(storage, "1.1", 0, 10)
    with pytest.raises(UnknownGeneration):
        commit_step(storage, "1.1", WORLD, 10)


def test_ranks_of_another_world_size_or_attempt_are_not_mixed(storage: Local) -> None:
    """§4.6, §5.1"""
    open_generation(storage, "1.1", "uid")
    for step, world, attempt in ((10, 3, ""), (20, 2, "1")):
        common = {"step": step, "generation": "1.1", "state": {}, "train": {}, "samples": {}}
        save_rank(storage, rank=0, world=2, attempt="", **common)  # type: ignore[arg-type]
        save_rank(storage, rank=1, world=world, attempt=attempt, **common)  # type: ignore[arg-type]
    with pytest.raises(Inconsistent, match="rank 1 of 3"):
        commit_step(storage, "1.1", 2, 10)
    with pytest.raises(Inconsistent, match="restarted in between"):
        commit_step(storage, "1.1", 2, 20)


def test_a_rank_leaves_a_step_once(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    ten = train(storage, "1.1", 0, 10, mark=1)
    with pytest.raises(AlreadySaved, match="rank 0 has left step 10"):
        save(storage, "1.1", 0, 10, mark=2)
    assert loads(storage, ten) == 1


def test_a_tensor_that_only_one_rank_holds_is_not_lost_without_a_trace(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    one_sided = {f"model.{name}": torch.ones(2) for name in "abcdef"}  # some belong to rank 1 to write
    for rank, state in ((0, one_sided), (1, {})):
        save_rank(storage, step=1, generation="1.1", rank=rank, world=2, state=state, train={}, samples={})
    with pytest.raises(Inconsistent, match=r"do not hold model\.. exactly once: 0 of 2"):
        commit_step(storage, "1.1", 2, 1)


def test_scalars_must_agree(storage: Local) -> None:
    """§5.1"""
    open_generation(storage, "1.1", "uid")
    for rank in range(2):
        save_rank(
            storage,
            step=1,
            generation="1.1",
            rank=rank,
            world=2,
            state={"group.0.lr": rank},
            train={},
            samples={},
        )
    with pytest.raises(Inconsistent, match=r"group\.0\.lr differs"):
        commit_step(storage, "1.1", 2, 1)


def test_pending_asks_only_for_those_still_missing(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    pending = Pending(storage, 10, "1.1", WORLD)
    assert not pending.ready()
    save(storage, "1.1", 0, 10)
    assert pending.ready()


def test_a_lost_or_foreign_record_of_a_generation_is_damage(storage: Local) -> None:
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 10)
    open_generation(storage, "1.2", "uid")
    data = storage.read("generations/g1.2.json", 4096)
    storage.create("generations/g1.3.json", [data])
    with pytest.raises(DamagedCheckpoint, match=r"g1\.3\.json is the record of 1\.2"):
        newest(storage)
    storage.remove(layout.GENERATIONS, ["g1.3.json", "g1.1.json"])
    with pytest.raises(DamagedCheckpoint, match=r"g1\.1\.json is missing"):
        newest(storage)


def test_spans_follow_the_resume_points() -> None:
    one, two, three = (GenerationId.parse(text) for text in ("1.1", "1.2", "2.1"))
    records = {
        one: GenerationFile(one, None, "uid", None),
        two: GenerationFile(two, one, "uid", ResumePoint(50, "1.1", "d")),
        three: GenerationFile(three, two, "uid", ResumePoint(30, "1.1", "d")),
    }
    assert [tuple(span) for span in spans(records, three)] == [(three, 30, None), (one, -1, 30)]
    assert [tuple(span) for span in spans(records, two)] == [(two, 50, None), (one, -1, 50)]
