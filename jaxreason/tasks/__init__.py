"""Problems and how they are put to the policy. A task is made by calling its name here with its keyword arguments."""

from jaxreason.tasks.arithmetic import arithmetic_chains, base_arithmetic, modular_arithmetic
from jaxreason.tasks.choice import aqua_rat, arc_challenge, arc_easy, commonsense_qa, logiqa, openbookqa
from jaxreason.tasks.code import humaneval, mbpp
from jaxreason.tasks.countdown import countdown, game24
from jaxreason.tasks.equations import linear_equations
from jaxreason.tasks.gym import reasoning_gym
from jaxreason.tasks.logic import graph_reachability, truth_tellers
from jaxreason.tasks.mathematics import aime, amc, gsm8k, limo, math, math500, olympiadbench, svamp
from jaxreason.tasks.mixture import mixture
from jaxreason.tasks.preferences import hh_rlhf
from jaxreason.tasks.process_labels import judged_chains, math_aps, math_shepherd, prm800k
from jaxreason.tasks.short_answers import hotpot_qa, prontoqa, prosqa, strategy_qa
from jaxreason.tasks.strings import string_manipulation
from jaxreason.tasks.table import table
from jaxreason.tasks.task import Message, Skipped, Task
from jaxreason.tasks.word_problems import word_problems

__all__ = [
    "Message",
    "Skipped",
    "Task",
    "aime",
    "amc",
    "aqua_rat",
    "arc_challenge",
    "arc_easy",
    "arithmetic_chains",
    "base_arithmetic",
    "commonsense_qa",
    "countdown",
    "game24",
    "graph_reachability",
    "gsm8k",
    "hh_rlhf",
    "hotpot_qa",
    "humaneval",
    "judged_chains",
    "limo",
    "linear_equations",
    "logiqa",
    "math",
    "math500",
    "math_aps",
    "math_shepherd",
    "mbpp",
    "mixture",
    "modular_arithmetic",
    "olympiadbench",
    "openbookqa",
    "prm800k",
    "prontoqa",
    "prosqa",
    "reasoning_gym",
    "strategy_qa",
    "string_manipulation",
    "svamp",
    "table",
    "truth_tellers",
    "word_problems",
]
