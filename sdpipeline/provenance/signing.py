"""Signing keys: certificate chains, and signing with private keys in files or AWS KMS."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from sdpipeline.aws import explained, library_errors, make_client
from sdpipeline.errors import SettingsError, SigningUnavailableError

DEVELOPMENT = "sdpipeline DEVELOPMENT KEY"
DEVELOPMENT_IDENTITY = "a development key, which nobody trusts"
"""Organization in every development certificate, so that readers of a signature recognize it."""

_LIFETIME = timedelta(days=3650)
_PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """Certificate chain in PEM (signing certificate first, root left out) and its ``sign`` function.

    ``sign`` takes the data, not a digest. It may be called from several threads, and raises
    SigningUnavailableError. ``algorithm`` is the COSE name of the signature algorithm. With ``tsa_url``, an RFC 3161
    authority confirms the time, so that the signature outlives its certificate.
    """

    certificates: str
    algorithm: str
    sign: Callable[[bytes], bytes]
    tsa_url: str | None = None

    @property
    def development(self) -> bool:
        """True if this program made the key, so that its signature identifies no one."""
        return any(each.value == DEVELOPMENT for each in self._names(NameOID.ORGANIZATION_NAME))

    @property
    def identity(self) -> str:
        """Name of the signer, for display: the certificate's names and its end date."""
        if self.development:
            return DEVELOPMENT_IDENTITY
        names = [
            str(each.value) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME) for each in self._names(oid)
        ]
        return f"{', '.join(names)} ({self.algorithm}, until {self._leaf.not_valid_after_utc:%Y-%m-%d})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the signing certificate, hexadecimal."""
        return self._leaf.fingerprint(hashes.SHA256()).hex()

    @property
    def _leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates(self.certificates.encode())[0]

    def _names(self, oid: x509.ObjectIdentifier) -> list[x509.NameAttribute[str | bytes]]:
        return self._leaf.subject.get_attributes_for_oid(oid)


def development_key(folder: Path) -> SigningKey:
    """Return the key in ``folder``; create it on first use, with a chain that ends in ``development_root``."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "key.pem").exists():
            _make_development_chain(folder)
    return pem_key(folder / "chain.pem", folder / "key.pem")


def development_root(folder: Path) -> str:
    """Return the root certificate of that key, in PEM."""
    return (folder / "root.pem").read_text()


def trusted_roots(path: Path) -> str:
    """Return the certificates in a PEM file; raises SettingsError if it has none."""
    pem = _read(path)
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise SettingsError(f"{path} holds no certificates in PEM: {error}") from error
    return pem.decode()


def pem_key(
    certificates: Path, private_key: Path, *, password: str | None = None, tsa_url: str | None = None
) -> SigningKey:
    """Load a key from files; raises SettingsError for anything that readers of the pictures would reject."""
    chain = _read(certificates)
    try:
        key = serialization.load_pem_private_key(_read(private_key), password.encode() if password else None)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{private_key} is not a private key in PEM that this password opens: {error}") from error
    leaf = _checked_chain(chain, certificates)[0]
    if not isinstance(key, _PrivateKey) or key.public_key() != leaf.public_key():
        raise SettingsError(f"{private_key} is not the key of the first certificate in {certificates}")
    algorithm = _algorithm(leaf.public_key(), certificates)
    return SigningKey(certificates=chain.decode(), algorithm=algorithm, sign=_signs_with(key), tsa_url=tsa_url)


def kms_key(
    certificates: Path,
    key_id: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    tsa_url: str | None = None,
) -> SigningKey:
    """Return a key that never leaves AWS KMS.

    Credentials come from boto3's own chain, and are fetched again if KMS refuses them.
    """
    chain = _read(certificates)
    algorithm = _algorithm(_checked_chain(chain, certificates)[0].public_key(), certificates)
    if algorithm not in _KMS_ALGORITHMS:
        raise SettingsError(f"{certificates}: KMS does not sign with {algorithm}; use a key on P-256, P-384 or RSA")
    try:
        client = make_client("kms", endpoint_url=endpoint_url, region_name=region)
    except library_errors() as error:
        raise SettingsError(f"KMS key {key_id}: {explained(error)}") from error
    kms_algorithm, digest = _KMS_ALGORITHMS[algorithm]

    def sign(data: bytes) -> bytes:
        # KMS hashes messages of up to 4,096 bytes itself; a long certificate chain exceeds that.
        message = {"Message": data} if len(data) <= 4096 else {"Message": digest(data), "MessageType": "DIGEST"}
        try:
            answer = client.sign(KeyId=key_id, SigningAlgorithm=kms_algorithm, **message)
        except library_errors() as error:
            raise SigningUnavailableError(f"KMS key {key_id}: {explained(error)}") from error
        if not answer.get("Signature"):
            raise SigningUnavailableError(f"KMS key {key_id}: the reply holds no signature: it is not from KMS")
        return bytes(answer["Signature"])

    return SigningKey(certificates=chain.decode(), algorithm=algorithm, sign=sign, tsa_url=tsa_url)


_KMS_ALGORITHMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "es256": ("ECDSA_SHA_256", lambda data: hashlib.sha256(data).digest()),
    "es384": ("ECDSA_SHA_384", lambda data: hashlib.sha384(data).digest()),
    "ps256": ("RSASSA_PSS_SHA_256", lambda data: hashlib.sha256(data).digest()),
}


def _algorithm(key: object, certificates: Path) -> str:
    match key:
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return "es256"
        case ec.EllipticCurvePublicKey(curve=ec.SECP384R1()):
            return "es384"
        case rsa.RSAPublicKey(key_size=size) if size >= 2048:
            return "ps256"
        case ed25519.Ed25519PublicKey():
            return "ed25519"
    raise SettingsError(f"{certificates}: its key is not on P-256, P-384 or Ed25519 nor RSA of 2,048 bits or more")


def _signs_with(key: _PrivateKey) -> Callable[[bytes], bytes]:
    match key:
        case ec.EllipticCurvePrivateKey():
            digest = hashes.SHA384() if key.curve.name == "secp384r1" else hashes.SHA256()
            return lambda data: key.sign(data, ec.ECDSA(digest))
        case rsa.RSAPrivateKey():
            pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)
            return lambda data: key.sign(data, pss, hashes.SHA256())
    return key.sign


def _checked_chain(pem: bytes, path: Path) -> list[x509.Certificate]:
    """Parse a certificate chain; raises SettingsError for faults that would make every picture invalid later."""
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise SettingsError(f"{path} holds no certificates in PEM: {error}") from error
    leaf, now = chain[0], datetime.now(UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise SettingsError(f"{path}: the signing certificate is valid {_validity(leaf)}, not now")
    if leaf.issuer == leaf.subject:
        raise SettingsError(f"{path}: the first certificate signs itself; C2PA requires one issued by an authority")
    if ExtendedKeyUsageOID.EMAIL_PROTECTION not in _extended_key_usage(leaf):
        raise SettingsError(f"{path}: the signing certificate lacks the extended key usage emailProtection")
    for issued, issuer in pairwise(chain):
        try:
            issued.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise SettingsError(
                f"{path}: {_name(issuer)} did not issue {_name(issued)}: put the signing certificate first,"
                " then each one's issuer"
            ) from error
    return chain


def _extended_key_usage(certificate: x509.Certificate) -> x509.ExtendedKeyUsage | tuple[()]:
    try:
        return certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return ()


def _validity(certificate: x509.Certificate) -> str:
    return f"from {certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error


def _make_development_chain(folder: Path) -> None:
    """Create root, intermediate and leaf; discard the first two keys, so that they never issue anything else."""
    root, intermediate, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root_certificate = _issue("root", root.public_key(), issuer="root", issuer_key=root, path_length=1)
    chain = [
        _issue("signer", leaf.public_key(), issuer="intermediate", issuer_key=intermediate),
        _issue("intermediate", intermediate.public_key(), issuer="root", issuer_key=root, path_length=0),
    ]
    _write(folder / "root.pem", _pem(root_certificate), mode=0o600)
    _write(folder / "chain.pem", b"".join(_pem(certificate) for certificate in chain), mode=0o600)
    # Last, because its presence means that all files exist.
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    _write(folder / "key.pem", leaf.private_bytes(*encoding), mode=0o600)


def _issue(
    subject: str,
    key: ec.EllipticCurvePublicKey,
    *,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    path_length: int | None = None,
) -> x509.Certificate:
    """Issue a certificate: for an authority if ``path_length`` is given, else for a signer of pictures."""
    authority, now = path_length is not None, datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_development_name(subject))
        .issuer_name(_development_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(_key_usage(authority=authority), critical=True)
    )
    if not authority:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _development_name(common_name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, DEVELOPMENT)
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    incoming = path.with_suffix(".incoming")
    incoming.unlink(missing_ok=True)
    with os.fdopen(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    incoming.replace(path)
