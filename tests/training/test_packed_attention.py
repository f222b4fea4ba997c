"""Attention of a micro-batch that is one sequence: SDPA's own choice, where it was timed to be quicker, and right."""

import time

import pytest
import torch
from step_cases import difference, make_model, rollout, through

from nbhelpers.training import packed_attention
from nbhelpers.training.packing import pack, unpad

CPU, SCALE = torch.device("cpu"), 0.3


def inputs(rows: int = 1, tokens: int = 30, kv_heads: int = 2):
    """q, k, v that want gradients, and how they are packed."""
    ids = torch.arange(rows * tokens).view(rows, tokens)  # prompts differ: nothing is shared
    ones = torch.ones_like(ids)
    batch = unpad(ids[:, :5], ones[:, :5], ids[:, 5:], ones[:, 5:])
    packed = pack(batch, batch.rows, CPU)
    generator, total = torch.Generator().manual_seed(0), packed.ids.shape[1]
    q, k, v = (torch.randn(total, heads, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    return [t.requires_grad_() for t in (q, k, v)], packed


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_one_sequence_through_sdpa_gives_what_rows_gives(kv_heads):
    leaves, packed = inputs(kv_heads=kv_heads)
    results = []
    for way in (packed_attention._rows, packed_attention._single):
        out = way(*leaves, packed, SCALE)
        results.append([out, *torch.autograd.grad((out**2).sum(), leaves)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "long", "quicker", "way"),
    [(1, 29, True, "_single"), (1, 29, False, "_varlen"), (2, 29, True, "_varlen"), (1, 30, True, "_varlen")],
)
def test_sdpa_serves_one_long_sequence_where_it_is_quicker(rows, long, quicker, way, monkeypatch):
    leaves, packed = inputs(rows)
    assert len(packed.sequences) == rows and len(leaves[0]) == 29 * rows
    monkeypatch.setattr(packed_attention, "LONG", long)
    monkeypatch.setattr(packed_attention, "prefers_sdpa", lambda *_: quicker)
    for name in ("_single", "_varlen"):
        monkeypatch.setattr(packed_attention, name, lambda *_, name=name: name)
    assert packed_attention._flash(*leaves, packed, SCALE) == way


def test_it_is_chosen_by_the_clock_and_only_if_it_is_right(monkeypatch):
    leaves, packed = inputs()
    upstream = torch.ones_like(leaves[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def slow(*args):
        time.sleep(0.02)
        return packed_attention._rows(*args)

    def quick(*args):
        return packed_attention._rows(*args)

    def wrong(*args):
        return 1.1 * packed_attention._rows(*args)

    for varlen, single, chosen in ((slow, quick, True), (quick, slow, False), (slow, wrong, False)):
        monkeypatch.setattr(packed_attention, "_varlen", varlen)
        monkeypatch.setattr(packed_attention, "_single", single)
        assert packed_attention._quicker(leaves, upstream, packed, SCALE) is chosen
    assert not packed_attention.prefers_sdpa(CPU, torch.float32, 4, 2, 16)  # nothing is timed there


def test_a_step_of_one_sequence_has_the_same_gradients(monkeypatch):
    model, (rows, weights) = make_model("llama"), rollout(groups=1, size=1)
    _, wanted, _ = through(model, rows, weights)
    taken = []

    def single(*args):
        taken.append(1)
        return one_sequence(*args)

    one_sequence = packed_attention._single
    monkeypatch.setattr(packed_attention, "LONG", 1)
    monkeypatch.setattr(packed_attention, "prefers_sdpa", lambda *_: True)
    monkeypatch.setattr(packed_attention, "_single", single)
    monkeypatch.setattr(packed_attention, "_varlen", packed_attention._rows)
    for budget_gb in (None, 0.6e-4):  # all saved; some computed again
        _, got, _ = through(model, rows, weights, budget_gb=budget_gb, attention="flash")
        assert taken and difference(got, wanted) < 1e-5
        taken.clear()
