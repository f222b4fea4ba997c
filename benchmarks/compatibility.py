"""Write docs/compatibility.md: the table in nbhelpers/training/compatibility.py, figures from benchmarks/results.

python -m benchmarks.compatibility           # rewrites the page
python -m benchmarks.compatibility --check   # exit status 1 if that would change anything (CI)
"""

import sys

from nbhelpers.training.compatibility import ADAPTERS, ARGUMENTS, MEANING, Entry

from .tables import MODELS, ROOT, Results, table

PAGE = ROOT / "docs" / "compatibility.md"

INTRODUCTION = """\
# What of TRL and peft runs how

Written by `python -m benchmarks.compatibility` from `nbhelpers/training/compatibility.py`; tests go through that table:
every field of TRL 1.16's GRPOConfig stands in it, and a trainer is made of what is marked with a star.

{meaning}

What is not fast says so in a printed line when the trainer is made: the reason, and how much memory a batch then needs.

{costs}

## Arguments of GRPOConfig

{arguments}

Beside the fields: `tools`, `environment_factory` and `rollout_func` are fast, and what tools and environments write
takes no loss; images, and advantages of one number for each token, are left to TRL.

## Adapters of peft

Any other kind of peft's: as `families.why_not` finds it. What replaces linear layers inside the decoder's layers
computes with its own forward; nobody has tried each.

{adapters}
"""


def lines(header: str, entries: tuple[Entry, ...], code: str) -> str:
    rows = []
    for entry in entries:
        names = ", ".join(f"{code}{name}{code}" for name in entry.names.split())
        star = " *" if entry.tries else ""
        rows.append([f"{names}{star}", entry.when, entry.how, entry.note])
    return table([header, "if it is", "how", ""], rows, words=4)


def costs() -> str:
    """What TRL's loss and transformers' generation cost against ours, as measured, in sentences."""
    step, engines = Results("step"), Results("engines")
    used: dict[Results, list[tuple[str, str]]] = {step: [], engines: []}

    def span(results: Results, pairs: list[tuple[tuple[str, str], tuple[str, str]]]) -> str:
        """The least and the most that the first of a pair is of the second, where both were measured."""
        ratios = []
        for one, other in pairs:
            if (a := results(*one)) and (b := results(*other)):
                ratios.append(a / b)
                used[results] += [one, other]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    places = [f"{name}/{length}" for name in MODELS for length in ("1K", "4K")]
    time, peak = (span(step, [((f"{place}/train_{what}", "trl-1"), (f"{place}/train_{what}", "ours"))
                              for place in places]) for what in ("time", "peak"))  # fmt: skip
    roomy = span(step, [((f"{name}/1K/train_time", "trl-8"), (f"{name}/1K-roomy/train_time", "ours"))
                        for name in MODELS])  # fmt: skip
    drawn = span(engines, [((f"{name}/batch-32/decode", "graph"), (f"{name}/batch-32/decode", "transformers"))
                           for name in MODELS])  # fmt: skip
    return (
        f"What TRL's loss costs: row by row {time} times the lean step's seconds and {peak} times its GB, weights "
        f"included, for 8 rows of 1K and 4K tokens; all 8 rows of 1K at once, without a cap for either, {roomy} times "
        "its seconds. (TRL was measured through its `compute_loss` alone, where transformers has not switched gradient "
        "checkpointing on: with it TRL needs less memory and more time.) "
        f"{step.source(*used[step])}\n\nWhat transformers' generation costs: {drawn} times the graph engine's seconds, "
        f"at a batch of 32. {engines.source(*used[engines])}"
    )


def page() -> str:
    """The page's text."""
    meaning = "\n".join(f"- **{how}**: {text}" for how, text in MEANING.items())
    return INTRODUCTION.format(
        meaning=meaning, costs=costs(), arguments=lines("field", ARGUMENTS, "`"), adapters=lines("kind", ADAPTERS, "")
    )


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
