"""Texts that do not fit the budget at their full length go on in stages: nothing but the number of steps may differ."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_models import make, prompts

from nbhelpers import kernels
from nbhelpers.engines import Sampling, scheduler
from nbhelpers.engines import graph as graph_module
from nbhelpers.engines.cuda_graphs import CHUNK, ModelRunner
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.memory import Room

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a token's K and V: layers, heads, D, fp32
LETTERS = SimpleNamespace(decode=lambda ids: "".join(chr(32 + i) for i in ids))


def same_size(n: int, length: int) -> list[list[int]]:
    return [[3 + (5 * i + 7 * j) % 90 for j in range(length)] for i in range(n)]


@pytest.fixture
def seen(monkeypatch):
    """What a generation did: (rows, slot's length) of its stages, their blocks' bytes, steps, and texts computed."""
    seen = SimpleNamespace(stages=[], blocks=[], steps=0, computed=[])
    allocate, run = graph_module.KVCache.allocate, graph_module.ModelRunner.run
    compute = graph_module.Scheduler._prefill

    def counted_allocate(self, rows, length, budget):
        allocate(self, rows, length, budget)
        seen.stages.append((rows, length))
        seen.blocks.append(self.data.untyped_storage().nbytes())
        assert rows * length * TOKEN <= seen.blocks[-1] <= budget and length % 16 == 0

    def counted_run(self, batch, steps, longest):
        seen.steps += steps
        return run(self, batch, steps, longest)

    def counted_compute(self, texts, rows):
        seen.computed += map(len, texts)
        return compute(self, texts, rows)

    monkeypatch.setattr(graph_module.KVCache, "allocate", counted_allocate)
    monkeypatch.setattr(graph_module.ModelRunner, "run", counted_run)
    monkeypatch.setattr(graph_module.Scheduler, "_prefill", counted_compute)
    monkeypatch.setattr(graph_module, "STAGE_TOKENS", 8)
    monkeypatch.setattr(scheduler, "STEP_TOKENS", 0)  # nobody takes turns
    return seen


CASES = {
    "plain": ("qwen2", {}),
    "early": ("qwen2", {"repetition_penalty": 1.3, "min_tokens": 35, "stop_ids": (5, 11, 17)}),
    "penalty": ("mistral", {"repetition_penalty": 1.5}),  # its layers look back 12 tokens
    "greedy": ("llama", {"temperature": 0.0, "repetition_penalty": 1.1}),
    "filters": ("phi3", {"top_p": 0.9, "top_k": 40, "min_tokens": 20, "stop_ids": (5, 11)}),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["cpu", "chunks"])
@pytest.mark.parametrize("case", CASES)
def test_any_budget_gives_the_same_completions(case, asynchronous, seen, monkeypatch):
    """chunks: as on a GPU, the host is a chunk behind, and rows are asked for tokens beyond their slot's end."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    name, how = CASES[case]
    model, texts = make(name), prompts(5, longest=20, seed=4)
    sampling = Sampling(max_tokens=70, num_generations=3, seed=2, **how)
    free = GraphEngine(model).generate(texts, sampling)
    ((_, full),) = seen.stages
    # stop strings that begin with the last token of a slot and end with the first one of the next stage
    ends = [(j, length - len(texts[j // 3])) for j, length in ((1, 32), (5, 48), (13, 64))]
    sampling = replace(
        sampling, stop_strings=tuple(LETTERS.decode(free[j].token_ids[end - 1 : end + 1]) for j, end in ends)
    )
    wanted = GraphEngine(model, LETTERS).generate(texts, sampling)
    assert {c.reason for c in wanted} == {"stop_string", "length"} | ({"stop_id"} if sampling.stop_ids else set())
    stages = []
    for rows in (1, 1.5, 2.9, 4.2, 7, 14.9):
        engine = GraphEngine(model, LETTERS, kv_bytes=int(rows * full * TOKEN))
        engine.generate([[3]], Sampling(max_tokens=1))
        engine._runner.asynchronous = asynchronous
        seen.stages.clear()
        for ours, theirs in zip(engine.generate(texts, sampling), wanted, strict=True):
            assert (ours.token_ids, ours.reason) == (theirs.token_ids, theirs.reason), rows
            torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)
        stages.append(len(seen.stages))
    assert min(stages) == 2 and max(stages) == 3


def test_eight_texts_of_which_2_9_fit_take_three_stages(seen):
    """8 rows, then 2 waves of 4, then 4 waves of 2, each only as long as its slots: not 4 waves of everything."""
    model, texts = make("qwen2", max_position_embeddings=512), same_size(8, 10)
    budget = int(2.9 * 336 * TOKEN)
    written = GraphEngine(model, kv_bytes=budget).generate(texts, Sampling(max_tokens=320, seed=1))
    assert all(len(completion.token_ids) == 320 for completion in written)
    assert seen.stages == [(8, 112), (4, 240), (2, 336)]
    # a wave's first token comes from the prompt's computation
    assert seen.steps == (112 - 10 - 1) + 2 * (240 - 112 - 1) + 4 * (330 - 240 - 1) < 0.6 * 4 * 319
    assert seen.computed == 8 * [10] + 8 * [112] + 8 * [240]
    assert seen.blocks[2] == seen.blocks[1] > 2 * 336 * TOKEN  # the larger block of the stage before serves again


def test_texts_that_end_early_are_not_computed_again(seen):
    model, texts = make("llama"), same_size(4, 12)
    engine = GraphEngine(model, kv_bytes=int(4.5 * 80 * TOKEN))
    written = engine.generate(texts, Sampling(max_tokens=64, num_generations=4, seed=3, stop_ids=(5, 11)))
    ends = [12 + len(completion.token_ids) for completion in written]
    computed, first = [], seen.stages[0][1]
    for _, length in seen.stages[:-1]:
        computed += sum(end > length for end in ends) * [length]
    assert seen.computed == 4 * [12] + computed  # in the first stage a group shares its prompt
    assert len(seen.stages) > 1 and 0 < sum(end > first for end in ends) < len(ends)


def test_what_fits_takes_one_stage(seen):
    """Also where the batch's next size does not fit: 9 texts take 10 rows, not 12."""
    model, texts = make("qwen2"), same_size(9, 10)
    GraphEngine(model, kv_bytes=10 * 48 * TOKEN).generate(texts, Sampling(max_tokens=32))
    GraphEngine(model, kv_bytes=100 * 48 * TOKEN).generate(texts, Sampling(max_tokens=32))
    assert seen.stages == [(10, 48), (12, 48)] and seen.steps == 2 * 31 and seen.computed == 2 * 9 * [10]


@pytest.mark.parametrize(
    "least, stages",
    [(22, [(8, 32), (4, 80), (3, 112)]), (23, [(4, 80), (3, 112)]), (70, [(4, 80), (3, 112)]), (71, [(3, 112)])],
)
def test_a_stage_that_brings_texts_too_little_on_is_left_out(least, stages, seen, monkeypatch):
    monkeypatch.setattr(graph_module, "STAGE_TOKENS", least)
    engine = GraphEngine(make("qwen2"), kv_bytes=3 * 112 * TOKEN)
    engine.generate(same_size(8, 10), Sampling(max_tokens=100))
    assert seen.stages == stages


def test_more_requests_than_rows_all_pass_each_stage(seen):
    model = make("qwen2")
    texts = [[3 + i % 90, *text] for i, text in enumerate(prompts(60, longest=12))]
    sampling = Sampling(max_tokens=64, seed=5, stop_ids=(5, 11))
    wanted = GraphEngine(model).generate(texts, sampling)
    seen.stages.clear()
    engine = GraphEngine(model, max_rows=7, kv_bytes=int(3.3 * 80 * TOKEN))
    assert [c.token_ids for c in engine.generate(texts, sampling)] == [c.token_ids for c in wanted]
    assert seen.stages == [(7, 32), (3, 80)]


def test_a_text_that_can_never_fit_is_refused_before_anything_is_written(seen):
    model, texts = make("qwen2"), same_size(8, 10)
    with pytest.raises(MemoryError, match=r"one text of 112 tokens needs 0\.00 GB for keys and values, and the budget"):
        GraphEngine(model, kv_bytes=112 * TOKEN - 1).generate(texts, Sampling(max_tokens=100))
    assert not seen.stages and not seen.computed


def test_memory_that_is_free_in_pieces_alone_makes_slots_shorter(seen, monkeypatch):
    model, texts = make("qwen2"), same_size(8, 10)
    sampling, allocate = Sampling(max_tokens=100, seed=6), graph_module.KVCache.allocate
    wanted = GraphEngine(model, kv_bytes=5 * 112 * TOKEN).generate(texts, sampling)

    def in_pieces(self, rows, length, budget):
        if rows * length * TOKEN > largest:
            raise torch.OutOfMemoryError
        allocate(self, rows, length, budget)

    monkeypatch.setattr(graph_module.KVCache, "allocate", in_pieces)
    engine, largest = GraphEngine(model, kv_bytes=5 * 112 * TOKEN), 4 * 112 * TOKEN
    seen.stages.clear()
    assert [c.token_ids for c in engine.generate(texts, sampling)] == [c.token_ids for c in wanted]
    assert seen.stages == [(8, 48), (4, 112)]  # of 7/8 of the budget
    largest = 112 * TOKEN - 1
    with pytest.raises(MemoryError, match="one text of 112 tokens"):
        engine.generate(texts, sampling)


def test_out_of_memory_in_the_middle_of_a_stage_loses_nothing(monkeypatch):
    model, texts, sampling = make("qwen2"), same_size(8, 10), Sampling(max_tokens=100, seed=6)
    wanted = GraphEngine(model).generate(texts, sampling)
    monkeypatch.setattr(scheduler, "STEP_TOKENS", 0)
    run, calls = graph_module.ModelRunner.run, []

    def short_of_memory(self, *arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise torch.OutOfMemoryError
        return run(self, *arguments)

    monkeypatch.setattr(graph_module.ModelRunner, "run", short_of_memory)
    got = GraphEngine(model).generate(texts, sampling)
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]
    # it went on where it was, with room for 7 texts: 29 steps and the one that failed; the long prompts gave a token
    # each, so 69 more steps of 7 rows, and 69 of the last
    assert len(calls) == 30 + 69 + 69


def test_the_default_budget(monkeypatch):
    """Of what is free, 0.7 or all but 0.8 GB; what torch has reserved and not in use counts as free."""
    state = {"free": 4.0, "reserved": 1.5, "allocated": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state["free"] * 1e9, 15e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: state["reserved"] * 1e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["allocated"] * 1e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    card = torch.device("cuda")
    assert Room(card).for_keys_and_values() == 3.7e9  # of 4.5
    assert Room(card, 3.5).for_keys_and_values() == 1.75e9  # of 2.5
    assert Room(card, 2.0).for_keys_and_values() == 0.7e9  # of 1.0
    assert Room(card, 0.5).for_keys_and_values() == 0


def test_long_texts_have_graphs_of_their_own_where_attention_is_cut_into_more_parts(monkeypatch):
    """And a short stage finds its own again. Of 64 rows attention has the same parts at any length."""
    pytest.importorskip("triton")
    decoder, captured = Decoder(make("qwen2")), []
    runner = ModelRunner(decoder, KVCache(decoder), 64)

    def capture(batch, longest):
        captured.append((batch, longest))
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(runner, "_capture", capture)
    runner.captures = True
    with kernels.use("triton"):
        for batch in (2, 64):
            for longest in (400, 16_384, 16_385, 20_000, 131_000, 16_384, 20_000):
                runner.run(batch, CHUNK, longest)
    assert captured == [(2, 400), (2, 16_385), (2, 131_000), (64, 400)]


@pytest.mark.parametrize("unlike", [0, 10])
@pytest.mark.parametrize("requests, rows", [(8, 5), (8, 7), (8, 3), (3, 2), (100, 64), (9, 8), (8, 4), (5, 8)])
def test_with_turns_all_rows_end_together(requests, rows, unlike):
    """As the scheduler takes them: a row that is left goes to the first that waits, and who comes again to the end."""
    left = [7000 - unlike * i for i in range(requests)]
    taken = scheduler.turns(left, [1] * requests, rows)
    waiting = [(first, n - first) for (_, first), n in sorted(zip(taken, left, strict=True), key=lambda one: one[0][0])]
    running, step, begun = [], 0, 0
    while waiting or running:
        while waiting and len(running) < rows:
            first, rest = waiting.pop(0)
            running.append((step + first, begun, rest))
            begun += 1
        step, _, rest = running.pop(running.index(min(running)))
        waiting += [(rest, 0)] if rest else []
    least = max(max(left), -(-sum(left) // rows))
    assert least <= step <= least * (1.07 if unlike else 1.001)
    assert begun - requests < rows and all(0 < first <= n for (_, first), n in zip(taken, left, strict=True))


def test_nobody_takes_turns_where_that_costs_more_than_it_wins():
    at_once = [(0, 4000)]
    assert scheduler.turns([4000] * 100, [4000] * 100, 64) == 100 * at_once  # 63 texts again, for 1,750 of 8,000 steps
    assert scheduler.turns([4000] * 100, [400] * 100, 64) != 100 * at_once
    assert scheduler.turns([4000] * 8, [9000] * 8, 4) == 8 * at_once  # two full waves
    assert scheduler.turns([4000] * 3, [9000] * 3, 4) == 3 * at_once


@pytest.mark.parametrize("asynchronous", [False, True], ids=["cpu", "chunks"])
@pytest.mark.parametrize("case", ["plain", "early", "penalty"])
def test_with_turns_the_same_tokens_take_fewer_steps(case, asynchronous, seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    name, how = CASES[case]
    how = {**how, "min_tokens": 150} if "stop_ids" in how else how
    model, texts = make(name, max_position_embeddings=512), same_size(8, 10)
    sampling, budget = Sampling(max_tokens=180, seed=1, **how), int(5.2 * 192 * TOKEN)
    written, steps = [], []
    for worth in (0, 100):
        monkeypatch.setattr(scheduler, "STEP_TOKENS", worth)
        engine = GraphEngine(model, kv_bytes=budget)
        engine.generate([[3]], Sampling(max_tokens=1))
        engine._runner.asynchronous = asynchronous
        seen.steps, seen.stages, seen.computed = 0, [], []
        written.append([(c.token_ids, c.reason) for c in engine.generate(texts, sampling)])
        steps.append(seen.steps)
    assert written[0] == written[1] and seen.stages == [(8, 112), (5, 192)]
    again = len(seen.computed) - 16
    assert again == 4 if "stop_ids" not in how else 0 < again <= 4
    if "stop_ids" not in how:  # 8 x 78 tokens in 5 rows are 125 steps; one after another they took 156
        assert steps[0] - steps[1] > (10 if asynchronous else 25)
