"""Under SDP_TEST_REQUIRE_ALL=1 only tests that need a GPU may skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[2] / "conftest.py"
SKIPS_ONE = "import pytest\n@pytest.mark.skip(reason='no such program')\ndef test_one(): pass\n"
SKIPS_ALL = "import pytest\npytest.importorskip('no_such_library')\n"
SKIPS_GPU = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip(reason='no GPU')\ndef test_one(): pass\n"


@pytest.mark.parametrize(
    ("source", "require_all", "fails"),
    [(SKIPS_ONE, "1", True), (SKIPS_ALL, "1", True), (SKIPS_GPU, "1", False), (SKIPS_ONE, "", False)],
    ids=["a test", "a module", "a GPU test", "without the rule"],
)
def test_a_skip_fails_only_where_everything_is_required(
    tmp_path: Path, source: str, require_all: str, fails: bool
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        env=os.environ | {"SDP_TEST_REQUIRE_ALL": require_all},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode in {1, 2}) is fails, done.stdout
