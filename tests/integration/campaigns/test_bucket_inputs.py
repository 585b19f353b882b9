"""Tables and pictures of a campaign in a bucket, from the campaign file to the record."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sdpipeline.app import campaign_files, services, submit, workers
from sdpipeline.db import queries
from sdpipeline.domain import Json
from sdpipeline.errors import CampaignError
from sdpipeline.settings import Settings
from tests.integration.commands import FAKE_ENGINE, document, sdpipeline
from tests.integration.conftest import Bucket, free_port
from tests.integration.fault_proxy import Fault, FaultProxy

SOFT = {"id": "soft", "task": "image-to-image", "prompt": "a picture", "strength": 0.5}


def png(shade: int = 90, side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Place:
    """A home whose campaigns may read ``in/`` of a bucket, with the fake engine."""

    bucket: Bucket
    folder: Path
    given: dict[str, str]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def url(self, key: str) -> str:
        return f"s3://{self.bucket.name}/{key}"

    def put(self, key: str, data: bytes) -> str:
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=data)
        return self.url(key)

    def delete(self, key: str) -> None:
        self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)

    def file(self, *stages: dict[str, Any], **keys: Any) -> Path:
        path = self.folder / "c.yaml"
        defaults = {"width": 64, "height": 64, "num_inference_steps": 4}
        path.write_text(
            yaml.safe_dump({"name": "c", "checkpoint": "shapes", "defaults": defaults, "stages": stages} | keys)
        )
        return path

    def settings(self) -> Settings:
        return services.load_settings(self.home)

    def submit(self, *stages: dict[str, Any], **keys: Any) -> int:
        file = self.file(*stages, **keys)
        with submit.open_to_submit(self.settings(), file) as have:
            return submit.submit(have, file)[1].added

    def work(self) -> list[Json]:
        s = self.settings()
        workers.run_worker(s, campaign="c", until_idle=True, device="cpu")
        with services.open_services(s) as have:
            campaign_id = have.campaign_id("c")
            with have.database.read() as connection:
                return list(queries.jobs(connection, campaign_id, limit=100))

    def mistakes(self, *stages: dict[str, Any], **keys: Any) -> list[str]:
        with pytest.raises(CampaignError) as refused:
            self.submit(*stages, **keys)
        assert not self.home.exists()
        return [str(mistake).split(": ", 1)[1] for mistake in refused.value.mistakes]


def placed(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint_url: str | None = None) -> Place:
    given = {
        FAKE_ENGINE: "0",
        "SDP_S3__ENDPOINT_URL": endpoint_url or bucket.endpoint_url,
        "SDP_S3__ADDRESSING_STYLE": "path",
        "SDP_INPUTS__ALLOWED": json.dumps([f"s3://{bucket.name}/in"]),
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return Place(bucket, folder, given)


@pytest.fixture(params=["moto_bucket", "weak_bucket", "locked_bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A bucket without versions, one of the weak server, and one with versions."""
    return placed(request.getfixturevalue(request.param), tmp_path, monkeypatch)


@pytest.fixture(params=["moto_bucket", "weak_bucket"])
def unversioned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return placed(request.getfixturevalue(request.param), tmp_path, monkeypatch)


@pytest.fixture
def plain(moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return placed(moto_bucket, tmp_path, monkeypatch)


@pytest.fixture
def versioned(locked_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return placed(locked_bucket, tmp_path, monkeypatch)


@pytest.fixture
def watched(moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Place, FaultProxy]]:
    """A bucket behind a proxy that records its requests."""
    with FaultProxy(moto_bucket.endpoint_url, lambda method, path: None) as proxy:
        yield placed(moto_bucket, tmp_path, monkeypatch, proxy.url), proxy


def record(job: Json) -> Json:
    file = Path(job["image"]["url"].removeprefix("file://"))
    (sidecar,) = file.parent.glob(f"{job['image']['sha256']}.*.json")
    found: Json = json.loads(sidecar.read_text())["record"]
    return found


def test_a_picture_in_a_bucket_is_used_where_it_is_and_named_in_the_record(place: Place) -> None:
    url = place.put("in/a.png", png())
    control = {"checkpoint": "shapes-canny", "image": {"url": url}, "annotator": "canny"}
    place.submit(SOFT | {"image": {"url": url}, "controlnets": [control]})
    (job,) = place.work()
    assert (job["status"], job["error"]) == ("succeeded", None)
    for role in ("image", "controlnets.0"):
        about = record(job)["inputs"][role]
        assert (about["url"], about["sha256"]) == (url, hashlib.sha256(png()).hexdigest())
        assert about["version"].startswith(("version:", "etag:"))
    assert not (place.home / "storage" / "inputs").exists()


def test_a_changed_picture_fails_its_job_where_no_versions_are_kept(unversioned: Place) -> None:
    url = unversioned.put("in/a.png", png())
    unversioned.submit(SOFT | {"image": {"url": url}})
    unversioned.put("in/a.png", png(shade=91))
    (job,) = unversioned.work()
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert (
        job["error"] == f"{url} was changed after the campaign was submitted (restore it, or submit the campaign again)"
    )


def test_a_changed_picture_is_read_as_it_was_where_versions_are_kept(versioned: Place) -> None:
    url = versioned.put("in/a.png", png())
    versioned.submit(SOFT | {"image": {"url": url}})
    versioned.put("in/a.png", png(shade=91))
    (job,) = versioned.work()
    assert (job["status"], job["error"]) == ("succeeded", None)


def test_a_picture_that_is_gone_fails_its_job_and_another_one_mends_it(plain: Place) -> None:
    url = plain.put("in/a.png", png())
    plain.submit(SOFT | {"image": {"url": url}})
    plain.delete("in/a.png")
    (job,) = plain.work()
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert url in job["error"]
    assert "restore it, or submit the campaign again" in job["error"]
    plain.put("in/a.png", png(shade=3))
    plain.submit(SOFT | {"image": {"url": url}})
    assert [job["status"] for job in plain.work()] == ["succeeded"]


def test_reproduce_reads_the_bucket_or_a_folder(versioned: Place) -> None:
    url = versioned.put("in/a.png", png())
    versioned.submit(SOFT | {"image": {"url": url}})
    (job,) = versioned.work()
    versioned.delete("in/a.png")
    asked = ["reproduce", job["id"], "--home", versioned.home]
    assert document(*asked, given=versioned.given)["bit_equal"] is True
    version = record(job)["inputs"]["image"]["version"].removeprefix("version:")
    versioned.bucket.client.delete_object(Bucket=versioned.bucket.name, Key="in/a.png", VersionId=version)
    refused = sdpipeline(*asked, **versioned.given)
    assert (refused.returncode, url in refused.stderr) == (1, True)
    inputs = versioned.folder / "inputs"
    inputs.mkdir()
    (inputs / "any-name.png").write_bytes(png())
    assert document(*asked, "--inputs", inputs, given=versioned.given)["bit_equal"] is True


def test_the_same_bytes_under_another_address_are_the_same_job(plain: Place) -> None:
    first, second = plain.put("in/a.png", png()), plain.put("in/b.png", png())
    assert plain.submit(SOFT | {"image": {"url": first}}) == 1
    assert plain.submit(SOFT | {"image": {"url": second}}) == 0


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("csv", b"sku,picture\nA,a.png\nB,b.png\n"),
        ("jsonl", b'{"sku": "A", "picture": "a.png"}\n{"sku": "B", "picture": "b.png"}\n'),
        ("parquet", None),
    ],
)
def test_a_table_in_a_bucket_is_fetched_once_and_names_pictures_there(
    suffix: str, data: bytes | None, watched: tuple[Place, FaultProxy]
) -> None:
    place, proxy = watched
    for name, shade in (("a", 10), ("b", 20)):
        place.put(f"in/{name}.png", png(shade))
    place.put(f"in/t.{suffix}", data or parquet(sku=["A", "B"], picture=["a.png", "b.png"]))
    rows = {"file": place.url(f"in/t.{suffix}"), "key": "sku"}
    s = place.settings()
    with services.open_services(s) as have:
        campaign_files.load_campaign(
            s, place.file(SOFT | {"image": {"file": "x{{ picture }}"}}, variables={"rows": rows})
        )
        assert [method for method, _ in proxy.seen] == ["GET"]
        assert have.store is not None
    place.submit(SOFT | {"image": {"url": place.url("in/{{ picture }}")}}, variables={"rows": rows})
    jobs = place.work()
    assert [(job["row"], job["status"]) for job in jobs] == [("A", "succeeded"), ("B", "succeeded")]
    assert {record(job)["inputs"]["image"]["url"] for job in jobs} == {place.url("in/a.png"), place.url("in/b.png")}


def parquet(**columns: Any) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="needs sdpipeline[parquet]")
    file = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), file)
    return file.getvalue()


def test_every_wrong_picture_in_a_bucket_is_named_in_one_line(plain: Place) -> None:
    plain.put("in/text.png", b"hello")
    plain.put("secret.png", png())
    names = ("in/none.png", "in/text.png", "secret.png")
    stages = [SOFT | {"id": f"s{n}", "image": {"url": plain.url(name)}} for n, name in enumerate(names)]
    (outside,) = plain.mistakes(*stages)
    assert outside.endswith(
        f"stages[2].image.url: {plain.url('secret.png')!r} lies outside the allowed buckets: see SDP_INPUTS__ALLOWED"
    )
    missing, text = plain.mistakes(*stages[:2])
    assert missing == f"stages[0].image.url: {plain.url('in/none.png')} does not exist"
    assert text.startswith(f"stages[1].image.url: {plain.url('in/text.png')!r}: not a whole png")


def test_a_picture_that_only_a_row_names_is_looked_for_in_the_bucket(plain: Place) -> None:
    plain.put("in/t.csv", b"picture\nnone.png\n../secret.png\n")
    rows = {"file": plain.url("in/t.csv")}
    found = plain.mistakes(SOFT | {"image": {"url": plain.url("in/{{ picture }}")}}, variables={"rows": rows})
    assert found == [
        f"stages[0].image.url: {plain.url('in/none.png')} does not exist, in {plain.url('in/t.csv')}:2",
        f"stages[0].image.url: {plain.url('in/../secret.png')!r} is not s3://bucket/key, in {plain.url('in/t.csv')}:3",
    ]


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("in/none.csv", "does not exist"),
        ("secret.csv", "lies outside the allowed buckets: see SDP_INPUTS__ALLOWED"),
        ("in/t.xlsx", "is not a table (give a .csv, .tsv, .jsonl or .parquet file)"),
    ],
)
def test_a_table_that_cannot_be_had_from_a_bucket_is_one_mistake(plain: Place, file: str, why: str) -> None:
    plain.put("in/t.xlsx", b"x")
    with pytest.raises(CampaignError) as refused:
        plain.submit(SOFT | {"image": {"file": "{{ x }}"}}, variables={"rows": {"file": plain.url(file)}})
    (mistake,) = refused.value.mistakes
    assert str(mistake).endswith(why)


def test_no_bucket_is_asked_before_everything_else_is_right(watched: tuple[Place, FaultProxy]) -> None:
    place, proxy = watched
    place.put("in/t.csv", b"colour\nred\n")
    stage = SOFT | {"prompt": "{{ colour }}", "image": {"url": place.url("in/none.png")}, "strength": 7}
    found = place.mistakes(stage, variables={"rows": {"file": place.url("in/t.csv")}})
    assert found == ["stages[0].strength: 7 is not from 0 to 1"]
    assert proxy.seen == []


def test_an_endpoint_that_does_not_answer_is_told_at_once(
    moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = placed(moto_bucket, tmp_path, monkeypatch, f"http://127.0.0.1:{free_port()}")
    stages = [SOFT | {"id": f"s{n}", "image": {"url": place.url(f"in/{n}.png")}} for n in range(5)]
    started = time.monotonic()
    found = place.mistakes(*stages)
    assert time.monotonic() - started < 15
    assert len(found) == 5
    assert "SDP_S3__ENDPOINT_URL" in found[0]


def test_a_server_that_only_fails_is_not_asked_for_every_picture(
    moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(moto_bucket.endpoint_url, lambda method, path: Fault.INTERNAL_ERROR) as proxy:
        place = placed(moto_bucket, tmp_path, monkeypatch, proxy.url)
        stages = [SOFT | {"id": f"s{n}", "image": {"url": place.url(f"in/{n}.png")}} for n in range(5)]
        assert len(place.mistakes(*stages)) == 5
    assert len(proxy.seen) == 2


def test_files_of_a_folder_are_rows(plain: Place) -> None:
    (plain.folder / "pictures").mkdir()
    for name, shade in (("b", 20), ("a", 10)):
        (plain.folder / "pictures" / f"{name}.png").write_bytes(png(shade))
    stage = SOFT | {"prompt": "{{ name }} at night", "image": {"file": "{{ path }}"}}
    assert plain.submit(stage, variables={"rows": {"files": "pictures/*.png"}}) == 2
    jobs = plain.work()
    assert [(job["row"], job["status"]) for job in jobs] == [
        ("pictures/a.png", "succeeded"),
        ("pictures/b.png", "succeeded"),
    ]
