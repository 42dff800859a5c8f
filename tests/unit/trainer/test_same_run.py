"""A run goes on from a checkpoint of its own only: same samples, same order, same counts of every source."""

from __future__ import annotations

from typing import Any

import pytest

from stormjib_checkpoint.order import Micro, Order, Source
from stormjib_trainer import same_run
from stormjib_trainer.errors import ResumeMismatch

STEP = 9


def record(cursor: dict[str, Any] | None = None, **changes: object) -> dict[str, object]:
    order = Order((Source("code", 40, 7), Source("prose", 9, 3)), Micro(2, 6), 5)
    own = {"step": STEP, "cursor": cursor or order.cursor(STEP), "texts": {"code": "ab"}, "context": 64}
    return own | {"rng": {"kind": "splitmix64-16", "seed": 5}} | changes


def test_its_own_is_taken() -> None:
    same_run.check(record(trained_s=3), record(trained_s=4))


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (record({"v": 1, "next": 108, "n": 49, "seed": 5, "perm": "feistel-8"}), "of version 1"),
        (record(Order((Source("code", 49),), Micro(2, 6), 5).cursor(STEP)), "keep data.sources, train.batch"),
        (record(Order((Source("code", 40, 7), Source("prose", 9, 3)), Micro(3, 4), 5).cursor(STEP)), "lmb"),
        (record(texts={"code": "cd"}), "keep what data.sources name"),
        (record(rng={"kind": "philox", "seed": 5}), "keep train.seed"),
        (record(context=32), "keep model.context"),
    ],
)
def test_what_is_of_another_run_is_refused_and_says_what_differs(saved: dict[str, object], said: str) -> None:
    with pytest.raises(ResumeMismatch, match=said):
        same_run.check(saved, record())


def test_counts_that_are_not_those_of_the_order_are_refused() -> None:
    """What a source has given is written down beside the position, and both must agree."""
    cursor: Any = record()["cursor"]
    cursor["sources"][0]["taken"] += 1
    cursor["sources"][1]["taken"] -= 1
    with pytest.raises(ResumeMismatch, match="its own order says"):
        same_run.check(record(cursor), record())
