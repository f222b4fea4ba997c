"""What the benchmarks share: a T4 played in one place, children that start in the root, the command."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, harness
from nbhelpers import gpu


@pytest.fixture
def a_played_t4(monkeypatch):
    """An H200 that plays a T4, on a machine that has neither."""
    real = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 10**9, major=9, minor=0, multi_processor_count=132)
    triton = SimpleNamespace(active=SimpleNamespace())
    triton.active.get_current_target = lambda: torch.cuda.get_device_capability(0)
    monkeypatch.setattr("triton.runtime.driver", triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: real)
    for switch in ("enable_flash_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, switch, lambda enabled: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:8")
    gpu.capability.cache_clear()
    harness.play_t4()
    yield triton
    gpu.capability.cache_clear()


def test_all_who_ask_hear_of_a_t4(a_played_t4):
    card = gpu.card(1)
    assert card is not None and card.capability == (7, 5) and card.name.startswith("Tesla T4")
    assert gpu.capability(torch.device("cuda", 0)) == torch.cuda.get_device_capability(0) == (7, 5)
    assert gpu.compute_dtype() == torch.float16


def test_triton_compiles_for_the_card_that_is_there(a_played_t4):
    assert a_played_t4.active.get_current_target() == (9, 0)
    properties = torch.cuda.get_device_properties(0)
    assert properties.multi_processor_count == 132 and properties.total_memory == 141 * 10**9


@pytest.mark.parametrize("script, called", [
    ("benchmarks/engines/__main__.py", "-m benchmarks.engines"), ("benchmarks/loader.py", "-m benchmarks.loader"),
    ("-c", "-c"),
])  # fmt: skip
def test_the_command_is_one_to_type(monkeypatch, script, called):
    monkeypatch.setattr(sys, "argv", [str(common.ROOT / script), "--quick", "--models", "phi-4"])
    assert common.command() == f"python {called} --quick --models phi-4"


def test_a_child_starts_in_the_root_and_says_how_it_ended(tmp_path, monkeypatch):
    """benchmarks/ itself on the path would give transformers benchmarks/kernels for the hub package of that name."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "told.py").write_text(
        "import json, os, sys\njob = json.loads(sys.argv[2])\n"
        "json.dump([os.getcwd(), sys.path], open(job['out'], 'w'))\nsys.exit(job['code'])"
    )
    (folder / "sleeps.py").write_text("import time\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.json"
    assert harness.run_child("told", {"out": str(out), "code": 3}, 60, environment) == 3
    place, path = json.loads(out.read_text())
    assert place == str(common.ROOT) and str(common.ROOT / "benchmarks") not in path
    assert harness.run_child("sleeps", {}, 1, environment) == "more than 1 s"


def test_rows_of_a_child_that_wrote_none(tmp_path):
    assert harness.read_rows(tmp_path / "rows") == []
    rows = [common.row("a/b", "ours", 1.5, "s", note="x"), common.row("a/c", "ours", 2.0, "s")]
    for row in rows:
        harness.append_row(row, tmp_path / "rows")
    assert harness.read_rows(tmp_path / "rows") == rows


def test_a_run_that_was_kept_from_the_card_does_not_say_that_it_had_one(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100, 580.1\nNVIDIA H100, 580.1\n")
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **__: said)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.host() | {"gpu": "NVIDIA H100", "gpus": 2, "driver": "580.1"} == common.host()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not {"gpu", "gpus", "driver", "cuda"} & common.host().keys()
