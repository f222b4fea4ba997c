"""TRL's GRPOTrainer whose prompts are those of `models/chat.py`, and whose completions may end with a stop string.

They touch these private parts of TRL:

    _tokenize_prompts       a begun answer is continued, not closed; a text that holds the begin token gets no other
    _generate               what a stop string ended was not cut off, in the metrics either
    _metrics, _tokenizer    where those are, and what the prompts are read with
"""

from typing import Any

import torch

from nbhelpers.models import chat

from .hooks import Hooks


class PromptHooks(Hooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ended: list[bool] = []  # by themselves, of the engine's newest completions; empty without stop strings
        chat.keep_template_kwargs(self._tokenizer, self.chat_template_kwargs)
        if (end := chat.end_of_turn(self._tokenizer, self.eos_token_ids)) is not None:
            print(chat.goes_on(self._tokenizer, self.eos_token_ids, end))

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if isinstance(prompts[0], str):
            if self._is_vlm:
                return super()._tokenize_prompts(prompts)
            return [chat.text_ids(self._tokenizer, prompt) for prompt in prompts], None, {}
        if not any(map(chat.begins_answer, prompts)):
            return super()._tokenize_prompts(prompts)
        whole = any(isinstance(reward, torch.nn.Module) for reward in self.reward_funcs)
        if self._is_vlm or self.environment_factories is not None or whole:
            raise ValueError(
                "a prompt ends with an assistant message, the beginning of the answer. It is continued neither for "
                "models that see images, nor in an environment, nor for a reward model, which would read two turns: "
                "leave that message out"
            )
        more = {**self.chat_template_kwargs, "tools": self.tools or None, "chat_template": self.chat_template}
        return [chat.prompt_ids(self._tokenizer, prompt, more) for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        self._ended = []
        rollout = super()._generate(prompts)
        if self._ended and not self.tools:  # else it is of the last turn alone
            device = self.accelerator.device
            ended = self.accelerator.gather(torch.tensor(self._ended, device=device))
            lengths = self.accelerator.gather(torch.tensor([float(len(ids)) for ids in rollout[1]], device=device))
            whole = lengths[ended] if ended.any() else torch.zeros(1)
            metrics = self._numbers()
            metrics["completions/clipped_ratio"][-1] = 1.0 - ended.float().mean().item()
            for name, value in (("mean", whole.mean()), ("min", whole.min()), ("max", whole.max())):
                metrics[f"completions/{name}_terminated_length"][-1] = value.item()
        return rollout
