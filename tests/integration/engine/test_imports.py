"""The shortcuts are optional: exact pictures are made without importing that package."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from tests.integration.engine_requests import images, prepared, request
for profile in ("exact", "fast"):
    images(prepared(request(profile=profile, num_inference_steps=1)))
    print(profile, any(name.startswith("sdpipeline.engine.stepwise") for name in sys.modules))
"""


@pytest.mark.long
def test_only_pictures_of_other_profiles_than_exact_import_the_shortcuts() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["exact False", "fast True"]
