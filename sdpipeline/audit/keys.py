"""The Ed25519 key that signs seals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock

from sdpipeline.errors import Mistake, SettingsError


@dataclass(frozen=True, slots=True)
class SealKey:
    """The Ed25519 key that signs seals."""

    private: Ed25519PrivateKey

    @property
    def public_hex(self) -> str:
        """The raw public key, hexadecimal."""
        encoding, form = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self.private.public_key().public_bytes(encoding, form).hex()

    def signed(self, body: str, signature: str) -> bool:
        """Whether this key made the signature."""
        try:
            self.private.public_key().verify(bytes.fromhex(signature), body.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


def load_key(path: Path, *, create: bool) -> SealKey:
    """Read a PEM file; ``create`` makes a development key where there is none."""
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
        message = f"{path} is no Ed25519 key"
        fix = "openssl genpkey -algorithm ed25519"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message=message, fix=fix))
    return SealKey(key)


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # Under another name first: whoever looks for the key finds all of it or nothing.
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(pem)
        unfinished.replace(path)
