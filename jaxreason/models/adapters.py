"""Bring your own: a Flax module, nnx or linen, as the `Model` that training and sampling use.

The contract, checked by shapes when the policy is made. The module is called with whole rows of one text each,

    module(tokens, positions, mask) -> logits

    tokens     [B, N] int32
    positions  [B, N] int32, of each token in its text, from 0
    mask       [B, N, N] bool, True where query [b, i] may see key [b, j]: it is not later, and of the same text; no row is empty
    logits     [B, N, V] float, of the token after each; they must not depend on later tokens

or as `call(module, tokens, positions, mask)` says, if it wants to be called otherwise. With a `head`, `call` returns hidden states
[B, N, D], and head(module, hidden [rows, D]) the logits [rows, V].

Rows are turned so that padding comes last, so a causal module may ignore positions and mask. (Not in packed rows, several texts
in one, which `Model.hidden` takes: there it would see its neighbours.) Deliberately absent: a prompt that is computed once for its
group, and a cache. To sample a token is to compute its row again, so a completion of T tokens costs T forward passes;
`model._replace(prefill=..., decode=...)` takes better ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx, traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import spec
from jaxreason.models.config import Numerics
from jaxreason.models.decoder import Model, Params
from jaxreason.numerics import at_least_float32

Call = Callable[[Any, jax.Array, jax.Array, jax.Array], Any]  # module, tokens, positions, mask -> logits, or hidden states
Head = Callable[[Any, jax.Array], Any]  # module, hidden [rows, D] -> logits [rows, V]
Run = Callable[..., jax.Array]  # function, params, arrays -> function(module with these params, arrays)
Path = tuple[str, ...]


class Given(NamedTuple):
    """A parameter as the module has it."""

    value: Any
    names: tuple[Any, ...]  # of its axes; () where it has none
    rules: Any  # (name, mesh axis) pairs that the module has for them


class Context(NamedTuple):
    """What the model's functions know beside their arguments."""

    run: Run
    call: Call
    head: Head | None
    constrain: sharding.Constrain


def from_nnx(
    module: nnx.Module, *, mesh: Mesh, call: Call | None = None, head: Head | None = None, logits_chunk_tokens: int = 1024
) -> tuple[Model, Params]:
    """The policy that an nnx module is, and its parameters on the mesh: a nested dict of arrays, by attribute and list index.

    Its `nnx.Param`s are learnt. All other variables are constants, and what is written to them is dropped. Dropout is off and
    running averages are used, as after `module.eval()`; the module itself stays as it is (see `write_nnx`).
    Axes named in `out_sharding` lie as sharding.RULES says; a mesh axis' name is taken as well, other names are replicated.
    With a head, training makes `logits_chunk_tokens` logits at a time; without one, all [P, G, T, V] of a micro-batch at once.
    Unbound methods make good functions: call=Policy.hidden, head=Policy.logits.

    A ValueError where the module breaks the contract above, as far as shapes tell. What they do not, looking ahead or noise, makes
    the trainer's numbers differ from the sampler's: policy/sampler_gap.
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(f"from_nnx was given a {type(module).__name__}: expected an nnx module; from_linen takes linen ones")
    fixed = nnx.clone(module)  # another tree of the same arrays
    fixed.eval()
    graph, learnt, rest = nnx.split(fixed, nnx.Param, ...)
    variables = nnx.to_flat_state(learnt)
    keys = [path for path, _ in variables]
    structure = jax.tree.structure([variable for _, variable in variables])
    constants = _constants(rest)
    given = {}
    for path, variable in variables:
        metadata = variable.get_metadata()
        names, rules = metadata.get("out_sharding") or (), metadata.get("sharding_rules") or ()
        given[tuple(map(str, path))] = Given(variable.get_value(), tuple(names), rules)

    def run(function: Any, params: Params, *args: jax.Array) -> jax.Array:
        flat = traverse_util.flatten_dict(params)
        filled = jax.tree.unflatten(structure, [flat[tuple(map(str, path))] for path in keys])
        state = nnx.from_flat_state(list(zip(keys, filled, strict=True)))
        return function(nnx.merge(graph, state, jax.tree.map(_traced, constants)), *args)

    name = type(module).__name__
    return _policy(run, given, mesh=mesh, call=call, head=head, logits_chunk_tokens=logits_chunk_tokens, name=name)


def write_nnx(module: nnx.Module, params: Params) -> None:
    """Writes parameters, trained ones say, into the module that they come from."""
    flat = traverse_util.flatten_dict(params)
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):  # the module's own variables
        variable.set_value(flat[tuple(map(str, path))])


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    *,
    mesh: Mesh,
    call: Call | None = None,
    head: Head | None = None,
    logits_chunk_tokens: int = 1024,
) -> tuple[Model, Params]:
    """The policy that a linen module is with the variables of its `init`, and its parameters on the mesh, a nested dict of arrays.

    As `from_nnx`: what is in "params" is learnt, other collections are constants, and names given by `with_partitioning` or
    `with_logical_partitioning` place a parameter. Dropout must be told to be off, in the module or by `call`.
    """
    name = type(module).__name__
    if not isinstance(module, linen.Module):
        raise ValueError(f"from_linen was given a {name}: expected a linen module; from_nnx takes nnx ones")
    if "params" not in variables:
        raise ValueError(
            f"{name} was given variables with the collections {', '.join(map(repr, variables)) or 'none'}, expected 'params' among "
            "them: pass what module.init returned, whole"
        )
    constants = _constants({key: core.unfreeze(value) for key, value in variables.items() if key != "params"})
    given = {}
    for path, leaf in traverse_util.flatten_dict(core.unfreeze(variables["params"])).items():
        if isinstance(leaf, linen.Partitioned):
            rules = getattr(leaf, "rules", None) or ()
            given[path] = Given(leaf.unbox(apply_constraint=False), tuple(leaf.names), rules)
        else:
            given[path] = Given(leaf, (), ())

    def run(function: Any, params: Params, *args: jax.Array) -> jax.Array:
        out: Any = module.apply({"params": params, **jax.tree.map(_traced, constants)}, *args, method=function)
        return out

    return _policy(run, given, mesh=mesh, call=call, head=head, logits_chunk_tokens=logits_chunk_tokens, name=name)


def _constants(tree: Any) -> Any:
    """Arrays as NumPy's, so that they belong to no device; random keys stay what they are."""

    def fetch(x: Any) -> Any:
        is_array = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return sharding.fetch(x) if is_array else x

    return jax.tree.map(fetch, core.meta.unbox(tree))


def _traced(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _call(module: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> Any:
    return module(tokens, positions, mask)


def _policy(
    run: Run, given: dict[Path, Given], *, mesh: Mesh, call: Call | None, head: Head | None, logits_chunk_tokens: int, name: str
) -> tuple[Model, Params]:
    """The model of a module that `run` calls, after all checks."""
    dtype = _dtype(given, name=name)
    specs = traverse_util.unflatten_dict({path: _declare("/".join(path), each) for path, each in given.items()})
    spec.check_divisible(specs, mesh)
    params = traverse_util.unflatten_dict({path: each.value for path, each in given.items()})
    c = Context(run, call or _call, head, sharding.constrainer(mesh))
    _check(c, params, name=name)
    model = Model(
        specs=specs,
        forward=partial(_forward, c=c),
        hidden=partial(_hidden, c=c),
        prefill=partial(_prefill, c=c),
        insert=_insert,
        empty=_empty,
        select=_select,
        decode=partial(_decode, c=c),
        prepare_sampling=lambda params: params,
        project=partial(_project, c=c),
        numerics=Numerics(param_dtype=dtype, matmul_dtype=dtype, remat="none", logits_chunk_tokens=logits_chunk_tokens),
    )
    return model, jax.device_put(params, spec.shardings(specs, mesh))


# ---- declarations and checks


def _dtype(given: dict[Path, Given], *, name: str) -> str:
    """The one type of all parameters."""
    if not given:
        raise ValueError(f"{name} has no parameters: expected a module with at least one to learn")
    types = {"/".join(path): str(getattr(each.value, "dtype", type(each.value).__name__)) for path, each in given.items()}
    first, dtype = next(iter(types.items()))
    for path, other in types.items():
        if other not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"parameter {path} of {name} is {other}: expected an array of float32, bfloat16 or float64")
        if other != dtype:
            raise ValueError(
                f"parameters {first} and {path} of {name} are {dtype} and {other}: expected one type, make it with one param_dtype"
            )
    return dtype


# the logical axis that lies on a mesh axis, where a module names the latter
LOGICAL = {on[0]: name for name, on in reversed([*sharding.RULES.items()]) if len(on) == 1}


def _declare(path: str, given: Given) -> spec.ParamSpec:
    """The declaration of a parameter that the module makes, and that no checkpoint of ours has."""
    rules = dict(reversed([*given.rules]))
    axes = tuple(_axis(path, rules.get(name, name)) for name in given.names) or (None,) * given.value.ndim
    if len(axes) != given.value.ndim:
        raise ValueError(f"parameter {path} has axes named {given.names}, expected {given.value.ndim} names, one for each axis")
    on = [mesh_axis for axis in axes if axis for mesh_axis in sharding.RULES.get(axis, ())]
    if len(on) != len(set(on)):
        raise ValueError(f"parameter {path} has axes named {given.names}, two of which lie on one mesh axis: leave one unnamed")
    return spec.ParamSpec(given.value.shape, axes, "zeros", 0.0, "", spec.table())


def _axis(path: str, name: Any) -> str | None:
    """The logical axis that is meant by a name or by a mesh axis."""
    only: Any = name[0] if isinstance(name, tuple) and len(name) == 1 else name
    if only is None or only in sharding.RULES:
        return only
    if isinstance(only, tuple) or (only in sharding.MESH_AXES and only not in LOGICAL):
        raise ValueError(
            f"parameter {path} lies on mesh axis {only}: expected one of {', '.join(sorted(LOGICAL))} for each of its axes, "
            f"or a name among {', '.join(sharding.RULES)}"
        )
    return LOGICAL.get(only)


def _check(c: Context, params: Params, *, name: str) -> None:
    """A ValueError where the module breaks the contract, from shapes alone."""
    rows, tokens = 2, 8
    shapes = {
        "tokens": (jnp.int32, (rows, tokens)),
        "positions": (jnp.int32, (rows, tokens)),
        "mask": (bool, (rows, tokens, tokens)),
    }
    args = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in shapes.values()]
    described = ", ".join(f"{key} {arg.dtype}{[*arg.shape]}" for key, arg in zip(shapes, args, strict=True))
    wanted = "logits" if c.head is None else "hidden states"
    out = _shape(
        partial(c.run, c.call), params, *args, what=f"{name} was called with ({described})", wanted=wanted, lead=(rows, tokens)
    )
    if c.head is not None:
        hidden = jax.ShapeDtypeStruct((rows * tokens, out.shape[-1]), out.dtype)
        what = f"the head of {name} was called with hidden {hidden.dtype}{[*hidden.shape]}"
        _shape(partial(c.run, c.head), params, hidden, what=what, wanted="logits", lead=(rows * tokens,))


def _shape(function: Any, params: Params, *args: Any, what: str, wanted: str, lead: tuple[int, ...]) -> Any:
    """The shape and type of what is returned, which must be one float array [*lead, any]."""
    expected = f"expected {wanted} [{', '.join(map(str, lead))}, {'V' if wanted == 'logits' else 'D'}]"
    try:
        out = jax.eval_shape(function, params, *args)
    except Exception as error:  # the module is somebody else's: whatever it raises is told
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{what} and raised {type(error).__name__}, {first!r}: {expected}; `call` says how to call it otherwise"
        ) from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} and returned a {type(out).__name__}: {expected}; `call` can take them out of it")
    if out.shape[:-1] != lead or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{what} and returned {out.dtype}{[*out.shape]}: {expected}, of a float type")
    return out


# ---- the model's functions


def _read(
    params: Params, tokens: Int[Array, "B N"], segments: Int[Array, "B N"], at: Int[Array, "#B K"], *, c: Context
) -> Float[Array, "B K D"]:
    """What the module makes of the tokens at places `at` of its rows; segment 0 is padding."""
    tokens, segments = (c.constrain(x, ("problems", None)) for x in (tokens, segments))
    size = tokens.shape[1]
    place = jnp.arange(size, dtype=jnp.int32)[None]
    lead = jnp.argmax(segments > 0, axis=1, keepdims=True).astype(jnp.int32)  # padding on the left, which goes to the end
    tokens, segments = (jnp.take_along_axis(x, (place + lead) % size, axis=1) for x in (tokens, segments))
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    positions = place - jax.lax.cummax(jnp.where(begins, place, jnp.zeros_like(segments)), axis=1)
    # padding sees padding: a row without a single key would be NaN in many a module
    mask = (place[:, :, None] >= place[:, None, :]) & (segments[:, :, None] == segments[:, None, :])
    out = c.run(c.call, params, tokens, positions, mask)
    return jnp.take_along_axis(out, ((at - lead) % size)[..., None], axis=1)


def _rows(
    prompt: Int[Array, "P Tp"], prompt_mask: Bool[Array, "P Tp"], own: Int[Array, "P G N"]
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """A row for every completion, its prompt in front: tokens and segments. What follows a completion is seen by none of it."""
    problems, group = own.shape[:2]
    prompt_mask = prompt_mask.at[:, -1].set(True)  # without any token there would be nothing to predict the first from

    def beside(a: jax.Array, b: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(a[:, None], (problems, group, a.shape[1]))
        return jnp.concatenate([repeated, b], axis=2).reshape(problems * group, -1)

    return beside(prompt, own), beside(prompt_mask.astype(jnp.int32), jnp.ones_like(own))


def _forward(
    params: Params,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    completion: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"] | None = None,
    *,
    c: Context,
) -> tuple[Float[Array, "P G T D"], Float[Array, ""]]:
    """From what each completion token is predicted (logits, without a head), and 0. The last token is fed to nobody."""
    tokens, segments = _rows(prompt, prompt_mask, completion[:, :, :-1])
    at = jnp.arange(prompt.shape[1] - 1, tokens.shape[1], dtype=jnp.int32)
    hidden = _read(params, tokens, segments, at[None], c=c)
    return hidden.reshape(*completion.shape, -1), jnp.zeros((), at_least_float32(hidden.dtype))


def _hidden(params: Params, tokens: Int[Array, "P N"], segments: Int[Array, "P N"], *, c: Context) -> Float[Array, "P N D"]:
    """The same of every token of rows of one or several segments, numbered from 1; 0 is padding, on either side."""
    return _read(params, tokens, segments, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], c=c)


def _project(params: Params, hidden: Float[Array, "rows D"], *, c: Context) -> Float[Array, "rows V"]:
    logits = hidden if c.head is None else c.run(c.head, params, hidden)
    return logits.astype(at_least_float32(logits.dtype))


class Prompts(NamedTuple):
    """Not a cache of keys and values: the prompts, to be read again."""

    prompt: Int[Array, "P Tp"]
    mask: Bool[Array, "P Tp"]


def _prefill(
    params: Params, prompt: Int[Array, "P Tp"], prompt_mask: Bool[Array, "P Tp"], *, c: Context
) -> tuple[Float[Array, "P D"], Prompts]:
    """From what the first token after each prompt is predicted."""
    tokens, segments = _rows(prompt, prompt_mask, jnp.zeros((prompt.shape[0], 1, 0), jnp.int32))
    at = jnp.full(prompt.shape[0], prompt.shape[1] - 1, jnp.int32)
    return _read(params, tokens, segments, at[:, None], c=c)[:, 0], Prompts(prompt, prompt_mask)


def _empty(prompts: Prompts, *, slots: int, tokens: int) -> Int[Array, "S T"]:
    """Room for the slots' own tokens."""
    return jnp.zeros((slots, tokens), jnp.int32)


def _insert(prompts: Prompts, some: Prompts, row: Int[Array, " R"]) -> Prompts:
    """`prompts` with others, no longer ones, in these rows; what goes to a row that does not exist is dropped."""
    more = prompts.prompt.shape[1] - some.prompt.shape[1]
    return Prompts(
        *(there.at[row].set(jnp.pad(x, ((0, 0), (more, 0))), mode="drop") for there, x in zip(prompts, some, strict=True))
    )


def _select(own: Int[Array, "S T"], index: Int[Array, " S"]) -> Int[Array, "S T"]:
    return own[index]


def _decode(
    params: Params,
    token: Int[Array, "S M"],
    prompts: Prompts,
    own: Int[Array, "S T"],
    root: Int[Array, " S"],
    length: Int[Array, " S"],
    live: Bool[Array, " S"],
    *,
    width: int,
    c: Context,
) -> tuple[Float[Array, "S M D"], Int[Array, "S T"]]:
    """Writes every slot's next M tokens and reads its whole row again."""
    place = length[:, None] + jnp.arange(token.shape[1], dtype=jnp.int32)[None]
    own = own.at[jnp.arange(root.shape[0], dtype=jnp.int32)[:, None], place].set(token, mode="drop")
    prompt, mask = (jnp.take(x, root, axis=0, mode="clip") for x in prompts)
    tokens, segments = _rows(prompt, mask, own[:, None])
    return _read(params, tokens, segments, prompt.shape[1] + place, c=c), own
