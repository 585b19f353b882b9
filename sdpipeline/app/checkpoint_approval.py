"""Approval of weights for campaigns: their terms, their defaults, and what ``checkpoints add`` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdpipeline.app.checkpoints import as_approved_before, catalog
from sdpipeline.app.model_card import read_model_card
from sdpipeline.app.services import Services
from sdpipeline.campaigns.checkpoint_defaults import AUTO, parsed_defaults
from sdpipeline.db import registry
from sdpipeline.db.registry import Approval
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.distilled import shown
from sdpipeline.errors import BadInputError, Mistake


def approve(services: Services, files: CheckpointFiles, approval: Approval, defaults: Sequence[str] = ()) -> Json:
    """Approve weights under their alias, and return the row to print.

    Without an approver it is the current user. Without a licence or a source they are those of the directory's model
    card. ``defaults`` are the values of ``--defaults``. Weights that were registered before keep their defaults and
    their licence, unless others are given. Raises BadInputError for a wrong default, and for an alias of weights of
    another kind.
    """
    files = as_approved_before(services.database, files)
    before = catalog(services.settings, services.database).get(files.alias)
    _refuse_other_kind(files, before)
    detected = files.defaults
    if defaults:
        files = replace(files, defaults=parsed_defaults(defaults, files))
    card = read_model_card(files.directory)
    earlier_licence = before.licence if before is not None and before.digest == files.digest else None
    terms = replace(
        approval,
        approved_by=approval.approved_by or services.audit.actor,
        licence=approval.licence or earlier_licence or card.licence,
        source=approval.source or card.source or str(files.directory),
    )
    with services.audit.transaction() as tx:
        if not defaults:
            files = registry.with_registered_defaults(tx, files)
        registry.add(tx, files, terms)
    names = ("alias", "digest", "kind", "family", "native_size", "origin_sha256")
    document = {name: getattr(files, name) for name in names} | {"defaults": dict(files.defaults)}
    document |= {"licence": terms.licence, "source": terms.source, "notes": []}
    if before is not None and before.digest != files.digest:
        document["notes"].append(f"{files.alias} meant other weights until now, digest {before.digest[:16]}")
    if detected and not defaults and not files.defaults:
        document["notes"].append(f"keeps its earlier defaults; --defaults {AUTO} sets {shown(detected)}")
    return document


def _refuse_other_kind(files: CheckpointFiles, before: CheckpointFiles | None) -> None:
    """Refuse an alias that means weights of another kind: every campaign that names it would fail."""
    if before is not None and before.kind != files.kind:
        message = f"alias {files.alias!r} is a {before.kind}, and these weights are a {files.kind}"
        raise BadInputError(Mistake(message=message, fix="choose another alias"))
