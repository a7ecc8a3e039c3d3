"""R1-Zero's recipe on Qwen3-30B-A3B, a mixture of 128 experts, with GSPO's ratio of whole sequences. Sized for 64 chips of TPU v5p.

Rollouts, rewards and batch are R1-Zero's (DeepSeek-R1, arXiv:2501.12948 v2): 512 questions x 16 outputs, accuracy and format by
rule, temperature 1. GSPO (arXiv:2507.18071) was made for this model, on which GRPO's token ratios needed the old routing replayed:
clip 3e-4 below and 4e-4 above, 4 minibatches a rollout, no KL term. It states no learning rate: 1e-6 is DAPO's and Dr.GRPO's.
What differs: theirs starts after a cold start, this from the base; completions end at 2,048 tokens.

    jaxreason rehearse --config r1_zero_30b_a3b --topology v5:4x4x4
    jaxreason train --config r1_zero_30b_a3b --workdir runs/r1_zero_30b --distributed

Hardware: 64 chips of TPU v5p (v5p-128, which counts cores), rehearsed (docs/pods.md); time: not yet measured.
MATH-500 to expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model: bfloat16 with float32 master weights; a mesh axis for each side of the 4 x 4 x 4 torus
    config.model.path = "Qwen/Qwen3-30B-A3B-Base"
    config.model.numerics.param_dtype = "bfloat16"
    config.model.numerics.matmul_dtype = "bfloat16"
    config.model.numerics.activation_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 4
    config.mesh.tensor = 4

    # Problems: MATH under R1-Zero's template
    config.task.name = "math"
    config.task.kwargs = ConfigDict({"data_dir": "", "heldout_size": 500, "prompt": "r1_zero"})
    config.sampling.max_prompt_tokens = 512
    config.sampling.max_completion_tokens = 2048
    config.sampling.temperature = 1.0
    config.sampling.slots = 2048

    # Reinforcement: 4 updates of 128 problems on each rollout
    config.algorithm.name = "gspo"
    config.algorithm.kwargs = ConfigDict({"clip_low": 3e-4, "clip_high": 4e-4})
    config.reward.accuracy = schema.part("math.math_answer", weight=1.0)
    config.reward.format = schema.part("format.think_answer_format", weight=1.0)
    config.online.steps = 100
    config.online.problems_per_step = 512
    config.online.problems_per_update = 128
    config.online.problems_per_microbatch = 16
    config.online.completions_per_problem = 16
    config.online.optimizer.learning_rate = 1e-6

    config.evaluation.every_steps = 10
    config.evaluation.problems_per_batch = 128
    config.checkpoint.every_steps = 10
    return schema.finish(config, arg)
