"""Merkle roots and proofs against the published vectors and against RFC 6962's own recursive definition."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdpipeline.merkle import inclusion_proof, leaf_hash, root, verify_inclusion

# The entries and roots with which the reference implementations of Certificate Transparency test themselves.
ENTRIES = [
    bytes.fromhex(entry)
    for entry in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

some_entries = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


def test_no_entries_have_the_hash_of_nothing_as_root() -> None:
    assert root([]) == hashlib.sha256().digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert root(ENTRIES[:size]).hex() == ROOTS[size - 1]


def test_a_proof_is_the_published_one() -> None:
    assert [node.hex() for node in inclusion_proof(ENTRIES, 0)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]


@given(some_entries)
def test_the_streamed_root_is_the_recursive_definition(entries: list[bytes]) -> None:
    assert root(iter(entries)) == _root_by_definition(entries)


@given(some_entries, st.data())
def test_every_entry_is_proved(entries: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    proof = inclusion_proof(entries, index)
    assert verify_inclusion(entries[index], index=index, size=len(entries), proof=proof, root=root(entries))


@given(some_entries, st.binary(max_size=8), st.data())
def test_nothing_else_is_proved(entries: list[bytes], other: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    proof = inclusion_proof(entries, index)
    proved = verify_inclusion(other, index=index, size=len(entries), proof=proof, root=root(entries))
    assert proved == (other == entries[index])


def test_a_proof_holds_for_its_own_place_and_length_only() -> None:
    proof, whole = inclusion_proof(ENTRIES, 5), root(ENTRIES)
    for index, length in itertools.product(range(-1, 9), range(5)):
        padded = (proof + [b""] * 2)[:length]
        proved = verify_inclusion(ENTRIES[5], index=index, size=8, proof=padded, root=whole)
        assert proved == (index == 5 and length == 3)


def test_an_inner_node_is_not_an_entry() -> None:
    inner = leaf_hash(ENTRIES[0]) + leaf_hash(ENTRIES[1])
    assert root([inner]) != root(ENTRIES[:2])


def test_a_proof_beyond_the_entries_is_refused() -> None:
    with pytest.raises(IndexError, match="no entry 8 among 8"):
        inclusion_proof(ENTRIES, 8)


def _root_by_definition(entries: list[bytes]) -> bytes:
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1 << ((len(entries) - 1).bit_length() - 1)
    return hashlib.sha256(
        b"\x01" + _root_by_definition(entries[:split]) + _root_by_definition(entries[split:])
    ).digest()


def test_no_example_of_a_property_has_a_deadline() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
