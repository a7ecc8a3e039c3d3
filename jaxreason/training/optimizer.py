"""AdamW with a schedule, from optax, and the optimiser state's place on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.models import spec


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


def learning_rate(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate of each update, for a stage of `steps` updates."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule is '{config.schedule}': expected one of {', '.join(SCHEDULES)}")
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
        names = jax.tree.leaves_with_path(params)
        flags = [not str(path[-1].key).endswith(("norm", "bias")) for path, _ in names]  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.unflatten(jax.tree.structure(params), flags)

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
