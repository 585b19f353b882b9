"""Bind each writer of audit events to a database login, and limit what a worker's login may write.

Code of the previous release works unchanged on this schema. PostgreSQL enforces the rules with triggers; a chain of
events that began before this migration is bound to a login by its next event. SQLite has no logins: there the table
stays empty.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

# In the order in which transitions lock these tables; any other order risks deadlocks with running workers.
_GUARDED = {"worker": "INSERT OR UPDATE", "campaign": "UPDATE", "spending": "INSERT OR UPDATE", "audit_event": "INSERT"}

_WORKER_EVENTS = (
    "lease.taken,lease.released,lease.expired,job.succeeded,job.failed,job.deferred,jobs.skipped,"
    "worker.started,worker.stopped,campaign.paused,settings.changed,audit.chain_taken"
)

_LOGIN_KIND = """
CREATE FUNCTION {schema}.sdp_login_kind() RETURNS text LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  worker boolean := pg_has_role(session_user, to_regrole('sdp_worker'), 'MEMBER');
  sealer boolean := pg_has_role(session_user, to_regrole('sdp_sealer'), 'MEMBER');
BEGIN
  IF worker IS NOT TRUE AND sealer IS NOT TRUE THEN
    RETURN NULL;
  END IF;
  IF pg_has_role(session_user, to_regrole('sdp_dispatcher'), 'MEMBER')
     OR pg_has_role(session_user, to_regrole('sdp_maintainer'), 'MEMBER') THEN
    RETURN NULL;
  END IF;
  RETURN CASE WHEN worker THEN 'worker' ELSE 'sealer' END;
END
$$
"""

_OF_ANOTHER = """
CREATE FUNCTION {schema}.sdp_worker_of_another_login(id text) RETURNS boolean LANGUAGE sql STABLE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  SELECT EXISTS (SELECT FROM {schema}.audit_writer w WHERE w.worker_id = id AND w.login <> session_user)
$$
"""

_GUARD_AUDIT_EVENT = """
CREATE FUNCTION {schema}.sdp_guard_audit_event() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  told record;
  bound record;
  login_kind text := {schema}.sdp_login_kind();
  acts_as text;
BEGIN
  SELECT * INTO told FROM json_to_record(NEW.body::json) AS t(
    writer text, seq bigint, subject text, actor text, event text, login text, worker text, reason text);
  IF told.writer IS DISTINCT FROM NEW.writer_id OR told.seq IS DISTINCT FROM NEW.seq
     OR told.subject IS DISTINCT FROM NEW.subject OR told.actor IS NULL OR told.event IS NULL
     OR NEW.hash IS DISTINCT FROM encode(sha256(convert_to(NEW.body, 'UTF8')), 'hex') THEN
    RAISE insufficient_privilege USING MESSAGE = 'audit event refused: its columns differ from its bytes';
  END IF;
  IF told.login <> session_user THEN
    RAISE insufficient_privilege USING MESSAGE = 'audit event refused: it names another login';
  END IF;
  acts_as := CASE WHEN told.actor LIKE 'worker:%' THEN split_part(substr(told.actor, 8), ' ', 1) END;
  IF login_kind = 'worker' AND (
    acts_as IS NULL
    OR told.event <> ALL ('{{{worker_events}}}'::text[])
    OR told.worker <> acts_as
    OR (told.event IN ('worker.started', 'worker.stopped') AND told.subject <> 'worker:' || acts_as)
    OR (told.event = 'campaign.paused' AND told.reason IS DISTINCT FROM 'budget')
    OR (told.event = 'settings.changed' AND told.subject <> 'settings:marks')
  ) THEN
    RAISE insufficient_privilege USING MESSAGE = format(
      'audit event refused: a worker''s login does not write %s as %s', told.event, split_part(told.actor, ' ', 1));
  END IF;
  IF login_kind = 'sealer' AND (acts_as IS NOT NULL
     OR told.event NOT IN ('settings.changed', 'audit.chain_taken')
     OR (told.event = 'settings.changed' AND told.subject <> 'settings:seals')) THEN
    RAISE insufficient_privilege USING MESSAGE = format(
      'audit event refused: a sealer''s login does not write %s', told.event);
  END IF;
  SELECT w.login, w.actor INTO bound FROM {schema}.audit_writer w WHERE w.writer_id = NEW.writer_id;
  IF FOUND AND bound.login IS NOT NULL THEN
    IF bound.login <> session_user OR bound.actor <> told.actor THEN
      RAISE insufficient_privilege USING MESSAGE = 'audit event refused: its chain belongs to another login or actor';
    END IF;
    RETURN NEW;
  END IF;
  IF login_kind = 'worker' AND {schema}.sdp_worker_of_another_login(acts_as) THEN
    RAISE insufficient_privilege USING MESSAGE = 'audit event refused: this worker belongs to another login';
  END IF;
  IF FOUND THEN
    UPDATE {schema}.audit_writer w
    SET login = session_user, kind = login_kind, actor = told.actor, worker_id = acts_as
    WHERE w.writer_id = NEW.writer_id;
  ELSE
    INSERT INTO {schema}.audit_writer (writer_id, login, kind, actor, worker_id)
    VALUES (NEW.writer_id, session_user, login_kind, told.actor, acts_as);
  END IF;
  RETURN NEW;
END
$$
"""

_GUARD_CAMPAIGN = """
CREATE FUNCTION {schema}.sdp_guard_campaign() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF {schema}.sdp_login_kind() IS DISTINCT FROM 'worker' THEN
    RETURN NEW;
  END IF;
  IF NEW.admitted < OLD.admitted
     OR ((NEW.status, NEW.paused_because) IS DISTINCT FROM (OLD.status, OLD.paused_because)
         AND NOT coalesce(OLD.status = 'active' AND NEW.status = 'paused' AND NEW.paused_because IS NOT NULL
                          AND json_typeof(OLD.budget) = 'object', false)) THEN
    RAISE insufficient_privilege USING MESSAGE = 'a worker''s login may pause a campaign for its budget only';
  END IF;
  RETURN NEW;
END
$$
"""

_GUARD_SPENDING = """
CREATE FUNCTION {schema}.sdp_guard_spending() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF {schema}.sdp_login_kind() IS DISTINCT FROM 'worker' THEN
    RETURN NEW;
  END IF;
  IF {schema}.sdp_worker_of_another_login(NEW.worker_id) THEN
    RAISE insufficient_privilege USING MESSAGE = 'this worker belongs to another login';
  END IF;
  IF NEW.images < 0 OR NEW.size_bytes < 0 OR NEW.gpu_seconds < 0 OR NEW.cost < 0
     OR NEW.gpu_seconds >= 'Infinity' OR NEW.cost >= 'Infinity'  -- NaN is the largest number here
     OR (TG_OP = 'UPDATE' AND (NEW.images < OLD.images OR NEW.size_bytes < OLD.size_bytes
                               OR NEW.gpu_seconds < OLD.gpu_seconds OR NEW.cost < OLD.cost)) THEN
    RAISE insufficient_privilege USING MESSAGE = 'a worker''s login may only add to what was spent';
  END IF;
  RETURN NEW;
END
$$
"""

_GUARD_WORKER = """
CREATE FUNCTION {schema}.sdp_guard_worker() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF {schema}.sdp_login_kind() = 'worker' AND {schema}.sdp_worker_of_another_login(NEW.id) THEN
    RAISE insufficient_privilege USING MESSAGE = 'this worker belongs to another login';
  END IF;
  RETURN NEW;
END
$$
"""

# One primary-key lookup for each chain, regardless of the number of events.
_CHAINS_SO_FAR = """
INSERT INTO audit_writer (writer_id, actor, worker_id)
WITH RECURSIVE chain (writer_id) AS (
  SELECT min(writer_id) FROM audit_event
  UNION ALL
  SELECT (SELECT min(e.writer_id) FROM audit_event e WHERE e.writer_id > chain.writer_id)
  FROM chain WHERE chain.writer_id IS NOT NULL
)
SELECT writer_id, actor, CASE WHEN actor LIKE 'worker:%' THEN split_part(substr(actor, 8), ' ', 1) END
FROM (
  SELECT chain.writer_id, (
    SELECT e.body::json ->> 'actor' FROM audit_event e
    WHERE e.writer_id = chain.writer_id ORDER BY e.seq LIMIT 1
  ) AS actor
  FROM chain WHERE chain.writer_id IS NOT NULL
) AS first_event
"""


def upgrade() -> None:
    op.create_table(
        "audit_writer",
        sa.Column("writer_id", sa.String(length=32), nullable=False),
        sa.Column("login", sa.Text(), nullable=True),
        sa.Column("kind", sa.String(length=12), nullable=True),
        sa.Column("actor", sa.Text(), nullable=True),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("writer_id", name=op.f("pk_audit_writer")),
    )
    op.create_index("ix_audit_writer_worker_id", "audit_writer", ["worker_id"], unique=False)
    if op.get_context().dialect.name == "postgresql":
        _guard()


def _guard() -> None:
    schema = op.get_bind().execute(sa.text("SELECT quote_ident(current_schema())")).scalar_one()
    functions = (_LOGIN_KIND, _OF_ANOTHER, _GUARD_WORKER, _GUARD_CAMPAIGN, _GUARD_SPENDING, _GUARD_AUDIT_EVENT)
    for function in functions:
        source = function.format(schema=schema, worker_events=_WORKER_EVENTS)
        op.get_bind().exec_driver_sql(source.replace("%", "%%"))
    for table, when in _GUARDED.items():
        op.execute(
            f"CREATE TRIGGER {table}_guard BEFORE {when} ON {table}"
            f" FOR EACH ROW EXECUTE FUNCTION {schema}.sdp_guard_{table}()"
        )
    # Under the trigger's lock, so that no chain starts unnoticed in between.
    op.get_bind().exec_driver_sql(_CHAINS_SO_FAR.replace("%", "%%"))


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        for table in _GUARDED:
            op.execute(f"DROP TRIGGER {table}_guard ON {table}")
            op.execute(f"DROP FUNCTION sdp_guard_{table}()")
        op.execute("DROP FUNCTION sdp_worker_of_another_login(text)")
        op.execute("DROP FUNCTION sdp_login_kind()")
    op.drop_index("ix_audit_writer_worker_id", table_name="audit_writer")
    op.drop_table("audit_writer")
