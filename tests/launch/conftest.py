from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sapo_ray.store import RunDirectory

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run of tests/configs/tiny.yaml, as a user starts it, once for all tests."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "launch", "run", str(TINY), f"run_dir={path}", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == RunDirectory(path).summary()
    return RunDirectory(path)
