"""The textbook loss of every algorithm, written from the papers, one completion after another.

A completion is here what it is in a paper: a vector of the tokens that the policy chose, without padding and without
mask. A batch is a list of them. Denominators are spelt out, clips are `minimum` and `clip`, and what a paper holds
constant is computed from `frozen`. Advantages and the symbols of the cards are loops over NumPy numbers.

Deliberately absent: anything from `jaxreason.objectives` but the algorithms to be checked. With a NumPy `logp` a textbook
computes in NumPy, which is what makes finite differences of it cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreason.objectives import Signals

Numbers = Any  # Signals whose leaves are NumPy arrays
Textbook = Callable[..., Any]  # (logp, signals, frozen=None) -> the loss, a scalar


# ------------------------------------------------- completions


class Completion(NamedTuple):
    """The chosen tokens of one completion: vectors of its length, and its place in the batch."""

    place: tuple[int, int]
    logp: Any
    now: Any  # logp, held constant
    old: Any
    ref: Any
    behaviour: Any
    teacher: Any
    advantage: np.ndarray

    @property
    def length(self) -> int:
        return len(self.advantage)


def lib(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def numbers(signals: Signals) -> Numbers:
    return jax.tree.map(np.asarray, signals)


def zeros(signals: Numbers) -> np.ndarray:
    return np.zeros(signals.mask.shape)


def chosen(signals: Numbers, p: int, g: int) -> list[int]:
    return [t for t in range(signals.mask.shape[2]) if signals.mask[p, g, t]]


def places(signals: Numbers) -> list[tuple[int, int]]:
    """Where there is a completion: at least one chosen token."""
    n_groups, n_rows, _ = signals.mask.shape
    return [(p, g) for p in range(n_groups) for g in range(n_rows) if chosen(signals, p, g)]


def completions(logp: Any, signals: Signals, frozen: Any, advantage: Advantage | None) -> list[Completion]:
    s = numbers(signals)
    of_batch = {"ref": s.logp_ref, "behaviour": s.logp_behaviour, "teacher": s.logp_teacher}
    of_batch["advantage"] = zeros(s) if advantage is None else advantage(s)

    def one(p: int, g: int) -> Completion:
        at = (p, g, np.array(chosen(s, p, g)))
        mine = logp[at]
        now = (lax.stop_gradient(mine) if isinstance(mine, jax.Array) else mine) if frozen is None else frozen[at]
        old = now if s.logp_old is None else s.logp_old[at]
        return Completion((p, g), mine, now, old, **{name: None if x is None else x[at] for name, x in of_batch.items()})

    return [one(p, g) for p, g in places(s)]


# ------------------------------------------------- advantages: Numbers -> [P, G, T], 0 on masked tokens

Advantage = Callable[[Numbers], np.ndarray]


def spread(signals: Numbers, per_completion: np.ndarray) -> np.ndarray:
    out = zeros(signals)
    for p, g in places(signals):
        for t in chosen(signals, p, g):
            out[p, g, t] = per_completion[p, g]
    return out


def ones(s: Numbers) -> np.ndarray:
    return spread(s, np.ones(s.mask.shape[:2]))


def plain(s: Numbers) -> np.ndarray:
    return spread(s, s.reward)


def correct(s: Numbers, above: float = 0.0) -> np.ndarray:
    return spread(s, np.where(s.reward > above, 1.0, 0.0))


def minus_greedy(s: Numbers) -> np.ndarray:
    return spread(s, np.stack([r - greedy for r, greedy in zip(s.reward, s.greedy_reward, strict=True)]))


def by_group(baseline: Callable[[np.ndarray], np.ndarray], reward: np.ndarray) -> np.ndarray:
    """A group of equal rewards says nothing, and gets exactly 0."""
    return np.stack([np.zeros(len(r)) if len(set(r)) == 1 else baseline(r) for r in reward])


def zscore(s: Numbers, ddof: int = 0) -> np.ndarray:
    return spread(s, by_group(lambda r: (r - r.mean()) / (np.sqrt(sum((r - r.mean()) ** 2) / (len(r) - ddof)) + 1e-6), s.reward))


def centre(s: Numbers) -> np.ndarray:
    return spread(s, by_group(lambda r: r - r.mean(), s.reward))


def relative(s: Numbers) -> np.ndarray:
    return spread(s, by_group(lambda r: (r - r.mean()) / r.mean() if r.mean() > 0 else 0 * r, s.reward))


def over_batch_std(s: Numbers) -> np.ndarray:
    rewards = [r for p in sorted({p for p, _ in places(s)}) for r in s.reward[p]]
    return spread(s, by_group(lambda r: (r - r.mean()) / (np.std(rewards) + 1e-6), s.reward))


def divergence(s: Numbers) -> np.ndarray:
    """log(pi/pi_ref) of the policy that sampled: the one at the start of the update, or else what the sampler said."""
    return (s.logp_behaviour if s.logp_old is None else s.logp_old) - s.logp_ref


def leave_one_out(s: Numbers, beta: float = 0.0) -> np.ndarray:
    reward = s.reward.copy()
    for p, g in places(s):
        for t in chosen(s, p, g):
            reward[p, g] -= beta * divergence(s)[p, g, t]
    return spread(s, by_group(lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]), reward))


def whiten(a: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over all chosen tokens of the batch."""
    tokens = [a[index] for index in zip(*np.nonzero(mask), strict=True)]
    return np.where(mask, (a - np.mean(tokens)) / (np.std(tokens) + 1e-8), 0.0)


def gae(s: Numbers, discount: float = 1.0, lambda_: float | Callable[[int], float] = 0.95, beta: float = 0.0) -> np.ndarray:
    """Backwards over the chosen tokens, from the value behind the last: 0, unless the budget cut the completion off."""
    out = zeros(s)
    for p, g in places(s):
        ts = chosen(s, p, g)
        decay = lambda_(len(ts)) if callable(lambda_) else lambda_
        next_value = s.value_behind[p, g] if s.truncated[p, g] else 0.0
        next_advantage, reward = 0.0, s.reward[p, g]
        for t in reversed(ts):
            delta = reward - beta * divergence(s)[p, g, t] + discount * next_value - s.value[p, g, t]
            next_advantage = delta + discount * decay * next_advantage
            out[p, g, t], next_value, reward = next_advantage, s.value[p, g, t], 0.0
    return out


def vapo_lambda(length: int, alpha: float) -> float:
    return max(0.0, 1 - 1 / (alpha * length))


def whitened_return(s: Numbers, beta: float) -> np.ndarray:
    out = zeros(s)
    for p, g in places(s):
        ts = chosen(s, p, g)
        for t in ts:
            out[p, g, t] = s.reward[p, g] - beta * sum(divergence(s)[p, g, i] for i in ts if i >= t)
    return whiten(out, s.mask)


def whitened(s: Numbers, of: Advantage) -> np.ndarray:
    return whiten(of(s), s.mask)


def of_steps(s: Numbers, ddof: int = 0) -> np.ndarray:
    out = zeros(s)
    for p in range(s.mask.shape[0]):
        ends = [(g, t) for g in range(s.mask.shape[1]) for t in chosen(s, p, g) if s.step_end[p, g, t]]
        rewards = np.array([s.step_reward[p, g, t] for g, t in ends])
        if len(set(rewards)) < 2:
            continue
        mean, std = rewards.mean(), rewards.std(ddof=ddof)
        for g in range(s.mask.shape[1]):
            for t in chosen(s, p, g):
                out[p, g, t] = sum((s.step_reward[p, g, e] - mean) / (std + 1e-6) for i, e in ends if i == g and e >= t)
    return out


# ------------------------------------------------- denominators, over the list of what each completion contributes

Denominator = Callable[[list[Any]], Any]


def sequence_mean(terms: list[Any]) -> Any:
    return -sum(term.sum() / len(term) for term in terms) / len(terms)


def token_mean(terms: list[Any]) -> Any:
    return -sum(term.sum() for term in terms) / sum(len(term) for term in terms)


def sequence_sum(terms: list[Any]) -> Any:
    return -sum(term.sum() for term in terms) / len(terms)


def constant_length(terms: list[Any], budget: int = 3000) -> Any:
    return -sum(term.sum() for term in terms) / (len(terms) * budget)


# ------------------------------------------------- objectives of one completion: a vector, a number a token

Objective = Callable[[Completion], Any]


def likelihood(o: Completion) -> Any:
    return o.advantage * o.logp


def clip(o: Completion, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Any:
    """PPO, Eq. 7; dual clip: max(that, c A) where A < 0 (1912.09729, Eq. 5)."""
    np_, a = lib(o.logp), o.advantage
    ratio = np_.exp(o.logp - o.old)
    surrogate = np_.minimum(ratio * a, np_.clip(ratio, 1 - low, 1 + high) * a)
    return surrogate if dual is None else np_.where(a < 0, np_.maximum(surrogate, dual * a), surrogate)


def kl(o: Completion, kind: str) -> Any:
    """The estimators of Schulman's note, with q = pi and p = pi_ref, and what others made of them."""
    np_ = lib(o.logp)

    def k(number: int, logp: Any) -> Any:
        l = logp - o.ref  # noqa: E741
        return {1: l, 2: l**2 / 2, 3: np_.exp(-l) - 1 + l}[number]

    def swapped(number: int) -> Any:  # the value of k1 or k3, the gradient of k2
        return k(number, o.now) + (k(2, o.logp) - k(2, o.now))

    weight, fixed_weight = np_.exp(o.logp - o.old), np_.exp(o.now - o.old)
    match kind.split("_"):
        case ["abs"]:
            return abs(o.logp - o.ref)
        case ["k1" | "k2" | "k3" as name]:
            return k(int(name[1]), o.logp)
        case ["k1" | "k3" as name, "plus"]:
            return swapped(int(name[1]))
        case ["weighted", name]:
            return weight * k(int(name[1]), o.logp)
        case ["fixed", "weight", name]:
            return fixed_weight * k(int(name[1]), o.logp)
        case ["fixed", "weight", name, "plus"]:
            return fixed_weight * swapped(int(name[1]))
    raise ValueError(kind)


def clip_and_kl(o: Completion, beta: float, kind: str = "k3", low: float = 0.2, high: float = 0.2) -> Any:
    return clip(o, low, high) - beta * kl(o, kind)


def gspo(o: Completion, low: float, high: float, beta: float = 0.0) -> Any:
    """Eq. 5 and 7: one term a completion, which its tokens share."""
    np_, a = lib(o.logp), o.advantage[0]
    s = np_.exp((o.logp - o.old).sum() / o.length)
    term = np_.minimum(s * a, np_.clip(s, 1 - low, 1 + high) * a)
    return term + np_.zeros(o.length) - beta * kl(o, "k3")


def gspo_token(o: Completion, low: float, high: float) -> Any:
    """Eq. 13-14: s_t = sg[s] pi/sg[pi]."""
    np_, a = lib(o.logp), o.advantage
    s = np_.exp((o.now - o.old).sum() / o.length) * (np_.exp(o.logp) / np_.exp(o.now))
    return np_.minimum(s * a, np_.clip(s, 1 - low, 1 + high) * a)


def gmpo(o: Completion, low: float, high: float) -> Any:
    """Eq. 4: {prod |min(rho A, clip(rho, e^-low, e^high) A)|}^(1/|o|) sgn(A)."""
    np_, a = lib(o.logp), o.advantage[0]
    if a == 0:
        return np_.zeros(o.length)
    ratio = np_.exp(o.logp - o.old)
    product = 1.0
    for t in range(o.length):
        product = product * abs(np_.minimum(ratio[t] * a, np_.clip(ratio[t], np.exp(-low), np.exp(high)) * a))
    return product ** (1 / o.length) * np.sign(a) + np_.zeros(o.length)


def cispo(o: Completion, low: float, high: float) -> Any:
    np_ = lib(o.logp)
    return np_.clip(np_.exp(o.now - o.old), 1 - low, 1 + high) * o.advantage * o.logp


def sapo(o: Completion, positive: float, negative: float) -> Any:
    np_, tau = lib(o.logp), np.where(o.advantage > 0, positive, negative)
    ratio = np_.exp(o.logp - o.old)
    return 4 / tau / (1 + np_.exp(-tau * (ratio - 1))) * o.advantage


def kimi(o: Completion, tau: float) -> Any:
    """Eq. 3 before its gradient: log pi(y) (r - mean r) - tau/2 (log pi(y)/pi_i(y))^2."""
    whole = (o.logp - o.old).sum()
    return likelihood(o) - tau / 2 * whole**2 / o.length


def decoupled(o: Completion, cap: float = np.inf) -> Any:
    np_ = lib(o.logp)
    return np_.minimum(np_.exp(o.old - o.behaviour), cap) * clip(o)


def distillation(o: Completion) -> Any:
    """-k3 towards the teacher, which `weighted_k3` makes the reverse KL off-policy too."""
    return -kl(o._replace(ref=o.teacher), "weighted_k3")


def with_entropy(o: Completion, of: Objective, bonus: float) -> Any:
    return of(o) + bonus * (lib(o.logp).exp(o.logp - o.old) * (1 - o.logp) - 1)


def corrected(o: Completion, of: Objective, kind: str, low: float, high: float) -> Any:
    """The objective times a constant made of w = pi_old/pi_behaviour: TIS, IcePop, and three for whole completions."""
    np_ = lib(o.logp)
    w = np_.exp(o.old - o.behaviour)
    product, mean = w.prod(), w.prod() ** (1 / o.length)
    factor = {
        "truncate": np_.minimum(w, high),
        "band": np_.where((low <= w) & (w <= high), w, 0.0),
        "sequence_truncate": np_.minimum(product, high),
        "sequence_mask": np_.where((low <= product) & (product <= high), w, 0.0),
        "sequence_mean_mask": np_.where((low <= mean) & (mean <= high), w, 0.0),
    }[kind]
    return factor * of(o)


# ------------------------------------------------- losses


def book(objective: Objective, advantage: Advantage | None, denominator: Denominator) -> Textbook:
    def textbook(logp: Any, signals: Signals, frozen: Any = None) -> Any:
        return denominator([objective(o) for o in completions(logp, signals, frozen, advantage)])

    return textbook


def star(logp: Any, signals: Signals, frozen: Any = None) -> Any:
    """SFT on the correct completions alone."""
    rows = completions(logp, signals, frozen, correct)
    return sequence_mean([o.logp for o in rows if o.advantage[0] == 1.0])


def vapo(logp: Any, signals: Signals, frozen: Any = None, *, alpha: float = 0.05, mu: float = 0.1, above: float = 0.0) -> Any:
    """Eq. 8-10: L_PPO + mu L_NLL."""
    rows = completions(logp, signals, frozen, partial(gae, lambda_=partial(vapo_lambda, alpha=alpha)))
    right = [o for o in rows if np.asarray(signals.reward)[o.place] > above]
    return token_mean([clip(o, 0.2, 0.28) for o in rows]) + mu * token_mean([o.logp for o in right])


def dpo(logp: Any, signals: Signals, frozen: Any = None, *, loss: str, margin: str, beta: float, e: float = 0.0) -> Any:
    np_ = lib(logp)

    def log_sigmoid(x: Any) -> Any:
        return -np_.logaddexp(0.0, -x)

    total, n_pairs = 0.0, 0
    by_place = {o.place: o for o in completions(logp, signals, frozen, None)}
    for p in range(signals.mask.shape[0]):
        pair = [by_place.get((p, g)) for g in (0, 1)]
        sums = [0.0 if o is None else (o.logp - o.ref).sum() / (o.length if margin == "mean" else 1) for o in pair]
        h = sums[0] - sums[1]
        losses = {
            "sigmoid": -log_sigmoid(beta * h),
            "ipo": (h - 1 / (2 * beta)) ** 2,
            "hinge": np_.maximum(0.0, 1 - beta * h),
            "robust": -((1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)) / (1 - 2 * e),
        }
        total = total + losses[loss]
        n_pairs += any(o is not None for o in pair)
    return total / n_pairs
