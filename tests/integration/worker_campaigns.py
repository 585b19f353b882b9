"""Campaign files for tiny checkpoints, submitted and run to their end by a real worker in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sdpipeline.app import campaign_files, services, workers
from sdpipeline.campaigns import submission
from sdpipeline.db import queries, registry
from sdpipeline.db.registry import Approval
from sdpipeline.domain import Json
from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.settings import Settings
from tests.integration.engine_requests import middle_mask, noise
from tests.integration.tiny_checkpoints import tiny_checkpoints

PICTURE, MASK = "picture.png", "mask.png"


@dataclass(frozen=True, slots=True)
class Workplace:
    """A home with a worker whose checkpoints stay loaded, and a folder for campaign files and their pictures."""

    settings: Settings
    folder: Path
    worker: workers.OpenWorker
    _known: set[str] = field(default_factory=set)

    @property
    def engine(self) -> DiffusersEngine:
        engine = self.worker.worker.engine
        assert isinstance(engine, DiffusersEngine)
        return engine

    def approve(self, *names: str) -> None:
        """Register tiny checkpoints."""
        for name in names:
            if name not in self._known:
                self.add(tiny_checkpoints().files(name))

    def add(self, files: CheckpointFiles) -> None:
        with services.open_services(self.settings) as have, have.audit.transaction() as tx:
            registry.add(tx, files, Approval(approved_by="a test"))
        self._known.add(files.alias)

    def draw(self, name: str, pixels: Pixels) -> None:
        """Draw a picture in the folder of the campaign files."""
        Image.fromarray(pixels).save(self.folder / name)

    def submit(self, campaign: Mapping[str, Any]) -> int:
        """Submit a campaign; returns how many jobs are new."""
        file = self._written(campaign)
        with services.open_services(self.settings) as have:
            checked, inputs = campaign_files.load_campaign(self.settings, file, have.database)
            team, attempts = self.settings.team, self.settings.max_attempts
            return submission.submit(checked, inputs, have.audit, have.store, team=team, max_attempts=attempts).added

    def plan(self, campaign: Mapping[str, Any], *, max_batch: int) -> submission.Plan:
        with services.open_services(self.settings) as have:
            checked, inputs = campaign_files.load_campaign(self.settings, self._written(campaign), have.database)
        planning = submission.Planning(team=self.settings.team, max_batch=max_batch)
        return submission.plan(checked, inputs, None, planning)

    def _written(self, campaign: Mapping[str, Any]) -> Path:
        file = self.folder / f"{campaign['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(campaign)))
        return file

    def work(self, campaign: str) -> list[Json]:
        """Work it until no job is left; return its jobs."""
        self.worker.run(campaign=campaign)
        return self.jobs(campaign)

    def made(self, campaign: Mapping[str, Any]) -> list[Json]:
        """Submit a campaign and work it to its end; every job must have succeeded."""
        self.submit(campaign)
        jobs = self.work(campaign["name"])
        assert [(job["stage"], job["error"]) for job in jobs if job["status"] != "succeeded"] == []
        return jobs

    def jobs(self, campaign: str) -> list[Json]:
        with services.open_services(self.settings) as have:
            campaign_id = have.campaign_id(campaign)
            with have.database.read() as connection:
                return list(queries.jobs(connection, campaign_id, limit=10_000))

    def sidecar(self, job: Json) -> Json:
        """The sidecar of a job's picture."""
        (file,) = picture_file(job).parent.glob(f"{job['image']['sha256']}.*.json")
        found: Json = json.loads(file.read_text())
        return found

    def ran(self, job: Json) -> Json:
        """The ``ran`` part of the job's record."""
        found: Json = self.sidecar(job)["record"]["ran"]
        return found


@contextmanager
def workplace(folder: Path) -> Iterator[Workplace]:
    """A new home in that folder, with one worker on the CPU until the block ends."""
    settings = services.load_settings(folder / "home")
    with services.open_services(settings):
        pass
    with workers.open_worker(settings, device="cpu") as worker:
        place = Workplace(settings, folder, worker)
        place.draw(PICTURE, noise())
        place.draw(MASK, middle_mask())
        yield place


def campaign(name: str, checkpoint: str, *stages: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """A campaign file of few, small steps."""
    defaults = {"width": 64, "height": 64, "num_inference_steps": 2}
    return {"name": name, "checkpoint": checkpoint, "defaults": defaults, "stages": [dict(s) for s in stages], **keys}


def picture_file(job: Json) -> Path:
    return Path(job["image"]["url"].removeprefix("file://"))


def picture_size(job: Json) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture_file(job).read_bytes())).size
