"""Findings of ranks become a verdict only when enough others say so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stormjib_health.engine import Engine, Malformed, Place
from stormjib_health.verdict import Scope, Syndrome, Verdict
from stormjib_health.wire import Doubt, Finding, Sample

WORLD = 4


def told(*findings: Finding) -> list[Verdict]:
    """The verdicts of an engine that hears these findings, each from its rank's own slot."""
    engine = Engine([Place(rank, rank) for rank in range(WORLD)], now=0.0)
    for number, finding in enumerate(findings):
        sample = Sample(1, "job", finding.rank, 1, "1.1", number, 0.2, findings=(finding,))
        engine.observe(sample, 0.1)
    return [verdict for tick in range(5) for verdict in engine.tick(0.2 + tick / 10).verdicts]


def vote(rank: int, accused: int = 2, step: int = 40, kind: Doubt = Doubt.DIGEST) -> Finding:
    return Finding(rank, kind, step, accused, votes=3)


@pytest.mark.parametrize("kind", [Doubt.DIGEST, Doubt.REPLAY_DIFFERS])
def test_a_rank_that_two_others_accuse_is_named(kind: Doubt) -> None:
    (verdict,) = told(vote(0, kind=kind), vote(1, kind=kind))
    assert (verdict.syndrome, verdict.scope, verdict.culprits) == (Syndrome.CORRUPTION, Scope.RANK, (2,))
    assert verdict.confirmed
    assert "step 40" in verdict.sentence


def test_a_rank_that_accuses_alone_is_not_believed_nor_one_that_accuses_itself_beside_it() -> None:
    assert told(vote(2, accused=0)) == []
    assert told(vote(2, accused=0), vote(0, accused=0)) == []
    assert told(vote(2, accused=0), vote(3, accused=1)) == []


def test_replicas_that_differ_without_a_majority_name_nobody() -> None:
    (verdict,) = told(vote(0, accused=-1), vote(1, accused=-1))
    assert (verdict.scope, verdict.culprits, verdict.slots) == (Scope.JOB, (), ())


@pytest.mark.parametrize("kind", [Doubt.NORM, Doubt.NOT_FINITE, Doubt.SPIKE, Doubt.REPLAY_AGREES])
def test_a_doubt_is_no_proof(kind: Doubt) -> None:
    assert told(*(vote(rank, kind=kind) for rank in range(WORLD))) == []


def test_the_same_is_told_once() -> None:
    assert len(told(*(vote(rank) for rank in (0, 1, 3)))) == 1


@pytest.mark.parametrize(
    "rude", [replace(vote(0), rank=3), replace(vote(0), step=-5), replace(vote(0), step=1 << 60)]
)
def test_what_a_slot_cannot_say_is_refused(rude: Finding) -> None:
    engine = Engine([Place(rank, rank) for rank in range(WORLD)], now=0.0)
    with pytest.raises(Malformed):
        engine.observe(Sample(1, "job", 0, 1, "1.1", 1, 0.2, findings=(rude,)), 0.1)


def test_a_flood_of_claims_is_bounded() -> None:
    engine = Engine([Place(rank, rank) for rank in range(WORLD)], now=0.0)
    for number in range(100):
        findings = tuple(vote(0, step=number * 256 + i) for i in range(256))
        engine.observe(Sample(1, "job", 0, 1, "1.1", number, 0.2, findings=findings), 0.1 + number)
    assert engine.tick(101.0).verdicts == ()
