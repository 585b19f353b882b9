-- What the logins of compose.yaml may do: one login for each machine, as the audit log binds a writer to its login. A
-- second GPU machine is a login of its own: CREATE ROLE worker2 LOGIN PASSWORD '…' IN ROLE sdp_worker.
GRANT sdp_dispatcher, sdp_maintainer TO dispatcher;
REVOKE sdp_sealer FROM dispatcher;  -- who sealed until November 2026
GRANT sdp_sealer TO sealer;
GRANT sdp_worker TO worker;
