"""Every fault of the catalogue, injected for real into a ring of processes on nodes of their own: it fires, and it heals."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.lab import cleaning
from bench.lab.network import Network, namespaces
from fakes.light_lab import NODES, light_network, ring_in, until
from stormjib_fault import proc, shell
from stormjib_fault.catalogue import FAULTS, make
from stormjib_fault.cgroups import Cgroup
from stormjib_fault.words import Draw, NotFired, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

SEVERITY = {
    "pause": 0.3,
    "checkpoint": 0.2,
    "evaluation": 0.2,
    "one-saves": 0.2,
    "compile": 0.2,
    "first-step": 0.2,
}
DEADLY = {"kill", "abort", "segfault", "out-of-memory", "raise", "loader-hang", "hold-gil"}
"""The victim does not live on, and so the ring does not."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with light_network() as one:
        yield one


def left_behind(network: Network) -> list[str]:
    """Cgroups, packet rules and queues that nobody removed."""
    left = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{network.name}-*")]
    for slot in range(NODES):
        rules = shell.inside(network.node(slot), "iptables", "-S").splitlines()
        left += [rule for rule in rules if rule.startswith("-A")]
        kinds = shell.tc(network.node(slot), "qdisc", "show", "dev", "eth0")
        left += [] if kinds.split()[1:2] in ([], ["noqueue"]) else [kinds]
    return left


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "skewed-clocks"])
def test_a_fault_fires_and_heals(name: str, network: Network, tmp_path: Path) -> None:
    with ring_in(network, tmp_path) as ring:
        ring.start_ranks()
        draw = FAULTS[name].drawn(7, NODES)
        world = ring.world()
        fault = make(world, replace(draw, severity=SEVERITY.get(name, draw.severity)))
        truth = fault.truth()
        assert truth.harmless or (truth.answers and (truth.slots or truth.software))
        fault.arm()
        if name in ("loss-node", "loss-link"):
            assert fault.fired() == ""
        fault.inject()
        assert fault.prove(8)
        fault.heal()
        fault.heal()
        if name not in DEADLY:
            ring.wait_steps(5)
        assert left_behind(network) == []


def test_a_stopped_victim_stops_the_ring_and_goes_on_when_healed(network: Network, tmp_path: Path) -> None:
    with ring_in(network, tmp_path) as ring:
        ring.start_ranks()
        fault = make(ring.world(), Draw("stop", 1))
        fault.arm()
        fault.inject()
        fault.prove()
        stood = ring.steps()
        assert proc.state(ring.ranks[1].pid) == "T"
        until(lambda: all(proc.state(one.pid) in "TS" for one in ring.ranks))
        assert ring.steps() <= stood + 2
        fault.heal()
        ring.wait_steps(5)


def test_what_did_not_fire_is_said(network: Network, tmp_path: Path) -> None:
    with ring_in(network, tmp_path) as ring:
        ring.start_ranks()
        fault = make(ring.world(), Draw("kill", 1))
        fault.arm()
        with pytest.raises(NotFired, match=r"kill: nothing shows it after 0\.2 s"):
            fault.prove(0.2)


def test_in_a_pod_ranks_are_found_and_what_needs_more_rights_is_refused(
    network: Network, tmp_path: Path
) -> None:
    with ring_in(network, tmp_path) as ring:
        ring.start_ranks()
        pod = replace(ring.world(), laboratory=None)
        with pytest.raises(Refused, match="exec in a pod may not"):
            make(pod, Draw("link-down", 0)).arm()
        victim = ring.ranks[2].pid
        env = {**os.environ, "STORMJIB_FAULT_DIR": str(tmp_path)}
        argv = [sys.executable, "-m", "stormjib_fault", "inject"]
        done = subprocess.run(
            [*argv, "raise", "--rank", "2"], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert '"culprits": [2]' in done.stdout
        until(lambda: not proc.alive(victim))
        done = subprocess.run(
            [*argv, "node-tx", "--rank", "0"], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "needs rights that a job's pod does not have" in done.stderr


def test_clean_removes_what_a_killed_laboratory_left(tmp_path: Path) -> None:
    script = (
        "import os, signal, subprocess\n"
        "from bench.lab import cleaning\n"
        "from bench.lab.network import PREFIX, Network\n"
        "from stormjib_fault.cgroups import Cgroup\n"
        "n = Network(f'{PREFIX}k{os.getpid()}', 1); folder = cleaning.root() / n.name; folder.mkdir()\n"
        "held = cleaning.lock(folder); n.create()\n"
        "p = subprocess.Popen(['nsenter', f'--net=/run/netns/{n.node(0)}', 'sleep', '600'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "g = Cgroup('freezer', f'{n.name}-freezer'); g.take(p.pid); g.write('freezer.state' if g.version == 1 else "
        "'cgroup.freeze', 'FROZEN' if g.version == 1 else '1')\n"
        "print(n.name, p.pid, cleaning.stale().count(n.name), flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    name, pid, held = done.stdout.split()
    assert held == "0", "a living laboratory is nobody's to clean"
    assert proc.alive(int(pid))
    assert name in cleaning.stale()
    done = subprocess.run(
        [sys.executable, "-m", "bench.lab", "clean"], capture_output=True, text=True, check=True
    )
    assert f"removed {name}" in done.stdout
    assert namespaces(name) == []
    assert not proc.alive(int(pid))
    assert not (cleaning.root() / name).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{name}-*"))


def test_a_cgroup_is_removed_though_processes_were_born_in_it() -> None:
    script = "read x; sleep 600 & echo $!; read x; kill $!"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        group = Cgroup("freezer", f"sjtest-{os.getpid()}")
        group.take(parent.pid)
        print(file=parent.stdin, flush=True)
        born = parent.stdout.readline().strip()
        assert born in group.read("cgroup.procs").split()
        group.remove()
        assert not group.path.exists()
        assert proc.alive(int(born))
        parent.communicate("\n", timeout=10)
