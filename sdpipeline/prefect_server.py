"""The local Prefect server of one home: started when first needed, shared by commands, stopped by the last one.

Nothing here imports prefect: the server is a process of its own, and its state a file beside its lock.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from sdpipeline.errors import OrchestratorUnavailableError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process that a reused pid cannot be mistaken for."""

    pid: int
    started_at: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """The living process with that pid; raises psutil.NoSuchProcess."""
        return cls(pid=pid, started_at=psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.started_at and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHandle:
    """A Prefect server that answers. ``started`` tells whether this command started it."""

    api_url: str
    ui_url: str
    started: bool
    pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What the state file holds: the server, the commands that use it, and whether it outlives them."""

    url: str
    server: Process
    users: tuple[Process, ...] = ()
    keep: bool = False

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> _Record | None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            users = tuple(Process(**user) for user in document["users"])
            return cls(url=document["url"], server=Process(**document["server"]), users=users, keep=document["keep"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # absent, or cut short by a crash: a server it named is not known any more

    def living_users(self) -> tuple[Process, ...]:
        return tuple(user for user in self.users if user.alive())


@contextmanager
def own_server(home: Path, *, keep: bool = False) -> Iterator[ServerHandle]:
    """The home's own server, for as long as the block runs; with ``keep`` it stays when the last command ends."""
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    me = Process.of(os.getpid())
    handle = _join(folder, me, keep=keep)
    try:
        yield handle
    finally:
        _leave(folder, me)


def answers(api_url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether a Prefect server at that URL says it is healthy."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout_s) as response:  # noqa: S310 - http, made here
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _join(folder: Path, me: Process, *, keep: bool) -> ServerHandle:
    path = folder / "server.json"
    with _locked(folder):
        record, started = _Record.read(path), False
        if record is None or not (record.server.alive() and _settles(record.url)):
            if record is not None:
                _stop(record.server)
            record, started = _start(folder), True
        users = (*record.living_users(), me)
        _Record(url=record.url, server=record.server, users=users, keep=record.keep or keep).save(path)
    return ServerHandle(api_url=f"{record.url}/api", ui_url=record.url, started=started, pid=record.server.pid)


def _leave(folder: Path, me: Process) -> None:
    path = folder / "server.json"
    with _locked(folder):
        record = _Record.read(path)
        if record is None:
            return
        # A process may be inside twice (a test, a nested command): only one of its entries leaves.
        users = list(record.living_users())
        if me in users:
            users.remove(me)
        if users or record.keep:
            _Record(url=record.url, server=record.server, users=tuple(users), keep=record.keep).save(path)
        else:
            _stop(record.server)
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "server.lock", timeout=START_TIMEOUT_S + STOP_TIMEOUT_S)
    try:
        with lock:
            yield
    except Timeout as error:
        raise OrchestratorUnavailableError(f"another command holds {lock.lock_file}: is it stuck?") from error


def _settles(url: str) -> bool:
    """A server under load may miss one question; one that misses three is gone."""
    return any(answers(f"{url}/api", timeout_s=3.0) for _ in range(3))


def _start(folder: Path) -> _Record:
    log = folder.parent / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    # Not subprocess: whoever leaves last stops the server, so that no one object here may own its process.
    # A session of its own: a Ctrl-C in the terminal is for the command, which stops the server last.
    pid = os.posix_spawn(
        sys.executable,
        command,
        _server_environment(folder),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    record = _Record(url=f"http://127.0.0.1:{port}", server=Process.of(pid))
    try:
        _wait_until_healthy(record, log)
    except BaseException:  # also a Ctrl-C while it starts: nobody else knows this process
        _stop(record.server)
        raise
    return record


def _wait_until_healthy(record: _Record, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(f"{record.url}/api"):
        if not record.server.alive():
            raise OrchestratorUnavailableError(
                f"the local Prefect server ended while starting; {log} says:\n{_tail(log)}"
            )
        if time.monotonic() > deadline:
            raise OrchestratorUnavailableError(f"the local Prefect server did not start; {log} says:\n{_tail(log)}")
        time.sleep(0.2)


def _server_environment(folder: Path) -> dict[str, str]:
    """Ours alone: a user's PREFECT_ settings are about another server, its database or its proxy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return environment | {
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # else the page calls port 4200 whatever the port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def _stop(server: Process) -> None:
    """End the server's whole session: politely, then not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not server.alive():
            break
        with suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            psutil.Process(server.pid).wait(timeout=STOP_TIMEOUT_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
