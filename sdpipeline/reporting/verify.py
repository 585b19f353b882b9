"""Verification of a picture: its marks, and a comparison with the records of the database."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

from sdpipeline import provenance
from sdpipeline.archives import contents
from sdpipeline.db import archives, audit, similar_images
from sdpipeline.db.audit import Event
from sdpipeline.db.connection import Database
from sdpipeline.db.event_reader import readable
from sdpipeline.db.similar_images import MAX_BITS, RecordedPicture
from sdpipeline.domain import Json
from sdpipeline.engine import Pixels
from sdpipeline.engine.quality import perceptual_distance, perceptual_hash
from sdpipeline.errors import InputImageError
from sdpipeline.provenance import LARGEST_PICTURE, ParentPicture, VerifiedPicture
from sdpipeline.storage import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Recorded picture that equals or resembles a given one: same ``file``, same ``pixels``, or similar appearance.

    ``distance`` is the number of bits, of 64, in which the perceptual hashes differ.
    """

    by: Literal["file", "pixels", "perceptual_hash"]
    distance: int
    picture: RecordedPicture

    def document(self) -> Json:
        """Return the match as part of ``verify --json``."""
        names = ("job", "campaign", "edition", "stage", "fingerprint", "sha256", "url", "deleted")
        own = {name: getattr(self.picture, name) for name in names}
        return {"by": self.by, "distance": self.distance} | own


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Marks of a picture and its match in the database; ``faults`` lists everything that does not hold."""

    name: str
    marks: VerifiedPicture
    match: Match | None
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if the picture is signed, marked and unchanged, and nothing in the database contradicts it."""
        return not self.faults

    def document(self) -> Json:
        """Return the document that ``verify --json`` prints."""
        marks = self.marks
        return {
            "file": self.name,
            "ok": self.ok,
            "c2pa": marks.c2pa,
            "digital_source_type": marks.digital_source_type,
            "signer": marks.signer,
            "signed_at": marks.signed_at,
            "development_key": marks.development_key,
            "parents": [_parent(each) for each in marks.parents],
            "known": self.match is not None,
            "match": self.match.document() if self.match else None,
            "faults": list(self.faults),
            "record": marks.record,
        }


@dataclass(slots=True)
class Register:
    """All pictures in a team's database and archives. Pictures that no index covers are read once, on first use."""

    database: Database
    store: ObjectStore
    team: str
    _rest: list[RecordedPicture] | None = field(default=None)

    def match(self, data: bytes, pixels: Pixels, record: Json | None = None) -> Match | None:
        """Find the recorded picture that matches; ``record`` is the signed record inside the file."""
        digest, looks = provenance.pixels_sha256(pixels), perceptual_hash(pixels)
        with self.database.read() as connection:
            same = similar_images.of_pixels(connection, team=self.team, pixels_sha256=digest)
            near = [] if same else similar_images.alike(connection, team=self.team, perceptual_hash=looks)
        found = _closest(near, looks)
        sha256 = hashlib.sha256(data).hexdigest()
        whole = next((each for each in same if each.sha256 == sha256), None)
        if whole is None and record is not None:
            whole = self._delivered(sha256, record)
        if whole is None and not same and found is None:
            same = [each for each in self._others() if each.pixels_sha256 == digest]
            whole = next((each for each in same if each.sha256 == sha256), None)
            found = _closest(self._others(), looks)
        if whole is None and not same:
            return found
        return Match(by="file" if whole else "pixels", distance=0, picture=whole or same[0])

    def is_known(self, data: bytes) -> bool:
        """Return True if the audit log names this very file, even if its picture was made again since."""
        sha256 = hashlib.sha256(data).hexdigest()
        with self.database.read() as connection:
            events = [event for _, event in readable(audit.holding(connection, sha256))]
        successes = [each for each in events if each["event"] in (Event.JOB_SUCCEEDED, Event.JOB_ADOPTED)]
        own = [each["image"] for each in successes if each["image"]["key"].startswith(f"{self.team}/")]
        return any(image["sha256"] == sha256 for image in own)

    def made(self, record: Json) -> list[RecordedPicture]:
        """Return the pictures recorded for the job that a record names."""
        with self.database.read() as connection:
            found = similar_images.of_fingerprint(connection, team=self.team, fingerprint=_fingerprint(record))
        return [each for each in found if each.identity == record.get("identity")]

    def _delivered(self, sha256: str, record: Json) -> RecordedPicture | None:
        """Find the recorded file with this digest.

        The same pixels may be in many files: one for each edition, byte copies of them, archived ones.
        """
        fingerprint = _fingerprint(record)
        with self.database.read() as connection:
            found = similar_images.of_fingerprint(connection, team=self.team, fingerprint=fingerprint, copies=True)
        here = next((each for each in found if each.sha256 == sha256), None)
        return here or next((each for each in self._others() if each.sha256 == sha256), None)

    def _others(self) -> list[RecordedPicture]:
        if self._rest is None:
            with self.database.read() as connection:
                self._rest = list(similar_images.without_index(connection, team=self.team))
                editions = archives.archives(connection, team=self.team)
            for row in editions:
                self._rest += similar_images.archived(
                    row, contents.jobs(self.store, row), contents.private(self.store, row)
                )
        return self._rest


def check(name: str, data: bytes, *, trust_anchors: str, register: Register | None) -> Checked:
    """Verify one picture; raises InputImageError for a file that is not a png, jpeg or webp picture.

    If ``trust_anchors`` are given, the signature has to chain to one of them.
    """
    marks = provenance.verify(data, trust_anchors=trust_anchors)
    faults = list(marks.faults)
    if trust_anchors and marks.c2pa == "valid":
        faults.append("signer.untrusted")
    match = None
    if register is not None and (pixels := _decoded(data)) is not None:
        match = register.match(data, pixels, marks.record if marks.c2pa in ("valid", "trusted") else None)
        against = _contradictions(marks, match, register, provenance.pixels_sha256(pixels))
        faults += [] if against and register.is_known(data) else against
    return Checked(name=name, marks=marks, match=match, faults=tuple(faults))


def _contradictions(marks: VerifiedPicture, match: Match | None, register: Register, pixels_sha256: str) -> list[str]:
    """Return contradictions between valid marks and the database: a stolen key can sign anything."""
    if marks.c2pa not in ("valid", "trusted") or (match and match.by == "file"):
        return []
    if match and match.by == "pixels":
        return [f"database.differs: job {match.picture.job} has these pixels in another file"]
    recorded = register.made(marks.record or {})
    if recorded and all(each.pixels_sha256 != pixels_sha256 for each in recorded):
        return [f"database.differs: job {recorded[0].job}, whose record it carries, has other pixels"]
    return []


def _fingerprint(record: Json) -> str:
    """Return the record's fingerprint, or an empty string: an untrusted value may be text that a database refuses."""
    found = str(record.get("fingerprint"))
    return found if re.fullmatch("[0-9a-f]{64}", found) else ""


def _decoded(data: bytes) -> Pixels | None:
    try:
        return provenance.decode(data, max_pixels=LARGEST_PICTURE)
    except InputImageError:
        return None


def _closest(near: list[RecordedPicture], looks: str) -> Match | None:
    measured = [
        (perceptual_distance(looks, each.perceptual_hash), each) for each in near if each.perceptual_hash is not None
    ]
    distance, picture = min(measured, key=lambda pair: pair[0], default=(64, None))
    if picture is None or distance > MAX_BITS:
        return None
    return Match(by="perceptual_hash", distance=distance, picture=picture)


def _parent(parent: ParentPicture) -> Json:
    record = parent.record or {}
    names = ("role", "relationship", "depth", "child", "manifest", "digital_source_type")
    own = {name: getattr(parent, name) for name in names}
    about = {name: record.get(name) for name in ("campaign", "stage", "seed", "fingerprint")}
    return own | about | {"faults": list(parent.faults)}
