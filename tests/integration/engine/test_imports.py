"""The shortcuts are optional: exact pictures are made without importing that package."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from tests.integration.engine_requests import images, prepared, request
images(prepared(request(profile={profile!r}, num_inference_steps=1)))
print(any(name.startswith("sdpipeline.engine.stepwise") for name in sys.modules))
"""


@pytest.mark.parametrize(("profile", "imported"), [("exact", "False"), ("fast", "True")])
def test_only_pictures_of_other_profiles_than_exact_import_the_shortcuts(profile: str, imported: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(profile=profile)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == imported
