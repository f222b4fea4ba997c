"""What prompts took of a card goes back to the driver before steps are taken, and training's memory does not."""

from contextlib import nullcontext
from types import SimpleNamespace

import order
import pytest
import torch
from engine_models import make, prompts

from nbhelpers import kernels, presets
from nbhelpers.engines import Sampling, cuda_graphs
from nbhelpers.engines.cuda_graphs import ModelRunner
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.engines.scheduler import Scheduler
from nbhelpers.memory.room import BESIDE_BYTES

GPU = torch.device("cuda", 0)


def test_once_in_a_stage_behind_its_first_prompts(monkeypatch):
    calls = order.of_calls(monkeypatch, (Scheduler, "_prefill"), (ModelRunner, "hand_back"), (ModelRunner, "_step"))
    engine, texts = GraphEngine(make("qwen2"), max_rows=2), prompts(n=4, longest=9, seed=1)
    engine.generate(texts, Sampling(max_tokens=5, seed=0))
    assert calls.count("hand_back") == 1 and calls.count("_prefill") > 1
    assert set(calls[: calls.index("hand_back")]) == {"_prefill"}  # and no step


def test_not_where_no_step_follows(monkeypatch):
    """A first token alone is as quick as it was: the next prompts find their memory where these left it."""
    calls = order.of_calls(monkeypatch, (Scheduler, "_prefill"), (ModelRunner, "hand_back"))
    GraphEngine(make("qwen2")).generate(prompts(n=2, longest=9, seed=1), Sampling(max_tokens=1, seed=0))
    assert calls == ["_prefill"]


@pytest.mark.parametrize(("idle", "wanted"), [(BESIDE_BYTES, ["free_scratch", "empty_cache"]), (BESIDE_BYTES + 1, [])])
def test_a_training_steps_memory_is_kept(idle, wanted, monkeypatch):
    decoder = Decoder(make("qwen2"))
    runner = ModelRunner(decoder, KVCache(decoder), 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5e9 + idle)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5e9)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    calls = order.of_calls(monkeypatch, (kernels, "free_scratch"), (torch.cuda, "empty_cache"))
    runner.hand_back()
    assert calls == []  # on a CPU nothing
    runner.state = SimpleNamespace(device=GPU)
    runner.hand_back()
    assert calls == wanted


def test_the_buffer_for_dequantised_weights_is_of_one_device():
    pytest.importorskip("triton")
    from nbhelpers.kernels.triton import free_scratch
    from nbhelpers.kernels.triton.lora_linear import _scratch, scratch

    cpu = torch.device("cpu")
    first = scratch((4, 8), torch.float32, cpu)
    assert scratch((2, 8), torch.float32, cpu).data_ptr() == first.data_ptr()
    free_scratch(GPU)
    assert (cpu, torch.float32) in _scratch
    kernels.free_scratch(cpu)
    assert (cpu, torch.float32) not in _scratch


class Graph:
    """A CUDA graph that notes what happens between its begin and its end."""

    def __init__(self, calls):
        self.calls = calls

    def capture_begin(self, **_):
        self.calls.append("begin")

    def capture_end(self):
        self.calls.append("end")


@pytest.mark.parametrize("largest", [True, False])
def test_a_graph_has_the_only_copy_of_what_a_step_takes(largest, monkeypatch):
    """The first step's memory belongs to its stream: 23 MB with 8 rows and 134 MB with 128, which nothing else used.
    In the graph room for the logits comes first: beside the layers' it was 50 MB more with 128 rows."""
    decoder = Decoder(make("qwen2"))
    decoder.logits_are_largest = largest
    runner, calls, sizes = ModelRunner(decoder, KVCache(decoder), 2), [], []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(cuda_graphs, "_capture_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(calls))
    monkeypatch.setattr(runner, "_step", lambda batch, longest: calls.append("step"))
    monkeypatch.setattr(runner, "hand_back", lambda: calls.append("hand back"))
    empty = torch.empty

    def noted(*shape, **more):
        calls.append("room")
        sizes.append((*shape, more["dtype"]))
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", noted)
    runner._capture(2, 16)
    assert calls == ["step", "hand back", "begin", *["room"] * largest, "step", "end"]
    assert sizes == [(2, decoder.vocabulary, torch.float32)] * largest


@pytest.mark.parametrize(("name", "largest"), [("qwen2.5-1.5b", True), ("llama-3.1-8b", True), ("phi-4", False)])
def test_which_logits_are_a_steps_largest_tensor(name, largest):
    """Of 128 rows: 78 MB beside 28 in three parts, 66 beside 15, and 51 beside 92 in five."""
    a = presets.get(name).architecture
    model = make("phi3" if name == "phi-4" else "qwen2" if name.startswith("qwen") else "llama")
    model.config.intermediate_size = a.intermediate_size
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(a.vocab_size, 1, device="meta"))
    assert Decoder(model).logits_are_largest == largest
