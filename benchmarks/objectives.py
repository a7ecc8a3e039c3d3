"""Times `objectives.policy_loss` under jit beside the same loss written by hand. Prints one JSON line.

Value and gradient with respect to the log-probabilities, float32, 256 completions of up to 4,096 tokens. By hand is plain jnp
under `jax.grad`, as one writes it for one algorithm alone, with the same safety: the mask comes before any `exp`, since the
padding holds -inf. Values, metrics and gradients of the two must agree first.

- `loss`: from advantages and weights made before, the same arrays for both, as where micro-batches are accumulated;
- `update`: from rewards, with `prepare` in the program; by hand the advantage is one number a completion and each mean is
  taken where it is needed. Not for PPO, whose scan would hide the loss;
- `*_with_metrics`: with the metrics of `aux`, the array of coefficients left out; elsewhere they are dropped;
- `prepare_*`: advantage and weight alone, once a batch, and two of their parts.

Each holds `seconds` of ours, those `by_hand`, the median over rounds of their `ratio`, and the temporary memory of both
programs. On a CPU these are CPU seconds; on one thread, so that a busy machine does not matter much:

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/objectives.py

On an accelerator they are wall seconds of calls in a row, the last of them waited for.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

import jaxreason
from jaxreason import objectives
from jaxreason.objectives import Signals, advantages

BETA = 0.04


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"problems": 32, "group": 8, "tokens": 4096, "rounds": 15, "calls": 4, "seed": 0}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--only", nargs="*", choices=tuple(BY_HAND), help="some of the algorithms; default: all")
    return p.parse_args()


# ------------------------------------------------- by hand: (logp, signals, advantage, mean) -> (loss, ratio, dropped)
# The advantage is [P, G, 1] or [P, G, T]; `mean` is the algorithm's own over the batch, or a sum with weights made before.

Mean = Callable[[Array, Array], Array]


def log_ratio(logp: Array, other: Array, mask: Array) -> Array:
    return jnp.where(mask, logp, 0.0) - jnp.where(mask, other, 0.0)


def zscore(reward: Array) -> Array:
    centred = reward - reward.mean(axis=1, keepdims=True)
    return (centred / (reward.std(axis=1, keepdims=True) + 1e-6))[:, :, None]


def centre(reward: Array) -> Array:
    return (reward - reward.mean(axis=1, keepdims=True))[:, :, None]


def mean_of_means(x: Array, mask: Array) -> Array:
    if x.shape[-1] == 1:  # one number a completion is its own mean
        return jnp.mean(x)
    return jnp.mean(jnp.sum(jnp.where(mask, x, 0.0), axis=-1) / jnp.sum(mask, axis=-1))


def mean_of_tokens(x: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.sum(mask)


def mean_of_slots(x: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, x, 0.0)) / mask.size


def clip(ratio: Array, advantage: Array, low: float, high: float) -> tuple[Array, Array]:
    dropped = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage), dropped


def clipped(low: float, high: float) -> Callable[..., tuple[Array, Array, Array]]:
    """The loss of Dr. GRPO, DAPO and PPO, which differ in their advantages and means."""

    def loss(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
        ratio = jnp.exp(log_ratio(logp, s.logp_old, s.mask))
        surrogate, dropped = clip(ratio, advantage, low, high)
        return -mean(surrogate, s.mask), ratio, dropped

    return loss


def grpo(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
    ratio = jnp.exp(log_ratio(logp, s.logp_old, s.mask))
    surrogate, dropped = clip(ratio, advantage, 0.2, 0.2)
    behind = log_ratio(s.logp_ref, logp, s.mask)
    kl = jnp.exp(behind) - behind - 1
    return -mean(surrogate - BETA * kl, s.mask), ratio, dropped


def gspo(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
    difference = log_ratio(logp, s.logp_old, s.mask)
    whole = jnp.exp(jnp.sum(difference, axis=-1, keepdims=True) / jnp.sum(s.mask, axis=-1, keepdims=True))
    surrogate, dropped = clip(whole, advantage, 3e-4, 4e-4)
    return -mean(surrogate, s.mask), jnp.exp(difference), dropped


def gmpo(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
    difference = log_ratio(logp, s.logp_old, s.mask)
    sign = jnp.sign(advantage)
    bounded = jnp.where(sign == 0, difference, sign * jnp.minimum(sign * difference, 0.4))
    whole = jnp.exp(jnp.sum(bounded, axis=-1, keepdims=True) / jnp.sum(s.mask, axis=-1, keepdims=True))
    return -mean(whole * advantage, s.mask), jnp.exp(difference), sign * difference > 0.4


def cispo(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
    ratio = jnp.exp(log_ratio(jax.lax.stop_gradient(logp), s.logp_old, s.mask))
    surrogate = jnp.clip(ratio, 0.0, 5.0) * advantage * jnp.where(s.mask, logp, 0.0)
    return -mean(surrogate, s.mask), ratio, ratio > 5


def sapo(logp: Array, s: Signals, advantage: Array, mean: Mean) -> tuple[Array, Array, Array]:
    ratio = jnp.exp(log_ratio(logp, s.logp_old, s.mask))
    tau = jnp.where(advantage > 0, 1.0, 1.05)
    surrogate = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantage
    return -mean(surrogate, s.mask), ratio, jnp.zeros_like(s.mask)


def metrics_by_hand(loss: Array, ratio: Array, dropped: Array, logp: Array, s: Signals) -> dict[str, Array]:
    out = {
        "policy/objective": -loss,
        "policy/ratio_mean": mean_of_tokens(ratio, s.mask),
        "policy/ratio_min": jnp.min(jnp.where(s.mask, ratio, jnp.inf)),
        "policy/ratio_max": jnp.max(jnp.where(s.mask, ratio, -jnp.inf)),
        "policy/clip_fraction": mean_of_tokens(dropped.astype(ratio.dtype), s.mask),
    }
    if s.logp_ref is not None:
        behind = log_ratio(s.logp_ref, logp, s.mask)
        out["policy/kl_ref"] = mean_of_tokens(jnp.exp(behind) - behind - 1, s.mask)
    return jax.lax.stop_gradient(out)


class ByHand(NamedTuple):
    loss: Callable[..., tuple[Array, Array, Array]]
    mean: Mean
    advantage: Callable[[Array], Array] | None = zscore  # of the reward; None: GAE, the same for both


BY_HAND = {
    "grpo": ByHand(grpo, mean_of_means),
    "dr_grpo": ByHand(clipped(0.2, 0.2), mean_of_slots, centre),
    "dapo": ByHand(clipped(0.2, 0.28), mean_of_tokens),
    "gspo": ByHand(gspo, mean_of_means),
    "gmpo": ByHand(gmpo, mean_of_means),
    "cispo": ByHand(cispo, mean_of_tokens),
    "sapo": ByHand(sapo, mean_of_means),
    "ppo": ByHand(clipped(0.2, 0.2), mean_of_means, None),
}


# ------------------------------------------------- the same numbers from both, then their cost


def make_batch(problems: int, group: int, tokens: int, seed: int) -> tuple[Array, Signals]:
    """(log-probabilities, signals): lengths from a quarter of the budget to all of it, -inf behind them, ratios in every cell."""
    rng = np.random.default_rng(seed)
    shape = (problems, group, tokens)
    length = rng.integers(tokens // 4, tokens + 1, shape[:2])
    mask = np.arange(tokens) < length[:, :, None]
    logp = -rng.exponential(1.0, shape)

    def near(spread: float) -> Array:
        return jnp.asarray(np.where(mask, logp + spread * rng.standard_normal(shape), -np.inf), jnp.float32)

    signals = Signals(
        mask=jnp.asarray(mask),
        reward=jnp.asarray(rng.random(shape[:2]) < 0.5, jnp.float32),
        logp_old=near(0.2),
        logp_ref=near(0.5),
        value=jnp.asarray(rng.standard_normal(shape), jnp.float32),
    )
    return near(0.0), signals


def programs(name: str, tokens: int, with_metrics: bool) -> tuple[Callable[..., Any], Callable[..., Any], objectives.Algorithm]:
    """(ours, by hand): (logp, signals, advantage, weight) -> ((loss, metrics), gradient); both None: made from the rewards."""
    arguments = {"grpo": {"beta": BETA}, "dr_grpo": {"max_completion_tokens": tokens}}.get(name, {})
    algorithm, hand = getattr(objectives, name)(**arguments), BY_HAND[name]

    def ours(logp: Array, signals: Signals, advantage: Any, weight: Any) -> Any:
        if weight is None:
            advantage, weight = objectives.prepare(algorithm, signals)

        def loss(logp: Array) -> tuple[Array, dict[str, Array]]:
            value, aux = objectives.policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)
            return value, {k: v for k, v in aux.items() if k != "coefficient"} if with_metrics else {}

        return jax.value_and_grad(loss, has_aux=True)(logp)

    def by_hand(logp: Array, signals: Signals, advantage: Any, weight: Any) -> Any:
        if weight is None:
            assert hand.advantage is not None
            advantage, mean = hand.advantage(signals.reward), hand.mean
        else:
            mean = lambda x, mask: jnp.sum(weight * jnp.where(mask, x, 0.0))  # noqa: E731

        def loss(logp: Array) -> tuple[Array, dict[str, Array]]:
            value, ratio, dropped = hand.loss(logp, signals, advantage, mean)
            return value, metrics_by_hand(value, ratio, dropped, logp, signals) if with_metrics else {}

        return jax.value_and_grad(loss, has_aux=True)(logp)

    return ours, by_hand, algorithm


def check_same(ours: Any, by_hand: Any, name: str) -> None:
    """Value, metrics and gradient agree to float32's rounding of sums over a million tokens."""
    size = float(jnp.max(jnp.abs(by_hand[1])))
    np.testing.assert_allclose(ours[1], by_hand[1], rtol=1e-4, atol=1e-5 * size, err_msg=f"{name}: gradient")
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(by_hand[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name}: value and metrics")


def clock() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def seconds(program: Callable[..., Any], inputs: tuple[Any, ...], calls: int) -> float:
    begun = clock()
    for _ in range(calls):
        out = program(*inputs)
    jax.block_until_ready(out)
    return (clock() - begun) / calls


def compare(ours: Any, by_hand: Any, inputs: tuple[Any, ...], a: argparse.Namespace, name: str) -> dict[str, float]:
    """Both compiled, compared, and timed in turns, the order changing every round."""
    pair = [jax.jit(f).lower(*inputs).compile() for f in (ours, by_hand)]
    check_same(*(program(*inputs) for program in pair), name)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(a.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(seconds(pair[which], inputs, a.calls))
    memory = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in pair]
    return {
        "seconds": statistics.median(times[0]),
        "by_hand": statistics.median(times[1]),
        "ratio": statistics.median(x / y for x, y in zip(*times, strict=True)),
        "temp_mb": memory[0],
        "by_hand_temp_mb": memory[1],
    }


def measure(name: str, logp: Array, signals: Signals, a: argparse.Namespace) -> dict[str, Any]:
    signals = signals if name == "grpo" else signals._replace(logp_ref=None)
    signals = signals if name == "ppo" else signals._replace(value=None)
    ours, by_hand, algorithm = programs(name, a.tokens, with_metrics=False)
    with_metrics = programs(name, a.tokens, with_metrics=True)[:2]
    prepared = (logp, signals, *jax.jit(lambda signals: objectives.prepare(algorithm, signals))(signals))
    out: dict[str, Any] = {
        "loss": compare(ours, by_hand, prepared, a, name),
        "loss_with_metrics": compare(*with_metrics, prepared, a, name),
    }
    if BY_HAND[name].advantage is not None:
        out["update"] = compare(ours, by_hand, (logp, signals, None, None), a, name)
        out["update_with_metrics"] = compare(*with_metrics, (logp, signals, None, None), a, name)
    return out


def cost_of_preparing(signals: Signals, a: argparse.Namespace) -> dict[str, float]:
    grpo, ppo = objectives.grpo(beta=BETA), objectives.ppo()
    parts: dict[str, Callable[[Signals], Any]] = {
        "group_zscore": lambda s: advantages.group_zscore(s.reward),
        "gae": lambda s: advantages.gae(advantages.at_last_token(s.reward, s.mask), s.value, s.mask),
        "grpo": lambda s: objectives.prepare(grpo, s),
        "ppo": lambda s: objectives.prepare(ppo, s),
    }
    out = {}
    for name, part in parts.items():
        program = jax.jit(part).lower(signals).compile()
        jax.block_until_ready(program(signals))
        out[f"prepare_{name}"] = statistics.median(seconds(program, (signals,), 1) for _ in range(min(a.rounds, 3)))
    return out


def rounded(tree: Any) -> Any:
    return jax.tree.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, tree)


def main() -> None:
    a = arguments()
    logp, signals = make_batch(a.problems, a.group, a.tokens, a.seed)
    out: dict[str, Any] = {"bench": "objectives", "clock": "cpu" if jax.default_backend() == "cpu" else "wall"}
    out |= rounded({name: measure(name, logp, signals, a) for name in a.only or BY_HAND})
    out |= rounded(cost_of_preparing(signals, a))
    out["versions"] = {
        "jaxreason": jaxreason.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    out |= {"platform": platform.platform(), "device": jax.devices()[0].device_kind, "arguments": vars(a)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
