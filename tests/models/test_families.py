"""Every family against transformers: tiny random checkpoints and what transformers computed from them (tests/fixtures).

Parity of logits and of greedy continuations, import and export as inverses, both forms of config.json, heads, and errors.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreason import sharding
from jaxreason.batch import PromptBatch
from jaxreason.models import cache as caches
from jaxreason.models import config as configs
from jaxreason.models import decoder, families, heads, huggingface, kernels, lora, spec
from jaxreason.models.config import Architecture, Experts, Latent, Numerics, Rope
from jaxreason.models.declare import declare
from jaxreason.models.families import Head
from jaxreason.sampling.rollout import sample

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
ALL = sorted(each.name for each in FOLDER.iterdir() if each.is_dir())
SCORERS = [name for name in ALL if name.endswith(("_reward", "_prm"))]
LANGUAGE = [name for name in ALL if name not in SCORERS]
TOKENS = 24  # of a greedy continuation
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@cache
def one_device() -> Any:
    return sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])


@cache
def made(name: str) -> tuple[decoder.Model, Any]:
    """The model of a fixture, and its parameters."""
    return load(FOLDER / name)


def load(folder: Path) -> tuple[decoder.Model, Any]:
    architecture = huggingface.read_architecture(folder)
    configs.check(architecture)
    model = decoder.make_decoder(architecture, Numerics(), one_device(), head=huggingface.read_head(folder))
    return model, huggingface.load_params(model.specs, folder, dtype="float32", mesh=one_device())


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / name / "reference.npz"))


def quick(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


def rows(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and mask padded on the right, then on the left."""
    right, lengths = reference(name)["tokens"], reference(name)["lengths"]
    width = right.shape[1]
    left = np.stack([np.roll(row, width - length) for row, length in zip(right, lengths, strict=True)])
    place = np.arange(width)[None]
    return right, place < lengths[:, None], left, place >= width - lengths[:, None]


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


# ---- parity


def test_the_families_are_all_here() -> None:
    found = {json.loads((FOLDER / name / "config.json").read_text())["model_type"] for name in LANGUAGE}
    assert found == set(configs.FAMILIES)
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 3_000_000


@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_equal_those_of_transformers(name: str) -> None:
    model, params = made(name)
    right, right_mask, left, left_mask = rows(name)
    run = quick(lambda p, t, m: decoder.logits(model, p, t, m))
    for tokens, mask, key in ((right, right_mask, "logits_right"), (left, left_mask, "logits_left")):
        expected = reference(name)[key][mask]
        assert np.abs(expected).max() > 3  # far from a model that says nothing
        np.testing.assert_allclose(np.asarray(run(params, tokens, mask))[mask], expected, rtol=0, atol=1e-4)


VARIANTS = (
    "qwen3_moe_dense",
    "deepseek_yarn",
    "llama_linear",
    "llama_bias",
    "llama2",
    "qwen2_sharded",
)  # of classes that are there


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in LANGUAGE])
def test_greedy_continuations_equal_those_of_transformers(name: str) -> None:
    """Through the cache; and the same tokens are the likeliest without it, with the prompt shared by a group of two."""
    model, params = made(name)
    _, _, left, mask = rows(name)
    expected = reference(name)["greedy"]
    prompts = PromptBatch(jnp.asarray(left), jnp.asarray(mask), jnp.arange(4, dtype=jnp.uint32), jnp.zeros(4, jnp.int32))

    @quick
    def run(params: Any) -> Any:
        sampled = sample(model, params, prompts, None, group=2, max_completion_tokens=TOKENS, eos_ids=(10_000,), pad_id=0)
        hidden = model.completion_hidden(params, prompts.prompt, prompts.prompt_mask, sampled.completion)
        return sampled.completion, sampled.logp, model.project(params, hidden.reshape(-1, hidden.shape[-1]))

    completion, logp, logits = (np.asarray(x) for x in run(params))
    np.testing.assert_array_equal(completion, np.repeat(expected[:, None], 2, axis=1))
    law = np.asarray(jax.nn.log_softmax(logits)).reshape(*completion.shape, -1)
    np.testing.assert_array_equal(law.argmax(-1), completion)
    np.testing.assert_allclose(law.max(-1), logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "qwen3_moe_dense"])
def test_scanned_decoding_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in deep models: both kinds of windows, latents, and dense layers between sparse ones."""
    monkeypatch.setattr(caches, "UNROLLED_LAYERS", 0)
    model, params = made(name)
    _, _, left, mask = rows(name)
    prompts = PromptBatch(jnp.asarray(left), jnp.asarray(mask), jnp.arange(4, dtype=jnp.uint32), jnp.zeros(4, jnp.int32))
    settings = {"group": 1, "max_completion_tokens": TOKENS, "eos_ids": (10_000,), "pad_id": 0}
    found = quick(lambda p: sample(model, p, prompts, None, **settings))(params)
    np.testing.assert_array_equal(found.completion[:, 0], reference(name)["greedy"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
def test_attention_through_a_kernel_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's kernel, interpreted, in training rows and in plain ones: soft-caps, both windows, values narrower than keys."""
    model, params = made(name)
    right, right_mask, left, mask = (jnp.asarray(x) for x in rows(name))
    completion = jnp.asarray(reference(name)["greedy"][:, :12].reshape(4, 2, 6))

    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            hidden = model.completion_hidden(params, left, mask, completion)
            plain = model.hidden(params, right, right_mask.astype(jnp.int32))
            return jnp.sum(hidden**2) * 0.01, (hidden, jnp.where(right_mask[..., None], plain, 0.0))

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = quick(run)(params)
    interpreted = partial(kernels.row_attention, interpret=True)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: "splash")
    monkeypatch.setattr(kernels, "row_attention", interpreted)
    found = quick(lambda params: run(params))(params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("name", SCORERS)
def test_scores_equal_those_of_transformers(name: str) -> None:
    model, params = made(name)
    right, right_mask, left, left_mask = rows(name)
    if name.endswith("_reward"):
        expected = reference(name)["scores"].reshape(4)
        assert np.ptp(expected) > 1
        for tokens, mask in ((right, right_mask), (left, left_mask)):
            found = quick(lambda p, t, m: heads.sequence_scores(model, p, t, m))(params, tokens, mask)
            np.testing.assert_allclose(np.asarray(found)[:, 0], expected, rtol=0, atol=1e-4)
        return
    found = quick(lambda p, t, m: heads.token_scores(model, p, t, m))(params, right, right_mask)
    np.testing.assert_allclose(np.asarray(found)[right_mask], reference(name)["token_scores"][right_mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_dense"])
def test_the_load_balance_loss_is_that_of_transformers(name: str) -> None:
    model, params = made(name)
    right, mask, *_ = rows(name)
    # as a row of training: an empty prompt's place, then the tokens; the last is fed to nobody, so one more is added
    prompt, completion = right[:, :1], np.concatenate([right[:, 1:], right[:, :1]], axis=1)[:, None]
    real = np.concatenate([mask[:, 1:], np.zeros((4, 1), bool)], axis=1)[:, None]
    _, balance = quick(model.forward)(params, prompt, mask[:, :1], completion, real)
    np.testing.assert_allclose(balance, reference(name)["aux_loss"], rtol=1e-5)
    _, without = quick(model.forward)(params, prompt, mask[:, :1], completion)
    assert abs(float(without) - float(balance)) > 1e-4  # padding would count


# ---- segments


@pytest.mark.parametrize("name", ["llama3", "gemma2", "deepseek_v3", "qwen3_moe"])
def test_packed_rows_equal_rows_of_their_own(name: str) -> None:
    model, params = made(name)
    right, mask, *_ = rows(name)
    lengths = mask.sum(1)
    packed = np.concatenate([row[:length] for row, length in zip(right, lengths, strict=True)])[None]
    segments = np.repeat(np.arange(1, 5), lengths)[None]
    packed, segments = (np.pad(x, ((0, 0), (2, 3))).astype(np.int32) for x in (packed, segments))
    alone = np.asarray(quick(model.hidden)(params, right, mask.astype(np.int32)))
    together = np.asarray(quick(model.hidden)(params, packed, segments))[0]
    for number, length in enumerate(lengths):
        np.testing.assert_allclose(together[segments[0] == number + 1], alone[number, :length], rtol=0, atol=2e-5)


# ---- import, export


@pytest.mark.parametrize("name", ALL)
def test_import_export_import_is_the_identity(name: str, tmp_path: Path) -> None:
    """With the source's config.json, and with one of our own; in files as transformers has them, tensor by tensor."""
    model, params = made(name)
    folder = FOLDER / name
    architecture, head = huggingface.read_architecture(folder), huggingface.read_head(folder)
    for target, source in ((tmp_path / "kept", folder), (tmp_path / "own", None)):
        huggingface.export(params, architecture, None, target, head=head, source=source, dtype="bfloat16")
        assert (huggingface.read_architecture(target), huggingface.read_head(target)) == (architecture, head)
        same(load(target)[1], params)
        same(tensors(target), tensors(folder))
    theirs = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == theirs | {"dtype": "bfloat16"}


@pytest.mark.torch
@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_every_export(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    import transformers

    _, params = made(name)
    head, architecture = huggingface.read_head(FOLDER / name), huggingface.read_architecture(FOLDER / name)
    huggingface.export(params, architecture, None, tmp_path / "own", head=head)
    kind = {"lm": "CausalLM", "sequence": "SequenceClassification", "token": "TokenClassification"}[head.kind]
    cls = getattr(transformers, f"AutoModelFor{kind}")
    theirs, info = cls.from_pretrained(tmp_path / "own", output_loading_info=True, attn_implementation="eager")
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask, *_ = rows(name)
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        out = theirs.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()
    if head.kind == "sequence":
        np.testing.assert_allclose(out.reshape(-1), reference(name)["scores"].reshape(-1), rtol=0, atol=1e-4)
    else:
        expected = reference(name)["logits_right" if head.kind == "lm" else "token_scores"]
        np.testing.assert_allclose(out[mask], expected[mask], rtol=0, atol=1e-4)


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as it was written before transformers 5."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    if "full_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
    config["rope_theta"] = rope["rope_theta"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling["type"] == "default" else scaling
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    for name in ("layer_types", "_sliding_window_pattern"):
        config.pop(name, None)
    return config


@pytest.mark.parametrize("name", ALL)
def test_the_older_form_of_a_config_says_the_same(name: str) -> None:
    file = FOLDER / name / "config.json"
    today = json.loads(file.read_text())
    older = legacy(today)
    assert "rope_parameters" not in older and "layer_types" not in older
    assert families.read(older, file) == families.read(today, file)


# ---- what does not fit


def broken(tmp_path: Path, name: str, change: Any) -> Path:
    """A copy of a fixture with its tensors changed."""
    target = tmp_path / name
    shutil.copytree(FOLDER / name, target)
    files = tensors(target)
    change(files)
    save_file(files, target / "model.safetensors")
    return target


BROKEN: list[tuple[str, Any, str]] = [
    (
        "qwen3_moe",
        lambda x: x.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
        r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight of",
    ),
    (
        "deepseek_v3",
        lambda x: x.pop("model.layers.2.mlp.gate.e_score_correction_bias"),
        r"e_score_correction_bias of shape \[8\] is in none",
    ),
    (
        "phi3",
        lambda x: x.update({"model.layers.0.self_attn.qkv_proj.weight": np.zeros((7, 32), np.float32)}),
        r"shape \[7, 32\], expected",
    ),
    ("olmo2", lambda x: x.update({"model.layers.0.input_layernorm.weight": np.zeros(32, np.float32)}), "is not among the"),
    ("qwen2_prm", lambda x: x.pop("score.bias"), r"tensor score\.bias of shape \[2\] is in none"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN, ids=[each[0] for each in BROKEN])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(broken(tmp_path, name, change))


def test_layers_that_predict_further_ahead_are_left_out_where_the_config_names_them(tmp_path: Path) -> None:
    more = {"model.layers.3.eh_proj.weight": np.zeros((4, 4), np.float32)}
    layers = huggingface.read_architecture(FOLDER / "deepseek_v3").layers
    folder = broken(tmp_path, "deepseek_v3", lambda x: x.update({f"model.layers.{layers}.eh_proj.weight": more.popitem()[1]}))
    config = json.loads((folder / "config.json").read_text())
    for count, fine in ((0, False), (1, True)):
        (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
        if fine:
            same(load(folder)[1], made("deepseek_v3")[1])
        else:
            with pytest.raises(ValueError, match=r"eh_proj\.weight in model\.safetensors is not among the"):
                load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, "has scoring_func 'softmax', and supported is 'sigmoid'"),
        ("deepseek_v3", {"attention_bias": True}, "has attention_bias True"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "has rope_type 'longrope', and supported are default:",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "has use_bidirectional_attention True"),
        ("llama3", {"is_causal": False}, "has is_causal False, and supported is True"),
        ("qwen3", {"partial_rotary_factor": 0.5}, r"fraction \(partial_rotary_factor\) is 0\.5 in family 'qwen3': expected 1"),
        (
            "qwen2_window",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "has rope_parameters of 'full_attention' alone",
        ),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "has mscale_all_dim with"),
        ("mistral", {"sliding_window": 0}, "has sliding_window 0: expected more than 0"),
        ("gemma2", {"hidden_activation": "relu"}, "has hidden_activation 'relu'"),
        ("llama3", {"quantization_config": {"bits": 4}}, "has quantization_config"),
        ("llama3", {"rms_norm_eps": "small"}, "has rms_norm_eps 'small': expected a number"),
        ("llama3", {"rope_scaling": [8]}, r"has rope_scaling \[8\]: expected an object"),
        ("llama3", {"num_attention_heads": 5}, r"config\.json: num_key_value_heads is 2, which does not divide heads = 5"),
        ("llama3", {"num_hidden_layers": 0}, r"config\.json: num_hidden_layers is 0: expected a positive number"),
        ("llama3", {"head_dim": 7}, r"config\.json: head_dim is 7: expected an even number"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"config\.json: num_experts_per_tok is 9: expected 1 to"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "rope_theta is 1.0: expected"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "has sliding_window_pattern 0: expected more than 0"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "has mlp_only_layers 1: expected a list"),
        ("deepseek_v3", {"n_group": 3}, "experts has count = 8, groups = 3"),
        ("qwen2_reward", {"architectures": ["Qwen2ForProcessRewardModel"]}, "supported are those that end in ForCausalLM"),
    ],
)
def test_what_we_do_not_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    file = FOLDER / name / "config.json"
    config = json.loads(file.read_text()) | changes
    with pytest.raises(ValueError, match=message):
        families.read_head(config, file)
        families.read(config, file)


DEEPSEEK = Architecture(
    family="deepseek_v3",
    kv_heads=4,
    latent=Latent(kv_rank=16, rotated=8, value_size=16),
    experts=Experts(count=8, chosen=2, mlp_size=16, scoring="sigmoid", layers="ds"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "qwen"}, "family is 'qwen', which does not exist: did you mean"),
        ({"window": 4, "attention_layers": "wx"}, "attention_layers is 'wx': expected a word of the letters w and f"),
        ({"family": "mistral", "window": 4, "attention_layers": "wf"}, "in family 'mistral': expected 'w', all layers"),
        ({"family": "llama", "window": 4}, "in family 'llama': expected window = 0"),
        ({"experts": Experts(count=4, chosen=2, mlp_size=8)}, "in family 'qwen2': expected count = 0"),
        (
            {"family": "qwen3_moe", "experts": Experts(count=4, chosen=5, mlp_size=8)},
            "experts.chosen is 5: expected 1 to experts.count = 4",
        ),
        ({"family": "qwen3_moe", "experts": Experts(count=4, chosen=2)}, "mlp_size is 0"),
        ({"rope": Rope(kind="ntk")}, "rope.kind is 'ntk', which does not exist"),
        ({"rope": Rope(kind="yarn", factor=2.0)}, "original_positions is 0: 'yarn' needs"),
        ({"family": "phi3", "rope": Rope(fraction=0.1)}, "x head_size is 3: expected an even number"),
        ({"latent": Latent(kv_rank=8, rotated=8, value_size=8)}, "latent.kv_rank is 8 in family 'qwen2'"),
        ({"family": "deepseek_v3"}, "latent.kv_rank is 0 in family 'deepseek_v3'"),
    ],
)
def test_contradictions_in_an_architecture_are_named(changes: dict[str, Any], message: str) -> None:
    configs.check(DEEPSEEK)
    with pytest.raises(ValueError, match=message):
        configs.check(dataclasses.replace(Architecture(), **changes))


# ---- heads of our own


def test_a_critic_on_a_policys_body() -> None:
    """One value for every state before a token; a policy's body with a fresh head, which a folder keeps."""
    policy, params = made("qwen3")
    architecture = huggingface.read_architecture(FOLDER / "qwen3")
    critic = decoder.make_decoder(architecture, Numerics(), one_device(), head=Head("token", 1))
    own = heads.with_new_head(critic, params, jax.random.key(0), mesh=one_device())
    assert (
        own["embed"] is params["embed"]
        and own["head"].shape == (32, 1)
        and jax.tree.structure(own) == jax.tree.structure(critic.specs, is_leaf=spec.is_spec)
    )
    right, _, left, left_mask = (jnp.asarray(x) for x in rows("qwen3"))
    completion = right[:, None, :6]
    found = quick(lambda p: heads.values(critic, p, left, left_mask, completion)[0])(own)
    hidden = policy.completion_hidden(params, left, left_mask, completion)
    expected = np.asarray(hidden) @ np.asarray(own["head"])[:, 0] + np.asarray(own["head_bias"])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the head has 96 labels, and a value is one number"):
        heads.values(policy, params, left, left_mask, completion)


def test_the_older_form_reads_what_is_absent_as_transformers_does() -> None:
    """Every key with a default left out, against transformers' own defaults."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    for family in configs.FAMILIES:
        config = {"model_type": family, "num_attention_heads": 32, "architectures": ["ForCausalLM"], **sizes}
        found = families.read(config, Path("config.json"))
        theirs = AutoConfig.for_model(
            family, **{name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        )
        # DeepSeek-V3's number of key heads is that of its heads, and transformers has 128 for both
        assert found.kv_heads == (32 if family == "deepseek_v3" else theirs.num_key_value_heads or 32), family
        assert found.norm_epsilon == theirs.rms_norm_eps and found.tied == theirs.tie_word_embeddings, family
        types = getattr(theirs, "layer_types", None) or ["full_attention"] * 4
        window = getattr(theirs, "sliding_window", None)
        if family in ("mistral", "phi3", "qwen3_moe"):
            types = ["sliding_attention" if window else "full_attention"] * 4
        assert [found.windowed(i) for i in range(4)] == [each == "sliding_attention" for each in types], family
        if "sliding_attention" in types:
            assert found.window == window, family
        if family != "deepseek_v3":
            assert found.head_size == (getattr(theirs, "head_dim", None) or 2), family


def read(name: str, **changes: Any) -> Architecture:
    file = FOLDER / name / "config.json"
    return families.read(json.loads(file.read_text()) | changes, file)


def test_where_a_setting_stands_twice_the_one_that_transformers_takes_is_read() -> None:
    """Each as transformers 5.23 computes it, found by comparing logits."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read("llama3", rope_scaling=yarn).rope.original_positions == 64
    assert read("llama3", rope_scaling=yarn, original_max_position_embeddings=16).rope.original_positions == 16
    per_layer = {"full_attention": {"rope_type": "default", "rope_theta": 777.0}, "sliding_attention": {"rope_theta": 33.0}}
    gemma = read("gemma3_text", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=per_layer)
    assert gemma.rope.theta == 777 and gemma.window_rope.theta == 33
    full = ["full_attention"] * len(json.loads((FOLDER / "gemma2" / "config.json").read_text())["layer_types"])
    assert not read("gemma2", layer_types=full).window
    for name in ("phi3", "qwen3_moe"):  # whose layers' types nobody reads
        windows = {"sliding_window": 3, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}
        assert read(name, **windows).windowed(0) and read(name, **windows).windowed(1), name
    assert read("deepseek_v3").rope.interleaved and not read("deepseek_v3", rope_interleave=None).rope.interleaved


def test_a_number_of_labels_without_their_names() -> None:
    file = FOLDER / "qwen2_reward" / "config.json"
    config = {name: x for name, x in json.loads(file.read_text()).items() if name not in ("id2label", "label2id")}
    assert families.read_head(config | {"num_labels": 1}, file).labels == 1 and families.read_head(config, file).labels == 2


def test_an_export_with_other_sizes_says_nothing_in_the_older_form(tmp_path: Path) -> None:
    """What the source's config.json says of the old sizes would go before what is written."""
    source, config = tmp_path / "source", legacy(json.loads((FOLDER / "llama3" / "config.json").read_text()))
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    longer = dataclasses.replace(huggingface.read_architecture(source), rope=Rope(5e5, "yarn", 4.0, 32))
    model = decoder.make_decoder(longer, Numerics(), one_device())
    params = huggingface.load_params(model.specs, FOLDER / "llama3", dtype="float32", mesh=one_device())
    huggingface.export(params, longer, None, tmp_path / "out", source=source)
    assert huggingface.read_architecture(tmp_path / "out") == longer


def test_adapters_that_were_not_merged_are_not_exported(tmp_path: Path) -> None:
    model, params = made("llama3")
    adapters = spec.init(
        lora.declare_lora(model.specs, lora.LoraConfig(rank=1)), jax.random.key(0), dtype="float32", mesh=one_device()
    )
    with pytest.raises(ValueError, match=r"merge adapters with lora\.merge"):
        huggingface.export(lora.adapt(params, adapters), huggingface.read_architecture(FOLDER / "llama3"), None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_declared_names_are_all_of_a_folders() -> None:
    for name in ALL:
        specs = declare(huggingface.read_architecture(FOLDER / name), huggingface.read_head(FOLDER / name))
        names = [tensor for _, each in spec.leaves(specs) for _, tensor in each.names()]
        assert set(names) == set(tensors(FOLDER / name)), name
