"""Texts in, completions out: the engine's programs, compiled once a shape, and the host's side of its queue.

Sizes are rounded up (prompts, lengths, slots, tokens: to powers of two), so that calls of every kind run a few programs; how many
were compiled is in `Engine.compilations`. Prompts are read in batches of like lengths. The device works in segments of some
steps: between two the host looks on, tells how far it is, and may be told to stop, when what is finished is returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason import sharding
from jaxreason.compiling import compiled
from jaxreason.models.decoder import Model, Params
from jaxreason.models.tokenizer import Tokenizer
from jaxreason.sampling import engine, law, speculation, stops
from jaxreason.sampling.engine import Record, Roots, Rules, Slots
from jaxreason.sampling.law import Law
from jaxreason.sampling.queue import Queue, buckets, collect, compact, drain
from jaxreason.sampling.rollout import completion_keys
from jaxreason.types import Completion, StopReason

REASONS = (*StopReason,)  # in the order of the engine's codes, LIVE's 0 left out
LEAST = 32  # fewest places of a prompt and of a completion that a program is made for
PREFILL_TOKENS = 2048  # about as many are read at once
NO_LAW = Law()

Progress = Callable[[int, int, int], None]  # completions that ended, all, tokens chosen


class Generation(NamedTuple):
    """What a call made, and what it cost."""

    completions: list[list[Completion]]  # n of each prompt
    prompt_tokens: int  # read, each once for its n completions
    new_tokens: int  # chosen
    cut_prompts: int  # that were too long and lost their beginning
    finished: bool  # False: it was told to stop, and what had not ended is PARKED
    drafted: int = 0  # tokens
    accepted: int = 0  # of these, that were what would have come


class Engine:
    """Holds a model's programs. `slots` completions grow at a time; on several devices each has its share of them."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        slots: int = 32,
        max_prompt_tokens: int = 4096,
        overlong: str = "refuse",
        segment: int = 64,
        draft: int | str = 0,
    ) -> None:
        """`overlong` prompts are refused, or cut at their beginning ('cut'); `segment`: steps between two looks of the host.

        `draft`: tokens drafted a step (speculation.py), or 'auto': some where that is measured to pay.
        """
        self.lanes = sharding.problem_shards(mesh)
        if slots < self.lanes or slots & (slots - 1) or slots % self.lanes:
            raise ValueError(f"slots is {slots}: expected a power of two that the {self.lanes} devices of the problems divide")
        if overlong not in ("refuse", "cut"):
            raise ValueError(f"overlong is {overlong!r}: expected 'refuse' or 'cut'")
        if segment < 1 or max_prompt_tokens < 1:
            raise ValueError(f"segment is {segment} and max_prompt_tokens {max_prompt_tokens}: expected 1 or more")
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.slots, self.max_prompt_tokens, self.overlong, self.segment = slots, max_prompt_tokens, overlong, segment
        self.draft = draft
        self.paces: dict[Law, speculation.Pace] = {}  # what drafts have brought, by law
        self.programs: dict[Any, Any] = {}
        self.tables: dict[Any, Any] = {}

    @property
    def compilations(self) -> int:
        """How many programs were compiled until now."""
        return len(self.programs)

    def prepare(self, params: Params) -> Params:
        """Parameters as `generate` takes them."""
        return self._run("prepare", self.model.prepare_sampling, params)

    def generate(
        self,
        params: Params,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        *,
        max_tokens: int | Sequence[int] = 256,
        law: Law = NO_LAW,
        seed: int = 0,
        stop: Sequence[str] = (),
        step: Sequence[str] = (),
        pattern: str = "",
        draft: int | str | None = None,
        progress: Progress | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> Generation:
        """`n` completions of each prompt, texts or token ids; `params` are what `prepare` returned.

        They end at the tokenizer's stop tokens, at a string of `stop`, or after `max_tokens` (one number, or one for each
        completion, prompt by prompt); `step` delimiters are marked; a `pattern`, a regular expression, bounds what is written.
        The same seed gives the same completions, in any order, however many others there are, and with any `draft` (None: the
        engine's). ValueErrors before compiling.
        """
        rows, cut = self._tokens(prompts)
        if n < 1 or not rows:
            raise ValueError(f"generate was given {len(rows)} prompts and n = {n}: expected at least one of each")
        limits = np.broadcast_to(np.asarray(max_tokens, np.int32), (len(rows) * n,))
        if limits.min() < 1:
            raise ValueError(f"max_tokens is {limits.min()} in one place: expected 1 or more")
        rules = self._rules(params, law, stop=stop, step=step, pattern=pattern)
        draft = self.draft if draft is None else draft
        pace = self.paces.setdefault(law, speculation.Pace(self.segment)) if draft == "auto" else None
        rules = replace(rules, draft=self._checked(params, speculation.AUTO if pace else draft))
        total, tokens = self.lanes * _power(-(-len(rows) // self.lanes)), _power(int(limits.max()), least=LEAST)
        place = np.arange(len(rows)) % self.lanes * (total // self.lanes) + np.arange(len(rows)) // self.lanes
        roots = self._read(params, rows, place, total, rules)
        number = np.zeros(total, np.uint32)
        number[place] = np.arange(len(rows))
        limit = np.zeros((total, n), np.int32)
        limit[place] = limits.reshape(-1, n)
        count = np.bincount(np.arange(len(rows)) % self.lanes, minlength=self.lanes) * n
        slots = min(self.slots, self.lanes * _power(-(-total * n // self.lanes)))
        given = [self._place(x) for x in (number, limit.reshape(-1), count.astype(np.int32))]
        begin = partial(self._begin, slots=slots, group=n, tokens=tokens)
        state = self._run(("begin", slots, n, tokens), begin, roots, rules, np.uint32(seed), *given)
        told: Any = {"progress": progress, "stopping": stopping, "pace": pace}
        record, finished = self._drain(params, roots, state, rules, slots=slots, n=n, **told)
        order = (place[:, None] * n + np.arange(n)[None]).reshape(-1)
        record = jax.tree.map(lambda x: x[order], sharding.fetch(record))
        made = self._completions(record, params, stop=tuple(stop))
        groups = [made[i : i + n] for i in range(0, len(made), n)]
        chosen = sum(sum(each.mask) for each in made)
        drafts = (0, 0) if record.drafts is None else record.drafts.sum(axis=0).tolist()
        return Generation(groups, sum(map(len, rows)), chosen, cut, finished, *drafts)

    # ---- what is asked for

    def _tokens(self, prompts: Sequence[str | Sequence[int]]) -> tuple[list[list[int]], int]:
        """Each prompt's token ids, and how many lost their beginning."""
        rows, cut, most = [], 0, self.max_prompt_tokens
        for number, prompt in enumerate(prompts):
            ids = self.tokenizer.hf(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise ValueError(f"prompt {number} is empty: give at least one token")
            if len(ids) > most and self.overlong == "refuse":
                raise ValueError(
                    f"prompt {number} has {len(ids)} tokens, and max_prompt_tokens is {most}: shorten it, or make the engine "
                    "with a larger max_prompt_tokens or overlong='cut'"
                )
            cut += len(ids) > most
            rows.append(ids[-most:])
        return rows, cut

    def _rules(self, params: Params, asked: Law, *, stop: Sequence[str], step: Sequence[str], pattern: str) -> Rules:
        tokenizer, size = self.tokenizer, self._vocab_size(params)
        law.check(asked, vocab_size=size, eos_ids=tokenizer.eos_ids, key="law")
        key = (tuple(stop), tuple(step), pattern)
        if key not in self.tables:
            vocabulary = tokenizer.vocabulary(size)
            search = stops.stop_machine(vocabulary, stops=stop, steps=step) if stop or step else None
            grammar = stops.constrain(pattern, vocabulary, eos_ids=tokenizer.eos_ids) if pattern else None
            self.tables[key] = jax.device_put((search, grammar), sharding.named(self.mesh))
        return Rules(asked, tokenizer.eos_ids, tokenizer.pad_id, *self.tables[key])

    def _checked(self, params: Params, draft: Any) -> int:
        if ("draft", draft) not in self.tables:
            speculation.check(self.model, params, draft=draft, lanes=self.lanes)
            self.tables["draft", draft] = draft
        return draft

    def _vocab_size(self, params: Params) -> int:
        prompt, mask = (jax.ShapeDtypeStruct((self.lanes, 1), kind) for kind in (jnp.int32, bool))
        hidden = jax.eval_shape(lambda *given: self.model.prefill(*given)[0], params, prompt, mask)
        return engine.vocab_size(self.model, params, hidden)

    # ---- programs

    def _run(self, name: Any, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """Calls a function, compiled for arguments of these shapes if it has not been."""
        return self._program(name, function, *args, donate=donate)(*args)

    def _program(self, name: Any, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        leaves, tree = jax.tree.flatten(args)
        key = (name, tree, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self.programs:
            self.programs[key] = compiled(jax.jit(function, donate_argnums=donate), *args)
        return self.programs[key]

    def _place(self, x: np.ndarray) -> jax.Array:
        return sharding.place(self.mesh, x, ("problems",))

    def _read(self, params: Params, rows: list[list[int]], place: np.ndarray, total: int, rules: Rules) -> Roots:
        """All prompts, read in batches of like lengths, in the rows `place` of `total`."""
        longest = _power(max(map(len, rows)), least=LEAST)
        roots = self._run(("room", total, longest), partial(self._room, rows=total, tokens=longest), params, rules)
        sizes = np.array([_power(len(ids), least=LEAST) for ids in rows])
        for size in sorted(set(sizes.tolist())):
            of_size = np.flatnonzero(sizes == size)
            batch = max(self.lanes, min(total, _power(PREFILL_TOKENS // size)))
            for start in range(0, len(of_size), batch):
                some = of_size[start : start + batch]
                prompt = np.full((batch, size), self.tokenizer.pad_id, np.int32)
                at = np.full(batch, total, np.int32)  # beyond the last: what is read there is dropped
                mask = np.zeros((batch, size), bool)
                for i, number in enumerate(some):
                    ids = rows[number]
                    prompt[i, size - len(ids) :], mask[i, size - len(ids) :], at[i] = ids, True, place[number]
                given = (self._place(prompt), self._place(mask), jax.device_put(at, sharding.named(self.mesh)))
                roots = self._run("read", self._read_some, params, roots, rules, *given, donate=(1,))
        return roots

    def _room(self, params: Params, rules: Rules, *, rows: int, tokens: int) -> Roots:
        shapes = jax.eval_shape(
            partial(engine.open, self.model, rules=rules), params, *(jnp.zeros((rows, tokens), kind) for kind in (jnp.int32, bool))
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _read_some(self, params: Params, roots: Roots, rules: Rules, prompt: Any, mask: Any, at: Any) -> Roots:
        some = engine.open(self.model, params, prompt, mask, rules=rules)
        kept = {name: getattr(roots, name) for name in ("hidden", "seen", "prompt")}
        new = {name: getattr(some, name) for name in kept}
        if some.prompt is not None:
            more = kept["prompt"].shape[1] - prompt.shape[1]
            new["prompt"] = jnp.pad(some.prompt, ((0, 0), (more, 0)), constant_values=-1)
        kept = jax.tree.map(lambda there, x: there.at[at].set(x, mode="drop"), kept, new)
        return Roots(self.model.insert(roots.prompts, some.prompts, at), **kept)

    def _begin(
        self, roots: Roots, rules: Rules, seed: Any, number: Any, limit: Any, count: Any, *, slots: int, group: int, tokens: int
    ) -> tuple[Slots, Record, Queue]:
        keys = completion_keys(jax.random.key(seed), number, group=group).reshape(-1)
        first = jnp.arange(slots, dtype=jnp.int32)
        root = first // (slots // self.lanes) * (number.shape[0] // self.lanes)
        seated = engine.seat(self.model, roots, root, keys[first % keys.shape[0]], tokens=tokens, rules=rules)
        record = engine.blank(keys.shape[0], tokens, rules=rules, dtype=seated.record.logp.dtype)
        queue = Queue(keys, limit, jnp.zeros_like(count), count, jnp.zeros((), jnp.int32))
        return engine.close(seated, jnp.ones(slots, bool)), record, queue

    def _drain(
        self,
        params: Params,
        roots: Roots,
        state: Sequence[Any],
        rules: Rules,
        *,
        slots: int,
        n: int,
        progress: Progress | None,
        stopping: Callable[[], bool] | None,
        pace: speculation.Pace | None,
    ) -> tuple[Record, bool]:
        """Runs the queue empty, segment by segment, in fewer and fewer slots; `state` is what `_begin` made."""
        sizes = buckets(slots, lanes=self.lanes)

        def grow(params: Any, roots: Any, rules: Rules, slots: Any, record: Any, queue: Any, steps: Any, least: Any) -> Any:
            out = drain(
                self.model, params, roots, slots, record, queue, rules=rules, group=n, steps=steps, least=least, width=min(n, 8)
            )
            alive = out[0].record.status == engine.LIVE
            most = jnp.max(jnp.sum(alive.reshape(self.lanes, -1), axis=1, dtype=jnp.int32))
            tokens = jnp.sum(out[1].length) + jnp.sum(jnp.where(alive, out[0].record.length, 0))
            told = [most, jnp.sum(alive, dtype=jnp.int32), jnp.sum(out[2].count - out[2].taken), tokens, out[2].steps]
            ended, growing = out[1].drafts, out[0].record.drafts
            if ended is not None and growing is not None:
                told += [*(jnp.sum(ended, axis=0) + jnp.sum(growing * alive[:, None].astype(jnp.int32), axis=0))]
            return *out, told

        before = [0, 0]
        for size, following in zip(sizes, (*sizes[1:], 0), strict=True):
            least = following // self.lanes
            kind = (size, state[0].record.tokens.shape[1])
            while True:
                drafting, steps = (True, self.segment) if pace is None else pace.next(kind)
                now = rules if drafting else replace(rules, draft=0)
                given = (params, roots, now, *state, np.int32(steps), np.int32(least))
                program, begun = self._program(("grow", n), grow, *given, donate=(3, 4, 5)), time.perf_counter()
                *state, told = program(*given)
                live, alive, waiting, tokens, made, *drafts = (int(x) for x in sharding.fetch(told))
                if pace is not None:
                    new = (drafts[0] - before[0], drafts[1] - before[1])
                    pace.told(kind, drafting, steps=made, seconds=time.perf_counter() - begun, drafts=new)
                before = drafts
                if progress is not None:
                    total = int(np.sum(sharding.fetch(state[2].count)))
                    progress(total - waiting - alive, total, tokens)
                if not waiting and live <= least:
                    break
                if stopping is not None and stopping():
                    return self._run("collect", self._collect, state[0], state[1]), False
            if not live:
                break
            moved = partial(compact, self.model, slots_left=following, lanes=self.lanes)
            state = (self._run(("compact", following), moved, state[0]), *state[1:])
        return state[1], True

    def _collect(self, slots: Slots, record: Record) -> Record:
        return collect(slots, record, slots.record.status == engine.LIVE)

    def _completions(self, record: Record, params: Params, *, stop: tuple[str, ...]) -> list[Completion]:
        vocabulary = self.tokenizer.vocabulary(self._vocab_size(params)) if stop else []
        made = []
        for row in range(len(record.length)):
            length, status = int(record.length[row]), int(record.status[row])
            tokens = record.tokens[row, :length].tolist()
            reason = REASONS[status - 1] if status in range(1, len(REASONS) + 1) else StopReason.PARKED
            text = self.tokenizer.decode(tokens)
            if reason is StopReason.STOP_STRING:
                text = stops.cut(tokens, vocabulary, stops=stop).text
            made.append(
                Completion(
                    text=text,
                    tokens=tokens,
                    stop=reason,
                    logp=record.logp[row, :length].tolist(),
                    mask=record.mask[row, :length].tolist(),
                    step_ends=np.flatnonzero(record.step_end[row, :length]).tolist(),
                    after_stop=int(record.after[row]),
                    parent=int(record.parent[row]) if record.parent[row] >= 0 else None,
                )
            )
        return made


def _power(x: int, *, least: int = 1) -> int:
    """The least power of two that is not below."""
    return max(least, 1 << (x - 1).bit_length())
