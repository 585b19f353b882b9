"""Composition root: the only place that builds databases, stores, engines and workers from settings."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import structlog

from sdpipeline import __version__, audit, settings
from sdpipeline.batching import split
from sdpipeline.campaigns import policy
from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.loader import Campaign, Catalog
from sdpipeline.campaigns.loader import load as load_campaign_file
from sdpipeline.db import leasing, migrate, queries, registry, workers
from sdpipeline.db import queue as jobs
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database, sqlite_path
from sdpipeline.db.leasing import AgingPolicy
from sdpipeline.db.queries import Progress
from sdpipeline.db.settings_events import declare
from sdpipeline.db.waiting import until_available
from sdpipeline.demo.manifest import read_manifest
from sdpipeline.domain import CheckpointRef, Json
from sdpipeline.engine import Engine
from sdpipeline.engine.checkpoints import WEIGHTS, CheckpointFiles, inspect, read_ahead
from sdpipeline.engine.checkpoints import verify as verify_checkpoint
from sdpipeline.engine.devices import gpu_count
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.errors import (
    BadInputError,
    CampaignError,
    CheckpointError,
    DatabaseUnavailableError,
    Mistake,
    SettingsError,
)
from sdpipeline.provenance import signing
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.reporting import contact_sheet, report
from sdpipeline.reporting.contact_sheet import Thumbnails
from sdpipeline.reporting.report import Span
from sdpipeline.settings import Settings
from sdpipeline.storage import ForeignObjects, ObjectStore, S3Options, is_bucket_url, open_store
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.delivery_process import Bounds, DeliveryProcess, Destination
from sdpipeline.worker.watchdog import BatchTimings
from sdpipeline.worker.worker import Worker, WorkerLimits, WorkerSummary

BUILTIN_CHECKPOINTS = Path(__file__).parents[1] / "demo" / "checkpoints"
BUILTIN_LICENCE = "Apache-2.0"
HASH_CACHE = "checkpoint-hashes.json"
"""Cache of the hashes of unchanged weights, for commands that load no weights."""
SEAL_TIMEOUT_S = 300.0
"""How long to wait for the process that seals; it runs every minute, so this is five attempts."""
ENGINE_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "greenlet", "tqdm"
)  # fmt: skip
"""Modules that the extra ``engine`` installs."""

_log = structlog.get_logger(__name__)

__all__ = ["Progress", "Span", "Thumbnails", "WorkerSummary"]

_log = structlog.get_logger(__name__)


def load_settings(home: Path | None = None) -> Settings:
    """Load the settings of this process; raises SettingsError."""
    return settings.load(home=home)


@dataclass(frozen=True, slots=True)
class Services:
    """Open database, storage and audit log of a command; closed by :func:`services`."""

    settings: Settings
    database: Database
    store: ObjectStore
    audit: AuditLog


@contextmanager
def services(settings: Settings, *, create: bool = True, until: threading.Event | None = None) -> Iterator[Services]:
    """Open the database (at this release's schema) and storage; ``create`` makes a missing embedded database.

    With ``until``, an outage of the database is waited out until that event is set.
    """
    if not create and not database_exists(settings):
        fix = "sdpipeline demo, or sdpipeline submit FILE; --home names another folder"
        raise BadInputError(Mistake(message=f"nothing was submitted in {settings.home} yet", fix=fix))
    database = open_database(settings.database)
    check = partial(ensure_schema, settings, database)
    try:
        check() if until is None else until_available(check, until)
        yield Services(settings, database, open_storage(settings), AuditLog(database, actor=actor(settings)))
    finally:
        database.close()


def ensure_schema(settings: Settings, database: Database) -> None:
    """Migrate the embedded database; any other must have been migrated by ``db upgrade``."""
    revision = migrate.current(database) if database_exists(settings) else None
    if migrate.suits(revision):
        return
    if settings.embedded:
        migrate.upgrade(database)
    else:
        message = f"the database's schema is at {revision or 'nothing'}, this release needs {migrate.newest()}"
        raise SettingsError(Mistake(key="SDP_DATABASE_URL", message=message, fix="sdpipeline db upgrade"))


def database_exists(settings: Settings) -> bool:
    """Return True if there is a database to compare with; ``plan`` creates none."""
    path = sqlite_path(settings.database)
    return path is None or path.is_file()


def existing_database(settings: Settings) -> Database | None:
    """Return the database at this release's schema, or None if the embedded one does not exist yet."""
    if not database_exists(settings):
        return None
    database = open_database(settings.database)
    ensure_schema(settings, database)
    return database


def open_storage(settings: Settings) -> ObjectStore:
    """Open the store that the settings name."""
    return open_store(settings.storage, s3_options(settings))


def s3_options(settings: Settings) -> S3Options:
    """Return the S3 options of the settings, for our own storage and for objects in other buckets."""
    return S3Options(**settings.s3.model_dump())


def seal_key(settings: Settings) -> audit.SealKey:
    """Return the key that seals the audit log; the embedded default gets a development key next to its database."""
    path = settings.signing.seal_key_file
    if path is None and settings.signing.seal_public_key_file is not None:
        fix = "run this on the machine that seals; SDP_SIGNING__SEAL_PUBLIC_KEY_FILE only checks seals"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message="is not set", fix=fix))
    if path is None and not settings.embedded:
        fix = "name an Ed25519 key: openssl genpkey -algorithm ed25519 -out seal.pem"
        raise SettingsError(Mistake(key="SDP_SIGNING__SEAL_KEY_FILE", message="is not set", fix=fix))
    retired = tuple(settings.signing.retired_seal_keys)
    with _development_keys(settings):
        return audit.load_key(path or development_seal_key(settings), create=path is None, retired=retired)


def believed_seal_keys(settings: Settings) -> audit.SealKey | audit.PublicKeys:
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
        fix = "name the PEM file with your signing certificate and its intermediates"
        raise SettingsError(Mistake(key="SDP_SIGNING__CERTIFICATES_FILE", message="is not set", fix=fix))
    if (own.key_file is None) == (own.kms_key_id is None):
        message = "or SDP_SIGNING__KMS_KEY_ID is needed, and one of them alone"
        raise SettingsError(Mistake(key="SDP_SIGNING__KEY_FILE", message=message, fix="set the one that signs"))
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


@contextmanager
def _development_keys(settings: Settings) -> Iterator[None]:
    """Raise SettingsError if a key cannot be written in the home."""
    try:
        yield
    except OSError as error:
        message = f"cannot make a development key in {settings.home / 'keys'}: {error.strerror}"
        fix = "name a home on a disk that is writable and has space"
        raise SettingsError(Mistake(key="SDP_HOME", message=message, fix=fix)) from error


def trust_anchors(settings: Settings) -> str:
    """Return the root certificates (PEM) that make a signature trusted; empty if none are configured."""
    return signing.trusted_roots(settings.signing.trust_file) if settings.signing.trust_file else ""


def catalog(settings: Settings, database: Database | None = None) -> Catalog:
    """Return every checkpoint that a campaign may name: shipped, in the checkpoints folder, or already registered."""
    return _catalog(settings, database, HashCache(settings.home / HASH_CACHE))[0]


def refused_checkpoints(settings: Settings, database: Database | None = None) -> dict[str, CheckpointError]:
    """Return the directories that look like checkpoints but are refused, by name, with the reason."""
    return _catalog(settings, database, HashCache(settings.home / HASH_CACHE))[1]


def approved_checkpoints(settings: Settings, database: Database) -> list[CheckpointFiles]:
    """Return the approved checkpoints, oldest first; a link in SDP_CHECKPOINTS_DIR is resolved to its directory."""
    with database.read() as connection:
        known = registry.known(connection)
    return [
        replace(files, directory=files.directory.resolve()) if files.directory.parent == settings.checkpoints else files
        for files in known
    ]


def _catalog(
    settings: Settings, database: Database | None, cache: HashCache
) -> tuple[dict[str, CheckpointFiles], dict[str, CheckpointError]]:
    known: dict[str, CheckpointFiles] = {}
    revoked: frozenset[str] = frozenset()
    expired: frozenset[tuple[str, str]] = frozenset()
    if database is not None:
        known = {files.alias: files for files in approved_checkpoints(settings, database)}
        with database.read() as connection:
            revoked, expired = registry.withdrawn(connection)
    # The shipped weights are small and change with the package; other approved weights stay as they were approved.
    approved = {alias: files for alias, files in known.items() if files.directory.parent != BUILTIN_CHECKPOINTS}
    shipped, refused = _inspected(BUILTIN_CHECKPOINTS, cache)
    for alias, why in _altered_shipped(shipped).items():
        refused[alias] = why
        del shipped[alias]
    found = {alias: _on_terms(files, known.get(alias)) for alias, files in shipped.items()}
    own, refused_own = _inspected(settings.checkpoints, cache, but=known)
    found |= own | approved
    running = {
        alias: files
        for alias, files in found.items()
        if files.digest not in revoked and (files.digest, alias) not in expired
    }
    return running, {alias: why for alias, why in (refused | refused_own).items() if alias not in running}


def _altered_shipped(shipped: Mapping[str, CheckpointFiles]) -> dict[str, CheckpointError]:
    """Return the shipped checkpoints that differ from those of this release."""
    released = read_manifest(BUILTIN_CHECKPOINTS)
    altered = {}
    for alias, files in shipped.items():
        differing = dict(files.manifest).items() ^ dict(released.get(alias, {})).items()
        if differing:
            name = min(differing)[0]
            altered[alias] = CheckpointError(
                f"checkpoint {alias!r}: {name} is not as shipped; install sdpipeline again"
            )
    return altered


def _on_terms(shipped: CheckpointFiles, approved: CheckpointFiles | None) -> CheckpointFiles:
    """Return shipped weights with their own licence, and the purposes approved for exactly these bytes."""
    if approved is None or approved.digest != shipped.digest:
        return replace(shipped, licence=BUILTIN_LICENCE)
    return replace(shipped, licence=approved.licence or BUILTIN_LICENCE, purposes=approved.purposes)


def _runnable(settings: Settings, database: Database | None) -> dict[str, CheckpointFiles]:
    """Return the checkpoints that may run, by digest: jobs keep their pinned weights when an alias changes."""
    approved = approved_checkpoints(settings, database) if database is not None else []
    return {files.digest: files for files in (*approved, *catalog(settings, database).values())}


def _inspected(
    folder: Path, cache: HashCache, *, but: Mapping[str, CheckpointFiles] | None = None
) -> tuple[dict[str, CheckpointFiles], dict[str, CheckpointError]]:
    """Return the checkpoints of a folder by directory name, and the reasons why others are refused.

    A link to a directory is resolved once, here: the directory itself is registered and loaded.
    """
    known = but or {}
    approved = {files.directory for files in known.values()}
    found, refused = {}, {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not entry.is_dir() or entry in approved:
            continue
        name, directory = entry.name, entry.resolve() if entry.is_symlink() else entry
        if entry.is_symlink() and name in known and known[name].directory == directory:
            continue
        try:
            found[name] = inspect(name, directory, cache=cache)
        except CheckpointError as error:
            # `checkpoints add` downloads into hidden folders.
            if not name.startswith(".") and any(directory.rglob(f"*{WEIGHTS}")):
                refused[name] = error
    return found, refused


def input_folder(settings: Settings, folder: Path) -> InputFolder:
    """Return the allowed sources of a campaign's pictures and tables: its folder and what the settings allow in
    addition."""
    # A plan must report within 15 seconds that a bucket does not answer.
    patience = replace(s3_options(settings), connect_timeout_s=2, read_timeout_s=5, total_max_attempts=2)
    return InputFolder(
        folder,
        allowed=[Path(root) for root in settings.inputs.allowed if not is_bucket_url(root)],
        buckets=[root for root in settings.inputs.allowed if is_bucket_url(root)],
        foreign=ForeignObjects(patience),
        max_pixels=settings.inputs.max_pixels,
    )


def load_campaign(
    settings: Settings,
    path: Path,
    database: Database | None = None,
    *,
    edition: str | None = None,
    now: datetime | None = None,
) -> tuple[Campaign, InputFolder]:
    """Load and check a campaign file; return it with the folder of its inputs.

    Raises CampaignError, or SettingsError if the deployment's policy is wrong. ``now`` is the time its schedule fired.
    """
    inputs = input_folder(settings, path.absolute().parent)
    rules = policy.load(settings.policy_file) if settings.policy_file else None
    cache = HashCache(settings.home / HASH_CACHE)
    known, refused = _catalog(settings, database, cache)
    try:
        campaign = load_campaign_file(path, known, inputs, edition=edition, now=now, deployment=rules)
    except CampaignError as error:
        raise CampaignError(*(_with_reason(mistake, refused) for mistake in error.mistakes)) from error
    _check_weights(campaign, cache)
    if campaign.spec.budget.max_cost is not None and settings.cost_per_gpu_hour is None:
        place = ("budget", "max_cost")
        raise CampaignError(campaign.source.mistake(place, "has no price to count by", "set SDP_COST_PER_GPU_HOUR"))
    return campaign, inputs


def _with_reason(mistake: Mistake, refused: Mapping[str, CheckpointError]) -> Mistake:
    """Add the reason to a mistake about an unknown checkpoint, if its directory was refused."""
    for alias, why in refused.items():
        if mistake.message.startswith("no ") and repr(alias) in mistake.message:
            return replace(mistake, message=str(why), fix=None)
    return mistake


def _check_weights(campaign: Campaign, cache: HashCache) -> None:
    """Raise CampaignError if weights on this machine differ from the approved ones."""
    spec, source = campaign.spec, campaign.source
    used: dict[str, tuple[str | int, ...]] = {spec.checkpoint: ("checkpoint",)}
    for n, stage in enumerate(spec.stages):
        used |= {alias: ("stages", n) for alias in stage.aliases() if alias not in used}
    for rules in campaign.policies:
        if (checker := rules.policy.safety_checker) and checker not in used:
            used[checker] = ("policy", "safety_checker")
    mistakes = []
    for alias, place in used.items():
        files = campaign.catalog.get(alias)
        if files is None or not os.path.lexists(files.directory):
            continue
        try:
            verify_checkpoint(files, cache=cache)
        except CheckpointError as error:
            mistakes.append(source.mistake(place, str(error)))
    cache.save()
    if mistakes:
        raise CampaignError(*mistakes)


def build_engine(settings: Settings, device: str, database: Database | None, *, dtype: str | None = None) -> Engine:
    """Build the diffusers engine, or its double if the settings ask for it. Imports torch only here."""
    if settings.engine.fake_seconds_per_batch is not None:
        from sdpipeline.engine.fake import FakeEngine

        return FakeEngine(seconds_per_batch=settings.engine.fake_seconds_per_batch)
    # Cache of compiled code for the next start.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.home / "compiled"))
    _need_engine()
    from sdpipeline.engine.diffusers.engine import DiffusersEngine
    from sdpipeline.engine.diffusers.model_cache import TextEncoders
    from sdpipeline.engine.stepwise.compile import Speedups, check_compiler

    by_digest = _runnable(settings, database)

    def locate(ref: CheckpointRef) -> CheckpointFiles:
        if ref.digest not in by_digest:
            by_digest.update(_runnable(settings, database))
        if ref.digest not in by_digest:
            raise CheckpointError(f"checkpoint {ref.alias!r} with digest {ref.digest[:16]} is not on this machine")
        return by_digest[ref.digest]

    resident = int(settings.engine.resident_gib * 2**30) if settings.engine.resident_gib else None
    if settings.engine.compile:
        check_compiler()
    check_quantization(settings, device)
    speedups = Speedups(
        compile=settings.engine.compile,
        channels_last=settings.engine.channels_last,
        attention=settings.engine.attention,
        quantize=settings.engine.quantize,
        decode_batch=split(settings.engine.decode_batch, settings.engine.decode_batch)[0]
        if settings.engine.decode_batch
        else None,
    )
    return DiffusersEngine(
        device=device,
        dtype=dtype or settings.engine.dtype,
        locate=locate,
        resident_bytes=resident,
        speedups=speedups,
        text_encoders=TextEncoders(offload=settings.engine.offload_text_encoders, ahead=settings.engine.encode_ahead),
    )


def check_quantization(settings: Settings, device: str | None = None) -> None:
    """Raise SettingsError if this device, or any of this machine, cannot do what ``SDP_ENGINE__QUANTIZE`` asks."""
    if settings.engine.quantize is None or settings.engine.fake_seconds_per_batch is not None:
        return
    _need_engine()
    from sdpipeline.engine.stepwise.quantization import check

    for each in [device] if device else sorted(set(devices(settings))):
        check(settings.engine.quantize, each, settings.engine.dtype)


def check_engine(settings: Settings) -> None:
    """Raise SettingsError if a package of the extra ``engine`` is missing. Imports none: torch alone takes seconds."""
    missing = [name for name in ENGINE_PACKAGES if find_spec(name) is None]
    if missing and settings.engine.fake_seconds_per_batch is None:
        message = f"this machine cannot make pictures: no {missing[0]}"
        raise SettingsError(Mistake(message=message, fix="pip install 'sdpipeline[engine]'"))


def _need_engine() -> None:
    """Import the engine; raises SettingsError if it is not installed."""
    # Spinning threads make a busy CPU four to six times slower. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import sdpipeline.engine.diffusers.engine  # noqa: F401
    except ModuleNotFoundError as error:
        fix = "pip install 'sdpipeline[engine]'"
        raise SettingsError(Mistake(message=f"this machine cannot make pictures: no {error.name}", fix=fix)) from error


def random_checkpoint(name: str, folder: Path, device: str) -> Path:
    """Return a checkpoint of a well-known shape with random weights, for benches; see
    :mod:`sdpipeline.bench.shapes`."""
    _need_engine()
    from sdpipeline.bench.random_weights import ensure

    return ensure(name, folder, device=device)


def devices(settings: Settings) -> list[str]:
    """Return the devices of this machine's workers: those of the settings, else every GPU, else the CPU."""
    if settings.device is not None:
        return [settings.device] * (settings.workers or 1)
    gpus = gpu_count()
    if not gpus:
        return ["cpu"] * (settings.workers or 1)
    return [f"cuda:{n % gpus}" for n in range(settings.workers or gpus)]


@dataclass(frozen=True, slots=True)
class OpenWorker:
    """Registered worker that takes campaigns by name, for the flows and the ``worker`` command."""

    worker: Worker
    team: str

    def run(
        self,
        *,
        campaign: str | None = None,
        until_idle: bool = True,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> WorkerSummary:
        """Call :meth:`sdpipeline.worker.worker.Worker.run` with the campaign's name."""
        database = self.worker.audit.database
        known = partial(known_campaign, database, self.team)
        campaign_id = None if campaign is None else until_available(partial(known, campaign), stop)
        return self.worker.run(campaign_id=campaign_id, until_idle=until_idle, stop=stop, on_progress=on_progress)


@contextmanager
def open_worker(
    settings: Settings, *, device: str | None = None, stop: threading.Event | None = None
) -> Iterator[OpenWorker]:
    """Open a worker on one device, registered while it lives; its checkpoints stay loaded between runs.

    An outage of the database is waited out; raises DatabaseUnavailableError if ``stop`` is set meanwhile.
    """
    key, stop = picture_key(settings), stop or threading.Event()
    with services(settings, until=stop) as have:
        have.store.check()
        until_available(partial(audit.refuse_restored, have.database, have.store), stop)
        chosen = device or devices(settings)[0]
        with delivery_process(settings, key, have.database, settings.storage) as (worker_id, deliverer):
            engine = until_available(partial(build_engine, settings, chosen, have.database), stop)
            worker = make_worker(
                settings, have.database, have.store, engine, key, worker_id=worker_id, deliverer=deliverer
            )
            with registered(settings, worker, chosen, stop=stop):
                yield OpenWorker(worker, settings.team)


@contextmanager
def registered(
    settings: Settings, worker: Worker, device: str, *, stop: threading.Event | None = None
) -> Iterator[Worker]:
    """Register the worker in the database while the block runs. With ``stop``, an outage at the start is waited out."""

    def register() -> None:
        with worker.audit.transaction() as tx:
            declare(tx, "marks", _marking(settings, worker.signing))
            about = {"worker_id": worker.worker_id, "host": socket.gethostname(), "device": device}
            workers.register(tx, pid=os.getpid(), description=worker.engine.describe(), **about)

    register() if stop is None else until_available(register, stop)
    try:
        yield worker
    finally:
        try:
            with worker.audit.transaction() as tx:
                workers.stop(tx, worker_id=worker.worker_id)
        except DatabaseUnavailableError as error:  # its leases expire without a heartbeat
            _log.warning("worker_end_not_recorded", error=str(error))


@contextmanager
def delivery_process(
    settings: Settings, key: SigningKey, database: Database, storage_url: str
) -> Iterator[tuple[str, DeliveryProcess | None]]:
    """Yield the identity of a new worker and, unless the engine is the double, a delivery process for it.

    The double would gain nothing from one. The process starts in the background and ends with the block.
    """
    worker_id = secrets.token_hex(16)
    if settings.engine.fake_seconds_per_batch is not None:
        yield worker_id, None
        return
    to = Destination(
        settings=settings,
        storage_url=storage_url,
        database_url=database.writer.url.render_as_string(hide_password=False),
        actor=_worker_actor(worker_id),
        certificate=key.fingerprint,
    )
    deliverer = DeliveryProcess(to, connections=settings.deliverers, bounds=Bounds.of(settings))
    deliverer.begin()
    try:
        yield worker_id, deliverer
    finally:
        deliverer.close()


def _worker_actor(worker_id: str) -> str:
    return f"worker:{worker_id} sdpipeline/{__version__}"


def make_worker(
    settings: Settings,
    database: Database,
    store: ObjectStore,
    engine: Engine,
    key: SigningKey,
    *,
    worker_id: str | None = None,
    deliverer: DeliveryProcess | None = None,
) -> Worker:
    """Build a worker from the settings, not registered yet.

    Raises DeliveryUnavailableError if its ``deliverer`` does not start, before any lease is taken.
    """
    worker_id = worker_id or secrets.token_hex(16)
    if deliverer is not None:
        deliverer.check()
    limits = WorkerLimits(
        max_batch=settings.engine.max_batch,
        lease_ttl_s=settings.lease_ttl_s,
        max_pixels=settings.inputs.max_pixels,
        gpu_second_cost=(settings.cost_per_gpu_hour or 0.0) / 3600,
        shutdown_grace_s=settings.shutdown_grace_s,
        deliverers=settings.deliverers,
    )
    return Worker(
        worker_id,
        AuditLog(database, actor=_worker_actor(worker_id)),
        store,
        engine,
        limits,
        key,
        ForeignObjects(s3_options(settings)),
        breaker=CircuitBreaker(max_failures=settings.worker_max_failures),
        timings=BatchTimings(settings.batch_timeout_s),
        aging=AgingPolicy(settings.fairness_max_wait_s),
        prefetch_weights=_foreseeing(engine),
        trust_anchors=trust_anchors(settings),
        deliverer=deliverer,
    )


def _foreseeing(engine: Engine) -> Callable[[CheckpointRef], None] | None:
    """Return a function that has the kernel read the next checkpoint's weights ahead; None for the double."""
    residency = getattr(engine, "residency", None)
    if residency is None:
        return None

    def prefetch_weights(ref: CheckpointRef) -> None:
        with suppress(CheckpointError):  # loading them reports what is wrong
            read_ahead(residency.files(ref))

    return prefetch_weights


def run_worker(
    settings: Settings,
    *,
    campaign: str | None,
    until_idle: bool,
    device: str | None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> WorkerSummary:
    """Run one worker from start to end, outside a flow."""
    with open_worker(settings, device=device, stop=stop) as worker:
        return worker.run(campaign=campaign, until_idle=until_idle, stop=stop, on_progress=on_progress)


def known_campaign(database: Database, team: str, name: str) -> int:
    """Return the campaign's id; raises BadInputError listing the known campaigns."""
    with database.read() as connection:
        found = queries.campaign_id(connection, team=team, name=name)
        names = ", ".join(queries.campaign_names(connection, team=team)) or "none yet"
    if found is None:
        raise BadInputError(Mistake(message=f"no campaign {name!r}", fix=f"there are: {names}"))
    return found


def campaign_progress(settings: Settings, campaign: str) -> Progress:
    """Return the progress of a submitted campaign."""
    with services(settings) as have:
        campaign_id = known_campaign(have.database, settings.team, campaign)
        with have.database.read() as connection:
            return queries.progress(connection, campaign_id)


def newest_pictures(
    settings: Settings, campaign: str, *, max_bytes: int = 200_000, kept: Thumbnails | None = None
) -> bytes | None:
    """Return the newest pictures as one small JPEG; ``kept`` caches thumbnails so that a redraw need not read them
    again."""
    with services(settings) as have:
        campaign_id = known_campaign(have.database, settings.team, campaign)
        return contact_sheet.draw(have.database, have.store, campaign_id, max_bytes=max_bytes, kept=kept)


def failures(settings: Settings, campaign: str, *, limit: int = 100) -> list[Json]:
    """Return the first failed, then blocked jobs with their reasons."""
    with services(settings) as have:
        campaign_id = known_campaign(have.database, settings.team, campaign)
        with have.database.read() as connection:
            return queries.failures(connection, campaign_id, limit)


def finish_report(settings: Settings, campaign: str, span: Span | None = None) -> str:
    """Return the closing report as markdown; ``span`` is the run that closes."""
    with services(settings) as have:
        campaign_id = known_campaign(have.database, settings.team, campaign)
        return report.closing_report(have.database, have.store, campaign_id, span=span)


def release_worker_leases(settings: Settings, pid: int) -> int:
    """Release the leases of a dead local worker process, as after a crash; return the number of jobs."""
    with services(settings) as have:
        with have.database.read() as connection:
            dead = queries.worker_ids_of(connection, host=socket.gethostname(), pid=pid)
        with have.audit.transaction() as tx:
            held = leasing.open_leases(tx.connection, dead)
            returned = jobs.reap(tx, lease_ids=held) if held else 0
            for worker_id in dead:
                workers.stop(tx, worker_id=worker_id)
        return returned


def seal(settings: Settings) -> int:
    """Seal the new events of the audit log, as a flow does every half hour; return their number."""
    with services(settings) as have:
        key = seal_key(settings)
        _declare_sealing(have, key)
        return audit.seal(have.database, have.store, key)


def seal_here(settings: Settings) -> int | None:
    """Seal the new events of the audit log; return None if this process has only the public key and another one
    seals."""
    if settings.signing.seal_public_key_file is not None:
        _log.info("seal_skipped", reason="SDP_SIGNING__SEAL_PUBLIC_KEY_FILE is set: another process seals")
        return None
    return seal(settings)


def seal_or_wait(settings: Settings) -> int:
    """Seal the new events of the audit log, or wait until the process with the seal key has done so.

    Raises SealOverdueError if that process does not seal within five minutes. Returns the number of events.
    """
    if (sealed := seal_here(settings)) is not None:
        return sealed
    with services(settings) as have:
        return audit.wait_for_seal(have.database, timeout_s=SEAL_TIMEOUT_S)


def keep_sealing(
    settings: Settings,
    stop: threading.Event,
    *,
    every_s: float,
    events: int,
    on_seal: Callable[[int], None] | None = None,
) -> None:
    """Seal the audit log at an interval until ``stop`` is set, and earlier once ``events`` new events exist."""
    with services(settings, until=stop) as have:
        key = seal_key(settings)
        until_available(partial(_declare_sealing, have, key), stop)
        audit.watch(have.database, have.store, key, stop, every_s=every_s, events=events, on_seal=on_seal)


def _declare_sealing(have: Services, key: audit.SealKey) -> None:
    lock = have.store.retention
    values = {"keys": list(key.public), "lock": lock and {"mode": lock.mode, "days": lock.days}}
    with have.audit.transaction() as tx:
        declare(tx, "seals", values)


def _marking(settings: Settings, key: SigningKey) -> Json:
    """Return every setting that affects marks and signatures; files appear by name only, secrets not at all."""
    fields = settings.signing.model_dump(exclude={"seal_key_file", "seal_public_key_file", "retired_seal_keys"})
    shown = {name: value.name if isinstance(value, Path) else value for name, value in fields.items()}
    told = {name: value for name, value in shown.items() if isinstance(value, str | int | float | list | None)}
    return told | {"signer": key.identity, "certificate_sha256": key.fingerprint}


def actor(settings: Settings) -> str:
    """Return the actor and release that every audit event of this process records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"user:{settings.actor or f'{user}@{socket.gethostname()[:80]}'} sdpipeline/{__version__}"
