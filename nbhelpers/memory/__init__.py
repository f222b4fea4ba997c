"""What a run will need on the card, part by part, and what fits: known before anything is downloaded.

    memory.plan(presets.get("llama-3.1-8b"), card_gb=15)         # the last line of a cell shows it as a table with bars
    print(memory.plan("phi-4", card_gb=15, num_generations=4))   # and as text
    memory.plan("qwen2.5-3b", card="RTX 4090")                   # a card by its name: how fast it is, too
    memory.sliders(presets.get("phi-4"))                         # and moved by hand
    print(memory.plan_stages("qwen2.5-1.5b", [8192, 16384, 24576], card_gb=24))  # a run whose answers get longer
    memory.floor_gb(presets.get("phi-4"))                        # the smallest card for which there is a plan

The training half is cut by the step's own function (micro_batches.StepCost.split), keys and values get what the graph
engine gives them (room.kv_budget), so what is planned here is what runs. Nothing is imported that takes time.
GB is 10^9 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from nbhelpers import presets
from nbhelpers.architecture import GB
from nbhelpers.hands_on import HandsOn
from nbhelpers.presets import Preset

from .by_hand import sliders_of
from .kv import checked, kv_bytes_per_token, prefill_tokens, rows_that_fit, slot_tokens
from .micro_batches import CannotFit, MicroBatch, StepCost, Tokens, count, largest
from .report import Plan, Setting, StagePlans, changed
from .residents import Resident, resident
from .room import CONTEXT_GB, FRAGMENTED, Reserved, Room, kv_budget, long_text_budget, step_budget, vllm_kv_budget
from .seconds import Card, card_of, launch_tokens, named, of_a_step
from .swapping import freed_bytes, moved_bytes
from .this_card import backend, card_here, name_here

__all__ = ["CONTEXT_GB", "FRAGMENTED", "CannotFit", "Plan", "Reserved", "Room", "Setting", "StagePlans", "can_train",
           "floor_gb", "freed_bytes", "kv_budget", "kv_bytes_per_token", "plan", "plan_stages", "sliders",
           "step_budget", "that_fit", "vllm_kv_budget"]  # fmt: skip

# whose step is planned: SFT writes nothing, Online DPO writes pairs, PPO has a value head
METHODS = ("grpo", "rloo", "sft", "online_dpo", "ppo")
GROUPS = {"online_dpo": 2, "ppo": 2}  # answers to a question, where they are not the preset's
T4_GB = 15.0  # a T4, where no card is given and none is here


def plan(
    preset: Preset | str,
    card_gb: float | None = None,
    num_generations: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    lora_rank: int | None = None,
    quantization: str | None = None,
    rows: int | None = None,
    optimizer: str = "adamw_8bit",
    budget_gb: float | None = None,
    attention: str | None = None,
    method: str = "grpo",
    train: str | None = None,
    swap: bool = False,
    card: str | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """What training `preset` takes on a card. What is not given is the preset's own for that card (`Preset.on_card`).

    Args:
        preset (`Preset` or `str`): The model, or its name.
        card_gb (`float`, *optional*): GB of the card; None: the card here, if torch is loaded and there is one, else
            15 (a T4).
        num_generations (`int`, *optional*): Completions of a group.
        max_prompt_length (`int`, *optional*): Tokens.
        max_completion_length (`int`, *optional*): Tokens.
        lora_rank (`int`, *optional*): 0: every weight is trained, in fp32.
        quantization (`str`, *optional*): "dynamic", "nf4" or "none".
        rows (`int`, *optional*): Completions generated and trained on at once, a multiple of num_generations; None is
            one group.
        optimizer (`str`): "adamw_8bit" or "adamw" (fp32 moments).
        budget_gb (`float`, *optional*): What torch may allocate in all, GB, if the run gets a limit.
        attention (`str`, *optional*): "flash", or "efficient" as on a T4; None: what the card here has, or what a card
            of that size is likely to have.
        swap (`bool`): Let as many layers wait on the host as it takes, see models/swap.py.
        train (`str`, *optional*): "all": every weight is trained in 16 bits, as by `loader.load(..., train="all")`.
        method (`str`): One of METHODS.
        card (`str`, *optional*): The card's name, as "RTX 4090": its speed, and its GB where `card_gb` is not given.
        kv_bits (`int`, *optional*): Of keys and values while completions are written, 16 or 8: LeanGRPOConfig's.

    Raises ValueError for another optimizer, train, method or kv_bits, for a method without the adapter that it needs,
    and for an unknown name of a preset or a card.
    """
    if optimizer not in ("adamw_8bit", "adamw"):
        raise ValueError(f'optimizer is "adamw_8bit" or "adamw", not {optimizer!r}')
    if train not in (None, "all"):
        raise ValueError(f'train={train!r}: it is "all", for every weight; leave it out for an adapter')
    preset = presets.get(preset) if isinstance(preset, str) else preset
    kind = named(card) if card else None
    card_gb = card_gb or (kind.gb if kind else card_here()[0]) or T4_GB
    preset = preset.on_card(card_gb)
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if method in ("online_dpo", "ppo") and (train or lora_rank == 0):
        named_so = "lora_rank=0" if train is None else 'train="all"'
        raise ValueError(f"{method} measures the model against itself without its adapter: leave out {named_so}")
    answers = num_generations or GROUPS.get(method, preset.num_generations)
    group = 1 if method == "sft" else answers
    whole = train == "all"
    setting = Setting(
        "none" if whole else quantization or preset.quantization,
        0 if whole else preset.lora_rank if lora_rank is None else lora_rank,
        group,
        max_prompt_length or preset.max_prompt_length,
        max_completion_length or preset.max_completion_length,
        rows or answers,
        optimizer,
        method,
        2 if whole else 4,
        kv_bits=checked(preset.kv_bits if kv_bits is None else kv_bits),
    )

    attending = attention or backend(card_gb, kind.ampere if kind else None)
    kind = kind or card_of(card_gb, name_here(card_gb))
    room = _Card(preset, card_gb, budget_gb, attending, kind)
    if swap:
        setting = replace(setting, swapped=room.layers_to_swap(setting))
    training, micro_batches = room.training(setting)
    affordable = room.rows_that_fit(setting)
    fits = bool(micro_batches) and room.generates(setting)
    nearest = None if fits else next(filter(room.fits, changed(setting)), None)
    groups = 1 if rows or method == "sft" else preset.questions_per_step
    swap_gb = room.swap_bytes(setting, len(micro_batches)) / GB
    seconds = of_a_step(preset.architecture, kind, setting, micro_batches, room.backend, affordable, groups)

    def with_context(tokens: int) -> Setting:
        return replace(setting, max_completion_length=tokens - setting.max_prompt_length)

    shortest, most = setting.max_prompt_length + 1, preset.architecture.max_position_embeddings
    longest = largest(lambda n: room.fits(with_context(n)), shortest, most)
    return Plan(
        preset, card_gb, setting, _in_gb(room.generating(setting)), _in_gb(training), micro_batches,
        at_once=min(affordable, setting.rows),
        fits=fits,
        longest_context=longest if longest >= shortest else 0,
        largest_group=affordable if affordable > 1 and room.fits(setting) else 0,
        nearest=nearest,
        swap_gb=swap_gb,
        host_gb_s=kind.host_gb_s,
        step_seconds=seconds + groups * swap_gb / kind.host_gb_s if fits else None,
        speed_of=kind.name,
        instead=() if fits or nearest else that_fit(card_gb),
    )  # fmt: skip


def plan_stages(preset: Preset | str, lengths: Sequence[int], card_gb: float | None = None, **more: Any) -> StagePlans:
    """The plan of each stage of a run with `LeanGRPOConfig(stages=...)`: what does not fit is known before the first.

    Args:
        preset (`Preset` or `str`), card_gb (`float`, *optional*), more: As for `plan`.
        lengths (`Sequence[int]`): The stages' `max_completion_length`, tokens.

    Raises ValueError without a length, and as `plan`.
    """
    if not lengths:
        raise ValueError("lengths is empty: give each stage's max_completion_length")
    return StagePlans(tuple(plan(preset, card_gb, max_completion_length=length, **more) for length in lengths))


def sliders(preset: Preset | str, card_gb: float | None = None) -> HandsOn:
    """The plan as the last line of a cell, with sliders for the card, the size of a group and the lengths. Where nobody
    can move them it is the plan, and those of a longer answer and a smaller card.

    Args:
        preset (`Preset` or `str`), card_gb (`float`, *optional*): As for `plan`.
    """
    preset = presets.get(preset) if isinstance(preset, str) else preset
    card_gb = card_gb or card_here()[0] or T4_GB
    return sliders_of(plan, preset.on_card(card_gb), card_gb)


def can_train(preset: Preset, card_gb: float) -> bool:
    """Whether `plan` finds a setting of this preset for a card of `card_gb` GB: its own, or the nearest that fits."""
    return _can_train(preset, card_gb, backend(card_gb))


def that_fit(card_gb: float) -> tuple[str, ...]:
    """Names of the presets that a card of `card_gb` GB can train."""
    return tuple(preset.name for preset in presets.every() if can_train(preset, card_gb))


def floor_gb(preset: Preset) -> float:
    """GB of the smallest card that can train this preset, in whole tenths; what kind of card is here decides too."""
    return _floor_gb(preset, card_here()[1])


@cache
def _floor_gb(preset: Preset, modern: bool | None) -> float:
    def too_small(tenths: int) -> bool:
        return not _can_train(preset, tenths / 10, backend(tenths / 10, modern))

    return (largest(too_small, 0, 100_000) + 1) / 10


def _can_train(preset: Preset, card_gb: float, backend: str) -> bool:
    preset = preset.on_card(card_gb)
    group = preset.num_generations
    own = Setting(
        preset.quantization, preset.lora_rank, group, preset.max_prompt_length, preset.max_completion_length, group
    )  # fmt: skip
    card = _Card(preset, card_gb, None, backend, card_of(card_gb, name_here(card_gb)))
    return any(map(card.fits, changed(own)))


@dataclass(frozen=True)
class _Card:
    """What one model has room for on one card."""

    preset: Preset
    card_gb: float
    budget_gb: float | None
    backend: str  # of attention
    kind: Card

    def resident(self, s: Setting) -> Resident:
        targets = self.preset.lora_targets
        a = self.preset.architecture
        fixed = resident(a, s.quantization, s.lora_rank, targets, s.optimizer, trained_width=s.trained_width)
        return replace(fixed, weights=fixed.weights - freed_bytes(a, s.quantization, s.swapped))

    def layers_to_swap(self, s: Setting) -> int:
        """How many layers have to wait on the host for anything to fit, chosen so that a step copies little:
        with more of them more completions are written at once. 0 if nothing helps, or every weight is trained."""
        layers = self.preset.architecture.num_hidden_layers if s.lora_rank else 0
        fewest = largest(lambda n: not self.fits(replace(s, swapped=n)), 0, layers) + 1
        enough = range(fewest, layers + 1)
        return min(enough, key=lambda n: self.swap_bytes(replace(s, swapped=n), 1), default=0)

    def swap_bytes(self, s: Setting, micro_batches: int) -> int:
        """What a step copies to the card for layers that wait on the host: the walks of all tokens, one after another,
        and of each micro-batch, forward and backward."""
        stages = ceil(s.rows / max(1, min(self.rows_that_fit(s), s.rows)))
        walks = stages * s.max_completion_length + 2 * micro_batches
        return moved_bytes(self.preset.architecture, s.quantization, s.swapped, walks)

    def cost(self, s: Setting) -> StepCost:
        preset, dropped = self.preset, 0
        targets = [m for m in preset.architecture.linears() if m.name in preset.lora_targets]
        if preset.lora_dropout and s.lora_rank:
            dropped = sum(m.in_features for m in targets)
        width, adapted = s.trained_width if s.lora_rank == 0 else 2, s.lora_rank * len(targets)
        return StepCost(preset.architecture, width, self.backend, dropped, s.method == "ppo", s.lora_rank == 0, adapted)

    def left(self, s: Setting) -> tuple[float, float]:
        """(bytes that the card has left between the halves of a step, bytes that the budget has left): see Room."""
        held = self.resident(s).generating
        within = float("inf") if self.budget_gb is None else self.budget_gb * GB - held
        return (self.card_gb - CONTEXT_GB) * (1 - FRAGMENTED) * GB - held, within

    def room(self, s: Setting) -> float:
        """Bytes for the training half's work."""
        return step_budget(*self.left(s), coming=self.resident(s).gradients)

    def fits(self, s: Setting) -> bool:
        """Whether a completion can be generated and trained on: then any number of them can, one after another."""
        row = (0, s.max_prompt_length, s.max_completion_length)
        return self.generates(s) and self.cost(s).least([row], self.resident(s).gradients) <= self.room(s)

    def rows_that_fit(self, s: Setting) -> int:
        """Completions of full length that the graph engine writes at the same time; of texts, all."""
        if s.method == "sft":
            return s.rows
        return rows_that_fit(
            kv_budget(max(0.0, min(self.left(s)))), s.max_prompt_length + s.max_completion_length, self.kv_bytes(s)
        )

    def kv_bytes(self, s: Setting) -> int:
        """Of a token that is being written, in all layers."""
        a = self.preset.architecture
        return kv_bytes_per_token(a.num_hidden_layers, a.num_key_value_heads, a.head_dim, self.cost(s).width, s.kv_bits)

    def generates(self, s: Setting) -> bool:
        """Whether at least one completion can be written to its end."""
        one = replace(s, rows=1)
        work = sum(self._generation_work(one).values())
        return self.rows_that_fit(s) > 0 and work <= min(self.left(s))

    def generating(self, s: Setting) -> dict[str, float]:
        """Bytes by part while as many completions as fit are written; one, if none fits."""
        if s.method == "sft":
            return {}
        return self._held(s) | self._generation_work(s)

    def _generation_work(self, s: Setting) -> dict[str, float]:
        if s.method == "sft":
            return {}
        cost, rows = self.cost(s), min(max(1, self.rows_that_fit(s)), s.rows)
        slot = slot_tokens(s.max_prompt_length + s.max_completion_length)
        cache = rows * slot * self.kv_bytes(s)
        # all prompts, up to what is computed together; later stages have texts as long as they come
        one_stage, activations = rows == s.rows, 2 * cost.inner(1) + 4 * cost.hidden(1)
        together = prefill_tokens(activations)
        tokens = min(ceil(s.rows / s.num_generations) * s.max_prompt_length, together) if one_stage else together
        if (text := s.max_prompt_length if one_stage else slot) > together:  # in pieces as large as there is room for
            tokens = min(text, prefill_tokens(activations, long_text_budget(min(self.left(s)) - cache)))
        prompts = cost.forward(Tokens(tokens, ceil(tokens / s.max_prompt_length), tokens), tile=tokens)
        step = rows * (2 * self.preset.architecture.vocab_size * 4 + 4 * cost.hidden(1) + 2 * cost.inner(1))
        return {"KV cache": cache, "layer work": max(prompts, step)}

    def training(self, s: Setting) -> tuple[dict[str, float], tuple[MicroBatch, ...]]:
        """Bytes by part of the training half, and how it is cut: not at all if it does not fit."""
        cost = replace(self.cost(s), launches=launch_tokens(self.preset.architecture, self.kind))
        rows = [(i // s.num_generations, s.max_prompt_length, s.max_completion_length) for i in range(s.rows)]
        micro_batches: tuple[MicroBatch, ...] = ()
        try:
            micro_batches = tuple(cost.split(rows, self.room(s), fresh=self.resident(s).gradients))
            most = max(micro_batches, key=lambda batch: batch.peak)
            saved = most.saved * cost.saved(most.tokens) + most.on_device * cost.hidden(most.tokens.packed)
            peak, head = most.peak, cost.head(most.tokens)
        except CannotFit:
            saved = 0
            peak, head = cost.least(rows[:1], self.resident(s).gradients), cost.head(count(rows[:1]))
        parts = self._held(s)
        gradients = "adapters" if s.lora_rank else "gradients"
        parts[gradients] = parts.get(gradients, 0) + self.resident(s).gradients
        parts["kept for backward"] = saved
        parts["logits" if saved + head >= peak / 1.03 else "layer work"] = peak - saved
        return parts, micro_batches

    def _held(self, s: Setting) -> dict[str, float]:
        fixed = self.resident(s)
        return {"weights": fixed.weights, "adapters": fixed.adapters, "optimizer": fixed.optimizer,
                "dense scratch": fixed.scratch, "CUDA context": CONTEXT_GB * GB}  # fmt: skip


def _in_gb(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GB for name, size in parts.items() if size}
