"""Closing report of a campaign: results, throughput, cost, marks and audit seals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sdpipeline import provenance
from sdpipeline.db import audit, queries
from sdpipeline.db.connection import Connection, Database
from sdpipeline.db.queries import Progress
from sdpipeline.domain import Json
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.escaping import markdown
from sdpipeline.storage import ObjectStore

MARKS_SAMPLE = 8
MAX_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Pictures made by one run of a campaign, and the seconds it took."""

    pictures: int
    wall_s: float


def time_spent(timings: Iterable[Json]) -> dict[str, float]:
    """Sum the seconds of each kind of work over pictures."""
    total: dict[str, float] = {}
    for each in timings:
        for name, seconds in each.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def closing_report(database: Database, store: ObjectStore, campaign_id: int, *, span: Span | None = None) -> str:
    """Return the report as Markdown; ``span`` is the run that just ended, for its throughput."""
    with database.read() as connection:
        progress = queries.progress(connection, campaign_id)
        stages = queries.stages(connection, campaign_id)
        spent = time_spent(queries.timings(connection, campaign_id))
        failed = queries.failures(connection, campaign_id, limit=MAX_FAILURES)
        newest = queries.newest_images(connection, campaign_id, MARKS_SAMPLE)
        sealed = _sealed(connection)
    lines = [
        f"# {markdown(progress.name)}, version {progress.version}: {progress.status}",
        "",
        *_figures(progress, span),
        f"- **Marks**: {_marks(store, [each['key'] for each in newest])}",
        f"- **Audit**: {sealed}",
        "",
        "| stage | jobs | pictures | device seconds |",
        "|---|---|---|---|",
        *(f"| {markdown(s['stage'])} | {s['jobs']} | {s['succeeded']} | {s['gpu_seconds']:.1f} |" for s in stages),
        "",
        "| where the time went | seconds |",
        "|---|---|",
        *(f"| {markdown(name.removesuffix('_s'))} | {seconds:.1f} |" for name, seconds in spent.items()),
        *_failures(failed, progress),
    ]
    return "\n".join(lines) + "\n"


def _figures(progress: Progress, span: Span | None) -> Iterator[str]:
    yield f"- **Pictures**: {progress.images} of {progress.total} jobs"
    if span is not None and span.wall_s > 0:
        made = f"{span.pictures} in {span.wall_s:.0f} s of this run"
        yield f"- **Throughput**: {60 * span.pictures / span.wall_s:.1f} pictures a minute ({made})"
    yield f"- **GPU-seconds**: {progress.gpu_seconds:.1f}, failed attempts included"
    yield f"- **Cost**: {f'{progress.cost:.2f}' if progress.cost else 'not counted (SDP_COST_PER_GPU_HOUR is not set)'}"
    if progress.paused_because:
        yield f"- **Paused**: {markdown(progress.paused_because)}"


def _marks(store: ObjectStore, keys: Sequence[str]) -> str:
    """Describe the marks of the newest files as read back from storage; nothing is claimed of the others."""
    iptc, c2pa, signers = Counter[str](), Counter[str](), Counter[str]()
    for key in keys:
        try:
            found = provenance.verify(store.get(key))
        except (ObjectMissingError, InputImageError):
            iptc["unreadable"] += 1
            continue
        iptc[(found.digital_source_type or "none").rpartition("/")[2]] += 1
        c2pa[found.c2pa] += 1
        signers[found.signed_by] += 1
    if not keys:
        return "no picture yet"
    marks = f"IPTC source type {_counted(iptc)}; C2PA {_counted(c2pa)}; signed by {_counted(signers)}"
    return f"of the {len(keys)} newest pictures, read back: {marks}"


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{markdown(name)} {count}" for name, count in found.most_common()) or "none"


def _sealed(connection: Connection) -> str:
    seal = audit.last_seal(connection)
    if seal is None:
        return "no seal yet"
    after = sum(last - first + 1 for _, first, last in audit.unsealed_ranges(connection))
    return f"seal {seal['number']}, SHA-256 `{seal['hash']}`; {after or 'no'} events since"


def failure_summary(progress: Progress, *, shown: int) -> str:
    """Describe how many jobs failed or were blocked, and how many of them are listed."""
    blocked = f", {progress.blocked} blocked" if progress.blocked else ""
    here = f", {shown} of them here" if progress.failed + progress.blocked > shown else ""
    return f"{progress.failed} jobs failed{blocked}{here}"


def _failures(failed: Sequence[Json], progress: Progress) -> Iterator[str]:
    if not progress.failed + progress.blocked:
        return
    yield from ("", f"{failure_summary(progress, shown=len(failed))}:", "")
    yield from ("| job | status | stage | row | attempts | reason |", "|---|---|---|---|---|---|")
    for each in failed:
        cells = (each[name] for name in ("job_id", "status", "stage", "row", "attempts", "error"))
        yield f"| {' | '.join(map(markdown, cells))} |"
