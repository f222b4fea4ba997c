"""GRPO on one small GPU: the helpers behind the notebooks.

Names are looked up on first use, so `import nbhelpers` costs milliseconds and torch is only imported when needed.
"""

import logging
import os
from importlib import import_module
from typing import Any

# Read when torch is first imported. Without it torch's CPU threads spin while they wait, and a second busy program
# (a browser, another notebook) makes every step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On some CPUs bitsandbytes warns, whenever it is imported, that it lacks a package which would look for a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.2.0"

_ROOMS = (
    "engines", "evaluate", "export", "kernels", "loader", "memory", "panel", "rewards", "session", "tasks",
    "grpo", "hands_on", "host", "install", "presets",
)  # fmt: skip
_MODULES = {room: room for room in _ROOMS} | {  # and the modules inside a room that the notebooks use
    "compare": "evaluate.compare",
    "hub": "loader.hub",
    "quantize": "models.quantize",
    "recipes": "presets.recipes",
    "replay": "panel.replay",
}
_NAMES = {"LeanGRPOConfig": "training.config", "LeanGRPOTrainer": "training.trainer"}
for _method, _file in {"RLOO": "rloo", "SFT": "sft", "OnlineDPO": "online_dpo", "PPO": "ppo"}.items():
    _NAMES |= {f"Lean{_method}{kind}": f"training.methods.{_file}" for kind in ("Config", "Trainer")}
_NAMES |= {"StopWhen": "training.stop_when", "Stage": "training.stages"}
__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"nbhelpers has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
