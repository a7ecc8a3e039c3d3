"""The schema and its checks: a mistake in a config is told in one sentence before anything is compiled."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxreason import config as schema
from jaxreason.data.batching import prompt_batch, prompt_limits
from jaxreason.pipelines import experiment as experiments
from jaxreason.sampling.law import Law

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_compiles(caplog):
    """Checks come before compute: a program that is compiled on the way fails the test."""
    with jax.log_compiles():
        yield
    assert [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()] == []


def build(tmp_path: Path, *overrides: str, source: str = "quickstart:tiny", devices: int = 1) -> experiments.Experiment:
    config = schema.load(source, [f"--config.{each}" for each in overrides])
    return experiments.build(config, tmp_path / "run", devices=jax.devices()[:devices])


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text, text
    return text


# overrides, devices, and what the sentence must hold: key, value, remedy
MISTAKES: list[tuple[list[str], int, list[str]]] = [
    (["online.optimiser.learning_rate=1"], 1, ["config.online", "'optimiser'", "did you mean 'optimizer'"]),
    (["sede=1"], 1, ["'sede'", "did you mean 'seed'"]),
    (["seed.x=1"], 1, ["config.seed is a value", "'x'"]),
    (["online=3"], 1, ["config.online is a group", "config.online.steps"]),
    (["online.steps=many"], 1, ["config.online.steps", "'many'", "a whole number"]),
    (["online.steps=1.5"], 1, ["config.online.steps", "'1.5'", "a whole number"]),
    (["online.optimizer.learning_rate=fast"], 1, ["config.online.optimizer.learning_rate", "'fast'", "a number"]),
    (["online.optimizer.learning_rate=1e999"], 1, ["config.online.optimizer.learning_rate", "inf", "finite"]),
    (["model.architecture.tied=1"], 1, ["config.model.architecture.tied", "'1'", "True or False"]),
    (["seed=-1"], 1, ["config.seed", "-1", "0 or more"]),
    (["seed=4294967296"], 1, ["config.seed", "4294967296", "at most"]),
    (["sampling.temperature=0"], 1, ["config.sampling.temperature", "0.0", "more than 0", "greedy"]),
    (["sampling.top_p=1.5"], 1, ["config.sampling.top_p is 1.5", "up to 1"]),
    (["sampling.top_k=-1"], 1, ["config.sampling.top_k is -1", "0 for no limit"]),
    (["sampling.banned=3"], 1, ["config.sampling.banned is '3'", "a tuple or a list"]),
    (["sampling.banned=(3,'x')"], 1, ["config.sampling.banned[1] is 'x'", "a whole number"]),
    (["sampling.banned=[64]"], 1, ["config.sampling.banned is (64,)", "0 to 63"]),
    (["sampling.banned=[1]"], 1, ["config.sampling.banned is (1,)", "stop tokens [1]"]),
    (["sampling.bias=((3,1.0,2),)"], 1, ["config.sampling.bias[0] is (3, 1.0, 2)", "a tuple of 2"]),
    (["sampling.forced=((0,3),)", "sampling.banned=(3,)"], 1, ["config.sampling.forced is ((0, 3),)", "config.sampling.banned"]),
    (["sampling.stop=</answer>"], 1, ["config.sampling.stop is '</answer>'", "('a',)"]),
    (["sampling.stop=('',)"], 1, ["config.sampling.stop is ('',)", "at least one character"]),
    (["sampling.slots=6"], 1, ["config.sampling.slots is 6", "0, for all", "power of two"]),
    (["sampling.slots=2"], 4, ["config.sampling.slots is 2", "4 devices", "power of two"]),
    (["sampling.overlong=drop"], 1, ["config.sampling.overlong is 'drop'", "'leave_out', 'cut' or 'refuse'"]),
    (["sampling.overlong=refuse", "sampling.max_prompt_tokens=20"], 1, ["'refuse'", "of 8 held-out", "20", "'cut'"]),
    (["sampling.max_completion_tokens=-5"], 1, ["config.sampling.max_completion_tokens", "-5", "2 or more"]),
    (["online.steps=-1"], 1, ["config.online.steps", "-1", "0 or more"]),
    (["online.epochs=0"], 1, ["config.online.epochs", "0", "1 or more"]),
    (["supervised.phases.base.steps=-1"], 1, ["config.supervised.phases.base.steps", "-1", "0 or more"]),
    (["checkpoint.keep=0"], 1, ["config.checkpoint.keep", "0", "1 or more"]),
    (["online.completions_per_problem=1"], 1, ["config.online.completions_per_problem", "1", "grpo", "2 or more"]),
    (["online.problems_per_microbatch=3"], 1, ["online.problems_per_microbatch is 3", "online.problems_per_update = 8", "divisor"]),
    (["online.problems_per_update=5"], 1, ["online.problems_per_update is 5", "online.problems_per_step = 8", "divisor"]),
    (["supervised.demonstrations_per_microbatch=3"], 1, ["supervised.demonstrations_per_microbatch is 3", "divisor"]),
    (["online.problems_per_microbatch=2"], 4, ["config.online.problems_per_microbatch is 2", "4 devices", "multiple of 4"]),
    (["evaluation.problems_per_batch=6"], 4, ["config.evaluation.problems_per_batch is 6", "4 devices", "multiple of 4"]),
    (["sampling.max_prompt_tokens=500"], 1, ["max_prompt_tokens = 500", "532", "holds 512", "lower one"]),
    (["sampling.max_prompt_tokens=5"], 1, ["config.sampling.max_prompt_tokens is 5", "word_problems", "raise"]),
    (["algorithm.name=grop"], 1, ["config.algorithm.name", "'grop'", "did you mean 'grpo'"]),
    (["algorithm.name=sft", "algorithm.kwargs={}"], 1, ["'sft'", "learns from no reward"]),
    (["algorithm.kwargs=3"], 1, ["config.algorithm.kwargs is a group"]),
    (["algorithm.name=cispo", "algorithm.kwargs={'beta': 0.1}"], 1, ["config.algorithm.kwargs has no key 'beta'", "clip_high"]),
    (["algorithm.kwargs.betta=0.1"], 1, ["config.algorithm.kwargs", "'betta'", "did you mean 'beta'"]),
    (["algorithm.kwargs.beta=high"], 1, ["config.algorithm.kwargs.beta", "'high'", "a number"]),
    (["algorithm.kwargs.beta=-0.1"], 1, ["config.algorithm.kwargs", "beta is -0.1", "0 or more"]),
    (["algorithm.kwargs.kl=k9"], 1, ["config.algorithm.kwargs", "kl is 'k9'", "'k3'"]),
    (["task.name=gms8k"], 1, ["config.task.name", "'gms8k'", "did you mean 'gsm8k'"]),
    (["task.kwargs.min_change=1"], 1, ["config.task.kwargs", "'min_change'", "did you mean 'min_changes'"]),
    (["task.kwargs.min_changes=9"], 1, ["config.task.kwargs", "min_changes=9", "expected 1 <= min_changes"]),
    (["task.kwargs.heldout_size=0"], 1, ["config.task.kwargs", "heldout_size is 0", "1 or more"]),
    (["task.kwargs.short_share=1.5"], 1, ["config.task.kwargs", "short_share is 1.5", "0 to 1"]),
    (["reward.accuracy.rule=traced.integer_anwser"], 1, ["config.reward.accuracy.rule", "anwser", "'traced.integer_answer'"]),
    (["reward.accuracy.rule=nonsense"], 1, ["config.reward.accuracy.rule", "'nonsense'", "math.gsm8k_answer"]),
    (["reward.accuracy.rule=math.final_number"], 1, ["config.reward.accuracy.rule", "'math.final_number'"]),
    (["reward.format.kwargs.patern=x"], 1, ["config.reward.format.kwargs", "'patern'", "did you mean 'pattern'"]),
    (["reward.format.kwargs.pattern=7"], 1, ["config.reward.format.kwargs.pattern", "7", "a text"]),
    (["reward.format.kwargs.pattern=Ж+"], 1, ["config.reward.format.kwargs", "Ж"]),
    (["reward.accuracy.wieght=1"], 1, ["config.reward.accuracy", "'wieght'", "did you mean 'weight'"]),
    (["scoring.workers=-1"], 1, ["config.scoring.workers is -1", "1 or more", "0 to run the rules in this process"]),
    (["scoring.limit_seconds=0"], 1, ["config.scoring.limit_seconds is 0.0", "more than 0"]),
    (["scoring.memory_mb=-5"], 1, ["config.scoring.memory_mb is -5", "1 or more", "0 for no limit"]),
    (["scoring.worker=1"], 1, ["config.scoring", "'worker'", "did you mean 'workers'"]),
    (["evaluation.accuracy=acuracy"], 1, ["config.evaluation.accuracy", "'acuracy'", "did you mean 'accuracy'"]),
    (["supervised.phases.base.demonstrations=workd"], 1, ["supervised.phases.base.demonstrations", "'workd'", "'worked'"]),
    (["model.architecture.kv_heads=3"], 1, ["config.model.architecture.kv_heads is 3", "heads = 4", "divisor"]),
    (["model.architecture.head_size=7"], 1, ["config.model.architecture.head_size is 7", "even"]),
    (["model.architecture.layers=0"], 1, ["config.model.architecture.layers is 0", "positive"]),
    (["model.architecture.rope_theta=0.0"], 1, ["config.model.architecture.rope_theta is 0.0", "more than 0"]),
    (["model.architecture.vocab_size=20"], 1, ["config.model.architecture.vocab_size is 20", "tokens", "raise it to"]),
    (["model.balance_weight=0.1"], 1, ["config.model.balance_weight is 0.1", "no experts", "set it to 0"]),
    (["model.numerics.param_dtype=float8"], 1, ["config.model.numerics.param_dtype", "'float8'", "float32 and bfloat16"]),
    (["model.numerics.matmul_dtype=float64"], 1, ["config.model.numerics", "'float64'", "expected one of"]),
    (["model.path=no/such/folder"], 1, ["no/such/folder", "no folder", "give a folder"]),
    (["mesh.tensor=3"], 4, ["config.mesh", "tensor=3", "4", "divides"]),
    (["mesh.data=0"], 1, ["config.mesh", "data=0", "positive"]),
    (["mesh.data=-1", "mesh.fsdp=-1"], 1, ["config.mesh", "fsdp=-1", "at most one"]),
    (["mesh.tensor=4"], 4, ["kv_heads", "tensor", "4", "choose config.mesh.tensor"]),
    (["online.optimizer.schedule=cosin"], 1, ["config.online.optimizer.schedule", "'cosin'", "did you mean 'cosine'"]),
    (["supervised.optimizer.schedule=step"], 1, ["config.supervised.optimizer.schedule", "'step'", "constant, cosine"]),
    (["online.optimizer.learning_rate=-1e-3"], 1, ["config.online.optimizer.learning_rate", "-0.001", "0 or more"]),
    (["online.optimizer.b2=1.0"], 1, ["config.online.optimizer.b2", "1.0", "less than 1"]),
    (["profile.steps=last"], 1, ["config.profile.steps is 'last'", "such as '3'"]),
    (["profile.steps=2-100000"], 1, ["config.profile.steps is '2-100000'", "config.online.steps is"]),
    (["supervised.optimizer.max_gradient_norm=0.0"], 1, ["config.supervised.optimizer.max_gradient_norm", "more than 0"]),
]


@pytest.mark.parametrize(("overrides", "devices", "holds"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_sentence_with_key_value_and_remedy(tmp_path, overrides, devices, holds):
    with pytest.raises(ValueError) as error:
        build(tmp_path, *overrides, devices=devices)
    sentence = one_sentence(error.value)
    assert [part for part in holds if part not in sentence] == [], sentence


def test_attention_that_cannot_train_here_is_told_before_anything_is_computed(tmp_path):
    experiments.check_attention(build(tmp_path))
    for name in ("cudnn", "splash"):
        elsewhere = build(tmp_path, f"model.numerics.attention={name}")  # sampling and evaluation do without it
        with pytest.raises(ValueError, match=f"'{name}', which runs on .*, and this is cpu"):
            experiments.check_attention(elsewhere)


def test_what_an_algorithm_asks_of_its_rows(tmp_path):
    source = file(tmp_path, "config.algorithm.name = 'sft'")
    with pytest.raises(ValueError, match=r"config.algorithm.name is 'sft'.*'grpo'"):
        build(tmp_path, source=source)
    source = file(tmp_path, "config.algorithm.name = 'rloo'\n    config.online.epochs = 2")
    with pytest.raises(ValueError, match=r"2 updates a step.*'rloo'.*set epochs to 1"):
        build(tmp_path, source=source)
    # L of Dr. GRPO is the run's own budget, which the config need not repeat
    assert build(tmp_path, source=file(tmp_path, "config.algorithm.name = 'dr_grpo'")).algorithm.name == "dr_grpo"


@pytest.mark.parametrize("overrides", [["seed"], ["=3"], ["seed=1", "seed"]])
def test_an_override_that_is_no_assignment(tmp_path, overrides):
    with pytest.raises(ValueError, match="write --config.key=value"):
        build(tmp_path, *overrides)


def test_a_model_is_needed_where_the_task_brings_no_words(tmp_path, shared):
    data = shared / "data" / "gsm8k"
    with pytest.raises(ValueError, match=r"config.model.path is empty.*'gsm8k'.*--config.model.path="):
        build(tmp_path, "model.path=", f"task.kwargs.data_dir={data}", source="gsm8k_grpo:tiny")


@pytest.mark.parametrize(
    ("overrides", "holds"),
    [
        (["task.kwargs.data_dir=nowhere"], ["config.task.kwargs", "data_dir is 'nowhere'", "train.jsonl.gz", "give the folder"]),
        (["task.kwargs.prompt=boxd"], ["config.task.kwargs", "prompt is 'boxd'", "did you mean 'boxed'"]),
        (["sampling.max_completion_tokens=2048"], ["max_completion_tokens = 2048", "holds 2048", "lower one"]),
        (["supervised.phases.x.steps=3"], ["config.supervised.phases", "'x'"]),
    ],
)
def test_mistakes_with_a_checkpoint_and_a_data_set(tmp_path, shared, overrides, holds):
    data = shared / "data"
    given = [f"model.path={data / 'models' / 'tiny_qwen2'}", f"task.kwargs.data_dir={data / 'gsm8k'}", *overrides]
    with pytest.raises(ValueError) as error:
        build(tmp_path, *given, source="gsm8k_grpo:tiny")
    sentence = one_sentence(error.value)
    assert [part for part in holds if part not in sentence] == [], sentence


# --------------------------------------------------------------------------------------------------------------- files


def file(tmp_path: Path, lines: str) -> str:
    """An experiment file: the tiny quickstart's settings that matter, and then `lines`."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxreason import config as schema\n"
        "def get_config(arg=None):\n"
        "    config = schema.default()\n"
        "    config.online.steps = 2\n"
        "    config.reward.accuracy = schema.part('traced.integer_answer')\n"
        "    config.sampling.max_completion_tokens = 32\n"
        f"    {lines}\n"
        "    return schema.finish(config, arg)\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.mark.parametrize(
    ("lines", "holds"),
    [
        ("config.sede = 1", ["'sede'", "did you mean 'seed'"]),
        ("config.online.optimizer.learnin_rate = 1.0", ["config.online.optimizer", "did you mean 'learning_rate'"]),
        ("config.onlin.steps = 1", ["mine.py, line 7", "onlin", "online"]),
        ("config.seed = 'x'", ["mine.py, line 7", "seed", "x", "int"]),
        ("config.online = 3", ["mine.py, line 7", "online", "3"]),
        ("config.reward.accuracy = 3", ["mine.py, line 7", "accuracy"]),
        ("config.reward.format = 3", ["config.reward.format", "3", "group of keys"]),
        ("config.algorithm.kwargs.beta = 'x'", ["config.algorithm.kwargs.beta", "'x'", "a number"]),
        ("config.evaluation.accuracy = 'format'", ["config.evaluation.accuracy", "'format'", "accuracy"]),
        ("del config.reward.accuracy", ["config.reward", "add a rule"]),
        ("config.supervised.phases.a = schema.phase('x', steps=1)", ["supervised.phases.a.demonstrations", "'x'", "worked"]),
        ("import nosuchmodule", ["mine.py, line 7", "nosuchmodule", "ModuleNotFoundError"]),
        ("config.seed = 1 1", ["mine.py, line 7", "syntax"]),
        ("return 3", ["get_config", "return schema.finish"]),
    ],
)
def test_a_mistake_in_a_file_names_its_place(tmp_path, lines, holds):
    with pytest.raises(ValueError) as error:
        build(tmp_path, source=file(tmp_path, lines))
    sentence = one_sentence(error.value)
    assert [part for part in holds if part not in sentence] == [], sentence


def test_files_that_are_no_config(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty.py has no function get_config"):
        schema.load(str(empty))
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt.*ends in .py"):
        schema.load(str(text))
    with pytest.raises(ValueError, match=r"'quikstart'.*quickstart"):
        schema.load("quikstart")
    with pytest.raises(ValueError, match=r"'huge'.*'tiny'"):
        schema.load("quickstart:huge")


def test_a_file_may_be_named_with_its_argument(tmp_path):
    source = file(tmp_path, "config.seed = 5")
    assert schema.load(source).online.problems_per_step == 32
    assert schema.load(f"{source}:tiny").online.problems_per_step == 8
    assert schema.load(source, ["--config.seed=6"]).seed == 6


# -------------------------------------------------------------------------------------------------------------- schema


def dataclasses_of(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, dataclass) of the schema, entries of its mappings included."""
    yield path, kind
    for name, hint in typing.get_type_hints(kind).items():
        for each in (hint, *getattr(hint, "__args__", ())):
            if dataclasses.is_dataclass(each):
                yield from dataclasses_of(each, f"{path}.{name}".lstrip("."))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from leaves(each, f"{path}.{name}".lstrip("."))
    else:
        yield path, value


def test_the_schema_stays_small():
    kinds = dict(dataclasses_of(schema.Config))
    assert len(kinds) > 8
    assert {path: len(dataclasses.fields(kind)) for path, kind in kinds.items() if len(dataclasses.fields(kind)) > 15} == {}
    assert len(list(leaves(schema.to_dict(schema.Config())))) <= 105


def test_no_key_that_nothing_reads():
    """Every field is read as an attribute somewhere outside the dataclass that declares it."""
    fields = {(kind, field.name) for _, kind in dataclasses_of(schema.Config) for field in dataclasses.fields(kind)}
    assert len(fields) > 50
    read: set[str] = set()
    checks = {ROOT / "jaxreason" / name for name in ("config.py", "checking.py")}  # a check is no use
    for path in set((ROOT / "jaxreason").rglob("*.py")) - checks:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = {(kind.__name__, name) for kind, name in fields if name not in read}
    assert unread == set()


def test_round_trip_through_json():
    config = schema.load("quickstart", ["--config.seed=7", "--config.algorithm.kwargs.clip_low=0.1"])
    stored = json.loads(json.dumps(schema.to_dict(config)))
    again = schema.from_dict(stored)
    assert again == config and schema.to_dict(again) == stored
    assert list(again.supervised.phases) == list(config.supervised.phases) == ["base", "cold_start"]
    stored["online"]["stps"] = 1
    with pytest.raises(ValueError, match=r"config.online has no key 'stps': did you mean 'steps'"):
        schema.from_dict(stored)


def test_an_override_is_typed_as_its_key():
    overrides = ["online.optimizer.learning_rate=1", "algorithm.kwargs.beta=0", "model.architecture.tied=false", "model.path=3"]
    config = schema.load("quickstart", [f"--config.{each}" for each in overrides])
    assert config.online.optimizer.learning_rate == 1.0 and type(config.online.optimizer.learning_rate) is float
    assert config.algorithm.kwargs["beta"] == 0.0 and config.model.architecture.tied is False and config.model.path == "3"


def test_tuples_are_set_by_tuples_and_by_lists(tmp_path):
    overrides = ["banned=[4,5]", "bias=((4,1),[7,-2.5])", "forced=[(0,8)]", "stop=[' ','=']", "top_k=5"]
    config = schema.load("quickstart", [f"--config.sampling.{each}" for each in overrides])
    law = Law(top_k=5, banned=(4, 5), bias=((4, 1.0), (7, -2.5)), forced=((0, 8),))
    assert config.sampling.law == law and config.sampling.stop == (" ", "=")
    assert type(config.sampling.bias[0][1]) is float
    again = schema.from_dict(json.loads(json.dumps(schema.to_dict(config))))
    assert again == config and hash(again.sampling) == hash(config.sampling)
    source = file(tmp_path, "config.sampling.banned = [4, 5]\n    config.sampling.stop = (' ',)")
    assert schema.load(source).sampling.banned == (4, 5)


def test_every_setting_of_the_law_is_one_of_the_config_with_the_same_default():
    own = {field.name: field.default for field in dataclasses.fields(schema.SamplingConfig)}
    law = {field.name: field.default for field in dataclasses.fields(Law)}
    assert law.pop("greedy") is False and law.items() <= own.items()


def test_long_prompts_are_left_out_or_cut_or_refused(tmp_path):
    """The same problems in three runs, held out and for training; the problems of an endless stream are not looked through."""
    limit = "sampling.max_prompt_tokens=20"
    left, cut, whole = (
        build(tmp_path / name, *more, "task.kwargs.heldout_size=40")
        for name, more in (("left", (limit,)), ("cut", (limit, "sampling.overlong=cut")), ("whole", ("sampling.overlong=refuse",)))
    )
    lengths = [len(row) for row in whole.tokenizer.encode_prompts([whole.task.messages(each) for each in whole.task.heldout])]
    long = sum(length > 20 for length in lengths)
    assert 0 < long < 40 and left.overlong.count == cut.overlong.count == long and whole.overlong.count == 0
    assert (len(left.task.heldout), len(cut.task.heldout)) == (40 - long, 40)

    numbered = list(enumerate(cut.task.heldout))
    short = prompt_batch(numbered, task=cut.task, tokenizer=cut.tokenizer, **prompt_limits(cut.config.sampling))
    full = prompt_batch(numbered, task=cut.task, tokenizer=cut.tokenizer, **prompt_limits(whole.config.sampling))
    assert short.prompt.shape == (40, 20) and (short.prompt == full.prompt[:, -20:]).all()
    assert short.prompt_mask.sum() == sum(min(length, 20) for length in lengths)
    with pytest.raises(ValueError, match="expected 1 to 20"):
        prompt_batch(numbered, task=cut.task, tokenizer=cut.tokenizer, **prompt_limits(left.config.sampling))

    finite = dataclasses.replace(whole.task, train=whole.task.heldout.__getitem__, train_size=40)
    for each, size in ((left, 40 - long), (cut, 40)):
        stream, overlong = experiments.training_stream(each._replace(task=finite))
        assert overlong.count == long and len({problem.id for _, problem in stream(0, size)}) == size
    refusing = dataclasses.replace(left.config, sampling=dataclasses.replace(left.config.sampling, overlong="refuse"))
    with pytest.raises(ValueError, match=rf"{long} of 40 training prompts are longer than max_prompt_tokens = 20"):
        experiments.training_stream(left._replace(task=finite, config=refusing))


def test_a_config_does_not_change_once_it_is_loaded():
    config = schema.load("quickstart")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.reward["x"] = config.reward["accuracy"]  # type: ignore[index]


def test_every_shipped_config_says_what_it_is():
    for name, line in schema.shipped():
        text = ast.get_docstring(ast.parse((schema.config_folder() / f"{name}.py").read_text(encoding="utf-8")))
        assert text and len(line) > 20 and not line.endswith(","), name
        assert f"jaxreason train --config {name}" in text and re.search(r"arXiv:\d{4}\.\d{5}", text), name
        assert re.search(r"minutes|hours|not yet measured", text), f"{name} says neither a time nor that none was measured"
