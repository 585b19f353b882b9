"""Merkle trees of RFC 6962: one hash over many entries, and short proofs that an entry is among them.

Entries are whole byte strings. This module hashes them as leaves, so that an inner node can never pass for an entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of one entry; the prefix separates leaves from inner nodes."""
    return hashlib.sha256(b"\x00" + entry).digest()


class Tree:
    """Merkle tree that grows by one entry at a time and holds one hash for each of its levels."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []  # complete subtrees, left to right: one for each bit of the size

    def add(self, entry: bytes) -> None:
        """Append one entry."""
        node, rest = leaf_hash(entry), self.size
        while rest & 1:
            node = _node_hash(self._peaks.pop(), node)
            rest >>= 1
        self._peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the root over the entries added so far; more may follow."""
        if not self._peaks:
            return hashlib.sha256().digest()
        *left, node = self._peaks
        for peak in reversed(left):
            node = _node_hash(peak, node)
        return node


def root(entries: Iterable[bytes]) -> bytes:
    """Return the root over the entries in order, holding one hash for each level of the tree."""
    tree = Tree()
    for entry in entries:
        tree.add(entry)
    return tree.root()


def inclusion_proof(entries: Iterable[bytes], index: int) -> list[bytes]:
    """Return the sibling hashes from the entry at ``index`` up to the root, nearest first."""
    proof, position = [], index
    level = [leaf_hash(entry) for entry in entries]
    if not 0 <= index < len(level):
        raise IndexError(f"no entry {index} among {len(level)}")
    while len(level) > 1:
        if (sibling := position ^ 1) < len(level):
            proof.append(level[sibling])
        pairs = [_node_hash(*level[n : n + 2]) for n in range(0, len(level) - 1, 2)]
        # An odd last node has no sibling and moves up as it is.
        level, position = pairs + level[len(pairs) * 2 :], position // 2
    return proof


def verify_inclusion(entry: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Return True if ``entry`` is number ``index`` of the ``size`` entries under ``root``."""
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


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
