"""Settings with their types, defaults and checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from sdpipeline.errors import PERCENT_ENCODE, Mistake, SettingsError
from sdpipeline.settings.sources import PREFIX, NearestToml, fields_by_name

DEFAULT_HOME = Path("sdp-home")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def on_loopback(url: str) -> bool:
    """Return True for a URL of this machine, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in LOOPBACK or host.startswith("127.")


def _refuse_password(url: str | None, fix: str) -> str | None:
    """Refuse an address that contains a password: addresses are shown in errors and logs."""
    if url is not None and "@" in url:
        raise ValueError(f"expected an address without user and password: {fix}")
    return url


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class S3Settings(_Section):
    """Access to the S3 endpoint that ``SDP_STORAGE_URL`` names; credentials come from boto3's own chain."""

    endpoint_url: str | None = Field(None, description="endpoint of an S3 server that is not AWS")
    region: str | None = Field(None, description="region, if boto3's own chain sets none")
    addressing_style: Literal["auto", "path", "virtual"] = Field("auto", description="bucket addressing style")
    sse_kms_key_id: str | None = Field(None, description="encrypt objects with this KMS key")
    tags: dict[str, str] = Field(default_factory=dict, description="tags put on every object, as JSON")
    object_lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = Field(
        None, description="object lock mode of seals and exports"
    )
    object_lock_days: int = Field(365, ge=1, description="days a locked seal or export is retained")

    @field_validator("endpoint_url")
    @classmethod
    def _without_password(cls, url: str | None) -> str | None:
        return _refuse_password(url, "write AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


class InputSettings(_Section):
    """Inputs that a campaign may read."""

    allowed: list[str] = Field(
        default_factory=list,
        description="allowed folders and s3://bucket/prefix of inputs, as JSON; default: the campaign file's folder",
    )
    max_pixels: int = Field(64_000_000, ge=1, description="largest input picture, in pixels")


class EngineSettings(_Section):
    """Engine settings of this machine."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="compute type; default float32 on a CPU and bfloat16 on a GPU"
    )
    max_batch: int = Field(8, ge=1, le=64, description="maximum batch size; memory may set a lower one")
    resident_gib: float | None = Field(None, gt=0, description="memory limit for loaded checkpoints, in GiB")
    offload_text_encoders: Literal["auto", "always", "never"] = Field(
        "auto",
        description="move text encoders off the device after encoding; `auto`: only once memory is short",
    )
    compile: bool = Field(
        default=False, description="compile repeated blocks of the networks, for `fast` and `turbo` pictures"
    )
    channels_last: bool = Field(
        default=False, description="channels-last memory format, for `fast` and `turbo` pictures"
    )
    attention: Literal["flash", "efficient", "cudnn", "math"] | None = Field(
        None, description="attention kernel of `fast` and `turbo` pictures; default: torch chooses"
    )
    quantize: Literal["int8", "fp8"] | None = Field(
        None, description="eight-bit matrix products in the denoiser, for `fast` and `turbo` pictures; fp8 needs a GPU"
    )
    decode_batch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="maximum number of `fast` and `turbo` pictures decoded at once; default the whole batch",
    )
    fake_seconds_per_batch: float | None = Field(
        None, ge=0, description="use the fake engine with this batch time (load tests only)"
    )


class SigningSettings(_Section):
    """Signing keys; a development key is created only next to the embedded database."""

    seal_key_file: Path | None = Field(None, description="PEM file with the Ed25519 key that seals the audit log")
    seal_public_key_file: Path | None = Field(
        None, description="PEM file with the public half of the seal key, if another process seals"
    )
    retired_seal_keys: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        default_factory=list,
        description="public keys (64 hexadecimal digits each), as JSON; seals made with them stay valid",
    )
    certificates_file: Path | None = Field(
        None, description="PEM file with the certificate chain for signing pictures: leaf first, without the root"
    )
    key_file: Path | None = Field(None, description="PEM file with the private key of that certificate")
    key_password: SecretStr | None = Field(None, description="password of that file")
    kms_key_id: str | None = Field(None, description="key in AWS KMS that signs pictures, instead of a key file")
    kms_endpoint_url: str | None = Field(None, description="endpoint of a KMS that is not AWS")
    kms_region: str | None = Field(None, description="region of the KMS, if boto3's own chain sets none")
    tsa_url: str | None = Field(None, description="RFC 3161 authority that confirms when a picture was signed")
    trust_file: Path | None = Field(
        None, description="PEM file with the trusted roots, including old ones and that of the time authority"
    )

    @field_validator("seal_public_key_file")
    @classmethod
    def _one_half(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if key is not None and info.data.get("seal_key_file") is not None:
            raise ValueError("SDP_SIGNING__SEAL_KEY_FILE is set too: name one of the two")
        return key

    @field_validator("kms_endpoint_url", "tsa_url")
    @classmethod
    def _without_password(cls, url: str | None) -> str | None:
        """Refuse passwords: these addresses are in the audit log and in c2pa's errors."""
        return _refuse_password(url, "put a proxy that adds them in front")


class DispatchSettings(_Section):
    """Number of workers of a deployed campaign, by its ready and leased jobs."""

    min_workers: int = Field(
        1, ge=1, le=1000, description="minimum number of workers of a deployed campaign with unfinished jobs"
    )
    max_workers: int = Field(
        8, ge=1, le=1000, validate_default=True, description="maximum number of workers of a deployed campaign"
    )
    jobs_per_worker: int = Field(64, ge=1, description="ready and leased jobs per worker of a deployed campaign")

    @field_validator("max_workers")
    @classmethod
    def _no_fewer(cls, most: int, info: ValidationInfo) -> int:
        if most < info.data.get("min_workers", most):
            raise ValueError("is fewer than SDP_DISPATCH__MIN_WORKERS")
        return most


class GatewaySettings(_Section):
    """Credentials that workers use for the Prefect gateway."""

    worker_auth: SecretStr | None = Field(
        None, description="USER:PASSWORD of GPU workers for `prefect-gateway`; their PREFECT_API_AUTH_STRING"
    )
    dispatcher_auth: SecretStr | None = Field(
        None, description="USER:PASSWORD of the worker of the pool `cpu` for `prefect-gateway`"
    )

    @field_validator("worker_auth", "dispatcher_auth")
    @classmethod
    def _user_and_password(cls, auth: SecretStr | None) -> SecretStr | None:
        if auth is not None and not all(auth.get_secret_value().partition(":")):
            raise ValueError("expected USER:PASSWORD")
        return auth


class RetentionSettings(_Section):
    """Retention periods that the command ``retention`` applies; without a number of days, data is kept for ever."""

    editions_days: float | None = Field(
        None, ge=0, description="days after which `retention` moves a closed edition from the database into an archive"
    )
    pictures_days: float | None = Field(None, ge=0, description="days after which `retention` deletes a picture")
    prompts_days: float | None = Field(
        None, ge=0, description="days after which `retention` deletes the prompts of finished jobs without pictures"
    )

    @field_validator("prompts_days")
    @classmethod
    def _after_pictures(cls, days: float | None, info: ValidationInfo) -> float | None:
        pictures = info.data.get("pictures_days")
        if days is not None and (pictures is None or pictures > days):
            # A picture's file contains its prompt, in its record.
            raise ValueError("pictures contain their prompts: set SDP_RETENTION__PICTURES_DAYS to at most this value")
        return days


class Settings(BaseSettings):
    """Immutable settings, read once per process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file=".env",
        env_ignore_empty=True,  # `SDP_DEVICE=` in a compose file means unset
        extra="ignore",  # a .env may hold other programs' names; ours are checked one by one
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    home: Path = Field(DEFAULT_HOME, description="folder of the embedded default: database, pictures, logs, keys")
    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL; default SQLite in SDP_HOME")
    storage_url: str | None = Field(None, description="file:///dir or s3://bucket/prefix; default a folder in SDP_HOME")
    team: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="owner of campaigns and pictures")
    actor: str | None = Field(
        None, pattern=r"^[^\x00-\x1f\x7f]{1,120}$", description="actor name in the audit log; default user@host"
    )
    device: str | None = Field(None, description="cpu, cuda or cuda:N; default the first GPU, else cpu")
    workers: int | None = Field(
        None, ge=1, le=256, description="local worker processes; default one per GPU, or one on a CPU"
    )
    lease_ttl_s: float = Field(
        60.0, ge=1.0, le=3600.0, description="seconds without a heartbeat until a worker's jobs are leased again"
    )
    max_attempts: int = Field(3, ge=1, le=20, description="attempts until a job fails permanently")
    shutdown_grace_s: float = Field(
        20.0, ge=0.0, le=3600.0, description="grace period in seconds for a worker that is stopped to finish its batch"
    )
    deliverers: int = Field(4, ge=1, le=64, description="pictures that a worker encodes, marks and stores concurrently")
    worker_max_failures: int = Field(
        5, ge=1, le=1000, description="consecutive failed batches, not caused by a job, until a worker pauses"
    )
    batch_timeout_s: float = Field(
        0.0,
        ge=0.0,
        description="seconds until a batch counts as hung; 0: twenty times the usual duration, at least 600",
    )
    fairness_max_wait_s: float = Field(
        120.0, gt=0.0, description="seconds that a checkpoint's ready jobs may wait before they override priority"
    )
    reconcile_grace_s: float = Field(
        3600.0, ge=0.0, description="minimum age in seconds of an unrecorded object before reconcile reports it"
    )
    cost_per_gpu_hour: float | None = Field(
        None, ge=0.0, description="price of a GPU-hour, in any currency; for plans, budgets and job costs"
    )
    checkpoints_dir: Path | None = Field(
        None, description="folder with one sub-folder per checkpoint alias; default checkpoints in SDP_HOME"
    )
    policy_file: Path | None = Field(
        None, description="YAML file with a policy for every campaign, in addition to its own"
    )
    log_format: Literal["console", "json"] = Field("console", description="format of the log on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="minimum log level")
    s3: S3Settings = Field(default_factory=S3Settings)
    inputs: InputSettings = Field(default_factory=InputSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    signing: SigningSettings = Field(default_factory=SigningSettings)
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line, the environment, ``.env``, then the nearest ``sdpipeline.toml``."""
        return init_settings, env_settings, dotenv_settings, NearestToml(settings_cls)

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not _is_database_url(url.get_secret_value()):
            raise ValueError(f"expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; {PERCENT_ENCODE}")
        return url

    @field_validator("storage_url")
    @classmethod
    def _known_storage(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("file://", "s3://")):
            raise ValueError("expected file:///FOLDER or s3://BUCKET/PREFIX")
        if url is not None and url.startswith("s3://") and {"@", ":"} & set(url[5:].partition("/")[0]):
            raise ValueError("expected s3://BUCKET/PREFIX: write keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return url

    @field_validator("home", "checkpoints_dir", "policy_file")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @property
    def database(self) -> str:
        """Return the database URL in force, password included: never print it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return embedded_database(self.home)

    @property
    def storage(self) -> str:
        """Return the storage URL in force."""
        return self.storage_url or embedded_storage(self.home)

    @property
    def checkpoints(self) -> Path:
        """Return the folder of this deployment's own checkpoints."""
        return self.checkpoints_dir or self.home / "checkpoints"

    @property
    def embedded(self) -> bool:
        """Return True if the database is the embedded default."""
        return self.database.startswith("sqlite")

    @property
    def prefect_api_url(self) -> str | None:
        """Return the URL of an external Prefect server, PREFECT_API_URL; raises SettingsError if it contains a
        password."""
        url = os.environ.get("PREFECT_API_URL") or None
        if url is not None and "@" in url:
            message, fix = "contains user and password", "write them as PREFECT_API_AUTH_STRING=user:password"
            raise SettingsError(Mistake(key="PREFECT_API_URL", message=message, fix=fix))
        return url


def embedded_database(home: Path) -> str:
    """Return the database URL of the embedded default; SQLAlchemy decodes the quoting."""
    return f"sqlite:///{quote(str(home.expanduser().resolve() / 'sdpipeline.db'))}"


def embedded_storage(home: Path) -> str:
    """Return the storage URL of the embedded default."""
    return (home.expanduser().resolve() / "storage").as_uri()


def _is_database_url(url: str) -> bool:
    try:
        port = urlsplit(url).port
    except ValueError:
        return False
    if url.startswith("sqlite"):
        return re.match(r"sqlite(\+\w+)?://", url) is not None
    # Text after a second @ would be taken for the host and shown.
    return port != 0 and url.count("@") < 2 and re.match(r"postgresql(\+\w+)?://", url) is not None


def setting_names() -> dict[str, tuple[str, Any]]:
    """Return every ``SDP_`` name with its description and default, for the README, ``init`` and suggestions."""
    return {name: (info.description or "", default) for name, (info, default) in fields_by_name(Settings).items()}


def section_names() -> set[str]:
    """Return the ``SDP_`` names of the sections."""
    fields = Settings.model_fields.items()
    return {PREFIX + n.upper() for n, f in fields if isinstance(f.get_default(call_default_factory=True), BaseModel)}
