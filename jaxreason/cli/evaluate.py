"""`jaxreason evaluate`: how good a run's newest weights, or a Hugging Face folder's model, are on held-out problems."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxreason import config as schema
from jaxreason import naming, sharding, tasks
from jaxreason.cli.commands import cache_compilations, choose_precision, program_words
from jaxreason.cli.main import DONE, INTERRUPTED
from jaxreason.cli.named import make_task, settings
from jaxreason.cli.progress import make_progress, visible
from jaxreason.cli.signals import stop_on_signals
from jaxreason.models import huggingface
from jaxreason.pipelines import evaluation
from jaxreason.pipelines import experiment as experiments
from jaxreason.pipelines import folder as folders
from jaxreason.pipelines import run as runs
from jaxreason.pipelines.evaluation import Asked, Shown
from jaxreason.rewards.finding import host_rules
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.training.collect import RulePart
from jaxreason.training.online import OnlineConfig
from jaxreason.training.profiling import ProfileConfig
from jaxreason.training.results import ALL
from jaxreason.training.supervised import SupervisedConfig

FORMAT = "format.think_answer_format"  # what is reported as the format where no config says it
MOST_TOKENS = 1024  # of a prompt and of a completion, where no config says it and the model's context holds them
VALUES_SHOWN = 40  # of a category
NO_VALUE = "n/a"


def run(given: argparse.Namespace) -> int:
    asked, shown = _asked(given)
    evaluation.check(asked, shown)
    config, is_run = _config(given)
    choose_precision(config)
    if not sharding.fits(config.mesh, devices=jax.device_count()):
        config = dataclasses.replace(config, mesh=sharding.MeshConfig())  # trained on other devices than these
    # what only training needs is not looked at
    no_training = {"supervised": SupervisedConfig(), "online": OnlineConfig(), "profile": ProfileConfig()}
    e = experiments.build(dataclasses.replace(config, **no_training), given.model)
    beside = given.model if is_run else given.out or Path("evaluations", "model")
    cache_compilations(beside.absolute().parent)
    if is_run:
        params, source = runs.latest_params(e._replace(config=config), given.model)
    else:
        params, source = experiments.initial_params(e), str(given.model)
    out = given.out or _default_out(given, e, asked, source if is_run else "")
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    fate = "cut" if config.sampling.overlong == "cut" else "left out"
    overlong = f" ({e.overlong.count} {fate}: their prompts are too long)" if e.overlong.count else ""
    for sentence in e.task.skipped.told(e.task.name):
        console.print(visible(sentence), markup=False)
    count = min(len(e.task.heldout), asked.problems or len(e.task.heldout))
    sampled = f"{asked.samples} samples at temperature {config.sampling.temperature:g}"
    how = ", ".join(["greedy"] * asked.greedy + [sampled] * bool(asked.samples))
    console.print(visible(f"{source}; {count} held-out problems{overlong}, {how}"), markup=False)
    progress = make_progress(sys.stdout, quiet=given.quiet)
    try:
        with stop_on_signals(progress.message, unit="batch") as stop:
            told: Any = {"source": source, "asked": asked, "shown": shown, "folder": out}
            results = evaluation.evaluate(e, params, **told, progress=progress, stop=stop)
    finally:
        progress.close()
        e.scoring.close()
    if results is None:
        again = shlex.join([*program_words(), *given.words])
        console.print(f"Interrupted; what is finished is kept. To go on: {again}", markup=False, soft_wrap=True)
        return INTERRUPTED
    for kind in ("greedy", "sampled"):
        if kind in results:
            _show(console, kind, results[kind])
    counts = results["counts"]
    if counts["unscored_completions"]:
        told = f"{counts['unscored_completions']} of {counts['completions']} completions count in no number on correctness"
        console.print(f"{told}: the rule of '{config.evaluation.accuracy}' does not apply to their problems", markup=False)
    console.print(f"Results: {out / 'results.json'}   completions: {out / evaluation.COMPLETIONS}", markup=False)
    return DONE


def _asked(given: argparse.Namespace) -> tuple[Asked, Shown]:
    for name, value in (("samples", given.samples), ("problems", given.problems)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: expected 1 or more")
    samples = given.samples or 0
    if given.temperature is not None and given.temperature < 0:
        raise ValueError(f"--temperature is {given.temperature:g}: expected more than 0")
    if given.temperature == 0 and samples > 1:
        raise ValueError(f"--temperature is 0 and --samples is {samples}: they would all be alike; drop one of the two")
    if given.temperature and not samples:
        raise ValueError(f"--temperature is {given.temperature:g}, and without --samples the evaluation is greedy: give --samples")
    if given.temperature == 0:
        samples = 0  # the likeliest token
    try:
        k = tuple(sorted({int(each) for each in given.k.split(",") if each}))
    except ValueError:
        raise ValueError(f"--k is '{given.k}': expected whole numbers with commas between them, such as 1,4,16") from None
    asked = Asked(samples=samples, greedy=given.greedy or not samples, seed=given.seed, problems=given.problems or 0)
    return asked, Shown(k=k, categories=tuple(given.category), resamples=given.resamples)


def _config(given: argparse.Namespace) -> tuple[schema.Config, bool]:
    """How the model is asked and scored, and whether it is a run's."""
    folder: Path = given.model
    content = folders.read_json(folder / "config.json")
    if not content:
        raise ValueError(
            f"'{folder}' is neither a run's folder nor a Hugging Face folder: it holds no config.json; give one that does"
        )
    if "model_type" not in content:
        if given.config is not None:
            raise ValueError(f"--config is '{given.config}', and '{folder}' is no Hugging Face folder: give it for one alone")
        return _asked_otherwise(folders.read_config(folder), given), True
    if given.config is not None:
        path = [f"--config.model.path={folder}", "--config.model.weights=checkpoint"]
        config = schema.load(given.config, [*path, *given.overrides])
        return _asked_otherwise(config, given, overridden=True), False
    if given.task is None:
        raise ValueError(f"'{folder}' is a model's folder, which names no problems: give --task NAME, or --config F")
    context = huggingface.read_architecture(folder).max_positions
    completion = min(MOST_TOKENS, context // 2)
    config = schema.Config(
        model=schema.ModelConfig(path=str(folder)),
        reward={"accuracy": RulePart(""), "format": RulePart(FORMAT, weight=0.0)},
        sampling=SamplingConfig(max_prompt_tokens=min(MOST_TOKENS, context - completion), max_completion_tokens=completion),
    )
    return _asked_otherwise(config, given), False


def _asked_otherwise(config: schema.Config, given: argparse.Namespace, *, overridden: bool = False) -> schema.Config:
    """The config with the task, the rule, the temperature and the keys that the command line names."""
    rule, words = given.rule, settings(given.settings, "rule")
    if given.task is not None:
        function = naming.find(given.task, naming.wholly_named(tasks, "Task"), key="--task")
        kwargs = settings(given.settings, "task")
        task = make_task(given.task, kwargs)
        config = dataclasses.replace(config, task=schema.Named(given.task, naming.typed(function, kwargs)))
        rule = rule or task.rule or ("task" if task.rules else "")
        if not rule:
            raise ValueError(f"task '{task.name}' names no rule that scores its answers: give one with --rule")
    elif settings(given.settings, "task"):
        raise ValueError("--task.KEY sets what a task takes, and there is no --task: give one, or set --config.task.kwargs.KEY")
    if rule:
        if rule != "task" and not rule.startswith("traced."):
            function = naming.find(rule, host_rules(), key="--rule")
            part = RulePart(rule, kwargs=naming.arguments(function, naming.typed(function, words), key="--rule"))
        else:
            part = RulePart(rule, kwargs={key: naming.literal(value) for key, value in words.items()})
        config = dataclasses.replace(config, reward={**config.reward, config.evaluation.accuracy: part})
    elif words:
        raise ValueError("--rule.KEY sets what a rule takes, and there is no --rule: give one")
    config = config if overridden else schema.overridden(config, given.overrides)
    if given.temperature:
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, temperature=given.temperature))
    return config


def _default_out(given: argparse.Namespace, e: experiments.Experiment, asked: Asked, source: str) -> Path:
    """A run's evaluations are in its folder; of another model, here. What is asked is in the name."""
    words = [e.task.name, *source.replace("'", "").replace(",", "").split()[1:4:2], *["greedy"] * asked.greedy]
    if asked.samples:
        words.append(f"{asked.samples}x{e.config.sampling.temperature:g}-seed{asked.seed}")
    if asked.problems:
        words.append(f"first{asked.problems}")
    root = given.model if source else Path()
    return root / "evaluations" / "-".join([*([] if source else [given.model.resolve().name]), *words])


def _show(console: Console, kind: str, results: Mapping[str, Any]) -> None:
    """One table of all problems, and one a category."""
    table = Table(title=kind, title_justify="left")
    for heading in ("metric", "value", "95% interval", "problems"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, found in results[ALL][ALL].items():
        low, high = (_number(name, found.get(end)) for end in ("low", "high"))
        interval = low if low == high == NO_VALUE else f"{low} to {high}"
        table.add_row(Text(name), _number(name, found.get("value")), interval, str(found["problems"]))
    console.print(table)
    for key, values in results.items():
        if key != ALL:
            console.print(_by_category(key, values))


def _by_category(key: str, values: Mapping[str, Any]) -> Table:
    names = list(next(iter(values.values())))
    of_most = [[name for name in names if name.startswith(kind)][-1:] for kind in ("avg@", "pass@", "majority@")]
    shown = [*(name for last in of_most for name in last), "length"]
    table = Table(title=f"by {key}", title_justify="left")
    for heading in (key, "problems", *shown):
        table.add_column(heading, justify="left" if heading == key else "right")
    for value, metrics in list(values.items())[:VALUES_SHOWN]:
        cells = [_number(name, metrics[name].get("value")) for name in shown]
        table.add_row(Text(visible(value)), str(metrics["length"]["problems"]), *cells)
    return table


def _number(name: str, value: float | None) -> str:
    if value is None:
        return NO_VALUE
    share = "@" in name or name in ("answered", "truncated", "failed")
    return f"{100 * value:.1f}%" if share else f"{value:.4g}"
