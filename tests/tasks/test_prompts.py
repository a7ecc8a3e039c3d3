"""What the policy is asked: every template, choices, dialogues, and earlier turns without their thinking."""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxreason.tasks
from jaxreason.models.tokenizer import load_tokenizer
from jaxreason.tasks.conversation import conversation, read_prompt, without_thinking
from jaxreason.types import Problem

FOLDER = Path(jaxreason.tasks.__file__).parent / "prompts"
NAMES = sorted(file.stem for file in FOLDER.glob("*.txt"))
PROBLEM = Problem("0", "What is {question} + 1 in \\boxed{} and {braces}?", "2")


def test_the_templates_are_those():
    for name in ("boxed", "direct", "few_shot", "pal", "r1_zero", "think_answer", "zero_shot_cot"):
        assert name in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_template_holds_the_question_once_and_asks_for_an_answer(name, shared):
    template = read_prompt(name)
    assert sum(turn["content"].count("{question}") for turn in template) == 1
    assert all(turn["content"] == turn["content"].strip() != "" for turn in template)
    turns = conversation(template, PROBLEM)
    assert PROBLEM.question in turns[-1]["content"]
    assert turns[-1]["content"].replace(PROBLEM.question, "") == template[-1]["content"].replace("{question}", "")
    roles = [turn["role"] for turn in turns]
    assert roles == ["text"] or roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    tokenizer = load_tokenizer(shared / "data" / "models" / "tiny_qwen3")
    [row] = tokenizer.encode_prompts([turns])
    shown = tokenizer.decode(row)
    assert shown.count(turns[-1]["content"]) == 1
    assert shown.endswith("assistant\n") != (roles == ["text"])


def test_r1_zeros_template_is_the_whole_prompt():
    """DeepSeek-R1, arXiv:2501.12948, Table 1: a base model's prompt, which ends where the assistant speaks."""
    [turn] = conversation(read_prompt("r1_zero"), Problem("0", "1 + 1?", "2"))
    assert turn["role"] == "text" and turn["content"].endswith("User: 1 + 1? Assistant:")
    assert turn["content"].startswith("A conversation between User and Assistant.")
    example = "<think> reasoning process here </think> <answer> answer here </answer>"
    assert turn["content"].count(example) == 1 and "\n" not in turn["content"]


def test_the_examples_are_right():
    """Each example of the few-shot template ends in one box, with what an independent computation gives."""
    answers = [turn["content"] for turn in read_prompt("few_shot") if turn["role"] == "assistant"]
    expected = [14 * 6 + 5, r"\frac{3}{2}", 900 // 75, sum(n % 4 == n % 6 == 0 for n in range(10, 100))]
    assert 3 / 2 / 3 + 2 == 5 / 2
    for answer, value in zip(answers, expected, strict=True):
        assert answer.endswith(rf"\boxed{{{value}}}.") and answer.count("boxed") == 1
    programs = [turn["content"] for turn in read_prompt("pal") if turn["role"] == "assistant"]
    for program, value in zip(programs, (89, 10), strict=True):
        scope: dict = {}
        exec(program.removeprefix("```python\n").removesuffix("```"), scope)
        assert scope["solution"]() == value


def test_choices_stand_below_the_question():
    problem = Problem("0", "Which?", "B", metadata={"choices": [("A", "one"), ("B", "two")]})
    [turn] = conversation(read_prompt("choice"), problem)
    assert turn["content"].startswith("Which?\n\nA. one\nB. two\n\nReason")


def test_a_file_of_ones_own(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("[system]\nBe brief.\n[user]\n1?\n[assistant]\n2 [user] 3\n[user]\n{question}\n")
    roles = ["system", "user", "assistant", "user"]
    said = ["Be brief.", "1?", "2 [user] 3", "{question}"]
    assert [tuple(turn.values()) for turn in read_prompt(str(mine))] == list(zip(roles, said, strict=True))
    for content, sentence in {
        "[user]\n{question}\n[assistant]\n2": "last turn is not the user's",
        "What?": "last turn is not the user's",
        "": "last turn is not the user's",
        "[system]\nBe brief.\n[text]\n{question}": r"\[text\] beside other turns",
    }.items():
        mine.write_text(content)
        with pytest.raises(ValueError, match=rf"prompt is '.*mine\.txt', .*{sentence}"):
            read_prompt(str(mine))
    with pytest.raises(ValueError, match="prompt is 'few_shots', which is no template: did you mean 'few_shot'"):
        read_prompt("few_shots")
    with pytest.raises(ValueError, match=r"prompt is '.*none\.txt', and there is no such file"):
        read_prompt(str(tmp_path / "none.txt"))


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


def test_earlier_thinking_is_dropped_and_answers_are_kept():
    thought = "<think>a </think> b <think>c</think>\n\n<answer>4</answer>"
    assert without_thinking(said("2 + 2?", thought, "sure?")) == said("2 + 2?", "<answer>4</answer>", "sure?")
    opened = "it begins in the template</think>4"  # as where the prompt itself ends in <think>
    assert without_thinking(said("2 + 2?", opened, "sure?", opened, "really?")) == said("2 + 2?", "4", "sure?", "4", "really?")
    assert without_thinking(said("2 + 2?", "<think>cut off", "sure?")) == said("2 + 2?", "", "sure?")
    unchanged = (
        said("2 + 2?", "  4 \n", "what is <think>x</think>?"),  # no thinking, and a user's tags are the user's
        said("2 + 2?", thought),  # the turn itself, not an earlier one
        [{"role": "system", "content": thought}, *said("1?")],
        [],
    )
    for messages in unchanged:
        assert without_thinking(messages) == messages
    messages = said("2 + 2?", thought, "sure?")
    once = without_thinking(messages)
    assert without_thinking(once) == once and messages == said("2 + 2?", thought, "sure?")


def test_as_reasoning_models_are_served(shared):
    """Equal to a template that drops thinking itself, as DeepSeek-R1's does: text after the last </think> of earlier turns."""
    hf = load_tokenizer(shared / "data" / "models" / "tiny_qwen3").hf
    plain = hf.chat_template
    dropping = plain.replace(
        "m['content']", "(m['content'].split('</think>')[-1].strip() if m['role'] == 'assistant' else m['content'])"
    )
    assert dropping != plain
    turns = said("2 + 2?", "<think>two and two</think>4", "and 1?", "<think>4 + 1</think>\n\n5", "and 2?")
    told = {"add_generation_prompt": True, "tokenize": False}
    assert hf.apply_chat_template(without_thinking(turns), **told) == hf.apply_chat_template(turns, chat_template=dropping, **told)
    assert "two and two" in hf.apply_chat_template(turns, **told)
