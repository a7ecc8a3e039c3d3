"""Writes lm_eval.json: what lm-evaluation-harness finds of a tiny model with its own transformers backend.

pip install torch==2.13.0 lm-eval==0.4.13 transformers
python tests/goldens/lm_eval_goldens.py FOLDER        # FOLDER: the model tiny_qwen2
"""

import json
import os
import platform
import sys
from pathlib import Path

import lm_eval
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = ["ours_choice", "ours_generate", "ours_rolling"]
LENGTHS = {"whole": 2048, "short": 48}  # rows of at most so many tokens


def main() -> None:
    tests, folder = Path(__file__).parents[1].resolve(), str(Path(sys.argv[1]).resolve())
    os.chdir(tests / "fixtures" / "lm_eval")
    versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    out = {"made with": {**versions, "python": platform.python_version()}}
    for name, length in LENGTHS.items():
        # the tokenizer of tokenizer.json: AutoTokenizer rebuilds this one by its model's class, which splits numbers otherwise
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model = HFLM(pretrained=folder, tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=4, max_length=length)
        manager = TaskManager(include_path=".", include_defaults=False)
        found = simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
        out[name] = {
            task: {
                "results": {key: value for key, value in found["results"][task].items() if isinstance(value, float)},
                "answers": [sample["filtered_resps"] for sample in found["samples"][task]],
            }
            for task in TASKS
        }
    (tests / "goldens" / "lm_eval.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
