"""The property tests again, with twenty times as many examples, and others in each run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(path.name for path in Path(__file__).parent.glob("test_properties_*.py") if path != Path(__file__))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_properties_hold_for_many_examples(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "WHISPER_AT_PROPERTIES": "slow"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-8000:]
