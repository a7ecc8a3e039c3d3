"""Tokenizers: a Hugging Face folder's, or one made from a task's closed vocabulary and saved as such a folder.

Both are loaded by the same call. The stop tokens, the padding token and the bytes of each token are stated here once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxreason.tasks.conversation import TEXT, without_thinking

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PARAGRAPHS = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"  # where a tokenizer has no chat template


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer of transformers, with what training must know of it."""

    hf: Any
    eos_ids: tuple[int, ...]
    pad_id: int

    def encode_prompts(self, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        """Token ids of each conversation under the chat template, ready for the assistant's turn.

        The assistant's earlier turns are put without their thinking. One message of the role `text` is the prompt as it stands.
        """
        texts = [self._prompt(each) for each in conversations]
        return self.hf(texts, add_special_tokens=False)["input_ids"]

    def _prompt(self, conversation: list[dict[str, str]]) -> str:
        if [message["role"] for message in conversation] == [TEXT]:
            return _opening(self.hf) + conversation[0]["content"]
        return self.hf.apply_chat_template(without_thinking(conversation), add_generation_prompt=True, tokenize=False)

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of completions, each with its stop token."""
        return [[*ids, self.eos_ids[0]] for ids in self.hf(list(texts), add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion: its stop token and padding left out, every other token kept."""
        kept = [int(token) for token in tokens if int(token) not in self.eos_ids and int(token) != self.pad_id]
        return self.hf.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def unknown(self, text: str) -> list[str]:
        """The pieces of a text that a closed vocabulary does not hold; a byte-level one holds everything."""
        if self.hf.unk_token_id is None:
            return []
        found = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [text[start:end].strip() for token, (start, end) in pairs if token == self.hf.unk_token_id]

    def vocabulary(self, size: int) -> list[bytes | None]:
        """The bytes of each token id below `size`; None where an id stands for no text."""
        state = json.loads(self.hf.backend_tokenizer.to_str())
        steps = json.dumps([state.get("pre_tokenizer"), state.get("decoder")], ensure_ascii=False)
        alphabet = {symbol: bytes([byte]) for byte, symbol in _byte_alphabet().items()} if "ByteLevel" in steps else {}
        if "Metaspace" in steps or "▁" in steps:  # SentencePiece: a space, and <0x0A> for a byte that is in no piece
            alphabet = {"▁": b" "}
        added = {entry["id"] for entry in state.get("added_tokens", [])}
        table: list[bytes | None] = [None] * size
        for token, number in self.hf.get_vocab().items():
            if number >= size or number == self.pad_id or number in self.eos_ids:
                continue
            if "ByteFallback" in steps and re.fullmatch("<0x[0-9A-F]{2}>", token):
                table[number] = bytes.fromhex(token[3:5])
            elif number in added:
                table[number] = token.encode()
            else:
                table[number] = b"".join(alphabet.get(symbol) or symbol.encode() for symbol in token)
        return table

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE: itself where printable, else from 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with every stop token that its generation config names."""
    # not AutoTokenizer: for some model types it rebuilds the tokenizer by class and ignores most of tokenizer.json
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json: give a folder saved with a fast tokenizer")
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    eos: list[int] = []
    generation = folder / "generation_config.json"
    if generation.is_file():
        named = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        eos += named if isinstance(named, list) else [] if named is None else [named]
    if hf.eos_token_id is not None and hf.eos_token_id not in eos:
        eos.insert(0, hf.eos_token_id)
    if not eos:
        raise ValueError(f"{folder} names no end-of-sequence token: set eos_token in its tokenizer_config.json")
    if hf.chat_template is None:
        hf.chat_template = ("{{ bos_token }}" if _opening(hf) else "") + PARAGRAPHS
    # nothing is derived from the padding id, so the stop token may serve where a tokenizer names no other
    pad = hf.pad_token_id if hf.pad_token_id is not None else eos[0]
    return Tokenizer(hf=hf, eos_ids=tuple(eos), pad_id=pad)


def _opening(hf: Any) -> str:
    """What the tokenizer itself begins every text with: its begin-of-sequence token, or nothing."""
    return hf.bos_token if hf.bos_token is not None and hf("")["input_ids"][:1] == [hf.bos_token_id] else ""


def save_word_tokenizer(words: Sequence[str], folder: Path) -> None:
    """Writes a tokenizer whose tokens are these pieces and the think and answer tags, digits one by one."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<unk>", *TAGS)
    vocabulary = {piece: number for number, piece in enumerate((*special, *words))}
    fast = Fast(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(list(special))
    hf = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=PLAIN_TEMPLATE,
    )
    hf.save_pretrained(folder)
