"""Damaged files and names end in one line, soon, and within memory; `fuzzing.py` makes them."""

import json
import os
import subprocess
import sys

import pytest
from fuzzing import TARGETS
from paths import ROOT

pytestmark = pytest.mark.slow
SECONDS = 4.0
"""Of each target."""
MOST_MEGABYTES = 2000


@pytest.fixture(scope="module")
def results():
    """By target: cases, problems with the number of a case, and megabytes."""
    script, seed = ROOT / "tests" / "support" / "fuzzing.py", os.environ.get("VISTOK_FUZZ_SEED", "0")
    done = subprocess.run(
        [sys.executable, str(script), str(SECONDS), seed],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["target"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("target", [target.__name__ for target in TARGETS])
def test_damaged_input_is_refused_in_one_line(results, target):
    result = results[target]
    assert result["problems"] == {}
    assert result["cases"] > 20 and result["megabytes"] < MOST_MEGABYTES
