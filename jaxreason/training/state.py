"""The train state: how it is made, and its abstract form for restoring a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.batch import TrainState
from jaxreason.compiling import compiled
from jaxreason.models import spec
from jaxreason.models.decoder import Model
from jaxreason.training.optimizer import apply_updates, state_shardings


def shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lies."""
    params = spec.abstract(model.specs, dtype=model.numerics.param_dtype, mesh=mesh)
    return TrainState(
        step=sharding.named(mesh),
        params=jax.tree.map(lambda p: p.sharding, params),
        opt_state=state_shardings(optimizer, params, mesh),
    )


def create(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any) -> TrainState:
    """A fresh state over a copy of these parameters, which stay usable (as the reference, say) when the state is donated."""

    def make(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    return compiled(jax.jit(make, out_shardings=shardings(model, optimizer, mesh)), params)(params)


def abstract(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, with nothing allocated."""
    params = spec.abstract(model.specs, dtype=model.numerics.param_dtype, mesh=mesh)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings(model, optimizer, mesh)
    )


def advance(state: TrainState, optimizer: optax.GradientTransformation, gradient: Any) -> tuple[TrainState, Any]:
    """The state after one step of the optimiser, and the step; what the algorithm carries stays."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 and float32
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = apply_updates(state.params, updates, opt_state)
    return TrainState(state.step + 1, params, opt_state, state.algorithm), updates
