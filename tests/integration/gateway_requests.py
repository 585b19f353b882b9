"""Requests that the Prefect gateway refuses, each paired with one that the same credential may send.

GPU and CPU stand for the ids of a run of each pool, DEPLOYED for the deployment of gpu-worker, NIGHTLY for another
pool's, FLOW for the flow of gpu-worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STATE = {"type": "PENDING", "name": "Pending", "message": "a test"}
RESULT = {"storage_key": "/tmp/result", "serializer": {"type": "pickle"}, "storage_block_id": None}
LINE = {"name": "prefect", "level": 20, "message": "a test", "timestamp": "2026-11-29T00:00:00Z"}
STEPS = [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]
COMMAND: dict[str, Any] = {"job_variables": {"command": "printenv"}}
MINE = {"description": "mine"}
NEW = {"name": "mine", "flow_id": "FLOW"}

RUN, OTHER_RUN, POOL, START = "flow_runs/GPU", "flow_runs/CPU", "work_pools/gpu", "deployments/DEPLOYED/create_flow_run"
NAMED = "deployments/name/gpu-worker/gpu-worker"
OTHER_START = "deployments/NIGHTLY/create_flow_run"


@dataclass(frozen=True)
class Asked:
    """A request: method, path below /api and JSON body."""

    method: str
    path: str
    body: Any = None

    def about(self, ids: Mapping[str, str]) -> Asked:
        """The same request with ids in place of their placeholders."""
        text = re.sub(rf"\b({'|'.join(ids)})\b", lambda word: ids[word[0]], json.dumps([self.path, self.body]))
        path, body = json.loads(text)
        return Asked(self.method, path, body)


def get(path: str) -> Asked:
    return Asked("GET", path)


def post(path: str, body: Any) -> Asked:
    return Asked("POST", path, body)


def patch(path: str, body: Any) -> Asked:
    return Asked("PATCH", path, body)


def state(run: str, *, force: bool = True, **more: Any) -> Asked:
    return post(f"{run}/set_state", {"state": STATE | more, "force": force})


def start(deployment: str = START, **more: Any) -> Asked:
    return post(deployment, {"state": STATE} | more)


DISPATCHER_MAY: dict[str, tuple[Asked, Asked]] = {
    "start a run, but not with a command": (start(START, **COMMAND), start(parameters={"campaign": "spring"})),
    "start a run, but not with an environment": (start(job_variables={"env": {"PYTHONPATH": "/tmp"}}), start()),
    "start a run, but not in another queue": (start(work_queue_name="mine"), start(name="mine")),
    "start a run, but not with a file to write to": (start(parameters={"log_file": "/etc/x"}), start()),
    "start a run, but not with the value of a variable": (
        start(parameters={"campaign": {"__prefect_kind": "workspace_variable", "variable_name": "x"}}),
        start(parameters={"campaign": "spring"}),
    ),
    "start a worker, but no other deployment": (start(OTHER_START), start()),
    "read a deployment, but not give it pull_steps": (
        post("deployments/", NEW | {"pull_steps": STEPS}),
        get(NAMED),
    ),
    "read a pool, but not change it": (patch(POOL, MINE), get(POOL)),
    "read a pool, but not its own either": (patch("work_pools/cpu", MINE), get("work_pools/cpu")),
    "write an artifact of a run, but not of none": (
        post("artifacts/", {"key": "x", "data": 1}),
        post("artifacts/", {"key": "x", "data": 1, "flow_run_id": "CPU"}),
    ),
    "cancel a worker, but not with a result": (state(RUN, data=RESULT), state(RUN, data=None)),
    "name its run, but not give it a command": (
        patch(OTHER_RUN, COMMAND),
        patch(OTHER_RUN, {"name": "x", "tags": ["x"]}),
    ),
}

WORKER_MAY: dict[str, tuple[Asked, Asked]] = {
    "read a deployment, but not start it": (start(), get("deployments/DEPLOYED")),
    "read a flow, but not run it": (post("flow_runs/", {"flow_id": "FLOW"}), get("flows/FLOW")),
    "read a deployment, but not give it pull_steps": (
        post("deployments/", NEW | {"pull_steps": STEPS, "work_pool_name": "cpu"}),
        get("deployments/DEPLOYED"),
    ),
    "read a deployment, but not give it a command": (
        patch("deployments/DEPLOYED", COMMAND),
        get("deployments/DEPLOYED"),
    ),
    "read its deployment, but no other pool's": (get("deployments/NIGHTLY"), get("deployments/DEPLOYED")),
    "read its pool, but not change it": (patch(POOL, MINE), get(POOL)),
    "read its pool, but not change another": (patch("work_pools/cpu", MINE), get(POOL)),
    "say that it lives, but not make a pool": (
        post("work_pools/", {"name": "mine", "type": "process"}),
        post("work_pools/gpu/workers/heartbeat", {"name": "w"}),
    ),
    "say that it lives in its pool, but not in another": (
        post("work_pools/cpu/workers/heartbeat", {"name": "w"}),
        post("work_pools/gpu/workers/heartbeat", {"name": "w"}),
    ),
    "take its pool's runs, but not another's": (
        post("work_pools/cpu/get_scheduled_flow_runs", {}),
        post("work_pools/gpu/get_scheduled_flow_runs", {}),
    ),
    "search runs, but not blocks": (post("block_documents/filter", {}), post("flow_runs/filter", {})),
    "count runs, but not deployments": (post("deployments/count", {}), post("flow_runs/count", {})),
    "search events of pods, but not of runs": (
        post("events/filter", {"filter": {"resource": {"id": ["prefect.flow-run.GPU"]}}}),
        post("events/filter", {"filter": {"resource": {"id": ["prefect.kubernetes.pod.x"]}}}),
    ),
    "search runs, but not automations": (post("automations/filter", {}), post("flow_runs/filter", {})),
    "search runs, but not variables": (post("variables/filter", {}), post("flow_runs/filter", {})),
    "ask the version, but not make a block type": (
        post("block_types/", {"name": "x", "slug": "x"}),
        get("admin/version"),
    ),
    "ask the version, but not set a variable": (post("variables/", {"name": "x", "value": 1}), get("admin/version")),
    "ask the version, but not the settings": (get("admin/settings"), get("admin/version")),
    "ask where results lie, but not move them": (Asked("DELETE", "admin/storage"), get("admin/storage")),
    "read its pool's run, but not another's": (get(OTHER_RUN), get(RUN)),
    "read its run, but not by a path with dots": (get("flow_runs/GPU%2f%2e%2e%2fCPU"), get(RUN)),
    "read its run, but not delete it": (Asked("DELETE", RUN), get(RUN)),
    "set its run's state, but not another's": (state(OTHER_RUN), state(RUN)),
    "set its run's state, but not with a result": (state(RUN, data=RESULT), state(RUN, data=None)),
    "set its run's state, but not of many": (
        post("flow_runs/bulk_set_state", {"flow_runs": {"id": {"any_": ["GPU"]}}, "state": STATE}),
        state(RUN),
    ),
    "say its run's pid, but not give it a command": (patch(RUN, COMMAND), patch(RUN, {"infrastructure_pid": "1"})),
    "say its run's version, but not tag it": (patch(RUN, {"tags": ["x"]}), patch(RUN, {"flow_version": "1"})),
    "label its run, but not another's": (patch(f"{OTHER_RUN}/labels", {"x": "y"}), patch(f"{RUN}/labels", {"x": "y"})),
    "log about its run, but not another's": (
        post("logs/", [LINE | {"flow_run_id": "CPU"}]),
        post("logs/", [LINE | {"flow_run_id": "GPU"}]),
    ),
    "log about its run, but write no artifact": (
        post("artifacts/", {"key": "x", "flow_run_id": "GPU"}),
        post("logs/", [LINE | {"flow_run_id": "GPU"}]),
    ),
    "read its run, but send no events without a socket": (post("events", []), get(RUN)),
}

TWINS = [
    *(("dispatcher", may, *twin) for may, twin in DISPATCHER_MAY.items()),
    *(("worker", may, *twin) for may, twin in WORKER_MAY.items()),
]
"""(role, what it may and may not do, the refused request, the allowed one)."""
