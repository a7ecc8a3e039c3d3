"""A rehearsal: a run's programs compiled for a slice of TPU chips that is not there, and what they will need of each chip.

The programs are those that training compiles, of abstract arrays on a mesh of described chips; weights, data and network are not
touched. What the compiler says of memory is exact. Times are bounds from below: each part of a step at the peak of what it needs
most, of compute, memory and interconnect, and the next part after it. Deliberately absent: the supervised stage, evaluation, the
host's time between the programs.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jaxreason
from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.compiling import compiled
from jaxreason.config import Config
from jaxreason.data.batching import references
from jaxreason.models import families, huggingface, spec
from jaxreason.models.config import Architecture
from jaxreason.models.lora import adapt
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer
from jaxreason.pipelines import chips, roofline, run, traffic
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines.chips import GIB, Slice
from jaxreason.pipelines.experiment import Experiment
from jaxreason.pipelines.roofline import Part, Rows
from jaxreason.pipelines.traffic import DECODING, Sent
from jaxreason.tasks.task import Task

DESCRIPTIONS = "architectures"  # the folder of public models' config.json, beside the shipped configs
RULE = "format.think_answer_format"  # stands for the rule that a task would name: no rule is run


class Program(NamedTuple):
    """A compiled program's memory, in bytes of one chip."""

    name: str  # 'sample' and 'update', or 'step', which is both
    arguments: int
    temporaries: int  # and results that take no argument's place
    beside: int  # what the run holds besides, and this program does not read
    compiled: bool  # False: the compiler gave up, and says only how much it would have needed
    seconds: float  # that compiling took
    sent: tuple[Sent, ...] = ()

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.beside

    def fits(self, hbm: int) -> bool:
        return self.compiled and self.total <= hbm


class Change(NamedTuple):
    """A key of the config set otherwise, and how many bytes of a chip that saves."""

    key: str
    value: Any
    saves: int
    of: str  # which memory


class Rehearsal(NamedTuple):
    """What a run needs of each chip, and how long it takes at least."""

    slice: Slice
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]  # bytes of one chip
    programs: tuple[Program, ...]
    changes: tuple[Change, ...]  # where it does not fit
    parts: tuple[Part, ...]
    completion_tokens: int  # of each completion, as assumed
    decode_rounds: int  # of the loop that decodes, then
    model_flops: float  # of a step, on all chips, without what is computed twice
    steps: int
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        return all(each.fits(self.slice.chip.hbm) for each in self.programs)

    @property
    def step_seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def utilization(self) -> float:
        """MFU: the model's operations over what the chips could have done in the time."""
        return self.model_flops / (self.step_seconds * self.slice.chips * self.slice.chip.flops)

    @property
    def chip_hours(self) -> float:
        return self.steps * self.step_seconds * self.slice.chips / 3600


def rehearse(config: Config, slice: Slice, *, completion_tokens: int = 0, told: Callable[[str], None] | None = None) -> Rehearsal:
    """Compiles the reinforcement's programs for the slice; ValueErrors are those of training, and of a mesh the slice has not.

    `completion_tokens` is how long completions are taken to be, 0: as long as they may be. Each program is `told` as it begins.
    """
    online, limit = config.online, config.sampling.parking.step_tokens or config.sampling.max_completion_tokens
    if not online.steps:
        raise ValueError("config.online.steps is 0, and what is rehearsed is reinforcement: set it to 1 or more")
    if not 0 <= completion_tokens <= limit:
        raise ValueError(f"--completion-tokens is {completion_tokens}: expected 1 to {limit}, the most that a step lets them grow")
    tokens, say = completion_tokens or limit, told or (lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        e = described(config, chips.make_mesh(config.mesh, slice), Path(folder))
    programs = programs_of(e, say)
    parts, model_flops = parts_of(e, slice, programs, tokens)
    misfits, changes = [each for each in programs if not each.fits(slice.chip.hbm)], []
    if misfits:
        changes = sorted(changes_of(e), key=lambda each: -each.saves)
    if programs[-1] in misfits:
        changes = [*_smaller_batch(e, programs[-1], say), *changes]
    return Rehearsal(
        slice=slice,
        mesh={name: int(size) for name, size in e.mesh.shape.items() if size > 1},
        parameters=spec.count(e.specs),
        memory=memory_of(e),
        programs=programs,
        changes=tuple(changes),
        parts=parts,
        completion_tokens=tokens,
        decode_rounds=tokens * _waves(e),
        model_flops=model_flops,
        steps=online.steps,
        versions={"jaxreason": jaxreason.__version__, "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    )


# ---- the experiment, without its data


def described(config: Config, mesh: Mesh, folder: Path) -> Experiment:
    """The experiment on a mesh, from descriptions alone; a task that brings its own vocabulary has it written into `folder`."""
    if not config.model.path:
        return experiments.build(config, folder, devices=list(mesh.devices.flat))
    architecture, tokenizer = _read(config)
    if tokenizer.hf is None and experiments.reads_vocabulary(config):
        raise ValueError(
            f"config.model.path is '{config.model.path}', whose tokenizer is not here, and traced rules and stop strings need its "
            "table: give a folder with the tokenizer's files"
        )
    algorithm = experiments.make_algorithm(config, mesh)
    experiments.check_architecture(config, architecture)
    parts = {name: replace(part, rule=RULE, kwargs={}) if part.rule == "task" else part for name, part in config.reward.items()}
    task = Task(config.task.name, train=_no_problem, train_size=0, heldout=(), messages=_no_problem)
    config = replace(config, reward=parts)
    e = experiments.assemble(config, mesh, algorithm, architecture, task=task, tokenizer=tokenizer)
    experiments.check_attention(e)
    return e


def _no_problem(_: Any) -> Any:
    raise AssertionError("a rehearsal reads no problem")


def _read(config: Config) -> tuple[Architecture, Tokenizer]:
    """Architecture and stop tokens by a local folder, or by the description of a public model."""
    folder = Path(config.model.path).expanduser()
    file = folder / "config.json"
    if folder.is_dir():
        if (folder / "tokenizer.json").is_file():
            return huggingface.read_architecture(folder), load_tokenizer(folder)
    else:
        there = configs.config_folder() / DESCRIPTIONS
        file = there / f"{folder.name}.json"
        if not file.is_file():
            names = ", ".join(sorted(each.stem for each in there.glob("*.json")))
            raise ValueError(
                f"config.model.path is '{config.model.path}', which is no folder here, and a rehearsal asks no network: give a "
                f"folder with the model's config.json, or a model that is described: {names}"
            )
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a folder with the model's config.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    eos, pad = content.get("eos_token_id"), content.get("pad_token_id")
    eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not eos:
        raise ValueError(f"{file} has no eos_token_id, and there is no tokenizer beside it: add one of the two")
    return families.read(content, file), Tokenizer(hf=None, eos_ids=eos, pad_id=eos[0] if pad is None else pad)


# ---- memory


def _bytes(tree: Any) -> int:
    """Of one device's shards."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _weights(e: Experiment) -> Any:
    """All of the model's weights, adapters excepted."""
    return spec.abstract(e.specs, dtype=e.model.numerics.param_dtype, mesh=e.mesh)


def _reference(e: Experiment) -> Any:
    """What the run passes as the reference: with LoRA the weights beneath the adapters."""
    return _weights(e) if e.config.model.lora.rank or "reference" in e.algorithm.needs else None


def memory_of(e: Experiment) -> dict[str, int]:
    """Bytes of one device, of what the programs read and of the cache, which is sampling's temporary."""
    state = run.online_state(e, run.online_optimizer(e))
    return {
        "parameters": _bytes(state.params),
        "optimiser": _bytes(state.opt_state),
        "reference": _bytes(_reference(e)),
        "parked" if e.critic is None else "critic": _bytes(state.algorithm),
        "cache": _cache(e),
    }


def _cache(e: Experiment) -> int:
    """Keys and values of prompts and of completions that grow at a time."""
    sampling, problems = e.config.sampling, e.config.online.problems_per_step
    limit, slots = sampling.max_completion_tokens, _slots(e)

    def room(params: Any, prompt: jax.Array, mask: jax.Array) -> Any:
        _, prompts = e.model.prefill(e.model.prepare_sampling(params), prompt, mask)
        return prompts, e.model.empty(prompts, slots=slots, tokens=limit)

    shape = (problems, sampling.max_prompt_tokens)
    held: Any = jax.eval_shape(room, _weights(e), _rows(e, shape, jnp.int32), _rows(e, shape, jnp.bool_))
    heads = 1 if e.architecture.latent.kv_rank else e.mesh.shape["tensor"]
    arrays = [x for x in jax.tree.leaves(held) if x.ndim > 1]  # the others are lengths
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) // (sharding.problem_shards(e.mesh) * heads)


def _slots(e: Experiment) -> int:
    """Completions that grow at a time."""
    total = e.config.online.problems_per_step * e.config.online.completions_per_problem
    return min(e.config.sampling.slots or total, total)


def _waves(e: Experiment) -> int:
    """How often all slots are filled where all completions are equally long."""
    return math.ceil(e.config.online.problems_per_step * e.config.online.completions_per_problem / _slots(e))


def _rows(e: Experiment, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(e.mesh, ("problems",)))


def prompts_of(e: Experiment) -> PromptBatch:
    count = e.config.online.problems_per_step
    shape = (count, e.config.sampling.max_prompt_tokens)
    empty: dict[str, Any] = dict(references([]))
    more = {name: _rows(e, (count, *x.shape[1:]), x.dtype) for name, x in empty.items()}
    return PromptBatch(_rows(e, shape, jnp.int32), _rows(e, shape, jnp.bool_), _rows(e, (count,), jnp.uint32), **more)


def programs_of(e: Experiment, told: Callable[[str], None], *, update_only: bool = False) -> tuple[Program, ...]:
    """The programs of a step, each `told` as it begins to be compiled."""
    optimizer = run.online_optimizer(e)
    step, state, reference, prompts = run.online_step(e, optimizer), run.online_state(e, optimizer), _reference(e), prompts_of(e)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.named(e.mesh))
    if step.fused is not None:
        told("step")
        return (_compile("step", step.fused, (state, reference, prompts, number), 0, e),)
    policy = adapt(reference, state.params)
    parked = state.algorithm if e.config.sampling.parking.step_tokens else None
    given = (policy, prompts, number, *([parked] if parked else []))
    programs = []
    if not update_only:
        told("sample")
        programs = [_compile("sample", step.collect, given, _bytes((state, reference)) - _bytes((policy, parked)), e)]
    drawn: Any = jax.eval_shape(step.collect, *given)
    sampled, parts = jax.tree.map(lambda x: x if x.sharding is not None else _rows(e, x.shape, x.dtype), drawn)
    group = (e.config.online.problems_per_step, e.config.online.completions_per_problem)
    host = {name: _rows(e, group, jnp.float32) for name in (*e.scoring.host, *e.scoring.group)}
    told("update")
    state = replace(state, algorithm={}) if parked else state
    return *programs, _compile("update", step.learn, (state, reference, prompts, sampled, {**parts, **host}, number), 0, e)


def _compile(name: str, function: Any, given: tuple[Any, ...], beside: int, e: Experiment) -> Program:
    """One program; where it does not fit the compiler says how much it would have needed."""
    begun, arguments = time.perf_counter(), _bytes(given)
    try:
        program = compiled(function, *given)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)G\)|Used ([\d.]+)G of [\d.]+G hbm", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        temporaries = int(float(needed[1] or needed[2]) * GIB) - arguments
        return Program(name, arguments, max(0, temporaries), beside, False, time.perf_counter() - begun)
    memory = program.memory_analysis()
    # the peak: of temporaries alone the compiler gives a sum in which some memory is counted twice
    arguments = memory.argument_size_in_bytes
    seconds = time.perf_counter() - begun
    sent = tuple(traffic.collectives(program.as_text(), e.mesh))
    return Program(name, arguments, memory.peak_memory_in_bytes - arguments, beside, True, seconds, sent)


def _smaller_batch(e: Experiment, program: Program, told: Callable[[str], None]) -> list[Change]:
    """What half as many rows at a time would save: of temporaries only the compiler knows, so it is asked."""
    shards, online = sharding.problem_shards(e.mesh), e.config.online
    for key in ("problems_per_microbatch", "completions_per_problem"):
        half = getattr(online, key) // 2
        if half and (key != "problems_per_microbatch" or half % shards == 0):
            told(f"{program.name} with config.online.{key}={half}")
            config = configs.overridden(e.config, [f"--config.online.{key}={half}"])
            smaller = programs_of(_again(e, config), lambda _: None, update_only=True)[-1]
            return [Change(f"online.{key}", half, program.total - smaller.total, f"temporaries of '{program.name}'")]
    return []


def changes_of(e: Experiment) -> list[Change]:
    """What each of a few settings would save, by the same arithmetic as the memory's."""
    before, shards, sampling, mesh = memory_of(e), sharding.problem_shards(e.mesh), e.config.sampling, e.mesh.shape
    slots = _slots(e)
    half = 1 << ((slots - 1).bit_length() - 1)
    asked: list[tuple[str, Any]] = [
        ("online.optimizer.state_dtype", "bfloat16"),
        ("model.numerics.param_dtype", "bfloat16"),
        ("model.numerics.sampling_cache", "bfloat16"),
        ("model.numerics.sampling_cache", "int8"),
    ]
    if half >= shards and half % shards == 0 and not sampling.parking.step_tokens:
        asked.append(("sampling.slots", half))
    if mesh["data"] % 2 == 0:
        asked.append(("mesh.fsdp", 2 * mesh["fsdp"]))
    found = []
    for key, value in asked:
        more = [f"--config.mesh.data={mesh['data'] // 2}"] if key == "mesh.fsdp" else []
        config = configs.overridden(e.config, [f"--config.{key}={value}", *more])
        if config == e.config:
            continue
        try:
            after = memory_of(_again(e, config))
        except (ValueError, NotImplementedError):  # it does not go with the rest, or (jax's word) not with the torus
            continue
        saved = {name: before[name] - after[name] for name in before if before[name] > after[name]}
        if sum(before.values()) > sum(after.values()):
            found.append(Change(key, value, sum(before.values()) - sum(after.values()), ", ".join(saved)))
    return found


def _again(e: Experiment, config: Config) -> Experiment:
    mesh = sharding.make_mesh(config.mesh, devices=list(e.mesh.devices.flat))
    algorithm = experiments.make_algorithm(config, mesh)
    return experiments.assemble(config, mesh, algorithm, e.architecture, task=e.task, tokenizer=e.tokenizer, source=e.source)


# ---- time


def parts_of(e: Experiment, slice: Slice, programs: tuple[Program, ...], tokens: int) -> tuple[tuple[Part, ...], float]:
    """The parts of a step on one chip, one after the other, and the model's operations on all of them."""
    o, sampling, a, specs = e.config.online, e.config.sampling, e.architecture, e.specs
    mesh, n, chip, count = dict(e.mesh.shape), e.model.numerics, slice.chip, slice.chips
    slots, waves = _slots(e), _waves(e)
    shards = sharding.problem_shards(e.mesh)

    # sampling: completions of `tokens` tokens
    rows = Rows(o.problems_per_step, sampling.max_prompt_tokens, o.completions_per_problem, tokens)
    read, write = roofline.sampling(specs, a, rows)
    wide = 1.0 if n.sampling_weights == "int8" else jnp.dtype(n.matmul_dtype).itemsize
    held = roofline.cache_bytes_a_token(a, mesh, kind=n.sampling_cache or n.matmul_dtype)
    experts = roofline.touched(a, slots / shards * mesh["expert"])
    weights = roofline.weight_bytes(specs, mesh, itemsize=wide, touched=experts)
    # a prompt is read once a step for several of its completions together, at the best for all of them
    keys = slots / shards * (tokens / 2 + rows.prompt / o.completions_per_problem)
    prompts_bytes = roofline.weight_bytes(specs, mesh, itemsize=wide)
    completions_bytes = waves * tokens * (weights + keys * held)

    # the update, whose shape is fixed: completions as long as they may be
    whole = rows._replace(tokens=sampling.max_completion_tokens)
    once = roofline.forward(specs, a, whole)
    scores = ("reference" in e.algorithm.needs) + ("old" in e.algorithm.needs and o.updates_per_step > 1)
    learnt = o.epochs * (once + roofline.backward(specs, a, whole))
    again = o.epochs * roofline.repeated(specs, a, whole, n.remat)
    micro = o.problems_per_step // o.problems_per_microbatch
    passes = micro * (scores + o.epochs * (2 if n.remat == "none" else 3))
    state = run.online_state(e, run.online_optimizer(e))
    values = 0.0
    if e.critic is not None:  # values once, and the same updates
        its = roofline.forward(e.critic.model.specs, a, whole)
        values = its + o.epochs * (its + roofline.backward(e.critic.model.specs, a, whole))
        again += o.epochs * roofline.repeated(e.critic.model.specs, a, whole, n.remat)
        passes += micro * (1 + o.epochs * (2 if n.remat == "none" else 3))
    gradients = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    update_bytes = (
        passes * roofline.weight_bytes(specs, mesh, itemsize=jnp.dtype(n.matmul_dtype).itemsize)
        + o.epochs * micro * 2 * gradients
        + o.updates_per_step * 2 * _bytes((state.params, state.opt_state, state.algorithm if e.critic else ()))
    )
    sent = {"prompts": 0.0, "completions": 0.0, "update": 0.0}
    for program in programs:
        for each in program.sent:
            where = "completions" if DECODING in each.loops else "prompts" if program.name == "sample" else "update"
            sent[where] += each.total(decoding=waves * tokens) or 0.0
    parts = (
        roofline.part("prompts", read / count, prompts_bytes, sent["prompts"], chip=chip),
        roofline.part("completions", write / count, completions_bytes, sent["completions"], chip=chip),
        roofline.part("update", (scores * once + learnt + again + values) / count, update_bytes, sent["update"], chip=chip),
    )
    return parts, read + write + scores * once + learnt + values
