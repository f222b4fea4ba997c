"""transformers' own `generate`, the engine that always works: every architecture, and slow.

It draws with the project's sampler, so seeds, filters and log-probabilities mean the same as in the other engines. One
thing is transformers' own: with dynamic or longrope position embeddings a text that outgrows
`original_max_position_embeddings` depends on its padding, so on what stands beside it in the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nbhelpers.models import families

from .base import Completion, Engine, Sampling, Writer, check, inference
from .sampler import next_token

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HFEngine(Engine):
    """See the top of this file.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Any causal language model.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        batch_size (`int`): Completions that are written at the same time.
    """

    name = "hf"

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        batch_size: int = 64,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`."""
        check(prompts, sampling, self.model.config.get_text_config().max_position_embeddings, self.tokenizer)
        rows = [prompt for prompt in prompts for _ in range(sampling.num_generations)]
        seeds = sampling.seeds(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # so that little is padded
        completions: dict[int, Completion] = {}
        with inference(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                written = self._batch([rows[i] for i in batch], [seeds[i] for i in batch], sampling)
                completions.update(zip(batch, written, strict=True))
        return [completions[i] for i in range(len(rows))]

    def _batch(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        model: Any = self.model  # a type checker does not see what peft's wrapper passes on
        longest, device = max(map(len, prompts)), model.device
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        pick = _Pick(sampling, seeds, tokens, mask)
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, use_cache=True, pad_token_id=0,
            eos_token_id=list(sampling.stop_ids) or None, disable_compile=True,
        )  # fmt: skip
        with _no_defaults(self.model):
            out = model.generate(
                tokens, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([pick])
            )
        logprobs = torch.stack(pick.logprobs, dim=1).tolist()
        completions = []
        for row, logps in zip(out[:, longest:].tolist(), logprobs, strict=True):
            writer = Writer(sampling, self.tokenizer)
            writer.add(row, logps)
            completions.append(writer.completion)
        return completions


@contextmanager
def _no_defaults(model: "PreTrainedModel | PeftModel") -> Iterator[None]:
    """Inside the block the model has an empty generation_config: `generate` fills from it what a call leaves open.

    peft's wrapper may have one of its own, which its `generate` hands down to the model.
    """
    from transformers import GenerationConfig

    owners = [one for one in (families.unwrap(model), model) if "generation_config" in vars(one)]
    own = [(one, one.generation_config) for one in owners]
    for one in owners:
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for one, config in own:
            one.generation_config = config


class _Pick:
    """A logits processor that draws the token itself and leaves `generate` no other choice."""

    def __init__(self, sampling: Sampling, seeds: list[int], prompts: torch.Tensor, mask: torch.Tensor):
        self.sampling, self.prompts, self.mask = sampling, prompts, mask
        self.seeds = torch.tensor(seeds, device=prompts.device)
        self.stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=prompts.device)
        self.seen: torch.Tensor | None = None
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.sampling.repetition_penalty != 1.0 and self.seen is None:
            counts = torch.zeros_like(scores).scatter_add_(1, self.prompts, self.mask.to(scores.dtype))
            self.seen = counts > 0  # not the padding
        written = torch.full_like(self.seeds, len(self.logprobs))
        token, logp = next_token(scores.float(), self.seeds, written, self.sampling, self.stops, self.seen)
        self.logprobs.append(logp)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)
