"""The tables of recipes that others published: what the planner says of them, and what was measured here."""

from nbhelpers import memory, recipes

from .method_tables import MODEL, shares
from .tables import Results, number, table

LENGTHS = (8192, 16_384, 24_576)  # DeepScaleR's
STAGED = "qwen2.5-1.5b"
MEASURED = {  # a row of results/sizes.json -> recipe, and what it says
    "qwen2.5-3b/long-run/step_time": ("long-run", "a step, seconds"),
    "qwen2.5-3b/long-run/step_peak_driver": ("long-run", "all of the process, GB"),
    f"{STAGED}/24K/train_time": ("length in stages", "one answer of 24K trained on, seconds"),
    f"{STAGED}/24K/train_peak_driver": ("length in stages", "the process then, GB"),
    f"{STAGED}/24K/decode_step": ("length in stages", "one more token at 24K, ms"),
    f"{STAGED}/24K/decode_peak_driver": ("length in stages", "the process then, GB"),
    "qwen2.5-32b/sft-8K/train_time": ("32b-lora", "one text of 8K trained on, seconds"),
    "qwen2.5-32b/sft-8K/train_peak_driver": ("32b-lora", "the process then, GB"),
}


def planned() -> str:
    """Each recipe on its card."""
    rows = []
    for name in recipes.NAMES:
        recipe = recipes.get(name)
        plan = memory.plan(**recipe.takes)
        assert plan.fits and plan.step_seconds and plan.hours, name
        size = "answers" if recipe.method == "grpo" else "texts"
        tokens = plan.setting.max_prompt_length + plan.setting.max_completion_length
        step = f"{recipe.rows} {size} of {tokens:,} tokens"
        rows.append([
            f"`{name}`", f"{plan.preset.title}, {plan.setting.quantization}, LoRA {plan.setting.lora_rank}", step,
            f"{recipe.preset.max_steps:,}", number(_most(plan), 1), number(plan.step_seconds, 1), number(plan.hours, 1),
        ])  # fmt: skip
    header = ["recipe", "model", "a step", "steps", "GB (planned)", "seconds a step (planned)", "hours (planned)"]
    cards = ", ".join(sorted({recipes.get(name).card for name in recipes.NAMES}))
    how = "with every answer or text at full length; seconds are estimates from data sheets"
    return f"{table(header, rows, words=3)}\n\nPlanned for {cards}, {how}."


def stages() -> str:
    """Eight answers of each of DeepScaleR's lengths on a card of 24 GB."""
    said = memory.plan_stages(STAGED, LENGTHS, card="RTX 4090", rows=8)
    assert said.fits
    rows = [
        [f"{plan.setting.max_completion_length:,}", number(sum(plan.generation.values()), 1),
         number(sum(plan.training.values()), 1), f"{plan.at_once}", number(plan.step_seconds, 0)]
        for plan in said.plans
    ]  # fmt: skip
    header = ["tokens an answer", "GB, generating (planned)", "GB, training (planned)", "answers written at once",
              "seconds for 8 answers (planned)"]  # fmt: skip
    return f"{table(header, rows)}\n\nPlanned for {said.plans[0].preset.title} on an RTX 4090."


def measured() -> str:
    """What a GPU took for the recipes' shapes, with random weights, beside what was planned for that card."""
    results = Results("sizes")
    found = {row["what"]: row for row in results.document["rows"] if row["who"] == "ours"}
    rows = [
        [name, words, *(number(found.get(what, {}).get(key), 2) for key in ("value", "planned"))]
        for what, (name, words) in MEASURED.items()
    ]
    return f"{table(['', 'what', 'measured', 'planned for it'], rows, words=2)}\n\n{_source(results, [*MEASURED])}"


def r1() -> str:
    """Lesson 6: right answers after its stages, the worst of the seeds."""
    results = Results("recipes")
    stages = {"before": "the base", "zero": "R1-Zero: RL alone", "rl": "cold start, then RL",
              "sft": "the base, after SFT on what was kept", "after": "then RL with a second reward"}  # fmt: skip
    keys = [(f"workshop/r1_recipe/accuracy_{stage}", "ours") for stage in stages]
    shares = [results(*key) for key in keys]
    rows = [
        [title, "–" if share is None else f"{share:.1%}"] for title, share in zip(stages.values(), shares, strict=True)
    ]
    return f"{table(['', 'right'], rows)}\n\n{_source(results, [what for what, _ in keys])}"


REAL = {
    "base": "the base", "zero": "R1-Zero: RL alone", "cold_start": "1: cold start, 32 worked answers", "rl": "2: RL",
    "sft": "3 and 4: the base, after SFT on what was kept", "after": "5: RL with a second reward",
}  # fmt: skip


def r1_real() -> str:
    """The same stages on a real 1.5B."""
    results = Results("recipes_gpu")
    known = {row["what"]: row for row in results.document["rows"]}
    keys = [f"{MODEL}/r1_recipe/accuracy_{stage}" for stage in REAL]
    rows = []
    for key, title in zip(keys, REAL.values(), strict=True):
        found = known.get(key)
        if found is None:
            rows.append([title, *"–––––"])
            continue
        right = f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
        counts = number(found["tokens"], 0), number(found["steps"], 0), number(found["seconds"], 0)
        rows.append([title, right, f"{found['in_form']:.1%}", *counts])
    header = ["", "right", "in form", "tokens an answer", "updates", "seconds of training"]
    seconds, gb = (results(f"{MODEL}/r1_recipe/{what}") for what in ("seconds", "peak_driver"))
    took = "" if seconds is None else f"{seconds / 60:.1f} minutes from the loading on, {number(gb)} GB by the driver. "
    return f"{table(header, rows)}\n\n{took}{_source(results, keys)}"


def stages_real(lengths: tuple[int, ...] = (256, 512, 1024)) -> str:
    """A real 1.5B in three stages: how long each took, and what ended it."""
    results, head = Results("recipes_gpu"), f"{MODEL}/stages"
    ended = {row["what"]: row["ended"] for row in results.document["rows"] if "ended" in row}
    keys = [f"{head}/steps_{length}" for length in lengths]
    rows = [
        [f"{length:,}", ended.get(key, "–"), number(results(key), 0)] for length, key in zip(lengths, keys, strict=True)
    ]
    text = table(["tokens an answer", "what ended the stage", "updates"], rows, words=2)
    right = shares(*(results(f"{head}/right_{when}") for when in ("before", "after")))
    return f"{text}\n\nRight, of held-out stories: {right}. {_source(results, keys)}"


def _most(plan: memory.Plan) -> float:
    return max(sum(plan.generation.values()), sum(plan.training.values()))


def _source(results: Results, whats: list[str]) -> str:
    """Where the figures of these rows are from."""
    there = [(what, "ours") for what in whats if results(what) is not None]
    return results.source(*there) if there else "Not measured yet: a dash is no figure."


PUBLISHED = {50: "in form", 100: "25 %", 200: "40 %", 450: "50 %"}  # mini-R1's 3B, by step


def countdown(label: str = f"{MODEL}/countdown") -> str:
    """What a real model learned of Countdown, by step, beside what others published of theirs."""
    results = Results("countdown")
    seconds = results(f"{label}/seconds")
    if seconds is None:
        return "Nobody has run it on a GPU yet."
    names, known = ("solved", "three", "four", "form"), {}
    for what, _ in results.values:
        name, _, step = what.removeprefix(f"{label}/").partition("_")
        if name == "solved":
            known[0 if step == "before" else int(step)] = step
    rows = []
    for step in sorted(known.keys() | PUBLISHED.keys()):
        values = [results(f"{label}/{name}_{known.get(step)}") for name in names]
        shares = ["–" if value is None else f"{value:.1%}" for value in values]
        rows.append([str(step), *shares, PUBLISHED.get(step, "–")])
    header = ["step", "solved", "of three numbers", "of four", "in form", "published: solved, a 3B"]
    took = f"{seconds / 60:.1f} minutes of training, {number(results(f'{label}/peak_driver'))} GB."
    return f"{table(header, rows)}\n\n{took} {results.source((f'{label}/seconds', 'ours'))}"
