"""Patch that lets a Prefect server in this environment plan scheduled runs with SQLAlchemy 2.1.

Prefect imports this module as a collection. Prefect 3.8 inserts planned runs with a key `state`, which is a hybrid
property of the table's class. SQLAlchemy 2.0 ignored such a key; 2.1 refuses it unless the property has a setter for
bulk inserts, so that no schedule ever fires. Nothing is imported here: workers load collections too, and do not have
Prefect's tables.
"""

from __future__ import annotations

import sys
from typing import Any

ORM_MODELS = "prefect.server.database.orm_models"


def let_runs_be_planned(models: Any) -> None:
    """Make bulk inserts into Prefect's run tables ignore the key `state`, unless Prefect defines it."""
    for table in (models.FlowRun, models.TaskRun):
        state = vars(table).get("state")
        if getattr(state, "bulk_dml_setter", ...) is None:  # SQLAlchemy 2.0 has no such attribute
            state.bulk_dml_setter = _leave_alone


def _leave_alone(_table: type, _row: dict[str, Any], _state: Any) -> None:
    """Ignore the key: the run's state is a separate row, which Prefect inserts next."""


if ORM_MODELS in sys.modules:
    let_runs_be_planned(sys.modules[ORM_MODELS])
