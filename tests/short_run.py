"""A run of seconds, for tests: rewards vary among a random policy's completions, so that reinforcement moves the weights."""

from ml_collections import ConfigDict

from jaxreason import config as schema


def get_config(arg=None):
    config = schema.default()
    a = config.model.architecture
    a.vocab_size, a.hidden_size, a.layers, a.heads, a.kv_heads, a.head_size, a.mlp_size = 64, 16, 2, 2, 1, 8, 32
    config.task.name = "word_problems"
    config.task.kwargs = ConfigDict({"min_changes": 2, "max_changes": 2, "heldout_size": 4})
    config.sampling.max_prompt_tokens, config.sampling.max_completion_tokens = 24, 32
    config.supervised.phases.base = schema.phase("worked", steps=4)
    config.supervised.phases.cold_start = schema.phase("flawed", steps=2)
    config.supervised.demonstrations_per_step = config.supervised.demonstrations_per_microbatch = 4
    config.supervised.log_every_steps = 2
    config.supervised.optimizer.learning_rate = 3e-3
    config.algorithm.name = "grpo"
    config.algorithm.kwargs = ConfigDict({"beta": 0.04})
    config.reward.accuracy = schema.part("traced.integer_answer", weight=1.0)
    config.reward.ended = schema.part("traced.think_answer_format", weight=1.0, kwargs={"pattern": r"[\s\S]*"})
    config.online.steps = 6
    config.online.problems_per_step = config.online.problems_per_update = config.online.problems_per_microbatch = 4
    config.online.completions_per_problem = 4
    config.online.logged_problems = 2
    config.online.optimizer.learning_rate = 1e-3
    config.evaluation.every_steps = 2
    config.evaluation.problems_per_batch = 4
    config.checkpoint.every_steps = 2
    return schema.finish(config, arg)
