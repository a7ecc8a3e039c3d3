"""The schema of an experiment: the components' own dataclasses gathered, loaded from a file, overridden, typed.

An experiment file's `get_config(arg=None)` returns a locked `ml_collections.ConfigDict` made by `default()`; `load` applies
overrides and returns the typed, frozen `Config`. Defaults stand in the dataclasses and nowhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jaxreason
from jaxreason.models.config import Numerics, Sizes
from jaxreason.models.lora import LoraConfig
from jaxreason.naming import KINDS, call, find, literal, nearest, wholly_named
from jaxreason.sampling.rollout import SamplingConfig
from jaxreason.sharding import MeshConfig
from jaxreason.training.collect import RulePart, ScoringConfig
from jaxreason.training.critic import CriticConfig
from jaxreason.training.evaluate import EvaluationConfig
from jaxreason.training.online import OnlineConfig
from jaxreason.training.profiling import ProfileConfig
from jaxreason.training.supervised import PhaseConfig, Saving, SupervisedConfig


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a Hugging Face folder, or random weights of the given sizes."""

    path: str = ""  # local folder or hub name; its config.json then decides the architecture
    weights: str = "checkpoint"  # 'checkpoint': those of the path | 'random': of its architecture, drawn from the seed
    balance_weight: float = 0.0  # of the load-balance loss of a model with experts, beside the policy's
    architecture: Sizes = field(default_factory=Sizes)  # without a path
    numerics: Numerics = field(default_factory=Numerics)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class Named:
    """A function named in its module, with keyword arguments."""

    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """An experiment."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    task: Named = field(default_factory=lambda: Named("word_problems"))
    algorithm: Named = field(default_factory=lambda: Named("grpo"))
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: Mapping[str, RulePart] = field(default_factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: Saving = field(default_factory=Saving)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def default() -> ConfigDict:
    """The schema's defaults as an unlocked ConfigDict, for an experiment file to fill in and `finish`."""
    return _to_config_dict(Config())


def part(rule: str, **settings: Any) -> ConfigDict:
    """An entry of `config.reward`."""
    return _to_config_dict(RulePart(rule=rule, **settings))


def phase(demonstrations: str, *, steps: int) -> ConfigDict:
    """An entry of `config.supervised.phases`."""
    return _to_config_dict(PhaseConfig(demonstrations, steps))


def finish(config: ConfigDict, arg: str | None) -> ConfigDict:
    """Locks an experiment; `arg` is None, or 'tiny' to shrink it to seconds on a CPU."""
    if arg not in (None, "", "tiny"):
        raise ValueError(f"the config's argument is '{arg}': expected none, or 'tiny'")
    return (_shrink(config) if arg == "tiny" else config).lock()


def _shrink(config: Any) -> ConfigDict:
    """The same experiment with a tiny model, tiny batches and two steps of each loop."""
    a = config.model.architecture
    a.hidden_size, a.layers, a.heads, a.kv_heads, a.head_size, a.mlp_size = 32, 2, 4, 2, 8, 64
    for each in config.supervised.phases.values():
        each.steps = min(each.steps, 1)
    config.supervised.demonstrations_per_step = config.supervised.demonstrations_per_microbatch = 8
    config.sampling.max_completion_tokens = min(config.sampling.max_completion_tokens, 36)
    online = config.online
    online.steps = min(online.steps, 2)
    online.problems_per_step = online.problems_per_update = online.problems_per_microbatch = 8
    online.completions_per_problem = min(online.completions_per_problem, 4)
    config.critic.alone_steps = min(config.critic.alone_steps, 1)
    config.evaluation.problems_per_batch = 8
    for axis, size in dataclasses.asdict(MeshConfig()).items():  # a pod's does not go on one device
        config.mesh[axis] = size
    config.sampling.slots = 0
    for kwargs in (config.task.kwargs, *config.task.kwargs.get("tasks", {}).values()):  # a mixture's own tasks too
        if "heldout_size" in kwargs:
            kwargs.heldout_size = 8
    config.checkpoint.every_steps = 1
    return config


def _to_config_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        # the order of phases is the order of training: keys must not be sorted
        return ConfigDict({name: _to_config_dict(each) for name, each in value.items()}, sort_keys=False)
    return value


# ---------------------------------------------------------------------------------------------------------------- loading


def config_folder() -> Path:
    """Where the experiment files lie: beside the sources in a checkout, inside the package when installed."""
    package = Path(jaxreason.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped() -> list[tuple[str, str]]:
    """(name, first line of the docstring) of every experiment file."""
    files = sorted(file for file in config_folder().glob("*.py") if not file.name.startswith("_"))
    return [(file.stem, (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]) for file in files]


def load(source: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment `file.py[:arg]` or `name[:arg]` with `--config.key=value` overrides, typed and frozen."""
    given, _, arg = source.partition(":") if not Path(source).is_file() else (source, "", "")
    file = Path(given)
    if not file.is_file():
        file = config_folder() / f"{given}.py"
    if not file.is_file():
        names = [name for name, _ in shipped()]
        raise ValueError(f"--config is '{source}', which is neither a file nor one of the shipped configs: {', '.join(names)}")
    config = _execute(file, arg or None)
    for override in overrides:
        _override(config, override)
    return from_config_dict(config)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """A typed config with `--config.key=value` overrides."""
    loose = _to_config_dict(config).lock()
    for override in overrides:
        _override(loose, override)
    return from_config_dict(loose)


def _execute(file: Path, arg: str | None) -> ConfigDict:
    """What the file's get_config returns; a ValueError says what is wrong in which line of it."""
    spec = importlib.util.spec_from_file_location(f"jaxreason_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config is '{file}', which is no Python file: give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(f"{file} has no function get_config(arg=None): define it, as the shipped configs do")
        config = module.get_config(arg)
    except ValueError:
        raise
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}: correct the file") from error
    except Exception as error:  # the file is a program: whatever it raises is a mistake in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        text = str(error.args[0] if error.args else error).strip("\n.")
        raise ValueError(
            f"{file}, line {lines[-1] if lines else '?'}: {text} ({type(error).__name__}): correct the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {file} returns {_article(type(config))}: return schema.finish(config, arg)")
    return config


def from_config_dict(config: ConfigDict) -> Config:
    """The typed form; a ValueError names an unknown key, a missing one, or a value of the wrong type."""
    return _typed(Config, config, path="")


def from_dict(config: Mapping[str, Any]) -> Config:
    """The typed form of a stored `config.json`."""
    return _typed(Config, config, path="")


def to_dict(config: Any) -> Any:
    """Plain dicts and lists, for `config.json` and for showing."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    return [to_dict(each) for each in config] if isinstance(config, tuple) else config


def _override(config: ConfigDict, text: str) -> None:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals or not key:
        raise ValueError(f"the override '{text}' is not understood: write --config.key=value, for example --config.seed=1")
    *parents, leaf = key.split(".")
    node: Any = config
    for depth, name in enumerate(parents):
        _known(node, name, path=".".join(parents[:depth]))
        node = node[name]
    if parents and parents[-1] == "kwargs" and leaf not in node:
        with node.unlocked():  # what a function takes is checked against its signature
            node[leaf] = literal(value)
        return
    _known(node, leaf, path=".".join(parents))
    old = node[leaf]
    if leaf == "kwargs" and isinstance(literal(value), dict):
        with node.unlocked():  # all of them anew: another function takes other arguments
            node[leaf] = ConfigDict(literal(value))
        return
    if isinstance(old, ConfigDict):
        raise ValueError(f"config.{key} is a group of keys: set one of {', '.join(f'config.{key}.{name}' for name in old)}")
    new = value if isinstance(old, str) else literal(value)
    if isinstance(old, bool) and isinstance(new, str) and new.lower() in ("true", "false"):
        new = new.lower() == "true"
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if isinstance(old, tuple):
        if not isinstance(new, list | tuple):
            raise ValueError(f"config.{key} is '{value}': expected a tuple or a list, such as (1, 2), ('a',) or ()")
        new = tuple(new)
    if type(new) is not type(old) and old is not None:
        raise ValueError(f"config.{key} is '{value}': expected {_article(type(old))}, for example {old!r}")
    node[leaf] = new


def _known(node: Any, name: str, *, path: str) -> None:
    if not isinstance(node, ConfigDict):
        raise ValueError(f"config.{path} is a value, not a group of keys: it has no key '{name}'")
    if name not in node:
        raise ValueError(_unknown(name, list(node.keys()), path=path))


def _unknown(name: str, there: Sequence[str], *, path: str) -> str:
    return f"config{'.' * bool(path)}{path} has no key '{name}': {nearest(name, there)}"


def _article(kind: type) -> str:
    return KINDS.get(kind, f"a {kind.__name__}")


def _typed(kind: Any, value: Any, *, path: str) -> Any:
    """`value` as `kind`: a dataclass, a mapping of them, or a plain type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise ValueError(f"config.{path} is {value!r}: expected a group of keys")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise ValueError(_unknown(name, list(hints), path=path))
        prefix = f"{path}." if path else ""
        fields: Any = {name: _typed(hints[name], value[name], path=prefix + name) for name in value}
        return typing.cast(type, kind)(**fields)
    if typing.get_origin(kind) is tuple:
        return _typed_tuple(typing.get_args(kind), value, path=path)
    if typing.get_origin(kind) is not None:  # Mapping[str, X]
        entry = typing.get_args(kind)[1]
        if not isinstance(value, Mapping | ConfigDict):
            raise ValueError(f"config.{path} is {value!r}: expected a group of keys")
        return types.MappingProxyType({name: _typed(entry, each, path=f"{path}.{name}") for name, each in value.items()})
    if kind is Any:
        return value.to_dict() if isinstance(value, ConfigDict) else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"config.{path} is {value!r}: expected {_article(kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"config.{path} is {value}: expected a finite number")
    return value


def _typed_tuple(kinds: tuple[Any, ...], value: Any, *, path: str) -> tuple[Any, ...]:
    """A list or a tuple as a tuple of these types; (X, ...) are any number of one type."""
    same = kinds[-1] is ...
    if not isinstance(value, list | tuple) or not (same or len(value) == len(kinds)):
        raise ValueError(f"config.{path} is {value!r}: expected a tuple{'' if same else f' of {len(kinds)} values'}")
    of = [kinds[0]] * len(value) if same else kinds
    return tuple(_typed(kind, each, path=f"{path}[{i}]") for i, (kind, each) in enumerate(zip(of, value, strict=True)))


def make(module: Any, named: Named, *, key: str, returns: str, **offered: Any) -> Any:
    """Calls the function `named.name` of a module, one of those that return `returns`, with its keyword arguments.

    A function with other arguments is none of them: it makes one noun of another. What is `offered` is passed where the
    function takes it and the config does not say otherwise. A ValueError says what exists.
    """
    function = find(named.name, wholly_named(module, returns), key=f"{key}.name")
    return call(function, kwargs=named.kwargs, key=f"{key}.kwargs", **offered)
