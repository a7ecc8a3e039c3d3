"""The wheel is complete: built, installed away from the checkout, and run from an unrelated folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What belongs to one machine, not to the project: somebody's home, this checkout's own path, package registries.
HOMES = r"(?<![\w.~-])/(?:home|Users)/\w"
HOSTS = [("pypi", "org"), ("python" + "hosted", "org"), ("npmjs", "org"), ("deb", "debian", "org"), ("archive", "ubuntu", "com")]
REGISTRIES = "|".join(r"[.]".join(parts) for parts in HOSTS)  # in pieces, so that this file may be looked at too
FORBIDDEN = re.compile("|".join([HOMES, REGISTRIES, re.escape(str(ROOT)) + r"(?![\w-])"]))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed, seeing no PYTHONPATH but one that is given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("jaxreason-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder the wheel was installed into; nothing else is in it."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_everything_that_is_read_at_run_time(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {f"jaxreason/{path.relative_to(ROOT / 'jaxreason')}" for path in files_of(ROOT / "jaxreason")}
    configs = {f"jaxreason/configs/{path.relative_to(ROOT / 'configs')}" for path in files_of(ROOT / "configs")}
    assert {"jaxreason/py.typed", "jaxreason/training/report.html"} <= package
    assert "jaxreason/configs/quickstart.py" in configs
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == package | configs
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


def test_the_installed_package_runs_from_anywhere(installed, one_device, tmp_path):
    python = [sys.executable, "-P", "-m", "jaxreason"]  # -P: the current folder is not on the path
    where = "import jaxreason; print(jaxreason.__file__)"
    assert run(sys.executable, "-P", "-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).startswith(str(installed))
    listed = run(*python, "configs", cwd=tmp_path, PYTHONPATH=str(installed))
    experiments = [path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("_")]
    assert "quickstart" in experiments and all(name in listed for name in experiments)
    train = ["train", "--config", "quickstart:tiny", "--config.seed=5", "--workdir", tmp_path / "run"]  # as in test_commands
    run(*python, *train, cwd=tmp_path, PYTHONPATH=str(installed), **one_device)
    assert any((tmp_path / "run").iterdir())


def test_no_file_names_a_machine_or_a_registry(wheel):
    found = []
    for name, content in [*wheel_texts(wheel), *tracked_texts()]:
        lines = enumerate(content.splitlines(), 1)
        found += [f"{name}:{number}: {line.strip()}" for number, line in lines if FORBIDDEN.search(line)]
    assert not found, "\n".join(found)


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def wheel_texts(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            yield f"{wheel.name}/{name}", archive.read(name).decode(errors="ignore")


def tracked_texts() -> Iterator[tuple[str, str]]:
    """The files git knows or would add; nothing where this is not a git checkout."""
    if not (ROOT / ".git").exists():
        return
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(errors="ignore")
