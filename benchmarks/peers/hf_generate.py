"""Time plain transformers `generate` (the sampler TRL uses without vLLM). Prints one JSON line."""

import argparse
import json
import os
import resource
import statistics
import time

import tiny

ap = argparse.ArgumentParser()
tiny.add_model_args(ap)
ap.add_argument("--warmup", type=int, default=1)
ap.add_argument("--runs", type=int, default=5)
ap.add_argument("--cache", default=None, help="cache_implementation, e.g. static")
ap.add_argument("--greedy", action="store_true")
a = ap.parse_args()
tiny.quiet()

import torch  # noqa: E402

if a.threads:
    torch.set_num_threads(a.threads)
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
tok = tiny.make_tokenizer(a.vocab)
model = tiny.make_model(a).eval()
B = a.prompts * a.group
texts = [p for p in tiny.make_prompts(a.prompts, a.prompt_len, a.vocab, a.seed) for _ in range(a.group)]
enc = tok(texts, return_tensors="pt", padding=True)
kw = dict(
    max_new_tokens=a.new_tokens, min_new_tokens=a.new_tokens, do_sample=not a.greedy, pad_token_id=0, suppress_tokens=[0, 1, 2, 3]
)
if not a.greedy:
    kw.update(temperature=1.0, top_k=0, top_p=1.0)
if a.cache:
    kw["cache_implementation"] = a.cache
ts, cs = [], []
for i in range(a.warmup + a.runs):
    torch.manual_seed(i)
    t, c = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        y = model.generate(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"], disable_compile=True, **kw)
    ts.append(time.perf_counter() - t)
    cs.append(time.process_time() - c)
    assert y.shape == (B, a.prompt_len + a.new_tokens), y.shape
ts, cs = ts[a.warmup :], cs[a.warmup :]
med = statistics.median(ts)
print(
    json.dumps(
        {
            "bench": "hf_generate",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "params": sum(p.numel() for p in model.parameters()),
            "hidden": a.hidden,
            "layers": a.layers,
            "vocab": a.vocab,
            "sequences": B,
            "prompt_len": a.prompt_len,
            "new_tokens": a.new_tokens,
            "sampling": not a.greedy,
            "cache": a.cache or "dynamic",
            "runs": len(ts),
            "s_median": round(med, 4),
            "s_min": round(min(ts), 4),
            "s_max": round(max(ts), 4),
            "cpu_s_median": round(statistics.median(cs), 4),
            "new_tokens_per_s": round(B * a.new_tokens / med, 1),
            "ms_per_decode_step": round(1000 * med / a.new_tokens, 3),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "loadavg_1m": round(os.getloadavg()[0], 2),
        }
    )
)
