"""Decoders that end in scores instead of logits: reward models, process reward models, critics.

They are `decoder.Model`s made with a `Head`; in Hugging Face folders they are `*ForSequenceClassification` (one score a row)
and `*ForTokenClassification` (scores at every token). A critic is the latter with one label. Deliberately absent: their
losses, which are objectives, and heads of several layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxreason.models import spec
from jaxreason.models.decoder import Model


def token_scores(model: Model, params: Any, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]) -> Float[Array, "P N labels"]:
    """The head's scores at every token of padded rows; what stands at padding means nothing."""
    hidden = model.hidden(params, tokens, mask.astype(jnp.int32))
    return model.project(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)


def sequence_scores(model: Model, params: Any, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]) -> Float[Array, "P labels"]:
    """The head's scores at each row's last token, the one at which it has seen all of the row; padding may be on either side."""
    hidden = model.hidden(params, tokens, mask.astype(jnp.int32))
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(mask, place[None], jnp.zeros_like(tokens)), axis=1)
    return model.project(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def values(
    model: Model,
    params: Any,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    completion: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"] | None = None,
) -> tuple[Float[Array, "P G T"], Float[Array, ""]]:
    """A critic's V(q, o_<t), the value of the state in which token t is chosen, and the load-balance loss of its experts.

    The head has one label. `mask` says which completion tokens are real; without it all are.
    """
    hidden, balance = model.forward(params, prompt, prompt_mask, completion, mask)
    # not flattened: rows, completions and tokens stay on the devices that hold them
    scores = jax.vmap(jax.vmap(lambda rows: model.project(params, rows)))(hidden)
    if scores.shape[-1] != 1:
        raise ValueError(f"the head has {scores.shape[-1]} labels, and a value is one number: make the model with Head('token', 1)")
    return scores[..., 0], balance


def with_new_head(model: Model, policy: Any, key: jax.Array, *, mesh: Mesh) -> Any:
    """The parameters of a scorer: a policy's body, not copied, and the head that the scorer declares, drawn anew.

    `policy` has the same architecture with a language model's head, which is left out.
    """
    own = {name: each for name, each in model.specs.items() if name in ("head", "head_bias")}
    fresh = spec.init(own, key, dtype=model.numerics.param_dtype, mesh=mesh)
    return {name: value for name, value in policy.items() if name not in own} | fresh
