"""Preferences: a pair of completions is a group of two, the chosen one first, and the margin between them is learnt.

DPO and its kin are coefficients like the others: the same number for all tokens of a completion, positive on the chosen
one and negative on the rejected one. Use them with `weights.group_sum` (margin "sum") or `weights.group_mean` ("mean").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxreason.objectives.arrays import Scalar, check_above, check_choice, check_mask, check_pairs, check_range
from jaxreason.objectives.kl import log_ratio

LOSSES = ("sigmoid", "ipo", "hinge", "robust")
MARGINS = ("sum", "mean")


def preference(
    logp: Float[Array, "P 2 T"],
    logp_ref: Float[Array, "P 2 T"],
    mask: Bool[Array, "P 2 T"],
    *,
    beta: float,
    loss: str = "sigmoid",
    margin: str = "sum",
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "P 2 T"], Float[Array, "P 2 T"]]:
    """GC = +-dJ/dh, h = l(chosen) - l(rejected), l = sum or mean over tokens of log(pi/pi_ref); + on the chosen one.

    With M = beta h, J of a pair is, and so GC:

    - "sigmoid", DPO: log sigmoid(M); beta sigmoid(-M) (arXiv:2305.18290, Eq. 7);
    - "ipo": -(h - 1/(2 beta))^2; -2 (h - 1/(2 beta)) (arXiv:2310.12036, Eq. 17);
    - "hinge": -max(0, 1 - M); beta where M < 1 (arXiv:2305.10425, 2309.06657);
    - "robust": [(1 - e) log sigmoid(M) - e log sigmoid(-M)]/(1 - 2e), e = `label_smoothing`;
      beta [(1 - e) sigmoid(-M) + e sigmoid(M)]/(1 - 2e) (arXiv:2403.00409).

    The margin "sum" is the original's, with w = 1/P; "mean" is DeepSeekMath's (arXiv:2402.03300, Eq. 12), with
    w = 1/(P |o|). Eq. 14 there prints the GC without beta and with a token's own margin; what Eq. 12 has for a gradient
    is beta sigmoid(-M) of the *whole* completions (our derivation, tested). J is spread over the pair's tokens so that
    its weighted sum is the mean over pairs.

    Raises ValueError if arrays are not pairs, shapes differ, a name is unknown, `beta` is not positive, or
    `label_smoothing` is not in [0, 0.5), or not 0 with another loss than "robust".
    """
    check_settings(beta=beta, loss=loss, margin=margin, label_smoothing=label_smoothing)
    check_mask(mask, logp=logp, logp_ref=logp_ref)
    check_pairs(mask, name="mask")
    difference = log_ratio(lax.stop_gradient(logp), logp_ref, mask)
    lengths = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(difference.dtype)
    whole = jnp.sum(difference, axis=-1)
    if margin == "mean":
        whole = whole / lengths
    h = (whole[:, 0] - whole[:, 1])[:, None, None]
    scaled = beta * h
    if loss == "ipo":
        off = h - 1 / (2 * beta)
        value, slope = -jnp.square(off), -2 * off
    elif loss == "hinge":
        value, slope = -jnp.maximum(0.0, 1 - scaled), jnp.where(scaled < 1, jnp.full_like(scaled, beta), 0.0)
    else:
        e = label_smoothing if loss == "robust" else 0.0
        value = ((1 - e) * jax.nn.log_sigmoid(scaled) - e * jax.nn.log_sigmoid(-scaled)) / (1 - 2 * e)
        slope = beta * ((1 - e) * jax.nn.sigmoid(-scaled) + e * jax.nn.sigmoid(scaled)) / (1 - 2 * e)
    sign = jnp.asarray([1.0, -1.0], difference.dtype)[None, :, None]
    coefficient = jnp.where(mask, sign * slope, 0.0)
    # the weight of a token is 1/P, or 1/(P |o|): a pair's value is shared by its tokens, or by its (non-empty) completions
    if margin == "sum":
        shares = jnp.sum(mask, axis=(1, 2), keepdims=True)
    else:
        shares = jnp.sum(jnp.any(mask, axis=-1, keepdims=True), axis=1, keepdims=True)
    objective = jnp.where(mask, value / jnp.maximum(shares, 1).astype(difference.dtype), 0.0)
    return coefficient, objective


def check_settings(*, beta: Scalar, loss: str, margin: str, label_smoothing: float) -> None:
    """Raises ValueError if a preference's settings are wrong."""
    check_choice(LOSSES, loss=loss)
    check_choice(MARGINS, margin=margin)
    check_above(0.0, "; DPO's usual one is 0.1", beta=beta)
    check_range(0.0, label_smoothing=label_smoothing)
    if not label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, but it is the share of wrong labels, below 0.5.")
    if label_smoothing and loss != "robust":
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but loss {loss!r} has none; set loss to 'robust', or leave it out."
        )
