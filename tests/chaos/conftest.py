"""The chaos suite uses the same real databases as the integration tests."""

from __future__ import annotations

from tests.integration.conftest import postgres_server  # noqa: F401 -- fixtures
from tests.integration.databases import (  # noqa: F401 -- fixtures
    audit,
    database,
    database_url,
    migrated_postgres,
    migrated_sqlite,
)
