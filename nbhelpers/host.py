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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbhelpers import gpu, memory, presets
from nbhelpers.architecture import GB

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
    """Print GPU, memory, dtype, versions and place; with a preset, whether and how it runs here.

    Raises CannotRun when it cannot, with the remedy. Without a GPU a 4-bit preset is only warned about: it is
    hopelessly slow there, and it works.
    """
    cards, own = gpu.cards(), int(os.environ.get("LOCAL_RANK", 0))
    card = gpu.card(own)
    free = f", {gpu.free_bytes(own) / GB:.1f} free" if card else ""
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
    if preset is None:
        return
    if preset.quantization != "none":
        require("bitsandbytes")
    if preset.lora_rank:
        require("peft")
    if card is not None:
        check_fits(preset, card.total)
    elif needs_gpu(preset):
        warn_slow(preset.title)
    chosen = preset.on_card(card_gb())
    kind = "LoRA rank " + str(chosen.lora_rank) if chosen.lora_rank else "every weight trained"
    print(
        f"{chosen.title}{' (smoke: small and random)' if chosen.smoke else ''}: "
        f"{chosen.architecture.parameters() / 1e6:,.1f} M parameters · {chosen.quantization} · {kind} · "
        f"{chosen.num_generations} generations of {chosen.max_prompt_length} + {chosen.max_completion_length} tokens · "
        f"at least {memory.floor_gb(preset):.1f} GB"
    )
    if not chosen.smoke and not Path(chosen.hub_id).exists():
        print(_download(chosen))


def _download(preset: "presets.Preset") -> str:
    """What fetching the checkpoint takes, and whether there is room for it where the hub's client keeps it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
    needed, free = 2 * preset.architecture.parameters() / GB, shutil.disk_usage(folder).free / GB  # 16 bits a weight
    minutes = needed * 8 * 1000 / DOWNLOAD_MBIT / 60
    line = f"download: {needed:.1f} GB, once, about {max(1, round(minutes))} min at {DOWNLOAD_MBIT} Mbit/s"
    if (Path(HF_HUB_CACHE) / f"models--{preset.hub_id.replace('/', '--')}").exists():
        line = f"download: {needed:.1f} GB, or less: some or all of it is here already"
    if free < needed:
        return f"{line} · only {free:.1f} GB of disk free in {folder}: make room, or set HF_HOME to a larger disk"
    return f"{line} · {free:.1f} GB of disk free"


def needs_gpu(preset: "presets.Preset") -> bool:
    """Whether training this here would be hopelessly slow: a real model, and no GPU."""
    return not preset.smoke and preset.architecture.parameters() > 100e6 and gpu.card() is None


def warn_slow(what: str) -> None:
    """Warn that `what`, the start of a sentence, is slow without a GPU, and where to get one."""
    warnings.warn(
        f"{what} on a CPU works but is hopelessly slow (minutes for one answer). {GET_A_GPU}; "
        'or take presets.get("workshop"), made for a CPU.',
        stacklevel=3,
    )


def _dots(card: gpu.Card) -> str:
    return ".".join(map(str, card.capability))


def _ram_bytes() -> int | None:
    """Host memory in bytes; None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
