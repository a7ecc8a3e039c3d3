"""The floors of the house hold: a module imports only from below, and the light rooms stay light."""

from __future__ import annotations

import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    main = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", main, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after importing `modules`."""
    script = f"import sys, {', '.join(modules)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_floors_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("types.py", "import jaxreason.batch", "jaxreason.types -> jaxreason.batch"),  # upwards
        ("objectives/kl.py", "import jaxreason.sharding", "jaxreason.objectives.kl -> jaxreason.sharding"),  # sideways
        ("sharding.py", "def late():\n    import jaxreason.cli", "jaxreason.sharding -> jaxreason.cli"),  # when called
        ("attic.py", "", "jaxreason.attic"),  # a module without a floor
    ],
)
def test_a_broken_floor_is_found(tmp_path, module, line, complaint):
    shutil.copytree(ROOT / "jaxreason", tmp_path / "jaxreason", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "jaxreason" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout, done.stdout + done.stderr


def test_objectives_travel_alone():
    loaded = loaded_by("jaxreason.objectives")
    assert "jax" in loaded
    assert not loaded & {"flax", "transformers", "orbax", "datasets", "optax", "ml_collections", "matplotlib"}


def test_the_package_itself_loads_nothing():
    assert not loaded_by("jaxreason") & {"jax", "numpy"}


def test_rewards_tasks_and_the_entry_points_do_not_load_jax():
    """They are imported in reward workers: `__main__` and the console script's module because a spawned process
    imports its parent's main module again."""
    modules = ["jaxreason.types", "jaxreason.__main__", "jaxreason.cli.main"]
    for package in ("rewards", "tasks"):
        modules.append(f"jaxreason.{package}")
        for found in pkgutil.walk_packages([str(ROOT / "jaxreason" / package)], f"jaxreason.{package}."):
            if not found.name.startswith("jaxreason.rewards.traced"):  # the one part of rewards with jax
                modules.append(found.name)
    assert len(modules) > 8, "the walk found no modules"
    assert not loaded_by(*modules) & {"jax", "jaxlib", "flax", "optax", "transformers", "datasets"}
