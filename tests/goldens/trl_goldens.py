"""Golden numbers for the objectives, from an independent implementation: TRL on PyTorch, on the CPU.

    pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 && python tests/goldens/trl_goldens.py

writes `trl.json` beside this file: inputs, settings, and the losses, advantages and gradients that TRL makes of them.
`tests/objectives/test_goldens.py` reads it and needs neither package.

All mathematics is TRL's own code. Trainers are made without their `__init__`, which would want a model and a data set;
they get the settings from TRL's own config classes, and stand-ins for what surrounds the loss: a "model" that
returns given token log-probabilities (0 where the label is ignored, as TRL's fused head does), and a generation step
that returns given token counts. Advantages, sampler corrections and masks come from `_generate_and_score_completions`,
rewards pass through `_calculate_rewards`, and the loss is `_compute_loss`. Gradients are PyTorch's, with respect to
the token log-probabilities (scores for the reward model, logits for distillation).

Everything is float64, with one exception: TRL makes rewards float32, so ours are multiples of 1/64, exact in both.
Absent: PPO, its GAE and its value loss, which this version of TRL no longer has.
"""

from __future__ import annotations

import json
import platform
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate import Accelerator
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss

EOS, PAD, TOKEN = 1, 0, 2
BUDGET = 12  # max_completion_length, larger than any batch is wide

# fmt: off
POLICY: list[tuple[type, str, str, dict[str, Any]]] = [
    # GRPO: beta, clips, and the KL with and without its differentiable importance weight
    (GRPOTrainer, "grpo on ragged", "ragged", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2}),
    (GRPOTrainer, "grpo on wild", "wild", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2}),
    (GRPOTrainer, "grpo on-policy", "ragged", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "num_iterations": 1}),
    (GRPOTrainer, "grpo k3", "ragged", {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "use_bias_correction_kl": False}),
    (GRPOTrainer, "grpo k3 strong", "wild",
     {"loss_type": "grpo", "beta": 0.5, "epsilon": 0.1, "epsilon_high": 0.4, "use_bias_correction_kl": False}),
    (GRPOTrainer, "grpo weighted k3", "ragged",
     {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "use_bias_correction_kl": True}),
    (GRPOTrainer, "grpo weighted k3 strong", "wild",
     {"loss_type": "grpo", "beta": 0.5, "epsilon": 0.1, "epsilon_high": 0.4, "use_bias_correction_kl": True}),
    (GRPOTrainer, "grpo weighted k3 on-policy", "ragged",
     {"loss_type": "grpo", "beta": 0.3, "epsilon": 0.2, "use_bias_correction_kl": True, "num_iterations": 1}),
    (GRPOTrainer, "grpo dual clip", "wild", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "delta": 3.0}),
    (GRPOTrainer, "grpo dual clip low", "wild",
     {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5, "use_bias_correction_kl": False}),
    # whom the rewards are scaled by, and who counts
    (GRPOTrainer, "grpo unscaled", "ragged", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "scale_rewards": "none"}),
    (GRPOTrainer, "grpo batch scaled", "ragged", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "scale_rewards": "batch"}),
    (GRPOTrainer, "bnpo batch scaled", "wild", {"loss_type": "bnpo", "beta": 0.0, "epsilon": 0.2, "scale_rewards": "batch"}),
    (GRPOTrainer, "grpo normalise then sum", "ragged",
     {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "multi_objective_aggregation": "normalize_then_sum",
      "reward_weights": [1.0, 0.25]}),
    (GRPOTrainer, "grpo sum then normalise", "ragged",
     {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "reward_weights": [1.0, 0.25]}),
    (GRPOTrainer, "grpo truncated masked", "wild",
     {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "mask_truncated_completions": True}),
    (GRPOTrainer, "dapo truncated masked", "wild",
     {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True}),
    # other weights
    (GRPOTrainer, "dr_grpo", "ragged", {"loss_type": "dr_grpo", "beta": 0.0, "epsilon": 0.2, "scale_rewards": "none"}),
    (GRPOTrainer, "dr_grpo k3", "wild",
     {"loss_type": "dr_grpo", "beta": 0.1, "epsilon": 0.2, "epsilon_high": 0.3, "scale_rewards": "none",
      "use_bias_correction_kl": False}),
    (GRPOTrainer, "dapo", "ragged", {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}),
    (GRPOTrainer, "dapo wide", "wild", {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.3, "epsilon_high": 0.6}),
    (GRPOTrainer, "bnpo k3", "wild",
     {"loss_type": "bnpo", "beta": 0.04, "epsilon": 0.2, "epsilon_high": 0.28, "use_bias_correction_kl": False}),
    # one ratio per sequence
    (GRPOTrainer, "gspo", "ragged",
     {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 3e-4, "epsilon_high": 4e-4}),
    (GRPOTrainer, "gspo wide", "wild",
     {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.2}),
    (GRPOTrainer, "gspo k3", "ragged",
     {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.04, "epsilon": 0.05, "epsilon_high": 0.1,
      "use_bias_correction_kl": False}),
    (GRPOTrainer, "luspo", "ragged",
     {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 0.05, "epsilon_high": 0.1}),
    (GMPOTrainer, "gmpo", "ragged", {"beta": 0.0, "epsilon": 0.4}),
    (GMPOTrainer, "gmpo narrow", "wild", {"beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.3}),
    (GMPOTrainer, "gmpo k3", "ragged", {"beta": 0.04, "epsilon": 0.2}),
    # soft clips
    (GRPOTrainer, "cispo", "ragged", {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.28}),
    (GRPOTrainer, "cispo wide", "wild", {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 5.0}),
    (GRPOTrainer, "cispo k3", "ragged",
     {"loss_type": "cispo", "beta": 0.04, "epsilon_high": 2.0, "use_bias_correction_kl": False}),
    (GRPOTrainer, "sapo", "ragged",
     {"loss_type": "sapo", "beta": 0.0, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
    (GRPOTrainer, "sapo sharp", "wild",
     {"loss_type": "sapo", "beta": 0.0, "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 3.0}),
    (GRPOTrainer, "sapo k3", "ragged",
     {"loss_type": "sapo", "beta": 0.04, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
      "use_bias_correction_kl": False}),
    # corrections for a sampler whose log-probabilities are not the trainer's
    *[(GRPOTrainer, f"{loss} sampler {mode}", batch,
       {"loss_type": loss, "beta": beta, "epsilon": 0.2, "use_bias_correction_kl": False, "use_vllm": True,
        "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high})
      for loss, beta, batch, mode, low, high in [
          ("grpo", 0.0, "ragged", "token_truncate", None, 1.2),
          ("dapo", 0.0, "wild", "token_truncate", None, 2.0),
          ("grpo", 0.04, "ragged", "token_mask", 0.8, 1.25),
          ("dapo", 0.0, "wild", "token_mask", 0.5, 2.0),
          ("grpo", 0.0, "ragged", "sequence_truncate", None, 1.1),
          ("grpo", 0.0, "ragged", "sequence_mask", 0.7, 1.4),
          ("dapo", 0.0, "wild", "sequence_mask", None, 1.5),
      ]],
    # leave one out
    (RLOOTrainer, "rloo", "ragged on-policy", {"beta": 0.0, "epsilon": 0.2}),
    (RLOOTrainer, "rloo kl in reward", "ragged on-policy", {"beta": 0.05, "epsilon": 0.2}),
    (RLOOTrainer, "rloo kl in reward strong", "wild on-policy", {"beta": 0.5, "epsilon": 0.2}),
    (RLOOTrainer, "rloo whitened", "ragged on-policy", {"beta": 0.05, "epsilon": 0.2, "normalize_advantages": True}),
]

PREFERENCE: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"loss_type": "sigmoid", "beta": 0.1}),
    ("dpo strong", {"loss_type": "sigmoid", "beta": 1.5}),
    ("dpo mean", {"loss_type": "sigmoid_norm", "beta": 2.0}),
    ("dpo mean weak", {"loss_type": "sigmoid_norm", "beta": 0.3}),
    ("ipo", {"loss_type": "ipo", "beta": 0.1}),
    ("ipo strong", {"loss_type": "ipo", "beta": 1.0}),
    ("hinge", {"loss_type": "hinge", "beta": 0.1}),
    ("hinge strong", {"loss_type": "hinge", "beta": 1.2}),
    ("robust", {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1}),
    ("robust strong", {"loss_type": "robust", "beta": 0.8, "label_smoothing": 0.3}),
    ("sft", {"loss_type": "sft", "beta": 0.1}),
]
# fmt: on

# args.name -> trainer.name, where a trainer's __init__ copies one to the other unchanged
COPIED = """
beta importance_sampling_level loss_type mask_truncated_completions max_completion_length multi_objective_aggregation
normalize_advantages num_generations num_iterations off_policy_mask_threshold pad_to_multiple_of reward_clip_range
scale_rewards top_entropy_quantile use_adaptive_entropy use_vllm vllm_importance_sampling_clip_max entropy_coef
vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
f_divergence_type label_smoothing ld_alpha use_weighting
""".split()


class Given(torch.nn.Module):
    """A stand-in for a language model with TRL's fused head: its log-probabilities are those it was given, [B, T]."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor):
        super().__init__()
        self.log_probs = log_probs

    def forward(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        assert len(input_ids) == len(self.log_probs), "the batch must not be cut into chunks"
        scored = labels[:, -self.log_probs.shape[1] :] != -100
        zeros = torch.zeros_like(self.log_probs)
        log_probs = torch.where(scored, self.log_probs, zeros)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer_without_init(cls: type, args: Any) -> Any:
    trainer = object.__new__(cls)
    trainer.args = args
    trainer.accelerator = Accelerator(cpu=True)
    trainer.state = SimpleNamespace(global_step=0)
    trainer.is_in_train = True
    trainer.aux_loss_enabled = False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name in COPIED:
        if hasattr(args, name):
            setattr(trainer, name, getattr(args, name))
    return trainer


def config(cls: type, settings: dict[str, Any], **others: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cls(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to="none", **others, **settings)


def flat(array: list) -> torch.Tensor:
    """[P, G, ...] as TRL has it, [P * G, ...]."""
    values = torch.tensor(array)
    return values.reshape(-1, *values.shape[2:])


# ------------------------------------------------- inputs


def rounded(array: np.ndarray) -> list:
    return np.round(array, 6).tolist()


def batches() -> dict[str, dict[str, Any]]:
    """Right-padded rows; log-probabilities off-policy enough to fill every clip cell; rewards with an equal group."""
    out = {}
    for name, seed, (p, g, t), old, sampler in [("ragged", 3, (3, 4, 8), 0.45, 0.2), ("wild", 7, (3, 4, 8), 1.0, 0.6)]:
        rng = np.random.default_rng(seed)
        logp = -rng.gamma(1.5, 0.6, (p, g, t))
        logp_old = logp + rng.normal(0, old, logp.shape)
        length = rng.integers(1, t + 1, (p, g))
        length[0, 0], length[1, 1] = t, 1
        chosen = np.arange(t) < length[..., None]
        reward = rng.integers(-96, 97, (2, p, g)) / 64
        if name == "ragged":
            reward[0, 2] = 0.75  # a group that agrees
        else:
            reward[0] = rng.permuted(np.tile([1.0, 1.0, 0.0, 0.0], (p, 1)), axis=1)
            chosen &= rng.random(chosen.shape) < 0.8  # tokens of a tool inside the completion
            chosen[..., 0] = True
        truncated = rng.random((p, g)) < 0.3
        truncated[0, 0] = True
        out[name] = {
            "logp": rounded(logp),
            "logp_old": rounded(logp_old),
            "logp_ref": rounded(logp + rng.normal(0, 0.4, logp.shape)),
            "logp_behaviour": rounded(logp_old + rng.normal(0, sampler, logp.shape)),
            "length": length.tolist(),
            "mask": chosen.tolist(),
            "truncated": truncated.tolist(),
            "rewards": reward.tolist(),  # [reward functions, P, G]
        }
        # RLOO's masks are the lengths: it has no tool tokens
        out[f"{name} on-policy"] = out[name] | {
            "logp_old": out[name]["logp"],
            "mask": (np.arange(t) < length[..., None]).tolist(),
        }
    return out


def pairs() -> dict[str, Any]:
    """[P, 2, T], chosen first."""
    rng = np.random.default_rng(11)
    p, t = 5, 7
    logp = -rng.gamma(1.5, 0.6, (p, 2, t))
    length = rng.integers(1, t + 1, (p, 2))
    length[0] = [t, 1]
    return {
        "logp": rounded(logp),
        "logp_ref": rounded(logp + rng.normal(0, 0.8, logp.shape)),
        "mask": (np.arange(t) < length[..., None]).tolist(),
    }


# ------------------------------------------------- policies


def policy_case(cls: type, name: str, batch_name: str, batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    groups, completions = np.shape(batch["length"])
    rows = groups * completions
    config_class = {GRPOTrainer: GRPOConfig, GMPOTrainer: GMPOConfig, RLOOTrainer: RLOOConfig}[cls]
    settings = {"max_completion_length": BUDGET, "num_iterations": 2} | settings  # two iterations: old log-probs matter
    args = config(config_class, settings, per_device_train_batch_size=rows, num_generations=completions)
    functions = len(args.reward_weights or [1.0])

    trainer = trainer_without_init(cls, args)
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.current_gradient_accumulation_steps = 1
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0 if hasattr(trainer, "entropy_coef") else False
    trainer.environment_factories = trainer.environments = None
    trainer.tools, trainer.chat_template_kwargs, trainer.log_multimodal = [], {}, False
    trainer._tokenizer, trainer.eos_token_ids = SimpleNamespace(pad_token_id=PAD), [EOS]
    trainer.reward_func_names = [f"reward {i}" for i in range(functions)]
    trainer.reward_processing_classes = [None] * functions
    trainer.reward_weights = torch.tensor(args.reward_weights or [1.0], dtype=torch.float32)
    trainer.reward_funcs = [lambda i=i, **_: flat(batch["rewards"][i]).tolist() for i in range(functions)]

    length, mask = flat(batch["length"]).tolist(), flat(batch["mask"])
    truncated, behaviour = flat(batch["truncated"]).tolist(), flat(batch["logp_behaviour"])
    ids = [[TOKEN] * (n - 1) + [TOKEN if cut else EOS] for n, cut in zip(length, truncated, strict=True)]
    prompts, texts = [[TOKEN]] * rows, [""] * rows
    if cls is RLOOTrainer:
        trainer._generate = lambda _: (prompts, ids, texts)
    else:
        tool_mask = [row[:n].int().tolist() for row, n in zip(mask, length, strict=True)]
        sampled = [row[:n].tolist() for row, n in zip(behaviour, length, strict=True)] if args.use_vllm else None
        trainer._generate = lambda _: (prompts, ids, tool_mask, texts, sampled, {}, None, [])

    trainer.model, trainer.ref_model = Given(flat(batch["logp_old"])), Given(flat(batch["logp_ref"]))
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * rows)
    logp = flat(batch["logp"]).requires_grad_()
    loss = trainer._compute_loss(Given(logp), inputs)
    loss.backward()
    assert loss.dtype == inputs["advantages"].dtype == torch.float64, "TRL left float64"
    case = {
        "name": name,
        "trainer": cls.__name__,
        "batch": batch_name,
        "settings": settings,
        "loss": loss.item(),
        "advantage": inputs["advantages"].reshape(groups, completions).tolist(),
        "gradient": logp.grad.reshape(groups, completions, -1).tolist(),
    }
    if "importance_sampling_ratio" in inputs:  # [P, G, T], or [P, G, 1] where it is one number per sequence
        case["sampler_weight"] = inputs["importance_sampling_ratio"].reshape(groups, completions, -1).tolist()
    for ours, theirs in {"clip_fraction": "clip_ratio/region_mean", "kl": "kl"}.items():
        if theirs in trainer._metrics["train"]:
            case[ours] = trainer._metrics["train"][theirs][-1]  # TRL computes the first in float32
    return case


# ------------------------------------------------- pairs and heads


def preference_case(name: str, batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    trainer = trainer_without_init(DPOTrainer, config(DPOConfig, settings))
    trainer.loss_types, trainer.loss_weights = trainer.args.loss_type, [1.0]
    trainer.precompute_ref_logps = False

    def stacked(array: list) -> torch.Tensor:
        """[P, 2, T] as TRL has it: all chosen rows, then all rejected ones."""
        return torch.cat(torch.tensor(array).unbind(1))

    mask = torch.nn.functional.pad(stacked(batch["mask"]).int(), (1, 0))  # one token of prompt before each
    logp = stacked(batch["logp"]).requires_grad_()
    policy = Given(logp)
    trainer.model, trainer.ref_model = policy, Given(stacked(batch["logp_ref"]))
    inputs = {"input_ids": torch.full_like(mask, TOKEN), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer._compute_loss(policy, inputs, return_outputs=False)
    loss.backward()
    assert loss.dtype == torch.float64, "TRL left float64"
    gradient = torch.stack(logp.grad.chunk(2), 1)
    return {"name": name, "settings": settings, "loss": loss.item(), "gradient": gradient.tolist()}


def reward_model_case(name: str, score: list, margin: list | None) -> dict[str, Any]:
    trainer = trainer_without_init(RewardTrainer, config(RewardConfig, {"center_rewards_coefficient": None}))
    leaf = torch.tensor(score).requires_grad_()  # [P, 2], chosen first
    logits = torch.cat(leaf.unbind(1))[:, None]

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    trainer.model = SimpleNamespace(training=True)
    inputs = {"attention_mask": torch.ones(len(logits), 1, dtype=torch.int64)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return {"name": name, "score": score, "margin": margin, "loss": loss.item(), "gradient": leaf.grad.tolist()}


def distillation_case(name: str, student: list, teacher: list, mask: list, beta: float) -> dict[str, Any]:
    """Over the whole vocabulary; a mean over chosen tokens."""
    leaf = torch.tensor(student).requires_grad_()
    labels = torch.where(torch.tensor(mask), 0, -100)
    loss = GKDTrainer.generalized_jsd_loss(leaf, torch.tensor(teacher), labels=labels, beta=beta)
    loss.backward()
    return {"name": name, "settings": {"beta": beta}, "loss": loss.item(), "gradient": leaf.grad.tolist()}


def sampled_distillation_case(student: list, teacher: list, mask: list, token: list) -> dict[str, Any]:
    """On the sampled token only; TRL's mean over chosen tokens happens outside that function, and here."""
    leaf, chosen = torch.tensor(student).requires_grad_(), torch.tensor(mask)
    per_token = compute_sampled_token_self_distillation_loss(
        leaf, torch.tensor(teacher), torch.tensor(token), distillation_alpha=1.0
    )
    loss = (per_token * chosen).sum() / chosen.sum()
    loss.backward()
    return {"name": "sampled reverse kl", "token": token, "loss": loss.item(), "gradient": leaf.grad.tolist()}


def heads() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    score, margin = rounded(rng.normal(0, 2, (6, 2))), rounded(np.abs(rng.normal(0, 1, 6)))
    shape = (2, 3, 4)  # [P, G, T], and 5 words
    student, teacher = rounded(rng.normal(0, 1.5, (*shape, 5))), rounded(rng.normal(0, 1.5, (*shape, 5)))
    mask = (np.arange(4) < rng.integers(1, 5, (2, 3, 1))).tolist()
    inputs = (student, teacher, mask)
    return {
        "reward_model": [reward_model_case("plain", score, None), reward_model_case("margin", score, margin)],
        "distillation": {
            "student_logits": student,
            "teacher_logits": teacher,
            "mask": mask,
            "cases": [
                distillation_case("forward kl", *inputs, beta=0.0),
                distillation_case("reverse kl", *inputs, beta=1.0),
                sampled_distillation_case(*inputs, token=rng.integers(0, 5, shape).tolist()),
            ],
        },
    }


def one_case_per_line(value: Any, depth: int = 0) -> str:
    """JSON whose diffs can be read: line breaks down to the cases, none inside an array of numbers."""
    if depth < 3 and isinstance(value, dict) and value:
        inner = [f"{json.dumps(key)}: {one_case_per_line(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner) + "\n}"
    if depth < 3 and isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n]"
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    torch.set_default_dtype(torch.float64)
    policy_batches, pair = batches(), pairs()
    goldens = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "policy": {
            "batches": policy_batches,
            "cases": [policy_case(cls, name, on, policy_batches[on], settings) for cls, name, on, settings in POLICY],
        },
        "preference": {"batch": pair, "cases": [preference_case(name, pair, settings) for name, settings in PREFERENCE]},
        **heads(),
    }
    Path(__file__).with_name("trl.json").write_text(one_case_per_line(goldens) + "\n")


if __name__ == "__main__":
    main()
