"""Questions and answers to train and test on, each task a function: `tasks.gsm8k(tokenizer)` and its siblings.

`decimals` and `countdown` are made on the spot, `gsm8k` is read from the hub, `from_data` reads the reader's own
questions, `reasoning` the data sets that people distilled from DeepSeek-R1. A row holds `prompt`, a list of chat
messages, and `answer`, the right answer.
"""

from .countdown_puzzles import countdown
from .decimal_pairs import (
    BIGGER,
    PROBE_ANSWER,
    PROBE_ANSWERS,
    PROBES,
    as_version,
    by_place,
    decimal_number,
    decimal_pair,
    decimals,
    in_order,
    is_held_out,
    place_value,
    version_rule,
)
from .grade_school import gsm8k
from .mixing import mix
from .own_data import from_data, from_file
from .problems import word_problems
from .reasoning_sets import reasoning
from .task import SYSTEM_PROMPT, Task, messages, worked

__all__ = [
    "BIGGER", "PROBES", "PROBE_ANSWER", "PROBE_ANSWERS", "SYSTEM_PROMPT", "Task", "as_version", "by_place", "countdown",
    "decimal_number", "decimal_pair", "decimals", "from_data", "from_file", "gsm8k", "in_order", "is_held_out",
    "messages", "mix", "place_value", "reasoning", "version_rule", "word_problems", "worked",
]  # fmt: skip
