"""The package travels alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_objectives_imports_no_framework():
    out = run("-c", "import sys, jaxreason.objectives; print('\\n'.join(sys.modules))").split()
    top = {name.split(".")[0] for name in out}
    assert "jax" in top
    assert not top & {"flax", "optax", "orbax", "transformers", "datasets", "ml_collections", "torch", "matplotlib"}
    ours = {name for name in out if name.startswith("jaxreason.")}
    assert all(name.startswith("jaxreason.objectives") for name in ours), ours
