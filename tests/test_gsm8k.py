"""Real input: three steps of GRPO on GSM8K with a tiny Qwen2 folder, and what a user then does with the run's folder."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreason import config as configs
from jaxreason.models import decoder, huggingface
from jaxreason.models.config import Numerics
from jaxreason.models.tokenizer import load_tokenizer
from jaxreason.pipelines import experiment as experiments
from jaxreason.sharding import MeshConfig, make_mesh
from jaxreason.tasks import gsm8k

STEPS = 3
MAX_PROMPT_TOKENS = 256  # with 512 tokens of vocabulary about half of the problems are longer


def jaxreason(*words: str | Path, one_device: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | one_device | {"COLUMNS": "100"}
    command = [sys.executable, "-m", "jaxreason", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def model(shared) -> Path:
    return shared / "data" / "models" / "tiny_qwen2"


@pytest.fixture(scope="module")
def data(shared) -> Path:
    return shared / "data" / "gsm8k"


@pytest.fixture(scope="module")
def marred(tmp_path_factory, data) -> Path:
    """The data set with two rows that are none."""
    folder = tmp_path_factory.mktemp("marred")
    for split in ("train", "test"):
        content = gzip.decompress((data / f"{split}.jsonl.gz").read_bytes())
        bad = b'{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 1?"}\n' if split == "train" else b""
        (folder / f"{split}.jsonl").write_bytes(content + bad)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, marred, one_device) -> tuple[Path, str]:
    """A run's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("gsm8k") / "run"
    settings = {
        "model.path": model,
        "model.numerics.matmul_dtype": "float32",  # a CPU's own
        "task.kwargs.data_dir": marred,
        "task.kwargs.bad_rows": "skip",
        "sampling.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "sampling.max_completion_tokens": 12,
        "online.steps": STEPS,
        "evaluation.every_steps": 2,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    done = jaxreason("train", "--config", "gsm8k_grpo:tiny", "--workdir", folder, *overrides, one_device=one_device)
    return folder, done.stdout


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def prompt_lengths(data: Path, split: str, tokenizer) -> list[int]:
    """The number of tokens of each prompt, by transformers alone and from the file itself."""
    with gzip.open(data / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    asked = "\n\nReason step by step, and put your final answer within \\boxed{}."
    conversations = [[{"role": "user", "content": question + asked}] for question in questions]
    rows = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [len(row) for row in rows["input_ids"]]


def test_three_steps_of_the_staged_form(trained):
    folder, _ = trained
    logged = lines(folder, "metrics.jsonl")
    assert all(math.isfinite(value) for line in logged for value in line.values() if not isinstance(value, str))
    steps = [line for line in logged if "time/step" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        parts = [line[f"time/{verb}"] for verb in ("sample", "score", "update")]
        assert min(parts) > 0 and sum(parts) <= line["time/step"] * 1.001
        assert 0 <= line["reward/accuracy"] == line["reward/total"] <= 1
        assert 0 < line["rollout/length"] <= 12 and line["policy/clip_fraction"] == 0
        assert line["policy/sampler_gap"] < 1e-3
    evaluated = [line["step"] for line in logged if "eval/gsm8k/pass@1" in line]
    assert evaluated == [0, 2, STEPS]
    rows = lines(folder, "rollouts.jsonl")
    assert len(rows) == STEPS * 8 * 4 and {row["step"] for row in rows} == {1, 2, 3}
    assert {row["problem_id"].split("/")[0] for row in rows} == {"train"}


def test_prompts_that_are_too_long_are_counted(trained, model, data):
    _, printed = trained
    tokenizer = load_tokenizer(model).hf
    train = sum(length > MAX_PROMPT_TOKENS for length in prompt_lengths(data, "train", tokenizer))
    heldout = sum(length > MAX_PROMPT_TOKENS for length in prompt_lengths(data, "test", tokenizer)[:8])
    assert train > 1000 and heldout > 0
    assert f"{train} training problems are left out" in printed and "max_prompt_tokens = 256" in printed
    assert f"{heldout} held-out problems are left out" in printed


def test_bad_rows_are_told_and_kept_in_the_runs_folder(trained, marred, data):
    folder, printed = trained
    with gzip.open(data / "train.jsonl.gz") as file:
        rows = sum(1 for _ in file)
    told = json.loads((folder / "skipped_rows.json").read_text(encoding="utf-8"))
    assert told["counts"] == {"unparsable answer": 1, "missing column": 1}
    assert [sentence.split(": ")[0] for sentence in told["first"]] == [f"{marred}/train.jsonl:{rows + n}" for n in (1, 2)]
    assert "2 bad rows of task 'gsm8k' are left out: 1 unparsable answer, 1 missing column" in " ".join(printed.split())
    assert f"train.jsonl:{rows + 1}:" in "".join(printed.split())
    for side, split in (("training", "train"), ("held-out", "test")):
        long = told["overlong"][side]
        assert long["count"] > 0 and all(f"/{split}.jsonl" in place for place in long["first"])


def test_prompts_are_what_transformers_renders(model, data):
    task, tokenizer = gsm8k(data_dir=str(data), heldout_size=20), load_tokenizer(model)
    conversations = [task.messages(problem) for problem in task.heldout]
    expected = tokenizer.hf.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True)
    rows = tokenizer.encode_prompts(conversations)
    assert rows == expected["input_ids"]
    assert tokenizer.decode(rows[0]).count("boxed{}") == 1 and task.heldout[0].question in tokenizer.decode(rows[0])


def test_the_data_set_is_read_whole(data):
    task = gsm8k(data_dir=str(data), heldout_size=10**6)
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert task.train_size == len(rows)
    for number in (0, 1, len(rows) // 2, len(rows) - 1):
        problem = task.train(number)
        assert problem.question == rows[number]["question"] and problem.id == f"train/{number}"
        assert rows[number]["answer"].replace(",", "").endswith(f"#### {problem.answer}")
        assert problem.metadata["solution"] in rows[number]["answer"] and "####" not in problem.metadata["solution"]
    assert not {problem.question for problem in task.heldout} & {row["question"] for row in rows}


def test_a_file_that_is_not_gsm8k_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2?"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:2: there is no column 'answer'"):
        gsm8k(data_dir=str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2?", "answer": "#### 2"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "it is\\n#### 1,002"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: column 'answer' has no '####'"):
        gsm8k(data_dir=str(tmp_path))
    task = gsm8k(data_dir=str(tmp_path), bad_rows="skip")
    assert task.heldout[0].answer == "1002" and task.heldout[0].metadata["solution"] == "it is"
    assert [task.train(0).id, task.train_size] == ["train/1", 1]


def test_the_policy_folder_is_a_model(trained, model):
    """The exported folder has the source's shapes and tokenizer, and the numbers moved."""
    folder, _ = trained
    policy = folder / "policy"
    architecture = huggingface.read_architecture(policy)
    assert architecture == huggingface.read_architecture(model)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    specs = decoder.make_decoder(architecture, Numerics(), mesh).specs
    before, after = (huggingface.load_params(specs, each, dtype="float32", mesh=mesh) for each in (model, policy))
    moved = np.abs(np.asarray(after["embed"]) - np.asarray(before["embed"])).max()
    assert 0 < moved < 1e-3
    assert load_tokenizer(policy).hf.get_vocab() == load_tokenizer(model).hf.get_vocab()


@pytest.mark.slow
def test_evaluate_sample_and_export(trained, one_device, tmp_path):
    folder, _ = trained
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    evaluated = jaxreason("evaluate", folder, one_device=one_device).stdout
    assert "stage 'reinforce', step 3" in evaluated and "left out: their prompts are too long" in evaluated
    results = json.loads((folder / "evaluations" / "gsm8k-reinforce-3-greedy" / "results.json").read_text(encoding="utf-8"))
    assert results["greedy"]["all"]["all"]["length"]["value"] == summary["after"]["eval/gsm8k/length"]
    question = "Tom has 3 pens and buys 4. How many pens has he now?"
    sampled = jaxreason("sample", folder, "--n", "2", "--problem", question, "--answer", "7", one_device=one_device).stdout
    assert sampled.count("accuracy 0") + sampled.count("accuracy 1") == 2 and sampled.count("ended by") == 2
    jaxreason("export", folder, tmp_path / "out", one_device=one_device)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "policy" / name).read_bytes()


def test_random_weights_of_a_checkpoints_architecture(model, data, tmp_path):
    """`model.weights=random`: sizes and tokenizer of a folder, which need not hold weights; drawn from the seed."""
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"), copy_function=shutil.copyfile)
    given = [f"model.path={bare}", f"task.kwargs.data_dir={data}", "model.numerics.matmul_dtype=float32"]

    def first(*more: str) -> np.ndarray:
        config = configs.load("gsm8k_grpo:tiny", [f"--config.{each}" for each in (*given, *more)])
        experiment = experiments.build(config, tmp_path, devices=jax.devices()[:1])
        return np.asarray(experiments.initial_params(experiment)["embed"])

    drawn = first("model.weights=random")
    assert 0.01 < drawn.std() < 0.03
    np.testing.assert_array_equal(first("model.weights=random"), drawn)
    assert (first("model.weights=random", "seed=1") != drawn).all()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        first()
    with pytest.raises(ValueError, match="config.model.weights is 'none': expected 'checkpoint' or 'random'"):
        first("model.weights=none")
