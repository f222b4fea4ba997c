"""`LeanSFTTrainer`: TRL's SFTTrainer, supervised fine-tuning, with the lean step's memory and nothing lost on a stop.

TRL prepares the texts: its dataset forms, its masks (completion-only, assistant-only), its packing. The loss is TRL's,

    nll    -sum of logp over the tokens that count, over their number in the whole update
    dft    the same with each logp multiplied by its own probability, without a gradient (arXiv:2508.05629)

and each text goes through the model without padding, as far as its last token that counts. TRL's private
parts here are `_total_train_tokens`, the tokens so far, and `_is_vision_dataset`, which is left to TRL.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor, nn

from nbhelpers.architecture import GB

from .. import config, rows, settings
from ..checkpoint import Position
from ..config import OfThisMachine
from ..hooks import making
from ..packing import Packed, Row, Rows
from ..resume_hooks import ResumeHooks
from ..step_hooks import StepHooks
from ..whole_hooks import WholeHooks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def texts_of(batch: dict[str, Tensor]) -> Rows:
    """The texts of a batch as TRL's collator gives it, each up to its last token that counts; of none that has none.

    `input_ids` and `labels` are int64 [B, T], -100 where a token does not count, with `attention_mask` [B, T]; where
    texts are packed B is 1, and `position_ids` [1, T] are 0 where one begins. The first token of a text never counts.
    """
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if "attention_mask" in batch:
        masks = batch["attention_mask"].bool().cpu()
        texts = [(row[mask], label[mask]) for row, label, mask in zip(ids, labels, masks, strict=True)]
    else:
        starts = (batch["position_ids"][0].cpu() == 0).nonzero().flatten().tolist()
        sizes = [end - start for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
        texts = list(zip(ids[0].split(sizes), labels[0].split(sizes), strict=True))
    found = Rows([], [], {}, {})
    for number, (text, label) in enumerate(texts):
        counted = (label[1:] != -100).nonzero().flatten() + 1
        if len(counted):
            first, end = int(counted[0]), int(counted[-1]) + 1
            found.rows.append(Row(number, len(found.prompts), first, end - first))
            found.prompts.append(text[:first])
            found.completions[number], found.scored[number] = text[first:end], counted - first
    return found


@dataclass
class LeanSFTConfig(OfThisMachine, trl.SFTConfig):
    """TRL's SFTConfig with what `OfThisMachine` says."""

    gradient_checkpointing: bool = False


class LeanSFTTrainer(ResumeHooks, StepHooks, WholeHooks, trl.SFTTrainer):
    """TRL's SFTTrainer, made for one small machine: the lean step, checkpoints that are complete or absent, the panel.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): E.g. from `loader.load`; trained in place.
        args (`SFTConfig`, *optional*): `LeanSFTConfig("runs/sft")` if not given.
        train_dataset (`Dataset` or `IterableDataset`): TRL's forms: a column `text`, `messages`, or `prompt` and
            `completion`, as texts or chat messages, e.g. `tasks.decimals(texts=True).train`.
        eval_dataset, formatting_func (*optional*): As in TRL's SFTTrainer.
        more: The other arguments of TRL's SFTTrainer; `budget_gb`, `max_skipped_steps`, `lean` of `LeanGRPOTrainer`.

    What the lean step has not (`compute_loss_func`, label smoothing, images, ...) is left to TRL, and a line says so.
    Its head gives no logits, so `mean_token_accuracy` is not logged.

    Raises ValueError for rows that are no texts or have no token that counts, and for settings that make no sense.
    """

    args: trl.SFTConfig

    @making
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: trl.SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        formatting_func: Callable[[dict], str] | None = None,
        **more: Any,
    ):
        config.check_trl()
        args = LeanSFTConfig("runs/sft") if args is None else args
        settings.refuse(args)
        data = rows.texts_looked_at(train_dataset, eval_dataset, args.dataset_text_field, formatting_func is not None)
        super().__init__(
            model, args=args, train_dataset=data[0], eval_dataset=data[1], formatting_func=formatting_func, **more
        )
        self._say_what_is_cut()
        for live in self._panels():
            live.method, live.kept_however_it_ends, live.writes = self._name, True, False

    def _say_what_is_cut(self) -> None:
        """ValueError if no token counts; a line if texts are as long as they may be: their ends were cut off."""
        lengths, most = [len(row["input_ids"]) for row in self._first_rows()], self.args.max_length
        self._longest = max(lengths, default=0)
        if not lengths:
            raise ValueError(f"no text has a token to learn within max_length={most}: raise it, or shorten the prompts")
        long = 0 if most is None or self.args.packing else sum(length >= most for length in lengths)
        if long:
            print(f"{long} of {len(lengths)} texts reach max_length={most} tokens: what is behind it is cut off, and "
                  "with it where they end. Raise it, or leave them out.")  # fmt: skip

    def _asked_of_trl(self) -> dict[str, bool]:
        return {
            **super()._asked_of_trl(),
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            "activation_offloading": self.args.activation_offloading,  # the lean step offloads by itself
            "a data set with images": self._is_vision_dataset,
        }

    def _longest_row(self) -> tuple[int, int, int]:
        return 1, 1, max(1, self._longest - 1)

    def _write_state(self, position: Position) -> None:
        super()._write_state(position)
        position.counters["texts' tokens"] = self._total_train_tokens

    def _read_state(self, position: Position) -> None:
        super()._read_state(position)
        self._total_train_tokens = position.counters.get("texts' tokens", 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's hook: forward AND, in training, backward of a batch, micro-batch by micro-batch."""
        if not self.lean or return_outputs:  # who wants the logits gets TRL's
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        start, training, step, texts = time.perf_counter(), self.model.training, self._step_of(model), texts_of(inputs)
        counted = sum(map(len, texts.scored.values()))
        scale = 1.0 / max(float(counted if num_items_in_batch is None else num_items_in_batch), 1.0)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale *= self.accelerator.num_processes  # the gradients are averaged over them
        # where it is no sum over the whole update, transformers divides what is returned, and the gradient is here
        divisor = self.current_gradient_accumulation_steps if training and num_items_in_batch is None else 1

        def both(logps: Tensor, entropies: Tensor) -> Tensor:  # [2]: the loss, and the sum of the entropies
            weights = logps.detach().exp() if self.args.loss_type == "dft" else 1.0
            return torch.stack([-(logps * weights).sum() * scale, entropies.sum()])

        def computed() -> Tensor:
            if not training:
                count = 1 + max((row.number for row in texts.rows), default=0)
                return both(*step.score(texts, (count, inputs["input_ids"].shape[1])))
            sums = torch.zeros(2, device=step.device)

            def of_packed(logps: Tensor, entropies: Tensor, packed: Packed) -> Tensor:
                part = both(logps, entropies)
                sums.add_(part.detach())
                return part[0] / divisor

            step.differentiate(texts, of_packed, self.accelerator.backward)
            return sums

        sums = step.retried(computed, learns=training)
        if training:
            self._average_gradients(model)
        self._measure(inputs, sums[1], counted, time.perf_counter() - start)
        # the gradients are in place: transformers calls backward() on this detached scalar, which does nothing
        return sums[0].requires_grad_() if training else sums[0]

    def _measure(self, inputs: dict[str, Any], entropy: Tensor, counted: int, seconds: float) -> None:
        """Log what TRL logs, without the share of tokens guessed right, and the speed and the peak of GRPO's."""
        metrics = self._numbers()
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        mine = torch.stack([entropy, *(torch.as_tensor(n, device=entropy.device) for n in (counted, tokens))])
        total, number, tokens = self.accelerator.reduce(mine, reduction="sum").tolist()
        metrics["entropy"].append(total / number if number else 0.0)
        if self.model.training:
            self._total_train_tokens += int(tokens)
            metrics["tokens_per_second"].append(tokens / max(seconds, 1e-9))
        metrics["num_tokens"] = [self._total_train_tokens]
        if entropy.is_cuda:
            metrics["peak_gb"].append(torch.cuda.max_memory_allocated(entropy.device) / GB)
