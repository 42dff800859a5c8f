"""The configuration of a run: frozen records, read from TOML and `--set section.key=value`, strict.

Nothing here depends on the number of ranks: `train.batch` is the batch of the whole job, cut into micro-batches that stay
what they are, so that the same file gives the same training on one rank and on forty. What a rank is comes from its environment (`environment`).
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stormjib_checkpoint.order import Micro
from stormjib_checkpoint.records import MAX_INTEGER
from stormjib_trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. Its vocabulary is the 256 bytes."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    """Bytes per sequence."""
    tied: bool = False
    """Input and output embedding are one matrix."""
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    """Share of the activations that is dropped after the embedding, after attention and after each feed-forward layer."""

    def __post_init__(self) -> None:
        _at_least(1, self, "model", "dim", "layers", "heads", "context")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout = {self.dropout}: wanted 0 <= dropout < 1")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ConfigError(
                f"model.heads = {self.heads}: model.dim = {self.dim} must be an even multiple of it "
                "(rotary positions turn pairs)"
            )

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU layer: 8/3 of dim, as in Llama, rounded up to 32."""
        return -(-8 * self.dim // 96) * 32


@dataclass(frozen=True)
class SourceConfig:
    """One text of a mixture."""

    path: str = "stdlib"
    """`stdlib` is the source of the Python standard library, there wherever Python is; else a file or a folder."""
    weight: int = 1
    """Of all sequences, this source has `weight` in as many as the weights of all sources sum to."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    sources: dict[str, SourceConfig] = field(default_factory=lambda: {"text": SourceConfig()})
    """By name. Whoever names one names all of them."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; wanted one at least, such as [data.sources.text]")
        for name, source in self.sources.items():
            _at_least(1, source, f"data.sources.{name}", "weight")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine schedule with linear warm-up."""

    lr: float = 3e-3
    """At 8e-3 the default model learns no better but amplifies rounding: after 50 steps the losses on 1 and 2 ranks
    differ by 1 %. At 3e-3 they differ by 1e-5 after 200 steps."""
    final_lr: float = 3e-4
    warmup: int = 100
    """Steps."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; gains of norms are not decayed."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        _at_least(0, self, "optimizer", "final_lr", "warmup", "weight_decay")
        _above_zero(self, "optimizer", "lr", "eps", "clip")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} = {getattr(self, name)}: wanted 0 <= {name} < 1")
        if self.final_lr > self.lr:
            raise ConfigError(f"optimizer.final_lr = {self.final_lr} is above optimizer.lr = {self.lr}")


@dataclass(frozen=True)
class TrainConfig:
    """How much of what is trained, and on what."""

    steps: int = 2000
    batch: int = 32
    """Sequences per step of the whole job, whatever the number of ranks."""
    micro_batch: int = 1
    """Sequences of a logical micro-batch. A step's batch is batch / micro_batch of them, numbered; what is in each never
    changes with the number of ranks, only which rank takes it. There can be no more ranks than micro-batches."""
    at_once: int = 0
    """Most micro-batches that a rank takes through the model at once; 0 is all of its share. It bounds memory when the
    job shrinks: the share grows, this does not. In exact mode each goes alone."""
    reduce: Literal["fast", "exact"] = "fast"
    """`exact`: the same bits on every number of ranks (on CPUs of one kind, with as many threads for a rank), for a reduction
    in each pass, and passes of one micro-batch: choose micro_batch as large as the largest number of ranks allows."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward; weights, gradients and optimizer are always fp32."""
    unit: int = 1_000_000
    """Fewest parameters that are sharded and gathered together: smaller layers are joined, since a gather of little
    costs as much as one of more."""
    threads: int = 0
    """Threads of a rank on the CPU; 0 is OMP_NUM_THREADS, and 1 where that is unset."""

    def __post_init__(self) -> None:
        _at_least(1, self, "train", "steps", "batch", "micro_batch", "unit")
        _at_least(0, self, "train", "at_once", "seed", "threads")
        if self.seed > MAX_INTEGER:
            raise ConfigError(
                f"train.seed = {self.seed}; wanted at most {MAX_INTEGER}: no checkpoint could hold it"
            )
        if self.reduce == "exact" and self.at_once:
            raise ConfigError(
                f"train.at_once = {self.at_once} with train.reduce = exact, where each micro-batch goes alone: leave it out, "
                "and set train.micro_batch"
            )
        if self.batch % self.micro_batch:
            raise ConfigError(
                f"train.micro_batch = {self.micro_batch} does not divide train.batch = {self.batch}"
            )
        if self.precision == "bf16" and self.device == "cpu":
            raise ConfigError("train.precision = bf16 needs train.device = cuda: CPUs gain nothing from it")

    @property
    def lmb(self) -> Micro:
        """How every step's batch is cut."""
        return Micro(self.micro_batch, self.batch // self.micro_batch)

    def check_world(self, world: int) -> None:
        """Raises ConfigError where some rank would never have anything to do."""
        if world > self.lmb.per_step:
            raise ConfigError(
                f"train.batch = {self.batch} is {self.lmb.per_step} micro-batches of train.micro_batch = {self.micro_batch}, "
                f"fewer than the {world} ranks: raise train.batch, lower train.micro_batch, or take fewer ranks"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the job is laid out over its ranks."""

    replicate: int = 0
    """How many ranks hold the same shard, where the number of ranks allows it: the most that divide it and are not
    more than this. Two replicas find silent corruption of weights and optimizer, three name the rank. The number of
    ranks here is plain data parallelism. 0: what was planned for the job (spec.model), else 1, as always where train.reduce = exact."""

    def __post_init__(self) -> None:
        _at_least(0, self, "parallel", "replicate")


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on text that is never trained on."""

    sequences: int = 1024
    """How many, spread evenly over the validation text."""
    every: int = 0
    """Steps between validations; 0 is only at the end."""

    def __post_init__(self) -> None:
        _at_least(1, self, "validation", "sequences")
        _at_least(0, self, "validation", "every")


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if self.train.reduce == "exact" and self.parallel.replicate > 1:
            raise ConfigError(
                f"parallel.replicate = {self.parallel.replicate} with train.reduce = exact, which needs all ranks in one sum: "
                "set it to 1"
            )
        if self.optimizer.warmup >= self.train.steps:
            raise ConfigError(
                f"optimizer.warmup = {self.optimizer.warmup} leaves nothing of train.steps = {self.train.steps}"
            )

    def replicas(self, planned: int) -> int:
        """How many ranks shall hold the same shard, where `planned` was planned for the job (0: nothing)."""
        if self.train.reduce == "exact":
            return 1
        return self.parallel.replicate or planned or 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it would stand in a file."""
        return asdict(self)


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a TOML file (or the defaults), changed by `section.key=value` texts, the last one wins."""
    try:
        plain = tomllib.loads(path.read_text("utf-8")) if path else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    for text in overrides:
        _override(plain, text)
    return _build(Config, plain, "")


def _override(plain: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not (equals and "." in name and all(name.split("."))):
        raise ConfigError(f"--set {text}: wanted section.key=value, such as train.steps=100")
    into = plain
    *sections, key = name.split(".")
    for section in sections:
        into = into.setdefault(section, {})
        if not isinstance(into, dict):
            raise ConfigError(f"{section} is {into!r}; wanted a section")
    into[key] = _value(value)


def _value(text: str) -> Any:
    """As TOML has it, and bare words are text, so that nobody has to quote quotes in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: type[T], plain: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(kind)
    for key in plain:
        if key not in hints:
            raise ConfigError(_unknown(path + key, [path + name for name in hints]))
    return kind(**{key: _convert(hints[key], value, path + key) for key, value in plain.items()})


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")


def _convert(kind: Any, value: Any, name: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is {value!r}; wanted a section with {_names(kind)}")
        return _build(typing.cast("type", kind), value, name + ".")
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is {value!r}; wanted sections")
        of = typing.get_args(kind)[1]
        return {key: _convert(of, each, f"{name}.{key}") for key, each in value.items()}
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{name} = {value!r}; wanted one of {', '.join(typing.get_args(kind))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} = {value!r}; wanted {kind.__name__}")
    return value


def _names(kind: Any) -> str:
    return ", ".join(f.name for f in fields(kind))


def _at_least(least: int, record: object, section: str, *names: str) -> None:
    for name in names:
        if getattr(record, name) < least:
            raise ConfigError(f"{section}.{name} = {getattr(record, name)}; wanted at least {least}")


def _above_zero(record: object, section: str, *names: str) -> None:
    for name in names:
        if not getattr(record, name) > 0:
            raise ConfigError(f"{section}.{name} = {getattr(record, name)}; wanted more than 0")
