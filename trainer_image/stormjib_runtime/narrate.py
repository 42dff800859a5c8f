"""The coordinator's decisions as lines for people, and its state as Prometheus text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stormjib_health.verdict import Syndrome
from stormjib_runtime.orders import phase
from stormjib_runtime.state import Complete, Idle, Running, State, Suspended
from stormjib_runtime.wire import Cause, Fault, HistoryEntry, JobPhase, JobState, ResumePoint, Saving

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stormjib_health.verdict import Verdict
    from stormjib_runtime.saves import Saves
    from stormjib_runtime.watch import Watch


def describe(old: State, new: State, now: float) -> Iterator[str]:
    """One line for each thing that was decided or learned between two states."""
    yield from _agents(old, new)
    known = {entry.generation.id for entry in old.history}
    yield from (_begun(entry) for entry in new.history if entry.generation.id not in known)
    yield from (_found(one) for one in new.verdicts if one not in old.verdicts)
    if new.stage != old.stage:
        yield from _stage(old, new, now)


def _found(verdict: Verdict) -> str:
    who = " ".join(map(str, verdict.culprits)) or "nobody"
    sure = f"{verdict.confidence:.2f}{', confirmed' if verdict.confirmed else ''}"
    return f"verdict {verdict.id}: {verdict.syndrome}, {verdict.scope} {who} ({sure}): {verdict.sentence}"


def _agents(old: State, new: State) -> Iterator[str]:
    if old.agents is new.agents:
        return
    for slot, agent in new.agents.items():
        before = old.agents.get(slot)
        if before is None or before.report.agent != agent.report.agent:
            yield f"slot {slot}: agent {agent.report.agent} registered, {agent.report.address}"
        elif agent.report.leaving and not before.report.leaving:
            yield f"slot {slot}: agent {agent.report.agent} leaves"
        elif agent.lost_at is not None and before.lost_at is None:
            yield f"slot {slot}: connection of agent {agent.report.agent} lost"


def _begun(entry: HistoryEntry) -> str:
    generation = entry.generation
    slots = ",".join(str(member.slot) for member in generation.members)
    why = fault_words(entry.fault) if entry.fault else str(generation.cause)
    return f"generation {generation.id}: {why}; members {slots}{'; counted' if entry.counted else ''}"


def fault_words(fault: Fault) -> str:
    """`RankExit, slot 1 rank 2: exit -9`: the first line of the message only."""
    slot = f", slot {fault.slot}" if fault.slot is not None else ""
    rank = f" rank {fault.rank}" if fault.rank is not None else ""
    said = fault.message.partition("\n")[0]
    return f"{fault.cause}{slot}{rank}{': ' + said if said else ''}"


def _stage(old: State, new: State, now: float) -> Iterator[str]:
    stage = new.stage
    if isinstance(stage, Running):
        before = old.stage if isinstance(old.stage, Running) and old.current == new.current else None
        if before is None:
            verb = "adopted" if stage.adopted else "runs"
            yield f"generation {new.current} {verb}: resume {resume_words(stage.resume)}; store {stage.store or '?'}"
        if stage.stop is not None and (before is None or before.stop is None):
            yield f"generation {new.current} stops after step {stage.stop.stop_after}: {stage.stop.cause}"
    elif isinstance(stage, Complete):
        yield f"generation {new.current} is complete at step {new.step}"
    elif isinstance(stage, Suspended):
        yield f"suspended after generation {new.current}"
    elif isinstance(stage, Idle) and not isinstance(old.stage, Idle):
        yield f"generation {new.current} over: {_waiting(new, stage, now)}"


def _waiting(state: State, idle: Idle, now: float) -> str:
    why = fault_words(idle.fault) if idle.fault else str(idle.cause)
    word = phase(state, now)
    if word is JobPhase.EXHAUSTED:
        return f"{why}; no restart is left"
    return (
        f"{why}; next in {idle.not_before - now:.1f} s"
        if word is JobPhase.BACKOFF
        else f"{why}; waiting for agents"
    )


def resume_words(resume: ResumePoint | None) -> str:
    """`step 120 of 1.3`, or where to begin without one."""
    return f"step {resume.step} of {resume.generation}" if resume is not None else "from the beginning"


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics(state: JobState, begun: Mapping[Cause, int]) -> str:
    """Prometheus text format 0.0.4: counts, step, loss and phase; nothing that a tenant wrote."""
    generation = state.generation
    world = generation.world_size if generation else 0
    lines = [
        *_family("incarnation", "gauge", "Incarnation of the coordinator.", {"": state.incarnation}),
        *_family(
            "generation",
            "gauge",
            "Number of the generation.",
            {"": generation.id.number if generation else 0},
        ),
        *_family("step", "gauge", "Newest finished step.", {"": state.step}),
        *_family("world_size", "gauge", "Ranks of the generation.", {"": world}),
        *_family("phase", "gauge", "1 for the phase the job is in.", _phases(state.phase)),
        *_family("agents", "gauge", "Registered agents by phase.", _agent_counts(state)),
        *_family("restarts_total", "counter", "Generations begun by this process, by cause.", _causes(begun)),
    ]
    if state.loss is not None:
        lines += _family("loss", "gauge", "Newest loss that a rank wrote.", {"": state.loss})
    return "\n".join(lines) + "\n"


def health_metrics(watch: Watch) -> str:
    """What the health engine was told and what it found, as Prometheus text."""
    found = {f'{{syndrome="{one}"}}': watch.found.get(one, 0) for one in Syndrome}
    refused = {f'{{reason="{reason}"}}': count for reason, count in sorted(watch.refused.items())}
    lines = [
        *_family("verdicts_total", "counter", "Troubles found.", found, "health"),
        *_family("samples_total", "counter", "Samples taken.", {"": watch.accepted}, "health"),
        *_family("samples_refused_total", "counter", "Samples refused, by reason.", refused, "health"),
    ]
    return "\n".join(lines) + "\n"


def checkpoint_metrics(saves: Saves, now: float) -> str:
    """What saving costs the job and how far it has come, as Prometheus text; empty where nothing is saved."""
    lines: list[str] = []
    sums, step, age = saves.sums(), saves.step(), saves.age_s(now)
    if step is not None and age is not None:
        lines += _family("step", "gauge", "Newest committed step.", {"": step}, "checkpoint")
        lines += _family("age_seconds", "gauge", "Since it was committed.", {"": age}, "checkpoint")
    copied = saves.copied()
    if copied is not None:
        text = "Newest step that has copies in other nodes' memory."
        lines += _family("copied_step", "gauge", text, {"": copied}, "checkpoint")
    if sums is not None:
        lines += _saving(sums)
    return "".join(f"{line}\n" for line in lines)


def _saving(sums: Saving) -> Iterator[str]:
    part = "checkpoint"
    stages = {"call": sums.call_s, "wait": sums.wait_s, "staged": sums.staged_s, "durable": sums.durable_s}
    took = {f'{{stage="{stage}"}}': seconds for stage, seconds in stages.items()}
    yield from _family("saves_total", "counter", "Steps that became durable.", {"": sums.saves}, part)
    yield from _family(
        "failures_total", "counter", "Parts of steps that could not be saved.", {"": sums.failures}, part
    )
    yield from _family("bytes_total", "counter", "Bytes of durable parts.", {"": sums.bytes}, part)
    yield from _family(
        "lost_seconds_total", "counter", "Training time lost in calls and waits.", {"": sums.lost_s}, part
    )
    yield from _family("in_flight", "gauge", "Saves that are on their way.", {"": sums.in_flight}, part)
    yield from _family("duration_seconds", "gauge", "What the newest save took, by stage.", took, part)


def _family(name: str, kind: str, text: str, values: Mapping[str, float], part: str = "job") -> Iterator[str]:
    yield f"# HELP stormjib_{part}_{name} {text}"
    yield f"# TYPE stormjib_{part}_{name} {kind}"
    yield from (f"stormjib_{part}_{name}{labels} {value}" for labels, value in values.items())


def _phases(current: JobPhase) -> dict[str, float]:
    return {f'{{phase="{one}"}}': int(one is current) for one in JobPhase}


def _agent_counts(state: JobState) -> dict[str, float]:
    counts = Counter(view.phase for view in state.agents)
    return {f'{{state="{phase}"}}': count for phase, count in sorted(counts.items())}


def _causes(begun: Mapping[Cause, int]) -> dict[str, float]:
    return {f'{{cause="{cause}"}}': begun.get(cause, 0) for cause in Cause if cause is not Cause.START}
