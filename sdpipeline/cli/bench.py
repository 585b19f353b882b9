"""Benchmark commands: bench engine, pipeline, queue, storage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sdpipeline.app.factories import delivery_process, make_worker
from sdpipeline.app.keys import picture_key
from sdpipeline.app.stores import open_storage, s3_options
from sdpipeline.app.workers import registered
from sdpipeline.batching import BUCKETS
from sdpipeline.bench import plot
from sdpipeline.bench import queue as queue_bench
from sdpipeline.bench import storage as storage_bench
from sdpipeline.cli.bench_subject import (
    Checkpoint,
    Device,
    Guidance,
    Height,
    ProfileName,
    Scheduler,
    Steps,
    Wanted,
    Width,
    progress,
    subject,
)
from sdpipeline.cli.output import AsJson, Home, load_settings, print_json, print_records, refuse, stdout
from sdpipeline.db.scratch import scratch_database
from sdpipeline.domain import Json
from sdpipeline.storage.scratch import scratch_storage

_GROUP = typer.Typer(help="Measure this machine.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="Number of measurements of each, in turn; the median counts.")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png|svg", help="Also plot the results to this file.")
]


def add_to(app: typer.Typer) -> None:
    """Register these commands on the application."""
    for name, command in (("engine", engine), ("pipeline", pipeline), ("queue", queue), ("storage", storage)):
        _GROUP.command(name)(command)
    app.add_typer(_GROUP, name="bench")


def engine(
    *,
    checkpoint: Checkpoint = "shapes",
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated; default: 1, 2, 4, 8.")] = None,
    width: Width = None,
    height: Height = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = "dpmpp-2m",
    profile: ProfileName = "exact",
    rounds: Rounds = 3,
    device: Device = None,
    plot_file: PlotFile = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Measure pictures per second by batch size, against a plain diffusers loop and the device's peak matmul rate."""
    sizes = _batches(batch)
    _check_plot(plot_file)
    wanted = Wanted(
        checkpoint=checkpoint,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        profile=profile,
        device=device,
    )
    on = subject(load_settings(home), wanted)
    started = time.perf_counter()
    under_test = on.engine()
    built_s = time.perf_counter() - started
    from sdpipeline.bench import engine as engine_bench

    with progress("bench engine", shown=not as_json) as on_progress:
        found = engine_bench.measure(
            under_test,
            on.plain,
            on.workload,
            engine_bench.Plan(batches=sizes, rounds=rounds, device=on.device, dtype=on.dtype),
            on_progress,
        )
    document = on.document() | found | {"build_s": round(built_s, 3)}
    if plot_file is not None:
        rows = [row for row in found["rows"] if row["what"] == "engine"]
        title = f"{checkpoint} {on.workload.width}x{on.workload.height} on {on.device}"
        plot.lines(plot_file, rows, x="batch", y=("pictures_per_s", "share_of_ceiling"), title=title)
    if as_json:
        print_json(document)
        return
    _print_engine(document)


def pipeline(
    *,
    checkpoint: Checkpoint = "shapes",
    batch: Annotated[int, typer.Option(help="Pictures per forward pass.")] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches per round.")] = 4,
    width: Width = None,
    height: Height = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = "dpmpp-2m",
    profile: ProfileName = "exact",
    rounds: Rounds = 3,
    device: Device = None,
    plot_file: PlotFile = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Measure the whole pipeline, storage included, against the engine alone and a plain loop that saves there.

    The pipeline delivers marked pictures to the configured storage.
    """
    _batches([batch])
    _check_plot(plot_file)
    wanted = Wanted(
        checkpoint=checkpoint,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        profile=profile,
        device=device,
    )
    settings = load_settings(home)
    key = picture_key(settings)
    open_storage(settings).check()
    on = subject(
        settings.model_copy(update={"engine": settings.engine.model_copy(update={"max_batch": batch})}), wanted
    )
    under_test = on.engine()
    from sdpipeline.bench import pipeline as pipeline_bench

    plan = pipeline_bench.Plan(batch=batch, batches=batches, plain=max(2, batch // 2), rounds=rounds, device=on.device)
    with (
        scratch_database(settings.database) as database,
        scratch_storage(settings.storage, s3_options(settings)) as scratch,
        delivery_process(on.settings, key, database, scratch.url) as (worker_id, deliverer),
        registered(
            on.settings,
            make_worker(
                on.settings, database, scratch.store, under_test, key, worker_id=worker_id, deliverer=deliverer
            ),
            on.device,
        ) as worker,
        progress("bench pipeline", shown=not as_json) as on_progress,
    ):
        found = pipeline_bench.measure(worker, scratch, on.workload, plan, open_plain=on.plain, on_progress=on_progress)
    if plot_file is not None:
        plot.bars(plot_file, found["rows"], x="what", y=("pictures_per_s",), title=f"{checkpoint} on {on.device}")
    if as_json:
        print_json(on.document() | found)
        return
    _print_pipeline(on.document() | found)


def queue(
    *,
    jobs: Annotated[int, typer.Option(min=1, help="Number of jobs.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Jobs per lease.")] = 8,
    workers: Annotated[int, typer.Option(min=1, max=8, help="Number of concurrent workers.")] = 4,
    plot_file: PlotFile = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Measure leases and completions per second on the configured database, in a temporary schema."""
    _check_plot(plot_file)
    settings = load_settings(home)
    load = queue_bench.Load(jobs=jobs, batch=batch, workers=workers)
    with scratch_database(settings.database) as database, progress("bench queue", shown=not as_json) as on_progress:
        found = queue_bench.measure(database, load, on_progress)
    if plot_file is not None:
        plot.bars(plot_file, found["transitions"], x="what", y=("per_s", "p50_ms", "p99_ms"), title="queue")
    if as_json:
        print_json(found)
        return
    print_records(f"Queue: {workers} workers", ("what", "count", "per_s", "p50_ms", "p99_ms"), found["transitions"])
    stdout.print(f"{found['submitted_per_s']:g} jobs submitted and {found['jobs_per_s']:g} completed a second")


def storage(
    *,
    objects: Annotated[int, typer.Option(min=1, help="Number of objects.")] = 50,
    size_bytes: Annotated[
        int, typer.Option(min=1, help="Size of each object; a 1024x1024 png has about 1.3 million.")
    ] = 1_300_000,
    threads: Annotated[int, typer.Option(min=1, max=16, help="Number of threads.")] = 4,
    plot_file: PlotFile = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Measure writes, reads and checks per second on the configured storage, under a temporary prefix."""
    _check_plot(plot_file)
    settings = load_settings(home)
    open_storage(settings).check()
    load = storage_bench.Load(objects=objects, size_bytes=size_bytes, threads=threads)
    with (
        scratch_storage(settings.storage, s3_options(settings)) as scratch,
        progress("bench storage", shown=not as_json) as on_progress,
    ):
        found = storage_bench.measure(scratch.store, load, on_progress)
    if plot_file is not None:
        plot.bars(plot_file, found["verbs"], x="what", y=("per_s", "p50_ms", "p99_ms"), title="storage")
    if as_json:
        print_json(found)
        return
    columns = ("what", "count", "per_s", "mb_per_s", "p50_ms", "p99_ms")
    print_records(f"Storage: {size_bytes} bytes, {threads} threads", columns, found["verbs"])


def _batches(asked: list[int] | None) -> list[int]:
    sizes = sorted(set(asked or (1, 2, 4, 8)))
    if wrong := [size for size in sizes if size not in BUCKETS]:
        raise refuse(f"--batch {wrong[0]} is not a batch size", f"one of {', '.join(map(str, BUCKETS))}")
    return sizes


def _check_plot(path: Path | None) -> None:
    if path is not None:
        plot.check(path)


def _print_pipeline(found: Json) -> None:
    print_records(_title(found), ("what", "batch", "pictures_per_s", "cpu_s"), found["rows"])
    print_records("Lost", ("what", "share"), [row | {"share": f"{row['share']:.2%}"} for row in found["lost"]])
    outside = ", ".join(
        f"{name.removesuffix('_s')} {s * 1e3:.0f} ms" for name, s in found["beside_the_device_s"].items()
    )
    stdout.print(
        f"the pipeline reaches {found['share_of_engine']:.3f} of the engine alone and {found['against_plain']:.2f} "
        f"times the plain loop; time per picture outside the device: {outside}"
    )
    if found["device_idle_share"] is not None:
        stdout.print(f"the GPU is idle for {found['device_idle_share']:.2%} of the time")


def _title(found: Json) -> str:
    what = f"{found['checkpoint']} {found['width']}x{found['height']}, {found['num_inference_steps']} steps"
    return f"{what}, {found['profile']}, on {found['device']} in {found['dtype']}"


def _print_engine(found: Json) -> None:
    columns = ("what", "batch", "pictures_per_s", "against_plain", "tflop_per_s", "share_of_ceiling")
    rows = [row | {name: f"{row[name]:.4g}" for name in columns[2:]} for row in found["rows"]]
    print_records(_title(found), columns, rows)
    stdout.print(
        f"{found['tflop_per_picture']:.4g} TFLOP a picture; matrix products reach {found['ceiling_tflop_per_s']:.4g} "
        f"TFLOP/s; first picture after {found['build_s'] + found['first_batch_s'][0]['seconds']:.1f} s"
    )
    if apart := found["differs_from_exact"]:
        psnr = "" if apart["decibels"] is None else f", {apart['decibels']:.1f} dB"
        stdout.print(f"its pictures differ from exact ones by {apart['grey_levels']:.2f} grey levels{psnr}")
    if found["device_idle_share"] is not None:
        stdout.print(
            f"the GPU is idle for {found['device_idle_share']:.2%} of a batch; {found['peak_memory_gib']} GiB at most"
        )
