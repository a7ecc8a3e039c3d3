"""Problems and how they are put to the policy. A task is made by calling its name here with its keyword arguments."""

from jaxreason.tasks.choice import aqua_rat, arc_challenge, arc_easy, commonsense_qa, logiqa, openbookqa
from jaxreason.tasks.code import humaneval, mbpp
from jaxreason.tasks.mathematics import aime, amc, gsm8k, limo, math, math500, olympiadbench, svamp
from jaxreason.tasks.preferences import hh_rlhf
from jaxreason.tasks.process_labels import judged_chains, math_aps, math_shepherd, prm800k
from jaxreason.tasks.short_answers import hotpot_qa, prontoqa, prosqa, strategy_qa
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
    "commonsense_qa",
    "gsm8k",
    "hh_rlhf",
    "hotpot_qa",
    "humaneval",
    "judged_chains",
    "limo",
    "logiqa",
    "math",
    "math500",
    "math_aps",
    "math_shepherd",
    "mbpp",
    "olympiadbench",
    "openbookqa",
    "prm800k",
    "prontoqa",
    "prosqa",
    "strategy_qa",
    "svamp",
    "table",
    "word_problems",
]
