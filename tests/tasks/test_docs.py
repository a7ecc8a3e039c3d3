"""docs/tasks.md says what is declared: its table is made from the declarations, and its commands and templates exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from jaxreason import config as configs
from jaxreason import tasks
from jaxreason.config import Named
from jaxreason.tasks import choice, code, mathematics, preferences, process_labels, short_answers
from jaxreason.tasks.source import DataSet

TEXT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
MODULES = (mathematics, choice, short_answers, code, preferences, process_labels)
DATA_SETS = [each for module in MODULES for each in module.DATA_SETS]


def line(each: DataSet) -> str:
    hub = ", ".join(filter(None, (each.hub, each.hub_config))) or "none: `data_dir`"
    splits = f"{each.train or '-'} / {each.heldout}"
    rule, prompt = (f"`{name}`" if name else "-" for name in (each.rule, each.prompt))
    return f"| `{each.name}` | {each.what} | {rule} | {prompt} | {', '.join(each.columns)} | {hub} | {splits} |"


def test_the_table_is_what_is_declared():
    expected = "\n".join(map(line, DATA_SETS))
    assert expected in TEXT, f"the table of docs/tasks.md is to be:\n{expected}"


def test_every_declared_data_set_is_a_task_and_every_template_is_told():
    for each in DATA_SETS:
        signature = inspect.signature(getattr(tasks, each.name))
        assert signature.return_annotation == "Task" and each.name in tasks.__all__
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in signature.parameters.values())
    folder = Path(tasks.__file__).parent / "prompts"
    for file in folder.glob("*.txt"):
        assert f"`{file.stem}`" in TEXT
    for name in re.findall(r"`(\w+\.txt)`|--config\.task\.name=(\w+)", TEXT):
        assert not name[1] or hasattr(tasks, name[1])


def test_settings_are_checked_as_a_configs_are(shared):
    """By name through a config: the right ones are taken, a wrong one is one sentence."""

    def make(name: str, **kwargs):
        return configs.make(tasks, Named(name, kwargs), key="task", returns="Task")

    folder = str(shared / "data" / "math500")
    assert len(make("math500", data_dir=folder).heldout) == 400
    assert len(make("math500", data_dir=folder, heldout_size=3, prompt="r1_zero").heldout) == 3
    for kwargs, sentence in {
        ("data_dr", folder): r"config\.task\.kwargs has no key 'data_dr': did you mean 'data_dir'",
        ("heldout_size", "all"): r"config\.task\.kwargs\.heldout_size is 'all': expected a whole number or None",
        ("prompt", "boxd"): r"config\.task\.kwargs: prompt is 'boxd', which is no template: did you mean 'boxed'",
        ("bad_rows", "skipp"): r"config\.task\.kwargs: bad_rows is 'skipp': did you mean 'skip'",
        ("heldout_split", "tset"): r"config\.task\.kwargs: data_dir is '.*', which holds no tset\.jsonl\.gz",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            make("math500", **({"data_dir": folder} | dict([kwargs])))
    with pytest.raises(ValueError, match=r"config\.task\.name is 'maths', which does not exist: did you mean 'math"):
        make("maths")
