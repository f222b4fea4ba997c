from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_models import ARCHITECTURES, by_forward, by_generate, make, prompts

from nbhelpers.engines import Sampling, choose
from nbhelpers.engines import graph as graph_module
from nbhelpers.engines.cuda_graphs import CHUNK, ModelRunner
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.memory import kv
from nbhelpers.models import patch

GREEDY = Sampling(max_tokens=24, temperature=0.0)
STOPS = (5, 11, 17, 23, 29, 31, 37, 41, 43, 47)  # a tenth of the words: stops are mixed


def tokens(completions):
    return [completion.token_ids for completion in completions]


# ---- the same tokens as transformers, the same probabilities as training ----


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["32bit", "4bit"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name, four_bit, lora):
    model, texts = make(name, four_bit=four_bit, lora=lora), prompts()
    engine = GraphEngine(model)
    written = tokens(engine.generate(texts, GREEDY))
    assert written == [by_generate(model, text, 24) for text in texts] and len(set(map(tuple, written))) > 3
    stops = (written[0][9], written[1][4])
    stopped = engine.generate(texts, replace(GREEDY, stop_ids=stops))
    for text, completion in zip(texts, stopped, strict=True):
        wanted = by_generate(model, text, 24, stops)
        assert completion.token_ids == wanted
        assert completion.reason == ("stop_id" if wanted[-1] in stops else "length")
    assert len({len(completion.token_ids) for completion in stopped}) > 1


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_in_16_bits_equals_generate_up_to_near_ties(name, dtype, four_bit):
    """In 16 bits two roads round differently: where they part, transformers must hold both words for all but equal."""
    model, texts, same = make(name, four_bit=four_bit, dtype=dtype), prompts(), 0
    for text, completion in zip(texts, GraphEngine(model).generate(texts, GREEDY), strict=True):
        wanted = by_generate(model, text, 24)
        same += completion.token_ids == wanted
        fork = next((i for i, (a, b) in enumerate(zip(completion.token_ids, wanted, strict=True)) if a != b), None)
        if fork is not None:
            ours, theirs = (
                by_forward(model, text, [*wanted[:fork], token])[-1]
                for token in (completion.token_ids[fork], wanted[fork])
            )
            assert theirs - ours < (0.2 if dtype == torch.bfloat16 else 0.02)
    assert same


@pytest.mark.parametrize("four_bit", [False, True], ids=["16bit", "4bit"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_the_training_forward(name, four_bit):
    model, texts = make(name, four_bit=four_bit), prompts()
    sampling = Sampling(max_tokens=24, num_generations=2, temperature=0.8, seed=1)
    for i, completion in enumerate(GraphEngine(model).generate(texts, sampling)):
        wanted = by_forward(model, texts[i // 2], completion.token_ids, 0.8)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)


def test_with_the_fused_kernels_patched_in_too():
    model, texts = make("llama"), prompts()
    wanted = tokens(GraphEngine(model).generate(texts, GREEDY))
    patch.with_kernels(model)
    assert tokens(GraphEngine(model).generate(texts, GREEDY)) == wanted


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_long_prompts_go_in_chunks(name, monkeypatch):
    model, texts = make(name), prompts(n=5, longest=60, seed=3)
    wanted = tokens(GraphEngine(model).generate(texts, GREEDY))
    calls, hidden = [], graph_module.Decoder.hidden

    def counted(self, ids, *rest):
        calls.append(ids.shape)
        return hidden(self, ids, *rest)

    monkeypatch.setattr(graph_module.Decoder, "hidden", counted)
    monkeypatch.setattr(kv, "PREFILL_BYTES", 0)  # 16 tokens at once
    assert tokens(GraphEngine(model).generate(texts, GREEDY)) == wanted
    assert max(rows * width for rows, width in calls) <= 16 and max(map(len, texts)) > 32


# ---- adapters, and what training does to them ----


def test_an_adapter_that_is_off_or_merged_is_respected():
    model, texts = make("qwen2"), prompts()
    engine = GraphEngine(model)
    on = tokens(engine.generate(texts, GREEDY))
    with model.disable_adapter():
        off = tokens(engine.generate(texts, GREEDY))
        assert off == [by_generate(model, text, 24) for text in texts] and off != on
    assert tokens(engine.generate(texts, GREEDY)) == on
    model.merge_adapter()
    assert tokens(engine.generate(texts, GREEDY)) == on
    model.unmerge_adapter()
    model.base_model.model.model.layers[0].mlp.down_proj.scaling["default"] = 40.0
    scaled = tokens(engine.generate(texts, GREEDY))
    assert scaled == [by_generate(model, text, 24) for text in texts] and scaled != on


@pytest.mark.parametrize("lora", [False, True], ids=["every weight", "lora"])
def test_an_optimizer_step_changes_the_next_generation(lora):
    model, texts = make("qwen2", lora=lora), prompts()
    if not lora:
        model.requires_grad_(True)
    engine = GraphEngine(model)
    before = tokens(engine.generate(texts, GREEDY))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([texts[0] * 3])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model.training
    after = tokens(engine.generate(texts, GREEDY))
    assert model.training and all(module.training for module in model.modules())
    assert after == [by_generate(model.eval(), text, 24) for text in texts] and after != before


def test_dropout_of_the_adapter_does_not_reach_generation():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("qwen2", lora=False), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    texts = prompts()
    wanted = [by_generate(model.eval(), text, 24) for text in texts]
    assert tokens(GraphEngine(model.train()).generate(texts, GREEDY)) == wanted


def test_layers_that_are_not_plain_run_their_own_forward():
    model, texts, seen = make("qwen2"), prompts(), []
    model.base_model.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    assert tokens(GraphEngine(model).generate(texts, GREEDY)) == [by_generate(model, text, 24) for text in texts]
    assert seen


# ---- the graphs ----


@torch.no_grad()
def test_a_smaller_batch_is_captured_after_a_full_chunk(monkeypatch):
    """A capture makes a step before it records one: the chunk before must not have left the ring's place behind it."""
    decoder = Decoder(make("qwen2"))
    cache = KVCache(decoder)
    runner = ModelRunner(decoder, cache, rows=2)
    cache.allocate(2, 32, 10**9)
    captured = []

    def capture(self, batch, longest):
        captured.append(batch)
        self._step(batch, longest)  # as on a GPU
        return SimpleNamespace(replay=lambda: self._step(batch, 32))

    monkeypatch.setattr(ModelRunner, "_capture", capture)
    runner.captures = True
    assert runner.run(2, CHUNK, 32)[0].shape == (CHUNK, 2)
    assert runner.run(1, 3, 32)[0].shape == (3, 1)
    assert captured == [2, 1] and runner.tick.item() == 3


def test_after_memory_ran_out_in_a_capture_the_next_one_has_a_new_pool(monkeypatch):
    """As it was seen on a GPU: torch captures nothing into a pool whose graphs are all gone, and ends the run."""
    decoder = Decoder(make("llama"))
    runner = ModelRunner(decoder, KVCache(decoder), 2)
    handles = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    runner.captures, runner._pool, captured = True, next(handles), []

    def capture(batch, longest):
        captured.append(runner._pool)
        if len(captured) == 1:
            raise torch.OutOfMemoryError
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(runner, "_capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        runner.run(2, 1, 4)
    runner.run(2, 1, 4)
    runner.run(1, 1, 4)
    assert captured == [0, 1, 1] and runner._pool == 1


def test_a_model_that_changed_its_precision_gets_a_cache_of_its_own():
    model, texts = make("llama", lora=False), prompts()
    engine = GraphEngine(model)
    engine.generate(texts, GREEDY)
    model.to(torch.bfloat16)
    assert tokens(engine.generate(texts, GREEDY)) == tokens(GraphEngine(model).generate(texts, GREEDY))
    assert engine._runner.cache.dtype == torch.bfloat16


def test_every_tensor_that_a_graph_reads_is_watched():
    model = make("qwen2")
    before, inner = Decoder(model).addresses(), model.get_base_model().model
    assert Decoder(model).addresses() == before
    for module in (inner.norm, inner.layers[1].input_layernorm, inner.embed_tokens):
        old = module.weight.data
        module.weight.data = old.clone()
        assert Decoder(model).addresses() != before, module
        module.weight.data = old


# ---- the batch around a request ----


def test_a_seeded_request_is_the_same_alone_and_among_32():
    model, texts = make("qwen2"), prompts(32)
    seeds = [1000 + i for i in range(32)]
    sampling = {"max_tokens": 24, "temperature": 1.0, "stop_ids": STOPS}
    among = GraphEngine(model).generate(texts, Sampling(**sampling, seed=seeds))
    for i in range(32):
        (alone,) = GraphEngine(model).generate([texts[i]], Sampling(**sampling, seed=[seeds[i]]))
        assert alone.token_ids == among[i].token_ids and alone.reason == among[i].reason
    other = GraphEngine(model).generate(texts, Sampling(**sampling, seed=seeds[::-1]))
    assert tokens(other) != tokens(among)


def test_one_seed_repeats_a_call_and_the_group_differs():
    model, texts = make("qwen2"), prompts(3)
    runs = []
    for seed in (1, 1, 2, None, None):
        torch.manual_seed(7)  # what None draws its seed from
        sampling = Sampling(max_tokens=12, num_generations=8, seed=seed)
        runs.append(tokens(GraphEngine(model).generate(texts, sampling)))
    assert runs[0] == runs[1] != runs[2] and runs[3] == runs[4]
    assert all(len(set(map(tuple, runs[0][8 * i : 8 * i + 8]))) == 8 for i in range(3))


def test_a_prompt_is_computed_once_for_its_group(monkeypatch):
    model, texts, computed = make("qwen2"), prompts(4), []
    hidden = graph_module.Decoder.hidden

    def counted(self, ids, *rest):
        if ids.shape[1] > 1:
            computed.extend(row[0] for row in ids.tolist())
        return hidden(self, ids, *rest)

    monkeypatch.setattr(graph_module.Decoder, "hidden", counted)
    texts = [[i + 3, *text, 9] for i, text in enumerate(texts)]
    engine = GraphEngine(model, max_rows=5)  # less than a group of 6: its members come at different times
    written = engine.generate(texts, Sampling(max_tokens=9, num_generations=6, seed=4, stop_ids=STOPS))
    assert sorted(computed) == [3, 4, 5, 6]
    wide = GraphEngine(model).generate(texts, Sampling(max_tokens=9, num_generations=6, seed=4, stop_ids=STOPS))
    assert tokens(written) == tokens(wide)


def test_nothing_is_lost_or_mixed_up_over_2000_requests_through_7_rows():
    model = make("qwen2", layers=1, hidden_size=32, intermediate_size=32)
    texts = prompts(40, longest=12)
    order = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(5)).tolist()
    seeds = [i % 50 for i in range(2000)]
    sampling = {"max_tokens": 16, "stop_ids": STOPS}
    engine = GraphEngine(model, max_rows=7)
    written = engine.generate([texts[i] for i in order], Sampling(**sampling, seed=seeds))
    assert engine._runner.state.shape[1] == 7 and engine._runner.cache.data is None
    lengths = [len(completion.token_ids) for completion in written]
    assert set(lengths) >= set(range(1, 17))
    # every (prompt, seed) on its own, another engine's way
    pairs = sorted(set(zip(order, seeds, strict=True)))
    alone = HFEngine(model, batch_size=500).generate(
        [texts[i] for i, _ in pairs], Sampling(**sampling, seed=[seed for _, seed in pairs])
    )
    wanted = dict(zip(pairs, tokens(alone), strict=True))
    wrong = [j for j, pair in enumerate(zip(order, seeds, strict=True)) if written[j].token_ids != wanted[pair]]
    assert not wrong


def test_short_texts_after_long_ones_with_a_row_empty():
    """Three rows take a batch of four; the fourth must not write where the longer call before left it."""
    model = make("llama")
    engine = GraphEngine(model)
    long = [[1 + i % 50 for i in range(90 + 3 * j)] for j in range(4)]
    engine.generate(long, GREEDY)
    short = prompts()[:3]
    assert tokens(engine.generate(short, GREEDY)) == [by_generate(model, text, 24) for text in short]


def test_a_small_budget_makes_waves_and_too_small_a_one_says_so():
    model, texts = make("qwen2"), prompts(12)
    wanted = tokens(GraphEngine(model).generate(texts, GREEDY))
    row = 48 * 2 * 2 * 2 * 16 * 4  # tokens (44 rounded up), K and V, layers, heads, D, bytes
    tight = GraphEngine(model, kv_bytes=3 * row + 5)
    rows, allocate = [], graph_module.KVCache.allocate

    def counted(self, count, length, budget):
        rows.append((count, length))
        allocate(self, count, length, budget)
        assert self.data.nbytes <= 3 * row

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graph_module.KVCache, "allocate", counted)
        assert tokens(tight.generate(texts, GREEDY)) == wanted
    assert rows == [(3, 48)]
    with pytest.raises(MemoryError, match="one text of 48 tokens needs"):
        GraphEngine(model, kv_bytes=row - 1).generate(texts, GREEDY)


def test_the_cache_is_handed_back_after_an_error_too(monkeypatch):
    engine = GraphEngine(make("qwen2"))
    monkeypatch.setattr(graph_module.Scheduler, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([[3, 4]], GREEDY)
    assert engine._runner.cache.data is None


# ---- refusals and the choice ----


def test_what_it_cannot_decode_is_named_and_auto_takes_generate(capsys):
    from transformers import AutoModelForCausalLM, GPT2Config

    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, n_positions=64))
    with pytest.raises(
        ValueError, match=r"cannot decode this model: GPT2LMHeadModel is not one of Qwen2ForCausalLM, .*hf"
    ):
        choose("graph", other)
    engine = choose("auto", other.eval())
    assert engine.name == "hf" and "engine hf: GPT2LMHeadModel is not one of" in capsys.readouterr().out
    assert tokens(engine.generate([[3, 4]], GREEDY)) == [by_generate(other, [3, 4], 24)]
    for sizes, why in (({"hidden_act": "gelu"}, "gelu, not silu"), ({"rope_parameters": DYNAMIC}, "dynamic")):
        with pytest.raises(ValueError, match=why):
            GraphEngine(make("llama", lora=False, **sizes))
    assert choose("auto", make("phi3")).name == "graph"
    assert "engine graph: reads phi3's training weights, plain PyTorch on the CPU" in capsys.readouterr().out
    assert choose(engine, other) is engine
    with pytest.raises(ValueError, match="engine='vlmm': it is one of auto, graph, vllm, hf"):
        choose("vlmm", other)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
