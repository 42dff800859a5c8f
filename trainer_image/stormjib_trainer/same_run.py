"""Whether a checkpoint is of this run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.order import Order
from stormjib_trainer.errors import ResumeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_checkpoint.records import Json

_KNOBS = {
    "cursor": "data.sources, train.batch, train.micro_batch and train.seed",
    "rng": "train.seed (and the version of stormjib)",
    "texts": "what data.sources name (and the Python version, where that is stdlib)",
    "context": "model.context",
}


def check(saved: Mapping[str, Json], own: Mapping[str, Json]) -> None:
    """Refuse to go on with other samples in another order: nobody would notice, and the ledger would lie. Both are what a
    checkpoint of the same step holds beside tensors. Raises ResumeMismatch."""
    step = saved["step"]
    try:
        Order.of_cursor(saved["cursor"], step)
    except FormatError as error:
        raise ResumeMismatch(
            f"this run cannot go on from the checkpoint: {error}; name an empty folder"
        ) from error
    for key, knobs in _KNOBS.items():
        if saved[key] != own[key]:
            raise ResumeMismatch(
                f"the checkpoint of step {step} has {key} {saved[key]}, this run {own[key]}: keep {knobs}, "
                "or name an empty folder"
            )
