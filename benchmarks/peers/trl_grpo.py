"""Time GRPO steps of Hugging Face TRL on a randomly initialised Qwen2, through TRL's public trainer.

Prints one JSON line. Completions are forced to the full length by banning EOS, so every step handles
prompts*group sequences of exactly prompt_len + new_tokens tokens.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time

import tiny

ap = argparse.ArgumentParser()
tiny.add_model_args(ap)
ap.add_argument("--warmup", type=int, default=2)
ap.add_argument("--steps", type=int, default=6)
ap.add_argument("--beta", type=float, default=0.04)
ap.add_argument("--loss-type", default="grpo")
ap.add_argument("--micro-batch", type=int, default=0, help="per-device batch; 0 = whole step in one micro-batch")
ap.add_argument("--grad-checkpoint", action="store_true")
ap.add_argument("--bf16", action="store_true")
ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
ap.add_argument("--lr", type=float, default=1e-6)
a = ap.parse_args()
if a.device == "cpu":
    tiny.quiet()
else:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

if a.threads:
    torch.set_num_threads(a.threads)

import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

transformers.logging.set_verbosity_error()
B = a.prompts * a.group
micro = a.micro_batch or B
assert B % micro == 0

acc = {}  # seconds per phase inside the current optimizer step
rows = []
lens = []


def sync():
    if a.device == "cuda":
        torch.cuda.synchronize()


class clock:
    def __init__(self, key):
        self.key = key

    def __enter__(self):
        sync()
        self.t, self.c = time.perf_counter(), time.process_time()

    def __exit__(self, *exc):
        sync()
        acc[self.key] = acc.get(self.key, 0.0) + time.perf_counter() - self.t
        acc[self.key + ":cpu"] = acc.get(self.key + ":cpu", 0.0) + time.process_time() - self.c


class TimedGRPO(GRPOTrainer):
    """Adds wall clocks around TRL's own phases; changes no behaviour."""

    def _generate(self, *args, **kw):
        with clock("generate"):
            return super()._generate(*args, **kw)

    def _generate_and_score_completions(self, inputs):
        with clock("rollout_total"):
            out = super()._generate_and_score_completions(inputs)
        lens.append(
            (out["completion_mask"].sum(1).min().item(), out["completion_mask"].sum(1).max().item(), tuple(out["prompt_ids"].shape))
        )
        return out

    def _calculate_rewards(self, *args, **kw):
        with clock("reward"):
            return super()._calculate_rewards(*args, **kw)

    def _get_per_token_logps_and_entropies(self, model, *args, **kw):
        key = "policy_forward" if torch.is_grad_enabled() else "ref_or_old_forward"
        with clock(key):
            return super()._get_per_token_logps_and_entropies(model, *args, **kw)

    def _compute_loss(self, model, inputs):
        with clock("loss_forward"):
            return super()._compute_loss(model, inputs)


class StepClock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        sync()
        self.t = time.perf_counter()
        self.c = time.process_time()

    def on_step_end(self, args, state, control, **kw):
        sync()
        row = dict(acc)
        row["step"] = time.perf_counter() - self.t
        row["step:cpu"] = time.process_time() - self.c
        for x in ("", ":cpu"):
            row["rest" + x] = row["step" + x] - sum(row.get(k + x, 0.0) for k in ("rollout_total", "loss_forward", "backward"))
        rows.append(row)
        acc.clear()


def reward(completion_ids, **kw):
    """Fraction of even ids: cheap, and differs between completions of a group."""
    return [sum(1 for t in ids if t % 2 == 0) / max(len(ids), 1) for ids in completion_ids]


tok = tiny.make_tokenizer(a.vocab)
total = a.warmup + a.steps
data = Dataset.from_dict({"prompt": tiny.make_prompts(a.prompts * total, a.prompt_len, a.vocab, a.seed)})

with tempfile.TemporaryDirectory() as tmp:
    src = os.path.join(tmp, "policy")
    m = tiny.make_model(a)
    n_params = sum(p.numel() for p in m.parameters())
    m.save_pretrained(src)
    tok.save_pretrained(src)
    del m
    cfg = GRPOConfig(
        output_dir=os.path.join(tmp, "out"),
        use_cpu=a.device == "cpu",
        bf16=a.bf16,
        gradient_checkpointing=a.grad_checkpoint,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=B // micro,
        num_generations=a.group,
        max_completion_length=a.new_tokens,
        num_iterations=1,
        beta=a.beta,
        loss_type=a.loss_type,
        temperature=1.0,
        generation_kwargs={"suppress_tokens": [0, 1, 2, 3]},  # never stop early
        learning_rate=a.lr,
        lr_scheduler_type="constant",
        max_steps=total,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=a.seed,
        model_init_kwargs={"dtype": "float32", "attn_implementation": a.attn},
    )
    tr = TimedGRPO(
        model=src,
        reward_funcs=reward,
        args=cfg,
        train_dataset=data,
        processing_class=tok,
        callbacks=[StepClock()],
    )
    # keep the per-step log dictionaries off stdout so that the last line is the JSON
    tr.remove_callback(transformers.PrinterCallback)
    real_backward = tr.accelerator.backward

    def timed_backward(*args, **kw):
        with clock("backward"):
            return real_backward(*args, **kw)

    tr.accelerator.backward = timed_backward
    tr.train()

use = rows[a.warmup :]


def med(key):
    return statistics.median(r.get(key, 0.0) for r in use)


step = med("step")
out = {
    "bench": "trl_grpo_step",
    "trl": trl.__version__,
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "device": a.device if a.device == "cpu" else torch.cuda.get_device_name(0),
    "torch_threads": torch.get_num_threads(),
    "dtype": "bf16-autocast" if a.bf16 else "float32",
    "params": n_params,
    "hidden": a.hidden,
    "layers": a.layers,
    "heads": a.heads,
    "kv_heads": a.kv_heads,
    "intermediate": a.intermediate,
    "vocab": a.vocab,
    "prompts": a.prompts,
    "group": a.group,
    "prompt_len": a.prompt_len,
    "new_tokens": a.new_tokens,
    "micro_batch": micro,
    "beta": a.beta,
    "loss_type": a.loss_type,
    "grad_checkpoint": a.grad_checkpoint,
    "completion_len_min_max": [min(shortest for shortest, _, _ in lens), max(longest for _, longest, _ in lens)],
    "prompt_shape": list(lens[0][2]),
    "warmup": a.warmup,
    "steps": len(use),
    "first_step_s": round(rows[0]["step"], 4),
    "step_s_median": round(step, 4),
    "step_s_min": round(min(r["step"] for r in use), 4),
    "step_s_max": round(max(r["step"] for r in use), 4),
    "cpu_s_per_step_median": round(med("step:cpu"), 4),
    "new_tokens_per_s": round(B * a.new_tokens / step, 1),
    "all_tokens_per_s": round(B * (a.new_tokens + a.prompt_len) / step, 1),
    "generate_s": round(med("generate"), 4),
    "reward_s": round(med("reward"), 4),
    "ref_forward_s": round(med("ref_or_old_forward"), 4),
    "rollout_total_s": round(med("rollout_total"), 4),
    "loss_forward_s": round(med("loss_forward"), 4),
    "backward_s": round(med("backward"), 4),
    "optimizer_and_rest_s": round(med("rest"), 4),
    "cpu_s": {
        k: round(med(k + ":cpu"), 4)
        for k in ("generate", "ref_or_old_forward", "rollout_total", "loss_forward", "backward", "rest")
    },
    "generate_tokens_per_s": round(B * a.new_tokens / med("generate"), 1),
    "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    "loadavg_1m": round(os.getloadavg()[0], 2),
}
if a.device == "cuda":
    out["peak_device_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
print(json.dumps(out))
sys.stdout.flush()
