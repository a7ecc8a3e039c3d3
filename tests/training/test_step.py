"""Every algorithm that the loop can feed makes an update; the others are refused by name before anything is built."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason import objectives
from jaxreason.pipelines import experiment
from jaxreason.training import state as states
from jaxreason.training.optimizer import make_optimizer
from jaxreason.training.step import PROVIDED, Split, make_update

from .test_mesh import ONE, OPTIMIZER, G, P, make, rollouts

EVERY = objectives.every_algorithm()
FED = [a for a in EVERY if "reward" in a.needs and a.needs <= PROVIDED]
REFUSED = [a for a in EVERY if a not in FED]


@pytest.mark.parametrize("algorithm", [*FED, objectives.rloo(beta=0.1)], ids=lambda a: a.name)
def test_the_update_takes_any_algorithm_that_it_can_feed(algorithm: objectives.Algorithm):
    """Traced, which is where shapes, dtypes and missing signals show; two updates in micro-batches, so that old is needed."""
    mesh, model, params, reference = make(ONE, "float32")
    optimizer = make_optimizer(OPTIMIZER, steps=4)
    update = make_update(model, algorithm, optimizer, temperature=0.9, split=Split(4, 2))
    state = states.create(model, optimizer, mesh, params)
    after, metrics, advantage = jax.eval_shape(update, state, reference, rollouts(mesh, "float32"))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert advantage.shape == (P, G)
    assert {"policy/loss", "policy/clip_fraction", "policy/ratio_mean"} <= set(metrics) and "coefficient" not in metrics
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


@pytest.mark.parametrize("algorithm", REFUSED, ids=lambda a: a.name)
def test_an_algorithm_that_the_loop_cannot_feed_is_refused_by_name(algorithm: objectives.Algorithm, tmp_path: Path):
    config = configs.load("quickstart:tiny", [f"--config.algorithm.name={algorithm.name}", "--config.algorithm.kwargs={}"])
    with pytest.raises(ValueError, match=f"'{algorithm.name}', which (needs|learns from no reward)"):
        experiment.build(config, tmp_path)
