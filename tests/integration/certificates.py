"""A certificate authority for tests that can issue every kind of invalid certificate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes


class Authority:
    """A company's root and intermediate."""

    def __init__(self, company: str) -> None:
        self._company = company
        self._keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "intermediate")}
        root = self._issue("root", "root", self._keys["root"].public_key(), authority=True)
        self._intermediate = self._issue(
            "intermediate", "root", self._keys["intermediate"].public_key(), authority=True
        )
        self.root_pem = self.pem([root]).decode()

    def chain(
        self,
        public_key: CertificatePublicKeyTypes,
        *,
        own_key: ec.EllipticCurvePrivateKey | None = None,
        days: tuple[float, float] = (-1, 100),
        usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.EMAIL_PROTECTION,
        self_signed: bool = False,
    ) -> list[x509.Certificate]:
        """The certificates of a signer and of the intermediate."""
        issuer = "signer" if self_signed else "intermediate"
        self._keys |= {"signer": own_key} if own_key else {}
        return [self._issue("signer", issuer, public_key, days=days, usage=usage), self._intermediate]

    @staticmethod
    def pem(chain: list[x509.Certificate]) -> bytes:
        return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)

    def _issue(
        self,
        subject: str,
        issuer: str,
        public_key: CertificatePublicKeyTypes,
        *,
        authority: bool = False,
        days: tuple[float, float] = (-1, 100),
        usage: x509.ObjectIdentifier | None = None,
    ) -> x509.Certificate:
        flags = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        never = dict.fromkeys((*flags, "encipher_only", "decipher_only"), False)
        now, issuer_key = datetime.now(UTC), self._keys[issuer].public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(self._name(subject))
            .issuer_name(self._name(issuer))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        signs = {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
        builder = builder.add_extension(x509.KeyUsage(**signs, **never), critical=True)
        if usage:
            # RFC 3161 requires this usage to be critical and the only one.
            critical = usage == ExtendedKeyUsageOID.TIME_STAMPING
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=critical)
        return builder.sign(self._keys[issuer], hashes.SHA256())

    def _name(self, common_name: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, self._company)
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def signing_settings(folder: Path) -> dict[str, str]:
    """Settings for a company's chain, key and root in files."""
    authority, key = Authority("Acme"), ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files = {
        "CERTIFICATES_FILE": authority.pem(authority.chain(key.public_key())),
        "KEY_FILE": key.private_bytes(*form),
        "TRUST_FILE": authority.root_pem.encode(),
    }
    found = {}
    for name, data in files.items():
        path = folder / f"{name.lower()}.pem"
        path.write_bytes(data)
        found[f"SDP_SIGNING__{name}"] = str(path)
    return found
