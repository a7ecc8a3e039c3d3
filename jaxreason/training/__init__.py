"""The two training loops and what they stand on: state, step, evaluation, checkpoints, metrics."""
