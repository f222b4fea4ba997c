"""What every engine does: prompts in, completions out, with the model's probability of each token.

    engine = engines.choose("auto", model, tokenizer)
    completions = engine.generate([[1, 5, 7], [1, 9]], Sampling(max_tokens=64, num_generations=8))

A prompt is a list of token ids; what comes back is flat: the completions of prompt 0, then those of prompt 1, ...
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from nbhelpers.models import each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOP_ID, STOP_STRING, LENGTH = "stop_id", "stop_string", "length"  # why a completion ended


@dataclass(frozen=True)
class Sampling:
    """How to draw. The filters come in transformers' order: penalty, minimum length, temperature, top-k, top-p, min-p.

    Args:
        max_tokens (`int`): A completion is cut off there.
        min_tokens (`int`): Before that many tokens no stop id can be drawn.
        num_generations (`int`): Completions for each prompt.
        temperature (`float`): Divides the logits. 0.0: the likeliest token every time.
        top_k (`int`): Draw among the k likeliest tokens; 0: all.
        top_p (`float`): Draw among the fewest likeliest tokens whose probabilities reach p (arXiv 1904.09751).
        min_p (`float`): Only tokens at least this times as likely as the likeliest one (arXiv 2407.01082).
        repetition_penalty (`float`): Above 1 makes tokens of prompt and completion less likely (arXiv 1909.05858).
        stop_ids (`tuple[int, ...]`): A completion ends with the first of these, which belongs to it.
        stop_strings (`tuple[str, ...]`): It ends with the token that completes one of these, which belongs to it.
        seed (`int` or sequence of `int`, *optional*): One number seeds the whole call, and completion j gets a stream
            of its own; a sequence gives completion j its seed, and the same tokens whatever else is in the batch. None
            draws one from torch's generator, so that `torch.manual_seed` repeats a run.
        past_limit (`bool`): Write on where prompt and completion are longer than the model was made for, as
            transformers does, instead of refusing them.
        on_end (`Callable[[], object]`, *optional*): Called for each completion that has ended: a progress bar's step.

    Raises ValueError for a value outside its range.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    num_generations: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | Sequence[int] | None = None
    past_limit: bool = False
    on_end: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.max_tokens < 1 or self.num_generations < 1:
            raise ValueError(f"{self.max_tokens=} and {self.num_generations=} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is not between 0 and max_tokens={self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError(f"{self.temperature=}, {self.top_k=}: at least 0; {self.repetition_penalty=}: above 0")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] and min_p={self.min_p} in [0, 1]")
        if isinstance(self.stop_strings, str) or "" in self.stop_strings:
            raise ValueError("stop_strings is a tuple of strings, none of them empty")

    @property
    def plain(self) -> bool:
        """Whether draws are from the model's own distribution at the temperature: nothing is penalised or ruled out."""
        neutral = self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0 and self.repetition_penalty == 1.0
        return neutral and not (self.min_tokens and self.stop_ids)

    def seeds(self, n: int) -> list[int]:
        """A 63-bit seed for each of n completions. ValueError if there are seeds, but not n of them."""
        if isinstance(self.seed, Sequence):
            if len(self.seed) != n:
                raise ValueError(f"{len(self.seed)} seeds for {n} completions: one for each, prompt by prompt")
            return [_mix(seed) for seed in self.seed]
        seed = int(torch.randint(2**62, ()).item()) if self.seed is None else self.seed
        return [_mix(_mix(seed) + j) for j in range(n)]


def _mix(x: int) -> int:
    """63 bits, unrelated for neighbouring x (the finalizer of splitmix64, doi 10.1145/2660193.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1


@dataclass
class Completion:
    """What was written after one prompt, and how likely each of its tokens was."""

    token_ids: list[int] = field(default_factory=list)
    # natural logarithm of each token's probability under the model at this temperature (at 0 as at 1), without penalty,
    # minimum length and filters: the trainer's own knows of none of them, and what it weighs must be like with like
    logprobs: list[float] = field(default_factory=list)
    reason: str = LENGTH  # or STOP_ID, or STOP_STRING


class Engine(ABC):
    """Writes completions with one model, with its weights as they are when `generate` is called."""

    name: str
    kv_bits: int = 16  # of a number of keys and values: the model's own width, or 8
    asleep: int = 0  # bytes that torch counts as allocated, and that training may use between two generations

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """Write `sampling.num_generations` completions for each prompt.

        Args:
            prompts (`list[list[int]]`): Token ids.
            sampling (`Sampling`): How to draw.

        Returns them flat, in the order of the prompts. Raises ValueError for an empty prompt, one that with max_tokens
        is longer than the model can be, a number of seeds that does not fit, or stop strings without a tokenizer.
        """


def check(
    prompts: list[list[int]], sampling: Sampling, limit: int, tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """Raises the errors that `Engine.generate` promises; `limit`: positions that the model knows."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: it needs at least one token, the begin token for instance")
    if not sampling.past_limit:
        check_length(prompts, sampling.max_tokens, limit)
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("stop_strings are looked for in text: give the engine the tokenizer")


def check_length(prompts: list[list[int]], max_tokens: int, limit: int, option: str = "max_tokens") -> None:
    """Raises ValueError for the first prompt that with its completion is longer than the model can be.

    Args:
        prompts (`list[list[int]]`): Token ids.
        max_tokens (`int`): Of a completion.
        limit (`int`): Positions that the model knows.
        option (`str`): What the caller's users know max_tokens as.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {option}={max_tokens} that is more than the "
                f"{limit} that the model can hold. Shorten it, or lower {option} to {max(0, limit - len(prompt))}"
            )


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside the block: evaluation mode, no gradients, no autocast, and the model's card is the current one, on whose
    stream an engine records its events. Afterwards everything is as it was."""
    first = next(model.parameters())
    training = [module for module in each.modules(model) if module.training]
    if training:  # else not asked: thousands of modules, while the GPU has nothing to do
        model.eval()
    try:
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False), torch.cuda.device_of(first):
            yield
    finally:
        for module in training:
            vars(module)["training"] = True  # as nn.Module's own way does, ten times as slowly


class Writer:
    """Collects one completion as its tokens arrive; the only place that decides when it has ended, and why."""

    def __init__(self, sampling: Sampling, tokenizer: "PreTrainedTokenizerBase | None" = None):
        self.completion = Completion()
        self.ended = False
        self._sampling, self._tokenizer = sampling, tokenizer
        self._stops = frozenset(sampling.stop_ids)
        # a character is at most 4 bytes and a token at least one, so this many tokens hold any stop string
        self._window = 4 * max(map(len, sampling.stop_strings), default=0) + 4

    def add(self, token_ids: list[int], logprobs: list[float]) -> None:
        """Take the next tokens, with a logprob each; those after the end are dropped."""
        for token, logprob in zip(token_ids, logprobs, strict=True):
            if self.ended:
                return
            written = self.completion
            written.token_ids.append(token)
            written.logprobs.append(logprob)
            if token in self._stops:
                self._end(STOP_ID)
            elif self._sampling.stop_strings and self._stop_string(written.token_ids):
                self._end(STOP_STRING)
            elif len(written.token_ids) == self._sampling.max_tokens:
                self._end(LENGTH)

    def _stop_string(self, token_ids: list[int]) -> bool:
        assert self._tokenizer is not None  # `check` has refused stop strings without one
        text = str(self._tokenizer.decode(token_ids[-self._window :]))
        return any(stop in text for stop in self._sampling.stop_strings)

    def _end(self, reason: str) -> None:
        self.ended, self.completion.reason = True, reason
        if self._sampling.on_end is not None:
            self._sampling.on_end()
