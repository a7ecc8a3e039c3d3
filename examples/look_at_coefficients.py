"""Looks at the coefficient alone: the one number per token by which an objective pushes, before there is any model.

Two completions of one problem, the first right and the second wrong, after some updates: the ratios have moved away from 1.
"""

import jax.numpy as jnp

from jaxreason import objectives

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
ratio = jnp.array([[[1.0, 1.25, 1.4, 0.7, 1.1], [1.0, 1.4, 0.85, 0.7, 1.0]]])  # [P, G, T]
logp_old = jnp.full(ratio.shape, -1.0)
logp = logp_old + jnp.log(ratio)
mask = jnp.array([[[True] * 5, [True] * 4 + [False]]])  # the second is a token shorter
signals = objectives.Signals(mask=mask, reward=jnp.array([[1.0, 0.0]]), logp_old=logp_old)

# one way: an algorithm, as in training
algorithm = objectives.dapo(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
advantage, weight = objectives.prepare(algorithm, signals)
loss, aux = objectives.policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)

# another: the coefficient's own function, with any advantage
coefficient, _ = objectives.coefficients.clipped(logp, logp_old, advantage, mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
assert jnp.array_equal(coefficient, aux["coefficient"])

print(f"{algorithm.name}: ratios from {1 - CLIP_LOW} to {1 + CLIP_HIGH}, weight {weight[0, 0, 0]:.3f} a token\n")
print("completion  token  ratio  advantage  coefficient")
for g in range(mask.shape[1]):
    for t in range(mask.shape[2]):
        if not mask[0, g, t]:
            verdict = "masked"
        elif coefficient[0, g, t] == 0:
            verdict = "dropped"
        else:
            verdict = "kept"
        print(f"{g:10d}  {t:5d}  {ratio[0, g, t]:5.2f}  {advantage[0, g, t]:9.2f}  {coefficient[0, g, t]:11.2f}  {verdict}")
print(f"\nloss {loss:.4f}, clip fraction {aux['policy/clip_fraction']:.3f}")
