"""Which action follows from a verdict: rules in order, defaults behind them, and never a node for a program's fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_health.policy import DEFAULT_RULES, WEIGHT, act, weight
from stormjib_health.verdict import Action, Rule, Scope, Syndrome, Verdict

FROZEN = Verdict(1, Syndrome.NON_COMMUNICATION_HANG, Scope.RANK, (5,), (2,), 0.95, confirmed=True)
SLOW = Verdict(1, Syndrome.NON_COMMUNICATION_SLOW, Scope.RANK, (5,), (2,), 0.9, confirmed=True, severity=1.6)
BLAMING = (Action.REPLACE, Action.ISOLATE, Action.SHRINK)


@pytest.mark.parametrize(
    ("verdict", "strikes", "action"),
    [
        (FROZEN, 1, Action.RESTART),
        (FROZEN, 2, Action.ISOLATE),
        (replace(FROZEN, confirmed=False), 2, Action.RESTART),
        (replace(FROZEN, software=True), 9, Action.RESTART),
        (Verdict(1, Syndrome.COMMUNICATION_HANG, Scope.NODE, (2,), (2,), 0.9, True), 1, Action.REPLACE),
        (Verdict(1, Syndrome.COMMUNICATION_HANG, Scope.LINK, (1, 5), (0, 2), 0.9, True), 1, Action.RESTART),
        (Verdict(1, Syndrome.COMMUNICATION_HANG, Scope.JOB, confidence=0.3), 0, Action.NOTE),
        (SLOW, 1, Action.REPLACE),
        (replace(SLOW, severity=1.2), 1, Action.NOTE),
        (replace(SLOW, confirmed=False), 1, Action.NOTE),
        (replace(FROZEN, confidence=0.5), 5, Action.NOTE),
        (Verdict(1, Syndrome.CORRUPTION, Scope.RANK, (5,), (2,), 0.9), 1, Action.ISOLATE),
        (Verdict(1, Syndrome.CORRUPTION, Scope.JOB, confidence=0.7), 0, Action.RESTART),
        (Verdict(1, Syndrome.DESYNC, Scope.RANK, (5,), (2,), 0.9, True, software=True), 3, Action.RESTART),
        (Verdict(1, Syndrome.CONGESTION, Scope.JOB, severity=9.0), 0, Action.NOTE),
        (Verdict(1, Syndrome.IMBALANCE, Scope.JOB, severity=9.0), 0, Action.NOTE),
    ],
)
def test_defaults(verdict: Verdict, strikes: int, action: Action) -> None:
    assert act(verdict, (), strikes) is action


def test_the_first_rule_that_matches_wins() -> None:
    rules = (
        Rule(Action.FAIL, syndromes=(Syndrome.CORRUPTION,)),
        Rule(Action.NOTE, scopes=(Scope.RANK,)),
        Rule(Action.ISOLATE),
    )
    assert act(FROZEN, rules, 5) is Action.NOTE
    assert act(Verdict(1, Syndrome.CORRUPTION, Scope.RANK, (1,), (0,), 0.9), rules, 1) is Action.FAIL
    assert (
        act(Verdict(1, Syndrome.COMMUNICATION_HANG, Scope.NODE, (0,), (0,), 0.9), rules, 1) is Action.ISOLATE
    )


VERDICTS = st.builds(
    Verdict,
    id=st.integers(1, 9),
    syndrome=st.sampled_from(Syndrome),
    scope=st.sampled_from(Scope),
    culprits=st.just((1,)),
    slots=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    confidence=st.floats(0, 1),
    confirmed=st.booleans(),
    software=st.booleans(),
    severity=st.floats(0.5, 10),
)
RULES = st.lists(
    st.builds(
        Rule,
        st.sampled_from(Action),
        syndromes=st.lists(st.sampled_from(Syndrome), max_size=2).map(tuple),
        confirmed=st.booleans(),
        strikes=st.integers(0, 3),
    ),
    max_size=4,
)


@given(VERDICTS, RULES, st.integers(0, 5))
def test_nobody_is_blamed_for_a_program(verdict: Verdict, rules: list[Rule], strikes: int) -> None:
    action = act(verdict, rules, strikes)
    if verdict.software or not verdict.slots:
        assert action not in BLAMING
        assert weight(verdict) == 0
    assert 0 <= weight(verdict) <= WEIGHT


def test_slow_everywhere_or_elsewhere_each_step_never_acts() -> None:
    for syndrome in (Syndrome.CONGESTION, Syndrome.IMBALANCE):
        assert not any(syndrome in rule.syndromes or not rule.syndromes for rule in DEFAULT_RULES)
