"""What machine is this, and can it run that? Says so before anything is downloaded.

host.report(preset)      # stops with the remedy if the preset cannot run here
host.require("vllm")     # stops with the exact install line if it is missing
"""

import os
import platform
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbhelpers import gpu, memory, presets
from nbhelpers.architecture import GB
from nbhelpers.progress import in_notebook

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "vllm")
INSTALL = {
    "bitsandbytes": 'pip install "bitsandbytes>=0.50,<0.51"',
    "peft": 'pip install "peft>=0.20,<0.22"',
    "trl": 'pip install "trl>=1.16,<1.17"',
    "vllm": "pip install -r requirements-vllm.txt",
    "math-verify": 'pip install "math-verify>=0.9,<0.10"',
    "gguf": 'pip install "gguf>=0.17,<1"',
}
DOWNLOAD_MBIT = 400  # an assumption, and said with the time: nothing was downloaded yet
LOAD_GB_S = 0.3  # an assumption too, for a small machine: an H200's host took 1.4 (benchmarks/results/loader.json)
SESSION_HOURS = {"Colab": 12.0, "Kaggle": 12.0}  # at most, by their own pages; Colab may end one sooner
GET_A_GPU = "On Colab: Runtime > Change runtime type > T4 GPU; on Kaggle: Settings > Accelerator"


class CannotRun(RuntimeError):
    """This machine cannot do what was asked; the message says what it lacks and what to change, and a notebook shows
    it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def is_first_process() -> bool:
    """Whether this process is the one of several (RANK, as torchrun and accelerate set it) that writes results."""
    return os.environ.get("RANK", "0") == "0"


def card_gb() -> float | None:
    """GB of this process's GPU, as `Preset.on_card` wants it; None without a GPU."""
    card = gpu.card()
    return card.total / GB if card else None


def cpu() -> str:
    """The processor's name where the system tells it; it may be empty."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    """{package: version} of those installed, plus python; nothing is imported."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def where() -> str:
    """ "Colab", "Kaggle" or "local"."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def session_left() -> float | None:
    """Seconds until Colab or Kaggle end this session at the latest, as they say; None elsewhere."""
    if where() not in SESSION_HOURS:
        return None
    import psutil  # accelerate needs it too

    return max(0.0, psutil.Process(1).create_time() + 3600 * SESSION_HOURS[where()] - time.time())


def require(package: str) -> None:
    """Raises CannotRun, with the line that installs it, if `package` is missing or this GPU is too old for it."""
    if package == "vllm":
        card = gpu.card()
        if card is None or card.capability < (8, 0):
            has = "no CUDA GPU" if card is None else f"a {card.name} (compute capability {_dots(card)})"
            raise CannotRun(
                f"vLLM needs an Ampere GPU or newer (compute capability 8.0) and here is {has}. "
                'Use the project\'s own decoder: LeanGRPOTrainer(..., engine="graph")'
            )
    try:
        version(package)
    except PackageNotFoundError:
        line = INSTALL.get(package, f"pip install {package}")
        raise CannotRun(f"{package} is not installed. In a notebook cell: %{line}") from None


def check_fits(preset: "presets.Preset", total: float) -> None:
    """Refuse a preset that a card cannot train, even with shorter answers or smaller groups.

    Args:
        preset (`Preset`): The model.
        total (`float`): Bytes of the card.

    Raises CannotRun, saying by how much and which presets fit.
    """
    gb = total / GB
    if memory.can_train(preset, gb):
        return
    needed, fit = memory.floor_gb(preset), memory.that_fit(gb)
    advice = f"These fit: {', '.join(fit)}: presets.get({fit[-1]!r})" if fit else "No preset fits; take a larger card"
    raise CannotRun(
        f"{preset.name} needs at least {needed:.1f} GB to train and this card has {gb:.1f} GB: "
        f"{needed - gb:.1f} GB too little. {advice}"
    )


def report(preset: "presets.Preset | None" = None) -> None:
    """Print GPU, memory, dtype, versions and place; with a preset, before them, whether it runs here, and behind them
    how, how long a run takes, and what fetching and loading it take.

    Raises CannotRun when it cannot, with the remedy. Without a GPU a 4-bit preset is only warned about: it is
    hopelessly slow there, and it works.
    """
    refused = preset and _refused(preset)
    chosen = preset and preset.on_card(card_gb())
    fetch = _fetch(chosen) if chosen and not chosen.smoke and not Path(chosen.hub_id).exists() else None
    if chosen and needs_gpu(chosen) and not refused:
        warn_slow(chosen.title)
    elif chosen:
        print(f"{chosen.title} cannot be trained here." if refused else _verdict(chosen, fetch))
    _print_machine()
    if refused:
        raise refused
    if preset is None or chosen is None:
        return
    kind = "LoRA rank " + str(chosen.lora_rank) if chosen.lora_rank else "every weight trained"
    print(
        f"{chosen.title}{' (smoke: small and random)' if chosen.smoke else ''}: "
        f"{chosen.architecture.parameters() / 1e6:,.1f} M parameters · {chosen.quantization} · {kind} · "
        f"{chosen.num_generations} generations of {chosen.max_prompt_length} + {chosen.max_completion_length} tokens · "
        f"at least {memory.floor_gb(preset):.1f} GB"
    )
    gb = card_gb()
    if gb and not chosen.smoke and (time_taken := memory.plan(chosen, gb).time()):
        print(time_taken)
    if fetch is not None:
        print(f"load: about {fetch.load_minutes} min, read at {LOAD_GB_S} GB/s and packed on the way")
        print(fetch)


def _print_machine() -> None:
    cards, own = gpu.cards(), int(os.environ.get("LOCAL_RANK", 0))
    free = f", {gpu.free_bytes(own) / GB:.1f} free" if gpu.card(own) else ""
    ram = _ram_bytes()
    host_memory = f" · {ram / GB:.1f} GB of host memory" if ram else ""
    print(f"{where()} · {platform.system()} · {os.cpu_count()} CPU cores{host_memory}")
    for index, each in enumerate(cards):
        print(
            f"GPU {index}: {each.name} · {each.total / GB:.1f} GB{free if index == own else ''} · "
            f"compute capability {_dots(each)} · computes in {str(gpu.compute_dtype()).removeprefix('torch.')}"
        )
    if not cards:
        print("no CUDA GPU: computes in float32 on the CPU")
    print(" · ".join(f"{package} {number}" for package, number in versions().items()))


def _refused(preset: "presets.Preset") -> CannotRun | None:
    """What keeps the preset from being trained here."""
    card = gpu.card()
    try:
        if preset.quantization != "none":
            require("bitsandbytes")
        if preset.lora_rank:
            require("peft")
        if card is not None:
            check_fits(preset, card.total)
    except CannotRun as error:
        return error
    return None


def _verdict(preset: "presets.Preset", fetch: "Fetch | None") -> str:
    """Whether it can be trained here, and how soon there is something to see: one line."""
    title, gb = preset.title[:1].upper() + preset.title[1:], card_gb()
    if fetch is not None and fetch.too_large:
        return f"{title} does NOT fit on the disk: {fetch.missing:.1f} GB to fetch, and {fetch.free:.1f} GB are free."
    card = f", with at least {memory.floor_gb(preset):.1f} of the card's {gb:.1f} GB" if gb else ""
    if fetch is None:
        return f"{title} can be trained here{card}."
    minutes = fetch.minutes + fetch.load_minutes
    return f"{title} can be trained here{card}. Fetched ({fetch.missing:.1f} GB) and loaded in about {minutes} min."


@dataclass(frozen=True)
class Fetch:
    """What a checkpoint takes before it is here, GB: all of it, what is missing yet, and what the disk has free in
    `folder`, where the hub's client keeps it; `begun` says whether it was ever fetched. `str` is a line."""

    needed: float
    missing: float
    free: float
    folder: Path
    begun: bool

    @property
    def too_large(self) -> bool:
        """Whether the disk lacks room."""
        return self.free < self.missing

    @property
    def minutes(self) -> int:
        """At DOWNLOAD_MBIT."""
        return _minutes(self.missing * 8 * 1000 / DOWNLOAD_MBIT)

    @property
    def load_minutes(self) -> int:
        """At LOAD_GB_S."""
        return _minutes(self.needed / LOAD_GB_S)

    def __str__(self) -> str:
        line = f"download: {self.missing:.1f} GB, once, about {self.minutes} min at {DOWNLOAD_MBIT} Mbit/s"
        if not self.missing:
            return f"download: none, its {self.needed:.1f} GB are here already"
        if self.begun:
            line = f"download: {self.missing:.1f} GB, or less: some or all of it is here already"
        if not self.too_large:
            return f"{line} · {self.free:.1f} GB of disk free"
        remedy = "make room, or set HF_HOME to a larger disk"
        return f"{line} · only {self.free:.1f} GB of disk free in {self.folder}: {remedy}"


def there(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists: it is on the same disk, most likely."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _minutes(seconds: float) -> int:
    return round(seconds / 60) or (1 if seconds else 0)


def _fetch(preset: "presets.Preset") -> Fetch:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    folder = there(cache)
    needed = 2 * preset.architecture.parameters() / GB  # 16 bits a weight
    own = cache / f"models--{preset.hub_id.replace('/', '--')}"
    missing = needed - sum(file.stat().st_size for file in own.glob("blobs/*")) / GB
    missing = 0.0 if missing < needed / 50 else missing  # the rest is no weights
    return Fetch(needed, missing, shutil.disk_usage(folder).free / GB, folder, own.exists())


def needs_gpu(preset: "presets.Preset") -> bool:
    """Whether training this here would be hopelessly slow: a real model, and no GPU."""
    return not preset.smoke and preset.architecture.parameters() > 100e6 and gpu.card() is None


def warn_slow(what: str) -> None:
    """Warn that `what`, the start of a sentence, is slow without a GPU, and where to get one; in a notebook as a line,
    for a warning there shows a line of code."""
    text = (
        f"{what} on a CPU works but is hopelessly slow (minutes for one answer). {GET_A_GPU}; "
        'or take presets.get("workshop"), made for a CPU.'
    )
    if in_notebook():
        print(text)
    else:
        warnings.warn(text, stacklevel=3)


def _dots(card: gpu.Card) -> str:
    return ".".join(map(str, card.capability))


def _ram_bytes() -> int | None:
    """Host memory in bytes; None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
