"""R1-Zero on DeepSeek-V3-Base, 671 billion parameters: the run of the paper, on 2,048 chips of TPU v5p.

DeepSeek-R1 (arXiv:2501.12948 v2, section 2.2 and its supplement; Nature 2025): learning rate 3e-6, KL weight
0.001 in the loss, temperature 1, accuracy and format by rule, which count the same; a clip range of 10 is stated for R1's first RL
stage, and taken here. What differs: a step is 128 questions and one update of all (theirs is 512 and 16 updates of 32), since 128
shards take a question each; 8 outputs of at most 512 tokens (theirs 16, and 32,768): a third of a chip's memory, which grows with
the rows of a whole expert group; the problems are MATH's; the reference stays; multi-token prediction is left out.

    jaxreason rehearse --config r1_zero_671b --topology v5:8x16x16
    jaxreason train --config r1_zero_671b --workdir runs/r1_zero_671b --distributed

Hardware: 2,048 chips of TPU v5p (v5p-4096, which counts cores), rehearsed (docs/pods.md); time: not yet measured.
MATH-500 to expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model: bfloat16 with float32 master weights; a mesh axis for each side of the 8 x 16 x 16 torus
    config.model.path = "deepseek-ai/DeepSeek-V3-Base"
    config.model.numerics.param_dtype = "bfloat16"
    config.model.numerics.matmul_dtype = "bfloat16"
    config.model.numerics.activation_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    config.mesh.tensor = 16

    # Problems: MATH under R1-Zero's template
    config.task.name = "math"
    config.task.kwargs = ConfigDict({"data_dir": "", "heldout_size": 512, "prompt": "r1_zero"})
    config.sampling.max_prompt_tokens = 512
    config.sampling.max_completion_tokens = 512
    config.sampling.temperature = 1.0

    # Reinforcement: one update on each rollout
    config.algorithm.name = "grpo"
    config.algorithm.kwargs = ConfigDict({"beta": 0.001, "clip_low": 1.0, "clip_high": 10.0})
    config.reward.accuracy = schema.part("math.math_answer", weight=1.0)
    config.reward.format = schema.part("format.think_answer_format", weight=1.0)
    config.online.steps = 100
    config.online.problems_per_step = 128
    config.online.problems_per_update = 128
    config.online.problems_per_microbatch = 128
    config.online.completions_per_problem = 8
    config.online.optimizer.learning_rate = 3e-6

    config.evaluation.every_steps = 10
    config.evaluation.problems_per_batch = 512
    config.checkpoint.every_steps = 10
    return schema.finish(config, arg)
