"""What lessons 3 and 4 say was measured: the rows of benchmarks/results that they show, as a file of the package.

`python -m benchmarks.lessons` writes the file; a test compares it with the results.
"""

import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Measured:
    """The rows of one results file that lessons show.

    values: {(what, who): the number}, in the unit that the end of `what` implies: ms, GB, seconds or tokens/s.
    """

    gpu: str
    date: str
    values: dict[tuple[str, str], float]


def load(name: str) -> Measured:
    """The rows of benchmarks/results/<name>.json that lessons show: "kernels", "step" or "engines".

    Works wherever the package is installed, without the repository. Raises KeyError for another name.
    """
    text = resources.files(__package__).joinpath("measured.json").read_text(encoding="utf-8")
    found = json.loads(text)[name]
    return Measured(found["gpu"], found["date"], {(what, who): value for what, who, value in found["rows"]})
