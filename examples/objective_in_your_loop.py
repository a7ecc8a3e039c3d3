"""GRPO in a training loop of your own: jax, optax, and from this project only `jaxreason.objectives`.

The policy is a table of bigram logits. It writes sequences of up to T tokens, token 0 ends one, and the reward is the
share of the T slots that count upwards: each token its predecessor plus one, and 1 after the last. Seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax

from jaxreason import objectives

P, G, T, VOCABULARY = 8, 16, 10, 12  # problems, completions of each, tokens
STEPS, UPDATES, STOP = 60, 2, 0  # two updates per batch, so that the ratio and its clip have work to do


def predecessors(first, completion):
    """The token before each of `completion` [P, G, T], which follows the problem's `first` token [P]."""
    return jnp.concatenate([jnp.broadcast_to(first[:, None, None], (P, G, 1)), completion[:, :, :-1]], axis=-1)


def log_probs(table, first, completion):
    logp = jax.nn.log_softmax(table)[predecessors(first, completion)]
    return jnp.take_along_axis(logp, completion[..., None], axis=-1)[..., 0]


def sample(table, first, key):
    """G completions [P, G, T] of each problem, and the mask: True up to and including the stop token."""

    def token(previous, key):
        chosen = jax.random.categorical(key, table[previous])
        return chosen, chosen

    start = jnp.broadcast_to(first[:, None], (P, G))
    completion = jnp.moveaxis(jax.lax.scan(token, start, jax.random.split(key, T))[1], 0, -1)
    stops = jnp.cumsum(completion == STOP, axis=-1)
    return completion, (stops == 0) | ((stops == 1) & (completion == STOP))


def score(first, completion, mask):
    right = (completion == predecessors(first, completion) % (VOCABULARY - 1) + 1) & mask
    return jnp.mean(right.astype(jnp.float32), axis=-1)


algorithm = objectives.grpo(beta=0.001, clip_high=0.28)
optimizer = optax.adam(0.2)


@jax.jit
def step(table, opt_state, reference, key):
    first = jax.random.randint(jax.random.fold_in(key, 0), (P,), 1, VOCABULARY)
    completion, mask = sample(table, first, jax.random.fold_in(key, 1))
    signals = objectives.Signals(
        mask=mask,
        reward=score(first, completion, mask),
        logp_old=log_probs(table, first, completion),
        logp_ref=log_probs(reference, first, completion),
    )
    advantage, weight = objectives.prepare(algorithm, signals)

    def loss_fn(table):
        logp = log_probs(table, first, completion)
        return objectives.policy_loss(algorithm, logp, signals, advantage=advantage, weight=weight)

    for _ in range(UPDATES):
        gradient, aux = jax.grad(loss_fn, has_aux=True)(table)
        updates, opt_state = optimizer.update(gradient, opt_state)
        table = optax.apply_updates(table, updates)
    return table, opt_state, jnp.mean(signals.reward), aux


reference = table = jnp.zeros((VOCABULARY, VOCABULARY))
opt_state, rewards, clipped = optimizer.init(table), [], []
for i in range(STEPS):
    table, opt_state, reward, aux = step(table, opt_state, reference, jax.random.key(i))
    rewards.append(float(reward))
    clipped.append(float(aux["policy/clip_fraction"]))
print(f"clip fraction, largest: {max(clipped):.3f}; KL to the reference, at the end: {aux['policy/kl_ref']:.3f}")
print(f"reward before: {rewards[0]:.3f}\nreward after: {rewards[-1]:.3f}")
