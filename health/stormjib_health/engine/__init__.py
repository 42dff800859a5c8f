"""The judge: samples of agents in, verdicts and questions out. Pure: no I/O, no clock, no randomness."""

from stormjib_health.engine.engine import Engine
from stormjib_health.engine.explain import explain
from stormjib_health.engine.report import Ask, Findings, Malformed, Place
from stormjib_health.engine.thresholds import DEFAULT, Thresholds

__all__ = ["DEFAULT", "Ask", "Engine", "Findings", "Malformed", "Place", "Thresholds", "explain"]
