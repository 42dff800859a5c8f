"""Weights out to Hugging Face and back in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fakes.interop import commit, everything, opened, same, save_trained
from stormjib_checkpoint.errors import ExportRefused, ForeignDamaged, ImportRefused
from stormjib_checkpoint.interop import hf
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TOKENS = torch.arange(64).reshape(2, 32) * 7 % 256


def weights(folder: Path) -> dict[str, Tensor]:
    """As any reader of sharded safetensors gets them: by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(index.values())}
    assert {name for tensors in files.values() for name in tensors} == index.keys()
    return {name: files[file][name] for name, file in index.items()}


def logits(config: dict[str, Any], w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """A Llama as Hugging Face defines it: rotate_half, repeat-free attention, RMS norm in float32. Written from its description, not from ours."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    width = config["hidden_size"] // heads
    inverse = 1.0 / config["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    angles = torch.cat([torch.arange(tokens.shape[1])[:, None] * inverse] * 2, dim=-1)

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def turned(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * angles.cos() + half * angles.sin()

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (y @ w[f"{at}self_attn.{p}_proj.weight"].T).view(*tokens.shape, heads, width).transpose(1, 2)
            for p in "qkv"
        )
        scores = turned(q) @ turned(k).transpose(2, 3) / width**0.5
        mask = torch.full(scores.shape[-2:], float("-inf")).triu(1)
        y = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_ours(tmp_path: Path, tied: bool) -> None:
    model, _ = save_trained(tmp_path / "job", tied)
    hf.export(opened(tmp_path / "job"), tmp_path / "hf", shard_bytes=8000)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    with torch.no_grad():
        theirs, ours = logits(config, weights(tmp_path / "hf"), TOKENS), model(TOKENS)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5)
    assert float(ours.std()) > 0.01
    assert config["tie_word_embeddings"] is tied


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    _, state = save_trained(tmp_path / "job")
    hf.export(opened(tmp_path / "job"), tmp_path / "hf")
    bring_in(Local(tmp_path / "back"), hf.read(tmp_path / "hf"), 0, 2)
    same(everything(tmp_path / "back"), {name: t for name, t in state.items() if name.startswith("model.")})


def test_a_model_of_somebody_else_keeps_its_names_and_types(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"model.lm.w": shared, "model.lm.tied": shared, "model.lm.b": torch.ones(3, dtype=torch.bfloat16)}
    commit(tmp_path / "job", state, {})
    hf.export(opened(tmp_path / "job"), tmp_path / "hf")
    assert not (tmp_path / "hf/config.json").exists()
    assert weights(tmp_path / "hf").keys() == {"lm.tied", "lm.b"}  # a tied tensor is there once
    bring_in(Local(tmp_path / "back"), hf.read(tmp_path / "hf"), 0, 1)
    found = everything(tmp_path / "back")
    assert torch.equal(found["model.lm.tied"], shared)
    assert found["model.lm.b"].dtype is torch.bfloat16


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    commit(tmp_path / "job", {"ema.w": torch.ones(2)}, {})
    with pytest.raises(ExportRefused, match=r"no tensor is called model\.\*"):
        hf.export(opened(tmp_path / "job"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportRefused, match=r"has no \*\.safetensors"):
        hf.read(tmp_path / "empty")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save_trained(tmp_path / "job")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").write_text("x")
    with pytest.raises(ExportRefused, match="is not empty"):
        hf.export(opened(tmp_path / "job"), tmp_path / "hf")
    hf.export(opened(tmp_path / "job"), tmp_path / "other")
    with pytest.raises(ImportRefused, match="step 12 is committed there"):
        bring_in(Local(tmp_path / "job"), hf.read(tmp_path / "other"), 0, 1)


def test_a_tensor_that_the_trainers_model_does_not_have_is_named(tmp_path: Path) -> None:
    save_trained(tmp_path / "job")
    hf.export(opened(tmp_path / "job"), tmp_path / "hf")
    path = next((tmp_path / "hf").glob("*.safetensors"))
    save_file({**load_file(path), "model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, path)
    with pytest.raises(ImportRefused, match=r"q_proj\.bias is no tensor of the trainer's model"):
        hf.read(tmp_path / "hf")


def test_damage_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.arange(8.0), "v": torch.ones(2)}, tmp_path / "a.safetensors")
    good = (tmp_path / "a.safetensors").read_bytes()
    for bad, why in (
        (good[:-4], "does not lie where the header says"),
        (good[:30], "no safetensors file"),
        (b"", "no safetensors file"),
        (good[:8] + good[8:].replace(b"{", b"[", 1), "no JSON"),
        (good.replace(b"F32", b"F99"), "nothing sensible"),
        (good.replace(b"[8]", b"[9]"), "does not lie"),
    ):
        (tmp_path / "a.safetensors").write_bytes(bad)
        with pytest.raises(ForeignDamaged, match=why):
            hf.read(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(good)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a", "v": "a", "u": "b"}}')
    with pytest.raises(ForeignDamaged, match="names 3 tensors, and the files hold 2"):
        hf.read(tmp_path)
