-- Database roles with no more rights than each process needs. Run as the owner of the tables, after every
-- `sdpipeline db upgrade`; running it again changes nothing:
--
--     psql "$SDP_DATABASE_URL" --set ON_ERROR_STOP=1 --file deploy/roles.sql
--
-- They are groups without a login. Give each process a user of its own: CREATE ROLE w1 LOGIN IN ROLE sdp_worker …
--
--   sdp_reader      reads: status, reports, an auditor's verify
--   sdp_worker      leases and finishes jobs
--   sdp_dispatcher  submits, retries, cancels, pauses, registers checkpoints
--   sdp_sealer      writes seals, and into the audit log which keys it seals by
--   sdp_maintainer  what retention, erasure, archives and reconcile change and delete
--
-- Nobody but the owner may change or delete an audit event or a seal.

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

GRANT UPDATE ON job, campaign TO sdp_worker;
GRANT INSERT, UPDATE ON attempt, image, spending, worker TO sdp_worker;
GRANT INSERT, UPDATE, DELETE ON lease TO sdp_worker;

GRANT INSERT, UPDATE ON campaign, campaign_version, work_group, job, attempt, lease, image, spending, worker
  TO sdp_dispatcher;
GRANT INSERT, DELETE ON job_parent, group_checkpoint TO sdp_dispatcher;
GRANT INSERT, UPDATE, DELETE ON checkpoint TO sdp_dispatcher;
GRANT UPDATE, DELETE ON found_picture TO sdp_dispatcher;

GRANT INSERT, UPDATE, DELETE ON job, job_parent, attempt, lease, image, found_picture, archive TO sdp_maintainer;
GRANT INSERT, UPDATE ON spending, worker TO sdp_maintainer;
GRANT UPDATE ON campaign, campaign_version, work_group TO sdp_maintainer;
