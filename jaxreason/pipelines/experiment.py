"""What a config stands for, built and checked: mesh, task, tokenizer, model, algorithm, rewards. Everything but weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreason import checking, objectives, sharding, tasks
from jaxreason import config as configs
from jaxreason.config import Config
from jaxreason.data.loader import Stream, problem_stream
from jaxreason.models import config as model_config
from jaxreason.models import decoder, families, heads, huggingface, lora, spec
from jaxreason.models.config import Architecture
from jaxreason.models.decoder import Model
from jaxreason.models.spec import Specs
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.objectives import Algorithm
from jaxreason.pipelines import critic as critics
from jaxreason.pipelines.folder import PARTIAL_TOKENIZER
from jaxreason.sampling import law, stops
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.sampling.stops import StopStrings
from jaxreason.tasks.task import Task
from jaxreason.training import supervised
from jaxreason.training.collect import Scoring, make_scoring
from jaxreason.training.critic import Critic
from jaxreason.training.evaluate import Evaluate, make_evaluate
from jaxreason.training.step import PROVIDED
from jaxreason.types import Problem

INITIALISING = 1  # what the seed's key is folded with for random weights
SHOWN = 3  # of the problems whose prompts are too long


class Overlong(NamedTuple):
    """Problems whose prompts are too long: how many, and where the first few are from."""

    count: int = 0
    first: tuple[str, ...] = ()


class Experiment(NamedTuple):
    """What a config stands for, built: everything but weights."""

    config: Config
    mesh: Mesh
    task: Task
    tokenizer: Tokenizer
    architecture: Architecture
    specs: Specs  # of all its weights
    model: Model  # its specs are those of what is trained: the same, or adapters
    algorithm: Algorithm
    scoring: Scoring
    source: Path | None  # the checkpoint's folder, where there is one
    stop: StopStrings | None  # strings that end completions
    overlong: Overlong  # of the held-out problems; they are cut, or `task` no longer has them
    critic: Critic | None  # where the algorithm has one


def build(config: Config, workdir: Path, *, devices: Sequence[Any] | None = None) -> Experiment:
    """Resolves every name of the config and checks every size; nothing is compiled, and no weight is read."""
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    algorithm = make_algorithm(config, mesh)
    if config.model.weights not in ("checkpoint", "random"):
        raise ValueError(f"config.model.weights is '{config.model.weights}': expected 'checkpoint' or 'random'")
    source = huggingface.resolve(config.model.path) if config.model.path else None
    architecture = huggingface.read_architecture(source) if source else families.of_sizes(config.model.architecture)
    check_architecture(config, architecture)
    task = configs.make(tasks, config.task, key="task", returns="Task")
    supervised.check_phases(config.supervised, task)
    folder = source
    if folder is None:
        if not task.words:
            raise ValueError(
                f"config.model.path is empty, and task '{task.name}' brings no vocabulary of its own: give a checkpoint's "
                "folder with --config.model.path=..."
            )
        folder = workdir / "tokenizer"
        if not folder.exists() and jax.process_index() == 0:
            unfinished = workdir / PARTIAL_TOKENIZER
            shutil.rmtree(unfinished, ignore_errors=True)
            save_word_tokenizer(task.words, unfinished)
            unfinished.rename(folder)  # there in full or, after a kill, not at all
        sharding.barrier("tokenizer")
    tokenizer = load_tokenizer(folder)
    tokens = len(tokenizer.hf)
    if tokens > architecture.vocab_size:
        remedy = f"give a checkpoint whose tokenizer fits it, {source} does not" if source else f"raise it to {tokens} or more"
        raise ValueError(
            f"config.model.architecture.vocab_size is {architecture.vocab_size}, and the tokenizer has {tokens} tokens: {remedy}"
        )
    e = assemble(config, mesh, algorithm, architecture, task=task, tokenizer=tokenizer, source=source)
    fitting, overlong = _kept(task.heldout, "held-out", task, tokenizer, config.sampling)
    heldout = [task.heldout[i] for i in fitting]
    if not heldout:
        raise ValueError(
            f"config.sampling.max_prompt_tokens is {config.sampling.max_prompt_tokens}, and every held-out prompt of task "
            f"'{task.name}' is longer: raise it"
        )
    if source is None:
        asked = " ".join(message["content"] for message in task.messages(heldout[0]))
        unknown = [piece for piece in dict.fromkeys(tokenizer.unknown(asked)) if piece]
        if unknown:
            raise ValueError(
                f"the prompts of task '{task.name}' hold {', '.join(map(repr, unknown[:5]))}, which the policy's closed "
                "vocabulary does not: set prompt to 'as_it_is', or give a checkpoint's folder with --config.model.path=..."
            )
    return e._replace(task=dataclasses.replace(task, heldout=heldout), overlong=overlong)


def make_algorithm(config: Config, mesh: Mesh) -> Algorithm:
    """The algorithm that the config names; a ValueError where it, or the config's numbers, cannot be trained with on the mesh."""
    checking.check(config, shards=sharding.problem_shards(mesh))
    algorithm = configs.make(
        objectives,
        config.algorithm,
        key="algorithm",
        returns="Algorithm",
        max_completion_tokens=config.sampling.max_completion_tokens,
    )
    if config.online.steps and algorithm.group_baseline and config.online.completions_per_problem < 2:
        raise ValueError(
            f"config.online.completions_per_problem is {config.online.completions_per_problem}, and algorithm '{algorithm.name}' "
            "compares a group's completions with each other: set it to 2 or more"
        )
    missing = ", ".join(sorted(algorithm.needs - PROVIDED))
    if config.online.steps and missing:
        raise ValueError(
            f"config.algorithm.name is '{algorithm.name}', which needs {missing}, and the training loop provides only "
            f"{', '.join(sorted(PROVIDED))}: name another, such as 'grpo', or use jaxreason.objectives in a loop of your own"
        )
    if config.online.steps and "reward" not in algorithm.needs:
        raise ValueError(
            f"config.algorithm.name is '{algorithm.name}', which learns from no reward: name one that does, such as 'grpo'"
        )
    if config.online.updates_per_step > 1 and "old" not in algorithm.needs:
        raise ValueError(
            f"config.online makes {config.online.updates_per_step} updates a step, and algorithm '{algorithm.name}' holds for "
            "rows of the newest policy only: set epochs to 1 and problems_per_update to problems_per_step"
        )
    if config.online.steps and config.sampling.parking.step_tokens and "old" not in algorithm.needs:
        raise ValueError(
            f"config.sampling.parking.step_tokens is {config.sampling.parking.step_tokens}, and algorithm '{algorithm.name}' holds "
            "for rows of the newest policy only, which parked completions are not: set it to 0, or name another, such as 'grpo'"
        )
    return algorithm


def check_architecture(config: Config, architecture: Architecture) -> None:
    """A ValueError where what the config says of the model, or asks of it, does not go with its architecture."""
    if config.model.balance_weight and not architecture.experts.count:
        raise ValueError(
            f"config.model.balance_weight is {config.model.balance_weight}, and the model has no experts: set it to 0, or give a "
            "model that has them"
        )
    model_config.check_numerics(config.model.numerics)
    checking.check_context(config, architecture)


def assemble(
    config: Config,
    mesh: Mesh,
    algorithm: Algorithm,
    architecture: Architecture,
    *,
    task: Task,
    tokenizer: Tokenizer,
    source: Path | None = None,
) -> Experiment:
    """What the parts make together; the tokenizer is asked for its vocabulary only where a rule or a stop string needs it."""
    model = decoder.make_decoder(architecture, config.model.numerics, mesh)._replace(balance_weight=config.model.balance_weight)
    specs = model.specs
    spec.check_divisible(specs, mesh)
    if config.model.lora.rank:
        model = model._replace(specs=lora.declare_lora(specs, config.model.lora))
    critic = critics.build(config, algorithm, architecture, tokenizer, mesh)
    vocabulary = tokenizer.vocabulary(architecture.vocab_size) if reads_vocabulary(config) else []
    task_rules = task.rules or {task.name: task.rule}
    scoring = make_scoring(
        config.reward, vocabulary=vocabulary, eos_ids=tokenizer.eos_ids, config=config.scoring, task_rules=task_rules
    )
    law.check(config.sampling.law, vocab_size=architecture.vocab_size, eos_ids=tokenizer.eos_ids)
    stop = stops.stop_strings(config.sampling.stop, vocabulary)
    return Experiment(
        config, mesh, task, tokenizer, architecture, specs, model, algorithm, scoring, source, stop, Overlong(), critic
    )


def reads_vocabulary(config: Config) -> bool:
    """Whether a step must know the bytes of each token."""
    return bool(config.sampling.stop) or any(part.rule.startswith("traced.") for part in config.reward.values())


def _kept(
    problems: Sequence[Problem], kind: str, task: Task, tokenizer: Tokenizer, sampling: SamplingConfig
) -> tuple[list[int], Overlong]:
    """The indices of the problems to use, and those whose prompts are too long; a ValueError where these are refused."""
    limit = sampling.max_prompt_tokens
    rows = tokenizer.encode_prompts([task.messages(problem) for problem in problems])
    fitting = [index for index, row in enumerate(rows) if len(row) <= limit]
    long = [problem.id for problem, row in zip(problems, rows, strict=True) if len(row) > limit]
    overlong = Overlong(len(long), tuple(task.places.get(each, each) for each in long[:SHOWN]))
    if long and sampling.overlong == "refuse":
        raise ValueError(
            f"config.sampling.overlong is 'refuse', and {len(long)} of {len(rows)} {kind} prompts are longer than "
            f"max_prompt_tokens = {limit}, the first that of {overlong.first[0]}, the longest {max(map(len, rows))} tokens: "
            "raise that, or set overlong to 'cut' or 'leave_out'"
        )
    return list(range(len(rows))) if sampling.overlong == "cut" else fitting, overlong


def check_attention(experiment: Experiment) -> None:
    """A ValueError where an attention that the config names cannot run here: by shapes, before anything is computed.

    A run is evaluated and sampled from without them, so only training asks.
    """
    e, sampling = experiment, experiment.config.sampling
    problems = sharding.problem_shards(e.mesh)
    prompt = jax.ShapeDtypeStruct((problems, sampling.max_prompt_tokens), jnp.int32)
    real = jax.ShapeDtypeStruct(prompt.shape, jnp.bool_)
    completion = jax.ShapeDtypeStruct((problems, 1, sampling.max_completion_tokens), jnp.int32)
    params = spec.abstract(e.specs, dtype=e.model.numerics.param_dtype, mesh=e.mesh)
    jax.eval_shape(e.model.completion_hidden, params, prompt, real, completion)
    jax.eval_shape(lambda *args: e.model.prefill(e.model.prepare_sampling(args[0]), *args[1:]), params, prompt, real)
    if e.critic is not None:
        params = spec.abstract(e.critic.model.specs, dtype=e.model.numerics.param_dtype, mesh=e.mesh)
        jax.eval_shape(partial(heads.values, e.critic.model), params, prompt, real, completion)


def initial_params(experiment: Experiment) -> Any:
    """The checkpoint's weights, or random ones folded from the seed."""
    e = experiment
    if e.source is not None and e.config.model.weights == "checkpoint":
        return huggingface.load_params(e.specs, e.source, dtype=e.model.numerics.param_dtype, mesh=e.mesh)
    return _drawn(e, e.specs)


def initial_adapters(experiment: Experiment) -> Any:
    """Adapters that add nothing yet, of the same type as the weights."""
    return _drawn(experiment, experiment.model.specs)


def _drawn(e: Experiment, specs: Specs) -> Any:
    key = jax.random.fold_in(jax.random.key(e.config.seed), INITIALISING)
    return spec.init(specs, key, dtype=e.model.numerics.param_dtype, mesh=e.mesh)


def exact_model(experiment: Experiment) -> Model:
    """The model that samples with the weights themselves, which are what is trained and exported, and a cache as exact."""
    e, numerics = experiment, experiment.config.model.numerics
    exact = dataclasses.replace(numerics, sampling_weights="", sampling_cache=numerics.matmul_dtype, sampling_attention="")
    return decoder.make_decoder(e.architecture, exact, e.mesh)


def evaluator(experiment: Experiment) -> Evaluate:
    e = experiment
    return make_evaluate(
        exact_model(e),
        e.scoring,
        e.mesh,
        task=e.task,
        tokenizer=e.tokenizer,
        sampling=e.config.sampling,
        config=e.config.evaluation,
        stop=e.stop,
    )


def training_stream(experiment: Experiment) -> tuple[Stream, Overlong]:
    """The stream of training problems, and those whose prompts are too long; of an endless stream that is not known."""
    e = experiment
    if e.task.restrict is not None:
        numbers, overlong = {}, Overlong()
        for label, part in e.task.parts.items():
            if part.train_size is not None:
                problems = [part.train(number) for number in range(part.train_size)]
                numbers[label], left_out = _kept(problems, f"training ({label})", part, e.tokenizer, e.config.sampling)
                overlong = Overlong(overlong.count + left_out.count, (*overlong.first, *left_out.first)[:SHOWN])
        return problem_stream(e.task.restrict(numbers), numbers=None, seed=e.config.seed), overlong
    if e.task.train_size is None:
        return problem_stream(e.task.train, numbers=None, seed=e.config.seed), Overlong()
    if not e.task.train_size:
        raise ValueError(
            f"task '{e.task.name}' has no problems to train on: name their split or file, where it has one, or another task"
        )
    problems = [e.task.train(number) for number in range(e.task.train_size)]
    kept, overlong = _kept(problems, "training", e.task, e.tokenizer, e.config.sampling)
    return problem_stream(e.task.train, numbers=kept, seed=e.config.seed), overlong


def curriculum_pool(e: Experiment, overlong: Overlong) -> int:
    """How many training problems a curriculum chooses from; a ValueError where the config does not say, or asks for too many."""
    pool, size = e.config.online.curriculum.pool, e.task.train_size
    if size is None:
        if not pool:
            raise ValueError(
                f"config.online.curriculum.pool is 0, and task '{e.task.name}' makes problems without end, none of which comes "
                "again: set it to how many of them to go through, such as 1000"
            )
        return pool
    size -= overlong.count if e.config.sampling.overlong != "cut" else 0
    if pool > size:
        raise ValueError(
            f"config.online.curriculum.pool is {pool}, and the task has {size} training problems: lower it, or set it to 0"
        )
    return pool or size


def describe(e: Experiment) -> str:
    """One line of what is about to run, with the derived sizes."""
    o, s = e.config.online, e.config.supervised
    shape = " x ".join(f"{name} {size}" for name, size in e.mesh.shape.items() if size > 1) or "one device"
    rollouts = o.problems_per_step * o.completions_per_problem
    trained = f"{spec.count(e.model.specs):,} trained of " if e.config.model.lora.rank else ""
    critic = "" if e.critic is None else f" and {spec.count(e.critic.model.specs):,} of a critic"
    return (
        f"{trained}{spec.count(e.specs):,} parameters{critic} on {shape}; "
        f"supervised: {s.steps} steps x {s.demonstrations_per_step} demonstrations; "
        f"{e.algorithm.name}: {o.steps} steps x {o.problems_per_step} problems x {o.completions_per_problem} completions = "
        f"{rollouts} rollouts a step, {o.updates_per_step} update{'s' if o.updates_per_step != 1 else ''} each; "
        f"{'one program a step' if not (e.scoring.host or e.scoring.group) else 'rewards on the host'}"
    )
