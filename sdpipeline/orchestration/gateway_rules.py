"""Allow-list of the Prefect gateway: the routes, bodies and events that each role may send.

Prefect has a single password, and anyone who holds it may do anything: create a deployment with ``pull_steps``, start
a run with ``job_variables.command``, change a work pool. The gateway holds that password. Workers hold credentials
that allow the routes below and nothing else. These are the routes that ``prefect worker start``, ``prefect flow-run
execute`` and our flows were observed to call.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from sdpipeline.domain import Json

KEPT_RUNS = 10_000
"""Number of runs whose work pool is cached."""

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_RUN_CHANGES = frozenset({"infrastructure_pid", "flow_version", "empirical_policy"})
_NEW_RUN = frozenset(
    {"state", "name", "parameters", "context", "tags", "idempotency_key", "parent_task_run_id", "labels"}
)


class RefusedError(Exception):
    """The request is not on the allow-list; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Permissions of one credential."""

    name: str
    polls: str
    """Work pool whose scheduled runs the role takes."""
    runs: frozenset[str]
    """Work pools whose runs the role may read and change."""
    starts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Deployments that the role may start, with the parameters it may give them."""


WORKER = Role(name="worker", polls="gpu", runs=frozenset({"gpu"}))
DISPATCHER = Role(
    name="dispatcher",
    polls="cpu",
    runs=frozenset({"cpu", "gpu"}),
    starts={"gpu-worker/gpu-worker": frozenset({"campaign"}), "campaign/campaign": frozenset({"request"})},
)


class Owners:
    """Look up on the Prefect server which work pool a run, task run, artifact or deployment belongs to."""

    def __init__(self, server: httpx.AsyncClient) -> None:
        self._server = server
        self._pools: dict[str, str | None] = {}

    async def pool_of_run(self, run_id: object) -> str | None:
        """Return the name of the run's work pool; None if there is no such run, or it has no pool."""
        key = _uuid(run_id)
        if key not in self._pools:
            found = await self.read(f"flow_runs/{key}")
            if found is None:
                return None
            if len(self._pools) >= KEPT_RUNS:
                self._pools.pop(next(iter(self._pools)))
            self._pools[key] = found.get("work_pool_name")
        return self._pools[key]

    async def read(self, path: str) -> Json | None:
        """Return the object at a path of the API; None if the server has none there."""
        answer = await self._server.get(path)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        found: Json = answer.raise_for_status().json()
        return found


@dataclass(slots=True, kw_only=True)
class Request:
    """Request under check. ``found`` holds what the route's pattern matched."""

    role: Role
    owners: Owners
    found: Mapping[str, str]
    body: Any

    def fields(self, allowed: frozenset[str] | None = None) -> Json:
        """Return the body, which must be an object with only ``allowed`` fields."""
        if not isinstance(self.body, dict):
            raise RefusedError("the body is not a JSON object")
        if allowed is not None and (more := sorted(set(self.body) - allowed)):
            raise RefusedError(f"{', '.join(more)}: this credential may not set that")
        return self.body

    async def own(self, run_id: object) -> None:
        """Refuse a run that belongs to no work pool of this role."""
        pool = await self.owners.pool_of_run(run_id)
        if pool not in self.role.runs:
            raise RefusedError(f"flow run {run_id} is not of the work pool {' or '.join(sorted(self.role.runs))}")


Check = Callable[[Request], Awaitable[None]]


async def _anything(_: Request) -> None:
    """Allow read-only routes that hold no secret."""


async def _known_pool(request: Request) -> None:
    if request.found["pool"] not in {request.role.polls, *request.role.runs}:
        raise RefusedError(f"work pool {request.found['pool']}: not this credential's")


async def _own_pool(request: Request) -> None:
    if request.found["pool"] != request.role.polls:
        raise RefusedError(f"work pool {request.found['pool']}: this credential takes runs of {request.role.polls}")


async def _own_run(request: Request) -> None:
    await request.own(request.found["id"])


async def _change_run(request: Request) -> None:
    # Not job_variables: they would change the command of a run that waits. A worker does not name or tag runs.
    request.fields(_RUN_CHANGES | ({"name", "tags"} if request.role.starts else set()))
    await _own_run(request)


async def _set_state(request: Request) -> None:
    _without_result(request.fields(frozenset({"state", "force"})).get("state"))
    await _own_run(request)


async def _only_own_runs(request: Request) -> None:
    """Narrow a search to runs of this role's pools."""
    request.fields()["work_pools"] = {"name": {"any_": sorted(request.role.runs)}}


async def _pod_events(request: Request) -> None:
    """Allow the worker of a Kubernetes pool to ask which events of its pods it has sent."""
    asked = request.fields(frozenset({"filter", "limit"})).get("filter")
    resource = asked.get("resource") if isinstance(asked, dict) else None
    ids = resource.get("id") if isinstance(resource, dict) else None
    pods = "prefect.kubernetes.pod."
    if not isinstance(ids, list) or not ids or not all(isinstance(each, str) and each.startswith(pods) for each in ids):
        raise RefusedError(f"events: only those about {pods}… can be searched")


async def _logs(request: Request) -> None:
    if not isinstance(request.body, list):
        raise RefusedError("the body is not a list of log lines")
    for run_id in {_uuid(line.get("flow_run_id")) if isinstance(line, dict) else "" for line in request.body}:
        await request.own(run_id)


async def _deployment(request: Request) -> None:
    found = await request.owners.read(f"deployments/{request.found['id']}")
    if found is not None and found.get("work_pool_name") not in request.role.runs:
        raise RefusedError(f"deployment {request.found['id']} is not of this credential's work pools")


async def _named_deployment(request: Request) -> None:
    if request.found["name"] not in request.role.starts:
        raise RefusedError(f"deployment {request.found['name']}: not one that this credential may start")


async def _start(request: Request) -> None:
    """Allow a run of a known deployment as deployed: no job variables, no queue, no block of the caller's choice."""
    new = {name: value for name, value in request.fields().items() if value not in (None, {}, [])}
    if more := sorted(new.keys() - _NEW_RUN):
        raise RefusedError(f"{', '.join(more)}: this credential may not set that for a new run")
    _without_result(new.get("state", {}))
    given = new.get("parameters", {})
    for name, parameters in request.role.starts.items():
        found = await request.owners.read(f"deployments/name/{name}")
        if found is not None and found["id"] == request.found["id"].lower():
            if not isinstance(given, dict) or not parameters.issuperset(given):
                raise RefusedError(f"parameters of {name}: this credential gives only {', '.join(sorted(parameters))}")
            _without_templates(given)
            return
    raise RefusedError(f"deployment {request.found['id']}: not one that this credential may start")


async def _of_own_run(request: Request) -> None:
    """Allow a task run or artifact that names a run of this role's pools."""
    new = request.fields()
    _without_result(new.get("state") or {})
    await request.own(new.get("flow_run_id"))


async def _artifact(request: Request) -> None:
    request.fields(frozenset({"data", "description", "metadata_"}))
    found = await request.owners.read(f"artifacts/{request.found['id']}")
    await request.own(found and found.get("flow_run_id"))


def _without_result(state: Any) -> None:
    """Refuse a state that carries the address of a result, because some process would load and unpickle it."""
    if not isinstance(state, dict) or state.get("data") is not None:
        raise RefusedError("state.data: this credential may not set results")


def _without_templates(value: Any) -> None:
    """Refuse parameters that the server would render with the values of variables that this credential cannot read."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if "__prefect_kind" in each:
                raise RefusedError("__prefect_kind: this credential may not have the server render parameters")
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


_ID = f"(?P<id>{_UUID})"
_POOL = r"/work_pools/(?P<pool>[\w-]+)"
_ROUTES: tuple[tuple[str, str, Check], ...] = (
    ("GET", r"/(?:health|version|admin/version|admin/storage|csrf-token)", _anything),
    ("GET", f"/(?:flows|work_queues)/{_UUID}", _anything),
    ("GET", _POOL, _known_pool),
    ("POST", f"{_POOL}/(?:queues/filter|get_scheduled_flow_runs|workers/heartbeat)", _own_pool),
    ("GET", f"/deployments/{_ID}", _deployment),
    ("GET", f"/flow_runs/{_ID}", _own_run),
    ("PATCH", f"/flow_runs/{_ID}", _change_run),
    ("PATCH", f"/flow_runs/{_ID}/labels", _own_run),
    ("POST", f"/flow_runs/{_ID}/set_state", _set_state),
    ("POST", "/flow_runs/(?:filter|count)", _only_own_runs),
    ("POST", "/events/filter", _pod_events),
    ("POST", "/logs/", _logs),
)
_DISPATCH: tuple[tuple[str, str, Check], ...] = (
    ("GET", r"/deployments/name/(?P<name>[\w-]+/[\w-]+)", _named_deployment),
    ("POST", f"/deployments/{_ID}/create_flow_run", _start),
    ("POST", "/task_runs/", _of_own_run),
    ("POST", "/artifacts/", _of_own_run),
    ("PATCH", f"/artifacts/{_ID}", _artifact),
)


async def check(role: Role, owners: Owners, method: str, path: str, body: Any) -> None:
    """Raise RefusedError unless the allow-list has the route and the body meets its conditions.

    A search is narrowed in place to the role's own runs, so ``body`` must be the one that is forwarded.
    """
    for allowed, pattern, rule in (*_ROUTES, *(_DISPATCH if role.starts else ())):
        if method == allowed and (match := re.fullmatch(pattern, path)):
            await rule(Request(role=role, owners=owners, found=match.groupdict(), body=body))
            return
    raise RefusedError(f"{method} {path} is not on the allow-list of the {role.name}")


async def check_event(role: Role, owners: Owners, event: Any) -> None:
    """Raise RefusedError unless a client of this role may emit such events, about runs of its own pools.

    The server records task runs by events, and automations act on the run that an event names.
    """
    request = Request(role=role, owners=owners, found={}, body=event)
    resource, name = _resource(request.fields().get("resource")), str(event.get("event"))
    others = event.get("related") or []
    if not isinstance(others, list):
        raise RefusedError("an event's related resources are a list")
    related = [_resource(each) for each in others]
    runs = [run for each in related if (run := _object_id("prefect.flow-run", each))]
    if (run := _object_id("prefect.flow-run", resource)) and name == "prefect.flow-run.heartbeat":
        runs.append(run)
    elif (task := _object_id("prefect.task-run", resource)) and name.startswith("prefect.task-run."):
        await _task_event(request, task, runs)
    elif not _infrastructure(name, resource) and not (role.starts and _ours(name, resource)):
        raise RefusedError(f"event {name} about {resource}: the {role.name} may not emit it")
    for run in runs:
        await request.own(run)


async def _task_event(request: Request, task: str, runs: list[str]) -> None:
    """Check a task run's own event: it may neither move the task run to another run nor carry a result."""
    payload = request.fields().get("payload")
    if not isinstance(payload, dict) or not isinstance(payload.get("task_run"), dict) or len(runs) != 1:
        raise RefusedError("a task run's event names its task run and one flow run")
    _without_result(payload.get("validated_state"))
    if {"id", "flow_run_id", "state", "state_id"} & payload["task_run"].keys():
        raise RefusedError("payload.task_run: its ids are those that the event names")
    known = await request.owners.read(f"task_runs/{_uuid(task)}")
    if known is not None and known.get("flow_run_id") != _uuid(runs[0]):
        raise RefusedError(f"task run {task} belongs to another flow run")


def _infrastructure(name: str, resource: str) -> bool:
    kinds = ("prefect.worker.", "prefect.runner.", "prefect.kubernetes.pod.")
    return any(name.startswith(kind) and resource.startswith(kind) for kind in kinds)


def _ours(name: str, resource: str) -> bool:
    kinds = ("sdpipeline.campaign.", "prefect.artifact.")
    return any(name.startswith(kind) and resource.startswith(kind) for kind in kinds)


async def may_see(role: Role, owners: Owners, event: Any) -> bool:
    """Return True if an event from the server is about a run of this role's pools."""
    try:
        run = _object_id("prefect.flow-run", _resource(event["event"]["resource"]))
        return run is not None and await owners.pool_of_run(run) in role.runs
    except (KeyError, TypeError, RefusedError):
        return False


def _resource(found: Any) -> str:
    if not isinstance(found, dict) or not isinstance(found.get("prefect.resource.id"), str):
        raise RefusedError("an event's resources have ids")
    return str(found["prefect.resource.id"])


def _object_id(kind: str, resource: str) -> str | None:
    return resource.removeprefix(f"{kind}.") if resource.startswith(f"{kind}.") else None


def _uuid(given: object) -> str:
    if not isinstance(given, str) or not re.fullmatch(_UUID, given):
        raise RefusedError(f"{given!r:.60} is not the id of a flow run")
    return given.lower()
