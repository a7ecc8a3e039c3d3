"""Every algorithm that the loop can feed makes an update; the others are refused by name before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason import objectives
from jaxreason.models import decoder
from jaxreason.models.families import Head
from jaxreason.numerics import TokenLaw, token_logprobs
from jaxreason.pipelines import experiment
from jaxreason.training import state as states
from jaxreason.training.critic import Critic
from jaxreason.training.optimizer import make_optimizer
from jaxreason.training.step import PROVIDED, Split, make_update

from .test_mesh import ARCHITECTURE, ONE, OPTIMIZER, G, P, make, rollouts

EVERY = objectives.every_algorithm()
FED = [a for a in EVERY if "reward" in a.needs and a.needs <= PROVIDED]
REFUSED = [a for a in EVERY if a not in FED]


@pytest.mark.parametrize("algorithm", [*FED, objectives.rloo(beta=0.1)], ids=lambda a: a.name)
def test_the_update_takes_any_algorithm_that_it_can_feed(algorithm: objectives.Algorithm):
    """Traced, which is where shapes, dtypes and missing signals show; two updates in micro-batches, so that old is needed."""
    mesh, model, params, reference = make(ONE, "float32")
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    critic, state = None, states.abstract(model, optimizer, mesh)
    if "value" in algorithm.needs:
        critic = Critic(decoder.make_decoder(ARCHITECTURE, model.numerics, mesh, head=Head("token", 1)), optimizer)
        state = replace(state, algorithm=states.abstract(critic.model, optimizer, mesh))
    update = make_update(model, algorithm, optimizer, temperature=0.9, split=Split(4, 2), critic=critic)
    after, metrics, advantage = jax.eval_shape(update, state, reference, rollouts(mesh, "float32"))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert advantage.shape == (P, G)
    assert {"policy/loss", "policy/clip_fraction", "policy/ratio_mean"} <= set(metrics) and "coefficient" not in metrics
    assert ("value/loss" in metrics) == (critic is not None)
    assert ("policy/kl_ref" in metrics) == ("reference" in algorithm.needs)


@pytest.mark.parametrize("name", ["gspo", "reinforce_plus_plus"])
def test_the_first_of_two_updates_starts_at_ratio_one(name: str):
    mesh, model, params, reference = make(ONE, "float32")
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    update = make_update(model, getattr(objectives, name)(), optimizer, temperature=0.9, split=Split(8, 4))
    state = states.create(model, optimizer, mesh, params)
    batch = rollouts(mesh, "float32")
    after, metrics, advantage = jax.jit(update)(state, reference, batch)
    assert metrics["policy/ratio_max"] == 1 and metrics["policy/clip_fraction"] == 0
    assert metrics["optimizer/gradient_norm"] > 1e-3
    assert not np.allclose(*(jax.tree.leaves(s.params)[0] for s in (state, after)))
    assert np.abs(np.asarray(advantage)).max() > 0.1


def test_t14_a_temperature_on_one_side_only():
    """The policy as its own reference and its own past: at a temperature of 0.7 no divergence, ratio 1, nothing clipped."""
    mesh, model, params, _ = make(ONE, "float32")
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    update = make_update(model, objectives.grpo(beta=0.04), optimizer, temperature=0.7, split=Split(8, 8, epochs=2))
    state = states.create(model, optimizer, mesh, params)
    _, metrics, _ = jax.jit(update)(state, params, rollouts(mesh, "float32").replace(reward=np.zeros((P, G), np.float32)))
    # equal rewards: only the optimiser's weight decay moves anything between the two updates
    assert metrics["policy/kl_ref"] < 1e-6 and metrics["policy/clip_fraction"] == 0
    np.testing.assert_allclose([metrics["policy/ratio_min"], metrics["policy/ratio_max"]], 1, atol=2e-3)


def test_t15_the_entropy_of_logits_that_were_not_scaled():
    """Entropy and log-probability are those of the law that is sampled from, softmax(z/T)."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(1, 5, 8)).astype(np.float32), rng.normal(size=(8, 11)).astype(np.float32)
    token = rng.integers(0, 11, (1, 5))
    logits = (hidden @ head).astype(np.float64) / 0.5
    law = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    arrays = [jax.numpy.asarray(x) for x in (hidden, head, token.astype(np.int32))]
    logp, entropy = token_logprobs(
        arrays[0], lambda h: h @ arrays[1], arrays[2], law=TokenLaw(lambda z, *_: z / 0.5), chunk_tokens=4
    )
    np.testing.assert_allclose(logp, np.take_along_axis(law, token[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(law) * law).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("algorithm", REFUSED, ids=lambda a: a.name)
def test_an_algorithm_that_the_loop_cannot_feed_is_refused_by_name(algorithm: objectives.Algorithm, tmp_path: Path):
    config = configs.load("quickstart:tiny", [f"--config.algorithm.name={algorithm.name}", "--config.algorithm.kwargs={}"])
    with pytest.raises(ValueError, match=f"'{algorithm.name}', which (needs|learns from no reward)"):
        experiment.build(config, tmp_path)
