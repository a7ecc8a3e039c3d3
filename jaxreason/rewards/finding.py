"""Which host rules there are, by name, without jax: for the commands that score texts, and for a run.

The modules are imported when this is asked, not before; traced rules, the only ones with jax, are found by who runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from jaxreason import naming, rewards
from jaxreason.types import Reward

WITH_JAX = ("traced",)
GROUP_NOUNS = ("list[Reward]", "Sequence[Reward]")  # what rules of a whole group return


def host_rules() -> dict[str, Callable[..., Reward]]:
    """Every rule on the text of one completion, by the name `module.function`."""
    return found_rules("Reward")


def found_rules(*nouns: str) -> dict[str, Callable[..., Any]]:
    """Every function under jaxreason.rewards that returns one of these, by the name `module.function`, but for those with jax."""
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(rewards.__path__):
        if info.name not in WITH_JAX:
            module = importlib.import_module(f"{rewards.__name__}.{info.name}")
            for noun in nouns:
                found |= {f"{info.name}.{name}": function for name, function in naming.returning(module, noun).items()}
    return found
