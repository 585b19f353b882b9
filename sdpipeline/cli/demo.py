"""Command that runs the bundled campaign on the embedded default: demo."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from sdpipeline import settings as settings_module
from sdpipeline.app import submit
from sdpipeline.app.factories import check_engine
from sdpipeline.app.keys import picture_key
from sdpipeline.app.queries import newest_pictures
from sdpipeline.app.sealing import seal
from sdpipeline.app.services import Services
from sdpipeline.cli import campaigns
from sdpipeline.cli.output import AsJson, Home, load_settings, print_json, print_table, stderr, stdout
from sdpipeline.db import queries
from sdpipeline.reporting import report
from sdpipeline.settings import Settings, embedded_database, embedded_storage

BUNDLED_CAMPAIGN = Path(__file__).parents[1] / "demo" / "campaign.yaml"


def add_to(app: typer.Typer) -> None:
    """Register this command on the application."""
    app.command()(demo)


def demo(
    *,
    keep_ui: Annotated[bool, typer.Option("--keep-ui", help="Leave the local Prefect server running.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make the bundled campaign's pictures on this machine, and list where everything is."""
    from sdpipeline import orchestration

    check_engine(load_settings(home))
    settings = _embedded(load_settings(home))
    started = time.monotonic()
    with submit.open_to_submit(settings, BUNDLED_CAMPAIGN) as opened:
        name, done = submit.submit(opened, BUNDLED_CAMPAIGN)
        if not as_json:
            stderr.print(f"campaign {BUNDLED_CAMPAIGN}: {done.added} jobs added, {done.unchanged} unchanged")
        progress = orchestration.run_campaign(
            opened, name, keep_ui=keep_ui, console=None if as_json else stderr, always_own=True
        )
        seal(opened)
        result = _result(opened, name, time.monotonic() - started)
    if as_json:
        counts = {"added": done.added, "unchanged": done.unchanged}
        print_json(progress.document() | counts | result.document())
    else:
        _print(result, nothing_new=not done.added)
    campaigns.leave(progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Content of the closing tables."""

    images: int
    wall_s: float
    places: dict[str, str]
    seconds: dict[str, float]
    signer: str
    newest: str
    home: str

    def document(self) -> dict[str, Any]:
        rate = round(self.images / self.wall_s, 3)
        made = {"wall_s": round(self.wall_s, 1), "images_per_s": rate, "signer": self.signer}
        return made | {"places": self.places, "seconds": self.seconds}


def _embedded(settings: Settings) -> Settings:
    """Force the embedded default over all settings; worker processes inherit it through the environment."""
    os.environ["SDP_DATABASE_URL"] = embedded_database(settings.home)
    os.environ["SDP_STORAGE_URL"] = embedded_storage(settings.home)
    return settings_module.load(home=settings.home)


def _result(opened: Services, name: str, wall_s: float) -> _Result:
    settings = opened.settings
    sheet = settings.home / "demo-contact-sheet.jpg"
    sheet.write_bytes(newest_pictures(opened, name) or b"")
    campaign_id = opened.campaign_id(name)
    with opened.database.read() as connection:
        images = queries.progress(connection, campaign_id).images
        newest = queries.newest_images(connection, campaign_id, 1)
        spent = report.time_spent(queries.timings(connection, campaign_id))
    places = {
        "contact sheet": str(sheet),
        "pictures": str(settings.home / "storage" / settings.team / name),
        "audit seals": str(settings.home / "storage" / "audit" / "seals"),
        "database": str(settings.home / "sdpipeline.db"),
        "logs": str(settings.home / "logs"),
        "campaign file": str(BUNDLED_CAMPAIGN),
    }
    seconds = {label.removesuffix("_s"): round(value, 2) for label, value in spent.items()}
    return _Result(
        images=images,
        wall_s=wall_s,
        places=places,
        seconds=seconds,
        signer=picture_key(settings).identity,
        home="" if settings.home == settings_module.load().home else f" --home {shlex.quote(str(settings.home))}",
        newest=unquote(urlsplit(newest[0]["url"]).path) if newest else "PICTURE",
    )


def _print(result: _Result, *, nothing_new: bool) -> None:
    if nothing_new:
        stdout.print(f"Nothing to do: all {result.images} pictures exist already.")
    else:
        rate = result.images / result.wall_s
        stdout.print(f"{result.images} pictures in {result.wall_s:.0f} s, {rate:.2f} a second, starts included.")
        print_table("Where the time went", ("work", "seconds over all pictures"), result.seconds.items())
    stdout.print(f"Each is marked as AI-made and signed by {result.signer}.")
    print_table("Where things are", ("what", "where"), result.places.items())
    print_table(
        "Next steps",
        ("to", "type"),
        (
            ("see every job", f"sdpipeline jobs demo{result.home}"),
            ("see everything about one job", f"sdpipeline show 1{result.home}"),
            ("check that nothing was changed", f"sdpipeline audit verify{result.home}"),
            ("see a picture's origin and its signer", f"sdpipeline verify {shlex.quote(result.newest)}{result.home}"),
            ("copy the pictures under readable names", f"sdpipeline export demo --to DIR{result.home}"),
            ("start a campaign of your own", "sdpipeline init DIR, and there: sdpipeline run catalogue.yaml"),
            ("check this installation", "sdpipeline doctor"),
        ),
    )
