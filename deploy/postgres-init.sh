#!/bin/sh
# Runs once, in an empty database server: Prefect's own database, and a login for each process of ours. The logins get
# their rights from roles.sql, after the first migration.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<SQL
CREATE ROLE prefect LOGIN PASSWORD '$PREFECT_DATABASE_PASSWORD';
CREATE DATABASE prefect OWNER prefect;
CREATE ROLE dispatcher LOGIN PASSWORD '$DISPATCHER_DATABASE_PASSWORD';
CREATE ROLE worker LOGIN PASSWORD '$WORKER_DATABASE_PASSWORD';
CREATE ROLE sealer LOGIN PASSWORD '$SEALER_DATABASE_PASSWORD';
SQL
