"""A model of your own as the policy: a Flax nnx module, its completions sampled, scored and learnt from by GRPO.

Prompts are one to three numbers, padded on the left. A completion is to count on from the last of them, modulo the vocabulary; the
reward is the share of its tokens that do. Seconds on a CPU; on more devices the same script splits the problems among them.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxreason import objectives, sharding
from jaxreason.batch import PromptBatch, RolloutBatch
from jaxreason.models import adapters
from jaxreason.sampling.rollout import sample
from jaxreason.training import state as states
from jaxreason.training.step import Split, make_update

VOCABULARY, WIDTH, HEADS, LAYERS = 8, 32, 4, 1
P, G, TP, T, STEPS = 32, 16, 3, 3, 60  # problems a step, completions of each, tokens of prompt and completion


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask[:, None])  # for all heads
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed, self.places = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(TP + T, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, positions, mask):
        """[B, N], [B, N], [B, N, N] -> logits [B, N, VOCABULARY]: all that is asked of a module."""
        x = self.embed(tokens) + self.places(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def draw(key):
    numbers, lengths = jax.random.split(key)
    mask = jnp.arange(TP)[None] >= jax.random.randint(lengths, (P, 1), 0, TP)
    prompt = jax.random.randint(numbers, (P, TP), 0, VOCABULARY)
    return PromptBatch(prompt, mask, problem=jnp.arange(P, dtype=jnp.uint32), answer=prompt[:, -1])


mesh = sharding.make_mesh(sharding.MeshConfig())
model, params = adapters.from_nnx(Transformer(rngs=nnx.Rngs(0)), mesh=mesh)
optimizer = optax.adam(3e-3)
update = make_update(model, objectives.grpo(beta=0.02), optimizer, temperature=1.0, split=Split(P, P))


@jax.jit
def step(state, reference, key):
    prompts = jax.lax.with_sharding_constraint(draw(jax.random.fold_in(key, 0)), sharding.named(mesh, ("problems",)))
    options = {"group": G, "max_completion_tokens": T, "eos_ids": (), "pad_id": 0}
    out = sample(model, state.params, prompts, jax.random.fold_in(key, 1), **options)
    right = out.completion == (prompts.answer[:, None, None] + jnp.arange(1, T + 1)) % VOCABULARY
    reward = jnp.mean(right, axis=-1, dtype=jnp.float32)
    batch = RolloutBatch(prompts.prompt, prompts.prompt_mask, out.completion, out.mask, out.truncated, out.logp, reward)
    state, metrics, _ = update(state, reference, batch)
    return state, {"reward": jnp.mean(reward), "gap": metrics["policy/sampler_gap"]}


state = states.create(model, optimizer, mesh, params)
for i in range(STEPS + 1):
    state, metrics = step(state, params, jax.random.key(i))
    if i % 10 == 0:
        print(f"step {i:3d}  reward {metrics['reward']:.3f}  sampler gap {metrics['gap']:.1e}")
