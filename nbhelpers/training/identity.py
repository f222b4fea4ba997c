"""Which run is it? What a checkpoint says about its run, and what has changed since: noticed by name.

Everything that decides a run's numbers is compared: model, data, chat template, the code of the rewards, the engine and
every setting that is not known to be of no consequence. Nothing but hashes of it is kept.
"""

import contextlib
import dis
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from nbhelpers.models import adapter

from . import checkpoint

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, TrainingArguments

# Arguments that may change in between; a line says so. Another card means another precision: then the run goes on, but
# not number for number. An evaluation draws random numbers, so its times count too.
FREE = ("max_steps", "num_train_epochs", "bf16", "fp16", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
        "per_device_eval_batch_size", "num_generations_eval")  # fmt: skip
# Arguments without consequence for the numbers: where and how often something is written or shown, who computes how.
# Whatever is not listed is compared, so that a setting that a later TRL brings is not forgotten.
WITHOUT = (
    "output_dir", "logging_", "log_", "save_", "hub_", "push_to_hub", "trackio_", "dataloader_", "ddp_", "fsdp",
    "deepspeed", "do_", "gradient_checkpointing", "activation_checkpointing", "torch_compile",
    "torch_empty_cache_steps", "tf32", "use_cpu", "use_liger_kernel", "liger_kernel_config", "use_cache",
    "bf16_full_eval", "fp16_full_eval", "auto_find_batch_size", "disable_tqdm", "report_to", "run_name", "project",
    "prediction_loss_only", "eval_", "include_for_metrics", "batch_eval_metrics", "enable_jit_checkpoint",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip",
    "restore_callback_states", "accelerator_config", "parallelism_config", "remove_unused_columns", "label_names",
    "debug", "skip_memory_metrics", "local_rank", "resume_from_checkpoint", "model_init_kwargs", "trust_remote_code",
    "num_completions_to_print", "vllm_server_", "vllm_group_port", "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode", "vllm_max_model_length", "ds3_gather_for_generation", "reward_seconds",
    "dataset_num_proc", "activation_offloading",
)  # fmt: skip
# What a stored rollout's shape depends on.
SHAPES = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
          "num_generations", "generation_batch_size", "processes")  # fmt: skip


class AnotherRun(ValueError):
    """The checkpoint is of another run; a notebook shows what differs and what to change, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def describe(
    model: "PreTrainedModel",
    args: "TrainingArguments",
    dataset: "Dataset | IterableDataset",
    rewards: Sequence[tuple[str, Any]],
    chat_template: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a checkpoint says about its run, as plain JSON: `model`, `data`, `rewards`, `fixed` and `free` arguments.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The one that is trained.
        args (`TrainingArguments`): The run's, a config of TRL's.
        dataset (`Dataset` or `IterableDataset`): The one it trains on.
        rewards (`Sequence[tuple[str, Any]]`): Name and function, or reward model, of each reward.
        chat_template (`str`, *optional*): The tokenizer's.
        more: What else makes it this run, by name, as JSON: the engine, for one.
    """
    trained = sorted((name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    base = adapter.base_of(model)
    config = model.config.to_dict()
    if base is None:  # a model that loader.load did not make
        shapes = {key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
        base = adapter.Base(str(model.config.name_or_path), _hash(shapes), "", "none")
    keys = ("r", "lora_alpha", "lora_dropout")
    loras = {name: [c.to_dict().get(key) for key in keys] for name, c in adapter.loras(model).items()}
    values = {name: value for name, value in args.to_dict().items() if name not in FREE}
    fixed = {name: value for name, value in values.items() if not name.startswith(WITHOUT)}
    dropout = {name: value for name, value in config.items() if "dropout" in name}
    run = {
        "model": {**asdict(base), "trained": _hash(trained), "lora (rank, alpha, dropout)": loras, "dropout": dropout},
        "data": {"rows": len(dataset) if hasattr(dataset, "__len__") else None, "hash": fingerprint(dataset)},
        "rewards": [[name, code_of(func)] for name, func in rewards],
        "fixed": fixed | {"processes": args.world_size, "chat_template": _hash(chat_template)} | more,
        "free": {name: value for name, value in args.to_dict().items() if name in FREE},
    }
    return json.loads(json.dumps(run, default=str))


def fingerprint(dataset: "Dataset | IterableDataset") -> str | None:
    """A hash of every row, in order: a second for 100,000 short ones. None for a stream, which has no number."""
    if not hasattr(dataset, "__len__"):
        return None
    digest = hashlib.sha256()
    for start in range(0, len(dataset), 1000):
        columns = dataset[start : start + 1000]  # {column: values of these rows}
        text = json.dumps(columns, sort_keys=True, default=str)
        digest.update(re.sub(r" at 0x[0-9A-Fa-f]+", "", text).encode())  # where an image stands in memory
    return digest.hexdigest()[:16]


def differences(saved: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What differs between two runs, each with the line to change; empty if they are the same run.

    Args:
        saved (`dict`), run (`dict`): From `describe`: the checkpoint's, and the one that wants to go on.
    """
    wrong = [why] if (why := other_model(saved, run)) else []
    if saved["data"] != run["data"]:
        wrong.append(f"the data set: {saved['data']['rows']} rows ({saved['data']['hash']}) there, "
                     f"{run['data']['rows']} ({run['data']['hash']}) here. Pass the same train_dataset")  # fmt: skip
    names, here = [name for name, _ in saved["rewards"]], [name for name, _ in run["rewards"]]
    if names != here:
        wrong.append(f"the rewards: reward_funcs=[{', '.join(names)}] there, [{', '.join(here)}] here")
    else:
        for (name, old), (_, new) in zip(saved["rewards"], run["rewards"], strict=True):
            python = [code.partition(":")[0] for code in (old, new)]
            if old != new and python[0] == python[1]:  # another Python compiles the same source differently
                wrong.append(f"the reward {name}: its code, or what it refers to, is not what it was. Put it back")
    for name, value in saved["fixed"].items():
        if name in run["fixed"] and value != run["fixed"][name]:
            wrong.append(f"{name}: {value!r} there, {run['fixed'][name]!r} here. Set {name}={value!r}")
    return wrong


def other_model(saved: dict[str, Any], run: dict[str, Any]) -> str | None:
    """How the model differs; None if it is the same. Its id may be a folder, which may move."""
    old, new = saved["model"], run["model"]
    differ = ", ".join(key for key in old if key != "id" and old[key] != new.get(key))
    if not differ:
        return None
    return (f"the model ({differ}): it was {old['id']} ({old['quantization']}) with the LoRA "
            f"{old['lora (rank, alpha, dropout)'] or 'none'}; here {new['id']} ({new['quantization']}), "
            f"{new['lora (rank, alpha, dropout)'] or 'none'}. Load that one with loader.load")  # fmt: skip


def refuse_other(folder: Path, run: dict[str, Any], anyway: bool = False) -> bool:
    """Print which of the FREE arguments changed between the run of a checkpoint and `run` (from `describe`).

    Args:
        folder (`Path`): The checkpoint.
        run (`dict`): From `describe`.
        anyway (`bool`): Print what else differs and go on. Another model is refused all the same.

    Returns whether the rollout in the checkpoint fits this run. Raises AnotherRun, naming each difference and the line
    to change, if they are not the same run.
    """
    saved = checkpoint.read(folder)["run"]
    wrong = differences(saved, run)
    lines = "".join(f"\n- {line}" for line in wrong)
    if wrong and anyway and not other_model(saved, run):
        print(f"Resuming although {folder} is of another run (resume_anyway=True):{lines}")
    elif wrong:
        raise AnotherRun(
            f"{folder} is a checkpoint of another run:{lines}\nFor a new run take a folder of its own, "
            f"output_dir={str(folder.parent) + '-2'!r} (OUT in a notebook), and load the model anew. To go on from "
            'here all the same: train(resume_from_checkpoint="auto", resume_anyway=True)'
        )
    for name, value in saved["free"].items():
        if name in run["free"] and value != run["free"][name]:
            print(f"{name} was {value} and is {run['free'][name]} from here on.")
    return all(saved["fixed"].get(name) == run["fixed"].get(name) for name in SHAPES)


def code_of(func: Any) -> str:
    """A hash of what a function does: its compiled code and its helpers', defaults, and the constants it refers to.

    The text before the colon is the Python that compiled it: another one compiles the same source differently. Lines,
    comments and docstrings do not count, nor does what the function may change while it runs: lists, dicts, names that
    it assigns to. Of an object that is no constant only the type counts.
    """
    return f"{sys.version_info.major}.{sys.version_info.minor}:{_hash(_seen(func, []))}"


def _seen(value: Any, known: list[Any]) -> Any:
    """A value as JSON that is the same in every process. `known` holds what is being looked at, against circles."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, re.Pattern)):
        return repr(value)
    if isinstance(value, tuple):
        return [_seen(item, known) for item in value]
    if isinstance(value, frozenset):
        return sorted(json.dumps(_seen(item, known)) for item in value)
    if any(value is one for one in known):
        return "again"
    known.append(value)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, value.co_varnames, _seen(value.co_consts, known)]
    if isinstance(value, functools.partial):
        keywords = sorted(value.keywords.items())
        return [_seen(value.func, known), _seen(value.args, known), [[k, _seen(v, known)] for k, v in keywords]]
    if inspect.ismethod(value):
        return [_seen(value.__func__, known), _seen_object(value.__self__, known)]
    if inspect.isfunction(value):
        return _seen_function(value, known)
    if callable(value) and inspect.isfunction(vars(type(value)).get("__call__")):
        return _seen_object(value, known)
    return type(value).__qualname__


def _seen_function(func: FunctionType, known: list[Any]) -> Any:
    code, room = func.__code__, func.__globals__
    consts = code.co_consts[1:] if func.__doc__ is not None else code.co_consts  # a docstring comes first
    package, assigned = _package(func), _assigned(code)
    used: dict[str, Any] = {name: room[name] for name in sorted(_names(code) & room.keys())}
    for name, cell in zip(code.co_freevars, func.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name that has no value yet
            used[f"({name})"] = cell.cell_contents
            assigned |= {f"({name})"} if name in assigned else set()
    around = [
        [name, _seen(value, known)]
        for name, value in used.items()
        if name not in assigned
        # its own helpers, not what others make
        and not (inspect.isfunction(value) and _package(value) != package)
    ]
    defaults = [_seen(func.__defaults__, known), sorted((func.__kwdefaults__ or {}).items())]
    return [code.co_code.hex(), code.co_names, code.co_varnames, _seen(consts, known), repr(defaults), around]


def _package(func: FunctionType) -> str:
    return (func.__module__ or "").partition(".")[0]  # None of what `exec` made in a room without a `__name__`


def _seen_object(value: Any, known: list[Any]) -> Any:
    """The methods of an object's own class, and of its attributes those that only `__init__` sets."""
    methods = {name: method for name, method in vars(type(value)).items() if inspect.isfunction(method)}
    changed = {name for key, method in methods.items() if key != "__init__" for name in _assigned(method.__code__)}
    state = vars(value) if hasattr(value, "__dict__") and isinstance(vars(value), dict) else {}
    kept = [[name, _seen(item, known)] for name, item in sorted(state.items()) if name not in changed]
    return [[[name, _seen(method, known)] for name, method in sorted(methods.items())], kept]


def _names(code: CodeType) -> set[str]:
    """The global names and attributes that a code, and the code within it, mentions."""
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))


def _assigned(code: CodeType) -> set[str]:
    """The names outside of itself, and the attributes, that a code assigns to."""
    stores = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")
    own = {step.argval for step in dis.get_instructions(code) if step.opname in stores}
    return own.union(*(_assigned(const) for const in code.co_consts if isinstance(const, CodeType)))


def _hash(value: Any) -> str:
    return checkpoint.hash_of(value)[:16]
