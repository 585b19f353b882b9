"""Local Prefect server of one home: started on first use, shared by commands, stopped by the last one.

The server is a separate process (``orchestration/local_server_process.py``); its state file lies next to its lock.
This module does not import prefect. Each start creates a new password, which is in the environment of the server, the
commands and their children, and in a file that only the home's owner can read.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from sdpipeline.errors import Mistake, OrchestratorUnavailableError, SettingsError
from sdpipeline.settings import LOOPBACK, on_loopback

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
WATCH_EVERY_S = 1.0
LOG_TAIL_LINES = 15
SERVER_MODULE = "sdpipeline.orchestration.local_server_process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Process identified by pid and start time, so that a reused pid is not mistaken for it."""

    pid: int
    started_at: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the running process with that pid; raises psutil.NoSuchProcess."""
        return cls(pid=pid, started_at=psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Return True if the process still runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.started_at and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHandle:
    """Prefect server that answers. ``started`` is True if this command started it."""

    api_url: str
    ui_url: str
    started: bool
    pid: int | None = None
    password_file: Path | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables for a Prefect client of this server: its address and password, and no proxy."""
        known = {} if self.password is None else {"PREFECT_API_AUTH_STRING": self.password}
        return {"PREFECT_API_URL": self.api_url} | known | no_proxy_for_loopback()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """Contents of the state file: the server, the commands that use it, and whether it outlives them.

    ``locked`` is false for a server that an earlier release started without a password.
    """

    url: str
    server: Process
    users: tuple[Process, ...] = ()
    keep: bool = False
    locked: bool = True

    def save(self, path: Path) -> None:
        _replace(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, path: Path) -> _Record | None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            users = tuple(Process(**user) for user in document["users"])
            server, locked = Process(**document["server"]), bool(document.get("locked", False))
            return cls(url=document["url"], server=server, users=users, keep=document["keep"], locked=locked)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # absent, or written by something else: the server it named is no longer known

    def living_users(self) -> tuple[Process, ...]:
        return tuple(user for user in self.users if user.alive())

    def owns_its_port(self) -> bool:
        """Return True if the server process itself listens on its port.

        Another user's process may have taken the port of a dead server.
        """
        try:
            connections = psutil.Process(self.server.pid).net_connections(kind="tcp4")
        except psutil.Error:
            return False
        port = int(self.url.rpartition(":")[2])
        return any(each.status == psutil.CONN_LISTEN and each.laddr[1] == port for each in connections)


@contextmanager
def own_server(home: Path, *, keep: bool = False) -> Iterator[ServerHandle]:
    """Yield the home's own server while the block runs; with ``keep`` it stays when the last command ends."""
    folder = _own_folder(home)
    me = Process.of(os.getpid())
    handle = _join(folder, me, keep=keep)
    try:
        yield handle
    finally:
        _leave(folder, me)


def _own_folder(home: Path) -> Path:
    folder = home / "prefect"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        folder.chmod(0o700)  # an earlier release made it world-readable
    except PermissionError as error:
        fix = "set SDP_HOME to a separate folder for each user"
        message = f"{folder} belongs to another user, and a Prefect server is private to its user"
        raise SettingsError(Mistake(key="SDP_HOME", message=message, fix=fix)) from error
    return folder


def wait_until_unused(folder: Path, me: Process, starter: Process) -> FileLock:
    """Block until no running command uses the server, unless it is to stay. Called by the server process.

    Returns the home's lock, held: until this process has ended, no command may take it for a running server.
    """
    path = folder / "server.json"
    while True:
        time.sleep(WATCH_EVERY_S)
        if _in_use(path, me, starter):
            continue
        lock = FileLock(folder / "server.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue  # a command joins or leaves
        if not _in_use(path, me, starter):
            if (record := _Record.read(path)) is not None and record.server == me:
                path.unlink()  # do not remove the record of another server
            return lock
        lock.release()


def _in_use(path: Path, server: Process, starter: Process) -> bool:
    """Return True while the server is in use.

    Before the server is recorded, and after another one is, only the command that started it counts.
    """
    record = _Record.read(path)
    if record is None or record.server != server:
        return starter.alive()
    return record.keep or bool(record.living_users())


def answers(api_url: str, *, timeout_s: float = 2.0) -> bool:
    """Return True if a Prefect server at that URL reports health. No credential is sent or needed."""
    try:
        with _opener(api_url).open(f"{api_url}/health", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def no_proxy_for_loopback() -> dict[str, str]:
    """Return the variables that exempt loopback addresses from proxies, in addition to present exemptions.

    Both spellings are set: an empty ``no_proxy`` would hide ``NO_PROXY``.
    """
    known = ",".join(filter(None, (os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy"))))
    hosts = list(dict.fromkeys([*(host.strip() for host in known.split(",") if host.strip()), *LOOPBACK]))
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))


def _opener(url: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if on_loopback(url) else []))


def _join(folder: Path, me: Process, *, keep: bool) -> ServerHandle:
    path = folder / "server.json"
    with _locked(folder):
        record, started = _Record.read(path), False
        password = _password(folder)
        if record is None or password is None or not _usable(record):
            if record is not None:
                _stop(record.server)
            record, password, started = *_start(folder, me), True
        users = (*record.living_users(), me)
        _Record(url=record.url, server=record.server, users=users, keep=record.keep or keep).save(path)
    return ServerHandle(
        api_url=f"{record.url}/api",
        ui_url=record.url,
        started=started,
        pid=record.server.pid,
        password_file=_password_file(folder),
        password=password,
    )


def _usable(record: _Record) -> bool:
    return record.locked and record.server.alive() and record.owns_its_port() and _settles(record.url)


def _leave(folder: Path, me: Process) -> None:
    path = folder / "server.json"
    with _locked(folder):
        record = _Record.read(path)
        if record is None:
            return
        # A process may be registered twice (a test, a nested command): remove only one of its entries.
        users = list(record.living_users())
        if me in users:
            users.remove(me)
        if users or record.keep:
            _Record(url=record.url, server=record.server, users=tuple(users), keep=record.keep).save(path)
        else:
            _stop(record.server)
            path.unlink()


def _password_file(folder: Path) -> Path:
    return folder / "password"


def _password(folder: Path) -> str | None:
    """Return the password of the running server; None if no file that only its owner can read holds one."""
    try:
        with _password_file(folder).open(encoding="utf-8") as file:
            about = os.fstat(file.fileno())
            if about.st_uid != os.geteuid() or about.st_mode & 0o077:
                return None
            return file.read().strip() or None
    except FileNotFoundError:
        return None


def _new_password(folder: Path) -> str:
    """Create a password at each start, so that one sent to a dead server's port becomes useless."""
    password = f"sdpipeline:{secrets.token_urlsafe(32)}"
    _replace(_password_file(folder), password + "\n")
    return password


def _replace(path: Path, text: str) -> None:
    """Write a file with mode 0600 atomically: a crash leaves the old file intact."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "server.lock", timeout=START_TIMEOUT_S + STOP_TIMEOUT_S)
    try:
        with lock:
            yield
    except Timeout as error:
        raise OrchestratorUnavailableError(f"another command holds {lock.lock_file}: is it stuck?") from error


def _settles(url: str) -> bool:
    """Return True unless three health checks in a row fail: a server under load may miss one."""
    return any(answers(f"{url}/api", timeout_s=3.0) for _ in range(3))


def _start(folder: Path, me: Process) -> tuple[_Record, str]:
    log = folder.parent / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    password = _new_password(folder)
    # Bind here and inherit, so that no other process can take the port before the server listens.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        record = _spawn(folder, me, listener, log, password)
    path = folder / "server.json"
    try:
        # Save before it answers: after a SIGKILL of this command, the next one finds the process and ends it.
        replace(record, users=(me,)).save(path)
        _wait_until_healthy(record, log)
    except BaseException:  # also a Ctrl-C while it starts
        _stop(record.server)
        path.unlink(missing_ok=True)
        raise
    return record, password


def _spawn(folder: Path, me: Process, listener: socket.socket, log: Path, password: str) -> _Record:
    port = listener.getsockname()[1]
    os.set_inheritable(listener.fileno(), True)
    about = json.dumps({"listener": listener.fileno(), "folder": str(folder), "starter": asdict(me)})
    # Not subprocess: the last command to leave stops the server, so no object here may own its process.
    # A separate session: Ctrl-C in the terminal is for the command, which stops the server last.
    # Without the current folder on its path (-P): others may write there.
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-m", SERVER_MODULE, about],
        _server_environment(folder, port, password),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return _Record(url=f"http://127.0.0.1:{port}", server=Process.of(pid))


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


def _server_environment(folder: Path, port: int, password: str) -> dict[str, str]:
    """Return the server's environment without the user's PREFECT_ settings, which are about another server.

    Those settings may name that server's database or its proxy.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return environment | {
        "DO_NOT_TRACK": "1",
        "HOME": os.environ.get("HOME") or str(folder),  # a container's user may have none, and Prefect asks for it
        "PREFECT_HOME": str(folder),
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # else the page calls port 4200 whatever the port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def _stop(server: Process) -> None:
    """End the server's whole session: SIGTERM first, then SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not server.alive():
            break
        with suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            psutil.Process(server.pid).wait(timeout=STOP_TIMEOUT_S)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
