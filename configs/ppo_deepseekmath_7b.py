"""PPO with a critic on DeepSeekMath-7B-Instruct: a value for every token, learnt beside the policy. Sized for 32 chips of TPU v5p.

DeepSeekMath (arXiv:2402.03300): questions of GSM8K and MATH (here GSM8K's), completions of up to 1,024 tokens, batches of 1,024, a
learning rate of 1e-6. It derives PPO (Eq. 15-18) and publishes no run of it, so the rest is others': lambda = 1 (DeepSeek-R1,
arXiv:2501.12948 v2, A.3: with 0.95 PPO is considerably worse than GRPO, with 1 about equal), the critic's learning rate 2e-6 and
50 steps in which it learns alone (VAPO, arXiv:2504.05118), clip 0.2 (PPO, arXiv:1707.06347). The batch is 256 questions x 4
completions, and used for 4 updates; there is no KL term.

    jaxreason rehearse --config ppo_deepseekmath_7b --topology v5:2x4x4
    jaxreason train --config ppo_deepseekmath_7b --workdir runs/ppo_7b --distributed

Hardware: 32 chips of TPU v5p (v5p-64, which counts cores), rehearsed (docs/pods.md); time: not yet measured.
GSM8K accuracy to expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model and critic: bfloat16 with float32 master weights; `tensor` is one side of the 2 x 4 x 4 torus, `fsdp` the others
    config.model.path = "deepseek-ai/deepseek-math-7b-instruct"
    config.model.numerics.param_dtype = "bfloat16"
    config.model.numerics.matmul_dtype = "bfloat16"
    config.model.numerics.activation_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 4

    # Problems: GSM8K, the answer in a box
    config.task.name = "gsm8k"
    config.task.kwargs = ConfigDict({"data_dir": "", "heldout_size": 1312, "prompt": "boxed"})
    config.sampling.max_prompt_tokens = 512
    config.sampling.max_completion_tokens = 1024
    config.sampling.temperature = 1.0

    # Reinforcement: 1,024 completions and 4 updates a step
    config.algorithm.name = "ppo"
    config.algorithm.kwargs = ConfigDict({"lambda_": 1.0})
    config.reward.accuracy = schema.part("math.gsm8k_answer", weight=1.0)
    config.online.steps = 500
    config.online.problems_per_step = 256
    config.online.problems_per_update = 64
    config.online.problems_per_microbatch = 16
    config.online.completions_per_problem = 4
    config.online.optimizer.learning_rate = 1e-6
    config.critic.learning_rate = 2e-6
    config.critic.alone_steps = 50

    config.evaluation.every_steps = 50
    config.evaluation.problems_per_batch = 128
    config.checkpoint.every_steps = 50
    return schema.finish(config, arg)
