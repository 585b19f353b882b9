"""Commands of a Prefect server: deploy, schedule and prefect-gateway."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sdpipeline.app import submit
from sdpipeline.app.campaign_files import load_campaign
from sdpipeline.app.services import existing_database
from sdpipeline.campaigns import expand
from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.cli.output import AsJson, Home, load_settings, print_json, print_table, refuse, stdout
from sdpipeline.errors import CampaignError, Mistake, SettingsError
from sdpipeline.settings import Settings
from sdpipeline.storage import is_bucket_url


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    app.command()(deploy)
    app.command()(schedule)
    app.command(name="prefect-gateway")(prefect_gateway)


def deploy(
    *,
    max_campaigns: Annotated[
        int | None, typer.Option(min=0, help="Maximum number of campaigns at a time; 0: no limit; default: unchanged.")
    ] = None,
    silence_s: Annotated[
        float, typer.Option(min=35, help="Seconds without a heartbeat after which a run counts as crashed.")
    ] = 90.0,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Create pools, deployments, schedules and the automation for lost runs on the server of PREFECT_API_URL."""
    from sdpipeline.orchestration import deploy as deployment

    done = deployment.deploy(load_settings(home), max_campaigns=max_campaigns, silence_s=silence_s)
    if as_json:
        print_json(done.document())
        return
    limit = "no limit" if done.campaign_limit is None else f"{done.campaign_limit} at a time"
    rows = [("work pool", name) for name in done.pools] + [("deployment", name) for name in done.deployments]
    print_table("On the Prefect server", ("what", "name"), [*rows, ("automation", done.automation)])
    stdout.print(f"campaigns: {limit}; next: prefect worker start --pool cpu, and --pool gpu --limit 1 for each device")


def prefect_gateway(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 4201,
    home: Home = None,
) -> None:
    """Proxy the server of PREFECT_API_URL for workers, with their own credentials and an allow-list of routes."""
    from sdpipeline.orchestration import gateway

    settings = load_settings(home)
    roles = {"worker": settings.gateway.worker_auth, "dispatcher": settings.gateway.dispatcher_auth}
    auths = {role: auth.get_secret_value() for role, auth in roles.items() if auth is not None}
    server_auth = os.environ.get("PREFECT_API_AUTH_STRING")
    unset = [f"SDP_GATEWAY__{role.upper()}_AUTH" for role in roles if role not in auths]
    if settings.prefect_api_url is None or unset:
        names = [*unset, *([] if settings.prefect_api_url else ["PREFECT_API_URL"])]
        raise SettingsError(*(Mistake(key=name, message="is not set", fix="see deploy/README.md") for name in names))
    if len({server_auth, *auths.values()}) <= len(auths):
        fix = "give the Prefect server and each role a password of its own"
        raise SettingsError(Mistake(key="SDP_GATEWAY__WORKER_AUTH", message="two credentials are the same", fix=fix))
    gateway.serve(settings.prefect_api_url, server_auth=server_auth, auths=auths, host=host, port=port)


def schedule(
    file: Annotated[str, typer.Argument(metavar="CAMPAIGN", help="The campaign file, or s3://bucket/key.yaml.")],
    *,
    off: Annotated[bool, typer.Option("--off", help="Remove the schedule; the campaign's name is enough.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Schedule a campaign in the deployed flow by the `schedule:` of its file."""
    from sdpipeline.orchestration import deploy as deployment
    from sdpipeline.orchestration.campaign_request import CampaignRequest

    settings = load_settings(home)
    if off:
        _unschedule(settings, file, as_json=as_json)
        return
    url, text = (file, None) if is_bucket_url(file) else (None, _text(file))
    spec = _checked(settings, file, text)
    if spec.schedule is None:
        raise refuse(f"{file} has no schedule", 'write schedule: {cron: "0 3 * * *"}')
    made = deployment.schedule(settings, spec.name, spec.schedule, CampaignRequest(file=url, text=text))
    if as_json:
        print_json({"campaign": spec.name, "deployment": made, **spec.schedule.model_dump()})
    else:
        stdout.print(f"{made} fires at {spec.schedule.cron} {spec.schedule.timezone}")


def _unschedule(settings: Settings, given: str, *, as_json: bool) -> None:
    from sdpipeline.orchestration import deploy as deployment

    is_file = is_bucket_url(given) or Path(given).is_file()
    name = _checked(settings, given, None if is_bucket_url(given) else _text(given)).name if is_file else given
    if not deployment.unschedule(settings, name):
        raise refuse(f"{name} has no schedule on this server", "list the schedules: prefect deployment ls")
    if as_json:
        print_json({"campaign": name, "deployment": None})
    else:
        stdout.print(f"{name} is no longer scheduled")


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise refuse(f"{file} cannot be read: {error}") from error


def _checked(settings: Settings, given: str, text: str | None) -> CampaignSpec:
    """Check the campaign as the scheduled run loads it, without files next to it; raises CampaignError."""
    hints = []
    with existing_database(settings) as database:
        if text is not None:
            expand.check(*load_campaign(settings, Path(given), database))
            message = "a scheduled run reads only this file, not the tables and pictures in its folder"
            fix = "put them at s3://bucket/key: see SDP_INPUTS__ALLOWED"
            hints.append(Mistake(file=given, message=message, fix=fix))
        try:
            with submit.campaign_file(settings, url=None if text is not None else given, text=text) as path:
                campaign, inputs = load_campaign(settings, path, database)
                expand.check(campaign, inputs)
        except CampaignError as error:
            mistakes = [replace(mistake, file=given) for mistake in error.mistakes]
            raise CampaignError(*mistakes, *hints) from error
        return campaign.spec
