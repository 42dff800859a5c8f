"""The optimizer in a checkpoint, as other formats want it: groups of parameters with their options, and the steps they have done."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_checkpoint.reader import Checkpoint
    from stormjib_checkpoint.records import Json

MODEL, OPTIM, GROUP = "model.", "optim.", "group."
STEP = "step"
HOW: dict[str, Json] = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
"""Options that say how an optimizer computes. They are no part of a checkpoint; torch wants to be told some, and these are its own choice."""
_ADAMW = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


class Group(NamedTuple):
    """Parameters that share options."""

    names: tuple[str, ...]
    """Without `model.`."""
    options: dict[str, Json]


def parameters(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Parameters with tensors of state, and the keys of those: `{"w": ["exp_avg", "exp_avg_sq"]}`."""
    found: dict[str, list[str]] = {}
    for name in checkpoint.atoms:
        if name.startswith(OPTIM):
            owner, _, key = name.removeprefix(OPTIM).rpartition(".")
            found.setdefault(owner, []).append(key)
    return found


def groups(checkpoint: Checkpoint) -> list[Group]:
    """As an engine saved them; else as our trainer has them by its configuration; none where neither is there."""
    saved = _saved(checkpoint.scalars)
    return saved or _of_trainer(checkpoint)


def steps_done(checkpoint: Checkpoint) -> int | None:
    """What the trainer wrote beside tensors; None where it wrote nothing, or each parameter counts for itself."""
    step = checkpoint.train.get("step")
    return (
        step
        if type(step) is int and not any(name.endswith(f".{STEP}") for name in checkpoint.atoms)
        else None
    )


def scalars_of(found: Iterable[Group]) -> dict[str, Json]:
    """Groups by the names that they have in our checkpoints."""
    scalars: dict[str, Json] = {}
    for index, group in enumerate(found):
        scalars[f"{GROUP}{index}.params"] = [MODEL + name for name in group.names]
        scalars.update({f"{GROUP}{index}.{key}": v for key, v in group.options.items() if key not in HOW})
    return scalars


def _saved(scalars: Mapping[str, Json]) -> list[Group]:
    found: dict[int, dict[str, Json]] = {}
    for name, value in scalars.items():
        if name.startswith(GROUP):
            index, _, key = name.removeprefix(GROUP).partition(".")
            found.setdefault(int(index), {})[key] = value
    return [
        Group(tuple(name.removeprefix(MODEL) for name in options.pop("params", [])), options)
        for _, options in sorted(found.items())
    ]


def _of_trainer(checkpoint: Checkpoint) -> list[Group]:
    """Matrices are decayed and gains are not. The rate is the highest one: the trainer makes each step's from its number."""
    config = checkpoint.train.get("config", {}).get("optimizer")
    if config is None:
        return []
    names = sorted(parameters(checkpoint))
    options = {
        "lr": config["lr"],
        "betas": (config["beta1"], config["beta2"]),
        "eps": config["eps"],
        **_ADAMW,
    }
    matrices = tuple(name for name in names if len(checkpoint.atoms[MODEL + name].shape) > 1)
    gains = tuple(name for name in names if name not in matrices)
    return [
        Group(matrices, options | {"weight_decay": config["weight_decay"]}),
        Group(gains, options | {"weight_decay": 0.0}),
    ]
