"""A small decoder learns to think before it answers: R1-Zero's effect on word problems, in minutes on two CPU cores.

The recipe is DeepSeek-R1-Zero's (arXiv:2501.12948, section 2.2): GRPO (DeepSeekMath, arXiv:2402.03300, Eq. 21) with a rule
for accuracy and a rule for the format, from a policy that rarely thinks. Two short supervised phases make that policy.

    jaxreason train --config quickstart --workdir runs/quickstart
"""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg: str | None = None) -> ConfigDict:
    config = schema.default()

    # Model: random weights, 402,560 parameters
    config.model.architecture.vocab_size = 64
    config.model.architecture.hidden_size = 128
    config.model.architecture.layers = 2
    config.model.architecture.heads = 4
    config.model.architecture.kv_heads = 2
    config.model.architecture.head_size = 32
    config.model.architecture.mlp_size = 384
    config.model.architecture.initializer_range = 0.06  # near 1/sqrt(hidden_size): with 0.02 learning starts twice as late

    # Problems
    config.task.name = "word_problems"
    config.task.kwargs = ConfigDict({"min_changes": 2, "max_changes": 3, "heldout_size": 256})
    config.sampling.max_prompt_tokens = 24
    config.sampling.max_completion_tokens = 32
    config.sampling.temperature = 1.0

    # Supervised: worked demonstrations, then flawed ones, most of which answer without thinking
    config.supervised.phases.base = schema.phase("worked", steps=900)
    config.supervised.phases.cold_start = schema.phase("flawed", steps=100)
    config.supervised.demonstrations_per_step = 32
    config.supervised.optimizer.learning_rate = 3e-3
    config.supervised.optimizer.warmup_steps = 20
    config.supervised.optimizer.schedule = "cosine"
    config.supervised.optimizer.b2 = 0.98
    config.supervised.optimizer.weight_decay = 0.01

    # Reinforcement
    config.algorithm.name = "grpo"
    config.algorithm.kwargs = ConfigDict({"beta": 0.04})
    config.reward.accuracy = schema.part("traced.integer_answer", weight=1.0)
    config.reward.format = schema.part("traced.think_answer_format", weight=0.1)
    config.online.steps = 50
    config.online.problems_per_step = 32
    config.online.problems_per_update = 32
    config.online.problems_per_microbatch = 8  # on a CPU, smaller pieces are faster: they stay in the cache
    config.online.completions_per_problem = 8
    config.online.optimizer.learning_rate = 1e-4
    config.online.optimizer.warmup_steps = 5

    # Evaluation and checkpoints
    config.evaluation.every_steps = 2
    config.evaluation.problems_per_batch = 256
    config.checkpoint.every_steps = 100
    return schema.finish(config, arg)
