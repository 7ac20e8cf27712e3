"""Each benchmark's short form runs, with the program as it is: a number that README tells must be
measurable again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "measuring"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_short_form_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--short"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    # small sizes prove nothing
    targets_missed = name == "data" and done.returncode == 1 and "Traceback" not in done.stderr
    assert done.returncode == 0 or targets_missed, done.stdout + done.stderr
    assert re.search(r"\d", done.stdout)
