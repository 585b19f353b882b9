"""Commands of the checkpoint registry: checkpoints list, add, verify, revoke."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from sdpipeline.app.checkpoint_approval import approve
from sdpipeline.app.checkpoints import catalog, catalog_and_refused, place_of, shipped_card
from sdpipeline.app.model_card import read_model_card
from sdpipeline.app.services import existing_database, open_services
from sdpipeline.app.single_files import FILES
from sdpipeline.campaigns.spec_part import NAME
from sdpipeline.cli.output import (
    FOUND_FAULTS,
    AsJson,
    Home,
    load_settings,
    print_json,
    print_records,
    print_text,
    refuse,
    stdout,
)
from sdpipeline.cli.single_files import add_folder, add_single_file
from sdpipeline.db import registry
from sdpipeline.domain import Json
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect, verify
from sdpipeline.engine.distilled import shown
from sdpipeline.engine.hub import REPOSITORY, fetch
from sdpipeline.errors import CheckpointError
from sdpipeline.private_files import users_umask
from sdpipeline.settings import Settings
from sdpipeline.suggestions import nearest

_GROUP = typer.Typer(help="The registry of checkpoints allowed to run.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    for name, command in (("list", list_all), ("add", add), ("verify", verify_all), ("revoke", revoke)):
        _GROUP.command(name)(command)
    app.add_typer(_GROUP, name="checkpoints")


def list_all(*, home: Home = None, as_json: AsJson = False) -> None:
    """List every checkpoint, allowed, revoked or refused with the reason."""
    settings = load_settings(home)
    rows = _documents(settings)
    if as_json:
        print_json({"checkpoints": rows})
        return
    for row in rows:
        row["MB"] = None if row["size_bytes"] is None else round(row["size_bytes"] / 1e6, 1)
        row["digest"] = row["digest"] and row["digest"][:16]
        row["defaults"] = shown(row["defaults"] or {})
    columns = ("alias", "kind", "family", "MB", "digest", "status", "defaults", "licence", "approved_by", "location")
    print_records("", columns, rows)
    for row in rows:
        if row["refused"]:  # not a column: it would break a sentence over many lines
            print_text(f"{row['alias']} is refused: {row['refused']}\n")


def add(
    alias: Annotated[str | None, typer.Argument(metavar="ALIAS", help="Name of the checkpoint in campaigns.")] = None,
    source: Annotated[
        str | None,
        typer.Argument(metavar="FILE_OR_DIR_OR_REPO", help="A safetensors file, a directory, or a hub repository."),
    ] = None,
    *,
    all_of: Annotated[
        Path | None, typer.Option("--all", metavar="DIR", help="Add every adapter below a folder, named by its file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The repository's commit, 40 digits.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ALIAS", help="Tokenizers and configurations for a single file.")
    ] = None,
    parts: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ALIAS", help="Folder with the parts that a single file lacks.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Family of an autoencoder in a single file.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="Prediction type of a single file: epsilon or v_prediction.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights; default: that of the folder's model card.")
    ] = None,
    purpose: Annotated[list[str] | None, typer.Option(help="Approved purpose; may be repeated.")] = None,
    expires: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day of the approval.")] = None,
    approved_by: Annotated[str | None, typer.Option(help="Approver; default: the current user.")] = None,
    defaults: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Default parameter, or turbo, lightning-4, lcm, ...; may be repeated."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Approve weights under an alias, which refers to them from now on. Existing jobs keep their pinned weights."""
    settings = load_settings(home)
    approval = registry.Approval(
        approved_by=approved_by or "",
        licence=licence,
        purposes=tuple(purpose or ()),
        expires_at=expires.replace(tzinfo=UTC).timestamp() + 86400 if expires else None,
    )
    named = {"--tokenizer": tokenizer, "--parts": parts, "--family": family, "--prediction-type": prediction_type}
    if all_of is not None:
        if alias or source or revision or any(named.values()):
            raise refuse("--all DIR takes no ALIAS and no other source", "checkpoints add --all DIR [--licence L]")
        add_folder(settings, all_of, approval, defaults or (), as_json=as_json)
        return
    if alias is None or source is None:
        raise refuse("checkpoints add needs an alias and a source", "checkpoints add ALIAS FILE_OR_DIR_OR_REPO")
    if not re.fullmatch(NAME, alias):
        raise refuse(f"{alias!r} is not an alias", "lower-case letters, digits and -")
    if Path(source).expanduser().is_file():
        if revision is not None:
            raise refuse(f"{source} is a file, and --revision is for hub repositories", "omit --revision")
        document = add_single_file(
            settings, alias, Path(source), named=named, approval=approval, defaults=defaults or ()
        )
    elif Path(source).suffix.lower() in FILES:
        raise refuse(f"there is no file {source}", "check the path")
    else:
        if option := next((option for option, value in named.items() if value is not None), None):
            raise refuse(f"{option} is for a single file, and {source} is not one", f"omit {option}")
        document = _add_directory(
            settings, alias, source, revision=revision, approval=approval, defaults=defaults or ()
        )
    if as_json:
        print_json(document)
        return
    terms = f"licence {document['licence']}" if document["licence"] else "no licence known: give --licence"
    stdout.print(f"{alias}: {document['kind']}, {document['family']}, digest {document['digest'][:16]}, {terms}")
    if document["defaults"]:
        stdout.print(f"defaults: {shown(document['defaults'])}")
    for note in document["notes"]:
        stdout.print(f"note: {note}")


def _add_directory(
    settings: Settings,
    alias: str,
    source: str,
    *,
    revision: str | None,
    approval: registry.Approval,
    defaults: Sequence[str],
) -> Json:
    try:
        directory = Path(source).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise refuse(f"{source} cannot be read: {error}", "check the path") from error
    if not directory.is_dir() and REPOSITORY.fullmatch(source):
        if revision is None:
            raise refuse(f"{source} is not a file or directory, and a repository needs --revision", "pin its commit")
        with nullcontext() if settings.checkpoints.is_relative_to(settings.home) else users_umask():
            directory = fetch(source, revision, settings.checkpoints / f".{alias}-{revision[:12]}")
    if not directory.exists():
        raise refuse(f"{source} is neither a file, a directory nor a hub repository", "check the path")
    try:
        files = inspect(alias, directory)
    except CheckpointError as error:
        raise refuse(str(error)) from error
    with open_services(settings) as services:
        origin = f"{source}@{revision}" if revision else None
        return approve(services, files, replace(approval, source=origin), defaults)


def verify_all(
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="One checkpoint; default: all.")] = None,
    *,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of the weights again, and compare the files with the approved ones."""
    settings = load_settings(home)
    with existing_database(settings) as database:
        known, refused = catalog_and_refused(settings, database)
    if alias is not None and alias not in known.keys() | refused.keys():
        raise refuse(f"no checkpoint {alias!r}", nearest(alias, known))
    checked = [_verified(files) for name, files in sorted(known.items()) if alias in (None, name)]
    checked += [_refused(name, why) for name, why in sorted(refused.items()) if alias in (None, name)]
    if as_json:
        print_json({"ok": all(row["ok"] for row in checked), "checkpoints": checked})
    else:
        print_records("", ("alias", "ok", "detail"), checked)
    if not all(row["ok"] for row in checked):
        raise typer.Exit(FOUND_FAULTS)


def revoke(
    alias: Annotated[
        str, typer.Argument(metavar="ALIAS_OR_DIGEST", help="An alias, or at least 8 digits of a digest.")
    ],
    *,
    because: Annotated[str, typer.Option(help="Reason; it is kept in the registry permanently.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Revoke weights: jobs that use them are not leased any more, and no campaign may name them."""
    settings = load_settings(home)
    with open_services(settings) as services:
        known = catalog(settings, services.database)
        found = [f for name, f in known.items() if alias == name or (len(alias) >= 8 and f.digest.startswith(alias))]
        if len({files.digest for files in found}) != 1:
            raise refuse(f"no checkpoint {alias!r}", nearest(alias, known))
        with services.audit.transaction() as tx:
            registry.remember(tx, found)
            blocked = registry.revoke(tx, found[0].digest, because=because)
    if as_json:
        print_json({"digest": found[0].digest, "blocked": blocked})
    else:
        stdout.print(f"{alias} revoked, {blocked} jobs blocked; jobs CAMPAIGN --checkpoint lists what it made")


def _documents(settings: Settings) -> list[Json]:
    """Return the registry's rows, the allowed checkpoints that were never used, and the refused ones."""
    rows: list[Json] = []
    with existing_database(settings) as database:
        if database is not None:
            with database.read() as connection:
                rows = registry.documents(connection)
        known, refused = catalog_and_refused(settings, database)
    running = {(files.digest, alias): files for alias, files in known.items()}
    for row in rows:
        files = running.get((row["digest"], row["alias"]))
        row["status"] = "revoked" if row["revoked_at"] else "ok" if files else "old"
        row["defaults"] = row["defaults"] or {}
        row["refused"] = None
        _fill_terms(row)
    seen = {(row["digest"], row["alias"]) for row in rows}
    rows += [_unused(files) for key, files in running.items() if key not in seen]
    return rows + [_unusable(settings, alias, why) for alias, why in sorted(refused.items())]


_OWN = ("alias", "digest", "kind", "family", "scale", "size_bytes", "native_size", "origin_sha256")
_TERMS = ("approved_by", "source", "expires_at", "revoked_at", "revoked_because")


def _unused(files: CheckpointFiles) -> Json:
    own = {name: getattr(files, name) for name in _OWN} | dict.fromkeys(_TERMS)
    own |= {"defaults": dict(files.defaults), "licence": files.licence, "location": str(files.directory)}
    return _fill_terms(own | {"purposes": [], "status": "ok", "refused": None})


def _unusable(settings: Settings, alias: str, why: CheckpointError) -> Json:
    own: Json = dict.fromkeys((*_OWN, *_TERMS, "licence")) | {"alias": alias, "defaults": {}, "purposes": []}
    return own | {"location": str(place_of(settings, alias)), "status": "refused", "refused": str(why)}


def _fill_terms(row: Json) -> Json:
    """Add the licence and source that the folder itself states, if the approval names none."""
    directory = Path(row["location"])
    card = shipped_card(directory) or read_model_card(directory)
    row["licence"] = row["licence"] or card.licence
    row["source"] = row["source"] or card.source
    return row


def _refused(alias: str, why: CheckpointError) -> Json:
    return {"alias": alias, "digest": None, "ok": False, "detail": str(why)}


def _verified(files: CheckpointFiles) -> Json:
    try:
        verify(files)
    except CheckpointError as error:
        return {"alias": files.alias, "digest": files.digest, "ok": False, "detail": str(error)}
    return {"alias": files.alias, "digest": files.digest, "ok": True, "detail": f"{len(files.manifest)} files"}
