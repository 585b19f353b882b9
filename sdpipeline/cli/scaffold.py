"""Commands for a new project: init and schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdpipeline.app import scaffold
from sdpipeline.campaigns import json_schema as campaign_schema
from sdpipeline.cli.output import AsJson, Home, print_json, print_table, print_text
from sdpipeline.provenance import json_schema as record_schema
from sdpipeline.settings import TOML_NAME


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    app.command()(init)
    app.command()(schema)


def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Target folder; created if missing.")] = Path(),
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented settings file and example campaigns to start from."""
    del home  # a new folder has none yet; accepted because every command accepts it
    written = scaffold.write(directory, force=force)
    if as_json:
        print_json({"directory": str(directory.absolute()), "written": written, "campaigns": list(scaffold.CAMPAIGNS)})
        return
    about = scaffold.CAMPAIGNS | {
        TOML_NAME: "every setting, commented out",
        scaffold.SCHEMA_NAME: "the campaign file's JSON Schema, for editors",
    }
    print_table(
        f"Written to {directory.absolute()}",
        ("file", "what"),
        [(name, about.get(name, "input of an example")) for name in written],
    )
    change_directory = [] if directory.resolve() == Path.cwd() else [("go there", f"cd {directory}")]
    first = next(iter(scaffold.CAMPAIGNS))
    print_table(
        "Next steps",
        ("to", "type"),
        [
            *change_directory,
            ("check a campaign and count its pictures", f"sdpipeline plan {first}"),
            ("make them", f"sdpipeline run {first}"),
            ("copy the pictures under your own names", f"sdpipeline export {first.removesuffix('.yaml')} --to DIR"),
            ("check this installation", "sdpipeline doctor"),
        ],
    )


def schema(
    *,
    kind: Annotated[
        Literal["campaign", "record", "sidecar"],
        typer.Option("--kind", help="The document: a campaign file, a picture's record, or the sidecar next to it."),
    ] = "campaign",
    home: Home = None,
) -> None:
    """Print the JSON Schema of a document: of the campaign file, unless --kind names another."""
    del home  # the schema is the same everywhere; accepted because every command accepts it
    print_text(campaign_schema.text() if kind == "campaign" else record_schema.text(kind))
