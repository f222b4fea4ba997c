"""Lesson 1 and the package hold the same functions: the same code, and the same numbers."""

import ast
import itertools
import json
from pathlib import Path

import pytest
import torch

from nbhelpers import grpo

ROOT = Path(__file__).parents[2]
NAMES = ("group_advantages", "ratio", "kl", "token_loss", "token_weights", "loss")


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def code_of(function: ast.FunctionDef) -> str:
    """A function's code without its docstring and its annotations: a lesson says those in prose and in comments."""
    function = ast.parse(ast.unparse(function)).body[0]
    function.returns = None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.dump(function)


def in_lesson() -> dict[str, ast.FunctionDef]:
    cells = json.loads((ROOT / "notebooks/01_grpo_by_hand.ipynb").read_text())["cells"]
    return functions("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))


PACKAGE = functions(Path(grpo.__file__).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_lesson_has_the_packages_code(name):
    assert code_of(in_lesson()[name]) == code_of(PACKAGE[name])


def test_the_comparison_sees_a_changed_number_and_no_comment():
    one = functions("def f(x: int) -> int:\n    '''Doc.'''\n    return x + 1  # a comment")["f"]
    assert code_of(one) == code_of(functions("def f(x):\n    return x + 1")["f"])
    assert code_of(one) != code_of(functions("def f(x):\n    return x + 2")["f"])
    assert code_of(one) != code_of(functions("def f(x=0):\n    return x + 1")["f"])


@pytest.fixture(scope="module")
def lesson():
    """The lesson's functions, defined."""
    found = in_lesson()
    space = {"torch": torch, "LOSS_TYPES": grpo.LOSS_TYPES}
    exec("\n".join(ast.unparse(found[name]) for name in NAMES), space)
    return space


def test_the_lesson_computes_the_packages_numbers(lesson):
    torch.manual_seed(0)
    rewards = torch.rand(12)
    for group, scale in itertools.product((2, 3, 12), (True, False)):
        ours, theirs = (f(rewards, group, scale) for f in (lesson["group_advantages"], grpo.group_advantages))
        assert torch.equal(ours, theirs)
    old, ref = torch.randn(2, 4, 5).unbind()
    mask = (torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]).float()
    values = torch.randn(4, 5)
    for kind, level, beta in itertools.product(grpo.LOSS_TYPES, ("token", "sequence"), (0.0, 0.1)):
        options = dict(old_logps=old, ref_logps=ref, beta=beta, epsilon_high=0.28, delta=2.0)
        options |= dict(importance_sampling_level=level, loss_type=kind, max_completion_length=7)
        found = []
        for function in (lesson["loss"], grpo.loss):
            logps = values.clone().requires_grad_()
            result = function(logps, torch.tensor([1.0, -1.0, 0.5, -0.2]), mask, **options)
            found.append((result.detach(), *torch.autograd.grad(result, logps)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs) and torch.isfinite(ours).all()
