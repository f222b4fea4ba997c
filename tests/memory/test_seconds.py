"""Seconds of a step: what the planner says against what was measured, and what it says where nobody measured."""

import json
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from nbhelpers import gpu, host, memory, presets
from nbhelpers.memory import seconds
from nbhelpers.memory.micro_batches import StepCost
from nbhelpers.memory.report import Setting

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WITHIN = 0.25
PROMPT, LENGTHS = 256, {"1K": 1024, "4K": 4096, "20K": 20480}
# GB that the training half was given at each length (benchmarks/step/cases.py), and a process in a whole step
GOALS = {"qwen2.5-1.5b": (2.0, 2.2, 3.0), "llama-3.1-8b": (7.4, 7.8, 9.4), "phi-4": (11.5, 12.0, 14.0)}
CAPS = {"qwen2.5-1.5b": 4, "llama-3.1-8b": 8, "phi-4": 12}
IRREGULAR = {
    # twice what other rows of as many tokens took (4K-t4, group-16): that step was cut otherwise than planned
    "H200 qwen2.5-1.5b/4K/train_time", "H200 qwen2.5-1.5b/1K/group-32/train_time",
    "H100 llama-3.1-8b/20K-9.3GB/train_time",  # planned 24.6 s, measured 19.5, with cuDNN's attention
}  # fmt: skip


def rows(file: str, who: str, ending: str) -> list[dict]:
    """With the card that each was measured on."""
    document = json.loads((RESULTS / f"{file}.json").read_text())
    found = [row for row in document["rows"] if row["who"] == who and row["what"].endswith(ending)]
    return [{"file": file, "gpu": document["host"].get("gpu"), **row} for row in found]


def card(row: dict) -> seconds.Card:
    """The card of a row; used as a T4 (fp16, no tl.dot) where the row's name says so."""
    return seconds.card_of(0, row["gpu"])._replace(ampere="-t4" not in row["what"])


def planned(row: dict, length: int, completions: int, budget_gb: float | None) -> memory.Plan:
    return memory.plan(
        row["what"].split("/")[0], card_gb=140, card=card(row).name, num_generations=completions, lora_rank=16,
        max_prompt_length=PROMPT, max_completion_length=length - PROMPT, quantization="nf4", budget_gb=budget_gb,
        attention=attention(row),
    )  # fmt: skip


def attention(row: dict) -> str:
    return "flash" if card(row).ampere else "efficient"


def regular(found: list[dict]) -> list[dict]:
    return [row for row in found if named(row) not in IRREGULAR]


def named(row: dict) -> str:
    return f"{card(row).name} {row['what']}"


TRAINING = regular(rows("step", "ours", "/train_time") + rows("ratios", "ours", "/train_time"))
DECODING = regular(rows("engines", "graph", "/step") + rows("ratios", "ours", "/step"))
# completions at 20K ended early, and how long they were is not in the row
WHOLE = [row for row in rows("engines", "ours", "/step_time") if "/1K" in row["what"] and "ragged" not in row["what"]]


@pytest.mark.parametrize("row", TRAINING, ids=named)
def test_the_training_half_takes_what_was_measured(row):
    name, setting, *group, _ = row["what"].split("/")
    length, _, kind = setting.partition("-")  # "4K-3GB", "1K-roomy", "20K-t4", "20K"
    t4, budget = kind == "t4", None
    if kind.endswith("GB"):
        budget = float(kind.removesuffix("GB"))
    elif kind != "roomy":
        budget = GOALS[name][0 if group else list(LENGTHS).index(length)] + (0.6 if t4 else -0.1)
    completions = int(group[0].removeprefix("group-")) if group else 1 if t4 and length == "20K" else 8
    plan = planned(row, LENGTHS[length], completions, budget)
    said = seconds.training(plan.preset.architecture, card(row), plan.setting, plan.micro_batches, attention(row))
    assert said == pytest.approx(row["value"], rel=WITHIN)


@pytest.mark.parametrize("row", DECODING, ids=named)
def test_a_decoding_step_takes_what_was_measured(row):
    name, *kept, batch, _ = row["what"].split("/")
    # "batch-8", "batch-8-t4", "batch-8-dynamic", or "kv-8/batch-2-at-20000"; else a mean over the tokens written
    _, count, *kind = batch.split("-")
    tokens = int(kind[1]) if kept else 200 + (256 if row["file"] == "ratios" else 512) / 2
    quantization, bits = "dynamic" if "dynamic" in kind else "nf4", 8 if kept == ["kv-8"] else 16
    a = presets.get(name).architecture
    said = seconds.decoding_step(a, card(row), quantization, int(count), tokens, bits)
    assert said == pytest.approx(row["value"] / 1000, rel=WITHIN)


@pytest.mark.parametrize("row", WHOLE, ids=named)
def test_a_whole_step_and_its_halves_take_what_was_measured(row):
    name, setting, _ = row["what"].split("/")
    held = 0.85  # GB of the process that are not the budget
    plan = planned(row, 1024, 8, (15 if "-t4" in setting else CAPS[name]) - held)
    a, s, on = plan.preset.architecture, plan.setting, card(row)
    fitting = plan.largest_group
    said = {"generating_s": seconds.generating(a, on, s, s.rows, fitting)}
    said["value"] = seconds.of_a_step(a, on, s, plan.micro_batches, attention(row), fitting)
    if "gpus" not in setting:  # there the gradients' sum over both cards counts as training
        said["training_s"] = seconds.training(a, on, s, plan.micro_batches, attention(row))
    assert said == pytest.approx({part: row[part] for part in said}, rel=WITHIN)


def test_a_plan_says_seconds_and_hours_and_for_which_card():
    plan = memory.plan("qwen2.5-1.5b", card_gb=15)
    assert plan.hours == pytest.approx(plan.step_seconds * plan.preset.max_steps / 3600)
    assert plan.speed_of == "T4"
    for text in (str(plan), plan._repr_html_()):
        assert "s a step" in text and "hours for 110 steps" in text and "(estimated for a card like the T4)" in text


def test_a_step_is_all_questions_of_the_preset_or_the_rows_that_are_given():
    one = memory.plan("llama-3.1-8b", card_gb=80, rows=8)
    four = memory.plan("llama-3.1-8b", card_gb=80)
    assert four.preset.questions_per_step == 4
    assert one.step_seconds < four.step_seconds < 4 * one.step_seconds


def test_what_does_not_fit_takes_no_time():
    plan = memory.plan("phi-4", card_gb=6)
    assert not plan.fits and plan.step_seconds is None and plan.hours is None and plan.time() == ""
    assert "a step" not in str(plan)


@pytest.mark.parametrize(
    ("gb", "name", "found"),
    [(15.8, "Tesla T4", "T4"), (17.2, "NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"), (15.6, "", "T4"),
     (25.3, "NVIDIA GeForce RTX 4090", "RTX 4090"), (6.0, "", "RTX 4060"), (84.9, "NVIDIA H100 80GB HBM3", "H100"),
     (24.0, "NVIDIA GeForce RTX 9999", "RTX 3090"), (8.0, "NVIDIA RTX A1000", "RTX 4060"),
     (42.0, "NVIDIA A100-SXM4-40GB", "A100")],
)  # fmt: skip
def test_a_card_is_known_by_its_name_or_by_its_size(gb, name, found):
    assert seconds.card_of(gb, name).name == found


def test_longer_answers_slower_cards_and_every_weight_take_longer():
    def step(**options):
        return memory.plan("qwen2.5-1.5b", **{"card_gb": 80, **options}).step_seconds

    base = step(max_completion_length=768)
    assert step(max_completion_length=2 * 768) > base
    assert step(card_gb=24, max_completion_length=768) > base
    # with LoRA of as few launches in decoding as without
    assert step(train="all", rows=8) > step(quantization="none", rows=8, lora_rank=16)
    assert step(method="sft", rows=8) < step(rows=8)  # texts are given, not written


def test_layers_that_wait_on_the_host_cost_their_copies():
    plan = memory.plan("llama-3.1-8b", card_gb=6, swap=True)
    assert plan.fits and plan.swap_gb
    assert plan.step_seconds > plan.preset.questions_per_step * plan.swap_gb / plan.host_gb_s
    (row,) = (row for row in rows("sizes", "ours", "/step_time") if "/swap/" in row["what"])
    fast = memory.plan("llama-3.1-8b", 6, card=card(row).name, swap=True, rows=8, max_completion_length=768)
    assert fast.step_seconds == pytest.approx(row["value"], rel=WITHIN)


@pytest.mark.parametrize("kind", ["H200", "A100", "L4", "T4"])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b"])
def test_more_memory_never_makes_the_training_half_slower(name, kind):
    """Measured on an H200 before launches counted: Qwen, 8 x 4K, 0.76 s at 3 GB in one or two pieces, 1.44 s at 6 GB
    in eight."""
    a, card = presets.get(name).architecture, seconds.card_of(0, kind)
    cost = StepCost(a, attention="flash" if card.ampere else "efficient", launches=seconds.launch_tokens(a, card))
    setting = Setting("nf4", 16, 8, PROMPT, 4096 - PROMPT, 8)
    said, counted = [], []
    for tenths in range(10, 600, 5):  # GB of work
        cut = cost.split([(0, PROMPT, 4096 - PROMPT)] * 8, tenths * 1e8)
        counted.append(sum(map(cost.time, cut)))
        said.append(seconds.training(a, card, setting, tuple(cut), cost.attention))
    assert all(after <= before for before, after in pairwise(counted))
    assert all(after <= 1.05 * min(said[: i + 1]) for i, after in enumerate(said[1:]))


def test_a_small_model_on_a_fast_card_is_not_cut_into_pieces_that_launches_alone_fill():
    a, rows = presets.get("qwen2.5-1.5b").architecture, [(0, PROMPT, 4096 - PROMPT)] * 8
    fast, slow = (StepCost(a, launches=seconds.launch_tokens(a, seconds.card_of(0, kind))) for kind in ("H200", "T4"))
    for gb in (4, 6):  # of work
        assert len(fast.split(rows, gb * 1e9)) <= 2 < len(slow.split(rows, gb * 1e9))


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b", "phi-4"])
def test_on_a_t4_more_rows_at_once_never_write_fewer_tokens_a_second(name):
    a, t4 = presets.get(name).architecture, seconds.card_of(15, "Tesla T4")
    speeds = [n / seconds.decoding_step(a, t4, "nf4", n, 512) for n in (1, 8, 16, 32, 64)]
    assert speeds == sorted(speeds)


def test_no_time_is_lost_where_nothing_is_written():
    a = presets.get("qwen2.5-1.5b").architecture
    setting = Setting("nf4", 16, 8, 256, 768, 8, method="sft")
    assert seconds.of_a_step(a, seconds.CARDS[0], setting, (), "flash", 8) == seconds.STEP_SECONDS


def test_the_report_says_it_before_the_download(monkeypatch, capsys):
    t4 = gpu.Card("Tesla T4", int(15.8e9), (7, 5))
    monkeypatch.setattr(gpu, "cards", lambda: [t4])
    monkeypatch.setattr(gpu, "free_bytes", lambda index: t4.total)
    monkeypatch.setattr(host, "require", lambda package: None)
    host.report(presets.get("qwen2.5-1.5b"))
    said = capsys.readouterr().out
    assert "hours for 110 steps" in said and "like the T4" in said
    assert said.index("s a step") < said.index("download: ")


def test_a_card_is_named_and_its_speed_and_size_are_planned(monkeypatch):
    """Two cards of 24 GB: without a name the likelier one stands for both."""
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    slower, faster = (memory.plan("qwen2.5-3b", card=name) for name in ("RTX 3090", "NVIDIA GeForce RTX 4090"))
    assert faster.card_gb == slower.card_gb == 24 and faster.speed_of == "RTX 4090"
    assert faster.training == slower.training and faster.step_seconds < slower.step_seconds
    assert memory.plan("qwen2.5-3b", 24).step_seconds == slower.step_seconds
    part = memory.plan("qwen2.5-3b", 24, card="H100")  # as much of it as another card has
    assert part.card_gb == 24 and part.speed_of == "H100" and part.step_seconds < faster.step_seconds
    sizes = {
        "A100": 40,
        "NVIDIA A100-SXM4-80GB": 80,
        "RTX 4060 Ti 8 GB": 8,
        "Tesla T4 16GB": 15,
        "NVIDIA H100 80GB HBM3": 80,
    }
    for name, gb in sizes.items():
        assert memory.plan("qwen2.5-3b", card=name).card_gb == gb, name
    with pytest.raises(ValueError, match=r"card='Voodoo 2' is not known; there are RTX 4060, .*RTX 4090"):
        memory.plan("qwen2.5-3b", card="Voodoo 2")
    with pytest.raises(ValueError, match=r"a laptop's has less memory .*card_gb=16"):
        memory.plan("qwen2.5-3b", card="NVIDIA GeForce RTX 4090 Laptop GPU")


def test_the_planner_knows_which_layers_have_fewer_launches():
    """It imports no torch, so the kernels' limits stand there again."""
    pytest.importorskip("triton")
    kernel = import_module("nbhelpers.kernels.triton.decode_linear")
    assert (seconds.NORMED_ROWS, seconds.NORMED, seconds.NORMED_RANKS) == (
        kernel.NORMED_ROWS, kernel.ROW, kernel.ROW_RANKS,
    )  # fmt: skip
