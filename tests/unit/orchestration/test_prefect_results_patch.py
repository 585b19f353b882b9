"""The patch that keeps Prefect from reading results: the paths it closes, and its refusal of an unknown Prefect."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import prefect.states
import pytest
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.client.schemas.objects import State
from prefect.serializers import CompressedPickleSerializer, PickleSerializer, Serializer

import sdpipeline.flows  # noqa: F401 - installs it
from sdpipeline.errors import ForeignResultError
from sdpipeline.orchestration import prefect_results_patch


def record(serializer: dict[str, Any]) -> bytes:
    blob = base64.encodebytes(pickle.dumps(1)).decode()
    return json.dumps({"metadata": {"serializer": serializer}, "result": blob}).encode()


@pytest.mark.parametrize(
    "serializer",
    [
        {"type": "pickle"},
        {"type": "compressed/pickle"},
        {"type": "json", "object_decoder": "os.system"},
        {"type": "json", "jsonlib": "yaml"},
    ],
)
def test_no_serializer_is_used(serializer: dict[str, Any]) -> None:
    with pytest.raises(ForeignResultError):
        ResultRecord.deserialize(record(serializer))
    with pytest.raises(ForeignResultError):
        ResultRecord[Any].deserialize(record(serializer), backup_serializer=Serializer(**serializer))
    with pytest.raises(ForeignResultError):
        ResultRecord.deserialize_from_result_and_metadata(b"1", json.dumps({"serializer": serializer}).encode())


def test_no_pickle_is_loaded_by_a_serializer_alone() -> None:
    whole: list[Serializer[Any]] = [PickleSerializer(), CompressedPickleSerializer()]
    for serializer in whole:
        with pytest.raises(ForeignResultError):
            serializer.loads(serializer.dumps(1))


@pytest.mark.parametrize(
    "serializer",
    [
        {"type": "pickle", "picklelib": "antigravity"},
        {"type": "compressed", "serializer": "json", "compressionlib": "antigravity"},
    ],
)
def test_no_module_that_a_state_names_is_imported(serializer: dict[str, str]) -> None:
    data = {"storage_key": "x", "serializer": serializer}
    with pytest.raises(ValueError, match="is not an allowed serializer module for results"):
        State.model_validate({"type": "COMPLETED", "data": data})
    assert "antigravity" not in sys.modules


def test_what_is_returned_here_is_still_a_result() -> None:
    data: ResultRecord[int] = ResultRecord(metadata=ResultRecordMetadata(storage_key="x"), result=3)
    assert State(type="COMPLETED", data=data).result() == 3


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("read", lambda self, key: None, r"ResultStore.read takes \(self, key\)"),
        ("aread", None, "ResultStore.aread does not exist"),
    ],
)
def test_a_prefect_that_it_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[..., Any] | None, said: str
) -> None:
    monkeypatch.setattr(prefect.results.ResultStore, name, changed)
    with pytest.raises(RuntimeError, match=said):
        prefect_results_patch.install()


def test_a_prefect_that_reads_results_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def otherwise(state: object) -> None:
        pass

    monkeypatch.setattr(prefect.states, "_get_state_result_data_with_retries", otherwise)
    with pytest.raises(RuntimeError, match=r"_get_state_result_data_with_retries does not call _from_metadata"):
        prefect_results_patch.install()
