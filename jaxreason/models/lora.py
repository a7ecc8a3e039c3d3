"""LoRA (arXiv:2106.09685): small additions to frozen weights are trained, not the weights.

A transformation of the parameter tree: adapters are a tree of their own, declared as parameters are (spec.py), so that initial
values, shardings, the optimiser's state and checkpoints follow; `adapt` lays them over the frozen weights without copying
these, and the same model computes with what comes of it (weights.py). The frozen weights are the reference too.
Deliberately absent: dropout, and adapters of embeddings, heads, norms, routers and routed experts.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import sharding
from jaxreason.models.spec import ParamSpec, Specs, is_spec, linear
from jaxreason.models.weights import LowRank
from jaxreason.numerics import at_least_float32

Params = Any
PROJECTIONS = ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "gate", "up", "down", "shared_gate", "shared_up", "shared_down")
PEFT = "base_model.model."  # what its tensors' names begin with


@dataclass(frozen=True)
class LoraConfig:
    """Adapters W + (alpha / rank) A B of the targets, which are trained in the weights' stead."""

    rank: int = 0  # of each; 0: none, all weights are trained
    alpha: float = 16.0
    targets: str = "all"  # of each layer, such as 'q v'; 'all': its projections, routed experts excepted


def targets(specs: Specs, config: LoraConfig) -> list[str]:
    """The names of the weights that are adapted; a ValueError where one does not exist or has no adapters."""
    layers = [layer for layer in specs.values() if not is_spec(layer)]
    there = [name for name in PROJECTIONS if any(name in layer for layer in layers)]
    given = there if config.targets.split() == ["all"] else config.targets.split()
    wrong = [name for name in given if name not in there]
    if wrong or not given:
        which = f"which has no adapters for '{wrong[0]}'" if wrong else "which names nothing"
        raise ValueError(
            f"config.model.lora.targets is '{config.targets}', {which}: expected 'all', or some of this architecture's "
            f"projections, separated by spaces: {' '.join(there)}"
        )
    return given


def declare_lora(specs: Specs, config: LoraConfig) -> Specs:
    """The adapters of a model's weights: a `LowRank` of declarations, without a weight, in the place of each target.

    A is drawn with the deviation of PEFT's, 1 / sqrt(3 inputs), and B is 0, so that training starts at the model itself (section
    4.1). They lie on the mesh as the weight's inputs and outputs do.
    """
    if not config.alpha > 0:
        raise ValueError(f"config.model.lora.alpha is {config.alpha}: expected more than 0")
    names = targets(specs, config)
    layers = {stack: [name for name in names if name in layer] for stack, layer in specs.items() if not is_spec(layer)}
    return {stack: {name: _declare(name, specs[stack][name], config) for name in own} for stack, own in layers.items() if own}


def _declare(name: str, weight: ParamSpec, config: LoraConfig) -> LowRank:
    cut = weight.lead + (2 if name == "o" else 1)  # where its outputs begin: heads and their width are two inputs
    lead, inputs, outputs = weight.shape[: weight.lead], weight.shape[weight.lead : cut], weight.shape[cut:]
    largest = min(math.prod(inputs), math.prod(outputs))
    if not 1 <= config.rank <= largest:
        raise ValueError(
            f"config.model.lora.rank is {config.rank}, and '{name}' is a matrix [{math.prod(inputs)}, {math.prod(outputs)}]: "
            f"expected 1 to {largest}, or config.model.lora.targets without '{name}'"
        )
    module, total = PEFT + weight.hf_name.removesuffix("weight"), weight.hf.hf_shape(weight.own)[0]
    a = weight._replace(
        shape=(*lead, *inputs, config.rank),
        axes=(*weight.axes[:cut], None),
        init="normal",
        scale=(3 * math.prod(inputs)) ** -0.5,
        hf_name=f"{module}lora_A.weight",
        hf=linear(inputs=len(inputs)),
    )
    b = weight._replace(
        shape=(*lead, config.rank, *outputs),
        axes=(*weight.axes[: weight.lead], None, *weight.axes[cut:]),
        init="zeros",
        hf_name=f"{module}lora_B.weight",
        hf=linear(start=weight.hf.start, total=total),
    )
    return LowRank(None, a, b, config.alpha / config.rank)


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, LowRank)


def adapt(base: Params, trained: Params) -> Params:
    """The policy's parameters: `trained` where these are all of them; where they are adapters, `base` with them.

    Adapters that `base` has already are replaced. Only the tree is new: the arrays are those given.
    """
    if not any(_is_low_rank(each) and each.weight is None for each in jax.tree.leaves(trained, is_leaf=_is_low_rank)):
        return trained
    adapted = dict(base)
    for stack, own in trained.items():
        whole = {name: _frozen(weight) for name, weight in base[stack].items()}
        adapted[stack] = whole | {name: LowRank(whole[name], each.a, each.b, each.scale) for name, each in own.items()}
    return adapted


def _frozen(weight: Any) -> Any:
    return weight.weight if _is_low_rank(weight) else weight


def merge(params: Params) -> Params:
    """The parameters with W + (alpha / rank) A B (Eq. 3) in the place of adapted weights, rounded to W's type."""

    def plain(x: Any) -> Any:
        if not _is_low_rank(x):
            return x
        return jax.jit(_merged, out_shardings=x.weight.sharding)(x)

    return jax.tree.map(plain, params, is_leaf=_is_low_rank)


def _merged(x: LowRank) -> jax.Array:
    wide = at_least_float32(x.weight.dtype)

    def delta(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tensordot(a.astype(wide), b.astype(wide), axes=1, precision="highest")

    return (x.weight.astype(wide) + x.scale * jax.vmap(delta)(x.a, x.b)).astype(x.weight.dtype)


# ---- PEFT's format


def export(adapters: Params, specs: Specs, config: LoraConfig, folder: str | Path, *, base: str) -> None:
    """Writes adapters of a model that declares `specs` as a folder that PEFT reads, in float32. Every process must call it.

    `base` is the checkpoint's path or name, '' for none. Weights that share a tensor in the checkpoint (Phi-3's q, k and v) share
    an adapter there: their A one below the other, their B the blocks of a diagonal, the same sum with as many ranks as they have.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    tensors, parts = _tensors(adapters, declare_lora(specs, config), rank=config.rank)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "tensors.tmp", metadata={"format": "pt"})
        os.replace(folder / "tensors.tmp", folder / "adapter_model.safetensors")
        text = json.dumps(_peft_config(specs, parts, config, base), indent=2, sort_keys=True) + "\n"
        (folder / "config.tmp").write_text(text, encoding="utf-8")
        os.replace(folder / "config.tmp", folder / "adapter_config.json")
    sharding.barrier("adapter")


def _tensors(adapters: Params, declared: Specs, *, rank: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """PEFT's tensors by name, and of how many of our weights each module, its layer left open, is made."""
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, int] = {}
    for stack, layer in declared.items():
        modules: dict[str, list[str]] = {}
        for name in sorted(layer, key=lambda name: layer[name].b.hf.start):
            modules.setdefault(layer[name].a.hf_name, []).append(name)
        for module, names in modules.items():
            parts[module.removeprefix(PEFT).removesuffix(".lora_A.weight")] = len(names)
            first = layer[names[0]]
            for index, name_a in first.a.names():
                a, b = [], np.zeros((first.b.hf.hf_shape(first.b.own)[0], rank * len(names)), np.float32)
                for number, name in enumerate(names):
                    ours, spec = adapters[stack][name], layer[name]
                    own = _in_file(ours.b, spec.b, index)
                    b[spec.b.hf.start : spec.b.hf.start + len(own), number * rank : (number + 1) * rank] = own
                    a.append(_in_file(ours.a, spec.a, index))
                # safetensors silently stores wrong values for an array that is not contiguous
                tensors[name_a] = np.ascontiguousarray(np.concatenate(a))
                tensors[name_a.replace("lora_A", "lora_B")] = b
    return tensors, parts


def _in_file(value: jax.Array, declared: ParamSpec, index: tuple[int, ...]) -> np.ndarray:
    """One layer's matrix as a file holds it, [outputs, inputs]."""
    return declared.hf.to_hf(sharding.fetch(value[index])).astype(np.float32)


def _peft_config(specs: Specs, parts: dict[str, int], config: LoraConfig, base: str) -> dict[str, Any]:
    every = {each.hf_name.removesuffix(".weight") for each in jax.tree.leaves(specs, is_leaf=is_spec)}
    routed = {module.rpartition(".")[2] for module in every if "{expert}" in module}
    called = {module: module.rpartition(".")[2] for module in parts}
    # PEFT takes every module named like a routed expert's for one (transformers holds those as one parameter), wherever it
    # lies; a parameter's name it takes as it is
    paths = {module.partition("{layer}.")[2] + ".weight" for module, name in called.items() if name in routed}
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": alpha,
        "target_modules": sorted(set(called.values()) - routed),
        "target_parameters": sorted(paths) or None,
        "rank_pattern": {called[module]: count * config.rank for module, count in parts.items() if count > 1},
        "alpha_pattern": {called[module]: count * alpha for module, count in parts.items() if count > 1},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
