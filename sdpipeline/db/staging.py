"""Staging of one submit's jobs: written to a file first, then into temporary tables."""

from __future__ import annotations

import itertools
import marshal
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    case,
    cast,
    false,
    insert,
    or_,
    select,
    text,
    true,
    update,
)

from sdpipeline.batching import batch_document
from sdpipeline.db.connection import copy_rows
from sdpipeline.db.descendants import descendants
from sdpipeline.db.tables import job
from sdpipeline.domain import JobSpec, Json, canonical
from sdpipeline.jobs import DeliveryRules

CHUNK = 5000
SALT_BYTES = 16

_temporary = MetaData()
incoming = Table(
    "incoming_job",
    _temporary,
    # Joins name both columns of the unique key: with a campaign as a value, the planner would expect one job.
    Column("campaign_id", BigInteger, nullable=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("identity", String(64), nullable=False),
    Column("edition", String(63), nullable=False),
    Column("stage", String(63), nullable=False),
    Column("depth", SmallInteger, nullable=False),
    Column("row_key", Text, nullable=False),
    Column("variables", JSON, nullable=False),
    Column("axes", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("chain", BigInteger),
    Column("subject", Text),
    Column("error_kind", String(63)),
    Column("error", Text),
    Column("parents", SmallInteger, nullable=False),
    Column("group_id", BigInteger, nullable=False),
    prefixes=["TEMPORARY"],
)
incoming_parent = Table(
    "incoming_parent",
    _temporary,
    Column("campaign_id", BigInteger, nullable=False),
    Column("identity", String(64), nullable=False),
    Column("parent_identity", String(64), nullable=False),
    prefixes=["TEMPORARY"],
)
# Incoming jobs that the campaign has already. ``same``: pixels and status need no change. ``moved``: the input pictures
# are the same bytes under another address, pin or name now.
known = Table(
    "known_job",
    _temporary,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("identity", String(64), nullable=False),
    Column("same", Boolean, nullable=False),
    Column("moved", Boolean, nullable=False),
    prefixes=["TEMPORARY"],
)


ROW = (
    "identity",
    "edition",
    "stage",
    "depth",
    "row_key",
    "variables",
    "axes",
    "seed",
    "fingerprint",
    "request",
    "salt",
    "chain",
    "subject",
    "error_kind",
    "error",
)
"""A job's own columns, in the order of a prepared row, between its group and its number of parents."""

_ERROR_KIND = ROW.index("error_kind")

POLICY = "policy"
"""The error kind of a job that a policy forbids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Jobs of one stage that may share a forward pass, before they are in the database."""

    stage: str
    depth: int
    batch_key: str
    checkpoint_digest: str
    description: Json
    rules: DeliveryRules


class Spool:
    """Tuples of plain values in an unnamed file, added in lists and read in order, any number of times."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sizes: list[int] = []

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """Append rows; not while they are read."""
        self._sizes.append(self._file.write(marshal.dumps(rows)))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        self._file.seek(0)
        for size in self._sizes:
            # Read at once: `marshal.load` calls the file for every single value.
            yield from marshal.loads(self._file.read(size))  # noqa: S302 -- our own file


@dataclass(slots=True, kw_only=True)
class Prepared:
    """Checked jobs, ready to be published; expanding them never blocks the database.

    ``held`` says that chains are begun only as a budget allows. ``blocked`` counts jobs that a policy forbids.
    ``subjects`` says that some jobs hold a person's data.
    """

    held: bool = False
    count: int = 0
    blocked: int = 0
    subjects: bool = False
    editions: set[str] = field(default_factory=set)
    groups: list[Group] = field(default_factory=list)
    rows: Spool
    """For each job its position in the file, its index in ``groups``, :data:`ROW` and its number of parents."""
    pairs: Spool
    """The identities of each job and each of its parents."""


@contextmanager
def prepared(
    jobs: Iterable[JobSpec], *, rules: Mapping[str, DeliveryRules] | None = None, held: bool = False
) -> Iterator[Prepared]:
    """Expand all jobs into a temporary file, so that their mistakes surface first; ``rules`` are by stage."""
    with tempfile.TemporaryFile() as rows_file, tempfile.TemporaryFile() as pairs_file:
        ready = Prepared(rows=Spool(rows_file), pairs=Spool(pairs_file), held=held)
        places: dict[tuple[str, str], int] = {}
        for chunk in chunked(jobs, CHUNK):
            salts, texts = secrets.token_hex(SALT_BYTES * len(chunk)), dict[int, str]()
            rows = [
                _row(
                    spec,
                    ready.count + n,
                    _place(spec, ready, places, rules or {}),
                    salts[2 * SALT_BYTES * n : 2 * SALT_BYTES * (n + 1)],
                    texts,
                    held=held,
                )
                for n, spec in enumerate(chunk)
            ]
            ready.blocked += sum(spec.blocked is not None for spec in chunk)
            ready.subjects = ready.subjects or any(spec.subject is not None for spec in chunk)
            pairs = [(spec.identity, parent) for spec in chunk for parent in _distinct_parents(spec)]
            ready.rows.add(rows)
            ready.pairs.add(pairs)
            ready.count += len(chunk)
            ready.editions.update(spec.edition for spec in chunk)
        yield ready


@contextmanager
def temporary_tables(connection: Connection) -> Iterator[None]:
    """Create and drop the tables inside the transaction, so that a failure leaves nothing behind."""
    _temporary.create_all(connection, checkfirst=False)
    yield
    _temporary.drop_all(connection, checkfirst=False)


def load(connection: Connection, ready: Prepared, campaign_id: int, group_ids: Sequence[int]) -> None:
    """Fill the tables of incoming jobs; ``group_ids`` are the ids of ``ready.groups``."""
    names = ["campaign_id", "position", *ROW, "parents", "group_id"]
    filled = ((campaign_id, position, *row, group_ids[group]) for position, group, *row in ready.rows)
    copy_rows(connection, incoming, names, filled)
    _load_parents(connection, ready, campaign_id)
    analyze(connection, incoming, incoming_parent)


def load_first(
    connection: Connection, ready: Prepared, group_ids: Sequence[int], *, created_at: float, **constants: int
) -> None:
    """Fill a campaign that has no jobs yet directly: there is nothing to compare with."""
    names = ["created_at", *constants, "status", "group_id", *ROW, "parents_left"]
    fixed = (created_at, *constants.values())
    root = "waiting" if ready.held else "ready"

    def status(row: list[Any]) -> str:
        return "blocked" if row[_ERROR_KIND] else "waiting" if row[-1] else root

    filled = ((*fixed, status(row), group_ids[group], *row) for _, group, *row in ready.rows)
    copy_rows(connection, job, names, filled)
    _load_parents(connection, ready, constants["campaign_id"])
    analyze(connection, incoming_parent)


def _load_parents(connection: Connection, ready: Prepared, campaign_id: int) -> None:
    names = ["campaign_id", "identity", "parent_identity"]
    copy_rows(connection, incoming_parent, names, ((campaign_id, *pair) for pair in ready.pairs))


def match(connection: Connection) -> None:
    """Match incoming jobs to existing ones.

    Jobs that a policy forbade and now allows are made anew, with the jobs skipped because of them. Erased jobs stay
    erased, even if the same is submitted again.
    """
    same_job = and_(job.c.campaign_id == incoming.c.campaign_id, job.c.identity == incoming.c.identity)
    there_still = job.c.erased_at.is_(None)
    allowed = and_(job.c.status == "blocked", job.c.error_kind == POLICY, incoming.c.error_kind.is_(None), there_still)
    same = and_(
        job.c.fingerprint == incoming.c.fingerprint,
        or_(job.c.status != "cancelled", job.c.erased_at.is_not(None)),
        case((allowed, false()), else_=true()),
    )
    # Finished and erased jobs are not rewritten. Computed here, where the tables are joined anyway.
    open_still = and_(same, job.c.status != "succeeded", job.c.erased_at.is_(None))
    differs = cast(job.c.request, Text) != cast(incoming.c.request, Text)
    moved = case((open_still, differs), else_=false())
    found = select(job.c.id, job.c.identity, same, moved).select_from(incoming.join(job, same_job))
    connection.execute(insert(known).from_select(["id", "identity", "same", "moved"], found))
    analyze(connection, known)
    wanted_again = select(known.c.id).join(job, job.c.id == known.c.id)
    wanted_again = wanted_again.where(~known.c.same, job.c.status.in_(("blocked", "cancelled")))
    below = descendants(wanted_again)
    skipped = select(job.c.id).where(job.c.id.in_(select(below.c.id)), job.c.status == "skipped", there_still)
    connection.execute(update(known).where(known.c.same, known.c.id.in_(skipped)).values(same=False))


def analyze(connection: Connection, *tables: Table) -> None:
    """Analyze temporary tables, which autovacuum does not; joins would be planned for a handful of rows."""
    if connection.dialect.name == "postgresql":
        for table in tables:
            connection.execute(text(f"ANALYZE {table.name} (identity)"))


def chunked(jobs: Iterable[JobSpec], size: int) -> Iterator[list[JobSpec]]:
    """Yield the jobs in lists of ``size``."""
    iterator = iter(jobs)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _place(
    spec: JobSpec, ready: Prepared, places: dict[tuple[str, str], int], rules: Mapping[str, DeliveryRules]
) -> int:
    """Return the index of the job's group, which is added if it is new."""
    key = (spec.stage, spec.batch_key)
    if key not in places:
        places[key] = len(places)
        ready.groups.append(
            Group(
                stage=spec.stage,
                depth=spec.depth,
                batch_key=spec.batch_key,
                checkpoint_digest=spec.request.checkpoint.digest,
                description=batch_document(spec.request),
                rules=rules.get(spec.stage, DeliveryRules()),
            )
        )
    return places[key]


def _distinct_parents(spec: JobSpec) -> Iterable[str]:
    return dict.fromkeys(parent for _, parent in spec.parents)


def _row(spec: JobSpec, position: int, group: int, salt: str, texts: dict[int, str], *, held: bool) -> tuple[Any, ...]:
    return (
        position,
        group,
        spec.identity,
        spec.edition,
        spec.stage,
        spec.depth,
        spec.row_key,
        _text(spec.variables, texts),
        _text(spec.axes, texts),
        spec.seed,
        spec.fingerprint,
        spec.document,
        salt,
        spec.chain if held else None,
        spec.subject,
        spec.blocked and POLICY,
        spec.blocked,
        len(set(spec.parents)),
    )


def _text(values: tuple[tuple[str, Any], ...], texts: dict[int, str]) -> str:
    """Return the values as a JSON object, serialised once for all jobs that share them.

    ``texts`` is keyed by the ids of values that are still alive.
    """
    if id(values) not in texts:
        texts[id(values)] = canonical(dict(values)).decode()
    return texts[id(values)]
