"""What to do about a verdict: the first rule that matches. Pure.

The rules come from `spec.recovery.rules`; behind them stand `DEFAULT_RULES`, so that there is always an answer. Whatever
the rules say, a program's fault is never held against a node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.verdict import SURE, Action, Rule, Scope, Syndrome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_health.verdict import Verdict

_HANGS = (Syndrome.COMMUNICATION_HANG, Syndrome.NON_COMMUNICATION_HANG)
_SLOW = (Syndrome.COMMUNICATION_SLOW, Syndrome.NON_COMMUNICATION_SLOW)

DEFAULT_RULES = (
    # A hang that strikes the same node again is the node's; the first time a restart is cheaper than a new node.
    Rule(Action.ISOLATE, syndromes=_HANGS, scopes=(Scope.RANK, Scope.NODE), confirmed=True, strikes=2),
    Rule(Action.REPLACE, syndromes=(Syndrome.COMMUNICATION_HANG,), scopes=(Scope.NODE,), confirmed=True),
    Rule(Action.RESTART, syndromes=_HANGS),
    Rule(Action.ISOLATE, syndromes=(Syndrome.CORRUPTION,), scopes=(Scope.RANK, Scope.NODE)),
    # A restart costs seconds; a node at two thirds of its speed costs more within a minute.
    Rule(Action.REPLACE, syndromes=_SLOW, scopes=(Scope.RANK, Scope.NODE), confirmed=True, severity=1.5),
    # Which step is trusted stands on the storage: the ranks leave word there before they end.
    Rule(Action.RESTART, syndromes=(Syndrome.CORRUPTION, Syndrome.CRASH, Syndrome.DESYNC)),
)

_BLAMING = {Action.ISOLATE: Action.RESTART, Action.REPLACE: Action.RESTART, Action.SHRINK: Action.RESTART}


def act(verdict: Verdict, rules: Iterable[Rule], strikes: int) -> Action:
    """The action of the first rule that matches. `strikes`: verdicts so far that named the culprit's node, this one included.

    What is not sure is only noted; `health.hang` is the backstop of a hang that the engine cannot explain.
    """
    if verdict.confidence < SURE:
        return Action.NOTE
    matching = (rule.action for rule in (*rules, *DEFAULT_RULES) if matches(rule, verdict, strikes))
    action = next(matching, Action.NOTE)
    if verdict.software or not verdict.slots:
        return _BLAMING.get(action, action)
    return action


def matches(rule: Rule, verdict: Verdict, strikes: int) -> bool:
    """Whether a rule speaks of this verdict; an empty list means any."""
    return (
        (not rule.syndromes or verdict.syndrome in rule.syndromes)
        and (not rule.scopes or verdict.scope in rule.scopes)
        and (verdict.confirmed or not rule.confirmed)
        and verdict.severity >= rule.severity
        and strikes >= rule.strikes
    )


WEIGHT = 0.9
"""Records, verdict and checks of one job weigh at most so much: all of them are of its tenant's making."""
UNCONFIRMED = 0.6


def weight(verdict: Verdict) -> float:
    """How much a verdict weighs of the 1.0 that isolates a node; 0 for a program's fault."""
    if verdict.software or not verdict.slots:
        return 0.0
    return round((WEIGHT if verdict.confirmed else UNCONFIRMED) * min(1.0, max(0.0, verdict.confidence)), 3)
