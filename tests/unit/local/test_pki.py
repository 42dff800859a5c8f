"""Certificates: who is who in the API, and that a second `up` keeps them."""

from __future__ import annotations

import base64
import stat
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID

from stormjib_local import pki
from stormjib_local.addresses import Addresses
from stormjib_local.control_plane import ControlPlane
from stormjib_local.layout import Layout
from stormjib_local.node import Node

if TYPE_CHECKING:
    from pathlib import Path


def _written(root: Path) -> Layout:
    layout, addresses = Layout("unit", root), Addresses(2)
    control = ControlPlane(layout, addresses)
    control.write_credentials()
    Node(layout, addresses, 1).write_credentials(control)
    return layout


def _user(kubeconfig: Path) -> tuple[str, list[str]]:
    document: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    data = base64.b64decode(document["users"][0]["user"]["client-certificate-data"])
    subject = x509.load_pem_x509_certificate(data).subject
    names = [str(value.value) for value in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = [str(value.value) for value in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    return names[0], groups


def test_each_component_has_its_own_name_and_only_the_administrator_is_one(tmp_path: Path) -> None:
    layout = _written(tmp_path)
    assert _user(layout.kubeconfig) == ("admin", ["system:masters"])
    assert _user(layout.credential("node-1")) == ("system:node:node-1", ["system:nodes"])
    assert _user(layout.credential("node-1-proxy")) == ("system:kube-proxy", [])
    assert _user(layout.credential("kube-scheduler")) == ("system:kube-scheduler", [])
    assert _user(layout.credential("provisioner")) == ("local.stormjib.io:provisioner", [])


def test_servers_are_known_by_their_addresses_and_signed_by_the_authority(tmp_path: Path) -> None:
    layout = _written(tmp_path)
    authority = x509.load_pem_x509_certificate((layout.pki / "ca.crt").read_bytes())
    for name, address in (
        ("apiserver", "10.80.2.254"),
        ("apiserver", "10.96.0.1"),
        ("node-1-serving", "10.80.2.1"),
    ):
        served = x509.load_pem_x509_certificate((layout.pki / f"{name}.crt").read_bytes())
        served.verify_directly_issued_by(authority)
        alternatives = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert IPv4Address(address) in alternatives.get_values_for_type(x509.IPAddress)


def test_a_second_up_changes_no_key(tmp_path: Path) -> None:
    layout = _written(tmp_path)
    before = {path: path.read_bytes() for path in layout.state.rglob("*") if path.is_file()}
    _written(tmp_path)
    assert {path: path.read_bytes() for path in layout.state.rglob("*") if path.is_file()} == before


def test_keys_are_for_root_only(tmp_path: Path) -> None:
    layout = _written(tmp_path)
    assert stat.S_IMODE(layout.pki.stat().st_mode) == 0o700
    secret = [*layout.pki.glob("*.key"), *layout.state.rglob("*.conf")]
    assert secret
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secret)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    pki.write(target, b"one")
    pki.write(target, b"two", 0o644)
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["file"]
