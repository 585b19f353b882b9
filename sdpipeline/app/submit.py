"""Submission of a campaign file from a path, a bucket or a text."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sdpipeline.app.campaign_files import check_edition, input_folder, load_campaign
from sdpipeline.app.services import Services, database_exists, open_services
from sdpipeline.app.stores import open_storage
from sdpipeline.audit import refuse_restored
from sdpipeline.campaigns import expand, submission
from sdpipeline.db.submit import Submitted
from sdpipeline.errors import BadInputError, InputImageError, Mistake
from sdpipeline.settings import Settings


@contextmanager
def campaign_file(settings: Settings, *, url: str | None = None, text: str | None = None) -> Iterator[Path]:
    """Yield a remote or inline campaign file as a local one, alone in its folder.

    Raises BadInputError for an address outside ``SDP_INPUTS__ALLOWED``, or for one with no object.
    """
    with tempfile.TemporaryDirectory(prefix="sdp-campaign-") as folder:
        path = Path(folder) / "campaign.yaml"
        if url is not None:
            inputs = input_folder(settings, path.parent)
            try:
                shutil.copyfile(inputs.table(url), path)
            except InputImageError as error:
                raise BadInputError(Mistake(message=f"no campaign file: {error}")) from error
        else:
            path.write_text(text or "", encoding="utf-8")
        yield path


@contextmanager
def open_to_submit(
    settings: Settings, file: Path, *, edition: str | None = None, now: datetime | None = None, strict: bool = False
) -> Iterator[Services]:
    """Open services to submit a campaign file; a new embedded database is made only after a complete check."""
    check_edition(edition)
    if not database_exists(settings):
        campaign, inputs = load_campaign(settings, file, edition=edition, now=now)
        expand.check(campaign, inputs)
        campaign.warnings.raise_if_strict(strict=strict)
    open_storage(settings).check()
    with open_services(settings) as services:
        yield services


def submit(
    services: Services,
    file: Path,
    *,
    prune: bool = False,
    edition: str | None = None,
    now: datetime | None = None,
    strict: bool = False,
) -> tuple[str, Submitted]:
    """Submit a campaign file; return the campaign's name and the counts of its jobs.

    ``now`` is the time its schedule fired, which names its edition. With ``strict``, warnings are errors.
    """
    check_edition(edition)
    settings = services.settings
    refuse_restored(services.database, services.store)
    campaign, inputs = load_campaign(settings, file, services.database, edition=edition, now=now)
    done = submission.submit(
        campaign,
        inputs,
        services.audit,
        services.store,
        team=settings.team,
        max_attempts=settings.max_attempts,
        prune=prune,
        strict=strict,
    )
    return campaign.spec.name, done
