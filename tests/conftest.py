"""Strict mode for every test, and the one place that knows where the shared data lies."""

from __future__ import annotations

import os
import signal
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# eight devices; and programs that are compiled quickly instead of well, in one piece: the suite makes thousands of small ones
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if tuple(int(x) for x in version("jax").split(".")[:2]) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # later versions end at a flag that they do not know
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# XLA's CPU devices wait for each other inside one pool of threads, by default one a device: of two sums that do not depend on
# each other each can have half of them, and then neither ends
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shell's background job ignores Ctrl-C, and what it starts inherits that: the tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)

import gc  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

checked, made = jaxtyping.jaxtyped, set()


def _jaxtyped(function: Any, *, typechecker: Any) -> Any:
    """A function within a function is checked the first time it is made in a process: each call of the outer one makes it, and
    writing its checks anew every time is much of what tracing costs. They name no shapes, and pyright reads them.
    """
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" in function.__qualname__:
        if code in made:
            return function
        made.add(code)
    return checked(function, typechecker=typechecker)


jaxtyping.jaxtyped = lambda *, typechecker: partial(_jaxtyped, typechecker=typechecker)

# Shapes and dtypes of annotated functions are checked, an int being a float too; not on batch.py, whose fields hold specs
# under tree maps. Here, before anything of the package is imported.
jaxtyping.install_import_hook(
    ["jaxreason.objectives", "jaxreason.numerics", "jaxreason.models", "jaxreason.sampling"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(os.environ.get("JAXREASON_SHARED", Path(__file__).parents[2] / "shared"))


# Files whose tests take longest, which begin first: one that began last would leave the other processes idle.
LONGEST = (
    "test_resume.py",
    "test_partial.py",
    "test_engine.py",
    "test_speculation.py",
    "test_commands.py",
    "test_signals.py",
    "test_mesh.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects; looking through all of them again and again was a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(scope="session")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process of one device adds to the environment: it compiles quickly, and into one folder for all of them."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in that of the session
        session = session.parent
    return {"XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": str(session / "xla-1")}


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs are kept in a folder: a file's runs would compile the same ones anew."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "xla-8"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and tiny checkpoints; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the shared data folder, which is not at {SHARED}; set JAXREASON_SHARED to it")
    return SHARED


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the annotations' checks, as a user runs it: what the package itself says to a bad argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
