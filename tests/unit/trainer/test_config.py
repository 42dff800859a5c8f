"""The configuration refuses what it does not understand, and says which knob to turn."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from stormjib_trainer.config import Config, ModelConfig, SourceConfig, TrainConfig, load
from stormjib_trainer.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_file_and_overrides_the_last_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "[model]\ndim = 32\n[optimizer]\nlr = 1\nfinal_lr = 0\n[data.sources.mine]\npath = '/there'\n"
    )
    config = load(
        file, ["train.steps=700", "train.steps=800", "model.tied=true", "data.sources.mine.path=/here/it is"]
    )
    assert (config.model.dim, config.model.tied, config.train.steps) == (32, True, 800)
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert config.data.sources == {"mine": SourceConfig("/here/it is")}


def test_what_is_written_out_reads_back_the_same(tmp_path: Path) -> None:
    sections = Config().to_dict()
    sources = sections.pop("data")["sources"]
    sections |= {f"data.sources.{name}": source for name, source in sources.items()}
    file = tmp_path / "run.toml"
    lines = [
        f"{section}.{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for section, values in sections.items()
        for key, value in values.items()
    ]
    file.write_text("\n".join(lines))
    assert load(file) == Config()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.step=3", "did you mean train.steps?"),
        ("trian.steps=3", "did you mean train?"),
        ("steps=3", "section.key=value"),
        ("train.steps", "section.key=value"),
        ("train.steps=many", "train.steps = 'many'; wanted int"),
        ("train.steps=3.5", "train.steps = 3.5; wanted int"),
        ("train.steps=true", "train.steps = True; wanted int"),
        ("train.steps=0", "train.steps = 0; wanted at least 1"),
        ("train.steps=100", "optimizer.warmup = 100 leaves nothing"),
        ("train.micro_batch=0", "train.micro_batch = 0; wanted at least 1"),
        ("train.micro_batch=5", "train.micro_batch = 5 does not divide train.batch = 32"),
        ("train.at_once=-1", "train.at_once"),
        ("train.reduce=slow", "train.reduce = 'slow'; wanted one of fast, exact"),
        ("data.sources.a.weight=0", "data.sources.a.weight = 0; wanted at least 1"),
        ("data.sources.a.kind=text", "unknown key data.sources.a.kind"),
        ("data.sources=stdlib", "data.sources is 'stdlib'; wanted sections"),
        ("data.sources.a=stdlib", "data.sources.a is 'stdlib'; wanted a section with path, weight"),
        ("data.sources={}", "data.sources is empty"),
        ("data..a=1", "section.key=value"),
        (f"train.seed={2**63}", "no checkpoint could hold it"),
        ("train.device=gpu", "wanted one of auto, cpu, cuda"),
        ("model.heads=5", "model.heads = 5"),
        ("model.heads=64", "even multiple"),
        ("model.dropout=1", "model.dropout = 1.0: wanted 0 <= dropout < 1"),
        ("optimizer.lr=0", "optimizer.lr = 0.0; wanted more than 0"),
        ("optimizer.final_lr=1", "optimizer.final_lr = 1.0 is above"),
        ("optimizer.beta2=1", "optimizer.beta2"),
        ("validation.sequences=0", "validation.sequences"),
    ],
)
def test_a_bad_value_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert said in str(error.value)


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision = bf16 needs train\.device = cuda"):
        load(None, ["train.precision=bf16", "train.device=cpu"])


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(tmp_path / "broken.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n")
    with pytest.raises(ConfigError, match="train is 3; wanted a section with steps"):
        load(tmp_path / "flat.toml")


def test_the_hidden_layer_is_a_multiple_of_32() -> None:
    assert [ModelConfig(dim=dim).hidden for dim in (32, 64, 128, 256)] == [96, 192, 352, 704]


def test_more_ranks_than_micro_batches_are_refused() -> None:
    config = TrainConfig(batch=12, micro_batch=3)
    config.check_world(4)
    with pytest.raises(
        ConfigError, match=r"12 is 4 micro-batches of train\.micro_batch = 3, fewer than the 5 ranks"
    ):
        config.check_world(5)


@pytest.mark.parametrize("override", ["train.at_once=2", "parallel.replicate=2"])
def test_what_exact_mode_cannot_do_is_refused(override: str) -> None:
    load(None, [override])
    with pytest.raises(ConfigError, match=r"with train\.reduce = exact"):
        load(None, [override, "train.reduce=exact"])


def test_replicas_are_what_the_configuration_says_else_what_was_planned() -> None:
    assert [load(None).replicas(planned) for planned in (0, 3)] == [1, 3]
    assert load(None, ["parallel.replicate=2"]).replicas(3) == 2
    assert load(None, ["parallel.replicate=1"]).replicas(3) == 1
    assert load(None, ["train.reduce=exact"]).replicas(3) == 1
