"""Benches use the same real servers as the integration tests."""

from __future__ import annotations

from tests.integration.conftest import postgres_server, postgres_url  # noqa: F401 -- fixtures
