"""Fixtures of the benches: the same real servers as in the integration tests."""

from __future__ import annotations

from tests.integration.conftest import postgres_server, postgres_url  # noqa: F401 -- fixtures
