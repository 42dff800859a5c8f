"""Faults of links and nodes: cut, flapping, shaped, lossy. Only inside the namespaces that a laboratory made."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

from stormjib_fault import shell, words
from stormjib_fault.fault import Fault
from stormjib_fault.words import FaultError, Truth

if TYPE_CHECKING:
    from stormjib_fault.world import Place

DEVICE = "eth0"
BURST = "16kb"
QUEUE = "500ms"
"""Packets that would wait longer are dropped, as a real switch does."""
COMMENT = "stormjib-fault"
WHOLE = 65535
"""Segments that a virtual cable takes at once, as the kernel has it by default."""


class Rules(Fault):
    """Packet filter rules: (namespace, chain and match)."""

    laboratory = True
    target: ClassVar[tuple[str, ...]] = ("-j", "DROP")

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        """What to match, and where."""
        raise NotImplementedError

    def arm(self) -> None:
        self.world.lab(self.name)
        self._rules = self.rules()
        self._set: list[tuple[str, tuple[str, ...]]] = []

    def inject(self) -> None:
        for netns, match in self._rules:
            iptables(netns, "-I", match, self.target)
            self._set.append((netns, match))

    def heal(self) -> None:
        for netns, match in getattr(self, "_set", ()):
            iptables(netns, "-D", match, self.target)
        self._set = []

    def fired(self) -> str:
        packets = sum(dropped(netns) for netns in {netns for netns, _ in self._set})
        return f"the rules dropped {packets} packets" if packets else ""


def iptables(netns: str, do: str, match: tuple[str, ...], target: tuple[str, ...]) -> None:
    """Insert (`-I`) or delete (`-D`) one rule; `match` begins with the chain."""
    chain, *rest = match
    note = ("-m", "comment", "--comment", COMMENT)
    shell.inside(netns, "iptables", "-w", do, chain, *rest, *note, *target)


def dropped(netns: str) -> int:
    """Packets that rules of ours have matched."""
    lines = shell.inside(netns, "iptables", "-w", "-nvxL").splitlines()
    return sum(int(line.split()[0]) for line in lines if COMMENT in line)


class OneWay(Rules):
    """Nothing goes from victim to peer any more; not even acknowledgements."""

    name, row = "link-one-way", "F7"

    def truth(self) -> Truth:
        return self.link_truth(words.COMMUNICATION_HANG)

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(self.victim.netns, ("OUTPUT", "-d", self.peer.address))]


class BothWays(OneWay):
    """Nothing goes between two nodes any more."""

    name = "link-both-ways"

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        return [*super().rules(), (self.peer.netns, ("OUTPUT", "-d", self.victim.address))]


class Partition(Rules):
    """A node reaches the coordinator and no other node (row 18)."""

    name, row = "node-partition", "F8"

    def truth(self) -> Truth:
        return self.node_truth(words.COMMUNICATION_HANG)

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        peers = sorted({p.address for p in self.world.ranks if p.slot != self.victim.slot})
        return [(self.victim.netns, (c, f, a)) for a in peers for c, f in (("OUTPUT", "-d"), ("INPUT", "-s"))]


class LossIn(Rules):
    """Packets to a node are lost with the probability `severity`.

    They are packets as a wire has them: the switch cuts the 64 KiB pieces in which virtual cables hand data on. Between two
    ranks alone so few pass that a loss either slows nothing or stops everything.
    """

    name, row, severities, least_ranks = "loss-node", "F11", (0.05, 0.1), 4

    def truth(self) -> Truth:
        return self.node_truth(words.COMMUNICATION_SLOW)

    @property
    def receiver(self) -> Place:
        """Whose packets are lost."""
        return self.victim

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(self.receiver.netns, ("INPUT", *self.source(), *_chance(self.draw.severity)))]

    def source(self) -> tuple[str, ...]:
        """From whom they come."""
        return ()

    def inject(self) -> None:
        self._pieces(1)
        super().inject()

    def heal(self) -> None:
        super().heal()
        if hasattr(self, "_rules"):
            self._pieces(WHOLE)

    def _pieces(self, segments: int) -> None:
        switch, port = self.world.lab(self.name).switch, self.receiver.port
        shell.run("ip", "-n", switch, "link", "set", "dev", port, "gso_max_segs", str(segments))


class LossLink(LossIn):
    """Packets from victim to peer are lost with the probability `severity`."""

    name, downstream = "loss-link", True

    def truth(self) -> Truth:
        return self.link_truth(words.COMMUNICATION_SLOW)

    @property
    def receiver(self) -> Place:
        return self.peer

    def source(self) -> tuple[str, ...]:
        return ("-s", self.victim.address)


def _chance(probability: float) -> tuple[str, ...]:
    return ("-m", "statistic", "--mode", "random", "--probability", f"{probability:.4f}")


class LinkDown(Fault):
    """A node's cable is pulled."""

    name, row, laboratory = "link-down", "F8", True

    def truth(self) -> Truth:
        return self.node_truth(words.COMMUNICATION_HANG)

    def arm(self) -> None:
        self._switch, self._port = self.world.lab(self.name).switch, self.victim.port

    def inject(self) -> None:
        self.set(up=False)

    def heal(self) -> None:
        if hasattr(self, "_port"):
            self.set(up=True)

    def fired(self) -> str:
        return "" if "UP" in shell.link(self._switch, self._port)["flags"] else f"port {self._port} is down"

    def set(self, *, up: bool) -> None:
        """Pull the cable, or plug it in."""
        shell.run("ip", "-n", self._switch, "link", "set", self._port, "up" if up else "down")


class Flapping(LinkDown):
    """Down for half a second, up for two, again and again: row 17, to be seen and borne, hence among those of F13."""

    name, row = "link-flap", "F13"
    DOWN_S: ClassVar[float] = 0.5
    UP_S: ClassVar[float] = 2.0

    def truth(self) -> Truth:
        """Nobody need be named; whoever is named must be this node, or a link of it."""
        slot = self.victim.slot
        others = {place.slot for place in self.world.ranks} - {slot}
        links = (words.Answer(words.LINK, tuple(sorted((slot, other)))) for other in sorted(others))
        named = (words.Answer(words.NODE, (slot,)), *links)
        return Truth(words.NONE, words.JOB, answers=named, slots=(slot,))

    def arm(self) -> None:
        super().arm()
        self._over, self._downs = threading.Event(), 0
        self._thread = threading.Thread(target=self._drive, daemon=True)

    def inject(self) -> None:
        self._thread.start()

    def heal(self) -> None:
        if hasattr(self, "_thread") and self._thread.ident is not None:
            self._over.set()
            self._thread.join()
        super().heal()

    def fired(self) -> str:
        return f"port {self._port} went down {self._downs} times" if self._downs else ""

    def _drive(self) -> None:
        while not self._over.is_set():
            self.set(up=False)
            self._downs += 1
            self._over.wait(self.DOWN_S)
            self.set(up=True)
            self._over.wait(self.UP_S)


class Shaped(Fault):
    """A queue that lets data through so slowly that a step takes `severity` times as long."""

    laboratory = True
    severities = (1.3, 3.0)

    def places(self) -> list[tuple[str, str]]:
        """(namespace, device) to be shaped."""
        raise NotImplementedError

    @property
    def rate(self) -> str:
        """What makes the bytes of a step take the extra time."""
        traffic = self.world.traffic
        seconds = (self.draw.severity - 1) * traffic.step_s
        return f"{max(1, int(traffic.bytes_per_step * 8 / seconds / 1000))}kbit"

    def arm(self) -> None:
        self._places = self.places()
        self._set: list[tuple[str, str]] = []
        self._overlimits: dict[tuple[str, str], int] = {}

    def inject(self) -> None:
        for netns, device in self._places:
            self._set.append((netns, device))
            self.shape(netns, device)

    def shape(self, netns: str, device: str) -> None:
        """Put the queue in."""
        shell.tc(
            netns, *f"qdisc add dev {device} root tbf rate {self.rate} burst {BURST} latency {QUEUE}".split()
        )

    def heal(self) -> None:
        for netns, device in getattr(self, "_set", ()):
            if shell.queue(netns, device).get("kind") not in (None, "noqueue"):
                shell.tc(netns, "qdisc", "del", "dev", device, "root")
        self._set = []

    def fired(self) -> str:
        late = sum(int(shell.queue(*place).get("overlimits", 0)) for place in self._set)
        return f"the queues held {late} packets back" if late else ""


class SlowSender(Shaped):
    """A node sends slowly."""

    name, row = "node-tx", "F9"

    def truth(self) -> Truth:
        return self.node_truth(words.COMMUNICATION_SLOW)

    def places(self) -> list[tuple[str, str]]:
        return [(self.victim.netns, DEVICE)]


class SlowReceiver(SlowSender):
    """A node receives slowly: its port of the switch is shaped."""

    name = "node-rx"

    def places(self) -> list[tuple[str, str]]:
        return [(self.world.lab(self.name).switch, self.victim.port)]


class SlowLink(Shaped):
    """One link is slow: what goes from victim to peer, and nothing else."""

    name, row, downstream = "link-rate", "F10", True

    def truth(self) -> Truth:
        return self.link_truth(words.COMMUNICATION_SLOW)

    def places(self) -> list[tuple[str, str]]:
        return [(self.victim.netns, DEVICE)]

    def shape(self, netns: str, device: str) -> None:
        for words_ in (
            f"qdisc add dev {device} root handle 1: htb default 2",
            f"class add dev {device} parent 1: classid 1:1 htb rate {self.rate} burst {BURST}",
            f"class add dev {device} parent 1: classid 1:2 htb rate 10gbit burst 1mb quantum 60000",
            f"filter add dev {device} parent 1: protocol ip u32 match ip dst {self.peer.address}/32 flowid 1:1",
        ):
            shell.tc(netns, *words_.split())


class Congestion(Shaped):
    """Every node sends slowly: nobody in particular is to be blamed."""

    name, row = "congestion", "F13"

    def truth(self) -> Truth:
        return self.nobody(words.CONGESTION)

    def places(self) -> list[tuple[str, str]]:
        return sorted({(place.netns, DEVICE) for place in self.world.ranks})


class CongestedSwitch(Congestion):
    """Every port of the switch is slow."""

    name = "congested-switch"

    def places(self) -> list[tuple[str, str]]:
        switch = self.world.lab(self.name).switch
        return sorted({(switch, place.port) for place in self.world.ranks})


def remove_all(netns: str) -> None:
    """Forget every rule and queue of a namespace, as a laboratory does between two trials that failed."""
    for chain in ("INPUT", "OUTPUT"):
        shell.inside(netns, "iptables", "-w", "-F", chain)
    try:
        shell.tc(netns, "qdisc", "del", "dev", DEVICE, "root")
    except FaultError:
        return  # there is none
