"""Ed25519 keys of seals: the signing key and the trusted public keys."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock

from sdpipeline.audit.findings import UNREADABLE
from sdpipeline.errors import Mistake, SettingsError

_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


@dataclass(frozen=True, slots=True)
class SealKey:
    """The Ed25519 key that signs seals, and the raw public keys of its predecessors, in hexadecimal."""

    private: Ed25519PrivateKey
    retired: tuple[str, ...] = ()

    @property
    def public_hex(self) -> str:
        """The raw public key, in hexadecimal."""
        return self.private.public_key().public_bytes(*_RAW).hex()

    @property
    def public(self) -> tuple[str, ...]:
        """All trusted public keys in hexadecimal, this one first."""
        return self.public_hex, *self.retired

    def sign(self, body: str) -> str:
        """Return the signature, in hexadecimal."""
        return self.private.sign(body.encode()).hex()

    def signed(self, body: str, signature: str) -> bool:
        """Return True if this key or one of its predecessors made the signature."""
        return signer(body) in self.public and is_signed(body, signature)


def signer(body: str) -> str:
    """Return the public key that a signed statement names as its own; empty if it names none."""
    try:
        return str(json.loads(body)["public_key"])
    except UNREADABLE:
        return ""


def is_signed(body: str, signature: str) -> bool:
    """Return True if the key that a statement names made the signature."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer(body)))
        key.verify(bytes.fromhex(signature), body.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """Public keys for a verifier that does not sign."""

    public: tuple[str, ...]


@dataclass(slots=True)
class Succession:
    """The keys of a chain of seals in order: a key may not return once another has signed."""

    signers: dict[str, int] = field(default_factory=dict)
    _now: str = ""

    def fault(self, body: str, signature: str, trusted: tuple[str, ...] | None) -> tuple[str, str] | None:
        """Check the next seal's signature; return kind and detail of a fault. ``trusted=None`` accepts any key."""
        key = signer(body)
        if trusted is not None and key and key not in trusted:
            return "seal-key-unknown", f"it is signed by {key[:16]}, which is not a trusted key"
        if not is_signed(body, signature):
            return "seal-invalid", "its signature was not made with the key that it names"
        if key != self._now and key in self.signers:
            return "seal-key-unknown", f"it is signed by {key[:16]}, a key that was replaced before"
        self._now = key
        self.signers[key] = self.signers.get(key, 0) + 1
        return None


def load_key(path: Path, *, create: bool, retired: tuple[str, ...] = ()) -> SealKey:
    """Read a PEM file; ``create`` makes a development key if the file does not exist."""
    if not path.is_file():
        if not create:
            fix = "write an Ed25519 key there: openssl genpkey -algorithm ed25519"
            raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=f"no key at {path}", fix=fix))
        _create_key(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, OSError) as error:
        fix = "openssl genpkey -algorithm ed25519, without a pass phrase"
        message = f"{path} cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=message, fix=fix)) from error
    if not isinstance(key, Ed25519PrivateKey):
        message = f"{path} is not an Ed25519 key"
        fix = "openssl genpkey -algorithm ed25519"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=message, fix=fix))
    return SealKey(key, retired)


def public_key(given: str, *, setting: str = "--key") -> str:
    """Read a public key from 64 hexadecimal digits or a PEM file; raises SettingsError for anything else."""
    if re.fullmatch("[0-9a-fA-F]{64}", given):
        return given.lower()
    try:
        key = serialization.load_pem_public_key(Path(given).read_bytes())
    except (ValueError, UnsupportedAlgorithm, OSError) as error:
        fix = "give the output of `openssl pkey -in seal.pem -pubout`, or the key that audit export prints"
        message = f"{given} is neither 64 hexadecimal digits nor a file with a public key"
        raise SettingsError(Mistake(key=setting, message=message, fix=fix)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(Mistake(key=setting, message=f"{given} is not an Ed25519 key"))
    return key.public_bytes(*_RAW).hex()


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # Write under another name first, so that a reader finds the whole key or none.
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(pem)
        unfinished.replace(path)
