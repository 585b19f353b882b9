"""The previous release, unpacked: its workers as processes, and campaigns submitted by its own code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.commands import FAKE_ENGINE, environment

ARCHIVE = Path(__file__).parents[1] / "data" / "previous_release.tar.gz"

SUBMIT = """
import sys
from sdpipeline.batching import batch_key
from sdpipeline.db import control, migrate, staging
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.db.submit import submit
from sdpipeline.domain import CheckpointRef, GenerationRequest, ImageSource, JobSpec, Task, fingerprint

def job(row, stage, parent=None):
    about = {"task": Task.TEXT_TO_IMAGE} if parent is None else {
        "task": Task.IMAGE_TO_IMAGE, "strength": 0.5,
        "image": ImageSource(stage=parent.stage, digest=parent.fingerprint)}
    asked = GenerationRequest(
        checkpoint=CheckpointRef(alias="shapes", digest="c0" * 32), prompt=f"a picture of {row}", seed=0, width=64,
        height=64, num_inference_steps=4, guidance_scale=4.0, scheduler="dpmpp-2m", **about)
    return JobSpec(
        stage=stage, depth=0 if parent is None else 1, row_key=row, variables=(("sku", row),), axes=(), seed=0,
        request=asked, fingerprint=fingerprint(asked), batch_key=batch_key(asked),
        parents=() if parent is None else ((parent.stage, parent.identity),))

def jobs(count, *stages):
    for n in range(count):
        above = None
        for stage in stages:
            above = job(f"row-{n}", stage, above)
            yield above

database = open_database(sys.argv[1])
if migrate.current(database) is None:
    migrate.upgrade(database)
audit = AuditLog(database, actor="user:previous")
for name, count, *stages in (("spring", int(sys.argv[2]), "draft", "scene"), ("bulk", int(sys.argv[3]), "draft")):
    with staging.prepared(jobs(count, *stages)) as ready, audit.transaction() as tx:
        done = submit(tx, ready, team="default", name=name, source=name, priority=100, max_attempts=3)
        if name == "bulk":
            control.set_campaign_status(tx, campaign_id=done.campaign_id, status="paused")
"""


@dataclass(slots=True)
class PreviousRelease:
    """The previous release on one database; ``home`` holds the pictures and the stderr of its processes."""

    code: Path
    home: Path
    database_url: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, str]:
        """The settings of every process here, including those of this release."""
        return {
            "SDP_HOME": str(self.home),
            "SDP_DATABASE_URL": self.database_url,
            "SDP_STORAGE_URL": (self.home / "storage").as_uri(),
            FAKE_ENGINE: "0.05",
        }

    def submit(self, *, chains: int, bulk: int) -> None:
        """Submit the campaign ``spring`` of chains of two and the paused campaign ``bulk``; creates the tables."""
        self._run(["-c", SUBMIT, self.database_url, str(chains), str(bulk)]).check_returncode()

    def start_worker(self) -> None:
        """Start another worker, which runs until it is stopped."""
        log = (self.home / f"previous-{len(self.workers)}.log").open("wb")
        command = [sys.executable, "-m", "sdpipeline", "worker", "--json"]
        with log:
            started = subprocess.Popen(
                command, cwd=self.code, env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        self.workers.append(started)

    def stop_workers(self) -> list[int]:
        """Stop all workers and wait for them; return their exit codes."""
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        return [worker.wait(60) for worker in self.workers]

    def log(self) -> str:
        """The workers' logs."""
        return "".join(path.read_text() for path in sorted(self.home.glob("previous-*.log")))

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.code, env=self._environment(), text=True, timeout=600, check=False)

    def _environment(self) -> dict[str, str]:
        # Its own package must be found before the installed one.
        return environment(**self.settings) | {"PYTHONPATH": str(self.code)}


@contextmanager
def previous_release(folder: Path, database_url: str) -> Iterator[PreviousRelease]:
    """The previous release unpacked in ``folder``; none of its processes outlives the block."""
    code, home = folder / "previous", folder / "home"
    home.mkdir()
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(code, filter="fully_trusted")
    previous = PreviousRelease(code, home, database_url)
    try:
        yield previous
    finally:
        for worker in previous.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
