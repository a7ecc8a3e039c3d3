"""GRPO on GSM8K: Qwen2.5-0.5B-Instruct learns grade-school mathematics from whether its answer is right.

The algorithm is GRPO with outcome supervision (DeepSeekMath, arXiv:2402.03300, Eq. 3 and 21), its learning rate, KL weight
and completion length are the paper's (section 4.2); the paper samples 64 completions a question, and its group is cut to 8
here. The reward is a rule on the text: 1 where the number that the completion commits to equals the reference, else 0.

    jaxreason train --config gsm8k_grpo --workdir runs/gsm8k

Without a network, both the model and the data can be folders:

    jaxreason train --config gsm8k_grpo --workdir runs/gsm8k \
        --config.model.path=models/Qwen2.5-0.5B-Instruct --config.task.kwargs.data_dir=data/gsm8k

Hardware: one accelerator with 40 GB or more; time: not yet measured. Held-out accuracy to expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model: 494 million parameters; master weights and AdamW's moments in float32, products in bfloat16
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    config.model.numerics.param_dtype = "float32"
    config.model.numerics.matmul_dtype = "bfloat16"
    config.model.numerics.remat = "layer"

    # Problems: the train split; held out is the whole test split
    config.task.name = "gsm8k"
    config.task.kwargs = ConfigDict({"data_dir": "", "heldout_size": 1319, "prompt": "boxed"})
    config.sampling.max_prompt_tokens = 256
    config.sampling.max_completion_tokens = 1024
    config.sampling.temperature = 1.0

    # Reinforcement: 128 rollouts and one update a step; 467 steps see nearly every problem once
    config.algorithm.name = "grpo"
    config.algorithm.kwargs = ConfigDict({"beta": 0.04})
    config.reward.accuracy = schema.part("math.gsm8k_answer", weight=1.0)
    config.online.steps = 467
    config.online.problems_per_step = 16
    config.online.problems_per_update = 16
    config.online.problems_per_microbatch = 2
    config.online.completions_per_problem = 8
    config.online.optimizer.learning_rate = 1e-6
    config.online.optimizer.warmup_steps = 10

    # Evaluation and checkpoints
    config.evaluation.every_steps = 50
    config.evaluation.problems_per_batch = 128
    config.checkpoint.every_steps = 50
    return schema.finish(config, arg)
