"""Rules that turn a completion into a reward.

Host rules are functions `(problem, completion) -> Reward` on text, without jax: they run in worker processes and in
other people's code. `jaxreason.rewards.traced` is the one part with jax, rules on token ids that compile into the
step; it is not imported here.
"""
