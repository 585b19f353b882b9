"""Commands of campaigns and jobs: plan, submit, run, status, jobs, show, retry, cancel, pause, resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdpipeline.app.services import existing_database, open_services
from sdpipeline.cli.output import (
    FOUND_FAULTS,
    AsJson,
    CampaignFile,
    CampaignName,
    Home,
    load_settings,
    print_json,
    print_json_line,
    print_records,
    print_table,
    print_warnings,
    refuse,
    stderr,
    stdout,
)
from sdpipeline.cli.tables import SAMPLE
from sdpipeline.db import queries
from sdpipeline.domain import Status

if TYPE_CHECKING:
    from sdpipeline.db.queries import Progress
    from sdpipeline.db.server_checks import WriteRefusal
    from sdpipeline.db.submit import Submitted

# Commands import what only they use: `status` and its like are typed often, and shall not wait for all the others.

LONGEST_SHOWN = 60
UNSUCCESSFUL = ("failed", "blocked", "skipped", "cancelled")
RETRYABLE = ("failed", "blocked", "cancelled")

Edition = Annotated[
    str | None, typer.Option(help="Make the whole campaign again as this edition; default: as its schedule says.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a campaign file with warnings.")]


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    for command in (plan, submit, run, status, jobs, show, retry, cancel, pause, resume):
        app.command()(command)


def plan(
    file: CampaignFile,
    *,
    diff: Annotated[bool, typer.Option("--diff", help="Name the keys that made jobs new.")] = False,
    edition: Edition = None,
    strict: Strict = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check a campaign file and compare its jobs with the database, without writing anything."""
    from sdpipeline.app.campaign_files import check_edition, load_campaign
    from sdpipeline.campaigns import schedule, submission

    settings = load_settings(home)
    check_edition(edition)
    cost = None if settings.cost_per_gpu_hour is None else settings.cost_per_gpu_hour / 3600
    planning = submission.Planning(team=settings.team, max_batch=settings.engine.max_batch, gpu_second_cost=cost)
    with existing_database(settings) as database:
        campaign, inputs = load_campaign(settings, file, database, edition=edition)
        planned = submission.plan(campaign, inputs, database, planning, explain=diff).document()
    campaign.warnings.raise_if_strict(strict=strict)
    if as_json:
        print_json(planned)
        return
    print_warnings(campaign.warnings.in_order())
    named = f"{planned['campaign']}, edition {planned['edition']}" if planned["edition"] else planned["campaign"]
    rows = [(stage, planned["stages"].get(stage, 0), *counts.values()) for stage, counts in planned["by_stage"].items()]
    print_table(f"Plan of {named}", ("stage", "jobs", "new", "reused", "blocked", "unchanged", "removed"), rows)
    stdout.print(f"{planned['jobs']['total']} jobs in {planned['batches']} batches; {_estimated(planned['estimate'])}")
    if campaign.spec.schedule is not None:
        when = campaign.spec.schedule
        nights = schedule.upcoming(when.cron, when.timezone, datetime.now(UTC), 3)
        stdout.print(f"scheduled {when.cron} {when.timezone}: " + ", ".join(f"{at:%Y-%m-%d %H:%M %Z}" for at in nights))
    if diff:
        changes = [{name: _short(value) for name, value in change.items()} for change in planned["diff"]]
        print_records("Why jobs are new", ("stage", "key", "jobs", "was", "now"), changes)


def submit(
    file: CampaignFile,
    *,
    prune: Annotated[bool, typer.Option("--prune", help="Cancel jobs that the file no longer asks for.")] = False,
    edition: Edition = None,
    strict: Strict = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Publish a campaign file as the campaign's newest version; unchanged jobs are left alone."""
    from sdpipeline.app import submit as app_submit

    with app_submit.open_to_submit(load_settings(home), file, edition=edition, strict=strict) as services:
        name, done = app_submit.submit(services, file, prune=prune, edition=edition, strict=strict)
    if as_json:
        counts = {"added": done.added, "unchanged": done.unchanged, "cancelled": done.cancelled}
        about: dict[str, Any] = {"blocked": done.blocked, "left_out": done.left_out}
        about["warnings"] = [warning.document() for warning in done.warnings]
        print_json({"campaign": name, "version": done.version} | counts | about)
        return
    print_warnings(done.warnings)
    stdout.print(_submitted(name, done))


def run(
    file: CampaignFile,
    *,
    edition: Edition = None,
    keep_ui: Annotated[bool, typer.Option("--keep-ui", help="Leave the local Prefect server running.")] = False,
    strict: Strict = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Submit a campaign and run it to completion on this machine, in the Prefect flow."""
    from sdpipeline import orchestration
    from sdpipeline.app import submit as app_submit
    from sdpipeline.app.factories import check_engine, check_quantization
    from sdpipeline.app.keys import picture_key, trusted_seal_keys
    from sdpipeline.app.sealing import seal_here

    settings = load_settings(home)
    check_engine(settings)
    if not settings.embedded:  # a missing key is found before any work is done; the embedded default makes its own
        picture_key(settings)
        trusted_seal_keys(settings)
    check_quantization(settings)  # otherwise each of its workers would crash on it
    with app_submit.open_to_submit(settings, file, edition=edition, strict=strict) as services:
        name, done = app_submit.submit(services, file, edition=edition, strict=strict)
        if not as_json:
            print_warnings(done.warnings)
            stderr.print(_submitted(name, done))
        progress = orchestration.run_campaign(services, name, keep_ui=keep_ui, console=None if as_json else stderr)
        seal_here(services)
    show_status([progress], as_json=as_json)
    leave(progress)


def status(
    campaign: Annotated[str | None, typer.Argument(metavar="[CAMPAIGN]", help="One campaign; default: all.")] = None,
    *,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the progress of campaigns, and the live workers."""
    from sdpipeline.db import server_checks

    settings = load_settings(home)
    with open_services(settings, create=False) as services:
        ids = [services.campaign_id(campaign)] if campaign else None
        with services.database.read() as connection:
            if ids is None:
                names = queries.campaign_names(connection, team=settings.team)
                found = [queries.campaign_id(connection, team=settings.team, name=name) for name in names]
                ids = [each for each in found if each is not None]
            everything = [queries.progress(connection, each) for each in ids]
            live = queries.live_workers(connection, lost_after_s=settings.lease_ttl_s)
        refusal = server_checks.write_refusal(services.database)
    show_status(everything, as_json=as_json, workers=live, refusal=refusal)


def jobs(
    campaign: CampaignName,
    *,
    with_status: Annotated[Status | None, typer.Option("--status", help="Only jobs of this status.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Only jobs of the checkpoint whose digest starts with this.")
    ] = None,
    after: Annotated[int, typer.Option(help="Only jobs with a greater id: the next page.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of jobs.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON document per line, streamed.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List a campaign's jobs in order of their id."""
    settings = load_settings(home)
    with open_services(settings, create=False) as services:
        campaign_id = services.campaign_id(campaign)
        wanted = str(with_status) if with_status else None
        with services.database.read() as connection:
            found = queries.jobs(connection, campaign_id, status=wanted, made_with=checkpoint, after=after, limit=limit)
            if jsonl:
                for job in found:
                    print_json_line(job)
            elif as_json:
                print_json({"jobs": list(found)})
            else:
                _jobs_table(campaign, found)


def show(
    job: Annotated[int, typer.Argument(metavar="JOB", help="A job's id.")],
    *,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show everything known about one job."""
    with open_services(load_settings(home), create=False) as services, services.database.read() as connection:
        team = services.settings.team
        found = queries.show(connection, job, team=team)
        if found is None:
            from sdpipeline.archives import contents

            found = contents.show(connection, services.store, job, team=team)
    if found is None:
        raise refuse(f"no job {job}", "sdpipeline jobs CAMPAIGN lists them")
    found["events"] = [json.loads(event) for event in found["events"]]
    if as_json:
        print_json(found)
        return
    nested = ("variables", "request", "parents", "children", "image")
    plain = {name: value for name, value in found.items() if not isinstance(value, list | dict) and value is not None}
    rows = plain | {name: json.dumps(found[name], ensure_ascii=False) for name in nested if found[name]}
    print_table(f"Job {job}", ("what", "value"), rows.items())
    for attempt in found["history"]:
        attempt["started"] = _time(attempt["started_at"])
    print_records("Attempts", ("number", "outcome", "started", "worker_id", "error"), found["history"])
    print_records("Pictures", ("url", "sha256", "width", "height", "timings", "scores"), found["pictures"])


def retry(
    campaign: CampaignName,
    *,
    with_status: Annotated[str, typer.Option("--status", help="failed, blocked or cancelled.")] = "failed",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Reopen failed jobs and the jobs that were skipped because of them."""
    from sdpipeline.app import control

    if with_status not in RETRYABLE:
        raise refuse(f"--status {with_status} cannot be retried", f"one of {', '.join(RETRYABLE)}")
    with open_services(load_settings(home), create=False) as services:
        count, kept = control.reopen(services, campaign, with_status)
    if kept and not count:
        why = f"a policy forbids all {kept} {with_status} jobs of {campaign}, and a retry does not change that"
        raise refuse(why, "change the prompts or the policy, and submit the file again")
    forbidden = f", {kept} not retried because a policy forbids them" if kept else ""
    about = {"campaign": campaign, "retried": count, "forbidden": kept}
    _print_outcome(f"{count} jobs reopened{forbidden}", about, as_json=as_json)


def cancel(campaign: CampaignName, *, home: Home = None, as_json: AsJson = False) -> None:
    """Cancel unfinished jobs of a campaign; pictures already made are kept."""
    from sdpipeline.app import control

    with open_services(load_settings(home), create=False) as services:
        count = control.cancel(services, campaign)
    _print_outcome(f"{count} jobs cancelled", {"campaign": campaign, "cancelled": count}, as_json=as_json)


def pause(campaign: CampaignName, *, home: Home = None, as_json: AsJson = False) -> None:
    """Stop leasing jobs of a campaign; running batches are finished."""
    _set_status(campaign, "paused", home, as_json=as_json)


def resume(campaign: CampaignName, *, home: Home = None, as_json: AsJson = False) -> None:
    """Let workers lease a paused campaign again."""
    _set_status(campaign, "active", home, as_json=as_json)


_SEEN = ("leases", "seen_at", "lost_since", "note")


def show_status(
    campaigns: list[Progress],
    *,
    as_json: bool,
    workers: list[dict[str, Any]] | None = None,
    refusal: WriteRefusal | None = None,
) -> None:
    """Print the status table or its JSON form; ``refusal`` says why the database takes no writes."""
    from sdpipeline.db.workers import STORAGE_LOSSES

    documents = [progress.document() for progress in campaigns]
    names = ("id", "host", "pid", "device", "status", *_SEEN)
    live = [
        {name: worker[name] for name in names} | {STORAGE_LOSSES: worker["description"].get(STORAGE_LOSSES, {})}
        for worker in workers or []
    ]
    if as_json:
        database = {"writable": refusal is None, "reason": refusal and refusal.reason}
        print_json({"campaigns": documents} | ({"workers": live, "database": database} if workers is not None else {}))
        return
    columns = ("total", "succeeded", *_statuses_in_use(documents, ("ready", "waiting", "leased", *UNSUCCESSFUL)))
    spent = ("images", "gpu_seconds", *(["cost"] if any(d["cost"] for d in documents) else []))
    about = ("name", "version", "status")
    rows = [
        (*(d[name] for name in about), *(d["jobs"][name] for name in columns), *(d[name] for name in spent))
        for d in documents
    ]
    print_table("", ("campaign", *about[1:], *columns, *spent), rows)
    for d in documents:
        if d["paused_because"]:
            stdout.print(f"{d['name']} is paused: {d['paused_because']}")
    if refusal is not None:
        stdout.print(f"workers wait for the database: {refusal.reason} ({refusal.fix})")
    if live:
        for worker in live:
            worker["last seen"] = _time(worker["seen_at"])
            if worker["lost_since"]:
                worker["note"] = (
                    f"no heartbeat since {worker['last seen']}: its leases expire, its jobs are leased again"
                )
        print_records("Workers", ("id", "host", "pid", "device", "status", "leases", "last seen", "note"), live)
        for feature, loss in sorted({loss for worker in live for loss in worker[STORAGE_LOSSES].items()}):
            stdout.print(f"storage works without {feature}: {loss}")


def _statuses_in_use(documents: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the statuses that some campaign has jobs in: a table of zeros is hard to read."""
    return [name for name in names if any(d["jobs"][name] for d in documents)]


def leave(progress: Progress) -> None:
    """Exit with 3 if jobs did not succeed, and print the next command to type."""
    if progress.failed:
        stderr.print(f"why: sdpipeline jobs {progress.name} --status failed; again: sdpipeline retry {progress.name}")
    if progress.blocked:
        stderr.print(f"blocked jobs and their rules: sdpipeline jobs {progress.name} --status blocked")
    if progress.paused_because:
        stderr.print(f"{progress.name} is paused: {progress.paused_because}; raise it in the file and run it again")
    elif progress.remaining and progress.status == "paused":
        stderr.print(f"{progress.name} is paused: sdpipeline resume {progress.name}, and run it again")
    if progress.failed or progress.blocked or progress.skipped or progress.remaining:
        raise typer.Exit(FOUND_FAULTS)


def _estimated(estimate: dict[str, Any]) -> str:
    """Format the estimate of the remaining work."""
    if estimate["gpu_seconds"] is None:
        return f"no estimate: {estimate['jobs_without_history']} of them have no history here"
    cost = f", cost {estimate['cost']:.2f}" if estimate["cost"] is not None else ""
    return f"still to make: {estimate['gpu_seconds']:.1f} GPU-seconds{cost}, {estimate['bytes'] / 1e6:.1f} MB"


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if value is None else text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _set_status(campaign: str, status: str, home: Path | None, *, as_json: bool) -> None:
    from sdpipeline.app import control

    with open_services(load_settings(home), create=False) as services:
        control.set_status(services, campaign, status)
    _print_outcome(f"{campaign} is {status}", {"campaign": campaign, "status": status}, as_json=as_json)


def _submitted(name: str, done: Submitted) -> str:
    if done.left_out:
        return f"{name}: {done.left_out}"
    cancelled = f", {done.cancelled} cancelled" if done.cancelled else ""
    blocked = f", {done.blocked} blocked by a policy" if done.blocked else ""
    changed = f" ({done.changed} of them changed: pictures they had are kept)" if done.changed else ""
    counts = f"{done.added} jobs added{changed}, {done.unchanged} unchanged"
    return f"{name} version {done.version}: {counts}{cancelled}{blocked}"


def _jobs_table(campaign: str, found: Iterator[dict[str, Any]]) -> None:
    first = list(islice(found, SAMPLE))
    optional = ("edition", "row", "variables")
    # Only the first rows of a long list are known: a column that is empty there may be filled later.
    telling = [name for name in optional if len(first) == SAMPLE or any(job[name] for job in first)]
    columns = ("id", "stage", *telling, "seed", "status", "attempts", "picture or error")
    print_records(f"Jobs of {campaign}", columns, map(_shown_job, chain(first, found)))


def _shown_job(job: dict[str, Any]) -> dict[str, Any]:
    picture_or_error = job["image"]["url"] if job["image"] else job["error"]
    variables = ", ".join(f"{name}={value}" for name, value in job["variables"].items())
    return job | {"picture or error": picture_or_error, "variables": variables}


def _print_outcome(sentence: str, document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        stdout.print(sentence)


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""
