"""Signing keys: generated for development, read from files, and kept in a KMS."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import SecretStr

from sdpipeline.app import doctor, keys, services
from sdpipeline.domain import OutputFormat
from sdpipeline.errors import SettingsError, SigningUnavailableError
from sdpipeline.provenance import encode, sign, verify
from sdpipeline.provenance.signing import SigningKey, development_key, development_root, kms_key, pem_key
from sdpipeline.settings import Settings, SigningSettings
from tests.integration.certificates import Authority
from tests.integration.commands import sdpipeline
from tests.integration.conftest import free_port
from tests.integration.fault_proxy import FaultProxy

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
        ({"days": (-20, -10)}, r"valid from \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d, not now"),
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
    own = {"certificates_file": tmp_path / "chain.pem", "kms_key_id": key_id, "kms_endpoint_url": moto_url}
    key = keys.picture_key(on_postgresql(tmp_path, **own, kms_region="us-east-1"))
    assert key.algorithm == algorithm
    assert is_valid(key, authority.root_pem) == "trusted"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_the_file_holds_a_signature_as_cose_wants_it_and_not_in_der(
    tmp_path: Path, authority: Authority, curve: ec.EllipticCurve
) -> None:
    private_key = ec.generate_private_key(curve)
    key = pem_key(*written(tmp_path, authority.chain(private_key.public_key()), private_key))
    made: list[bytes] = []

    def sign(data: bytes) -> bytes:
        made.append(key.sign(data))
        return made[-1]

    picture = signed_picture(replace(key, sign=sign))
    size = (curve.key_size + 7) // 8
    raw = b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(made[-1]))
    assert (raw in picture, made[-1] in picture) == (True, False)


@pytest.fixture
def time_authority(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """An RFC 3161 time stamp authority over HTTP that runs OpenSSL: its URL and its root in PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder, authority = tmp_path / "tsa", Authority("Time")
    folder.mkdir()
    private_key = rsa.generate_private_key(65537, 2048)
    chain = authority.chain(private_key.public_key(), usage=ExtendedKeyUsageOID.TIME_STAMPING)
    certificates, key_file = written(folder, chain, private_key)
    settings = [
        *("[tsa]", "default_tsa = own", "[own]", f"serial = {folder / 'serial'}", f"signer_cert = {certificates}"),
        *(f"certs = {certificates}", f"signer_key = {key_file}", "signer_digest = sha256", "default_policy = 1.2.3"),
        *("digests = sha256, sha384, sha512", "ess_cert_id_alg = sha256"),
    ]
    (folder / "tsa.cnf").write_text("\n".join(settings))
    command = ["openssl", "ts", "-reply", "-config", str(folder / "tsa.cnf"), "-queryfile", str(folder / "query")]

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            (folder / "query").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            reply = subprocess.run(command, capture_output=True, check=True).stdout
            self.send_response(200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", authority.root_pem
        server.shutdown()


def test_a_confirmed_time_keeps_a_picture_trusted_when_its_certificate_has_run_out(
    tmp_path: Path, authority: Authority, time_authority: tuple[str, str]
) -> None:
    url, time_root = time_authority
    private_key = ec.generate_private_key(ec.SECP256R1())
    ends = time.time() + 3
    paths = written(tmp_path, authority.chain(private_key.public_key(), days=(-1, 3 / 86400)), private_key)
    own = {"certificates_file": paths[0], "key_file": paths[1]}
    plain, confirmed = (
        signed_picture(keys.picture_key(on_postgresql(tmp_path, **own, tsa_url=tsa_url))) for tsa_url in (None, url)
    )
    roots = authority.root_pem + time_root
    found = verify(confirmed, trust_anchors=roots)
    assert found.c2pa == "trusted"
    assert abs(datetime.fromisoformat(found.signed_at or "").timestamp() - time.time()) < 60
    time.sleep(max(0.0, ends - time.time()) + 1.5)
    assert verify(confirmed, trust_anchors=roots).c2pa == "trusted"
    late = verify(plain, trust_anchors=roots)
    assert (late.c2pa, late.faults) == ("invalid", ("signingCredential.expired",))


def test_a_time_authority_that_is_away_is_transient(tmp_path: Path) -> None:
    away = replace(development_key(tmp_path), tsa_url=f"http://user:hidden-word@127.0.0.1:{free_port()}")
    with pytest.raises(SigningUnavailableError, match="the picture cannot be signed") as refused:
        signed_picture(away)
    assert "hidden-word" not in str(refused.value)


def test_the_settings_name_the_keys_and_a_bundle_of_old_and_new_roots(tmp_path: Path) -> None:
    pictures, roots = [], b""
    for year in ("old", "new"):
        (tmp_path / year).mkdir()
        company, private_key = Authority(f"Acme {year}"), ec.generate_private_key(ec.SECP256R1())
        chain = company.chain(private_key.public_key())
        paths = written(tmp_path / year, chain, private_key, password=b"secret")
        own = {"certificates_file": paths[0], "key_file": paths[1], "key_password": "secret"}
        key = keys.picture_key(on_postgresql(tmp_path, **own))
        assert key.identity.startswith(f"signer, Acme {year} (es256, until ")
        pictures.append(signed_picture(key))
        roots += company.root_pem.encode()
    (tmp_path / "roots.pem").write_bytes(roots)
    trusted = keys.trust_anchors(on_postgresql(tmp_path, trust_file=tmp_path / "roots.pem"))
    assert [verify(picture, trust_anchors=trusted).c2pa for picture in pictures] == ["trusted", "trusted"]
    assert keys.trust_anchors(on_postgresql(tmp_path)) == ""


def test_beside_sqlite_a_development_key_is_made_and_named_as_such(tmp_path: Path) -> None:
    key = keys.picture_key(services.load_settings(tmp_path))
    assert (key.development, key.identity) == (True, "a development key, which nobody trusts")
    assert (tmp_path / "keys/pictures/root.pem").is_file()
    told = list(doctor._picture_key(services.load_settings(tmp_path)))
    expected = "a development key, which nobody trusts; no trusted roots, so verify reports no picture as trusted"
    assert [(check.ok, check.detail) for check in told] == [(True, expected)]


def test_a_process_without_any_picture_key_is_no_fault_and_half_of_one_is(tmp_path: Path) -> None:
    (told,) = doctor._picture_key(on_postgresql(tmp_path))
    assert (told.ok, told.detail.startswith("none;")) == (True, True)
    with pytest.raises(SettingsError):
        list(doctor._picture_key(on_postgresql(tmp_path, key_file="key.pem")))


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({}, "SDP_SIGNING__CERTIFICATES_FILE: is not set"),
        ({"key_file": "key.pem"}, "SDP_SIGNING__CERTIFICATES_FILE: is not set"),
        (
            {"certificates_file": "chain.pem"},
            "SDP_SIGNING__KEY_FILE: set exactly one of SDP_SIGNING__KEY_FILE and SDP_SIGNING__KMS_KEY_ID",
        ),
        (
            {"certificates_file": "chain.pem", "key_file": "key.pem", "kms_key_id": "alias/a"},
            "SDP_SIGNING__KEY_FILE: set exactly one of SDP_SIGNING__KEY_FILE and SDP_SIGNING__KMS_KEY_ID",
        ),
    ],
    ids=["nothing", "no-certificates", "no-key", "two-keys"],
)
def test_elsewhere_missing_keys_are_refused_by_the_names_of_their_settings(
    tmp_path: Path, own: dict[str, str], named: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(named)):
        keys.picture_key(on_postgresql(tmp_path, **own))


def test_a_worker_without_a_key_leaves_with_2_before_any_work(tmp_path: Path) -> None:
    done = sdpipeline("worker", "--home", tmp_path, SDP_DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
    assert done.returncode == 2
    assert "SDP_SIGNING__CERTIFICATES_FILE: is not set" in done.stderr
    assert not (tmp_path / "keys").exists()


def on_postgresql(home: Path, **signing: Any) -> Settings:
    """Settings of a deployment with a database server, which none of these tests contacts."""
    found = services.load_settings(home)
    own = {"database_url": SecretStr("postgresql://nobody@127.0.0.1:9/none"), "signing": SigningSettings(**signing)}
    return found.model_copy(update=own)


def test_a_kms_that_is_away_is_transient(tmp_path: Path, s3_credentials: None, authority: Authority) -> None:
    chain = authority.chain(ec.generate_private_key(ec.SECP256R1()).public_key())
    (tmp_path / "chain.pem").write_bytes(authority.pem(chain))
    away = f"http://127.0.0.1:{free_port()}"
    key = kms_key(tmp_path / "chain.pem", "alias/pictures", endpoint_url=away, region="us-east-1")
    with pytest.raises(SigningUnavailableError, match="KMS key alias/pictures: Could not connect"):
        signed_picture(key)


def test_renewed_credentials_are_used_for_a_kms(
    tmp_path: Path, moto_url: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, s3_credentials: None
) -> None:
    def refuse(_method: str, headers: Mapping[str, str]) -> str | None:
        return '400 {"__type": "ExpiredTokenException"}' if headers["x-amz-security-token"] == "old" else None

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    profile = "[default]\naws_access_key_id=a\naws_secret_access_key=b\naws_session_token="
    (tmp_path / "credentials").write_text(profile + "old")
    (tmp_path / "chain.pem").write_bytes(
        authority.pem(authority.chain(ec.generate_private_key(ec.SECP256R1()).public_key()))
    )
    with FaultProxy(moto_url, refuse=refuse) as proxy:
        key = kms_key(tmp_path / "chain.pem", "no-such-key", endpoint_url=proxy.url, region="us-east-1")
        with pytest.raises(SigningUnavailableError):
            key.sign(b"data")
        (tmp_path / "credentials").write_text(profile + "new")
        with pytest.raises(SigningUnavailableError, match="NotFound"):  # moto itself answers now
            key.sign(b"data")
    assert len(proxy.refused) == 2


def written(
    folder: Path,
    chain: list[x509.Certificate],
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey,
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
