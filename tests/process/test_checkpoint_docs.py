"""Every example of docs/checkpoint-in-your-script.md, run as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from safetensors.torch import load_file

from fakes import titan
from fakes.warm import Warm
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.timeout(120)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoint-in-your-script.md"
EXAMPLES = dict(re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def warm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Warm]:
    async with Warm(tmp_path_factory.mktemp("warm")) as one:
        yield one


async def run(warm: Warm, folder: Path, name: str, *words: str) -> str:
    path = folder / name
    path.write_text(EXAMPLES[name])
    done = await warm.fork(str(path), *words)
    assert (done.exit, done.err) == (0, ""), done.err
    return done.out


def test_no_example_is_left_out() -> None:
    assert set(EXAMPLES) == {"plain.py", "with_dcp.py", "my_configs.py", "elsewhere.py", "watched.py"}
    assert PAGE.read_text().count("```python") == len(EXAMPLES)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_plain_script_goes_on_where_it_was_and_others_read_its_files(
    warm: Warm, tmp_path: Path
) -> None:
    straight = await run(warm, tmp_path, "plain.py", str(tmp_path / "a"), "4")
    await run(warm, tmp_path, "plain.py", str(tmp_path / "b"), "2")
    resumed = await run(warm, tmp_path, "plain.py", str(tmp_path / "b"), "4")
    assert straight.startswith("steps 1 to 4, loss")
    assert resumed == straight.replace("steps 1", "steps 3")
    said = await run(warm, tmp_path, "elsewhere.py", str(tmp_path / "a"), str(tmp_path / "all.safetensors"))
    assert "model.0.weight" in said
    assert load_file(tmp_path / "all.safetensors")["model.0.weight"].shape == (32, 16)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_script_with_dcp(warm: Warm, tmp_path: Path) -> None:
    assert await run(warm, tmp_path, "with_dcp.py", str(tmp_path)) == "loaded, betas (0.9, 0.999)\n"
    assert [len(committed(Local(tmp_path / f"step-{step}"))) for step in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.asyncio(loop_scope="module")
async def test_figures_for_prometheus(warm: Warm, tmp_path: Path) -> None:
    said = await run(warm, tmp_path, "watched.py", str(tmp_path))
    assert "stormjib_checkpoint_saves_total 1.0" in said
    assert 'stormjib_checkpoint_duration_seconds{stage="durable"} 0.' in said
    assert re.search(r"^stormjib_checkpoint_bytes_total 8\d\d\d.0$", said, re.MULTILINE)


def test_a_config_for_torchtitan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titan.install(monkeypatch.setitem)
    for name in ("torchtitan.models", "torchtitan.models.llama3"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = ModuleType("torchtitan.models.llama3.config_registry")
    registry.llama3_debugmodel = lambda: SimpleNamespace(checkpoint=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    (tmp_path / "my_configs.py").write_text(EXAMPLES["my_configs.py"])
    spec = importlib.util.spec_from_file_location("my_configs", tmp_path / "my_configs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.debug().checkpoint
    assert (config.enable, config.interval, config.async_mode) == (True, 10, "async_with_pinned_mem")
    assert type(config)._owner.__name__ == "StormjibCheckpointManager"
