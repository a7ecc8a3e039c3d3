"""The critic that a config asks for: whether its algorithm has one, where it starts from, and whether the two fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxreason import checking
from jaxreason import config as configs
from jaxreason.batch import TrainState
from jaxreason.config import Config
from jaxreason.models import decoder, heads, huggingface, lora, spec
from jaxreason.models.config import Architecture
from jaxreason.models.families import Head
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer
from jaxreason.objectives import Algorithm
from jaxreason.pipelines.folder import differences
from jaxreason.training import state as states
from jaxreason.training.critic import Critic, CriticConfig
from jaxreason.training.optimizer import make_optimizer

ZEROS = Head("token", 1)  # of a critic that starts as the policy


def build(config: Config, algorithm: Algorithm, architecture: Architecture, tokenizer: Tokenizer, mesh: Mesh) -> Critic | None:
    """The critic of an algorithm that needs values, None for another; a ValueError where its settings cannot hold."""
    c, online = config.critic, config.online
    if not online.steps:
        return None
    if "value" not in algorithm.needs:
        changed = differences(configs.to_dict(CriticConfig()), configs.to_dict(c))
        if changed:
            key, default, given = changed[0]
            raise ValueError(
                f"config.critic.{key} is {given!r}, and algorithm '{algorithm.name}' has no critic: leave it at {default!r}, or "
                "name one that has, such as 'ppo'"
            )
        return None
    if config.sampling.parking.step_tokens:
        raise ValueError(
            f"config.sampling.parking.step_tokens is {config.sampling.parking.step_tokens}, and algorithm '{algorithm.name}' has a "
            "critic, beside which nothing is parked: set it to 0, or name one without, such as 'grpo'"
        )
    if c.alone_steps >= online.steps:
        raise ValueError(
            f"config.critic.alone_steps is {c.alone_steps} and config.online.steps is {online.steps}, so that the policy would "
            f"never learn: expected at most {online.steps - 1}"
        )
    head = ZEROS
    if c.path:
        head, architecture = _read(config, architecture, tokenizer)
    model = decoder.make_decoder(architecture, config.model.numerics, mesh, head=head)
    if not c.path:
        model = model._replace(specs=model.specs | {"head": model.specs["head"]._replace(init="zeros")})
    spec.check_divisible(model.specs, mesh)
    per_step = online.updates_per_step
    return Critic(
        model._replace(balance_weight=config.model.balance_weight if architecture.experts.count else 0.0),
        make_optimizer(replace(online.optimizer, learning_rate=c.learning_rate), steps=online.steps * per_step),
        clip=c.clip,
        alone_updates=c.alone_steps * per_step,
    )


def _read(config: Config, policy: Architecture, tokenizer: Tokenizer) -> tuple[Head, Architecture]:
    """Head and architecture of the folder that the critic starts from; it must read the policy's tokens."""
    path = config.critic.path
    folder = huggingface.resolve(path)
    head, architecture = huggingface.read_head(folder), huggingface.read_architecture(folder)
    if head.kind == "lm" or head.labels != 1:
        ends = "logits" if head.kind == "lm" else f"{head.labels} scores"
        raise ValueError(
            f"config.critic.path is '{path}', which ends in {ends}, and a value is one number: give the folder of a reward model "
            "with one label, or none, for the policy's own weights"
        )
    checking.check_context(config, architecture, whose="critic")
    # many folders of reward models have no tokenizer: then the sizes must do
    its = load_tokenizer(folder).hf.get_vocab() if (folder / "tokenizer.json").is_file() else None
    ours = tokenizer.hf.get_vocab()
    if architecture.vocab_size < len(tokenizer.hf) or (its is not None and its != ours):
        raise ValueError(
            f"config.critic.path is '{path}', which has another vocabulary than the policy, so that it cannot read its tokens: "
            "give a reward model made from the same base"
        )
    return head, architecture


def initial_state(config: Config, critic: Critic, policy: Any, mesh: Mesh) -> TrainState:
    """A critic that has learnt nothing yet; `policy` are the weights of the policy as its stage begins, perhaps with adapters.

    With LoRA the critic is no adapter: its body is the policy's weights with their adapters merged, and all of it is trained.
    """
    if config.critic.path:
        folder = huggingface.resolve(config.critic.path)
        params = huggingface.load_params(critic.model.specs, folder, dtype=critic.model.numerics.param_dtype, mesh=mesh)
    else:
        params = heads.with_new_head(critic.model, lora.merge(policy), jax.random.key(config.seed), mesh=mesh)
    return states.create(critic.model, critic.optimizer, mesh, params)
