"""Every number that the engine judges by, with its reason. Tuned on simulated traces of seeds below 1000 only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Times in seconds, ratios without a unit."""

    # --- what is normal ---
    warm_up_steps: int = 5
    """First steps compile, allocate and connect: they are no baseline, and nothing in them is a fault."""
    baseline_steps: int = 30
    """Below this many steps median and MAD say nothing: no slow verdict, and a patient hang rule."""
    keep_steps: int = 128
    """What is normal may drift over minutes (longer sequences), so older steps are forgotten."""

    # --- hang ---
    hang_floor_s: float = 1.0
    """Pauses of a healthy rank (garbage collection, a slow write) stay below; twice this is the promise of 2 s."""
    hang_factor: float = 3.0
    hang_mads: float = 8.0
    """A wait of 3 x the usual one, and beyond 8 MAD: both, so that neither a tiny nor a noisy baseline alarms."""
    hang_steps: float = 1.5
    """A wait shorter than this many steps may be one slow step."""
    hang_unsure_s: float = 5.0
    """Least patience without a baseline (a new coordinator in the middle of a job); the less, the more of one there is."""
    hang_stepless_s: float = 60.0
    """Least patience with a script that never marks a step: its long phases are not known."""
    busy_factor: float = 3.0
    """A rank that burns CPU while others wait may yet arrive: it is given this much more time."""
    silent_factor: float = 3.0
    """A rank whose agent is silent is known by what others miss only: it is given this much more time."""
    ticks: int = 2
    """Looks in a row that must agree before anyone is named."""
    edge_silent_s: float = 0.5
    """No acknowledgement for longer, with data in flight: beyond any healthy round trip and delayed ack (0.2 s)."""
    edge_rtos: float = 3.0
    edge_lasting_s: float = 0.4
    """Two samples: a segment sent on a long idle connection looks unacknowledged for one round trip."""

    # --- who is heard ---
    blink_s: float = 2.0
    """No call of the engine for longer: this process was stopped, and every age that it holds is too old."""
    fresh_s: float = 1.0
    fresh_intervals: float = 4.0
    """Not heard for longer than both: silent. Three samples may be lost in a row."""

    # --- crash ---
    settle_s: float = 0.1
    """Two ranks may die of one cause: the reports of both are awaited. Agents see an exit within this time."""
    victims_s: float = 0.3
    """Ranks that report a lost peer die 0.1 s after it, and may be heard first."""
    gone_intervals: float = 1.5
    """Between two samples: an agent that has been silent for longer, while others report exits, is gone itself."""

    # --- slow ---
    cusum_slack: float = 0.05
    """Half of ln 1.1: drifts below it never add up."""
    cusum_limit: float = 0.26
    """ln 1.15 reaches it in 3 steps, one step of any length does not (`cusum_clip`)."""
    cusum_clip: float = 0.3
    slow_ratio: float = 1.09
    """Median of the last four steps over the baseline: half-way between nothing and the 1.15 that must be found."""
    slow_mads: float = 3.0
    act_ratio: float = 1.5
    """A verdict is repeated when the slowdown crosses this."""
    ended_ratio: float = 1.06
    """Below it for `ended_steps`: over."""
    ended_steps: int = 8
    give_up_steps: int = 60
    """A slowdown that nothing explains for so long is how the job runs now: a new baseline."""
    late_part: float = 0.4
    """Of the lost time that one rank's lateness must explain. Not more, because only a few calls are timed."""
    late_lead: float = 2.0
    """Times the second latest rank."""
    late_share: float = 0.75
    """Of the calls in which the culprit was last."""
    late_least: float = 0.2
    """Of the lost time a step, that the last rank of a call must be late for the call to count: else it is noise."""
    late_chance: float = 0.016
    """That a rank drawn anew each step is last so often: else it is imbalance. 7 of 7 of two ranks come to 1/64."""
    hint_chance: float = 0.063
    """The same for a verdict with a confidence below `act_confidence`: 5 of 5 of two ranks come to 1/16."""
    act_confidence: float = 0.6
    """Below it a verdict is for people to read, not to act on: it may still be taken back."""
    late_steps: int = 5
    """And never fewer than so many: of eight ranks three in a row would do."""
    own_ratio: float = 1.1
    """Own work now over before."""
    noises: float = 3.0
    """Times the usual deviation, that lateness or own work must have grown: on a shared core both come and go."""
    own_lead: float = 3.0
    """Times the next rank's growth: others' work does not grow because one rank's does."""
    own_part: float = 0.07
    """Of the lost time that its grown work must come to. Not more, because most of a step is not timed."""
    throttled_least: float = 0.05
    """Of the time, that the processor must be refused more often than usual."""
    queued_part: float = 0.5
    """Of what a rank is late, that it must have waited for a processor longer than the others: that explains it."""
    queued_s: float = 30.0
    """So long that may be a burst of other work on its node, which ends by itself; then its node is too busy to keep."""
    rotating_share: float = 0.6
    rotating_steps: int = 24
    """Whose latest rank holds less than this share over so many steps is imbalanced."""
    patience_steps: int = 3
    """Steps that lateness gets to gather before connections are blamed."""

    # --- connections ---
    edge_samples: int = 10
    hot_ratio: float = 1.3
    """Time per byte over the edge's own baseline, and over what became of all edges of its class."""
    comm_ratio: float = 1.2
    """Steps over their baseline below which no connection is looked for: between noise and the 1.3 that must be found."""
    hot_part: float = 0.3
    """Of the lost time that a connection must be busy longer, and its bursts show: else it does not explain the slowdown."""
    node_part: float = 0.7
    """Of the heat that touches one node: the node, not the fabric."""
    crowd: float = 0.3
    """More hot edges than this, not explained by one node: congestion."""

    # --- checks ---
    check_limit_s: float = 1.0
    check_slack_s: float = 1.0
    """Way of a question and its answer: two samples each, and a loss."""
    reach_limit_s: float = 0.35
    """Of a burst where something stands. A path that works takes a few milliseconds, and the promise is 2 s for all."""
    reach_slack_s: float = 0.5
    """A sample each way."""
    burst_ratio: float = 1.5
    """Least time of a bad burst over the best one's. They compete with each other and with the training's own traffic; what
    slows a step by a third slows its connection by more."""
    burst_again: int = 5
    """Segments of a burst that were sent again: 1 % of them."""
    ping_ratio: float = 3.0
    ping_more_s: float = 0.0005
    crowd_ratio: float = 3.0
    """Median time of the bursts that are not slow beside the others, over what bursts took while all was well: all are slow."""
    sweeps: int = 4
    """Rounds of bursts that follow each other at once, until two agree: the first may come before the slowdown is whole."""
    sweep_steps: int = 4
    """From a round that named nobody to the next; twice as many each time."""
    compute_ratio: float = 1.3
    """Repeated runs of one product on a healthy device differ by less than a tenth, beside a neighbour on the same core by more."""


DEFAULT = Thresholds()
"""What ships."""
