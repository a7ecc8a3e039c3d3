"""One property suite for every algorithm. The textbook losses here are written with other means than the package's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals, combine_aux, policy_loss, prepare, weights

P, G, T = 3, 4, 6
BUDGET = 8  # dr_grpo's constant, larger than T on purpose


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# ------------------------------------------------- the textbook, in NumPy, one token after another


def book_zscore(reward: np.ndarray, ddof: int = 0) -> np.ndarray:
    rows = [np.zeros(len(r)) if len(set(r)) == 1 else (r - r.mean()) / (r.std(ddof=ddof) + 1e-6) for r in reward]
    return np.stack(rows)


def book_centre(reward: np.ndarray) -> np.ndarray:
    return np.stack([r - r.mean() for r in reward])


def book_leave_one_out(reward: np.ndarray) -> np.ndarray:
    return np.stack([[r[i] - np.delete(r, i).mean() for i in range(len(r))] for r in reward])


def book_min_clip(lp: float, old: float, ref: float, a: float, low: float, high: float) -> float:
    ratio = np.exp(lp - old)
    return min(ratio * a, float(np.clip(ratio, 1 - low, 1 + high)) * a)


def book_grpo(lp: float, old: float, ref: float, a: float, *, beta: float, kl: str = "k3") -> float:
    value = {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": np.exp(ref - lp) - (ref - lp) - 1}[kl]
    return book_min_clip(lp, old, ref, a, 0.2, 0.2) - beta * value


def book_loss(case: Case, logp: np.ndarray, s: Signals) -> float:
    """-sum over completions and tokens of weight * objective, with the denominators spelt out."""
    mask = np.asarray(s.mask)
    reward = np.asarray(s.reward)
    lengths = mask.sum(-1)
    rows = int((lengths > 0).sum())
    advantage = case.advantage(reward)
    old = logp if s.logp_old is None else np.asarray(s.logp_old)
    ref = np.asarray(s.logp_ref)
    total = 0.0
    for p, g, t in zip(*np.nonzero(mask), strict=True):
        divisor = {
            "sequence_mean": rows * lengths[p, g],
            "sequence_sum": rows,
            "token_mean": mask.sum(),
            "constant": rows * BUDGET,
        }[case.weight]
        total += case.objective(logp[p, g, t], old[p, g, t], ref[p, g, t], advantage[p, g]) / divisor
    return -float(total)


class Case(NamedTuple):
    algorithm: Algorithm
    advantage: Callable[[np.ndarray], np.ndarray]
    objective: Callable[[float, float, float, float], float]
    weight: str
    ratio: bool  # does the objective look at pi/pi_old?


def book_likelihood(lp: float, old: float, ref: float, a: float) -> float:
    return a * lp


# fmt: off
CASES = {
    "sft": Case(objectives.sft(), np.ones_like, book_likelihood, "sequence_mean", False),
    "reinforce": Case(objectives.reinforce(), np.array, book_likelihood, "sequence_sum", False),
    "rloo": Case(objectives.rloo(), book_leave_one_out, book_likelihood, "sequence_sum", False),
    "grpo": Case(objectives.grpo(), book_zscore, partial(book_grpo, beta=0.04), "sequence_mean", True),
    "grpo-k1": Case(
        objectives.grpo(kl="k1", beta=0.3), book_zscore, partial(book_grpo, beta=0.3, kl="k1"), "sequence_mean", True
    ),
    "grpo-k2": Case(
        objectives.grpo(kl="k2", beta=0.3), book_zscore, partial(book_grpo, beta=0.3, kl="k2"), "sequence_mean", True
    ),
    "grpo-sample-std": Case(
        objectives.grpo(ddof=1, beta=0.0), partial(book_zscore, ddof=1), partial(book_grpo, beta=0.0),
        "sequence_mean", True,
    ),
    "dr_grpo": Case(
        objectives.dr_grpo(max_completion_tokens=BUDGET), book_centre, partial(book_min_clip, low=0.2, high=0.2),
        "constant", True,
    ),
    "dapo": Case(objectives.dapo(), book_zscore, partial(book_min_clip, low=0.2, high=0.28), "token_mean", True),
}
# fmt: on


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def batch(seed: int = 0, *, holes: bool = True) -> tuple[np.ndarray, Signals]:
    """Log-probs off-policy enough to fill all four clip cells, a group of equal rewards, ragged rows and a hole."""
    rng = np.random.default_rng(seed)
    logp = -rng.gamma(1.5, 0.6, (P, G, T))
    mask = np.arange(T) < rng.integers(2, T + 1, (P, G, 1))
    if holes:
        mask[0, 0] = [True, False, True, True, False, False]  # fed tokens inside a completion
        mask[1, 2] = False  # an empty completion
    reward = rng.normal(size=(P, G))
    reward[2] = 0.7
    arrays = {"logp_old": rng.normal(0, 0.4, logp.shape), "logp_ref": rng.normal(0, 0.4, logp.shape)}
    signals = Signals(
        mask=jnp.asarray(mask),
        reward=jnp.asarray(reward),
        **{name: jnp.asarray(logp + noise) for name, noise in arrays.items()},
    )
    return logp, signals


def loss_of(algorithm: Algorithm, logp: jax.Array, signals: Signals) -> tuple[jax.Array, dict[str, jax.Array]]:
    advantage, weight = prepare(algorithm, signals)
    return policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)


def gradient(algorithm: Algorithm, logp: np.ndarray | jax.Array, signals: Signals) -> np.ndarray:
    return np.asarray(jax.grad(lambda x: loss_of(algorithm, x, signals)[0])(jnp.asarray(logp)))


def finite_differences(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        out[index] = (f(up) - f(down)) / (2 * h)
    return out


# ------------------------------------------------- the identity


def test_the_batch_fills_all_four_clip_cells():
    logp, signals = batch()
    advantage, _ = prepare(objectives.grpo(), signals)
    ratio = np.exp(logp - np.asarray(signals.logp_old))[np.asarray(signals.mask)]
    a = np.asarray(advantage)[np.asarray(signals.mask)]
    for sign in (a > 0, a < 0):
        assert (sign & (ratio > 1.28)).any() and (sign & (ratio < 0.8)).any() and (sign & (abs(ratio - 1) < 0.2)).any()


def test_value_is_the_textbooks_and_gradient_is_its_derivative(case: Case):
    logp, signals = batch()
    loss, aux = loss_of(case.algorithm, jnp.asarray(logp), signals)
    np.testing.assert_allclose(loss, book_loss(case, logp, signals), rtol=1e-12)
    np.testing.assert_allclose(aux["policy/objective"], -loss, rtol=1e-12)
    expected = finite_differences(lambda x: book_loss(case, x, signals), logp)
    np.testing.assert_allclose(gradient(case.algorithm, logp, signals), expected, atol=1e-8)
    assert np.abs(expected).max() > 1e-3


def test_without_old_log_probs_the_ratio_is_one_and_nothing_is_clipped(case: Case):
    logp, signals = batch()
    signals = signals._replace(logp_old=None)
    loss, aux = loss_of(case.algorithm, jnp.asarray(logp), signals)
    np.testing.assert_allclose(loss, book_loss(case, logp, signals), rtol=1e-12, atol=1e-15)
    assert aux["policy/clip_fraction"] == 0.0
    assert aux["policy/ratio_min"] == aux["policy/ratio_max"] == 1.0
    np.testing.assert_allclose(aux["policy/ratio_mean"], 1.0, rtol=1e-12)
    # The gradient is that of the ratio, with pi_old frozen at today's policy, though the value is that at ratio 1.
    frozen = signals._replace(logp_old=jnp.asarray(logp))
    np.testing.assert_allclose(
        gradient(case.algorithm, logp, signals),
        finite_differences(lambda x: book_loss(case, x, frozen), logp),
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_first_step_gradient_is_the_plain_advantage(name: str):
    logp, signals = batch()
    algorithm = CASES[name].algorithm
    if name == "grpo":
        signals = signals._replace(logp_ref=jnp.asarray(logp))  # at the reference k3 pulls nowhere
    advantage, weight = prepare(algorithm, signals)
    np.testing.assert_allclose(
        gradient(algorithm, logp, signals._replace(logp_old=None)), -np.asarray(advantage * weight), atol=1e-15
    )


def test_centred_groups_have_zero_loss_and_a_gradient_at_the_first_step():
    logp, signals = batch(holes=False)
    signals = signals._replace(logp_old=None)
    algorithm = objectives.grpo(beta=0.0)
    np.testing.assert_allclose(loss_of(algorithm, jnp.asarray(logp), signals)[0], 0.0, atol=1e-12)
    assert np.abs(gradient(algorithm, logp, signals)).max() > 1e-2


# ------------------------------------------------- invariances


def poisoned(array: jax.Array | None, mask: jax.Array, value: float) -> jax.Array:
    assert array is not None
    return jnp.where(mask, array, value)


@pytest.mark.parametrize("value", [-np.inf, np.nan, 1e30])
def test_what_padding_holds_is_invisible(case: Case, value: float):
    logp, signals = batch()
    bad = signals._replace(
        logp_old=poisoned(signals.logp_old, signals.mask, value),
        logp_ref=poisoned(signals.logp_ref, signals.mask, value),
    )
    bad_logp = poisoned(jnp.asarray(logp), signals.mask, value)
    for a, b in ((signals, bad), (signals._replace(logp_old=None), bad._replace(logp_old=None))):
        good_loss, good_aux = loss_of(case.algorithm, jnp.asarray(logp), a)
        bad_loss, bad_aux = loss_of(case.algorithm, bad_logp, b)
        assert good_loss == bad_loss and good_aux == bad_aux
        got = gradient(case.algorithm, bad_logp, b)
        np.testing.assert_array_equal(got, gradient(case.algorithm, logp, a))
        assert (got[~np.asarray(signals.mask)] == 0).all()


def test_more_padding_and_empty_rows_change_nothing(case: Case):
    logp, signals = batch()
    per_row = {"mask": signals.mask, "logp_old": signals.logp_old, "logp_ref": signals.logp_ref}
    wide = signals._replace(**{k: jnp.pad(v, ((0, 0), (0, 0), (0, 3))) for k, v in per_row.items()})
    tall = jax.tree.map(lambda x: jnp.pad(x, ((0, 2),) + ((0, 0),) * (x.ndim - 1)), signals)  # two empty groups
    expected = loss_of(case.algorithm, jnp.asarray(logp), signals)[0]
    expected_gradient = gradient(case.algorithm, logp, signals)
    for padded, width in ((wide, ((0, 0), (0, 0), (0, 3))), (tall, ((0, 2), (0, 0), (0, 0)))):
        x = np.pad(logp, width)
        np.testing.assert_allclose(loss_of(case.algorithm, jnp.asarray(x), padded)[0], expected, rtol=1e-12)
        np.testing.assert_allclose(gradient(case.algorithm, x, padded), np.pad(expected_gradient, width), rtol=1e-12, atol=1e-15)


def test_slices_of_whole_groups_add_up_to_the_batch(case: Case):
    logp, signals = batch()
    advantage, weight = prepare(case.algorithm, signals)
    token_weight = weights.token_mean(signals.mask)

    def slice_loss(x, part):
        a, w, tw, s = part
        return policy_loss(case.algorithm, x, s, advantage=a, weight=w, token_weight=tw)

    whole = (advantage, weight, token_weight, signals)
    value_and_grad = jax.value_and_grad(slice_loss, has_aux=True)
    (loss, aux), grad = value_and_grad(jnp.asarray(logp), whole)
    parts = [value_and_grad(*jax.tree.map(lambda x, i=i, j=j: x[i:j], (jnp.asarray(logp), whole))) for i, j in ((0, 1), (1, 3))]
    np.testing.assert_allclose(sum(part[0][0] for part in parts), loss, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad, rtol=1e-12, atol=1e-15)
    merged = combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *[part[0][1] for part in parts]))
    assert merged.keys() == aux.keys()
    for name in aux:
        np.testing.assert_allclose(merged[name], aux[name], rtol=1e-12, atol=1e-15, err_msg=name)
    assert merged == combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *[part[0][1] for part in parts[::-1]]))


def test_permuting_a_group_permutes_the_gradient(case: Case):
    logp, signals = batch()
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[:, order], signals)
    np.testing.assert_allclose(
        gradient(case.algorithm, logp[:, order], shuffled),
        gradient(case.algorithm, logp, signals)[:, order],
        atol=1e-14,
    )


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].algorithm.group_baseline])
def test_group_baselines_do_not_see_a_shift_of_the_reward(name: str):
    _, signals = batch()
    shift = jnp.asarray([[5.0], [-3.0], [1.0]])
    a, _ = prepare(CASES[name].algorithm, signals)
    b, _ = prepare(CASES[name].algorithm, signals._replace(reward=signals.reward + shift))
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_jit_is_no_jit(case: Case):
    logp, signals = batch()
    plain = jax.value_and_grad(partial(loss_of, case.algorithm), has_aux=True)
    ours, compiled = plain(jnp.asarray(logp), signals), jax.jit(plain)(jnp.asarray(logp), signals)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), ours, compiled)


def test_float32_stays_float32_even_beside_float64(case: Case):
    logp, signals = batch()
    (loss, aux), grad = jax.value_and_grad(partial(loss_of, case.algorithm), has_aux=True)(jnp.asarray(logp, jnp.float32), signals)
    assert {x.dtype for x in (loss, grad, *aux.values())} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, book_loss(case, logp, signals), rtol=1e-4)


# ------------------------------------------------- edges


def test_a_group_of_equal_rewards_gets_no_push(case: Case):
    logp, signals = batch()
    advantage, _ = prepare(case.algorithm, signals)
    expected = case.algorithm.group_baseline
    assert bool((advantage[2] == 0).all()) == expected


@pytest.mark.parametrize("value", [0.0, -np.inf])
def test_an_all_masked_batch_is_zero_and_finite(case: Case, value: float):
    logp, signals = batch()
    signals = signals._replace(mask=jnp.zeros_like(signals.mask))
    x = jnp.full(logp.shape, value)
    loss, aux = loss_of(case.algorithm, x, signals)
    assert loss == 0 and all(np.isfinite(v) for v in aux.values())
    assert (gradient(case.algorithm, x, signals) == 0).all()


def test_a_group_of_one(case: Case):
    logp, signals = batch()
    one = jax.tree.map(lambda x: x[:, :1], signals)
    advantage, weight = prepare(case.algorithm, one)
    assert np.isfinite(advantage).all() and np.isfinite(weight).all()
    assert bool((advantage == 0).all()) == case.algorithm.group_baseline
    assert np.isfinite(gradient(case.algorithm, logp[:, :1], one)).all()


def test_diagnostics_count_chosen_tokens_only():
    logp, signals = batch()
    _, aux = loss_of(objectives.grpo(), jnp.asarray(logp), signals)
    mask = np.asarray(signals.mask)
    ratio, ell = np.exp(logp - np.asarray(signals.logp_old))[mask], (logp - np.asarray(signals.logp_ref))[mask]
    a = np.broadcast_to(book_zscore(np.asarray(signals.reward))[..., None], mask.shape)[mask]
    clipped = [(x > 1.2 and y > 0) or (x < 0.8 and y < 0) for x, y in zip(ratio, a, strict=True)]
    expected = {
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_min": ratio.min(),
        "policy/ratio_max": ratio.max(),
        "policy/clip_fraction": np.mean(clipped),
        "policy/kl_ref": (np.exp(-ell) - 1 + ell).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-12, err_msg=name)
    assert 0 < np.mean(clipped) < 1


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_the_ratios_extremes_are_not_those_of_padding(shift: float):
    """Padding counts as ratio 1 inside: it would be the minimum of ratios above 1, and the maximum of those below."""
    logp, signals = batch()
    signals = signals._replace(logp_old=jnp.asarray(logp - shift))
    _, aux = loss_of(objectives.dapo(), jnp.asarray(logp), signals)
    np.testing.assert_allclose([aux["policy/ratio_min"], aux["policy/ratio_max"]], np.exp(shift), rtol=1e-12)


# ------------------------------------------------- names and errors


def test_every_algorithm_is_found_by_its_name_and_has_a_case():
    for name in ("sft", "reinforce", "rloo", "grpo", "dr_grpo", "dapo"):
        kwargs = {"max_completion_tokens": 16} if name == "dr_grpo" else {}
        assert getattr(objectives, name)(**kwargs).name == name
        assert name in CASES


def test_needs():
    assert objectives.sft().needs == frozenset()
    assert objectives.grpo().needs == {"reward", "old", "reference"}
    assert objectives.grpo(beta=0.0).needs == {"reward", "old"}


def test_mistakes_are_named():
    logp, signals = batch()
    with pytest.raises(TypeError, match="cliplow"):
        objectives.grpo(cliplow=0.1)  # pyright: ignore
    with pytest.raises(ValueError, match="kl is 'k4'"):
        objectives.grpo(kl="k4")
    with pytest.raises(ValueError, match="'grpo' needs Signals.logp_ref"):
        loss_of(objectives.grpo(), jnp.asarray(logp), signals._replace(logp_ref=None))
    with pytest.raises(ValueError, match="'rloo' needs Signals.reward"):
        prepare(objectives.rloo(), signals._replace(reward=None))
    advantage, weight = prepare(objectives.dapo(), signals)
    sliced = jax.tree.map(lambda x: x[:1], signals)  # and the rest is not
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 6\)"):
        policy_loss(objectives.dapo(), jnp.asarray(logp), sliced, advantage=advantage, weight=weight)
