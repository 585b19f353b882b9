"""The `bench` commands at a small size: their output, clean-up and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from PIL import Image

from sdpipeline import cli
from sdpipeline.bench.random_weights import build
from sdpipeline.bench.shapes import NAMES, shape
from sdpipeline.db import leasing
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.db.migrate import upgrade
from sdpipeline.db.scratch import PREFIX, scratch_database
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Batch, GeneratedImage, PreparedRequest
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.errors import ObjectConflictError
from sdpipeline.storage import S3Options
from sdpipeline.storage.scratch import Scratch, scratch_storage
from tests.factories import chains, published, request, statuses
from tests.integration.commands import document
from tests.integration.conftest import Bucket

pytestmark = pytest.mark.timeout(300)

SMALL = ("--width", "64", "--height", "64", "--num-inference-steps", "2", "--rounds", "1")


def schemas(url: str) -> list[str]:
    database = open_database(url)
    with database.read() as connection:
        found = connection.execute(sqlalchemy.text("SELECT nspname FROM pg_namespace")).scalars().all()
    database.close()
    return [name for name in found if name.startswith(PREFIX)]


def test_the_engine_is_measured_beside_a_plain_loop_and_the_ceiling(tmp_path: Path) -> None:
    plot = tmp_path / "engine.png"
    asked = ("--profile", "fast", "--batch", 2, "--batch", 1, *SMALL, "--plot", plot)
    found = document("bench", "engine", *asked, "--home", tmp_path)
    assert [(row["what"], row["batch"]) for row in found["rows"]] == [("plain loop", 1), ("engine", 1), ("engine", 2)]
    assert found["rows"][0]["against_plain"] == 1.0
    # Two guided steps of this network on an 8 x 8 latent, text encoding and decoding.
    assert 1e-4 < found["tflop_per_picture"] < 1e-2
    for row in found["rows"]:
        assert row["tflop_per_s"] == pytest.approx(row["pictures_per_s"] * found["tflop_per_picture"], rel=0.01)
        assert row["share_of_ceiling"] == pytest.approx(row["tflop_per_s"] / found["ceiling_tflop_per_s"], rel=0.1)
    assert found["device_idle_share"] is None
    assert 0 < found["differs_from_exact"]["grey_levels"] < 10
    assert 20 < found["differs_from_exact"]["decibels"] < 60
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_the_whole_line_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    found = document("bench", "pipeline", "--profile", "fast", "--batch", 2, "--batches", 2, *SMALL, "--home", tmp_path)
    assert [row["what"] for row in found["rows"]] == ["engine alone", "whole line", "plain loop, saved"]
    assert (found["pictures"], found["profile"]) == (4, "fast")
    # The shares of lost time add up to the total loss.
    lost = sum(row["share"] for row in found["lost"])
    assert 1 - lost == pytest.approx(found["share_of_engine"], abs=0.002)
    assert {"encode_s", "sign_s", "store_s"} <= found["beside_the_device_s"].keys()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "keys" not in path.parts] == []


def test_a_database_in_use_is_measured_beside_its_tables(postgres_url: str) -> None:
    live = open_database(postgres_url)
    upgrade(live)
    published(AuditLog(live, actor="user:test"), chains(3))
    found = document("bench", "queue", "--jobs", 40, "--workers", 2, SDP_DATABASE_URL=postgres_url)
    counts = {row["what"]: row["count"] for row in found["transitions"]}
    assert counts["complete"] == 40
    assert counts["close"] == 5
    assert statuses(live) == ["ready"] * 3
    assert schemas(postgres_url) == []
    live.close()


def test_the_scratch_database_shares_nothing_and_is_dropped(postgres_url: str) -> None:
    live = open_database(postgres_url)
    upgrade(live)
    audit = AuditLog(live, actor="user:test")
    published(audit, chains(2))
    with scratch_database(postgres_url) as scratch:
        there = AuditLog(scratch, actor="bench")
        campaign_id = published(there, chains(5)).campaign_id
        # Ids of scratch campaigns, and so their advisory locks, are distinct from those of live ones.
        assert campaign_id > 1_000_000_000
        with there.transaction() as tx:
            assert len(leasing.take_lease(tx, worker_id="bench", limit=8, ttl_s=60.0).jobs) == 5  # type: ignore[union-attr]
        assert statuses(live) == ["ready"] * 2
        with scratch_database(postgres_url):  # drops abandoned schemas; this one is in use
            assert statuses(scratch) == ["leased"] * 5
    assert schemas(postgres_url) == []
    live.close()


def test_what_a_killed_bench_left_is_dropped_by_the_next(postgres_url: str) -> None:
    live = open_database(postgres_url)
    with live.write() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {PREFIX}abandoned")
    live.close()
    with scratch_database(postgres_url):
        assert f"{PREFIX}abandoned" not in schemas(postgres_url)


def test_a_role_that_may_not_create_schemas_is_told_what_it_needs(
    postgres_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = open_database(postgres_url)
    with live.write() as connection:
        connection.exec_driver_sql("CREATE ROLE sdp_poor LOGIN")
    url = sqlalchemy.make_url(postgres_url).set(username="sdp_poor", password=None)
    monkeypatch.setenv("SDP_DATABASE_URL", url.render_as_string(hide_password=False))
    try:
        assert cli.run(["bench", "queue", "--jobs", "1"]) == 2
        assert "GRANT CREATE ON DATABASE" in capsys.readouterr().err
    finally:
        with live.write() as connection:
            connection.exec_driver_sql("DROP ROLE sdp_poor")
        live.close()


def test_the_embedded_database_is_measured_in_a_file_that_goes(tmp_path: Path) -> None:
    plot = tmp_path / "queue.svg"
    found = document("bench", "queue", "--jobs", 20, "--plot", plot, "--home", tmp_path / "home")
    assert found["jobs_per_s"] > 0
    assert plot.read_text().lstrip().startswith("<?xml")
    assert list((tmp_path / "home").iterdir()) == []


def test_storage_is_measured_under_a_prefix_that_is_emptied(moto_bucket: Bucket) -> None:
    store = moto_bucket.store()
    store.put("kept", b"mine", content_type="text/plain")
    given = {
        "SDP_STORAGE_URL": f"s3://{moto_bucket.name}",
        "SDP_S3__ENDPOINT_URL": moto_bucket.endpoint_url,
        "SDP_S3__ADDRESSING_STYLE": "path",
    }
    found = document("bench", "storage", "--objects", 6, "--size-bytes", 5000, given=given)
    assert [(row["what"], row["count"]) for row in found["verbs"]] == [
        (v, 6) for v in ("put", "get", "verify", "delete")
    ]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found["verbs"])
    assert list(store.list()) == ["kept"]


def put_twice(scratch: Scratch) -> None:
    scratch.save("c.png", b"plain")
    assert len(list(scratch.store.list())) == 1
    for data in (b"checked", b"other"):
        scratch.store.put("a/b.png", data, content_type="image/png")


def test_the_scratch_prefix_is_emptied_also_where_the_measurement_fails(moto_bucket: Bucket) -> None:
    options = S3Options(endpoint_url=moto_bucket.endpoint_url, addressing_style="path")
    with pytest.raises(ObjectConflictError), scratch_storage(f"s3://{moto_bucket.name}/own", options) as scratch:
        put_twice(scratch)
    assert list(moto_bucket.store().list()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine", "--batch", "3"], "--batch 3 is not a batch size"),
        (["engine", "--checkpoint", "shape"], "did you mean 'shapes'?"),
        (["engine", "--checkpoint", "shapes-upscale"], "is not a text-to-image checkpoint"),
        (["engine", "--device", "cuda:99"], "--device cuda:99 is not on this machine"),
        (["engine", "--width", "65"], "--width: 65 is not a multiple of 8 (write 64)"),
        (["engine", "--scheduler", "dpmpp"], "--scheduler"),
        (["storage", "--plot", "figures.gif"], "ends in neither .png nor .svg"),
        (["queue", "--plot", "nowhere/figures.png"], "nowhere is not a folder"),
        (["queue", "--jobs", "0"], "--jobs"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words, "--home", str(tmp_path), "--json"]) == 2
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert told in f"{error['key']}: {error['message']} ({error['fix']})"
    assert list(tmp_path.iterdir()) == []


def shrunk(name: str) -> Any:
    """The same shape with a sixteenth of the width and few layers."""
    about = shape(name)
    for part, groups in (("unet", 4), ("vae", 4)):
        narrow = [max(32, width // 16) for width in about[part]["block_out_channels"]]
        about[part] |= {"block_out_channels": narrow, "norm_num_groups": groups}
    about["unet"]["attention_head_dim"] = 4
    for config in about["text_encoders"].values():
        config |= {"num_hidden_layers": 3, "intermediate_size": 64}
    return about


@pytest.mark.parametrize(("name", "family"), [("sd15", "sd1"), ("sdxl", "sdxl")])
def test_random_weights_of_that_shape_make_pictures(name: str, family: str, tmp_path: Path) -> None:
    import torch

    build(shrunk(name), device="cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    files = inspect(name, tmp_path / name)
    assert files.family == family
    engine = DiffusersEngine(device="cpu", dtype="float32", locate=lambda _: files)
    asked = request("a red circle", checkpoint=CheckpointRef(alias=name, digest=files.digest), num_inference_steps=1)
    (made,) = engine.generate(Batch(requests=[PreparedRequest(request=asked)], bucket=1))
    assert isinstance(made, GeneratedImage)


PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_the_real_shapes_have_as_many_weights_as_the_published_ones(name: str) -> None:
    import torch

    pipe = build(shape(name), device="meta", dtype=torch.bfloat16)
    counts = {part: sum(each.numel() for each in getattr(pipe, part).parameters()) for part in PUBLISHED[name]}
    assert counts == PUBLISHED[name]
