"""What a run will need on the card, part by part, and what fits: known before anything is downloaded.

    memory.plan(presets.get("llama-3.1-8b"), card_gb=15)         # the last line of a cell shows it as a table with bars
    print(memory.plan("phi-4", card_gb=15, num_generations=4))   # and as text

The training half is cut by the same function that the step itself uses (budget.Work.split), so what is planned here is
what runs. Nothing is imported that takes time. GB is 10^9 bytes.
"""

import sys
from dataclasses import dataclass, replace
from math import ceil

from nbhelpers import presets
from nbhelpers.budget import CannotFit, Part, Work, count, resident
from nbhelpers.presets import GB, Preset

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
    at_once: int  # completions that generation has room for at a time
    fits: bool
    longest_context: int  # prompt and completion, 0 if none fits
    largest_group: int
    nearest: Setting | None  # what to change to, if this does not fit

    @property
    def generation_peak(self) -> float:
        return sum(gb for name, gb in self.generation.items() if name != "CUDA context")

    @property
    def training_peak(self) -> float:
        return sum(gb for name, gb in self.training.items() if name != "CUDA context")

    @property
    def dominates(self) -> str:
        """The largest part of the larger half."""
        half = max(self.generation, self.training, key=lambda parts: sum(parts.values()))
        return max(half, key=half.get)

    def verdict(self) -> list[str]:
        """The conclusions, a sentence each."""
        context = f"{self.longest_context:,} tokens" if self.longest_context else "none"
        found = [
            f"Most of it is {self.dominates}.",
            f"Longest context that fits: {context}. Largest group at this length: {self.largest_group or 'none'}.",
        ]
        if self.fits:
            kept = sum(part.kept for part in self.parts) / (
                len(self.parts) * self.preset.architecture.num_hidden_layers
            )
            how = "nothing is computed twice" if kept == 1 else f"{1 - kept:.0%} of the layers are computed twice"
            pieces = "one piece" if len(self.parts) == 1 else f"{len(self.parts)} pieces"
            waves = f" Completions are generated {self.at_once} at a time." if self.at_once < self.setting.rows else ""
            return [f"It fits. The batch goes through in {pieces}, {how}.{waves}", *found]
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

    def halves(s: Setting):
        return _halves(preset, s, card_gb, budget_gb, way)

    generation, training, parts, at_once, fits = halves(setting)
    most = preset.architecture.max_position_embeddings
    return Plan(
        preset, card_gb, setting, generation, training, parts, at_once, fits,
        _longest(lambda n: halves(replace(setting, max_completion_length=n - setting.max_prompt_length))[-1],
                 setting.max_prompt_length + 1, most),
        _longest(lambda n: halves(replace(setting, num_generations=n, rows=n))[-1], 2, 512),
        None if fits else _nearest(setting, lambda s: halves(s)[-1]),
    )  # fmt: skip


def _halves(preset: Preset, s: Setting, card_gb: float, budget_gb: float | None, way: str):
    """(GB by part generating, the same training, how the batch is cut, rows generated at once, whether all fits)."""
    a = preset.architecture
    targets = preset.lora_targets
    fixed = resident(a, s.quantization, s.lora_rank, targets, s.optimizer)
    work = Work(a, 4 if s.lora_rank == 0 else 2, way)
    usable = (card_gb - CONTEXT_GB) * (1 - FRAGMENTED) * GB
    room = (usable if budget_gb is None else min(usable, budget_gb * GB)) - fixed.total
    rows = [(i // s.num_generations, s.max_prompt_length, s.max_completion_length) for i in range(s.rows)]
    try:
        parts = tuple(work.split(rows, room))
        largest = max(parts, key=lambda part: part.peak)
        saved = largest.kept * work.kept(largest.tokens) + largest.on_card * work.hidden(largest.tokens.packed)
        peak = largest.peak
        head = work.head(largest.tokens)
    except CannotFit:
        parts, saved = (), 0
        longest = max(rows, key=lambda row: row[1] + row[2])
        peak, head = work.least([longest]), work.head(count([longest]))
    common = {"weights": fixed.weights, "adapters": fixed.adapters, "optimizer": fixed.optimizer,
              "dense scratch": fixed.dequantized, "CUDA context": CONTEXT_GB * GB}  # fmt: skip
    training = dict(common)
    training["adapters"] += fixed.gradients
    training["kept for backward"] = saved
    training["logits" if saved + head >= peak / 1.03 else "layer work"] = peak - saved

    def generating(rows: int) -> dict[str, float]:
        cache = rows * (s.max_prompt_length + s.max_completion_length) * work.kv(1) * a.num_hidden_layers
        prompts = count([(i, s.max_prompt_length, 1) for i in range(ceil(rows / s.num_generations))])
        step = rows * (2 * a.vocab_size * 4 + 4 * work.hidden(1) + 2 * work.inner(1))
        return common | {"KV cache": cache, "layer work": max(work.forward(prompts), step)}

    def has_room(rows: int) -> bool:
        return sum(generating(rows).values()) <= usable + CONTEXT_GB * GB

    at_once = _longest(has_room, 1, s.rows)
    generation = generating(at_once or 1)
    fits = bool(parts) and at_once > 0
    as_gb = [{n: b / GB for n, b in half.items() if b} for half in (generation, training)]
    return *as_gb, parts, at_once, fits


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
    from nbhelpers import host

    card = host.card()
    return (None, None) if card is None else (card.total / GB, card.capability >= (8, 0))
