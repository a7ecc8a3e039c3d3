"""Shared helpers: a random Qwen2 policy, a word-level tokenizer and dummy prompts, all built locally."""

import os
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def add_model_args(p):
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--intermediate", type=int, default=1024)
    p.add_argument("--vocab", type=int, default=512)
    p.add_argument("--max-pos", type=int, default=2048)
    p.add_argument("--tie", action="store_true", help="tie input embedding and LM head")
    p.add_argument("--prompt-len", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--prompts", type=int, default=8, help="distinct prompts per step")
    p.add_argument("--group", type=int, default=8, help="completions per prompt")
    p.add_argument("--threads", type=int, default=0, help="torch intra-op threads (0: library default)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--attn", default="sdpa", choices=["sdpa", "eager"])


def make_tokenizer(vocab_size):
    words = SPECIAL + [f"w{i}" for i in range(vocab_size - len(SPECIAL))]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(a):
    import torch

    torch.manual_seed(a.seed)
    cfg = Qwen2Config(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=a.max_pos,
        tie_word_embeddings=a.tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=a.attn,
    )
    return Qwen2ForCausalLM(cfg).to(torch.float32)


def make_prompts(n, prompt_len, vocab_size, seed):
    rng = random.Random(seed)
    lo, hi = 0, vocab_size - len(SPECIAL) - 1
    return [" ".join(f"w{rng.randint(lo, hi)}" for _ in range(prompt_len)) for _ in range(n)]


def quiet():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
