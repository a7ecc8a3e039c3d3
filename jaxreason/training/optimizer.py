"""AdamW with a schedule, from optax, and the optimiser state's place on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.models import spec
from jaxreason.naming import nearest


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) behind clipping of the gradient's global norm."""

    learning_rate: float = 1e-6  # at its peak
    warmup_steps: int = 0  # linear, from 0
    schedule: str = "constant"  # 'constant' | 'cosine', after the warm-up
    final_fraction: float = 0.1  # of the peak, where a cosine ends
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices, not on norms and biases
    max_gradient_norm: float = 1.0


SCHEDULES = ("constant", "cosine")


def check(config: OptimizerConfig, *, key: str) -> None:
    """A ValueError where the schedule is unknown or a number is out of its range."""
    c = config
    if c.schedule not in SCHEDULES:
        raise ValueError(f"config.{key}.schedule is '{c.schedule}', which does not exist: {nearest(c.schedule, SCHEDULES)}")
    for name, possible, expected in (
        ("learning_rate", c.learning_rate >= 0, "0 or more"),
        ("warmup_steps", c.warmup_steps >= 0, "0 or more"),
        ("final_fraction", 0 <= c.final_fraction <= 1, "0 to 1"),
        ("b1", 0 <= c.b1 < 1, "0 or more, and less than 1"),
        ("b2", 0 <= c.b2 < 1, "0 or more, and less than 1"),
        ("epsilon", c.epsilon > 0, "more than 0"),
        ("weight_decay", c.weight_decay >= 0, "0 or more"),
        ("max_gradient_norm", c.max_gradient_norm > 0, "more than 0"),
    ):
        if not possible:
            raise ValueError(f"config.{key}.{name} is {getattr(c, name)}: expected {expected}")


def learning_rate(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate of each update, for a stage of `steps` updates."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""

    def decayed(params: Any) -> Any:
        # biases and norms have one axis, or two with the layers'
        return jax.tree.map_with_path(
            lambda path, _: not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias")), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.adamw(
            learning_rate(config, steps=steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def state_shardings(optimizer: optax.GradientTransformation, specs: spec.Specs, mesh: Mesh, *, dtype: str) -> Any:
    """Moments lie where their parameters lie; counters everywhere. `jit(init)` alone would replicate the moments."""
    params = spec.abstract(specs, dtype=dtype, mesh=mesh)
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, at: at,
        state,
        spec.shardings(specs, mesh),
        transform_non_params=lambda _: sharding.named(mesh),
    )
