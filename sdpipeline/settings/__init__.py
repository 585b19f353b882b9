"""Settings with prefix ``SDP_``, nested with ``__``, from the environment, ``.env`` and ``sdpipeline.toml``."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from pydantic_settings.exceptions import SettingsError as UnreadableValueError

from sdpipeline.errors import Mistake, SettingsError
from sdpipeline.settings.fields import (
    DEFAULT_HOME,
    LOOPBACK,
    EngineSettings,
    RetentionSettings,
    Settings,
    SigningSettings,
    embedded_database,
    embedded_storage,
    on_loopback,
    setting_names,
)
from sdpipeline.settings.mistakes import not_json, unknown_names, wrong_values
from sdpipeline.settings.sources import PREFIX, TOML_NAME, toml_keys, written_settings

__all__ = [
    "DEFAULT_HOME",
    "LOOPBACK",
    "PREFIX",
    "TOML_NAME",
    "EngineSettings",
    "RetentionSettings",
    "Settings",
    "SigningSettings",
    "embedded_database",
    "embedded_storage",
    "load",
    "on_loopback",
    "setting_names",
    "toml_keys",
]


def load(*, home: Path | None = None) -> Settings:
    """Read all sources; raises SettingsError naming every wrong or unknown setting at once."""
    found = written_settings(Path.cwd())
    mistakes = unknown_names(found)
    try:
        settings = Settings() if home is None else Settings(home=home)
    except ValidationError as error:
        raise SettingsError(*mistakes, *wrong_values(error, found)) from error
    except UnreadableValueError as error:
        raise SettingsError(*mistakes, *(not_json(found) or [Mistake(message=str(error))])) from error
    if mistakes:
        raise SettingsError(*mistakes)
    return settings.model_copy(update={"home": settings.home.resolve()})
