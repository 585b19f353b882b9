"""Keys that seal the audit log and sign pictures, and the development keys of the embedded default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from sdpipeline import audit
from sdpipeline.errors import Mistake, SettingsError
from sdpipeline.provenance import signing
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.settings import Settings


def seal_key(settings: Settings) -> audit.SealKey:
    """Return the key that seals the audit log; the embedded default gets a development key next to its database."""
    path = settings.signing.seal_key_file
    if path is None and settings.signing.seal_public_key_file is not None:
        fix = "run this on the machine that seals; SDP_SIGNING__SEAL_PUBLIC_KEY_FILE only checks seals"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message="is not set", fix=fix))
    if path is None and not settings.embedded:
        fix = "set it to an Ed25519 key: openssl genpkey -algorithm ed25519 -out seal.pem"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message="is not set", fix=fix))
    retired = tuple(settings.signing.retired_seal_keys)
    with _development_keys(settings):
        return audit.load_key(path or development_seal_key(settings), create=path is None, retired=retired)


def trusted_seal_keys(settings: Settings) -> audit.SealKey | audit.PublicKeys:
    """Return the keys whose seals are trusted: the seal key's own, or its public half if another process seals."""
    path = settings.signing.seal_public_key_file
    if path is None:
        return seal_key(settings)
    own = audit.public_key(str(path), setting="SDP_SIGNING__SEAL_PUBLIC_KEY_FILE")
    return audit.PublicKeys((own, *settings.signing.retired_seal_keys))


def development_seal_key(settings: Settings) -> Path:
    """Return the path of the seal key that the embedded default creates."""
    return settings.home / "keys" / "development-seal.pem"


def picture_key(settings: Settings) -> SigningKey:
    """Return the key that signs pictures; the embedded default gets a development key next to its database."""
    own = settings.signing
    if own.certificates_file is None and settings.embedded and not (own.key_file or own.kms_key_id):
        with _development_keys(settings):
            return replace(signing.development_key(development_picture_keys(settings)), tsa_url=own.tsa_url)
    if own.certificates_file is None:
        fix = "set it to the PEM file with your signing certificate and its intermediates"
        raise SettingsError(Mistake(key="SDP_SIGNING__CERTIFICATES_FILE", message="is not set", fix=fix))
    if (own.key_file is None) == (own.kms_key_id is None):
        message = "set exactly one of SDP_SIGNING__KEY_FILE and SDP_SIGNING__KMS_KEY_ID"
        raise SettingsError(
            Mistake(key="SDP_SIGNING__KEY_FILE", message=message, fix="set the one with your private key")
        )
    if own.key_file is not None:
        password = own.key_password.get_secret_value() if own.key_password else None
        return signing.pem_key(own.certificates_file, own.key_file, password=password, tsa_url=own.tsa_url)
    if find_spec("boto3") is None:
        fix = "pip install 'sdpipeline[s3]'"
        raise SettingsError(Mistake(key="SDP_SIGNING__KMS_KEY_ID", message="a key in a KMS needs boto3", fix=fix))
    return signing.kms_key(
        own.certificates_file,
        own.kms_key_id or "",
        endpoint_url=own.kms_endpoint_url,
        region=own.kms_region,
        tsa_url=own.tsa_url,
    )


def development_picture_keys(settings: Settings) -> Path:
    """Return the folder of the certificate chain that the embedded default creates."""
    return settings.home / "keys" / "pictures"


def trust_anchors(settings: Settings) -> str:
    """Return the root certificates (PEM) that make a signature trusted; empty if none are configured."""
    return signing.trusted_roots(settings.signing.trust_file) if settings.signing.trust_file else ""


@contextmanager
def _development_keys(settings: Settings) -> Iterator[None]:
    """Raise SettingsError if a key cannot be written in the home."""
    try:
        yield
    except OSError as error:
        message = f"cannot make a development key in {settings.home / 'keys'}: {error.strerror}"
        fix = "set SDP_HOME to a writable folder on a disk with free space"
        raise SettingsError(Mistake(key="SDP_HOME", message=message, fix=fix)) from error
