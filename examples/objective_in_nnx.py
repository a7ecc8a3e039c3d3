"""Dr. GRPO in a Flax nnx loop: a small recurrent policy, `nnx.Optimizer`, and from this project only `jaxreason.objectives`.

The policy sees the problem's letter and writes up to T tokens; token 0 ends one. The reward is the share of the T slots that
count upwards from the letter. Micro-batches of whole groups add up to the batch's gradient. Seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxreason import objectives

P, G, T, VOCABULARY, HIDDEN = 8, 16, 8, 10, 32  # problems, completions of each, tokens
STEPS, UPDATES, MICROBATCHES, STOP = 60, 2, 2, 0


class Policy(nnx.Module):
    """A state of HIDDEN numbers, updated by each token."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.mix = nnx.Linear(2 * HIDDEN, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, state, token):
        """(state [..., HIDDEN], token [...]) -> (the next state, logits [..., VOCABULARY])."""
        state = jnp.tanh(self.mix(jnp.concatenate([state, self.embed(token)], axis=-1)))
        return state, self.head(state)


def log_probs(policy, first, completion):
    """[p, G, T]: log-probabilities of the completions' tokens, each given the problem's `first` token and those before."""

    def read(carry, chosen):
        state, logits = policy(*carry)
        return (state, chosen), jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], axis=-1)[..., 0]

    rows = completion.shape[:2]
    start = jnp.zeros((*rows, HIDDEN)), jnp.broadcast_to(first[:, None], rows)
    return jnp.moveaxis(jax.lax.scan(read, start, jnp.moveaxis(completion, -1, 0))[1], 0, -1)


def sample(policy, first, key):
    """G completions [P, G, T] of each problem, and the mask: True up to and including the stop token."""

    def write(carry, key):
        state, logits = policy(*carry)
        chosen = jax.random.categorical(key, logits)
        return (state, chosen), chosen

    start = jnp.zeros((P, G, HIDDEN)), jnp.broadcast_to(first[:, None], (P, G))
    completion = jnp.moveaxis(jax.lax.scan(write, start, jax.random.split(key, T))[1], 0, -1)
    stops = jnp.cumsum(completion == STOP, axis=-1)
    return completion, (stops == 0) | ((stops == 1) & (completion == STOP))


def score(first, completion, mask):
    wanted = (first[:, None, None] + jnp.arange(T)) % (VOCABULARY - 1) + 1
    return jnp.mean(((completion == wanted) & mask).astype(jnp.float32), axis=-1)


algorithm = objectives.dr_grpo(max_completion_tokens=T)


@nnx.jit
def rollout(policy, key):
    first = jax.random.randint(jax.random.fold_in(key, 0), (P,), 1, VOCABULARY)
    completion, mask = sample(policy, first, jax.random.fold_in(key, 1))
    signals = objectives.Signals(
        mask=mask, reward=score(first, completion, mask), logp_old=log_probs(policy, first, completion)
    )  # fmt: skip
    return first, completion, signals, *objectives.prepare(algorithm, signals)  # of the whole batch, before it is cut


@nnx.jit
def update(policy, optimizer, batch, token_weight):
    def loss_fn(policy, first, completion, signals, advantage, weight, token_weight):
        logp = log_probs(policy, first, completion)
        return objectives.policy_loss(
            algorithm, logp, signals, advantage=advantage, weight=weight, token_weight=token_weight
        )  # fmt: skip

    gradient, aux = None, []
    for part in range(MICROBATCHES):  # slices of whole groups; weights are the batch's, so gradients add up
        rows = slice(part * P // MICROBATCHES, (part + 1) * P // MICROBATCHES)
        cut = jax.tree.map(lambda x, rows=rows: x[rows], (*batch, token_weight))
        (_, its_aux), its_gradient = nnx.value_and_grad(loss_fn, has_aux=True)(policy, *cut)
        gradient = its_gradient if gradient is None else jax.tree.map(jnp.add, gradient, its_gradient)
        aux.append(its_aux)
    optimizer.update(policy, gradient)
    return objectives.combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *aux))


policy = Policy(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(policy, optax.adam(0.02), wrt=nnx.Param)
rewards, dropped = [], []
for i in range(STEPS):
    batch = rollout(policy, jax.random.key(i))
    signals = batch[2]
    for _ in range(UPDATES):
        metrics = update(policy, optimizer, batch, objectives.weights.token_mean(signals.mask))
    rewards.append(float(jnp.mean(signals.reward)))
    dropped.append(float(metrics["policy/clip_fraction"]))
print(f"clip fraction at most {max(dropped):.3f}")
print(f"reward before: {rewards[0]:.3f}\nreward after: {rewards[-1]:.3f}")
