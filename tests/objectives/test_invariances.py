"""What must change nothing, and what must not break, for every algorithm in `cases`: one property, one test, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason import objectives
from jaxreason.objectives import Algorithm, Signals, combine_aux, policy_loss, prepare, weights

from .cases import CASES as EVERY
from .cases import P, T, batch

# Every algorithm, and of their settings those with other sums or masks in them; the rest differ in a number.
SETTINGS = """rft-above rloo-kl grpo-k2 grpo-weighted_k3 grpo-fixed_weight_k3 dpo-ipo-sum dpo-sigmoid-mean dpo-robust-mean dapo-band
    dapo-sequence_truncate dapo-sequence_mask dapo-sequence_mean_mask gspo-kl gspo_token-wide ppo-kl ppo-dual-clip ppo-entropy
    reinforce_plus_plus_baseline-kl decoupled_ppo-cap""".split()
CASES = {name: EVERY[name] for name in [*(a.name for a in objectives.every_algorithm()), *SETTINGS]}
PER_TOKEN = ("logp_behaviour", "logp_old", "logp_ref", "logp_teacher", "value", "step_reward")
GROUPED = [name for name in CASES if CASES[name].algorithm.group_baseline]
DEFAULT = [algorithm.name for algorithm in objectives.every_algorithm()]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def batch_of(name: str) -> tuple[jax.Array, Signals]:
    return pairs_or_groups(2 if name.startswith("dpo") else 4)


@cache
def pairs_or_groups(group: int) -> tuple[jax.Array, Signals]:
    logp, signals = batch(group=group)
    return jnp.asarray(logp), signals


def run(algorithm: Algorithm, logp: jax.Array, signals: Signals, prepared: Any = None) -> tuple[Any, Any, dict[str, Any]]:
    """(loss, gradient, aux)."""
    advantage, weight = prepare(algorithm, signals) if prepared is None else prepared

    def loss(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return policy_loss(algorithm, x, signals, advantage=advantage, weight=weight)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    return value, gradient, aux


@cache
def untouched(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """What `run` gives for the batch itself, which most properties compare with."""
    return run(CASES[name].algorithm, *batch_of(name))


def same(a: Any, b: Any, *, tolerance: float = 1e-12) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


def pad(tree: Any, width: tuple[tuple[int, int], ...]) -> Any:
    return jax.tree.map(lambda x: jnp.pad(x, width[: x.ndim]), tree)


# ------------------------------------------------- padding


@pytest.mark.parametrize("junk", [-np.inf, np.nan])
def test_what_masked_tokens_hold_is_invisible(name: str, junk: float):
    logp, signals = batch_of(name)
    bad = signals._replace(**{field: jnp.where(signals.mask, getattr(signals, field), junk) for field in PER_TOKEN})
    dirty = run(CASES[name].algorithm, jnp.where(signals.mask, logp, junk), bad)
    jax.tree.map(np.testing.assert_array_equal, untouched(name), dirty)
    hidden = ~np.asarray(signals.mask)
    assert (np.asarray(dirty[1])[hidden] == 0).all() and (np.asarray(dirty[2]["coefficient"])[hidden] == 0).all()


def test_a_wider_batch_and_empty_groups_change_nothing(name: str):
    logp, signals = batch_of(name)
    loss, gradient, aux = untouched(name)
    width = ((0, 2), (0, 0), (0, 3))
    # ones and not zeros, so that nothing is right by being 0
    signals_padded = jax.tree.map(lambda x: jnp.pad(x, width[: x.ndim], constant_values=1), signals)
    signals_padded = signals_padded._replace(mask=pad(signals.mask, width))
    padded = run(CASES[name].algorithm, pad(logp, width), signals_padded)
    same(padded[0], loss)
    same(padded[1], pad(gradient, width))
    same({k: v for k, v in padded[2].items() if k != "coefficient"}, {k: v for k, v in aux.items() if k != "coefficient"})


# ------------------------------------------------- the order and the cut of a batch


def test_micro_batches_of_whole_groups_add_up(name: str):
    logp, signals = batch_of(name)
    algorithm = CASES[name].algorithm
    advantage, weight = prepare(algorithm, signals)
    token_weight = weights.token_mean(signals.mask)
    whole = untouched(name)
    parts = []
    for i in range(P):
        x, s, a, w, tw = jax.tree.map(lambda x, i=i: x[i : i + 1], (logp, signals, advantage, weight, token_weight))
        loss = partial(policy_loss, algorithm, signals=s, advantage=a, weight=w, token_weight=tw)
        parts.append(jax.value_and_grad(lambda x, loss=loss: loss(x), has_aux=True)(x))
    same(sum(part[0][0] for part in parts), whole[0])
    same(jnp.concatenate([part[1] for part in parts]), whole[1])
    merged = combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *[part[0][1] for part in parts]))
    same(merged, whole[2])


def test_permuted_rows_and_groups_permute_the_gradient(name: str):
    logp, signals = batch_of(name)
    loss, gradient, _ = untouched(name)
    problems = np.array([2, 0, 1])
    rows = np.arange(logp.shape[1]) if name.startswith("dpo") else np.array([2, 0, 3, 1])  # a pair has an order
    per_problem = {"greedy_reward"}

    def shuffle(field: str, x: jax.Array) -> jax.Array:
        return x[problems] if field in per_problem else x[problems][:, rows]

    shuffled = Signals(**{f: x if x is None else shuffle(f, x) for f, x in signals._asdict().items()})
    got = run(CASES[name].algorithm, logp[problems][:, rows], shuffled)
    same(got[0], loss)
    same(got[1], gradient[problems][:, rows])


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dpo")])
def test_packed_rows_are_the_same_completions(name: str):
    """All completions behind each other in one row, told apart by their segments; prepared before they are packed."""
    logp, signals = batch_of(name)
    prepared = prepare(CASES[name].algorithm, signals)
    loss, gradient, aux = untouched(name)
    row = (1, 1, logp.size)
    segments = jnp.broadcast_to(jnp.arange(logp.size // T)[:, None], (logp.size // T, T)).reshape(row)
    per_token = {f: getattr(signals, f).reshape(row) for f in (*PER_TOKEN, "mask", "step_end")}
    packed = signals._replace(**per_token, segments=segments, reward=None, value_behind=None, greedy_reward=None, truncated=None)
    algorithm = CASES[name].algorithm
    if algorithm.needs & {"reward", "steps"}:
        with pytest.raises(ValueError, match="packed row has no one reward"):
            prepare(algorithm, packed._replace(reward=jnp.ones((1, 1)), greedy_reward=jnp.ones(1)))
    else:
        same(prepare(algorithm, packed), jax.tree.map(lambda x: x.reshape(row), prepared))
    got = run(algorithm, logp.reshape(row), packed, jax.tree.map(lambda x: x.reshape(row), prepared))
    same(got[0], loss)
    same(got[1].reshape(logp.shape), gradient)
    same(got[2]["policy/clip_fraction"], aux["policy/clip_fraction"])


# ------------------------------------------------- compilation, vectorisation, devices


def all_of(logp: dict[int, jax.Array], signals: dict[int, Signals]) -> dict[str, Any]:
    """Every algorithm in one program, by group size; two compilations instead of two for each."""
    out = {}
    for name in DEFAULT:
        group = 2 if name.startswith("dpo") else 4
        out[name] = run(CASES[name].algorithm, logp[group], signals[group])
    return out


def eight_problems() -> tuple[dict[int, jax.Array], dict[int, Signals]]:
    logp, signals = {}, {}
    for group in (2, 4):
        batches = [batch(seed, group=group) for seed in range(3)]
        logp[group] = jnp.concatenate([jnp.asarray(b[0]) for b in batches])[:8]
        signals[group] = jax.tree.map(lambda *x: jnp.concatenate(x)[:8], *[b[1] for b in batches])
    return logp, signals


@pytest.mark.slow
def test_jit_and_eight_devices_are_no_jit_on_one():
    inputs = eight_problems()
    plain = all_of(*inputs)
    single = jax.jit(all_of)(*inputs)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    sharded = jax.jit(all_of)(*spread)
    assert len(sharded["grpo"][1].sharding.device_set) == 8
    for name in DEFAULT:
        same(single[name], plain[name], tolerance=1e-11)
        same(sharded[name], plain[name], tolerance=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT)
def test_vmap_is_a_loop(name: str):
    logp, signals = batch_of(name)
    moved = jnp.stack([logp, logp + 0.1])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), signals)
    got = jax.vmap(partial(run, CASES[name].algorithm))(moved, stacked)
    for i, expected in enumerate((untouched(name), run(CASES[name].algorithm, moved[1], signals))):
        same(jax.tree.map(lambda x, i=i: x[i], got), expected)


# ------------------------------------------------- rewards


@pytest.mark.parametrize("name", [n for n in GROUPED if n != "maxrl" and "steps" not in CASES[n].algorithm.needs])
def test_a_group_baseline_does_not_see_a_shift_of_the_reward(name: str):
    logp, signals = batch_of(name)
    shift = jnp.asarray([[5.0], [5.0], [5.0]]) if name == "lite_ppo" else jnp.asarray([[5.0], [-3.0], [1.0]])
    shifted = signals._replace(reward=signals.reward + shift)
    same(prepare(CASES[name].algorithm, shifted), prepare(CASES[name].algorithm, signals), tolerance=1e-9)


@pytest.mark.parametrize(
    "name", ["grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "maxrl", "lite_ppo", "reinforce_plus_plus_baseline"]
)
def test_a_divided_baseline_does_not_see_the_rewards_scale(name: str):
    _, signals = batch_of(name)
    scaled = signals._replace(reward=signals.reward * 10)
    # the epsilon beside the deviation is the only thing that does
    same(prepare(CASES[name].algorithm, scaled), prepare(CASES[name].algorithm, signals), tolerance=1e-4)


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "kimi_k15", "reinforce", "remax"])
def test_an_undivided_baseline_follows_the_rewards_scale(name: str):
    _, signals = batch_of(name)
    scaled = signals._replace(reward=signals.reward * 10, greedy_reward=signals.greedy_reward * 10)
    same(prepare(CASES[name].algorithm, scaled)[0], 10 * prepare(CASES[name].algorithm, signals)[0])


# ------------------------------------------------- the first update after sampling


@pytest.mark.parametrize("name", DEFAULT)
def test_on_its_first_update_nothing_is_clipped(name: str):
    logp, signals = batch_of(name)
    _, _, aux = run(CASES[name].algorithm, logp, signals._replace(logp_old=None))
    assert aux["policy/clip_fraction"] == 0.0
    assert aux["policy/ratio_min"] == aux["policy/ratio_max"] == 1.0


@pytest.mark.parametrize("name", ["gspo", "gmpo", "cispo", "sapo", "dapo"])
def test_on_its_first_update_the_coefficient_is_grpos(name: str):
    """With beta 0; only the weights differ."""
    logp, signals = batch_of(name)
    signals = signals._replace(logp_old=None)
    expected = run(objectives.grpo(beta=0.0), logp, signals)[2]["coefficient"]
    same(run(CASES[name].algorithm, logp, signals)[2]["coefficient"], expected)
    same(expected, prepare(objectives.grpo(), signals)[0])


def test_other_identities_of_the_first_update():
    logp, signals = batch_of("grpo")
    first = signals._replace(logp_old=None)

    def coefficient(algorithm: Algorithm, signals: Signals = first) -> jax.Array:
        return run(algorithm, logp, signals)[2]["coefficient"]

    centred = coefficient(objectives.dr_grpo())
    same(coefficient(objectives.kimi_k15()), centred)
    same(coefficient(objectives.rloo()), centred * 4 / 3)
    at_reference = first._replace(logp_ref=logp)  # at the reference k3 pulls nowhere
    same(coefficient(objectives.grpo(), at_reference), coefficient(objectives.grpo(beta=0.0)))
    own_sampler = first._replace(logp_behaviour=logp)
    corrected = objectives.with_sampler_correction(objectives.dapo(), kind="truncate", high=2.0)
    same(coefficient(corrected, own_sampler), coefficient(objectives.dapo()))
    same(coefficient(objectives.decoupled_ppo(), own_sampler), prepare(objectives.decoupled_ppo(), signals)[0])
    value_free = first._replace(value=jnp.zeros_like(first.value), truncated=jnp.zeros_like(first.truncated))
    outcome = jnp.where(first.mask, first.reward[:, :, None], 0.0)
    same(coefficient(objectives.ppo(lambda_=1.0), value_free), outcome)
    one_step = first._replace(
        step_end=objectives.advantages.at_last_token(jnp.ones_like(first.reward), first.mask) > 0,
        step_reward=jnp.broadcast_to(first.reward[:, :, None], first.mask.shape),
    )
    full = one_step._replace(mask=first.mask.at[1, 2].set(True))  # no empty completion, whose reward would count in one only
    end = objectives.advantages.at_last_token(jnp.ones_like(full.reward), full.mask) > 0
    same(coefficient(objectives.gspo_token(), full._replace(step_end=end)), coefficient(objectives.gspo(), full))
    same(coefficient(objectives.grpo_process(), full._replace(step_end=end)), coefficient(objectives.grpo(), full))


def test_a_centred_group_has_zero_loss_and_a_gradient():
    """Users report it as a bug; it is the first update of a batch, and right."""
    logp, signals = batch_of("grpo")
    signals = signals._replace(logp_old=None, mask=jnp.ones_like(signals.mask))
    loss, gradient, _ = run(objectives.grpo(beta=0.0), logp, signals)
    np.testing.assert_allclose(loss, 0.0, atol=1e-12)
    assert np.abs(gradient).max() > 1e-2


# ------------------------------------------------- edges


def test_an_all_masked_batch_is_zero_and_finite(name: str):
    logp, signals = batch_of(name)
    signals = signals._replace(mask=jnp.zeros_like(signals.mask))
    loss, gradient, aux = run(CASES[name].algorithm, jnp.full(logp.shape, -jnp.inf), signals)
    assert loss == 0 and (np.asarray(gradient) == 0).all()
    assert all(np.isfinite(value).all() for value in aux.values())


@pytest.mark.parametrize("name", [n for n in GROUPED if "steps" not in CASES[n].algorithm.needs])
def test_equal_rewards_get_exactly_no_push_in_float32(name: str):
    """Left to floating point seven rewards of 0.7 would be pushed; with KL in the reward they are not equal."""
    if "sampled" in CASES[name].algorithm.needs:
        pytest.skip("the reward holds a divergence")
    mask, reward = jnp.ones((2, 7, T), bool), jnp.full((2, 7), 0.7, jnp.float32)
    advantage, _ = prepare(CASES[name].algorithm, all_signals(mask, reward, jnp.full(mask.shape, -1.0, jnp.float32)))
    assert (np.asarray(advantage) == 0).all()


def all_signals(mask: jax.Array, reward: jax.Array, logp: jax.Array) -> Signals:
    return Signals(
        mask=mask,
        reward=reward,
        value=jnp.zeros_like(logp),
        greedy_reward=reward[:, 0],
        step_reward=jnp.broadcast_to(reward[:, :, None], mask.shape),
        step_end=mask,
        **{field: logp for field in ("logp_old", "logp_ref", "logp_behaviour", "logp_teacher")},
    )


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_is_refused(unchecked: None, name: str):
    logp, signals = batch_of(name)
    fields = {f: x if x is None or f == "greedy_reward" else x[:, :1] for f, x in signals._asdict().items()}
    with pytest.raises(ValueError, match="group of 1"):
        prepare(CASES[name].algorithm, Signals(**fields))


@pytest.mark.parametrize("name", [n for n in CASES if n not in GROUPED and not n.startswith("dpo")])
def test_a_group_of_one_is_enough_without_a_group_baseline(name: str):
    logp, signals = batch_of(name)
    fields = {f: x if x is None or f == "greedy_reward" else x[:, :1] for f, x in signals._asdict().items()}
    loss, gradient, _ = run(CASES[name].algorithm, logp[:, :1], Signals(**fields))
    assert np.isfinite(loss) and np.abs(gradient).max() > 0


@pytest.mark.parametrize("far", [80.0, -80.0])
def test_extreme_log_ratios_are_finite_in_float32(name: str, far: float):
    """Both ways at once: half of the tokens have gone 80 nats up, half 80 nats down."""
    logp, signals = batch_of(name)
    sign = jnp.where(jnp.arange(T) % 2 == 0, far, -far)[None, None, :]
    logp = logp.astype(jnp.float32)
    fields = {f: (logp + sign).astype(jnp.float32) for f in ("logp_old", "logp_ref", "logp_teacher", "logp_behaviour")}
    loss, gradient, aux = run(CASES[name].algorithm, logp, signals._replace(**fields))
    assert loss.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in (loss, gradient, *aux.values()))


def test_bfloat16_goes_in_and_float32_is_computed_with(name: str):
    """Exactly what float32 gives for the same rounded numbers; a ratio or a baseline in bfloat16 would not be."""
    logp, signals = batch_of(name)

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    low = cast((logp, signals), jnp.bfloat16)
    with jax.enable_x64(False):
        loss, gradient, aux = run(CASES[name].algorithm, *low)
        wide = run(CASES[name].algorithm, *cast(low, jnp.float32))
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert {value.dtype for value in aux.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(loss, wide[0])
    np.testing.assert_array_equal(gradient, wide[1].astype(jnp.bfloat16))


def test_every_algorithm_reports_the_same_names():
    names = {name: set(untouched(name)[2]) for name in DEFAULT}
    expected = {
        "coefficient",
        *(f"policy/{n}" for n in ("objective", "ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "kl_ref")),
    }
    assert all(found == expected for found in names.values())


def test_diagnostics_count_chosen_tokens_only():
    logp, signals = batch_of("grpo")
    _, _, aux = run(objectives.grpo(), logp, signals)
    mask = np.asarray(signals.mask)
    ratio, ell = np.exp(logp - signals.logp_old)[mask], (logp - signals.logp_ref)[mask]
    a = np.asarray(prepare(objectives.grpo(), signals)[0])[mask]
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
    logp, signals = batch_of("dapo")
    _, _, aux = run(objectives.dapo(), logp, signals._replace(logp_old=logp - shift))
    np.testing.assert_allclose([aux["policy/ratio_min"], aux["policy/ratio_max"]], np.exp(shift), rtol=1e-12)
