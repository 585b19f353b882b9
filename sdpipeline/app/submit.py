"""Submission of a campaign file from a path, a bucket or a text."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sdpipeline import audit
from sdpipeline.app import services
from sdpipeline.campaigns import expand, submission
from sdpipeline.db import job_control
from sdpipeline.db.submit import Submitted
from sdpipeline.errors import BadInputError, InputImageError, Mistake
from sdpipeline.settings import Settings

EDITION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_edition(edition: str | None) -> None:
    """Raise BadInputError if this cannot be the name of an edition."""
    if edition is not None and not EDITION_NAME.fullmatch(edition):
        fix = "write at most 63 of a-z, 0-9 and -, as in 2026-11-25"
        raise BadInputError(Mistake(message=f"--edition {edition!r} is no name", fix=fix))


@contextmanager
def campaign_file(settings: Settings, *, url: str | None = None, text: str | None = None) -> Iterator[Path]:
    """Yield a remote or inline campaign file as a local one, alone in its folder.

    Raises BadInputError for an address outside ``SDP_INPUTS__ALLOWED``, or for one with no object.
    """
    with tempfile.TemporaryDirectory(prefix="sdp-campaign-") as folder:
        path = Path(folder) / "campaign.yaml"
        if url is not None:
            inputs = services.input_folder(settings, path.parent)
            try:
                shutil.copyfile(inputs.table(url), path)
            except InputImageError as error:
                raise BadInputError(Mistake(message=f"no campaign file: {error}")) from error
        else:
            path.write_text(text or "", encoding="utf-8")
        yield path


def submit(
    settings: Settings, file: Path, *, prune: bool = False, edition: str | None = None, now: datetime | None = None
) -> tuple[str, Submitted]:
    """Submit a campaign file, after a complete check that comes before the embedded database is created.

    ``now`` is the time its schedule fired, which names its edition.
    """
    check_edition(edition)
    if not services.database_exists(settings):
        expand.check(*services.load_campaign(settings, file, edition=edition, now=now))
    services.open_storage(settings).check()
    with services.services(settings) as have:
        audit.refuse_restored(have.database, have.store)
        campaign, inputs = services.load_campaign(settings, file, have.database, edition=edition, now=now)
        done = submission.submit(
            campaign,
            inputs,
            have.audit,
            have.store,
            team=settings.team,
            max_attempts=settings.max_attempts,
            prune=prune,
        )
    return campaign.spec.name, done


def reopen(settings: Settings, campaign: str, status: str) -> tuple[int, int]:
    """Reopen the jobs of a status; return how many were reopened, and how many were not because a policy forbids
    them."""
    with services.services(settings, create=False) as have:
        campaign_id = services.known_campaign(have.database, settings.team, campaign)
        with have.audit.transaction() as tx:
            count = job_control.retry(tx, campaign_id=campaign_id, statuses=[status])
            return count, job_control.forbidden(tx.connection, campaign_id=campaign_id, status=status)
