"""Runs each file's `interpreter` tests in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

This is how a plain `pytest` covers the kernels on a machine without a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [p for p in HERE.glob("test_*.py") if "mark.interpreter" in p.read_text() and p.name != Path(__file__).name]
FILES.sort(key=lambda p: ("attention" not in p.name, -p.stat().st_size, p.name))  # more to run first


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", [p.name for p in FILES])
def test_kernels_in_the_interpreter(name: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / name)]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    print(done.stdout.splitlines()[-1] if done.stdout else "")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
