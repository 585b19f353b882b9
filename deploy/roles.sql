-- Database roles with no more rights than each process needs. Run as the owner of the tables, after every
-- `sdpipeline db upgrade`; running it again changes nothing:
--
--     psql "$SDP_DATABASE_URL" --set ON_ERROR_STOP=1 --file deploy/roles.sql
--
-- They are groups without a login. Give each machine a login of its own: CREATE ROLE gpu_1 LOGIN IN ROLE sdp_worker;
-- A chain of audit events belongs to the login that wrote its first event, and a worker to the login that registered
-- it: triggers refuse every other login. Two machines behind one login cannot be told apart. Behind a pgbouncer, let it
-- pass each client's login through (no `user=` in its [databases]).
--
--   sdp_reader      reads: status, reports, an auditor's verify
--   sdp_worker      leases and finishes jobs
--   sdp_dispatcher  submits, retries, cancels, pauses, registers checkpoints
--   sdp_sealer      writes seals, and into the audit log which keys it seals by
--   sdp_maintainer  what retention, erasure, archives and reconcile change and delete
--
-- Nobody but the owner may change or delete an audit event or a seal. A login that is in sdp_worker and neither in
-- sdp_dispatcher nor in sdp_maintainer writes events as `worker:ID` only, and only those that a worker writes; one that
-- is in sdp_sealer alone writes only which keys seal.

-- In one transaction: processes that go on meanwhile never miss a right.
BEGIN;

DO $$
DECLARE
  name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['sdp_reader', 'sdp_worker', 'sdp_dispatcher', 'sdp_sealer', 'sdp_maintainer'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
      EXECUTE format('CREATE ROLE %I NOLOGIN', name);
    END IF;
  END LOOP;
END
$$;

GRANT sdp_reader TO sdp_worker, sdp_dispatcher, sdp_sealer, sdp_maintainer;

DO $$
BEGIN
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO sdp_reader', current_database());
  -- A submit brings its jobs into temporary tables first.
  EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO sdp_dispatcher', current_database());
END
$$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO sdp_reader;

-- From nothing, so that a right that an older release gave does not stay.
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM sdp_reader, sdp_worker, sdp_dispatcher, sdp_sealer, sdp_maintainer;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO sdp_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO sdp_reader;

-- Everybody who changes something says so in the audit log; the log only grows.
GRANT INSERT ON audit_event TO sdp_worker, sdp_dispatcher, sdp_sealer, sdp_maintainer;
GRANT INSERT ON audit_seal, audit_seal_range TO sdp_sealer;

-- A worker changes what becomes of a job, never what was asked for; it pauses a campaign for its budget and nothing
-- else, and only adds to what was spent (triggers see to both).
GRANT UPDATE (status, lease_id, attempt, alone, parents_left, not_before, error_kind, error, finished_at)
  ON job TO sdp_worker;
GRANT UPDATE (status, paused_because, admitted) ON campaign TO sdp_worker;
GRANT INSERT ON attempt, image, spending, worker, lease TO sdp_worker;
GRANT UPDATE (finished_at, outcome, error_kind, error, gpu_seconds, cost) ON attempt TO sdp_worker;
GRANT UPDATE (images, size_bytes, gpu_seconds, cost) ON spending TO sdp_worker;
GRANT UPDATE (seen_at, stopped_at, note, paused_at, description) ON worker TO sdp_worker;
GRANT UPDATE (expires_at, closed_at), DELETE ON lease TO sdp_worker;

GRANT INSERT, UPDATE ON campaign, campaign_version, work_group, job, attempt, lease, image, spending, worker
  TO sdp_dispatcher;
GRANT INSERT, DELETE ON job_parent, group_checkpoint TO sdp_dispatcher;
GRANT INSERT, UPDATE, DELETE ON checkpoint TO sdp_dispatcher;
GRANT UPDATE, DELETE ON found_picture TO sdp_dispatcher;

GRANT INSERT, UPDATE, DELETE ON job, job_parent, attempt, lease, image, found_picture, archive TO sdp_maintainer;
GRANT INSERT, UPDATE ON spending, worker TO sdp_maintainer;
GRANT UPDATE ON campaign, campaign_version, work_group TO sdp_maintainer;

COMMIT;
