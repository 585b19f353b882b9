"""Doctor: check each part of an installation by using it, with a fix for each failure."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from sdpipeline import private_files
from sdpipeline.app.checkpoints import catalog_and_refused
from sdpipeline.app.factories import check_quantization
from sdpipeline.app.keys import development_seal_key, picture_key, seal_key, trust_anchors, trusted_seal_keys
from sdpipeline.app.services import database_exists, existing_database
from sdpipeline.app.stores import open_storage
from sdpipeline.db import migrate, queries, server_checks
from sdpipeline.db.connection import Database, open_database
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import verify
from sdpipeline.engine.devices import devices
from sdpipeline.errors import BadInputError, CheckpointError, DatabaseUnavailableError, SdpError
from sdpipeline.settings import Settings, on_loopback

PREFECT_TIMEOUT_S = 10.0
_YES_NO = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None

    def document(self) -> Json:
        """Return the JSON of ``doctor --json``."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def checks(settings: Settings) -> list[Check]:
    """Run all checks, in the order in which a first run needs the parts."""
    tried: list[Check] = []
    for name, check in _CHECKS.items():
        try:
            tried += check(settings)
        except BadInputError as error:
            first = error.mistakes[0]
            detail = f"{first.key}: {first.message}" if first.key else first.message
            tried.append(Check(name=name, ok=False, detail=detail, fix=first.fix))
        except SdpError as error:
            fix = error.fix if isinstance(error, DatabaseUnavailableError) else None
            tried.append(Check(name=name, ok=False, detail=str(error), fix=fix or _FIXES[name]))
    return tried


def _home(settings: Settings) -> Iterator[Check]:
    """Remove other users' access that an earlier release or another umask left open."""
    if not settings.home.is_dir():
        yield Check(
            name="home",
            ok=True,
            detail=f"{settings.home} will be created with mode 0700 by the first command that writes",
        )
        return
    if settings.home in (Path("/"), Path.home().resolve()):
        detail = f"{settings.home} contains other files too, so its permissions were not changed"
        yield Check(name="home", ok=False, detail=detail, fix="set SDP_HOME to a separate folder")
        return
    found = private_files.remove_access(settings.home)
    if found.still_open:
        path, why = found.still_open[0]
        detail = f"{len(found.still_open)} files can be read or changed by other users: {path}: {why}"
        fix = f"as their owner: chmod -R go= {shlex.quote(str(settings.home))}"
        yield Check(name="home", ok=False, detail=detail, fix=fix)
    elif found.closed:
        detail = (
            f"{found.closed} of {found.inspected} files and folders in {settings.home} were accessible to other users"
        )
        yield Check(name="home", ok=True, detail=f"fixed: {detail}; only their owner can read them now")
    else:
        detail = f"{settings.home} and its {found.inspected} files are accessible to their owner only"
        yield Check(name="home", ok=True, detail=detail)


def _database(settings: Settings) -> Iterator[Check]:
    if not database_exists(settings):
        yield Check(name="database", ok=True, detail="SQLite, will be created by the first command that writes")
        return
    with closing(open_database(settings.database)) as database:
        yield from _database_checks(database, embedded=settings.embedded)


def _database_checks(database: Database, *, embedded: bool) -> Iterator[Check]:
    kind = "SQLite" if database.is_sqlite else "PostgreSQL"
    at, newest = migrate.current(database), migrate.newest()
    fix = None if at == newest or embedded else "sdpipeline db upgrade"
    yield Check(name="database", ok=fix is None, detail=f"{kind}, schema {at or 'empty'}, newest {newest}", fix=fix)
    if refusal := server_checks.write_refusal(database):
        yield Check(name="database: writes", ok=False, detail=refusal.reason, fix=refusal.fix)
    if pooler := server_checks.find_pooler(database):
        detail = f"through {pooler}; `db upgrade` and `bench` need a direct connection"
        yield Check(name="database: pooler", ok=True, detail=detail)


def _workers(settings: Settings) -> Iterator[Check]:
    with existing_database(settings) as database:
        if database is None:
            return
        with database.read() as connection:
            found = queries.live_workers(connection, lost_after_s=settings.lease_ttl_s)
    lost = [each for each in found if each["status"] == "lost"]
    detail = f"{len(found) - len(lost)} alive, {len(lost)} lost"
    if not lost:
        yield Check(name="workers", ok=True, detail=detail)
        return
    names = ", ".join(f"process {each['pid']} on {each['host']} since {_time(each['lost_since'])}" for each in lost)
    # Other workers take their jobs: the installation is not at fault, but someone may have to restart them.
    fix = "restart them, unless a supervisor does; other workers lease their jobs"
    yield Check(name="workers", ok=True, detail=f"{detail}: {names}", fix=fix)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")


def _storage(settings: Settings) -> Iterator[Check]:
    # A capability that an endpoint lacks is not a failure: the detail says what replaces it.
    for capability in open_storage(settings).probe():
        yield Check(
            name=f"storage: {capability.name}", ok=True, detail=f"{_YES_NO[capability.ok]}: {capability.detail}"
        )


def _prefect(settings: Settings) -> Iterator[Check]:
    version = importlib.metadata.version("prefect")
    if settings.prefect_api_url is None:
        yield Check(name="prefect", ok=True, detail=f"Prefect {version}; a local server is started when needed")
        return
    try:
        url = f"{settings.prefect_api_url.rstrip('/')}/health"
        answer = httpx.get(url, timeout=PREFECT_TIMEOUT_S, trust_env=not on_loopback(url))  # bypass proxies
        ok, detail = answer.is_success, f"{settings.prefect_api_url} answered {answer.status_code}"
    except httpx.HTTPError as error:
        ok, detail = False, f"{settings.prefect_api_url} does not answer: {type(error).__name__}"
    yield Check(name="prefect", ok=ok, detail=detail, fix=None if ok else "check PREFECT_API_URL: prefect server start")


def _engine(settings: Settings) -> Iterator[Check]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install 'sdpipeline[engine]' on machines that generate pictures"
        yield Check(name="engine", ok=False, detail="torch is not installed", fix=fix)
        return
    check_quantization(settings)
    yield Check(name="engine", ok=True, detail=f"torch {version} on {', '.join(devices(settings))}")


def _checkpoints(settings: Settings) -> Iterator[Check]:
    with existing_database(settings) as database:
        known, refused = catalog_and_refused(settings, database)
    for files in known.values():
        name = f"checkpoint {files.alias}"
        try:
            verify(files)
        except CheckpointError as error:
            yield Check(name=name, ok=False, detail=str(error), fix=_FIXES["checkpoints"])
            continue
        detail = f"{files.kind}, {files.family}, {files.size_bytes / 1e6:.1f} MB, digest {files.digest[:16]}"
        yield Check(name=name, ok=True, detail=detail)
    for alias, why in refused.items():
        yield Check(name=f"checkpoint {alias}", ok=False, detail=str(why), fix=_REFUSED_FIX)


def _picture_key(settings: Settings) -> Iterator[Check]:
    own = settings.signing
    if not (settings.embedded or own.certificates_file or own.key_file or own.kms_key_id):
        detail = "none; only machines with workers need one: set SDP_SIGNING__CERTIFICATES_FILE there"
        yield Check(name="picture key", ok=True, detail=detail)
        return
    key = picture_key(settings)
    roots = trust_anchors(settings).count("BEGIN CERTIFICATE")
    trusted = f"{roots} trusted roots" if roots else "no trusted roots, so verify reports no picture as trusted"
    times = f", times from {key.tsa_url}" if key.tsa_url else ""
    yield Check(name="picture key", ok=True, detail=f"{key.identity}{times}; {trusted}")


def _signing(settings: Settings) -> Iterator[Check]:
    if settings.embedded and settings.signing.seal_key_file is None and not development_seal_key(settings).is_file():
        yield Check(name="signing key", ok=True, detail="a development key will be created with the first seal")
        return
    if settings.signing.seal_public_key_file is not None:
        public = trusted_seal_keys(settings).public[0]
        yield Check(name="signing key", ok=True, detail=f"public half, Ed25519 {public[:16]}: another process seals")
        return
    key = seal_key(settings)
    kind = "development key" if settings.signing.seal_key_file is None else str(settings.signing.seal_key_file)
    yield Check(name="signing key", ok=True, detail=f"{kind}, Ed25519 {key.public_hex[:16]}")


_REFUSED_FIX = "do what the reason says, or move the folder out of SDP_CHECKPOINTS_DIR; other checkpoints run meanwhile"

_CHECKS: dict[str, Callable[[Settings], Iterator[Check]]] = {
    "home": _home,
    "database": _database,
    "workers": _workers,
    "storage": _storage,
    "prefect": _prefect,
    "engine": _engine,
    "checkpoints": _checkpoints,
    "signing key": _signing,
    "picture key": _picture_key,
}
_FIXES = {
    "database": "check SDP_DATABASE_URL: is the server up, and are host, port and password (percent-encoded) correct?",
    "workers": "check SDP_DATABASE_URL",
    "storage": "check SDP_STORAGE_URL, the endpoint, the bucket and its credentials",
    "prefect": "check PREFECT_API_URL",
    "engine": "pip install 'sdpipeline[engine]'",
    "checkpoints": "restore the files, or install the package again",
    "signing key": "check SDP_SIGNING__SEAL_KEY_FILE",
    "picture key": "check SDP_SIGNING__CERTIFICATES_FILE and its key",
}
