"""What the machine is told to be: the GPUs are made up, so that every card can be tried here."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from nbhelpers import gpu, host, presets
from nbhelpers.gpu import Card
from nbhelpers.host import CannotRun

T4 = Card("Tesla T4", 15_828_320_256, (7, 5))
A100 = Card("NVIDIA A100-SXM4-40GB", 42_298_834_944, (8, 0))
OLD = Card("GeForce GTX 1650", 4_100_000_000, (7, 5))


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def use(*cards):
        monkeypatch.setattr(gpu, "cards", lambda: list(cards))
        monkeypatch.setattr(gpu, "free_bytes", lambda index: cards[index].total - 10**9)

    use()
    return use


def test_the_dtype_is_the_one_the_card_really_has(gpus):
    assert gpu.compute_dtype() is torch.float32
    gpus(T4)
    assert gpu.compute_dtype() is torch.float16  # never an emulated bf16
    gpus(A100)
    assert gpu.compute_dtype() is torch.bfloat16


def test_each_rank_has_its_own_card(gpus, monkeypatch):
    gpus(T4, A100)
    assert gpu.card() == T4 and gpu.device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpu.card() == A100 and gpu.device() == torch.device("cuda", 1)
    gpus()
    assert gpu.card() is None and gpu.device() == torch.device("cpu")


def test_report_names_everything(gpus, capsys):
    gpus(T4, T4)
    host.report(presets.get("llama-3.1-8b"))
    out = capsys.readouterr().out
    for part in (
        "GPU 1: Tesla T4",
        "15.8 GB, 14.8 free",
        "GPU 1: Tesla T4 · 15.8 GB ·",
        "7.5",
        "float16",
        "torch 2.",
        "nf4",
        "LoRA rank 16",
        "768 tokens",
    ):
        assert part in out, part


def test_report_without_a_gpu_warns_and_goes_on(gpus, capsys, monkeypatch):
    with pytest.warns(UserWarning, match=r"hopelessly slow.*T4 GPU.*workshop"):
        host.report(presets.get("qwen2.5-1.5b"))
    assert "no CUDA GPU" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.report(presets.get("workshop"))
        monkeypatch.setenv("NBHELPERS_SMOKE", "1")
        host.report(presets.get("phi-4"))
    assert "every weight trained" in capsys.readouterr().out


def test_a_small_card_is_told_by_how_much(gpus):
    gpus(OLD)
    with pytest.raises(CannotRun, match=r"phi-4 needs at least 10\.\d GB .* has 4\.1 GB: 6\.\d GB too little") as error:
        host.report(presets.get("phi-4"))
    assert "qwen2.5-1.5b" in str(error.value) and "mistral" not in str(error.value)
    with pytest.raises(CannotRun, match="take a larger card"):
        host.check_fits(presets.get("phi-4"), 0.2e9)


def test_require(gpus, monkeypatch):
    host.require("torch")
    with pytest.raises(CannotRun, match=r"nothing-like-it is not installed. In a notebook cell: %pip install nothing"):
        host.require("nothing-like-it")
    with pytest.raises(CannotRun, match=r'no CUDA GPU.*engine="graph"'):
        host.require("vllm")
    gpus(T4)
    with pytest.raises(CannotRun, match=r"Tesla T4 \(compute capability 7\.5\)"):
        host.require("vllm")
    gpus(A100)
    if "vllm" not in host.versions():
        with pytest.raises(CannotRun, match=r"%pip install -r requirements-vllm.txt"):
            host.require("vllm")


def test_versions_import_nothing():
    found = host.versions()
    # a build's own part of the version, "+cu128", is in one of the two or in both
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and "bitsandbytes" in found
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_where(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    assert host.where() == "local"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert host.where() == "Kaggle"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert host.where() == "Colab"


def test_blocks_grow_unless_the_user_says_how_to_allocate(monkeypatch):
    for name in gpu.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    said = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    gpu.grow_blocks()
    assert said == []  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
        gpu.grow_blocks()
    assert said == []
    monkeypatch.setattr(host.os, "environ", dict(host.os.environ))
    gpu.grow_blocks()
    gpu.grow_blocks(False)
    gpu.grow_blocks()  # vLLM is there already
    assert said == ["expandable_segments:True", "expandable_segments:False"]


def test_a_report_says_what_the_download_takes_before_it_begins(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    free = {"GB": 78.0}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=int(free["GB"] * 1e9)))
    preset = presets.get("qwen2.5-1.5b")

    def said() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host.report(preset)
        return capsys.readouterr().out.splitlines()[-1]

    assert said() == "download: 3.1 GB, once, about 1 min at 400 Mbit/s · 78.0 GB of disk free"
    free["GB"] = 2.0
    assert f"only 2.0 GB of disk free in {tmp_path}: make room, or set HF_HOME" in said()
    (tmp_path / "not" / "yet" / "models--Qwen--Qwen2.5-1.5B-Instruct").mkdir(parents=True)
    assert said().startswith("download: 3.1 GB, or less: some or all of it is here already")
    host.report(presets.get("workshop"))
    assert "download" not in capsys.readouterr().out  # it comes with the package


def test_the_verdict_comes_first(gpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    free = {"GB": 78.0}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=int(free["GB"] * 1e9)))

    def lines(name: str) -> list[str]:
        host.report(presets.get(name))
        return capsys.readouterr().out.splitlines()

    gpus(T4)
    first, *others = lines("llama-3.1-8b")
    assert first.startswith("Llama 3.1 8B Instruct can be trained here, with at least ") and "15.8 GB" in first
    assert first.endswith("Fetched (16.1 GB) and loaded in about 6 min.")
    assert others[-2] == "load: about 1 min, read at 0.3 GB/s and packed on the way" and "about 5 min" in others[-1]
    free["GB"] = 9.0
    first, *others = lines("llama-3.1-8b")
    assert first == "Llama 3.1 8B Instruct does NOT fit on the disk: 16.1 GB to fetch, and 9.0 GB are free."
    assert "make room, or set HF_HOME" in others[-1]
    gpus(OLD)
    with pytest.raises(CannotRun, match="too little"):
        lines("phi-4")
    assert capsys.readouterr().out.splitlines()[0] == "Phi-4 14B cannot be trained here."
    gpus()
    assert lines("workshop")[0] == "The workshop model can be trained here."


def test_what_is_here_already_needs_no_room(gpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=int(0.5e9)))
    gpus(T4)
    blobs = tmp_path / "models--Qwen--Qwen2.5-0.5B-Instruct" / "blobs"
    blobs.mkdir(parents=True)
    for size, begins, ends in (
        (600_000_000, "Qwen2.5 0.5B Instruct can be trained", "download: 0.4 GB, or less: some or all of it is here"),
        (990_000_000, "Qwen2.5 0.5B Instruct can be trained", "download: none, its 1.0 GB are here already"),
    ):
        with open(blobs / "weights", "wb") as file:
            file.truncate(size)  # no bytes on the disk
        host.report(presets.get("qwen2.5-0.5b"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(begins) and lines[-1].startswith(ends), lines


def test_in_a_notebook_slow_is_a_line_and_no_warning(gpus, capsys, monkeypatch):
    monkeypatch.setattr(host, "in_notebook", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.report(presets.get("qwen2.5-1.5b"))
    assert "hopelessly slow (minutes for one answer). On Colab" in capsys.readouterr().out.splitlines()[0]


def test_what_cannot_run_is_said_without_a_traceback():
    error = host.CannotRun("too little memory: take a smaller one")
    assert error._render_traceback_() == ["too little memory: take a smaller one"]


def test_a_session_that_is_ended_by_its_host(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert host.session_left() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    began = host.time.time() - 3 * 3600
    monkeypatch.setattr("psutil.Process", lambda pid: SimpleNamespace(create_time=lambda: began))
    assert host.session_left() == pytest.approx(9 * 3600, abs=60)
