"""Whether the libraries themselves read what we bring out, and whether we read what they have saved.

    uv pip install --target build/peers transformers
    DS_BUILD_OPS=0 uv pip install --target build/peers --no-deps --no-build-isolation deepspeed hjson py-cpuinfo psutil msgpack einops ninja
    PYTHONPATH=build/peers python -m bench.interop

`transformers`: the logits of its Llama beside ours. DeepSpeed, ZeRO-1 with two groups and ZeRO-3: it trains, saves and converts; we
import, compare with what the converter wrote, and export; its engine loads that with `load_universal`, and every weight and moment is compared,
bit for bit. Both run on a CPU. They are no dependencies of the tests: 30 packages and 170 MB for one check that a small Llama of the
tests makes too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stormjib_checkpoint.history import committed
from stormjib_checkpoint.interop import deepspeed, hf
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import DTYPES, empty
from stormjib_trainer import init
from stormjib_trainer.config import ModelConfig
from stormjib_trainer.model import Llama

STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")


def main() -> None:
    """Check all, or with a role be one process of DeepSpeed's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="*")
    role = parser.parse_args().role
    if role:
        _ROLES[role[0]](int(role[1]), Path(role[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for tied in (False, True):
            print(json.dumps({"transformers": _transformers(Path(folder) / f"hf{tied}", tied)}))
        for stage in (1, 3):
            print(json.dumps({"deepspeed": _deepspeed(Path(folder) / f"z{stage}", stage)}))


# --- transformers -----------------------------------------------------------------------------------------------------


def _transformers(place: Path, tied: bool) -> dict[str, object]:
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found,import-untyped,unused-ignore]

    config = ModelConfig(dim=64, layers=3, heads=4, context=64, tied=tied)
    ours = Llama(config)
    init.fill(ours, 1, config.layers)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # gains that are not all one
    _as_step(place, {f"model.{name}": p.detach() for name, p in ours.named_parameters()}, config)
    hf.export(_opened(place / "job"), place / "hf", shard_bytes=100_000)
    theirs: Any = AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    tokens = torch.randint(256, (4, 64))
    with torch.no_grad():
        one, other = theirs(tokens).logits, ours(tokens)
    theirs.save_pretrained(place / "again")
    back = {source.name for source in hf.read(place / "again").sources}
    return {
        "tied": tied,
        "largest difference": float((one - other).abs().max()),
        "logits are up to": float(other.abs().max()),
        "its own files come in": back == {f"model.{name}" for name, _ in ours.named_parameters()},
    }


def _as_step(place: Path, weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """As the trainer leaves it, by the engine."""
    from dataclasses import asdict

    from stormjib_checkpoint.engine import Engine

    engine = Engine(place / "job")
    engine.async_save(dict(weights), step=STEPS, train={"config": {"model": asdict(config)}})
    engine.close()


def _opened(root: Path) -> Checkpoint:
    storage = Local(root)
    return Checkpoint(storage, committed(storage)[0])


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def _deepspeed(place: Path, stage: int) -> dict[str, object]:
    place.mkdir()
    _run("-m", "bench.interop", "save", str(stage), str(place))
    _run(
        "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(place / "native/last"),
        "--output_folder", str(place / "universal/last_universal"), "--num_extract_workers", "1",
        "--num_merge_workers", "1", *(["--inject_missing_state"] if stage < 3 else []),
    )  # fmt: skip
    bring_in(Local(place / "job"), deepspeed.read(place / "universal"), STEPS, 2)
    checkpoint = _opened(place / "job")
    ours = {name: empty(atom.shape, DTYPES[atom.dtype]) for name, atom in checkpoint.atoms.items()}
    checkpoint.fill({**ours, **checkpoint.scalars})
    deepspeed.export(checkpoint, place / "out", STEPS)
    _run("-m", "bench.interop", "load", str(stage), str(place))
    loaded = torch.load(place / "loaded.pt")
    converted = place / "universal/last_universal/zero"
    return {
        "stage": stage,
        "tensors": len(ours),
        "as the converter wrote them": all(_equal(t, _universal(converted, n)) for n, t in ours.items()),
        "as its engine loads them": all(
            _equal(ours[name], tensor) for name, tensor in loaded["state"].items()
        ),
        "weight decay of the groups": loaded["decay"],
        "steps": loaded["steps"],
    }


def _universal(zero: Path, name: str) -> torch.Tensor:
    """From the files of DeepSpeed's converter; all of them were made here."""
    kind, _, rest = name.partition(".")
    owner, _, key = (rest, "", "fp32") if kind == "model" else rest.rpartition(".")
    path = zero / owner / f"{key}.pt"
    if not path.exists():  # ZeRO-3 has one step for all
        return torch.tensor(float(STEPS))
    value = torch.load(path, weights_only=False)
    return torch.as_tensor(value["param"] if isinstance(value, dict) else value)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.flatten(), other.flatten())


def _run(*command: str) -> None:
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29777",
    }
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def _engine(seed: int, stage: int, *, universal: bool) -> Any:
    import deepspeed as peer  # type: ignore[import-not-found,import-untyped,unused-ignore]

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))
    decayed = {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}
    rest = {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0}
    groups: list[Any] = [decayed, rest] if stage < 3 else list(model.parameters())  # it loads one group only
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95))
    return peer.initialize(model=model, optimizer=optimizer, config=config)[0]


def _save(stage: int, place: Path) -> None:
    engine = _engine(1, stage, universal=False)
    for _ in range(STEPS):
        engine.backward(engine(torch.ones(2, 5, dtype=torch.bfloat16)).float().square().sum())
        engine.step()
    engine.save_checkpoint(str(place / "native"), tag="last")


def _load(stage: int, place: Path) -> None:
    from deepspeed.utils import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    engine = _engine(2, stage, universal=True)
    engine.load_checkpoint(str(place / "out"))
    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        state[f"model.{name}"] = safe_get_full_fp32_param(parameter).clone()
        for moment in MOMENTS:
            state[f"optim.{name}.{moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    inner = engine.optimizer.optimizer
    decay = [group["weight_decay"] for group in inner.param_groups]
    steps = sorted({float(one["step"]) for one in inner.state.values()})
    torch.save({"state": state, "decay": decay, "steps": steps}, place / "loaded.pt")


_ROLES = {"save": _save, "load": _load}

if __name__ == "__main__":
    main()
