"""Metrics of the isolator. No label holds a node's name: nodes come and go, and a counter's series stay."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

NODES = Gauge("stormjib_isolation_nodes", "NodeIsolations, by the state of their node.", ["state"])
TURNS = Counter(
    "stormjib_isolation_turns_total", "Changes of state, by the reason of their event.", ["reason"]
)
PREFLIGHTS = Counter("stormjib_isolation_preflights_total", "Preflights that ended, by how.", ["outcome"])
BREAKER = Gauge("stormjib_isolation_breaker_open", "1 while a human has to look before any node is isolated.")
NODE_WRITES_FAILED = Counter(
    "stormjib_isolation_node_writes_failed_total", "Writes to nodes that the API server did not take."
)
PASSES = Counter("stormjib_isolation_passes_total", "Passes of the isolator, by how they ended.", ["result"])
