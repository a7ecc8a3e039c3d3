"""Text to tokens and back, the bytes of every token, and which tokens stop a completion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxreason.models.tokenizer import TAGS, Tokenizer, load_tokenizer, save_word_tokenizer
from jaxreason.tasks.word_problems import word_problems

TASK = word_problems(heldout_size=100)
TEXTS = (
    "Tom has 17 pens. Can't we: 1,234?",
    "<think>é ℃ 你好 🙂\n\n\tx  </think><answer>\\boxed{3}</answer>",
    "e\u0301 is not é; <|im_start|>user\nHow many?",
)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    save_word_tokenizer(TASK.words, tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def bpe(shared: Path, tmp_path: Path) -> Path:
    """A copy of a folder with a byte-level BPE tokenizer of 363 tokens, for a model of 512."""
    target = tmp_path / "bpe"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"):
        shutil.copyfile(shared / "data" / "models" / "tiny_qwen2" / name, target / name)
    return target


def change(file: Path, **values: Any) -> None:
    """Changes a JSON file; None takes a key away."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a completion without its stop token."""
    [tokens] = tokenizer.encode_completions([text])
    assert tokens[-1] == tokenizer.eos_ids[0]
    return tokens[:-1]


# ---- the word tokenizer


def test_problems_and_demonstrations_survive_the_word_tokenizer(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    unknown = tokenizer.hf.unk_token_id
    problems = [TASK.train(number) for number in range(400)] + list(TASK.heldout)
    assert len(problems) == 500
    prompts = tokenizer.encode_prompts([TASK.messages(problem) for problem in problems])
    assert [tokenizer.decode(tokens) for tokens in prompts] == [problem.question for problem in problems]
    for kind in ("worked", "flawed"):
        texts = [TASK.demonstrations[kind](number).completion for number in range(500)]
        completions = tokenizer.encode_completions(texts)
        assert [tokenizer.decode(tokens) for tokens in completions] == texts
        assert all(tokens[-1] == tokenizer.eos_ids[0] and unknown not in tokens for tokens in completions)
    assert not any(unknown in tokens for tokens in prompts)


def test_the_word_tokenizer_cuts_where_it_says(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    text = "Tom has 17 pens.<think>17-3=14</think><answer>14</answer>"
    pieces = ["Tom", " has", " ", "1", "7", " pens", ".", "<think>", "1", "7", "-", "3", "=", "1", "4", "</think>"]
    assert tokenizer.hf.convert_ids_to_tokens(ids(tokenizer, text)) == [*pieces, "<answer>", "1", "4", "</answer>"]
    assert len(tokenizer.hf) == 7 + len(TASK.words) and len(set(TASK.words)) == len(TASK.words)
    assert all(len(ids(tokenizer, tag)) == 1 for tag in TAGS)
    assert ids(tokenizer, "Zoe") == [tokenizer.hf.unk_token_id]


def test_the_word_tokenizer_saved_again_is_the_same(words: Path, tmp_path: Path) -> None:
    first = load_tokenizer(words)
    first.save(tmp_path / "again")
    second = load_tokenizer(tmp_path / "again")
    assert (second.eos_ids, second.pad_id) == (first.eos_ids, first.pad_id)
    assert second.hf.get_vocab() == first.hf.get_vocab()
    text = TASK.demonstrations["worked"](0).completion
    assert ids(second, text) == ids(first, text)
    assert second.encode_prompts([TASK.messages(TASK.heldout[0])]) == first.encode_prompts([TASK.messages(TASK.heldout[0])])


# ---- bytes of tokens


def test_bytes_of_word_tokens_join_to_the_text(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    table = tokenizer.vocabulary(64)
    assert len(table) == 64
    for number in range(100):
        text = TASK.train(number).question + TASK.demonstrations["worked"](number).completion
        assert b"".join(table[token] or b"?" for token in ids(tokenizer, text)) == text.encode()
    silent = {number for number, each in enumerate(table) if each is None}
    assert silent == {tokenizer.pad_id, *tokenizer.eos_ids, *range(len(tokenizer.hf), 64)}


def test_bytes_of_byte_level_tokens_join_to_the_text(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    table = tokenizer.vocabulary(512)
    for text in TEXTS:
        tokens = ids(tokenizer, text)
        assert b"".join(table[token] or b"?" for token in tokens) == text.encode()
        assert tokenizer.decode(tokens) == text
    silent = {number for number, each in enumerate(table) if each is None}
    assert silent == {tokenizer.pad_id, *tokenizer.eos_ids, *range(363, 512)}
    assert {bytes([byte]) for byte in range(256)} <= set(table)  # so any text can be written


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen3", "torchtitan_test_tokenizer"])
def test_bytes_of_real_tokenizers_join_to_the_text(shared: Path, name: str) -> None:
    """One of them has tokens with a plain space, which the alphabet of bytes does not hold."""
    hf = PreTrainedTokenizerFast.from_pretrained(shared / "data" / "models" / name)
    table = Tokenizer(hf=hf, eos_ids=(-1,), pad_id=-1).vocabulary(len(hf))
    for text in TEXTS[:2]:
        ids = hf(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[number] or b"" for number in ids).decode() == hf.decode(ids)
    assert len(table) > 300 and None not in table


def test_bytes_of_sentencepiece_tokens_join_to_the_text() -> None:
    fast = Fast(models.BPE(byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=pieces)
    fast.train_from_iterator(["How many pens has Tom? Tom has 17 pens."] * 4, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", clean_up_tokenization_spaces=False)
    tokenizer = Tokenizer(hf=hf, eos_ids=(1,), pad_id=1)
    table = tokenizer.vocabulary(len(hf))
    for text in ("How many pens? 17, é 🙂\n\n", "Tom has  2 pens"):
        ids = hf(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[number] or b"" for number in ids) == text.encode()
    assert table[1] is None and table[2 + 10] == b"\n" and b" has" in table


def test_a_model_may_have_fewer_or_more_ids_than_the_tokenizer(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.vocabulary(100) == tokenizer.vocabulary(512)[:100]
    tokens = ids(tokenizer, "Tom")
    assert tokenizer.decode([*tokens, 400, 511]) == "Tom"  # ids that stand for nothing


def test_tokenizer_json_decides_in_a_qwen2_folder(bpe: Path, words: Path) -> None:
    # AutoTokenizer rebuilds every Qwen2 folder's tokenizer by Qwen's own splitting rule
    found, plain = load_tokenizer(bpe), Fast.from_file(str(bpe / "tokenizer.json"))
    for text in TEXTS:
        assert ids(found, text) == plain.encode(text, add_special_tokens=False).ids
    before = load_tokenizer(words)
    shutil.copyfile(bpe / "config.json", words / "config.json")
    text = TASK.demonstrations["worked"](0).completion
    assert ids(load_tokenizer(words), text) == ids(before, text)


# ---- stop and padding tokens


def test_the_chat_template_opens_the_assistants_turn(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    [tokens] = tokenizer.encode_prompts([[{"role": "user", "content": "Hi"}]])
    assert tokenizer.hf.decode(tokens) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_every_stop_token_of_the_generation_config_is_known(bpe: Path) -> None:
    generation = bpe / "generation_config.json"
    for named, expected in (([0, 2], (0, 2)), ([2, 7, 0], (2, 7, 0)), (7, (2, 7)), (None, (2,))):
        change(generation, eos_token_id=named)
        assert load_tokenizer(bpe).eos_ids == expected
    generation.unlink()
    assert load_tokenizer(bpe).eos_ids == (2,)
    change(generation, eos_token_id=[2, 7])
    tokenizer = load_tokenizer(bpe)
    tokens = [token for token in ids(tokenizer, "Hi") if token != 7]
    assert tokenizer.decode([*tokens, 7]) == tokenizer.decode([*tokens, 2, 0, 0]) == "Hi"
    assert tokenizer.vocabulary(512)[7] is None


def test_padding_may_be_the_stop_token(bpe: Path) -> None:
    change(bpe / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(bpe)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2,), 2)
    assert tokenizer.decode([*ids(tokenizer, TEXTS[0]), 2, 2, 2]) == TEXTS[0]


def test_without_a_chat_template_messages_are_paragraphs(bpe: Path) -> None:
    (bpe / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(bpe)
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, (TEXTS[0], "18", TEXTS[2]), strict=True)]
    text = "".join(f"{turn['content']}\n\n" for turn in turns)
    assert tokenizer.encode_prompts([turns]) == [ids(tokenizer, text)]
    tokenizer.save(bpe / "saved")
    (bpe / "generation_config.json").rename(bpe / "saved" / "generation_config.json")
    assert load_tokenizer(bpe / "saved").encode_prompts([turns]) == [ids(tokenizer, text)]


def test_a_text_is_the_prompt_as_it_stands_after_the_token_that_begins_texts(bpe: Path) -> None:
    text = [{"role": "text", "content": TEXTS[0]}]
    plain = load_tokenizer(bpe)
    assert plain.encode_prompts([text]) == [ids(plain, TEXTS[0])]
    content = json.loads((bpe / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    pair = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    number = plain.hf.convert_tokens_to_ids("<|im_start|>")
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [number], "tokens": ["<|im_start|>"]}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": pair, "pair": pair, "special_tokens": special}
    (bpe / "tokenizer.json").write_text(json.dumps(content))
    change(bpe / "tokenizer_config.json", bos_token="<|im_start|>")
    assert load_tokenizer(bpe).encode_prompts([text]) == [[number, *ids(plain, TEXTS[0])]]
    (bpe / "chat_template.jinja").unlink()
    asked = [{"role": "user", "content": TEXTS[0]}]
    assert load_tokenizer(bpe).encode_prompts([asked]) == [[number, *ids(plain, TEXTS[0] + "\n\n")]]


def test_earlier_thinking_is_not_put_again(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>one and one</think>\n\n2"},
        {"role": "user", "content": "and 1 more?"},
    ]
    answered = [turns[0], {"role": "assistant", "content": "2"}, turns[2]]
    expected = tokenizer.hf.apply_chat_template(answered, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokenizer.encode_prompts([turns]) == [expected["input_ids"]]
    assert "one and one" not in tokenizer.decode(tokenizer.encode_prompts([turns])[0])


def test_a_folder_that_lacks_something_is_one_clear_error(bpe: Path) -> None:
    change(bpe / "tokenizer_config.json", eos_token=None)
    (bpe / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"bpe names no end-of-sequence token: set eos_token in its tokenizer_config\.json"):
        load_tokenizer(bpe)
    (bpe / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"bpe holds no tokenizer\.json: give a folder saved with a fast tokenizer"):
        load_tokenizer(bpe)
