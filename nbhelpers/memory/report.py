"""What the planner found out, and how a notebook shows it: a table with bars, and the conclusions in sentences."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbhelpers.presets import Preset

from .kv import MAX_ROWS
from .micro_batches import MicroBatch

ORDER = ("weights", "adapters", "gradients", "optimizer", "dense scratch", "KV cache", "kept for backward",
         "layer work", "logits", "CUDA context")  # fmt: skip


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
    method: str = "grpo"
    trained_width: int = 4  # bytes of a weight where every weight is trained
    swapped: int = 0  # decoder layers that wait on the host
    kv_bits: int = 16  # of keys and values while completions are written

    def __str__(self) -> str:
        whole = f"every weight trained in {8 * self.trained_width} bits"
        adapter = f"LoRA {self.lora_rank}" if self.lora_rank else whole
        waiting = f" · {self.swapped} layers wait on the host" if self.swapped else ""
        if self.method == "sft":
            length = self.max_prompt_length + self.max_completion_length
            return f"{self.quantization} · {adapter}{waiting} · {self.rows} texts of {length} tokens"
        keys = "" if self.kv_bits == 16 else f" · keys and values in {self.kv_bits} bits"
        return (
            f"{self.quantization} · {adapter}{waiting}{keys} · {self.rows} x ({self.max_prompt_length} + "
            f"{self.max_completion_length}) tokens in groups of {self.num_generations}"
        )


def changed(setting: Setting) -> Iterator[Setting]:
    """Settings that need no more, by how little they change: 4 bits everywhere first, then lengths, group and rank."""
    choices = []
    for q, price_q in ((setting.quantization, 0.0), ("nf4", 0.2)):
        for share in (1, 0.75, 0.5, 0.25, 0.125):
            length = max(1, int(setting.max_completion_length * share))
            for fewer in (1, 2, 4):
                for rank in {setting.lora_rank, min(setting.lora_rank, 16), min(setting.lora_rank, 8)}:
                    group = max(min(2, setting.num_generations), setting.num_generations // fewer)
                    other = replace(
                        setting, quantization=q, max_completion_length=length,
                        num_generations=group, rows=max(group, setting.rows // fewer // group * group), lora_rank=rank,
                    )  # fmt: skip
                    price = price_q + 1.5 * (1 - share) + 1.2 * (1 - 1 / fewer) + 0.3 * (rank != setting.lora_rank)
                    choices.append((price, str(other), other))
    return (other for _, _, other in sorted(choices))


@dataclass(frozen=True)
class Plan:
    """GB by part for the two halves of a step; `str` and a notebook show it.

    training_peak and generation_peak: GB of torch's allocations, the CUDA context left out, as
    torch.cuda.max_memory_allocated counts.
    """

    preset: Preset
    card_gb: float
    setting: Setting
    generation: dict[str, float]
    training: dict[str, float]
    micro_batches: tuple[MicroBatch, ...]  # how the step cuts the batch; empty if it does not fit
    at_once: int  # of the completions, how many the graph engine writes at the same time to their full length
    fits: bool
    longest_context: int  # tokens of prompt and completion, 0 if none fits; completions one after another if need be
    largest_group: int  # completions of this length that the graph engine writes at the same time; 0 if it is below 2
    nearest: Setting | None  # what to change to, if this does not fit
    swap_gb: float  # what a step copies to the card for layers that wait on the host, GB; 0 without any
    host_gb_s: float  # of which so many a second
    step_seconds: float | None  # of a step with all questions of the preset, or of `rows`; None if it does not fit
    speed_of: str  # the card whose data sheet that comes from
    instead: tuple[str, ...]  # presets that fit this card, if no setting of this one does

    @property
    def generation_peak(self) -> float:
        """GB."""
        return sum(gb for name, gb in self.generation.items() if name != "CUDA context")

    @property
    def training_peak(self) -> float:
        """GB."""
        return sum(gb for name, gb in self.training.items() if name != "CUDA context")

    @property
    def hours(self) -> float | None:
        """Of the preset's max_steps; None if it does not fit."""
        return None if self.step_seconds is None else self.step_seconds * self.preset.max_steps / 3600

    def time(self) -> str:
        """How long it takes, as a sentence; empty if it does not fit."""
        if self.step_seconds is None or self.hours is None:
            return ""
        full = "" if self.setting.method == "sft" else " with answers of full length"
        return (
            f"About {_rounded(self.step_seconds)} s a step, {_rounded(self.hours)} hours for {self.preset.max_steps} "
            f"steps{full} (estimated for a card like the {self.speed_of})."
        )

    @property
    def dominates(self) -> str:
        """The largest part, "kept for backward" aside: that grows into whatever is left."""
        parts = [(gb, name) for half in (self.generation, self.training) for name, gb in half.items()]
        return max(part for part in parts if part[1] != "kept for backward")[1]

    def verdict(self) -> list[str]:
        """The conclusions, a sentence each."""
        context = f"{self.longest_context:,} tokens" if self.longest_context else "none"
        group = self.largest_group or "none"
        largest = [
            f"The largest part: {self.dominates}. (What is kept for the backward takes only the room that is left.)",
            f"Longest prompt and answer that fit: {context}."
            + (f" Answers of this length written at the same time: {group}." if self.generation else ""),
        ]
        if self.fits:
            layers = len(self.micro_batches) * self.preset.architecture.num_hidden_layers
            saved = sum(batch.saved for batch in self.micro_batches) / layers
            how = "no layer computed twice" if saved == 1 else f"{1 - saved:.0%} of the layers computed twice"
            pieces = "one piece" if len(self.micro_batches) == 1 else f"{len(self.micro_batches)} pieces"
            stages = ""
            if self.at_once < min(self.setting.rows, MAX_ROWS):
                stages = f" Completions are written together while short, {self.at_once} at a time at the end."
            swap = [] if not self.swap_gb else [
                f"{self.setting.swapped} layers wait on the host: {self.swap_gb:,.0f} GB go over PCIe in a step, about "
                f"{self.swap_gb / self.host_gb_s:,.0f} s at {self.host_gb_s:.0f} GB/s, for completions that are all of "
                "full length."
            ]  # fmt: skip
            return [f"It fits. The batch goes through in {pieces}, {how}.{stages}", self.time(), *swap, *largest]
        if self.nearest is not None:
            return [f"It does NOT fit. The nearest that does: {self.nearest}.", *largest]
        names = ", ".join(self.instead) or "none"
        return [f"It does NOT fit, and no setting of this model does. These models fit: {names}.", *largest]

    def _rows(self) -> list[tuple[str, float, float]]:
        return [(n, self.generation.get(n, 0.0), self.training.get(n, 0.0)) for n in ORDER
                if n in self.generation or n in self.training]  # fmt: skip

    def __str__(self) -> str:
        verdict, *others = self.verdict()
        lines = [verdict, f"{self.preset.title} on {self.card_gb:g} GB: {self.setting}", ""]
        lines.append(f"{'GB':<18}{'generating':>11}{'training':>10}")
        for name, one, two in self._rows():
            lines.append(f"{name:<18}{one:>11.2f}{two:>10.2f}  {'█' * round(30 * max(one, two) / self.card_gb)}")
        totals = sum(self.generation.values()), sum(self.training.values())
        lines += [f"{'together':<18}{totals[0]:>11.2f}{totals[1]:>10.2f}  of {self.card_gb:g}", "", *others]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table, and a bar for each half whose full width is the card."""
        hues = {name: f"hsl({360 * i // len(ORDER)} 55% {42 + 18 * (i % 2)}%)" for i, name in enumerate(ORDER)}
        verdict, *others = self.verdict()
        head = f"<p><b>{verdict}</b></p>{self.preset.title} on {self.card_gb:g} GB: {self.setting}"
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
        return f"<div>{head}{bars}{table}{'<br>'.join(others)}</div>"


def _rounded(number: float) -> str:
    """Two digits of it, as they are said: 0.031, 1.7, 12, 240."""
    return f"{float(f'{number:.2g}'):,g}"


@dataclass(frozen=True)
class StagePlans:
    """The plans of a run's stages, which differ in the length of a completion alone; `str` shows a line for each."""

    plans: tuple[Plan, ...]

    @property
    def fits(self) -> bool:
        """Whether all of them do."""
        return all(plan.fits for plan in self.plans)

    def __str__(self) -> str:
        first = self.plans[0]
        head = f"{'tokens an answer':<18}{'generating, GB':>15}{'training, GB':>14}{'at once':>9}{'pieces':>8}"
        lines = [f"{first.preset.title} on {first.card_gb:g} GB", head]
        for plan in self.plans:
            generating, training = sum(plan.generation.values()), sum(plan.training.values())
            line = f"{plan.setting.max_completion_length:<18,}{generating:>15.2f}{training:>14.2f}"
            lines.append(line + (f"{plan.at_once:>9}{len(plan.micro_batches):>8}" if plan.fits else "   does NOT fit"))
        lines += [] if self.fits else next(plan.verdict()[:1] for plan in self.plans if not plan.fits)
        return "\n".join(lines)

    __repr__ = __str__
