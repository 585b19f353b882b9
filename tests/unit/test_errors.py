"""Errors pass from the delivery process to the process that requested a delivery."""

from __future__ import annotations

import pickle

import pytest

from sdpipeline import errors
from sdpipeline.errors import SdpError

EVERY = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SdpError)]


@pytest.mark.parametrize("kind", EVERY)
def test_an_error_is_the_same_on_the_other_side(kind: type[SdpError]) -> None:
    error = pickle.loads(pickle.dumps(kind("storage: no answer")))
    assert (type(error), str(error)) == (kind, "storage: no answer")
