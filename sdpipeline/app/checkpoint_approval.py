"""Approval of weights for campaigns: their terms, their defaults, and what ``checkpoints add`` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdpipeline.app.checkpoints import as_approved_before
from sdpipeline.app.model_card import read_model_card
from sdpipeline.app.services import Services
from sdpipeline.campaigns.checkpoint_defaults import AUTO, parsed_defaults
from sdpipeline.db import registry
from sdpipeline.db.registry import Approval
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.distilled import shown


def approve(services: Services, files: CheckpointFiles, approval: Approval, defaults: Sequence[str] = ()) -> Json:
    """Approve weights under their alias, and return the row to print.

    Without an approver it is the current user. Without a licence or a source they are those of the directory's model
    card. ``defaults`` are the values of ``--defaults``; without any, weights that were registered before keep theirs.
    Raises BadInputError for a wrong default.
    """
    files = as_approved_before(services.database, files)
    detected = files.defaults
    if defaults:
        files = replace(files, defaults=parsed_defaults(defaults, files))
    card = read_model_card(files.directory)
    terms = replace(
        approval,
        approved_by=approval.approved_by or services.audit.actor,
        licence=approval.licence or card.licence,
        source=approval.source or card.source or str(files.directory),
    )
    with services.audit.transaction() as tx:
        if not defaults:
            files = registry.with_registered_defaults(tx, files)
        registry.add(tx, files, terms)
    names = ("alias", "digest", "kind", "family", "native_size", "origin_sha256")
    document = {name: getattr(files, name) for name in names} | {"defaults": dict(files.defaults)}
    document |= {"licence": terms.licence, "source": terms.source, "notes": []}
    if detected and not defaults and not files.defaults:
        document["notes"].append(f"keeps its earlier defaults; --defaults {AUTO} sets {shown(detected)}")
    return document
