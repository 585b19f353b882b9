"""The audit log: its seals, and the verification of database, storage and seals against each other."""

from __future__ import annotations

from sdpipeline.audit.findings import Fault, Verification
from sdpipeline.audit.gaps import Gap, bridge, find_gap, lost_seals, refuse_restored
from sdpipeline.audit.keys import PublicKeys, SealKey, load_key, public_key
from sdpipeline.audit.seals import seal, unsealed, wait_for_seal, watch
from sdpipeline.audit.verification import verify

__all__ = [
    "Fault",
    "Gap",
    "PublicKeys",
    "SealKey",
    "Verification",
    "bridge",
    "find_gap",
    "load_key",
    "lost_seals",
    "public_key",
    "refuse_restored",
    "seal",
    "unsealed",
    "verify",
    "wait_for_seal",
    "watch",
]
