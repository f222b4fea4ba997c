"""docs/outgrow.md: its script for stock TRL runs as it stands, and its commands are ones that accelerate knows."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from nbhelpers import presets
from nbhelpers.models import smoke

PAGE = (Path(__file__).parents[2] / "docs" / "outgrow.md").read_text()
COMMANDS = re.findall(r"^!?(accelerate launch .*)$", PAGE, re.M)


def test_the_script_for_stock_trl_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    preset = presets.get("qwen2.5-32b")
    folder = smoke.make(preset.name, preset.architecture)
    small = replace(preset, hub_id=str(folder), num_generations=2, max_steps=1)
    monkeypatch.setattr(presets, "get", lambda name: small)
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    space = {"__name__": "split"}
    exec(compile(code, "split.py", "exec"), space)
    assert space["trainer"].state.global_step == 1
    assert (tmp_path / "runs/split/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_accelerate_knows_the_options(command):
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(shlex.split(command)[2:])
    assert given.training_script.endswith(".py") and given.num_processes >= 2
    assert given.use_fsdp == ("fsdp" in command) and (not given.use_fsdp or int(given.fsdp_version) == 2)


def test_there_are_three_commands():
    assert len(COMMANDS) == 3
