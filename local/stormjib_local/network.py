"""The cluster's network: a switch in a namespace of its own, and one cable from it to each host and to this machine.

A port of the switch is called after what hangs on it. On the machine there is only one interface, so that no firewall
rule of the machine's own (Docker's, for one) stands between two nodes.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from stormjib_local.addresses import MAX_NODES, Addresses
from stormjib_local.errors import LocalError
from stormjib_local.layout import CONTROL, SWITCH, Layout
from stormjib_local.processes import run, wait_until

_MACHINE = "machine"


def routes() -> list[IPv4Network]:
    """What this machine routes already."""
    found = json.loads(run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    networks = [entry["dst"] for entry in found if entry["dst"] != "default"]
    return [IPv4Network(network, strict=False) for network in networks]


def namespaces(layout: Layout) -> list[str]:
    """The cluster's network namespaces that exist."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"{layout.netns_prefix}*")) if folder.exists() else []


def inodes(layout: Layout) -> set[int]:
    """By these the kernel knows them; a namespace that is no longer mounted has none."""
    return {Path("/run/netns", name).stat().st_ino for name in namespaces(layout)}


def create_switch(layout: Layout, addresses: Addresses) -> None:
    """The switch and the machine's cable to it."""
    name = layout.netns(SWITCH)
    if name in namespaces(layout) and addresses.link in _links():
        return
    remove(layout)
    run("ip", "netns", "add", name)
    run(
        "ip",
        "-n",
        name,
        "-batch",
        "-",
        stdin="link add name bridge type bridge\nlink set dev bridge up\nlink set lo up\n",
    )
    run("ip", "link", "add", addresses.link, "type", "veth", "peer", "name", _MACHINE, "netns", name)
    run("ip", "link", "set", addresses.link, "alias", f"stormjib-{layout.name}")
    run("ip", "-n", name, "link", "set", _MACHINE, "master", "bridge", "up")
    run("ip", "address", "add", f"{addresses.machine}/{addresses.switch.prefixlen}", "dev", addresses.link)
    run("ip", "link", "set", addresses.link, "up")
    run("ip", "route", "add", str(addresses.pods), "via", str(addresses.control))


def plug_in(layout: Layout, addresses: Addresses, host: str, number: int) -> None:
    """A host's namespace and its cable, plugged in; `number` is the node's, 0 for the control plane."""
    name = layout.netns(host)
    if name in namespaces(layout):
        set_port(layout, host, up=True)
        return
    switch = layout.netns(SWITCH)
    run("ip", "netns", "add", name)
    run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", host, "netns", switch)
    run("ip", "-n", switch, "link", "set", host, "master", "bridge", "up")
    run("ip", "-n", name, "-batch", "-", stdin=_host_batch(addresses, number))
    # Settings below net/ are those of the namespace one is in. `ip netns exec` would mount a fresh /sys besides.
    run("nsenter", f"--net=/run/netns/{name}", "tee", "/proc/sys/net/ipv4/ip_forward", stdin="1\n")


def _host_batch(addresses: Addresses, number: int) -> str:
    own: IPv4Address = addresses.node(number) if number else addresses.control
    lines = [
        "link set lo up",
        f"address add {own}/{addresses.switch.prefixlen} dev eth0",
        "link set eth0 up",
    ]
    if number:
        lines.append(f"route add default via {addresses.control}")
    # Routes to nodes that may come later cost nothing, and a host need not be told when they do.
    lines += [
        f"route add {addresses.pods_of(other)} via {addresses.node(other)}"
        for other in range(1, MAX_NODES + 1)
        if other != number
    ]
    return "\n".join(lines) + "\n"


def set_port(layout: Layout, host: str, *, up: bool) -> None:
    """Pull a host's cable, or plug it in again."""
    switch = layout.netns(SWITCH)
    if host != CONTROL and layout.netns(host) not in namespaces(layout):
        raise LocalError(f"{host} has no power: `stormjib local node start {host}` first")
    run("ip", "-n", switch, "link", "set", host, "up" if up else "down")


def port_up(layout: Layout, host: str) -> bool:
    """Is a host's cable in?"""
    found = run("ip", "-n", layout.netns(SWITCH), "-json", "link", "show", host, check=False)
    return any("UP" in link.get("flags", ()) for link in json.loads(found or "[]"))


def unplug(layout: Layout, host: str) -> None:
    """Remove a host's namespace with all that is in it; nobody may be in it."""
    if layout.netns(host) in namespaces(layout):
        # At once, because the namespace itself is taken apart by the kernel when it finds time.
        run("ip", "-n", layout.netns(SWITCH), "link", "delete", host, check=False)
        run("ip", "netns", "delete", layout.netns(host))


def remove(layout: Layout) -> None:
    """Remove the whole network; nobody may be in it."""
    alias = f"stormjib-{layout.name}"
    for link, text in _links().items():
        if text == alias:
            run("ip", "link", "delete", link, check=False)
    for name in namespaces(layout):
        run("ip", "netns", "delete", name)
    wait_until("removing the network", 20, lambda: alias not in _links().values())


def _links() -> dict[str, str]:
    return {
        link["ifname"]: link.get("ifalias", "") for link in json.loads(run("ip", "-json", "link") or "[]")
    }
