"""Decoders from and to Hugging Face folders, without torch: config.json, safetensors files and the tokenizer's files.

Names and shapes come from the declaration (spec.py) and are all checked before a number is read. Each process reads
only the blocks that its own devices hold. What a config.json means is families.py's matter. Deliberately absent:
quantised weights and pickled checkpoints.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.models import config_json, families, spec
from jaxreason.models.config import Architecture
from jaxreason.models.declare import EMBEDDING, HEAD, LANGUAGE, declare
from jaxreason.models.families import Head
from jaxreason.models.spec import ParamSpec, Specs
from jaxreason.models.tokenizer import Tokenizer

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt")
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
STORED = ("F64", "F32", "F16", "BF16")  # number types of a safetensors file that are read
EXPORTED = ("float32", "bfloat16", "float16")
FILE_BYTES = 5_000_000_000  # a larger export is cut into files of at most this size
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def resolve(path: str) -> Path:
    """The folder at `path`, or a snapshot of the hub repository of that name."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"model path {path!r} is no folder here and no hub name of the form owner/name: give a folder that holds "
            "config.json, or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        # the second pattern leaves out subfolders, which hold the same weights in other formats
        return Path(snapshot_download(path, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*"]))
    except Exception as error:  # network, permission, cache and naming errors share no base class
        raise ValueError(
            f"model path {path!r} is no folder here, and the hub did not give it ({type(error).__name__}): check the "
            "name, or download it where there is a network and give the folder"
        ) from error


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that a folder's config.json states; a ValueError where it is one that we do not compute."""
    file = Path(folder) / "config.json"
    return families.read(_read_json(file), file)


def read_head(folder: str | Path) -> Head:
    """What the folder's model ends in: logits, or scores of a sequence or of each token."""
    file = Path(folder) / "config.json"
    return families.read_head(_read_json(file), file)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a Hugging Face folder, which holds it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object: download it again")
    return content


# ---- import


class Stored(NamedTuple):
    """A tensor in an open file; indexing `block` reads that block alone."""

    file: str
    shape: tuple[int, ...]
    kind: str
    block: Any


def load_params(specs: Specs, folder: str | Path, *, dtype: str, mesh: Mesh) -> Any:
    """The parameters of a folder on the mesh. All tensors' names and shapes are checked before any is read."""
    with ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        _check(specs, tensors, Path(folder))
        return spec.tree_map(lambda each: _read(each, tensors, dtype=dtype, mesh=mesh), specs)


def _open(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, which stay open as long as the stack."""
    from safetensors import SafetensorError, safe_open

    placed = _placed(folder)
    tensors = {}
    for file in sorted(set(placed.values())) or [SINGLE]:
        if not (folder / file).is_file():
            where = f"which {INDEX} names" if placed else f"and no {INDEX}"
            raise ValueError(f"{folder} holds no {file}, {where}: give a folder with all of the model's safetensors files")
        try:
            opened = stack.enter_context(safe_open(folder / file, "numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is no whole safetensors file ({error}): download it again") from error
        for name in opened.keys():
            if placed.get(name, file) == file:
                block = opened.get_slice(name)
                tensors[name] = Stored(file, tuple(block.get_shape()), block.get_dtype(), block)
    return tensors


def _placed(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the folder's index has it; empty without an index."""
    if not (folder / INDEX).is_file():
        return {}
    placed = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors' names to files' names: download it again")
    return placed


def _check(specs: Specs, tensors: dict[str, Stored], folder: Path) -> None:
    """A ValueError where the tensors are not those declared."""
    expected = {name: each.hf.hf_shape(each.own) for _, each in spec.leaves(specs) for _, name in each.names()}
    placed = _placed(folder)
    wrong = []
    for name, shape in expected.items():
        if name not in tensors:
            where = f"not in {placed[name]}, where {INDEX} has it" if name in placed else "in none of the safetensors files"
            wrong.append(f"tensor {name} of shape {list(shape)} is {where}")
        elif tensors[name].shape != shape:
            wrong.append(f"tensor {name} in {tensors[name].file} has shape {list(tensors[name].shape)}, expected {list(shape)}")
        elif tensors[name].kind not in STORED:
            wrong.append(f"tensor {name} in {tensors[name].file} holds {tensors[name].kind}, expected one of {', '.join(STORED)}")
    extra = _predicting_ahead(folder)
    for name, stored in tensors.items():
        if (
            name not in expected
            and not (name == HEAD and "head" not in specs)
            and not name.endswith("rotary_emb.inv_freq")
            and not name.startswith(extra)
        ):
            wrong.append(f"tensor {name} in {stored.file} is not among the {len(expected)} that the architecture has")
    # some exports of a tied model hold the embedding a second time
    if not wrong and HEAD in tensors and HEAD not in expected and not _equal(tensors[HEAD], tensors[EMBEDDING]):
        wrong.append(f"tensor {HEAD} in {tensors[HEAD].file} differs from {EMBEDDING}, expected the same (tie_word_embeddings)")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{folder}: {'; '.join(wrong[:3])}{more}: give a checkpoint whose tensors fit its config.json")


def _predicting_ahead(folder: Path) -> tuple[str, ...]:
    """DeepSeek-V3's layers for several next tokens, which follow the decoder's and are no part of it."""
    config = _read_json(folder / "config.json")
    first, count = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{first + i}." for i in range(count))


def _equal(a: Stored, b: Stored) -> bool:
    rows = a.shape[0]
    parts = [slice(row, min(row + 4096, rows)) for row in range(0, rows, 4096)]
    return a.shape == b.shape and all(np.array_equal(a.block[part], b.block[part]) for part in parts)


def _read(each: ParamSpec, tensors: dict[str, Stored], *, dtype: str, mesh: Mesh) -> jax.Array:
    """A parameter on the mesh, layer by layer and block by block."""
    names, own, lead = dict(each.names()), each.own, each.lead

    @cache  # devices that hold the same block share one reading
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        values = np.empty(tuple(stop - start for start, stop in bounds), jnp.dtype(dtype))
        index = tuple(slice(*bound) for bound in bounds[lead:])
        for place in np.ndindex(*values.shape[:lead]):
            name = names[tuple(start + i for (start, _), i in zip(bounds, place, strict=False))]
            block = tensors[name].block[each.hf.hf_index(index, own)]
            values[place] = each.hf.to_ours(block, values.shape[lead:])
        return values

    def callback(index: Any) -> np.ndarray:
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, each.shape, strict=True)))

    return jax.make_array_from_callback(each.shape, sharding.named(mesh, each.axes), callback)


# ---- export


def export(
    params: Any,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    head: Head = LANGUAGE,
    source: str | Path | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a folder that transformers and `load_params` read. Every process must call it; the first one writes.

    With a `source`, its tokenizer's files are copied, and its config.json and generation_config.json are kept but for
    what differs; without a tokenizer and a source the folder has none. It appears whole or not at all; one that is there is
    replaced if it is an export too, and is otherwise a ValueError.
    """
    folder, source = Path(folder).absolute(), None if source is None else Path(source)
    if dtype not in EXPORTED:
        raise ValueError(f"export got dtype {dtype!r}: expected one of {', '.join(EXPORTED)}")
    if source is not None and folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the checkpoint that training started from: export to another folder")
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"{folder} exists and is no exported model, so it is not replaced: give a new folder")
    specs = declare(architecture, head)
    if jax.tree.structure(params) != jax.tree.structure(specs, is_leaf=spec.is_spec):
        raise ValueError("export got parameters other than the architecture and the head declare: merge adapters with lora.merge")
    partial = folder.with_name(f".{folder.name}.partial")
    writing = jax.process_index() == 0
    if writing:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write_tensors(params, specs, partial if writing else None, dtype=jnp.dtype(dtype))
    if writing:
        _write_tokenizer(tokenizer, source, partial)
        _write_json(partial / "config.json", _config(architecture, head, tokenizer, source, dtype=dtype))
        _write_json(partial / "generation_config.json", _generation(tokenizer, source))
        _swap(partial, folder)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("export")  # the folder is there for all when any returns


def _write_tokenizer(tokenizer: Tokenizer | None, source: Path | None, folder: Path) -> None:
    if source is None:
        if tokenizer is not None:
            tokenizer.save(folder)
        return
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _replaceable(folder: Path) -> bool:
    """An empty folder, or one with a config and weights; a run's folder has the first of them only."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors")))


def _swap(partial: Path, folder: Path) -> None:
    """Puts the finished folder in its place."""
    old = folder.with_name(f".{folder.name}.old")  # also what a kill at this place left
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class Piece(NamedTuple):
    """A parameter's part of a tensor: all of it, unless several parameters share one."""

    declared: ParamSpec
    value: jax.Array
    index: tuple[int, ...]  # in the leading axes


def _write_tensors(params: Any, specs: Specs, folder: Path | None, *, dtype: np.dtype) -> None:
    """Writes the safetensors files, with an index where there are several; without a folder only gathers."""
    from safetensors.numpy import save_file

    pieces: dict[str, list[Piece]] = {}
    for (_, each), value in zip(spec.leaves(specs), jax.tree.leaves(params), strict=True):
        for index, name in each.names():
            pieces.setdefault(name, []).append(Piece(each, value, index))
    files: list[list[str]] = [[]]
    size = total = 0
    for name, parts in pieces.items():
        count = sum(math.prod(part.declared.own) for part in parts) * _stored(name, dtype).itemsize
        if files[-1] and size + count > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + count, total + count
    placed = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for name in names:
            # a tensor at a time: gathering a whole stack would need room for it on every device
            parts = sorted(pieces[name], key=lambda part: part.declared.hf.start)
            blocks = [part.declared.hf.to_hf(sharding.fetch(part.value[part.index])) for part in parts]
            placed[name] = file
            if folder is not None:
                # safetensors silently stores wrong values for an array that is not contiguous
                tensors[name] = np.ascontiguousarray(np.concatenate(blocks).astype(_stored(name, dtype)))
        if folder is not None:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if folder is not None and len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _stored(name: str, dtype: np.dtype) -> np.dtype:
    """A router's correction bias is kept in float32: it decides between scores that differ little."""
    return np.dtype("float32") if name.endswith("e_score_correction_bias") else dtype


def _config(a: Architecture, head: Head, tokenizer: Tokenizer | None, source: Path | None, *, dtype: str) -> dict[str, Any]:
    config = _read_json(source / "config.json") if source else {}
    if source is None or read_architecture(source) != a:
        # without a tokenizer none: a family's default may lie outside the vocabulary
        eos, pad = (None, None) if tokenizer is None else (tokenizer.eos_ids[0], tokenizer.pad_id)
        ids = {"eos_token_id": eos, "pad_token_id": pad}
        config = {name: value for name, value in config.items() if name not in config_json.OLDER}
        config |= config_json.write(a) | {"bos_token_id": None} | ids
    if source is None or read_head(source) != head:
        config |= config_json.write_head(a.family, head)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config


def _generation(tokenizer: Tokenizer | None, source: Path | None) -> dict[str, Any]:
    """The source's settings with our stop tokens, in our order: the first is the one that ends a demonstration."""
    kept = source / "generation_config.json" if source else None
    config = _read_json(kept) if kept and kept.is_file() else {}
    if tokenizer is None:
        return config
    eos = tokenizer.eos_ids
    return config | {"eos_token_id": eos[0] if len(eos) == 1 else list(eos), "pad_token_id": tokenizer.pad_id}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
