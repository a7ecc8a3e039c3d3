"""An evaluation: a model's answers to held-out problems in a folder, batch by batch, and what they say of it.

settings.json       what was asked of which model; another evaluation is refused the folder
completions.jsonl   a record a completion, in order; a batch is written whole when it has ended
results.json        the numbers, with versions, config, seed and counts; written last

An evaluation that was stopped or killed goes on after its last whole batch, and ends with the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxreason
from jaxreason import config as configs
from jaxreason import sharding
from jaxreason.checking import LARGEST_SEED
from jaxreason.pipelines.experiment import Experiment, exact_model
from jaxreason.pipelines.folder import differences, read_json
from jaxreason.training.answering import Answer, Rows, make_answer
from jaxreason.training.metrics import Progress, write_atomically
from jaxreason.training.results import categories_of, default_k, summarise
from jaxreason.types import Problem

COMPLETIONS = "completions.jsonl"
OWN = ("settings.json", COMPLETIONS, "results.json", "settings.json.tmp", "results.json.tmp")


@dataclass(frozen=True)
class Asked:
    """What an evaluation samples."""

    samples: int = 0  # of each problem, at the config's temperature; 0: none
    greedy: bool = True  # one of the likeliest tokens
    seed: int = 0
    problems: int = 0  # the first so many; 0: all


@dataclass(frozen=True)
class Shown:
    """What is computed from the samples, and may be asked anew."""

    k: tuple[int, ...] = ()  # (): 1, 2, 4, ... and all
    categories: tuple[str, ...] = ()
    resamples: int = 1000


class Part(NamedTuple):
    """A batch of an evaluation: its problems' numbers, and how they are answered."""

    kind: str  # 'greedy' | 'sampled'
    numbers: range
    samples: int


def check(asked: Asked, shown: Shown) -> None:
    """Raises ValueError for what cannot be asked, before anything is computed."""
    if asked.samples < 0 or asked.problems < 0:
        raise ValueError(f"--samples is {asked.samples} and --problems {asked.problems}: expected 1 or more, where they are given")
    if not 0 <= asked.seed <= LARGEST_SEED:
        raise ValueError(f"--seed is {asked.seed}: expected 0 to {LARGEST_SEED}")
    if shown.resamples < 1:
        raise ValueError(f"--resamples is {shown.resamples}: expected 1 or more")
    for k in shown.k:
        if not 1 <= k <= asked.samples:
            raise ValueError(f"--k holds {k}, and there are {asked.samples} samples of a problem: expected 1 to --samples")


def evaluate(
    experiment: Experiment,
    params: Any,
    *,
    source: str,
    asked: Asked,
    shown: Shown,
    folder: Path,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The results, which are also written to the folder; None where `stop()` came first. A begun evaluation is gone on with."""
    check(asked, shown)
    e = experiment
    problems = list(e.task.heldout)[: asked.problems or None]
    settings = _settings(e, params, problems, asked)
    categories_of(problems, shown.categories)
    _open(folder, settings)
    size = e.config.evaluation.problems_per_batch
    plan = list(_plan(asked, len(problems), size=size))
    rows = _finished(folder / COMPLETIONS, plan)
    done = _batches(plan, len(rows))
    answers = {kind: _answer(e, kind, asked) for kind in dict.fromkeys(part.kind for part in plan)}
    told = ""
    for number, part in enumerate(plan):
        mine = [each for each in plan if each.kind == part.kind]
        if part.kind != told:
            before = [each for each in plan[:done] if each.kind == part.kind]
            progress.stage(part.kind, sum(len(each.numbers) for each in mine), sum(len(each.numbers) for each in before))
            told = part.kind
        if number < done:
            continue
        if stop():
            return None
        new = answers[part.kind](params, [(each, problems[each]) for each in part.numbers])
        new = [{"kind": part.kind, **row} for row in new]
        _append(folder / COMPLETIONS, new)
        rows += new
        ours = [row for row in rows if row["kind"] == part.kind]
        length = sum(row["length"] for row in ours) / len(ours)
        reward = sum(row["reward"]["total"] for row in ours) / len(ours)
        progress.update(part.numbers.stop, {"reward/total": reward, "rollout/length": length})
    results = {
        "source": source,
        **settings,
        "config": configs.to_dict(e.config),
        "counts": {
            "problems": len(problems),
            "overlong_problems": e.overlong.count,
            "skipped_rows": dict(e.task.skipped.counts),
            "completions": len(rows),
            "failed": dict(Counter(reason for row in rows for reason in row["failed"])),  # in which a rule failed
            "unscored_completions": sum(row["reward"][e.config.evaluation.accuracy] is None for row in rows),
        },
        "bootstrap": {"resamples": shown.resamples, "level": 0.95, "seed": asked.seed},
        **_numbers(e, rows, problems, asked, shown),
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _numbers(e: Experiment, rows: Rows, problems: Sequence[Problem], asked: Asked, shown: Shown) -> dict[str, Any]:
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        groups: list[Rows] = [[] for _ in problems]
        for row in rows:
            if row["kind"] == kind:
                groups[row["number"]].append(row)
        found[kind] = summarise(
            groups,
            problems,
            accuracy=e.config.evaluation.accuracy,
            k=(shown.k or default_k(asked.samples)) if kind == "sampled" else (),
            categories=shown.categories,
            resamples=shown.resamples,
            seed=asked.seed,
        )
    return found


def _answer(e: Experiment, kind: str, asked: Asked) -> Answer:
    """As many completions grow at a time as there are problems in a batch, however many samples, unless the config says so."""
    size, sampling = e.config.evaluation.problems_per_batch, e.config.sampling
    samples, shards = (asked.samples if kind == "sampled" else 1), sharding.problem_shards(e.mesh)
    if samples > 1 and not sampling.slots and not shards & (shards - 1):
        slots = max(shards, 1 << (size.bit_length() - 1))
        sampling = replace(sampling, slots=slots)
    return make_answer(
        exact_model(e),
        e.scoring,
        e.mesh,
        task=e.task,
        tokenizer=e.tokenizer,
        sampling=sampling,
        stop=e.stop,
        size=size,
        samples=samples,
        seed=asked.seed if kind == "sampled" else None,
    )


def _plan(asked: Asked, problems: int, *, size: int) -> Iterator[Part]:
    for kind, samples in (("greedy", int(asked.greedy)), ("sampled", asked.samples)):
        if samples:
            for start in range(0, problems, size):
                yield Part(kind, range(start, min(start + size, problems)), samples)


# ------------------------------------------------------------------------------------------------------------- the folder


def _settings(e: Experiment, params: Any, problems: Sequence[Problem], asked: Asked) -> dict[str, Any]:
    """All that the completions depend on, by value: weights and problems as digests."""
    told = [[p.id, p.answer, e.task.messages(p)] for p in problems]
    digest = hashlib.sha256(json.dumps(told).encode(errors="surrogatepass"))
    config = configs.to_dict(e.config)
    known = {key: config[key] for key in ("task", "reward", "scoring", "sampling")}
    known["scoring"] = {key: value for key, value in known["scoring"].items() if key != "workers"}
    known["numerics"] = config["model"]["numerics"]
    known["evaluation"] = {key: config["evaluation"][key] for key in ("problems_per_batch", "accuracy")}
    settings = {
        "versions": {"jaxreason": jaxreason.__version__, "jax": jax.__version__},
        "asked": asdict(asked),
        "weights": fingerprint(params),
        "problems": digest.hexdigest(),
        "answered_with": known,
    }
    return json.loads(json.dumps(settings))  # tuples are lists there


def fingerprint(params: Any) -> str:
    """A digest of the parameters' names, shapes and bits, the same on any mesh."""

    def bits(x: jax.Array) -> jax.Array:
        kind = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint32
        return jnp.sum(jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32), dtype=jnp.uint32)

    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(bits, tree))(params))
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (params, sums)]
    told = [
        [jax.tree_util.keystr(path), str(x.dtype), list(x.shape), int(total)] for (path, x), (_, total) in zip(*leaves, strict=True)
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _open(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or raises ValueError where it holds anything but this evaluation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is '{folder}', which cannot be made ({error.strerror}): give another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out is '{folder}', which cannot be written to: give another folder")
    known = read_json(folder / "settings.json")
    if not known:
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in OWN)
        if others or (folder / COMPLETIONS).exists():
            name = others[0] if others else COMPLETIONS
            raise ValueError(f"--out is '{folder}', which is no evaluation's folder and holds '{name}': give a new folder")
        write_atomically(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
        return
    changed = differences(known, dict(settings))
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"'{folder}' holds an evaluation with {key} = {old!r}, and this one has {new!r}{more}: give another --out, or the same "
            "settings to go on with it"
        )


def _finished(file: Path, plan: Sequence[Part]) -> Rows:
    """The records of the whole batches that the file begins with; it is cut behind them."""
    rows: Rows = []
    ends = [0]  # of each line that is whole
    data = file.read_bytes() if file.exists() else b""
    expected = [(part.kind, number, child) for part in plan for number in part.numbers for child in range(part.samples)]
    while (end := data.find(b"\n", ends[-1])) >= 0:
        try:
            row = json.loads(data[ends[-1] : end])
            place = (row["kind"], row["number"], row["child"])
        except (ValueError, KeyError, TypeError):
            place = None
        if len(rows) == len(expected) or place != expected[len(rows)]:
            raise ValueError(
                f"line {len(rows) + 1} of {file} is not the completion that is due there: it was changed by hand or damaged; give "
                "another --out"
            )
        rows.append(row)
        ends.append(end + 1)
    whole = sum(len(part.numbers) * part.samples for part in plan[: _batches(plan, len(rows))])
    if len(data) > ends[whole]:
        with file.open("rb+") as stream:
            stream.truncate(ends[whole])
            os.fsync(stream.fileno())
    return rows[:whole]


def _batches(plan: Sequence[Part], rows: int) -> int:
    """How many whole batches so many records are."""
    for number, part in enumerate(plan):
        rows -= len(part.numbers) * part.samples
        if rows < 0:
            return number
    return len(plan)


def _append(file: Path, rows: Rows) -> None:
    with file.open("ab") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        stream.flush()
        os.fsync(stream.fileno())
