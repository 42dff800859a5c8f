"""DeepSpeed's universal checkpoints, made and read by a reimplementation of its published code paths (0.19, commit edaa7221).

Made as `ds_to_universal.py` does: `merge_tp_slices` for ZeRO-1 and -2 (a dict), `merge_zero3_slices` for ZeRO-3 (a flat tensor). Read as
`universal_checkpoint.load_hp_checkpoint_state` and `stage3.load_hp_checkpoint_state` do. `bench/interop.py` does the same with DeepSpeed.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

STATES = ("fp32", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, torch.Tensor]]
"""Parameter -> state -> tensor."""


def make(folder: Path, state: State, groups: list[dict[str, Any]], step: Any, *, flat: bool) -> None:
    """What the converter leaves in its output folder; `groups` have `names` beside their options."""
    for name, tensors in state.items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for key in STATES:
            value = tensors[key]
            torch.save(
                value.flatten().clone() if flat else {"cat_dim": 0, "param": value.clone()},
                place / f"{key}.pt",
            )
        if not flat:
            torch.save(step, place / "step.pt")
    options = [{k: v for k, v in group.items() if k != "names"} | {"params": [0]} for group in groups]
    common: dict[str, Any] = {
        "loss_scaler": None,
        "overflow": False,
        "ds_version": "0.19.8",
        "param_groups": options,
    }
    if flat:
        common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": options}
    torch.save(common, folder / "zero/optimizer_state.pt")
    shapes = [OrderedDict((n, state[n]["fp32"].shape) for n in group["names"]) for group in groups]
    file = "zero_pp_rank_0_mp_rank_00_model_states.pt" if flat else "mp_rank_00_model_states.pt"
    torch.save({"module": OrderedDict(), "param_shapes": shapes, "dp_world_size": 2}, folder / file)
    (folder.parent / "latest_universal").write_text(folder.name)


def zero_1(folder: Path, name: str, start: int, count: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The fragment of a parameter that a rank of ZeRO-1 or -2 takes, and the step."""
    found, step = {}, None
    for path in (folder / "zero" / name).iterdir():
        loaded = torch.load(path, weights_only=False)
        if path.stem == "step":
            step = loaded
            continue
        found[path.stem] = (
            loaded["param"].chunk(1, loaded.get("cat_dim", 0))[0].flatten().narrow(0, start, count)
        )
    return found, step


def zero_3(folder: Path, name: str, key: str, rank: int, world: int) -> torch.Tensor:
    """The partition of a parameter that a rank of ZeRO-3 takes, padded."""
    loaded = torch.load(folder / "zero" / name / f"{key}.pt", weights_only=False)
    tensor = (loaded["param"] if isinstance(loaded, dict) else loaded).view(-1)
    part = ceil(prod(tensor.shape) / world)
    return torch.cat([tensor, torch.zeros(part * world - len(tensor))]).narrow(0, rank * part, part)
