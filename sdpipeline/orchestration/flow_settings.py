"""Settings of a flow run, which a deployed run takes from the environment of its `prefect worker`."""

from __future__ import annotations

from pathlib import Path

from sdpipeline import logs
from sdpipeline.app.services import load_settings
from sdpipeline.errors import Mistake, SettingsError
from sdpipeline.private_files import keep_private
from sdpipeline.settings import DEFAULT_HOME, Settings


def load(home: Path | None = None) -> Settings:
    """Load the settings and configure logging; raises SettingsError if no database is configured.

    A deployed run works in a folder that is deleted when it ends, and the embedded default would lie in it.
    """
    keep_private()
    settings = load_settings(home)
    logs.configure_logging(settings)
    if home is None and settings.embedded and settings.home == DEFAULT_HOME.resolve():
        fix = "set it in the environment of `prefect worker start`, or SDP_HOME as a whole path"
        raise SettingsError(Mistake(key="SDP_DATABASE_URL", message="is not set where this flow runs", fix=fix))
    return settings
