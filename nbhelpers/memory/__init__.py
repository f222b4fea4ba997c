"""What a run will need on the card, part by part, and what fits: known before anything is downloaded.

    memory.plan(presets.get("llama-3.1-8b"), card_gb=15)         # the last line of a cell shows it as a table with bars
    print(memory.plan("phi-4", card_gb=15, num_generations=4))   # and as text

The training half is cut by the same function that the step itself uses (budget.Work.split), so what is planned here is
what runs. Nothing is imported that takes time. GB is 10^9 bytes.
"""

import sys
from dataclasses import dataclass, replace
from math import ceil

from nbhelpers import gpu, presets
from nbhelpers.architecture import GB
from nbhelpers.presets import Preset

from .micro_batches import CannotFit, Part, Resident, Work, count, resident

# what is on the card besides torch's own allocations, to be measured again on a new kind of card
CONTEXT_GB = 0.55  # CUDA context, cuBLAS workspaces
FRAGMENTED = 0.03  # of what torch reserves is lost between its blocks
T4_GB = 15.0  # a T4, where no card is given and none is here
ORDER = ("weights", "adapters", "optimizer", "dense scratch", "KV cache", "kept for backward", "layer work", "logits",
         "CUDA context")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What decides the bytes; the names are those of Preset and of TRL. `rows` completions are generated at once."""

    quantization: str
    lora_rank: int
    num_generations: int
    max_prompt_length: int
    max_completion_length: int
    rows: int
    optimizer: str = "adamw_8bit"

    def __str__(self) -> str:
        adapter = f"LoRA {self.lora_rank}" if self.lora_rank else "every weight trained"
        return (
            f"{self.quantization} · {adapter} · {self.rows} x ({self.max_prompt_length} + "
            f"{self.max_completion_length}) tokens in groups of {self.num_generations}"
        )


@dataclass(frozen=True)
class Plan:
    """GB by part for the two halves of a step; `str` and a notebook show it.

    training_peak and generation_peak: torch's allocations, the CUDA context left out, as
    torch.cuda.max_memory_allocated counts. parts: how the step cuts the batch; empty if it does not fit.
    """

    preset: Preset
    card_gb: float
    setting: Setting
    generation: dict[str, float]
    training: dict[str, float]
    parts: tuple[Part, ...]
    at_once: int  # completions of full length that generation has room for at a time
    fits: bool
    longest_context: int  # prompt and completion, 0 if none fits; completions one after another if need be
    largest_group: int  # completions of this length that are generated at once; 0 if none
    nearest: Setting | None  # what to change to, if this does not fit

    @property
    def generation_peak(self) -> float:
        return sum(gb for name, gb in self.generation.items() if name != "CUDA context")

    @property
    def training_peak(self) -> float:
        return sum(gb for name, gb in self.training.items() if name != "CUDA context")

    @property
    def dominates(self) -> str:
        """The largest part; what is kept for the backward is left out, for it takes what room there is."""
        parts = [(gb, name) for half in (self.generation, self.training) for name, gb in half.items()]
        return max(part for part in parts if part[1] != "kept for backward")[1]

    def verdict(self) -> list[str]:
        """The conclusions, a sentence each."""
        context = f"{self.longest_context:,} tokens" if self.longest_context else "none"
        group = self.largest_group or "none"
        found = [
            f"The largest part is {self.dominates}; what is kept for the backward only takes what room is left.",
            f"Longest context that fits: {context}. Largest group written at once to the end: {group}.",
        ]
        if self.fits:
            kept = sum(part.kept for part in self.parts) / (
                len(self.parts) * self.preset.architecture.num_hidden_layers
            )
            how = "nothing is computed twice" if kept == 1 else f"{1 - kept:.0%} of the layers are computed twice"
            pieces = "one piece" if len(self.parts) == 1 else f"{len(self.parts)} pieces"
            stages = ""
            if self.at_once < self.setting.rows:
                stages = f" Completions are written all at once while short, {self.at_once} at a time at the end."
            return [f"It fits. The batch goes through in {pieces}, {how}.{stages}", *found]
        if self.nearest is not None:
            return [f"It does NOT fit. The nearest that does: {self.nearest}.", *found]
        names = ", ".join(presets.that_fit(self.card_gb)) or "none"
        return [f"It does NOT fit, and no setting of this model does. These models fit: {names}.", *found]

    def _rows(self) -> list[tuple[str, float, float]]:
        return [(n, self.generation.get(n, 0.0), self.training.get(n, 0.0)) for n in ORDER
                if n in self.generation or n in self.training]  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.preset.title} on {self.card_gb:g} GB: {self.setting}", ""]
        lines.append(f"{'GB':<18}{'generating':>11}{'training':>10}")
        for name, one, two in self._rows():
            lines.append(f"{name:<18}{one:>11.2f}{two:>10.2f}  {'█' * round(30 * max(one, two) / self.card_gb)}")
        totals = sum(self.generation.values()), sum(self.training.values())
        lines += [f"{'together':<18}{totals[0]:>11.2f}{totals[1]:>10.2f}  of {self.card_gb:g}", "", *self.verdict()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table, and a bar for each half whose full width is the card."""
        hues = {name: f"hsl({40 * i} 55% 55%)" for i, name in enumerate(ORDER)}
        head = f"<b>{self.preset.title}</b> on {self.card_gb:g} GB: {self.setting}"
        bars = ""
        for title, half in (("generating", self.generation), ("training", self.training)):
            total = sum(half.values())
            scale = 100 / max(self.card_gb, total)
            pieces = "".join(
                f'<div title="{name} {half[name]:.2f} GB" '
                f'style="width:{half[name] * scale:.2f}%;background:{hues[name]}"></div>'
                for name in ORDER
                if name in half
            )
            bars += (
                f'<div>{title}: {total:.2f} of {self.card_gb:g} GB</div><div style="display:flex;height:1.4em;'
                f'width:36em;max-width:100%;border:1px solid #888">{pieces}</div>'
            )
        rows = "".join(
            f'<tr><td><span style="color:{hues[name]}">■</span> {name}</td><td>{one:.2f}</td><td>{two:.2f}</td></tr>'
            for name, one, two in self._rows()
        )
        table = f"<table><tr><th>GB</th><th>generating</th><th>training</th></tr>{rows}</table>"
        return f"<div>{head}{bars}{table}{'<br>'.join(self.verdict())}</div>"


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
) -> Plan:
    """What training `preset` takes on a card of `card_gb` GB.

    card_gb: None is the card here, if torch is loaded and there is one, else 15 (a T4). The preset's own numbers for
        that card (`Preset.on_card`) stand for what is not given.
    rows: completions generated and trained on at once, a multiple of num_generations; None is one group.
    optimizer: "adamw_8bit" or "adamw" (fp32 moments).
    budget_gb: the step's own limit (torch's allocations), if it gets one.
    attention: "flash", or "efficient" as on a T4; None is what the card here has; a T4's if there is none.

    Raises ValueError for another optimizer, and for an unknown preset's name.
    """
    if optimizer not in ("adamw_8bit", "adamw"):
        raise ValueError(f'optimizer is "adamw_8bit" or "adamw", not {optimizer!r}')
    here, modern = _card_here()
    card_gb = card_gb or here or T4_GB
    way = attention or ("flash" if modern or (modern is None and card_gb > 16) else "efficient")
    preset = presets.get(preset) if isinstance(preset, str) else preset
    preset = preset.on_card(card_gb)
    group = num_generations or preset.num_generations
    setting = Setting(
        quantization or preset.quantization,
        preset.lora_rank if lora_rank is None else lora_rank,
        group,
        max_prompt_length or preset.max_prompt_length,
        max_completion_length or preset.max_completion_length,
        rows or group,
        optimizer,
    )

    card = _Card(preset, card_gb, budget_gb, way)
    training, parts = card.training(setting)
    at_once = _longest(lambda n: card.generates(setting, n), 1, setting.rows)
    generation = card.generating(setting, at_once or 1)
    fits = bool(parts) and at_once > 0

    def with_context(tokens: int) -> Setting:
        return replace(setting, max_completion_length=tokens - setting.max_prompt_length)

    shortest, most = setting.max_prompt_length + 1, preset.architecture.max_position_embeddings
    return Plan(
        preset, card_gb, setting, _in_gb(generation), _in_gb(training), parts, at_once, fits,
        longest_context=_longest(lambda n: card.fits(with_context(n)), shortest, most),
        largest_group=_longest(lambda n: card.fits(setting) and card.generates(setting, n), 2, 1024),
        nearest=None if fits else _nearest(setting, card.fits),
    )  # fmt: skip


@dataclass(frozen=True)
class _Card:
    """What one model has room for on one card."""

    preset: Preset
    card_gb: float
    budget_gb: float | None
    way: str  # of attention

    def usable(self) -> float:
        return (self.card_gb - CONTEXT_GB) * (1 - FRAGMENTED) * GB

    def resident(self, s: Setting) -> Resident:
        targets = self.preset.lora_targets
        return resident(self.preset.architecture, s.quantization, s.lora_rank, targets, s.optimizer)

    def work(self, s: Setting) -> Work:
        return Work(self.preset.architecture, 4 if s.lora_rank == 0 else 2, self.way)

    def room(self, s: Setting) -> float:
        """Bytes for the training half's work."""
        limit = self.usable() if self.budget_gb is None else min(self.usable(), self.budget_gb * GB)
        return limit - self.resident(s).total

    def fits(self, s: Setting) -> bool:
        """Whether a completion can be generated and trained on: then any number of them can, one after another."""
        row = (0, s.max_prompt_length, s.max_completion_length)
        return self.generates(s, 1) and self.work(s).least([row]) <= self.room(s)

    def generates(self, s: Setting, rows: int) -> bool:
        """Whether `rows` completions can be generated at once."""
        return sum(self.generating(s, rows).values()) <= self.usable() + CONTEXT_GB * GB

    def generating(self, s: Setting, rows: int) -> dict[str, float]:
        """Bytes by part while `rows` completions are generated."""
        a, work = self.preset.architecture, self.work(s)
        cache = rows * (s.max_prompt_length + s.max_completion_length) * work.kv(1) * a.num_hidden_layers
        prompts = count([(i, s.max_prompt_length, 1) for i in range(ceil(rows / s.num_generations))])
        step = rows * (2 * a.vocab_size * 4 + 4 * work.hidden(1) + 2 * work.inner(1))
        return self._common(s) | {"KV cache": cache, "layer work": max(work.forward(prompts), step)}

    def training(self, s: Setting) -> tuple[dict[str, float], tuple[Part, ...]]:
        """Bytes by part of the training half, and how it is cut: not at all if it does not fit."""
        work, fixed = self.work(s), self.resident(s)
        rows = [(i // s.num_generations, s.max_prompt_length, s.max_completion_length) for i in range(s.rows)]
        try:
            parts = tuple(work.split(rows, self.room(s)))
            largest = max(parts, key=lambda part: part.peak)
            saved = largest.kept * work.kept(largest.tokens) + largest.on_card * work.hidden(largest.tokens.packed)
            peak, head = largest.peak, work.head(largest.tokens)
        except CannotFit:
            parts, saved = (), 0
            peak, head = work.least(rows[:1]), work.head(count(rows[:1]))
        found = self._common(s)
        found["adapters"] += fixed.gradients
        found["kept for backward"] = saved
        found["logits" if saved + head >= peak / 1.03 else "layer work"] = peak - saved
        return found, parts

    def _common(self, s: Setting) -> dict[str, float]:
        fixed = self.resident(s)
        return {"weights": fixed.weights, "adapters": fixed.adapters, "optimizer": fixed.optimizer,
                "dense scratch": fixed.dequantized, "CUDA context": CONTEXT_GB * GB}  # fmt: skip


def _in_gb(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GB for name, size in parts.items() if size}


def _longest(fits, low: int, high: int) -> int:
    """The largest n of low..high that fits, 0 if none does; what is larger is taken to need more."""
    if low > high or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _nearest(setting: Setting, fits) -> Setting | None:
    """The setting that fits and changes least: 4 bits everywhere first, then lengths, group and rank."""
    choices = []
    for q, price_q in ((setting.quantization, 0.0), ("nf4", 0.2)):
        for share in (1, 0.75, 0.5, 0.25, 0.125):
            length = max(1, int(setting.max_completion_length * share))
            for fewer in (1, 2, 4):
                for rank in {setting.lora_rank, min(setting.lora_rank, 16), min(setting.lora_rank, 8)}:
                    group = max(2, setting.num_generations // fewer)
                    changed = replace(
                        setting, quantization=q, max_completion_length=length,
                        num_generations=group, rows=max(group, setting.rows // fewer // group * group), lora_rank=rank,
                    )  # fmt: skip
                    price = price_q + 1.5 * (1 - share) + 1.2 * (1 - 1 / fewer) + 0.3 * (rank != setting.lora_rank)
                    choices.append((price, str(changed), changed))
    return next((changed for _, _, changed in sorted(choices) if fits(changed)), None)


def _card_here() -> tuple[float | None, bool | None]:
    """(GB of this machine's card, whether it is Ampere or newer), (None, None) if torch was not loaded or has none."""
    if "torch" not in sys.modules:
        return None, None
    card = gpu.card()
    return (None, None) if card is None else (card.total / GB, card.capability >= (8, 0))
