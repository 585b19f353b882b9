"""Signing keys: made for development, read from files, and kept in a KMS."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from sdpipeline.domain import OutputFormat
from sdpipeline.errors import SettingsError, SigningUnavailableError
from sdpipeline.provenance import encode, sign, verify
from sdpipeline.signing import SigningKey, development_key, development_root, kms_key, pem_key
from tests.integration.certificates import Authority
from tests.integration.conftest import free_port

if TYPE_CHECKING:
    from cryptography import x509


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority("Acme")


def test_a_development_key_is_made_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        keys = list(threads.map(lambda _: development_key(tmp_path / "keys"), range(4)))
    assert len({key.certificates for key in keys}) == 1
    assert stat.S_IMODE((tmp_path / "keys/key.pem").stat().st_mode) == 0o600


def test_a_development_key_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    development_key(tmp_path)
    (tmp_path / "key.pem").unlink()
    assert is_valid(development_key(tmp_path), development_root(tmp_path)) == "valid"


@pytest.mark.parametrize(
    ("private_key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "es256"),
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
    ids=["P-256", "P-384", "RSA", "Ed25519"],
)
def test_pictures_signed_with_a_companys_key_are_trusted(
    tmp_path: Path, authority: Authority, private_key: ec.EllipticCurvePrivateKey, algorithm: str
) -> None:
    key = pem_key(*written(tmp_path, authority.chain(private_key.public_key()), private_key))
    assert key.algorithm == algorithm
    assert is_valid(key, authority.root_pem) == "trusted"
    assert is_valid(key, Authority("Other").root_pem) == "valid"


def test_a_rotated_key_leaves_old_pictures_trusted(tmp_path: Path, authority: Authority) -> None:
    pictures = []
    for year in ("old", "new"):
        private_key = ec.generate_private_key(ec.SECP256R1())
        (tmp_path / year).mkdir()
        key = pem_key(*written(tmp_path / year, authority.chain(private_key.public_key()), private_key))
        pictures.append(signed_picture(key))
    assert [verify(picture, trust_anchors=authority.root_pem).c2pa for picture in pictures] == ["trusted", "trusted"]


def test_a_key_behind_a_password_is_opened_with_it(tmp_path: Path, authority: Authority) -> None:
    private_key = ec.generate_private_key(ec.SECP256R1())
    paths = written(tmp_path, authority.chain(private_key.public_key()), private_key, password=b"secret")
    assert pem_key(*paths, password="secret").algorithm == "es256"
    with pytest.raises(SettingsError, match=r"key\.pem is not a private key in PEM that this password opens"):
        pem_key(*paths)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    one, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(SettingsError, match="is not the key of the first certificate"):
        pem_key(*written(tmp_path, authority.chain(one.public_key()), other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": (-20, -10)}, r"valid from \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d and not now"),
        ({"usage": ExtendedKeyUsageOID.CODE_SIGNING}, "lacks the extended key usage emailProtection"),
        ({"usage": None}, "lacks the extended key usage emailProtection"),
        ({"self_signed": True}, "the first certificate signs itself"),
    ],
    ids=["expired", "other-usage", "no-usage", "self-signed"],
)
def test_a_certificate_that_readers_would_refuse_is_refused_at_once(
    tmp_path: Path, authority: Authority, changes: dict[str, object], message: str
) -> None:
    private_key = ec.generate_private_key(ec.SECP256R1())
    chain = authority.chain(private_key.public_key(), own_key=private_key, **changes)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=message):
        pem_key(*written(tmp_path, chain, private_key))


def test_a_chain_in_disorder_is_refused(tmp_path: Path, authority: Authority) -> None:
    private_key = ec.generate_private_key(ec.SECP256R1())
    leaf = authority.chain(private_key.public_key())[0]
    stranger = Authority("Other").chain(private_key.public_key())[1]
    with pytest.raises(SettingsError, match=r"did not issue .* put the signing certificate first"):
        pem_key(*written(tmp_path, [leaf, stranger], private_key))


def test_a_key_of_no_kind_that_c2pa_knows_is_refused(tmp_path: Path, authority: Authority) -> None:
    weak = ec.generate_private_key(ec.SECP192R1())
    with pytest.raises(SettingsError, match="not on P-256, P-384 or Ed25519"):
        pem_key(*written(tmp_path, authority.chain(weak.public_key()), weak))
    strange = dsa.generate_private_key(1024)
    with pytest.raises(SettingsError, match="is not the key of the first certificate"):
        pem_key(*written(tmp_path, authority.chain(weak.public_key()), strange))


def test_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"chain\.pem cannot be read: No such file"):
        pem_key(tmp_path / "chain.pem", tmp_path / "key.pem")
    (tmp_path / "chain.pem").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"chain\.pem holds no certificates in PEM"):
        kms_key(tmp_path / "chain.pem", "alias/pictures")


@pytest.mark.usefixtures("s3_credentials")
@pytest.mark.parametrize(("spec", "algorithm"), [("ECC_NIST_P256", "es256"), ("ECC_NIST_P384", "es384")])
def test_a_key_in_a_kms_signs(tmp_path: Path, moto_url: str, authority: Authority, spec: str, algorithm: str) -> None:
    client = boto3.session.Session().client("kms", endpoint_url=moto_url, region_name="us-east-1")
    key_id = client.create_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    public_key = serialization.load_der_public_key(client.get_public_key(KeyId=key_id)["PublicKey"])
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    (tmp_path / "chain.pem").write_bytes(authority.pem(authority.chain(public_key)))
    key = kms_key(tmp_path / "chain.pem", key_id, endpoint_url=moto_url, region="us-east-1")
    assert key.algorithm == algorithm
    assert is_valid(key, authority.root_pem) == "trusted"


def test_a_kms_that_is_away_is_transient(tmp_path: Path, s3_credentials: None, authority: Authority) -> None:
    chain = authority.chain(ec.generate_private_key(ec.SECP256R1()).public_key())
    (tmp_path / "chain.pem").write_bytes(authority.pem(chain))
    away = f"http://127.0.0.1:{free_port()}"
    key = kms_key(tmp_path / "chain.pem", "alias/pictures", endpoint_url=away, region="us-east-1")
    with pytest.raises(SigningUnavailableError, match="KMS key alias/pictures: Could not connect"):
        signed_picture(key)


def written(
    folder: Path,
    chain: list[x509.Certificate],
    key: ec.EllipticCurvePrivateKey | dsa.DSAPrivateKey,
    *,
    password: bytes | None = None,
) -> tuple[Path, Path]:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "chain.pem").write_bytes(Authority.pem(chain))
    (folder / "key.pem").write_bytes(key.private_bytes(*form, encryption))
    return folder / "chain.pem", folder / "key.pem"


def signed_picture(key: SigningKey) -> bytes:
    image = encode(np.zeros((8, 8, 3), dtype=np.uint8), output=OutputFormat(), record={})
    return sign(image, key=key, record={}).data


def is_valid(key: SigningKey, root: str) -> str:
    return verify(signed_picture(key), trust_anchors=root).c2pa
