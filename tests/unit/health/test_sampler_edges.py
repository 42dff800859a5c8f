"""Connections: changes since they were told, trouble, and who is told first."""

from __future__ import annotations

import pytest

from fakes.readings import connection
from stormjib_health.sampler.edges import MAX_EDGES, MIN_HEALTHY, STUCK_SAMPLES, Edges


def test_counts_are_since_a_connection_was_told() -> None:
    edges = Edges()
    edges.take(10.0, [(3, connection(7, sent=1000, received=500, busy_us=1000))])
    assert edges.edges(10.0, 0.2) == (), "what was before we looked is nobody's business"
    edges.take(10.2, [(3, connection(7, sent=1600, received=900, busy_us=41_000, retransmitted=100))])
    (edge,) = edges.edges(10.2, 0.2)
    assert (edge.rank, edge.local, edge.remote) == (3, "10.0.0.1:7", "10.0.0.2:5000")
    assert (edge.sent, edge.received, edge.retransmitted) == (600, 400, 100)
    assert edge.busy_s == pytest.approx(0.04)
    assert edge.over_s == pytest.approx(0.2)
    assert (edge.rtt_s, edge.rto_s, edge.last_ack_s) == (150e-6, 0.204, 0.003)
    assert edges.edges(10.2, 0.2)[0].sent == 600, "the coordinator did not take it"
    edges.told()
    edges.take(10.4, [(3, connection(7, sent=1610, received=900, busy_us=41_000, retransmitted=100))])
    assert [edge.sent for edge in edges.edges(10.4, 0.2)] == [10]


@pytest.mark.parametrize(
    "trouble",
    [
        {"backoff": 1},
        {"unacked": 3, "last_ack_ms": 700},
        {"retransmitted": 10},
        {"rtt_us": 30_000},
    ],
)
def test_trouble_is_told_although_nothing_moved(trouble: dict[str, int]) -> None:
    edges = Edges()
    edges.take(10.0, [(0, connection(7))])
    edges.take(10.2, [(0, connection(7, **trouble))])
    assert len(edges.edges(10.2, 0.2)) == 1


def test_what_cannot_leave_this_node_counts_as_in_flight_and_a_closed_window_does_not() -> None:
    edges = Edges()
    stuck = {"backoff": 2, "unsent": 96, "unacked": 0}
    edges.take(10.0, [(0, connection(7)), (0, connection(8))])
    edges.take(10.2, [(0, connection(7, window=65_535, **stuck)), (0, connection(8, window=0, **stuck))])
    assert {edge.local: edge.unacked for edge in edges.edges(10.2, 0.2)} == {"10.0.0.1:7": 1, "10.0.0.1:8": 0}


def test_a_rank_that_takes_nothing_for_three_samples_does_not_run() -> None:
    edges = Edges()
    for sample in range(1, STUCK_SAMPLES):
        edges.take(sample, [(0, connection(7, unread=96, received=96)), (1, connection(8))])
        assert edges.unread[0] == 0
    edges.take(9, [(0, connection(7, unread=96, received=96)), (1, connection(8))])
    assert (edges.unread[0], edges.unread[1]) == (1, 0)
    assert edges.edges(9, 0.2)[0].unread == 96
    edges.take(10, [(0, connection(7, unread=96, received=192)), (1, connection(8))])
    assert edges.unread[0] == 0, "as much lies there, but other bytes"


def test_a_timer_that_expired_is_its_ranks() -> None:
    edges = Edges()
    edges.take(10.0, [(0, connection(7)), (1, connection(8, backoff=2))])
    assert edges.backing_off == {1}


def test_healthy_ones_are_told_in_turn_and_trouble_first() -> None:
    edges = Edges()
    count = 3 * MIN_HEALTHY
    edges.take(0.0, [(0, connection(inode)) for inode in range(1, count + 1)])
    seen: list[str] = []
    for sample in range(1, 4):
        now = sample / 5
        edges.take(now, [(0, connection(inode, sent=sample * inode)) for inode in range(1, count + 1)])
        told = edges.edges(now, 0.2)
        assert len(told) == MIN_HEALTHY
        seen += [edge.local for edge in told]
        edges.told()
    assert len(set(seen)) == count
    edges.take(
        1.0, [(0, connection(inode, sent=99 * inode, backoff=inode == 5)) for inode in range(1, count + 1)]
    )
    told = edges.edges(1.0, 0.2)
    assert told[0].local == "10.0.0.1:5"
    assert len(told) == 1 + MIN_HEALTHY


def test_a_rare_sample_tells_of_all_and_never_of_more_than_fit() -> None:
    edges = Edges()
    edges.take(0.0, [(0, connection(inode)) for inode in range(1, 201)])
    edges.take(9.0, [(0, connection(inode, sent=inode)) for inode in range(1, 201)])
    assert [edge.sent for edge in edges.edges(9.0, 9.0)] == list(range(200, 200 - MAX_EDGES, -1))
    edges.take(9.0, [(0, connection(inode, backoff=inode)) for inode in range(1, 201)])
    assert [edge.backoff for edge in edges.edges(9.0, 9.0)] == list(range(200, 200 - MAX_EDGES, -1))


def test_an_inode_that_was_reused_is_another_connection() -> None:
    edges = Edges()
    edges.take(0.0, [(0, connection(7, sent=1_000_000))])
    other = connection(9, sent=50)._replace(inode=7)
    edges.take(0.2, [(0, other)])
    assert edges.edges(0.2, 0.2) == ()
    edges.take(0.4, [(0, other._replace(sent=60))])
    assert [edge.sent for edge in edges.edges(0.4, 0.2)] == [10]
    edges.take(0.6, [])
    edges.told()
    assert edges.edges(0.6, 0.2) == ()
