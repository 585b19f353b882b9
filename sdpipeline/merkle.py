"""Merkle trees of RFC 6962: one hash over many entries, and short proofs that an entry is among them.

Entries are whole byte strings: hashing them as leaves happens in here, so that an inner node can
never be passed off as an entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def leaf_hash(entry: bytes) -> bytes:
    """The hash of one entry; the prefix keeps leaves and inner nodes apart."""
    return hashlib.sha256(b"\x00" + entry).digest()


def root(entries: Iterable[bytes]) -> bytes:
    """The root over the entries in order, holding one hash for each level of the tree."""
    peaks: list[tuple[int, bytes]] = []  # complete subtrees, left to right, with their heights
    for entry in entries:
        height, node = 0, leaf_hash(entry)
        while peaks and peaks[-1][0] == height:
            node = _node_hash(peaks.pop()[1], node)
            height += 1
        peaks.append((height, node))
    return _bag([node for _, node in peaks])


def inclusion_proof(entries: Sequence[bytes], index: int) -> list[bytes]:
    """The sibling hashes that lead from the entry at ``index`` up to the root, nearest first."""
    if not 0 <= index < len(entries):
        raise IndexError(f"no entry {index} among {len(entries)}")
    proof = []
    level, position = [leaf_hash(entry) for entry in entries], index
    while len(level) > 1:
        if (sibling := position ^ 1) < len(level):
            proof.append(level[sibling])
        pairs = [_node_hash(*level[n : n + 2]) for n in range(0, len(level) - 1, 2)]
        # An odd last node has no sibling and moves up as it is.
        level, position = pairs + level[len(pairs) * 2 :], position // 2
    return proof


def verify_inclusion(entry: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``entry`` is number ``index`` of the ``size`` entries under ``root``."""
    if not 0 <= index < size:
        return False
    node, position, last, rest = leaf_hash(entry), index, size - 1, list(proof)
    while last:
        if position % 2 or position < last:
            if not rest:
                return False
            sibling = rest.pop(0)
            node = _node_hash(sibling, node) if position % 2 else _node_hash(node, sibling)
        position, last = position // 2, last // 2
    return not rest and node == root


def _bag(peaks: list[bytes]) -> bytes:
    if not peaks:
        return hashlib.sha256().digest()
    node = peaks.pop()
    while peaks:
        node = _node_hash(peaks.pop(), node)
    return node


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
