"""R1-Zero's recipe on a 7B base model: GRPO from rewards that are rules alone, no demonstrations. Sized for a TPU slice.

DeepSeek-R1 (arXiv:2501.12948 v2, section 2.2 and its supplement; Nature 2025): rollouts of 512 questions x 16 outputs, used for 16
updates of 32 questions, one epoch; learning rate 3e-6, KL weight 0.001 in the loss, temperature 1; accuracy and format count the
same, by rule. Its clip range of 10 is stated for R1's first RL stage, and taken here. What differs: the model is Qwen2.5-7B (the
paper gained little from pure RL at 7B), the problems are MATH's training split, the reference stays, where theirs moves every 400
updates, and completions end at 2,048 tokens (theirs at 32,768), which chips of 16 GB hold.

    jaxreason rehearse --config r1_zero_7b --topology v5e:8x8
    jaxreason train --config r1_zero_7b --workdir runs/r1_zero_7b --distributed

On 16 chips of v6e, `v6e:4x4`, a shard holds four times the problems, so they are taken in more parts:

    jaxreason rehearse --config r1_zero_7b --topology v6e:4x4 --config.online.problems_per_microbatch=4

Hardware: 64 chips of TPU v5e or 16 of v6e, rehearsed (docs/pods.md); time: not yet measured. MATH-500 to expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model: bfloat16 with float32 master weights; heads divide by 4, and keys and values have 4 heads
    config.model.path = "Qwen/Qwen2.5-7B"
    config.model.numerics.param_dtype = "bfloat16"
    config.model.numerics.matmul_dtype = "bfloat16"
    config.model.numerics.activation_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 4

    # Problems: MATH under R1-Zero's template
    config.task.name = "math"
    config.task.kwargs = ConfigDict({"data_dir": "", "heldout_size": 500, "prompt": "r1_zero"})
    config.sampling.max_prompt_tokens = 512
    config.sampling.max_completion_tokens = 2048
    config.sampling.temperature = 1.0
    config.sampling.slots = 1024

    # Reinforcement: a step is one rollout and 16 updates; the paper makes 650 of them
    config.algorithm.name = "grpo"
    config.algorithm.kwargs = ConfigDict({"beta": 0.001, "clip_low": 1.0, "clip_high": 10.0})
    config.reward.accuracy = schema.part("math.math_answer", weight=1.0)
    config.reward.format = schema.part("format.think_answer_format", weight=1.0)
    config.online.steps = 100
    config.online.problems_per_step = 512
    config.online.problems_per_update = 32
    config.online.problems_per_microbatch = 16
    config.online.completions_per_problem = 16
    config.online.optimizer.learning_rate = 3e-6

    config.evaluation.every_steps = 10
    config.evaluation.problems_per_batch = 128
    config.checkpoint.every_steps = 10
    return schema.finish(config, arg)
