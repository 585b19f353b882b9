"""Every setting: prefix ``SDP_``, nested with ``__``, from the environment, ``.env`` and ``sdpipeline.toml``."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from sdpipeline.errors import Mistake, SettingsError

PREFIX = "SDP_"
TEST_PREFIX = "SDP_TEST_"
TOML_NAME = "sdpipeline.toml"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class S3Settings(_Section):
    """How to reach the S3 endpoint that ``SDP_STORAGE_URL`` names; credentials come from boto3's own chain."""

    endpoint_url: str | None = Field(None, description="endpoint of an S3 server that is not AWS")
    region: str | None = Field(None, description="region, where boto3's own chain names none")
    addressing_style: Literal["auto", "path", "virtual"] = Field("auto", description="how buckets are addressed")
    sse_kms_key_id: str | None = Field(None, description="encrypt objects with this KMS key")
    tags: dict[str, str] = Field(default_factory=dict, description="tags put on every object, as JSON")
    object_lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = Field(None, description="lock seals and exports")
    object_lock_days: int = Field(365, ge=1, description="days a locked seal or export is retained")
    presigned_expiry_s: int = Field(3600, ge=1, le=604800, description="seconds a presigned link works")


class InputSettings(_Section):
    """What a campaign may read."""

    allowed: list[str] = Field(
        default_factory=list,
        description="folders or s3:// prefixes inputs may come from, as JSON; default: the campaign file's folder",
    )
    max_pixels: int = Field(64_000_000, ge=1, description="largest input picture, in pixels")


class EngineSettings(_Section):
    """How pictures are made on this machine."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="compute type; default float32 on a CPU and bfloat16 on a GPU"
    )
    max_batch: int = Field(8, ge=1, le=64, description="largest batch, before memory sets a lower cap")
    resident_gib: float | None = Field(None, gt=0, description="memory for loaded checkpoints, GiB")
    fake_seconds_per_batch: float | None = Field(
        None, ge=0, description="use the fake engine with this batch time (load tests only)"
    )


class SigningSettings(_Section):
    """The keys that sign; a development key is made only beside the embedded database."""

    seal_key_file: Path | None = Field(None, description="PEM file with the Ed25519 key that seals the audit log")


class Settings(BaseSettings):
    """One immutable value, read once per process by ``bootstrap``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", frozen=True, env_file=".env"
    )

    home: Path = Field(Path("sdp-home"), description="folder of the embedded default: database, pictures, logs, keys")
    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL; default SQLite in SDP_HOME")
    storage_url: str | None = Field(None, description="file:///dir or s3://bucket/prefix; default a folder in SDP_HOME")
    team: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="owner of campaigns and pictures")
    device: str | None = Field(None, description="cpu, cuda or cuda:N; default the first GPU, else cpu")
    workers: int | None = Field(
        None, ge=1, le=256, description="local worker processes; default one per GPU, or one on a CPU"
    )
    lease_ttl_s: float = Field(60.0, ge=1.0, le=3600.0, description="seconds until a silent worker's jobs are redone")
    max_attempts: int = Field(3, ge=1, le=20, description="attempts before a job is failed")
    checkpoints_dir: Path | None = Field(
        None, description="folder whose sub-folders are checkpoints by alias; default checkpoints in SDP_HOME"
    )
    log_format: Literal["console", "json"] = Field("console", description="how logs are written to stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="least level logged")
    s3: S3Settings = Field(default_factory=S3Settings)
    inputs: InputSettings = Field(default_factory=InputSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    signing: SigningSettings = Field(default_factory=SigningSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, ``.env``, then the nearest ``sdpipeline.toml``."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=find_toml(Path.cwd()))
        return init_settings, env_settings, dotenv_settings, toml

    @property
    def database(self) -> str:
        """The database URL in force, password included: never print it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home / 'sdpipeline.db'}"

    @property
    def storage(self) -> str:
        """The storage URL in force."""
        return self.storage_url or (self.home.expanduser().resolve() / "storage").as_uri()

    @property
    def checkpoints(self) -> Path:
        """The folder of this deployment's own checkpoints."""
        return self.checkpoints_dir or self.home / "checkpoints"

    @property
    def embedded(self) -> bool:
        """Whether the database is the embedded default."""
        return self.database.startswith("sqlite")

    @property
    def prefect_api_url(self) -> str | None:
        """A Prefect server of one's own, by Prefect's own variable."""
        return os.environ.get("PREFECT_API_URL") or None


def load(*, home: Path | None = None, cwd: Path | None = None) -> Settings:
    """Read all sources; raises SettingsError naming every wrong or unknown setting at once."""
    mistakes = unknown_names(cwd or Path.cwd())
    if mistakes:
        raise SettingsError(*mistakes)
    try:
        settings = Settings() if home is None else Settings(home=home)
    except ValidationError as error:
        raise SettingsError(*(_mistake(fault) for fault in error.errors())) from error
    return settings.model_copy(update={"home": settings.home.expanduser().resolve()})


def find_toml(start: Path) -> Path | None:
    """The nearest ``sdpipeline.toml``, walking up from ``start``."""
    return next((p / TOML_NAME for p in (start, *start.parents) if (p / TOML_NAME).is_file()), None)


def setting_names() -> dict[str, tuple[str, Any]]:
    """Every ``SDP_`` name with its description and default, for the README, ``init`` and suggestions."""
    return dict(_names(Settings, PREFIX))


def unknown_names(cwd: Path) -> list[Mistake]:
    """``SDP_`` names in the environment, ``.env`` or ``sdpipeline.toml`` that are no setting."""
    known = setting_names()
    tables = {name for name, (_, default) in known.items() if isinstance(default, dict)}
    places: list[tuple[str, str]] = [(name, "the environment") for name in os.environ]
    places += [(name, ".env") for name in dotenv_values(cwd / ".env")] if (cwd / ".env").is_file() else []
    mistakes = []
    for name, place in places:
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper.startswith(TEST_PREFIX) or upper in known:
            continue
        if upper in _sections() or any(upper.startswith(table + "__") for table in tables):
            continue
        mistakes.append(Mistake(file=place, key=name, message="no such setting", fix=_nearest(upper, list(known))))
    return mistakes + _unknown_in_toml(find_toml(cwd), known)


def _unknown_in_toml(path: Path | None, known: dict[str, tuple[str, Any]]) -> list[Mistake]:
    if path is None:
        return []
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        return [Mistake(file=str(path), message=f"cannot be read: {error}")]
    lines = path.read_text(encoding="utf-8").splitlines()
    mistakes = []
    for key in _toml_keys(document):
        if PREFIX + "__".join(key).upper() in known or (len(key) > 1 and _is_table_entry(key, known)):
            continue
        line = next((n for n, text in enumerate(lines, 1) if text.split("=")[0].strip().strip("[]") == key[-1]), None)
        plain = {name.removeprefix(PREFIX).lower().replace("__", "."): name for name in known}
        mistakes.append(
            Mistake(
                file=str(path),
                line=line,
                key=".".join(key),
                message="no such setting",
                fix=_nearest(".".join(key), list(plain)),
            )
        )
    return mistakes


def _is_table_entry(key: tuple[str, ...], known: dict[str, tuple[str, Any]]) -> bool:
    return isinstance(known.get(PREFIX + "__".join(key[:-1]).upper(), ("", None))[1], dict)


def _toml_keys(document: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for name, value in document.items():
        keys += _toml_keys(value, (*prefix, name)) if isinstance(value, dict) and value else [(*prefix, name)]
    return keys


def _names(model: type[BaseModel], prefix: str) -> list[tuple[str, tuple[str, Any]]]:
    found: list[tuple[str, tuple[str, Any]]] = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found += _names(type(default), f"{prefix}{name.upper()}__")
        else:
            found.append((f"{prefix}{name.upper()}", (field.description or "", default)))
    return found


def _sections() -> set[str]:
    fields = Settings.model_fields.items()
    return {PREFIX + n.upper() for n, f in fields if isinstance(f.get_default(call_default_factory=True), BaseModel)}


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "see the settings table in the README"


def _mistake(fault: Any) -> Mistake:
    name = PREFIX + "__".join(str(part).upper() for part in fault["loc"])
    return Mistake(key=name, message=fault["msg"])
