"""Options and subject of a benchmark: checkpoint, workload, engine and the plain loop for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from sdpipeline.app.checkpoints import BUILTIN_CHECKPOINTS, catalog
from sdpipeline.app.factories import build_engine, random_checkpoint
from sdpipeline.bench.shapes import NAMES, shape
from sdpipeline.bench.statistics import OnProgress
from sdpipeline.bench.workload import Workload
from sdpipeline.cli.output import refuse, stderr
from sdpipeline.domain import CheckpointRef, Json, Profile, Task
from sdpipeline.engine import Engine
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.devices import devices, gpu_count, is_present
from sdpipeline.engine.families import family, scheduler_refusal, size_refusal
from sdpipeline.settings import Settings
from sdpipeline.suggestions import nearest

if TYPE_CHECKING:
    from sdpipeline.bench.baselines import PlainLoop

Checkpoint = Annotated[
    str, typer.Option(help="An alias, or sd15 or sdxl: random weights in the shapes of these models.")
]
Width = Annotated[int | None, typer.Option(min=64, help="Pixels; default: fits the checkpoint and the device.")]
Height = Annotated[int | None, typer.Option(min=64, help="Pixels; default: fits the checkpoint and the device.")]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", min=1, help="Default: as for the size.")]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", min=1.0, help="1 turns guidance off.")]
Scheduler = Annotated[str, typer.Option(help="As in a campaign file.")]
ProfileName = Annotated[Profile, typer.Option(help="exact, fast or turbo, as in a campaign file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the first GPU, else cpu.")]

SHIPPED = {"width": 128, "height": 128, "num_inference_steps": 20, "guidance_scale": 4.0}
ON_A_CPU = {"width": 128, "height": 128, "num_inference_steps": 2}
"""Defaults on a CPU, which would need minutes per picture with a large checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Benchmark options as given."""

    checkpoint: str
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    scheduler: str
    profile: Profile
    device: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Workload, checkpoint and device of a benchmark."""

    settings: Settings
    files: CheckpointFiles
    workload: Workload
    device: str
    dtype: str

    def engine(self) -> Engine:
        """Build the engine as workers do."""
        return build_engine(self.settings, self.device, None, dtype=self.dtype)

    def plain(self) -> PlainLoop:
        """Build a plain diffusers loop, as in a script. Call ``engine`` first: it sets up torch's import."""
        from sdpipeline.bench.baselines import PlainLoop

        return PlainLoop(self.files.directory, self.workload, device=self.device, dtype=self.dtype)

    def document(self) -> Json:
        """Return the conditions of the measurement as JSON."""
        w = self.workload
        return {
            "checkpoint": self.files.alias,
            "device": self.device,
            "dtype": self.dtype,
            "width": w.width,
            "height": w.height,
            "num_inference_steps": w.num_inference_steps,
            "guidance_scale": w.guidance_scale,
            "scheduler": w.scheduler,
            "profile": w.profile,
        }


def subject(settings: Settings, wanted: Wanted) -> Subject:
    """Resolve the options; build a missing benchmark checkpoint with random weights.

    Raises BadInputError if this machine or the checkpoint does not support them.
    """
    device = _device(settings, wanted)
    settings, files = _checkpoint(settings, wanted.checkpoint, device)
    row = family(files.family)
    if row.cell(Task.TEXT_TO_IMAGE) is None:
        raise refuse(f"--checkpoint {files.alias} is not a text-to-image checkpoint", "name a text-to-image checkpoint")
    if refused := scheduler_refusal(row, wanted.scheduler):
        raise refuse(f"--scheduler: {refused.message}", refused.fix)
    usual = _usual(files, device)
    given = {name: getattr(wanted, name) for name in SHIPPED}
    chosen = usual | {name: value for name, value in given.items() if value is not None}
    for name in ("width", "height"):
        if refused := size_refusal(row, name, chosen[name]):
            raise refuse(f"--{name}: {refused.message}", refused.fix)
    ref = CheckpointRef(alias=files.alias, digest=files.digest)
    workload = Workload(checkpoint=ref, scheduler=wanted.scheduler, profile=wanted.profile, **chosen)
    dtype = settings.engine.dtype or (row.cuda_dtype if device.startswith("cuda") else "float32")
    return Subject(settings=settings, files=files, workload=workload, device=device, dtype=dtype)


def _device(settings: Settings, wanted: Wanted) -> str:
    device = wanted.device or devices(settings)[0]
    if not is_present(device):
        raise refuse(f"--device {device} is not on this machine", f"it has cpu and {gpu_count()} GPUs")
    return device


def _checkpoint(settings: Settings, alias: str, device: str) -> tuple[Settings, CheckpointFiles]:
    if alias in NAMES:
        folder = settings.home / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        settings = settings.model_copy(update={"checkpoints_dir": folder})
        if not (folder / alias).is_dir():
            stderr.print(f"building {alias} with random weights in {folder / alias}")
        random_checkpoint(alias, folder, device)
    known = catalog(settings)
    if alias not in known:
        raise refuse(f"--checkpoint {alias}: there is no such checkpoint", nearest(alias, [*known, *NAMES]))
    return settings, known[alias]


def _usual(files: CheckpointFiles, device: str) -> Json:
    if files.directory.parent == BUILTIN_CHECKPOINTS:
        return SHIPPED
    row = family(files.family)
    size = 1024 if row.text in ("sdxl", "sd3", "flux") else 512
    own = {"width": size, "height": size, "num_inference_steps": 20, "guidance_scale": row.guidance_scale}
    own = shape(files.alias)["defaults"] if files.alias in NAMES else own
    return own if device.startswith("cuda") else own | ON_A_CPU


@contextmanager
def progress(title: str, *, shown: bool) -> Iterator[OnProgress]:
    """Show a progress bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not shown) as bar:
        line = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)
