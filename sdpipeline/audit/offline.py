"""Offline verification of an export, from the file and the trusted keys alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from sdpipeline.audit.authority import Authors
from sdpipeline.audit.export import END, FORMAT, HEAD, SEAL
from sdpipeline.audit.findings import UNREADABLE, Verification
from sdpipeline.audit.keys import Succession, is_signed, signer
from sdpipeline.audit.replay import GAP
from sdpipeline.audit.seals import digest, ranges, size
from sdpipeline.db.audit import GENESIS, Event
from sdpipeline.db.event_reader import read_event
from sdpipeline.domain import Json
from sdpipeline.errors import BadInputError
from sdpipeline.merkle import Tree

LONGEST_LINE = 16 * 2**20
"""Limit in bytes: a seal over 100,000 events of as many processes has about 5 MB."""


def verify_export(lines: Iterable[bytes], *, trusted: tuple[str, ...] | None = None) -> Verification:
    """Check every chain, every seal and the end of an export, line by line.

    Memory grows with the number of processes that wrote events, not with the number of events. ``trusted`` are the
    public keys whose seals are accepted. None accepts any key, for callers that compare the key afterwards. Raises
    BadInputError if the file is not an export.
    """
    return _Reading(trusted).read(lines)


class _Reading:
    """State of reading an export: the head of every chain, and the seal whose events come next."""

    def __init__(self, trusted: tuple[str, ...] | None) -> None:
        self.found = Verification()
        self._trusted = trusted
        self._keys = Succession(self.found.signers)
        self._chains: dict[str, tuple[int, str]] = {}
        self._authors = Authors()
        self._seal: Json | None = None
        self._tree = Tree()
        self._left = 0
        self._number = 0
        self._previous = GENESIS
        self._empty: list[int] = []
        self._lost: list[range] = []
        self._hash = hashlib.sha256()
        self._ended = False

    def read(self, lines: Iterable[bytes]) -> Verification:
        """Read and check the whole file."""
        for number, line in enumerate(lines):
            if len(line) > LONGEST_LINE:
                raise BadInputError(
                    f"this is not a {FORMAT} file: line {number + 1} is longer than {LONGEST_LINE:,} bytes"
                )
            if self._ended:
                self.found.fault("export-altered", f"line:{number + 1}", "it comes after the end")
            elif not number:
                self._head(line)
            elif line.startswith(SEAL):
                self._begin_seal(line)
            elif line.startswith(END):
                self._end(line)
            else:
                self._event(line.rstrip(b"\n"))
            self._hash.update(line)
        if not self._ended:
            self._close_seal()
            self.found.fault("export-cut", "end", "the file has no signed end: its last lines are missing")
        for subject in self._authors.foreign():
            self.found.fault("event-forged", subject, "the process that owns its chain did not write it")
        for number in self._empty:
            if not any(number in each for each in self._lost):
                self.found.fault(
                    "sealed-events-altered", f"seal:{number}", "none of the events it covers is in the file"
                )
        return self.found

    def _head(self, line: bytes) -> None:
        try:
            known = line.startswith(HEAD) and json.loads(line)["export"]["format"] == FORMAT
        except UNREADABLE:
            known = False
        if not known:
            raise BadInputError(f"this is not a {FORMAT} file (write one with sdpipeline audit export)")

    def _event(self, body: bytes) -> None:
        found = self.found
        found.events += 1
        self._follow(body)
        if not self._left:
            found.unsealed += 1
            return
        self._tree.add(body)
        self._left -= 1
        if not self._left:
            self._close_seal()

    def _follow(self, body: bytes) -> None:
        """Compare an event with the one before it in its chain."""
        found = self.found
        try:
            event = read_event(body)
            writer, seq, prev = event["writer"], event["seq"], event["prev"]
            expected, head = self._chains.get(writer, (0, GENESIS))
            if seq != expected:
                subject = f"event:{writer}/{seq}"
                found.fault("event-missing", subject, f"expected number {expected} of this chain")
            elif prev != head:
                subject = f"event:{writer}/{seq}"
                found.fault("chain-broken", subject, "it does not continue the event before it")
            self._chains[writer] = seq + 1, hashlib.sha256(body).hexdigest()
            for detail in self._authors.faults(event):
                found.fault("event-forged", f"event:{writer}/{seq}", detail)
            if event["event"] == Event.AUDIT_GAP:
                found.gaps.append({name: event[name] for name in GAP})
                # An unsealed gap event excuses nothing: an attacker who cut the log could have written it.
                self._lost += [range(event["first_seal"], event["last_seal"] + 1)] if self._left else []
        except UNREADABLE:
            found.fault("event-altered", f"event:{found.events}", "it is not an event written by this program")

    def _begin_seal(self, line: bytes) -> None:
        self._close_seal()
        found = self.found
        found.seals += 1
        subject = f"seal:{self._number + 1}"
        try:
            given = json.loads(line)["seal"]
            body, signature = str(given["body"]), str(given["signature"])
            seal = json.loads(body)
            number, own = seal["number"], digest(body)
            continues = (number, seal["prev"]) == (self._number + 1, self._previous)
            events = size(ranges(seal))
            if type(number) is not int or type(events) is not int:
                raise TypeError
        except UNREADABLE:
            found.fault("seal-invalid", subject, "it is not a seal written by this program")
            return
        if wrong := self._keys.fault(body, signature, self._trusted):
            found.fault(wrong[0], subject, wrong[1])
        if not continues:
            found.fault("seal-missing", subject, "it does not continue the seal before it")
        self._previous, self._number, self._seal = own, number, seal
        self._tree, self._left = Tree(), events

    def _close_seal(self) -> None:
        """Compare the events since the last seal with what it signed."""
        seal, self._seal = self._seal, None
        if seal is None:
            return
        subject, missing = f"seal:{seal['number']}", self._left
        self._left = 0
        covered = ranges(seal)
        if missing == size(covered):
            self._empty.append(seal["number"])
        elif missing:
            self.found.fault("sealed-events-altered", subject, f"{missing} of the events it covers are missing")
        elif self._tree.root().hex() != seal.get("merkle_root") or not all(map(self._stands_at, covered)):
            detail = "the events it covers differ from those that were sealed"
            self.found.fault("sealed-events-altered", subject, detail)

    def _stands_at(self, covered: tuple[str, int, int]) -> bool:
        writer, _, last = covered
        return self._chains.get(writer, (0, GENESIS))[0] == last + 1

    def _end(self, line: bytes) -> None:
        self._close_seal()
        self._ended = True
        found = self.found
        try:
            given = json.loads(line)["end"]
            body, signature = str(given["body"]), str(given["signature"])
            end = json.loads(body)
            counts = end["events"], end["seals"], end["last_seal"], end["sha256"]
        except UNREADABLE:
            found.fault("export-altered", "end", "it is not an end written by this program")
            return
        if self._trusted is not None and signer(body) not in self._trusted:
            found.fault("seal-key-unknown", "end", f"it is signed by {signer(body)[:16]}, which is not a trusted key")
        elif not is_signed(body, signature):
            found.fault("export-altered", "end", "its signature was not made with the key that it names")
        if counts != (found.events, found.seals, self._previous, self._hash.hexdigest()):
            found.fault("export-altered", "end", f"the file was written with {counts[0]} events and {counts[1]} seals")
