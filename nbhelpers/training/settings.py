"""Settings that make no sense, each with the sentence that refuses it: one table, looked at before anything is loaded.

TRL and transformers take most of these without a word: a rate of 0 trains nothing and calls it a success, one that is
infinite saves NaN, a negative `epsilon` turns the clipping around. Others end as ZeroDivisionError or TypeError.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import trl
from transformers import TrainingArguments

from nbhelpers import hub_words
from nbhelpers.memory.kv import KV_BITS

from . import losses
from .stages import Stage

Values = dict[str, tuple[Any, ...]]  # of settings, by name, the usual one first
LARGEST = 1e6  # of a reward's weight: float32 must hold the square of what it multiplies


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Args:
        name (`str`): Of the field of GRPOConfig or LeanGRPOConfig.
        allowed (`Callable[[Any], bool]`): Whether a value makes sense; it may be of any type.
        wanted (`str`): What it must be, in words.
        why (`str`): What would happen instead, or what to set.
    """

    name: str
    allowed: Callable[[Any], bool]
    wanted: str
    why: str = ""

    def why_not(self, value: Any) -> str | None:
        """The sentence for a value that is not allowed, else None."""
        if self.allowed(value):
            return None
        hint = ", without quotes" if isinstance(value, str) and "number" in self.wanted else ""
        return f"{self.name}={value!r}: it must be {self.wanted}{hint}. {self.why}".rstrip()


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a real number from `low` to `high`; `above` and `below` leave out the bounds themselves.

    NaN, text, and True or False are none.
    """

    def allowed(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        x = float(value)
        return low <= x <= high and not (above and x == low) and not (below and x == high)

    return allowed


def whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    """Whether a value is a whole number of an integer type, from `low` to `high`."""
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def optional(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same, or None."""
    return lambda value: value is None or allowed(value)


def one_of(name: str, names: Sequence[str]) -> Setting:
    """A setting that is one of these texts."""
    return Setting(name, lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


_finite = number(-math.inf, math.inf, above=True, below=True)
_POSITIVE, _NOT_NEGATIVE = "a finite number above 0", "a finite number, 0 or more"
_COUNT, _SHARE = "a whole number, 1 or more", "a number from 0 to 1"
_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_LEVELS, _SUMS = ("token", "sequence"), ("sum_then_normalize", "normalize_then_sum")
_positive, _not_negative = number(0, math.inf, above=True, below=True), number(0, math.inf, below=True)


def _steps(value: Any) -> bool:
    """What transformers takes as an interval: whole steps, or a share of the run below 1."""
    return number(0, 1, above=True, below=True)(value) or (_positive(value) and float(value).is_integer())


def _weights(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(map(number(-LARGEST, LARGEST), value)) and any(value)


def _limits(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_finite, value))
    return is_pair and value[0] < value[1]


def _stages(value: Any) -> bool:
    """A list of stages of which each but the last has an end, and the last has none."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(stage, Stage) for stage in value):
        return False
    count, share = optional(whole(1)), optional(number(0, 1, above=True))
    numbers = all(
        whole(1)(stage.max_completion_length) and count(stage.steps) and count(stage.plateau) and share(stage.cut_off)
        for stage in value
    )
    *ending, last = (any(end is not None for end in stage[1:]) for stage in value)
    return numbers and all(ending) and not last


SETTINGS = (
    # the update
    Setting("learning_rate", _positive, _POSITIVE, "At 0 nothing is learned; a LoRA often takes 1e-5 to 1e-4."),
    Setting("max_steps", lambda v: whole(1)(v) or whole(-1, -1)(v), f"{_COUNT}, or -1 to go by num_train_epochs"),
    Setting("num_train_epochs", _positive, _POSITIVE, "At 0 nothing is learned; max_steps ends a run earlier."),
    Setting("per_device_train_batch_size", whole(1), _COUNT, "It counts answers: a multiple of num_generations."),
    Setting("per_device_eval_batch_size", whole(1), _COUNT),
    Setting("gradient_accumulation_steps", whole(1), _COUNT, "1 makes an update of every batch."),
    Setting("max_grad_norm", optional(number(0)), "0 or more", "A longer gradient is cut to it; 0 cuts nothing."),
    Setting("weight_decay", _not_negative, _NOT_NEGATIVE),
    Setting("adam_beta1", number(0, 1, below=True), "a number from 0 up to, but not, 1"),
    Setting("adam_beta2", number(0, 1, below=True), "a number from 0 up to, but not, 1"),
    Setting("adam_epsilon", _positive, _POSITIVE, "At 0 Adam divides 0 by 0."),
    Setting("warmup_steps", _not_negative, _NOT_NEGATIVE, "Steps, or below 1 a share of the run."),
    # the loss
    one_of("loss_type", losses.LOSS_TYPES),
    Setting("beta", _not_negative, _NOT_NEGATIVE, "Below 0 the model would be paid for leaving its reference."),
    Setting("epsilon", number(0), "a number, 0 or more", "The probability ratio is kept within 1 - epsilon and 1 + "
            "epsilon_high; 0.2 is usual."),
    Setting("epsilon_high", optional(number(0)), "None or a number, 0 or more", "None is as large as epsilon."),
    Setting("delta", optional(number(0, above=True)), "None or a number above 1 + epsilon"),
    Setting("num_iterations", whole(1), _COUNT, "Updates with each rollout."),
    one_of("importance_sampling_level", _LEVELS),
    Setting("top_entropy_quantile", number(0, 1), _SHARE, "1 takes all tokens."),
    Setting("entropy_coef", _finite, "a finite number", "0 for none."),
    Setting("sapo_temperature_neg", _positive, _POSITIVE),
    Setting("sapo_temperature_pos", _positive, _POSITIVE),
    Setting("off_policy_mask_threshold", optional(_finite), "None or a finite number"),
    Setting("ref_model_mixup_alpha", number(0, 1), _SHARE),
    Setting("ref_model_sync_steps", whole(1), _COUNT),
    one_of("vllm_importance_sampling_mode", _MODES),
    Setting("vllm_importance_sampling_clip_max", optional(number(0, above=True)), "None or a number above 0"),
    Setting("vllm_importance_sampling_clip_min", optional(number(0)), "None or a number, 0 or more"),
    # rewards
    Setting("reward_weights", optional(_weights), f"None or a list of numbers from {-LARGEST:g} to {LARGEST:g}, one "
            "for each reward function and not all 0", "None weighs them all alike."),
    one_of("multi_objective_aggregation", _SUMS),
    Setting("reward_clip_range", optional(_limits), "None or two numbers, the lower first"),
    Setting("missing_eos_penalty", optional(number(0, LARGEST, above=True)), "None or a number above 0", "It is taken "
            "off the reward of an answer that was cut off."),
    Setting("reward_seconds", number(0, 1e6, above=True), "a number of seconds above 0, up to 1e6", "For one call of a "
            "reward function, which is cut off then; 300 is usual."),
    # the answers
    Setting("num_generations", whole(2), "a whole number, 2 or more",
            "Each answer is compared with the others to its question; 8 is usual."),
    Setting("num_generations_eval", optional(whole(1)), f"None or {_COUNT}"),
    Setting("max_completion_length", whole(1), _COUNT, "Tokens of an answer; longer ones are cut off."),
    Setting("steps_per_generation", optional(whole(1)), f"None or {_COUNT}"),
    Setting("generation_batch_size", optional(whole(1)), f"None or {_COUNT}"),
    Setting("temperature", number(0.01, 100), "a number from 0.01 to 100",
            "Answers to a question must differ, and near 0 they are all the same; 1.0 is usual."),
    Setting("top_p", number(0, 1, above=True), "a number above 0, up to 1", "1 cuts nothing."),
    Setting("top_k", optional(whole(-1)), "a whole number", "0 cuts nothing."),
    Setting("min_p", optional(number(0, 1)), f"None or {_SHARE}"),
    Setting("repetition_penalty", _positive, _POSITIVE, "1 changes nothing."),
    Setting("dynamic_sampling", whole(0), "a whole number, 0 or more", "Rounds in which silent groups are replaced."),
    Setting("kv_bits", lambda v: whole(8, 16)(v) and v in KV_BITS, "16 or 8", "With 8 keys and values take half the "
            "memory while answers are written."),
    Setting("stages", optional(_stages), "None or a list of Stage(max_completion_length), each but the last "
            "with what ends it (steps, cut_off from 0 to 1, or plateau), and the last without"),
    # the run
    Setting("seed", whole(0, 2**32 - 1), "a whole number from 0 to 4294967295"),
    Setting("data_seed", optional(whole(0, 2**32 - 1)), "None or a whole number from 0 to 4294967295"),
    Setting("logging_steps", _steps, "a whole number of steps, or a share of the run below 1"),
    Setting("save_steps", _steps, "a whole number of steps, or a share of the run below 1",
            'save_strategy="no" saves none.'),
    Setting("eval_steps", optional(_steps), "None, a whole number of steps, or a share of the run below 1"),
    Setting("dataloader_num_workers", whole(0), "a whole number, 0 or more"),
)  # fmt: skip
# Where SFT's differ: its rows are texts, and its losses its own.
OF_SFT = (
    Setting("per_device_train_batch_size", whole(1), _COUNT, "It counts texts."),
    one_of("loss_type", ("nll", "dft")),
    Setting("max_length", optional(whole(2)), "None or a whole number, 2 or more", "Tokens of a text; the rest of a "
            "longer one is cut off."),
    one_of("packing_strategy", ("bfd", "bfd_split", "wrapped")),
)  # fmt: skip
# What a strategy of "no" switches off may hold anything.
_STRATEGY = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}


def why_not(args: TrainingArguments, own: Sequence[Setting] = ()) -> str | None:
    """The sentence about the first setting of `args`, a config of TRL's, that makes no sense, None if all do.

    `own` are rows for what a method has by itself, or means by a name in the table.
    """
    rows = *SETTINGS, *(OF_SFT if isinstance(args, trl.SFTConfig) else own)
    given, table = vars(args), {setting.name: setting for setting in rows}
    for setting in table.values():
        if setting.name not in given:  # dynamic_sampling in a plain GRPOConfig
            continue
        if setting.name == "num_train_epochs" and whole(1)(args.max_steps):
            continue  # max_steps decides
        if given.get(_STRATEGY.get(setting.name, "")) == "no":
            continue
        if sentence := setting.why_not(given[setting.name]):
            return sentence
    return None


def refuse_others(method: str, args: Any, only: Values) -> None:
    """Raises ValueError for a setting that is none of the values which `only` has for it, the usual one first."""
    for name, values in only.items():
        if getattr(args, name) not in values:
            raise ValueError(f"{name}={getattr(args, name)!r} is not served with {method}: leave it at {values[0]!r}")


def refuse(args: TrainingArguments, own: Sequence[Setting] = ()) -> None:
    """Raises ValueError, with the sentence of `why_not`, for settings that make no sense, and for a garbled token."""
    hub_words.checked_token(args.hub_token)  # is not shown, so it is no row of the table
    if sentence := why_not(args, own):
        raise ValueError(sentence)


def refuse_weights(args: trl.GRPOConfig, rewards: int) -> None:
    """Raises ValueError if `args` has not one reward weight for each of so many `rewards`."""
    if args.reward_weights is not None and len(args.reward_weights) != rewards:
        raise ValueError(f"reward_weights={args.reward_weights!r} are {len(args.reward_weights)}, and there are "
                         f"{rewards} reward functions: give one for each, in their order")  # fmt: skip
