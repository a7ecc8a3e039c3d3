"""A policy as a model of lm-evaluation-harness (EleutherAI), which then runs its own tasks on it; extra `eval`.

    from lm_eval import simple_evaluate
    from jaxreason.training.lm_eval import Policy

    simple_evaluate(model=Policy("runs/mine/policy"), tasks=["gsm8k", "arc_easy"])

Continuations of one context are scored together, so that it is read once for all choices of a question; generation is the
engine's, with stop strings found in bytes. Deliberately absent: the harness's model registry and several processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxreason import sharding
from jaxreason.models import decoder, huggingface
from jaxreason.models.config import Numerics
from jaxreason.models.decoder import Model
from jaxreason.models.tokenizer import load_tokenizer
from jaxreason.numerics import at_least_float32
from jaxreason.sampling.generate import Engine
from jaxreason.sampling.law import Law

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
except ImportError as error:
    raise ValueError("lm-evaluation-harness is not installed: install jaxreason[eval]") from error

Encoded = tuple[list[int], list[int]]  # a context's tokens, and those of what continues it
LEAST = 16  # tokens that rows are rounded up to, by powers of two, so that few programs are compiled
UNDERSTOOD = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
}  # of what a task's generation_kwargs may set


class Policy(TemplateLM):
    """A Hugging Face folder's model, as `jaxreason train` and `jaxreason export` write them, on this process's devices."""

    def __init__(
        self,
        folder: str | Path,
        *,
        numerics: Numerics | None = None,
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int = 16,
        slots: int = 32,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        """`batch_size` contexts are scored at once, `slots` completions grow at once; `max_length` tokens are the most in a row.

        `max_gen_toks` is for tasks that do not say how many tokens a completion may have.
        """
        super().__init__()
        if batch_size < 1 or max_length < 2:
            raise ValueError(f"batch_size is {batch_size} and max_length {max_length}: expected at least 1 and at least 2")
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give the folder of a model, such as the policy/ in a run's folder")
        self.mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
        architecture = huggingface.read_architecture(self.folder)
        self.model = decoder.make_decoder(architecture, numerics or Numerics(), self.mesh)
        dtype = self.model.numerics.param_dtype
        self.params = huggingface.load_params(self.model.specs, self.folder, dtype=dtype, mesh=self.mesh)
        self.ours = load_tokenizer(self.folder)
        self.tokenizer = self.ours.hf
        self.max_length, self.max_gen_toks = min(max_length, architecture.max_positions), max_gen_toks
        self.rows = sharding.problem_shards(self.mesh) * -(-batch_size // sharding.problem_shards(self.mesh))
        self.seed = seed
        self.engine = Engine(self.model, self.ours, self.mesh, slots=slots, max_prompt_tokens=self.max_length, overlong="cut")
        self.prepared: Any = None
        self.scored = jax.jit(partial(_scored, self.model), out_shardings=sharding.named(self.mesh))

    # ---- the tokenizer, as the harness uses one

    @property
    def eot_token_id(self) -> int:
        return self.ours.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # the tokenizer's own way, but no second first token
            own = {"add_special_tokens": False} if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)) else {}
        else:
            own = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **own)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        given: Any = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, **given, continue_final_message=not add_generation_prompt)

    # ---- log-probabilities

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is greedy decoding's), in the order of the requests."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {number} has {len(context)} tokens of context and {len(continuation)} of continuation: expected at "
                    f"least one of each, and at most {self.max_length} of the latter"
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            asked[tuple(kept)].append((number, continuation))
        groups = sorted(asked.items(), key=lambda item: (_size(item[0]), _size(*(one for _, one in item[1])), len(item[1])))
        for start in range(0, len(groups), self.rows):
            some = groups[start : start + self.rows]
            batch = [(list(context), [continuation for _, continuation in own]) for context, own in some]
            logp, greedy = self._batch(batch)
            for row, (_, own) in enumerate(some):
                for column, (number, _) in enumerate(own):
                    answers[number] = (float(logp[row, column]), bool(greedy[row, column]))
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _batch(self, batch: list[tuple[list[int], list[list[int]]]]) -> tuple[np.ndarray, np.ndarray]:
        """Of each context and each of its continuations, [rows, G]."""
        before = _size(*(context for context, _ in batch))
        after = _size(*(continuation for _, own in batch for continuation in own))
        group = _power(max(len(own) for _, own in batch))
        prompt, completion = np.zeros((self.rows, before), np.int32), np.zeros((self.rows, group, after), np.int32)
        prompt_mask, mask = np.zeros(prompt.shape, bool), np.zeros(completion.shape, bool)
        prompt_mask[:, -1] = True  # a row that is only there to fill the batch has a token too
        for row, (context, own) in enumerate(batch):
            prompt[row, before - len(context) :], prompt_mask[row, before - len(context) :] = context, True
            for column, continuation in enumerate(own):
                completion[row, column, : len(continuation)], mask[row, column, : len(continuation)] = continuation, True
        arrays = sharding.place(self.mesh, (prompt, prompt_mask, completion, mask), ("problems",))
        return sharding.fetch(self.scored(self.params, *arrays))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows that do not overlap, the first after the prefix token."""
        windows, whose = [], []
        for number, request in enumerate(requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, cut):
                windows.append((None, *window))
                whose.append(number)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(whose, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's completion, up to the first of the request's stop strings; sampled from the seed where it asks so."""
        texts: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        for numbers in alike.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            until, tokens, law = self._asked(dict(asked))
            contexts = [self.tok_encode(requests[number].args[0])[-(self.max_length - tokens) :] for number in numbers]
            if self.prepared is None:
                self.prepared = self.engine.prepare(self.params)
            given: Any = {"max_tokens": tokens, "law": law, "seed": self.seed, "stop": until}
            made = self.engine.generate(self.prepared, contexts, **given)
            for number, (completion,) in zip(numbers, made.completions, strict=True):
                text = self.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
                for end in until:
                    text = text.split(end)[0]
                texts[number] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _asked(self, asked: dict[str, Any]) -> tuple[list[str], int, Law]:
        """Stop strings, the most tokens, and the law, of a request's settings."""
        until, tokens = asked.pop("until", None) or [], asked.pop("max_gen_toks")
        until = [each for each in ([until] if isinstance(until, str) else until) if each]
        if not 1 <= tokens < self.max_length:
            raise ValueError(f"a task asks for {tokens} new tokens, and max_length is {self.max_length}: make the Policy with more")
        if unknown := sorted(set(asked) - UNDERSTOOD):
            raise ValueError(
                f"a task's generation_kwargs set '{unknown[0]}', which is not understood here: expected until, max_gen_toks, "
                f"{', '.join(sorted(UNDERSTOOD))}"
            )
        if not asked.pop("do_sample", False) or not asked.get("temperature"):
            return until, tokens, Law(greedy=True)
        return until, tokens, Law(**asked)


def _scored(
    model: Model,
    params: Any,
    prompt: Int[Array, "P Tp"],
    prompt_mask: Bool[Array, "P Tp"],
    completion: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"],
) -> tuple[Float[Array, "P G"], Bool[Array, "P G"]]:
    """Log-probability of each completion, and whether every token of it is the likeliest; one row's logits at a time."""
    hidden = model.completion_hidden(params, prompt, prompt_mask, completion)

    def one(row: tuple[Any, Any]) -> tuple[Any, Any]:
        states, tokens = row
        logits = model.project(params, states)
        logp = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
        own = jnp.take_along_axis(logp, tokens[:, None], axis=1)[:, 0]
        return own, jnp.argmax(logp, axis=1).astype(tokens.dtype) == tokens

    flat = hidden.reshape(-1, *hidden.shape[2:]), completion.reshape(-1, completion.shape[2])
    logp, greedy = (x.reshape(mask.shape) for x in jax.lax.map(one, flat))
    return jnp.sum(jnp.where(mask, logp, jnp.zeros_like(logp)), axis=2), jnp.all(greedy | ~mask, axis=2)


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _size(*rows: Sequence[int]) -> int:
    """The width of a batch of these rows."""
    return max(LEAST, _power(max(len(row) for row in rows)))
