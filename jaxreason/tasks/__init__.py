"""Problems and how they are put to the policy. A task is made by calling its name here with its keyword arguments."""

from jaxreason.tasks.gsm8k import gsm8k
from jaxreason.tasks.task import Message, Task
from jaxreason.tasks.word_problems import word_problems

__all__ = ["Message", "Task", "gsm8k", "word_problems"]
