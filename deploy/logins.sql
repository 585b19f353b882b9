-- What the logins of compose.yaml may do. The dispatcher also seals and maintains, as its flows do; whoever wants them
-- apart gives the maintenance flows a work pool and a login of their own.
GRANT sdp_dispatcher, sdp_sealer, sdp_maintainer TO dispatcher;
-- One machine, one login: add `CREATE ROLE gpu_2 LOGIN PASSWORD '…' IN ROLE sdp_worker;` for each further one.
GRANT sdp_worker TO worker;
