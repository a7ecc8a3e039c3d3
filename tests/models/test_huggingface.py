"""Folders in and out: parity with what transformers computed, import and export as inverses, and clear errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import decoder, huggingface, spec
from jaxreason.models.config import Architecture, Numerics, Rope
from jaxreason.models.declare import declare
from jaxreason.models.tokenizer import Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.sampling.rollout import sample
from jaxreason.tasks.word_problems import vocabulary

MODELS = ("tiny_qwen2", "tiny_qwen2_sharded", "tiny_qwen3", "tiny_llama3")
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, shared: Path) -> Path:
    return shared / "data" / "models" / request.param


@pytest.fixture
def tied(shared: Path, tmp_path: Path) -> Path:
    """A copy of the tied model, to be broken."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in (shared / "data" / "models" / "tiny_qwen2").iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Any:
    return sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor), devices=jax.devices()[: data * fsdp * tensor])


def load(folder: Path, *, dtype: str = "float32", on: Any = None) -> Any:
    specs = declare(huggingface.read_architecture(folder))
    return huggingface.load_params(specs, folder, dtype=dtype, mesh=on or mesh())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read whole by safetensors itself."""
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def logits(folder: Path, tokens: np.ndarray, mask: np.ndarray, *, on: Any = None) -> np.ndarray:
    on = on or mesh()
    model = decoder.make_decoder(huggingface.read_architecture(folder), Numerics(), on)
    rows = len(tokens)
    pad = -rows % sharding.problem_shards(on)  # rows must divide over the mesh
    tokens, mask = (jnp.asarray(np.concatenate([x, x[:pad]])) for x in (tokens.astype(np.int32), mask.astype(bool)))
    run = jax.jit(lambda p, t, m: decoder.logits(model, p, t, m))
    return np.asarray(run(load(folder, on=on), tokens, mask))[:rows]


# ---- parity with transformers


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_logits_equal_those_of_transformers(folder: Path, axes: tuple[int, int, int]) -> None:
    reference = np.load(folder / "reference.npz")
    found = logits(folder, reference["ids"], reference["attention_mask"], on=mesh(*axes))
    real = reference["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[real], reference["logits"][real], rtol=0, atol=1e-4)


def test_greedy_continuation_through_the_cache_equals_that_of_transformers(folder: Path) -> None:
    reference = np.load(folder / "reference.npz")
    start = reference["ids"].shape[1]
    expected = reference["greedy"][:, start:]
    model = decoder.make_decoder(huggingface.read_architecture(folder), Numerics(), mesh())
    prompts = PromptBatch(
        prompt=jnp.asarray(reference["ids"], jnp.int32),
        prompt_mask=jnp.asarray(reference["attention_mask"], bool),
        problem=jnp.arange(len(expected), dtype=jnp.uint32),
        answer=jnp.zeros(len(expected), jnp.int32),
    )
    tokenizer = load_tokenizer(folder)
    ends = {"eos_ids": tokenizer.eos_ids, "pad_id": tokenizer.pad_id}
    run = jax.jit(partial(sample, model, key=None, group=1, max_completion_tokens=expected.shape[1], **ends))
    out = run(load(folder), prompts)
    np.testing.assert_array_equal(np.asarray(out.completion[:, 0]), expected)


def test_greedy_continuation_by_teacher_forcing_equals_that_of_transformers(folder: Path) -> None:
    reference = np.load(folder / "reference.npz")
    start, rows = reference["ids"].shape[1], reference["greedy"][:, :-1]
    mask = np.concatenate([reference["attention_mask"], np.ones((len(rows), rows.shape[1] - start), np.int64)], axis=1)
    found = logits(folder, rows, mask)[:, start - 1 :].argmax(-1)
    np.testing.assert_array_equal(found, reference["greedy"][:, start:])


# ---- import


@pytest.mark.parametrize("folder", ["tiny_qwen2", "tiny_qwen2_sharded"], indirect=True)
@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_every_parameter_is_its_tensor_rearranged_on_any_mesh(folder: Path, axes: tuple[int, int, int]) -> None:
    params, files = load(folder, on=mesh(*axes)), tensors(folder)
    architecture = huggingface.read_architecture(folder)
    heads, size = architecture.heads, architecture.head_size

    def stack(name: str) -> np.ndarray:
        return np.stack([files[f"model.layers.{layer}.{name}"] for layer in range(architecture.layers)])

    layers = params["layers"]
    assert layers["q"].sharding.num_devices == np.prod(axes)
    q = stack("self_attn.q_proj.weight")  # [L, H C, D]
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        np.testing.assert_array_equal(np.asarray(layers["q"][:, :, head]), np.swapaxes(q[:, own], 1, 2))
        np.testing.assert_array_equal(np.asarray(layers["q_bias"][:, head]), stack("self_attn.q_proj.bias")[:, own])
        o = stack("self_attn.o_proj.weight")[:, :, own]
        np.testing.assert_array_equal(np.asarray(layers["o"][:, head]), np.swapaxes(o, 1, 2))
    np.testing.assert_array_equal(np.asarray(layers["down"]), np.swapaxes(stack("mlp.down_proj.weight"), 1, 2))
    np.testing.assert_array_equal(np.asarray(layers["mlp_norm"]), stack("post_attention_layernorm.weight"))
    np.testing.assert_array_equal(np.asarray(params["embed"]), files["model.embed_tokens.weight"])
    if not architecture.tied:
        np.testing.assert_array_equal(np.asarray(params["head"]), files["lm_head.weight"].T)


def test_half_precision_files_are_read_exactly(tied: Path) -> None:
    whole = load_file(tied / WEIGHTS)
    for stored in ("bfloat16", "float16"):
        cut = {name: x.astype(jnp.dtype(stored)) for name, x in whole.items()}
        save_file(cut, tied / WEIGHTS, metadata={"format": "pt"})
        for dtype in ("float32", "bfloat16"):
            found = load(tied, dtype=dtype)["embed"]
            assert found.dtype == dtype
            expected = cut["model.embed_tokens.weight"].astype(jnp.dtype(dtype))
            np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_second_copy_of_the_embedding_and_rotary_buffers_are_tolerated(tied: Path) -> None:
    before, files = load(tied), load_file(tied / WEIGHTS)
    files["lm_head.weight"] = files["model.embed_tokens.weight"].copy()
    files["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(files, tied / WEIGHTS)
    assert_same(load(tied), before)


NORM = "model.layers.1.input_layernorm.weight"


def _drop(files: dict[str, np.ndarray]) -> None:
    del files[NORM]


def _add(files: dict[str, np.ndarray]) -> None:
    files["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)


def _reshape(files: dict[str, np.ndarray]) -> None:
    files[NORM] = np.zeros((1, 64), np.float32)


def _quantise(files: dict[str, np.ndarray]) -> None:
    files[NORM] = np.zeros(64, np.int8)


def _untie(files: dict[str, np.ndarray]) -> None:
    files["lm_head.weight"] = files["model.embed_tokens.weight"] + np.float32(1)


BROKEN = {
    "missing": (_drop, rf"copy: tensor {NORM} of shape \[64\] is in none"),
    "surplus": (_add, r"copy: tensor model\.layers\.3\.mlp\.up_proj\.weight in model\.safetensors is not among the 38"),
    "shape": (_reshape, rf"tensor {NORM} in model\.safetensors has shape \[1, 64\], expected \[64\]"),
    "quantised": (_quantise, rf"tensor {NORM} in model\.safetensors holds I8, expected one of F64, F32, F16, BF16"),
    "untied": (_untie, r"lm_head\.weight in model\.safetensors differs from model\.embed_tokens\.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_one_error(tied: Path, case: str) -> None:
    change, message = BROKEN[case]
    files = load_file(tied / WEIGHTS)
    change(files)
    save_file(files, tied / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load(tied)


def test_many_faults_are_counted_in_one_error(tied: Path) -> None:
    files = {name: x for name, x in load_file(tied / WEIGHTS).items() if "layers.0" not in name}
    save_file(files, tied / WEIGHTS)
    with pytest.raises(ValueError, match="and 9 more: give a checkpoint"):
        load(tied)


@pytest.mark.parametrize("kept", [4, 200, 100_000])
def test_a_file_that_was_cut_off_is_named(tied: Path, kept: int) -> None:
    (tied / WEIGHTS).write_bytes((tied / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"copy/model\.safetensors is no whole safetensors file"):
        load(tied)


def test_a_missing_file_is_named(shared: Path, tied: Path, tmp_path: Path) -> None:
    (tied / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors, and no model\.safetensors\.index\.json"):
        load(tied)
    cut = tmp_path / "cut"
    shutil.copytree(shared / "data" / "models" / "tiny_qwen2_sharded", cut, copy_function=shutil.copyfile)
    cut.chmod(0o755)
    (cut / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00003-of-00005\.safetensors, which model\.safetensors\.index\.json names"):
        load(cut)


def test_an_index_that_is_none_or_names_another_file(shared: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(shared / "data" / "models" / "tiny_qwen2_sharded", cut, copy_function=shutil.copyfile)
    cut.chmod(0o755)
    index = cut / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong in ({}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {name: 3}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"cut/model\.safetensors\.index\.json has no weight_map from tensors' names"):
            load(cut)
    other = next(file for file in placed.values() if file != placed[name])
    index.write_text(json.dumps({"weight_map": placed | {name: other}}))
    with pytest.raises(ValueError, match=rf"tensor {name} of shape \[176, 64\] is not in {other}, where model.*index\.json has it"):
        load(cut)


# ---- config.json


def _configure(folder: Path, **changes: Any) -> Path:
    """Changes config.json; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_both_forms_of_a_config_are_read(tied: Path) -> None:
    expected = Architecture("qwen2", 512, 64, 3, 4, 2, 16, 176, 2048, 1e-6, True, 0.02)
    assert huggingface.read_architecture(tied) == expected
    _configure(tied, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert huggingface.read_architecture(tied).rope.theta == 5e5
    _configure(tied, rope_parameters=None, dtype=None, rope_theta=1_000_000, rope_scaling=None, torch_dtype="bfloat16")
    assert huggingface.read_architecture(tied).rope.theta == 1e6
    _configure(tied, rope_scaling={"type": "default"}, head_dim=32, tie_word_embeddings=None)
    found = huggingface.read_architecture(tied)
    assert (found.head_size, found.kv_heads, found.tied) == (32, 2, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"config\.json has model_type 'gpt2', and supported are deepseek_v3, gemma2, .*qwen2"),
        ({"model_type": None}, "has model_type None"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic"}}, "has rope_type 'dynamic', and supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor: expected a number"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "has layer_types with 'chunked_attention'"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "has 1 layer_types for 3 layers"),
        ({"mlp_bias": True}, "has mlp_bias True, and supported is False"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', and supported is 'silu'"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config .*, and supported is none: give another checkpoint"),
        ({"hidden_size": None}, "has no hidden_size: expected an integer"),
        ({"num_hidden_layers": "3"}, "has num_hidden_layers '3': expected an integer"),
    ],
)
def test_an_architecture_that_we_do_not_compute_is_refused(tied: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        huggingface.read_architecture(_configure(tied, **changes))


def test_a_config_that_cannot_be_read_is_named(tied: Path) -> None:
    for content, message in (("{", "is not valid JSON"), ("[]", "holds a JSON list")):
        (tied / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"copy/config\.json {message}"):
            huggingface.read_architecture(tied)
    (tied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"copy/config\.json does not exist"):
        huggingface.read_architecture(tied)


def test_a_path_is_a_folder_or_a_hub_name(tied: Path) -> None:
    assert huggingface.resolve(str(tied)) == tied
    with pytest.raises(ValueError, match="'/no/such/folder' is no folder here and no hub name of the form owner/name"):
        huggingface.resolve("/no/such/folder")
    with pytest.raises(ValueError, match=r"'nobody/no-such-model' is no folder here, and the hub did not give it"):
        huggingface.resolve("nobody/no-such-model")  # conftest.py keeps the hub offline


# ---- export


def test_import_export_import_is_the_identity(folder: Path, tmp_path: Path) -> None:
    architecture, tokenizer = huggingface.read_architecture(folder), load_tokenizer(folder)
    params, target = load(folder, on=mesh(2, 2, 2)), tmp_path / "export"
    huggingface.export(params, architecture, tokenizer, target, source=folder)
    assert huggingface.read_architecture(target) == architecture
    assert_same(load(target), params)
    assert_same(tensors(target), tensors(folder))  # names, shapes and bits, as another library reads them
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert json.loads((target / name).read_text()) == json.loads((folder / name).read_text())
    assert (target / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    again = load_tokenizer(target)
    assert (again.eos_ids, again.pad_id) == (tokenizer.eos_ids, tokenizer.pad_id)
    turn = [[{"role": "user", "content": "Tom has 7 pens — how many?"}]]
    assert again.encode_prompts(turn) == tokenizer.encode_prompts(turn)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["export"]


def test_older_keys_of_the_source_are_kept(tied: Path, tmp_path: Path) -> None:
    _configure(tied, rope_parameters=None, rope_theta=2e4, dtype=None, torch_dtype="float32", custom="kept")
    (tied / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "temperature": 0.7}))
    params, tokenizer = load(tied), load_tokenizer(tied)
    huggingface.export(params, huggingface.read_architecture(tied), tokenizer, tmp_path / "new", source=str(tied), dtype="bfloat16")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"], config["custom"]) == ("bfloat16", 2e4, "kept")
    assert "dtype" not in config
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 1], "temperature": 0.7, "pad_token_id": 0}
    assert load_tokenizer(tmp_path / "new").eos_ids == (2, 1)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_same(load(tmp_path / "new", dtype="bfloat16"), rounded)


def test_a_large_export_is_cut_into_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "FILE_BYTES", 200_000)
    params = load(folder)
    huggingface.export(params, huggingface.read_architecture(folder), load_tokenizer(folder), tmp_path / "cut")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 200_000 for file in files)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(folder).values())
    assert all(set(load_file(file)) == {n for n, f in index["weight_map"].items() if f == file.name} for file in files)
    assert_same(load(tmp_path / "cut"), params)


def quickstart(folder: Path, **sizes: Any) -> tuple[Architecture, Tokenizer, Any]:
    """A randomly initialised model of the quickstart's size with the word tokenizer."""
    save_word_tokenizer(vocabulary(), folder)
    architecture = Architecture(**sizes)
    rng = np.random.default_rng(0)
    # not zeros for the biases and ones for the scales, which would hide an exchange of two of them
    params = spec.tree_map(
        lambda each: jnp.asarray(rng.normal(1, 0.3, each.shape) - (each.init != "ones"), jnp.float32), declare(architecture)
    )
    return architecture, load_tokenizer(folder), params


def test_transformers_reads_the_config_of_an_export(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    sizes = {"rope": Rope(5e4), "head_size": 16, "norm_epsilon": 1e-5, "initializer_range": 0.1, "max_positions": 128}
    architecture, tokenizer, params = quickstart(tmp_path / "words", **sizes)
    target = tmp_path / "deep" / "export"
    huggingface.export(params, architecture, tokenizer, target)
    assert huggingface.read_architecture(target) == architecture
    config = AutoConfig.from_pretrained(target)
    assert (config.model_type, config.architectures) == ("qwen2", ["Qwen2ForCausalLM"])
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim) == (64, 128, 384, 16)
    assert (config.rms_norm_eps, config.initializer_range, config.max_position_embeddings) == (1e-5, 0.1, 128)
    assert config.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    assert config.tie_word_embeddings and config.layer_types == ["full_attention"] * 2
    assert (config.eos_token_id, config.pad_token_id) == (*tokenizer.eos_ids, tokenizer.pad_id)
    generation = GenerationConfig.from_pretrained(target)
    assert (generation.eos_token_id, generation.pad_token_id) == (*tokenizer.eos_ids, tokenizer.pad_id)


def test_an_export_keeps_the_word_tokenizer(tmp_path: Path) -> None:
    # transformers' AutoTokenizer rebuilds the tokenizer of every Qwen2 folder by Qwen's own splitting rule
    architecture, tokenizer, params = quickstart(tmp_path / "words")
    huggingface.export(params, architecture, tokenizer, tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    text = "Tom has 7 pens. Loses 3. How many?<think>7-3=4</think><answer>4</answer>"
    assert again.encode_completions([text]) == tokenizer.encode_completions([text])
    assert again.decode(again.encode_completions([text])[0]) == text
    assert (again.eos_ids, again.pad_id) == (tokenizer.eos_ids, tokenizer.pad_id)


@pytest.mark.torch
@pytest.mark.parametrize(
    "sizes",
    [{}, {"tied": False, "head_size": 16, "kv_heads": 1, "layers": 10, "rope": Rope(1e6)}],
    ids=["quickstart", "other"],
)
def test_torch_computes_the_same_from_an_export(tmp_path: Path, sizes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    from transformers import AutoModelForCausalLM

    architecture, tokenizer, params = quickstart(tmp_path / "words", **sizes)
    huggingface.export(params, architecture, tokenizer, tmp_path / "export")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32

    tokens = np.random.default_rng(0).integers(0, architecture.vocab_size, (4, 24)).astype(np.int32)
    mask = np.arange(24)[None] >= np.array([0, 3, 11, 20])[:, None]
    with torch.no_grad():
        inputs = torch.tensor(tokens).long(), torch.tensor(mask).long()
        positions = (inputs[1].cumsum(1) - 1).clamp(min=0)
        expected = theirs.eval()(inputs[0], attention_mask=inputs[1], position_ids=positions).logits.numpy()
    found = logits(tmp_path / "export", tokens, mask)
    scale = np.abs(expected[mask]).max()
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=2e-5 * scale)


def test_only_an_export_is_replaced(tied: Path, tmp_path: Path) -> None:
    architecture, tokenizer, params = huggingface.read_architecture(tied), load_tokenizer(tied), load(tied)
    target = tmp_path / "target"
    target.mkdir()  # an empty folder holds nothing to lose
    huggingface.export(params, architecture, tokenizer, target)
    (target / "stale.txt").write_text("")
    changed = jax.tree.map(lambda x: x + 1, params)
    huggingface.export(changed, architecture, tokenizer, target)
    assert_same(load(target), changed)
    assert not (target / "stale.txt").exists()

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")  # a run's folder has one too
    with pytest.raises(ValueError, match=r"run exists and is no exported model, so it is not replaced"):
        huggingface.export(params, architecture, tokenizer, run)
    with pytest.raises(ValueError, match="is no exported model"):
        huggingface.export(params, architecture, tokenizer, run / "config.json")
    assert [each.name for each in run.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="is the checkpoint that training started from"):
        huggingface.export(params, architecture, tokenizer, tied, source=tied)
    with pytest.raises(ValueError, match="got dtype 'int8': expected one of float32, bfloat16, float16"):
        huggingface.export(params, architecture, tokenizer, target, dtype="int8")


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
from jaxreason import sharding
from jaxreason.models import huggingface
from jaxreason.models.declare import declare
from jaxreason.models.tokenizer import Tokenizer

class Killer:
    def save_pretrained(self, folder):
        assert (Path(folder) / "model.safetensors").is_file()
        os.kill(os.getpid(), signal.SIGKILL)

assert not {"torch", "transformers"} & set(sys.modules)
folder, target = Path(sys.argv[1]), Path(sys.argv[2])
architecture = huggingface.read_architecture(folder)
mesh = sharding.make_mesh(sharding.MeshConfig())
params = huggingface.load_params(declare(architecture), folder, dtype="float32", mesh=mesh)
huggingface.export(jax.tree.map(lambda x: x + 1, params), architecture, Tokenizer(Killer(), (2,), 0), target)
"""


@pytest.mark.slow
def test_a_kill_leaves_no_half_folder(tied: Path, tmp_path: Path) -> None:
    architecture, tokenizer, params = huggingface.read_architecture(tied), load_tokenizer(tied), load(tied)
    target = tmp_path / "target"
    huggingface.export(params, architecture, tokenizer, target)
    for each in (target, tmp_path / "new"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tied), str(each)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert_same(load(target), params)
    assert not (tmp_path / "new").exists()
    huggingface.export(params, architecture, tokenizer, tmp_path / "new")
    huggingface.export(params, architecture, tokenizer, target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy", "new", "target"]


TWO = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxreason import sharding
from jaxreason.models import huggingface
from jaxreason.models.declare import declare
from jaxreason.models.tokenizer import load_tokenizer

read = 0  # numbers, out of the files

class Counted:
    def __init__(self, block):
        self.block = block

    def __getitem__(self, index):
        global read
        values = self.block[index]
        read += values.size
        return values

Stored = huggingface.Stored
huggingface.Stored = lambda file, shape, kind, block: Stored(file, shape, kind, Counted(block))
folder, target = Path(sys.argv[3]), Path(sys.argv[4])
architecture = huggingface.read_architecture(folder)
mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2))
params = huggingface.load_params(declare(architecture), folder, dtype="float32", mesh=mesh)
assert not params["layers"]["q"].is_fully_addressable
leaves = jax.tree.leaves(params)
held = sum(sum({str(each.index): each.data.size for each in x.addressable_shards}.values()) for x in leaves)
assert read == held < 0.6 * sum(x.size for x in leaves), (read, held)
huggingface.export(params, architecture, load_tokenizer(folder), target, source=folder)
assert (target / "config.json").is_file()
"""


@pytest.mark.slow
def test_two_processes_import_and_export_together(folder: Path, tmp_path: Path) -> None:
    import os
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(number), str(folder), str(tmp_path / "export")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for each in started:
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
    assert_same(tensors(tmp_path / "export"), tensors(folder))
