"""AdamW with a schedule, from optax; float32 copies of narrow parameters; the optimiser state's place on the mesh.

Where parameters are bfloat16 the optimiser holds them in float32 as well, gives its own steps to that copy, and the
parameters are the copy rounded. Deliberately absent: stochastic rounding, quantised moments, other optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.naming import nearest


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) behind clipping of the gradient's global norm.

    `state_dtype` stores the first moment, and only that. The second changes by 1 - b2 of itself at most as it falls, which for
    b2 = 0.999 is less than half of bfloat16's spacing: stored so, it would never fall again.
    """

    learning_rate: float = 1e-6  # at its peak
    warmup_steps: int = 0  # linear, from 0
    schedule: str = "constant"  # 'constant' | 'cosine', after the warm-up
    final_fraction: float = 0.1  # of the peak, where a cosine ends
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices, not on norms and biases
    max_gradient_norm: float = 1.0
    state_dtype: str = "same"  # of the first moment: 'same' as the parameters, at least float32, or 'bfloat16'


SCHEDULES = ("constant", "cosine")
STATE_DTYPES = ("same", "bfloat16")


def check(config: OptimizerConfig, *, key: str) -> None:
    """A ValueError where a name is unknown or a number is out of its range."""
    c = config
    for name, given, there in (("schedule", c.schedule, SCHEDULES), ("state_dtype", c.state_dtype, STATE_DTYPES)):
        if given not in there:
            raise ValueError(f"config.{key}.{name} is '{given}', which does not exist: {nearest(given, there)}")
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
    """Clip by global norm, then AdamW, in float32 at least. Its updates are applied by `apply_updates`."""

    def decayed(params: Any) -> Any:
        # Biases and norms (Flax calls a norm's weight `scale`) are known by name, for stacked layers give them a second axis.
        # LoRA's two matrices are decayed like any: their product shrinks to 0, that is the policy to its base.
        return jax.tree.map_with_path(
            lambda path, _: not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias", "scale")), params
        )

    return with_master_weights(
        optax.chain(
            optax.clip_by_global_norm(config.max_gradient_norm),
            optax.adamw(
                learning_rate(config, steps=steps),
                b1=config.b1,
                b2=config.b2,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                mask=decayed,
                mu_dtype=None if config.state_dtype == "same" else config.state_dtype,
            ),
        )
    )


class MasterState(NamedTuple):
    """The state of an optimiser of narrow parameters."""

    master: Any  # the parameters' tree: float32 where the parameter is narrower than that, None elsewhere
    inner: Any  # what the optimiser inside holds, for parameters of at least float32


def _narrow(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def with_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that keeps a float32 copy of each parameter narrower than that (arXiv:1710.03740, section 3.1).

    Added to a bfloat16, with its 8 significant bits, an update below 1/512 of it is lost: those of RL are. `inner` sees
    gradients and parameters in float32. Updates are those of the copy, in float32, to be applied by `apply_updates`. Where
    nothing is narrow the state is inner's own.
    """

    def init(params: Any) -> Any:
        master = jax.tree.map(lambda p: p.astype(jnp.float32) if _narrow(p) else None, params)
        if not jax.tree.leaves(master):
            return inner.init(params)
        return MasterState(master, inner.init(_widened(params, master)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not isinstance(state, MasterState):
            return inner.update(updates, state, params)
        gradient = jax.tree.map(lambda g, m: g if m is None else g.astype(m.dtype), updates, state.master)
        updates, inner_state = inner.update(gradient, state.inner, _widened(params, state.master))
        master = jax.tree.map(lambda u, m: None if m is None else m + u, updates, state.master)
        return updates, MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


def _widened(params: Any, master: Any) -> Any:
    """The parameters, each in its float32 copy where it has one."""
    return jax.tree.map(lambda p, m: p if m is None else m, params, master)


def apply_updates(params: Any, updates: Any, opt_state: Any) -> Any:
    """The parameters after an update that led to `opt_state`: p + u, or the float32 copy rounded where there is one.

    Rounding the copy is exact. Adding a difference to a narrow parameter would not be: with p = 1 and a copy at 1e-10 no float32
    difference leads there. A ValueError where a parameter is narrow and `opt_state` holds no copy of it.
    """
    if isinstance(opt_state, MasterState):

        def applied(p: jax.Array, u: jax.Array, m: jax.Array | None) -> Any:
            return optax.apply_updates(p, u) if m is None else m.astype(p.dtype)

        return jax.tree.map(applied, params, updates, opt_state.master)
    narrow = sorted({str(p.dtype) for p in jax.tree.leaves(params) if _narrow(p)})
    if narrow:
        raise ValueError(
            f"parameters are {' and '.join(narrow)}, and the optimiser holds no float32 copy of them, so that small updates would "
            "be lost: put with_master_weights around the whole optimiser"
        )
    return optax.apply_updates(params, updates)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Where the optimiser's state lies: moments and float32 copies with their parameters, counters everywhere.

    `params` is any tree of `jax.ShapeDtypeStruct`s (or arrays) with shardings on the mesh. `jit(init)` alone would replicate the
    moments.
    """
    at = jax.tree.map(lambda p: p.sharding, params)
    state = jax.eval_shape(optimizer.init, params)

    def placed(state: Any) -> Any:
        return optax.tree_map_params(optimizer, lambda _, at: at, state, at, transform_non_params=lambda _: sharding.named(mesh))

    if isinstance(state, MasterState):
        # optax asks init about a tree without leaves, in which nothing is narrow: it maps over the state inside
        return MasterState(jax.tree.map(lambda at, m: None if m is None else at, at, state.master), placed(state.inner))
    return placed(state)
