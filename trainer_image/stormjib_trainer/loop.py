"""The training loop, readable from top to bottom."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.order import Order
from stormjib_health import probe
from stormjib_health.integrity.judge import Act
from stormjib_health.integrity.votes import replicas_of
from stormjib_health.wire import Doubt
from stormjib_runtime import rank
from stormjib_runtime.wire import EXIT_RESUME_FAILED, EXIT_ROLL_BACK, EXIT_STOPPED, RankPhase
from stormjib_trainer import data, dropout, init, parallel, same_run
from stormjib_trainer.checkpoints import Checkpoints
from stormjib_trainer.control import Control
from stormjib_trainer.environment import age_s
from stormjib_trainer.errors import (
    ConfigError,
    CorruptedStep,
    DataError,
    ResumeFailed,
    RolledBack,
)
from stormjib_trainer.exact import Exact
from stormjib_trainer.integrity import Watch
from stormjib_trainer.model import Llama
from stormjib_trainer.optimizer import Optimizer
from stormjib_trainer.reduction import Fast
from stormjib_trainer.report import Reporter
from stormjib_trainer.step import Share, agree, clip
from stormjib_trainer.validate import validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from stormjib_checkpoint.tensors import Value
    from stormjib_health.integrity.judge import Ruling
    from stormjib_trainer.config import Config
    from stormjib_trainer.data import Corpus
    from stormjib_trainer.environment import Environment
    from stormjib_trainer.reduction import Keys, Reduction
    from stormjib_trainer.step import Agreed


def train(config: Config, env: Environment) -> int:
    """Train to the last step, or to where somebody asks to stop. Returns the exit code of this rank."""
    control = Control(rank.page())
    control.listen()
    control.phase(RankPhase.START)
    config.train.check_world(env.world)
    parallel.join(parallel.device_of(config.train, env), config.train, env)
    met_s = age_s()
    run = Run(config, env, control)
    try:
        run.resume(met_s)
        code = run.to_the_end()
    except ResumeFailed as error:
        print(f"stormjib_trainer: {error}", file=sys.stderr)
        code = EXIT_RESUME_FAILED
    except RolledBack as error:
        print(f"stormjib_trainer: {error}", file=sys.stderr)
        code = EXIT_ROLL_BACK
    control.phase(RankPhase.END)
    parallel.leave()
    return code


class Run:
    """One rank of one generation."""

    def __init__(self, config: Config, env: Environment, control: Control) -> None:
        self.config, self.env, self.control = config, env, control
        self.report = Reporter(env.rank)
        self.device = parallel.device_of(config.train, env)
        sources = config.data.sources
        self.text = data.load({name: each.path for name, each in sources.items()}, config.model.context)
        if not parallel.same_everywhere(self.text.sha256, self.device):
            raise DataError(
                f"data.sources ({', '.join(sources)}): ranks read different texts; give all nodes the same"
            )
        self.order = _order(config, self.text)
        self.share = Share(config.train.lmb, env.rank, env.world)
        self.model = Llama(config.model)
        init.fill(self.model, config.train.seed, config.model.layers)
        self.model.to(self.device)
        self.replicas = replicas_of(env.world, config.replicas(env.replicate))
        parallel.shard(self.model, self.device, config.train, self.replicas)
        exact = config.train.reduce == "exact"
        self.optimizer = Optimizer(self.model, config.optimizer, config.train.steps, exact=exact)
        self.reduction = self.reduced()
        self.watch = Watch(env, config.train.lmb, self.replicas, self.device)
        self.watch.attach(self.model, self.reduction.folds, self.optimizer.tensors())
        weights: dict[str, Value] = {f"model.{name}": p for name, p in self.model.named_parameters()}
        self.state = weights | self.optimizer.state()
        """All tensors of a checkpoint, sharded; they share memory with model and optimizer, so it never changes."""
        self.checkpoints = Checkpoints(env, self.report, control)
        self.done = 0
        self.fed: dict[int, Sequence[int]] = {}
        """step -> sample ids that this rank fed to the model, since the last save."""

    def reduced(self) -> Reduction:
        """How gradients are summed."""
        train = self.config.train
        if train.reduce == "exact":
            return Exact(self.model, self.share)
        return Fast(self.model, self.share, train.at_once or train.batch, self.replicas)

    def resume(self, met_s: float) -> None:
        """Go on from the checkpoint that this generation resumes from, where there is one. Tells how the start went:
        `met_s` is the time from the start of the process to its first collective."""
        saved = self.checkpoints.resume(self.state)
        if saved is not None:
            self.done = saved["step"]
            self.checkpoints.keep_pace(saved["trained_s"], saved["lives"])
            same_run.check(saved, self.train_record())
            self.optimizer.done(self.done)
        self.watch.begin(self.done, self.checkpoints.doubted(self.done))
        self.report.event("start", step=self.done, fork_to_collective_s=round(met_s, 3), **self.facts())

    def to_the_end(self) -> int:
        """Step until the last step, or until all agree to stop."""
        last = self.config.train.steps
        while self.done < last:
            agreed = self.step(self.done + 1)
            if (
                agreed.stop
                or agreed.save
                or self.done == last
                or self.checkpoints.due(self.done, hold=agreed.hold)
            ):
                self.save()
            elif not agreed.busy:
                self.stage()
            if agreed.stop and self.done < last:
                self.checkpoints.finish()
                self.report.event("stopped", step=self.done)
                return EXIT_STOPPED
            every = self.config.validation.every
            if every and self.done % every == 0 and self.done < last:
                self.validate("validated")
        self.validate("done")
        self.checkpoints.finish()
        return 0

    def step(self, step: int) -> Agreed:
        """One step of the whole job."""
        began = time.perf_counter()
        self.control.phase(RankPhase.STEP)
        self.fed[step] = self.order.ids(step, self.share.numbers)
        windows = self.text.batch(map(self.order.place, self.fed[step])).to(self.device)
        agreed, act = self.attempt(step, windows)
        if act is Act.AGAIN:
            self.optimizer.drop()
            agreed, act = self.attempt(step, windows, again=True)
        if act is Act.APPLY:
            self.optimizer.apply(step)
        else:
            self.optimizer.skip(step)
            self.report.event("skipped", step=step)
        self.done = step
        self.control.finished(step, agreed.loss)
        self.tell(agreed, time.perf_counter() - began)
        return agreed

    def attempt(self, step: int, windows: Tensor, *, again: bool = False) -> tuple[Agreed, Act]:
        """Forward, backward, and what all ranks make of the numbers. Raises CorruptedStep, RolledBack."""
        self.watch.start()
        loss = self.reduction.backward(windows, self.keys(step))
        gradients = self.optimizer.gradients()
        numbers = self.reduction.numbers(loss, gradients)
        wishes = {
            "stop": self.control.stop(step),
            "save": self.control.save(step),
            "hold": not self.checkpoints.ready(),
            "busy": not self.checkpoints.can_stage(),
        }
        told = self.watch.told(step, again=again)
        agreed = agree(numbers, self.reduction.read, told=told, **wishes)
        ruling = self.watch.rule(step, agreed)
        for finding in ruling.findings:
            probe.tell(finding)
            self.report.finding(finding)
        if ruling.act is Act.ROLL_BACK:
            self.roll_back(step, ruling)
        if ruling.act is Act.FAIL:
            self.checkpoints.finish()  # all ranks end here: what was saved before shall count
            raise CorruptedStep(_said(step, agreed, ruling))
        clip(gradients, agreed.grad_norm, self.config.optimizer.clip)
        return agreed, ruling.act

    def keys(self, step: int) -> Keys | None:
        """What dropout in this step draws from."""
        if not self.config.model.dropout:
            return None
        seed, size = self.config.train.seed, self.config.train.micro_batch
        return partial(dropout.keys, seed, step, size=size, device=self.device)

    def roll_back(self, step: int, ruling: Ruling) -> NoReturn:
        """Leave word for the next generation, and end."""
        self.checkpoints.finish()
        voted = any(finding.kind is Doubt.DIGEST for finding in ruling.findings)
        trusted, numbers = self.watch.doubt(step, voted=voted)
        self.checkpoints.doubt(step, trusted, numbers)
        self.report.event("rolled_back", step=step, trusted=trusted, why=ruling.why)
        raise RolledBack(f"step {step}: {ruling.why}; the newest step that is trusted is {trusted}")

    def save(self) -> None:
        """Begin to save this rank's part of the state; training goes on meanwhile."""
        self.control.phase(RankPhase.CHECKPOINT)
        if self.checkpoints.save(self.done, self.state, self.train_record(), self.fed):
            self.fed = {}
            self.control.saving(self.done)

    def stage(self) -> None:
        """Leave this rank's part of the state in the node's memory, for the case that a rank dies before the next save."""
        self.control.phase(RankPhase.CHECKPOINT)
        self.checkpoints.stage(self.done, self.state, self.train_record(), self.fed)
        self.fed = {}

    def validate(self, event: str) -> None:
        """Loss on text that is never trained on."""
        self.control.phase(RankPhase.EVALUATION)
        nats = validate(self.model, self.text, self.config.validation.sequences, self.device)
        self.report.event(event, step=self.done, val_nats_per_byte=nats)

    def train_record(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "step": self.done,
            "trained_s": round(self.checkpoints.trained_s, 3),
            "lives": self.checkpoints.lives,
            "cursor": self.order.cursor(self.done),
            "rng": {"kind": dropout.RNG, "seed": self.config.train.seed},
            "texts": self.text.fingerprints(),
            "context": self.text.context,
            "config": self.config.to_dict(),
        }

    def facts(self) -> dict[str, object]:
        """For whoever reads the log later."""
        return {
            "steps": self.config.train.steps,
            "world": self.env.world,
            "generation": self.checkpoints.generation,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "samples": sum(source.n for source in self.order.sources),
            "text": self.text.sha256[:16],
        }

    def tell(self, agreed: Agreed, seconds: float) -> None:
        """One line per step."""
        train = self.config.train
        self.report.step(
            step=self.done,
            loss=agreed.loss,
            grad_norm=agreed.grad_norm,
            tokens_per_s=round(train.batch * self.text.context / seconds),
            generation=self.checkpoints.generation,
            world=self.env.world,
            time_ms=_ms(seconds),
        )


def _order(config: Config, text: Corpus) -> Order:
    weights = {name: source.weight for name, source in config.data.sources.items()}
    try:
        return Order(text.sources(weights), config.train.lmb, config.train.seed)
    except FormatError as error:
        raise ConfigError(f"data.sources: {error}") from error


def _said(step: int, agreed: Agreed, ruling: Ruling) -> str:
    return f"step {step}: loss {agreed.loss}, gradient norm {agreed.grad_norm}: {ruling.why}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
