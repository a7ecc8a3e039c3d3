"""Strict mode for every test, and the one place that knows where the shared data lies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# eight devices; and programs that are compiled quickly instead of well: the suite makes thousands of small ones
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# XLA's CPU devices wait for each other inside one pool of threads, by default one a device: of two sums that do not depend on
# each other each can have half of them, and then neither ends
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shell's background job ignores Ctrl-C, and what it starts inherits that: the tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes of annotated functions are checked, an int being a float too; not on batch.py, whose fields hold specs
# under tree maps. Here, before anything of the package is imported.
jaxtyping.install_import_hook(
    ["jaxreason.objectives", "jaxreason.numerics", "jaxreason.models", "jaxreason.sampling"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(os.environ.get("JAXREASON_SHARED", Path(__file__).parents[2] / "shared"))


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
