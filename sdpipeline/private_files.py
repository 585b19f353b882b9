"""File modes: only the owner may read a home and its files; files that a user requests elsewhere follow the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

UMASK = 0o077
OTHERS = 0o7077
"""Mode bits that no file of a home has: those of group and others, and setuid, setgid and sticky."""

_users_umask: ContextVar[int | None] = ContextVar("users_umask", default=None)


@contextmanager
def private_files() -> Iterator[None]:
    """Make files created in this block, by this process and its children, readable by their owner only."""
    users = os.umask(UMASK)
    os.umask(users | UMASK)
    token = _users_umask.set(users)
    try:
        yield
    finally:
        _users_umask.reset(token)
        os.umask(users)


@contextmanager
def users_umask() -> Iterator[None]:
    """Apply the user's own umask to files created in this block, inside ``private_files``."""
    users = _users_umask.get()
    if users is None:
        yield
        return
    before = os.umask(users)
    try:
        yield
    finally:
        os.umask(before)


def keep_private() -> None:
    """Apply ``private_files`` for the rest of this process's life: a flow run has a separate process."""
    os.umask(os.umask(UMASK) | UMASK)


@dataclass(slots=True)
class RemovedAccess:
    """Counts of files and folders that ``remove_access`` closed to others; those still open, with the reason."""

    inspected: int = 0
    closed: int = 0
    still_open: list[tuple[str, str]] = field(default_factory=list)


def remove_access(home: Path) -> RemovedAccess:
    """Remove group's and others' rights from a home and everything in it. Never follows a symbolic link."""
    done = RemovedAccess()

    def unreadable(error: OSError) -> None:
        done.still_open.append((str(error.filename), error.strerror or "cannot be read"))

    owner, own = home.stat().st_uid, os.geteuid()
    if own not in (0, owner):
        done.still_open.append((str(home), f"it belongs to user {owner}, and this is user {own}"))
    _close(done, str(home), str(home), None)
    for folder, folders, files, descriptor in os.fwalk(home, onerror=unreadable, follow_symlinks=False):
        for name in (*folders, *files):
            _close(done, name, f"{folder}/{name}", descriptor)
    return done


def _close(done: RemovedAccess, name: str, shown: str, folder: int | None) -> None:
    done.inspected += 1
    try:
        # A path descriptor refers to the inspected file, even if its name leads elsewhere meanwhile.
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:  # removed by a concurrent command
        return
    except OSError as error:
        done.still_open.append((shown, error.strerror or str(error)))
        return
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISLNK(mode) or not mode & OTHERS:
            return
        Path(f"/proc/self/fd/{descriptor}").chmod(stat.S_IMODE(mode) & ~OTHERS)
        if os.fstat(descriptor).st_mode & OTHERS:
            done.still_open.append((shown, "the file system keeps no modes"))
        else:
            done.closed += 1
    except OSError as error:
        done.still_open.append((shown, error.strerror or str(error)))
    finally:
        os.close(descriptor)
