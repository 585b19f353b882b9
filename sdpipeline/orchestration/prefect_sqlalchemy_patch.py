"""Lets a Prefect server that is installed beside us plan runs by schedules; Prefect imports this as a collection.

Prefect 3.8 inserts planned runs with a key `state`, which is a hybrid property of the table's class. SQLAlchemy 2.0
left such a key alone; 2.1 refuses it where the property does not say what it means, so that no schedule ever fires.
Nothing is imported here: workers load collections too, and have no tables of Prefect's.
"""

from __future__ import annotations

import sys
from typing import Any

ORM_MODELS = "prefect.server.database.orm_models"


def let_runs_be_planned(models: Any) -> None:
    """Have bulk inserts into Prefect's tables of runs leave the key `state` alone, unless Prefect says otherwise."""
    for table in (models.FlowRun, models.TaskRun):
        state = vars(table).get("state")
        if getattr(state, "bulk_dml_setter", ...) is None:  # SQLAlchemy 2.0 has no such attribute
            state.bulk_dml_setter = _leave_alone


def _leave_alone(_table: type, _row: dict[str, Any], _state: Any) -> None:
    """The run's state is a row of its own, which Prefect inserts next."""


if ORM_MODELS in sys.modules:
    let_runs_be_planned(sys.modules[ORM_MODELS])
