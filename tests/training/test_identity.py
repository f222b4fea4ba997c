"""What has changed between a stop and a resume is noticed by name."""

import functools
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from resume_cases import make
from transformers import AutoTokenizer

from nbhelpers.presets import WORKSHOP
from nbhelpers.training import identity
from nbhelpers.training.identity import code_of


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def compiled(text: str, name: str = "reward"):
    """A function from source text, in a module of its own."""
    room = {"__name__": "notebook"}
    exec(textwrap.dedent(text), room)
    return room[name]


BODY = '''
    import re
    FULL = 2.0
    LOG = []
    PATTERN = re.compile("a+")
    def helper(text):
        return len(text)
    def reward(completions, **_):
        """Its docstring."""
        LOG.append(len(completions))
        return [FULL * helper(c) if PATTERN.search(c) and c in {"a", "aa"} else 0.5 for c in completions]
'''


@pytest.mark.parametrize("old, new", [
    ("else 0.5", "else 0.4"), ("FULL = 2.0", "FULL = 3.0"), ("return len(text)", "return len(text) + 1"),
    ('compile("a+")', 'compile("a*")'), ('{"a", "aa"}', '{"a", "ab"}'), ("FULL * helper", "FULL + helper"),
])  # fmt: skip
def test_a_reward_s_body_helpers_and_constants_count(old, new):
    assert old in BODY and code_of(compiled(BODY)) != code_of(compiled(BODY.replace(old, new)))


@pytest.mark.parametrize("old, new", [
    ("Its docstring.", "Another one."), ("LOG = []", "LOG = [4, 5]"),
    ("        return [", "        # a comment\n\n        return ["),
])  # fmt: skip
def test_comments_docstrings_and_what_it_writes_do_not(old, new):
    assert old in BODY and code_of(compiled(BODY)) == code_of(compiled(BODY.replace(old, new)))


def test_a_reward_that_was_made_outside_any_module_has_an_identity():
    room = {}  # without a `__name__`, so that what is made in it has no `__module__`
    exec(textwrap.dedent(BODY), room)
    assert room["reward"].__module__ is None
    assert code_of(room["reward"]) == code_of(compiled(BODY))


def test_arguments_closures_and_attributes_count_but_counters_do_not():
    def made(limit):
        calls = 0

        def reward(completions, **_):
            nonlocal calls
            calls += 1
            return [float(len(c) < limit) for c in completions]

        return reward

    class Scorer:
        def __init__(self, limit):
            self.limit, self.calls = limit, 0

        def __call__(self, completions, **_):
            self.calls += 1
            return [float(len(c) < self.limit) for c in completions]

    def limited(completions, limit, **_):
        return [float(len(c) < limit) for c in completions]

    for make_one in (made, Scorer, lambda n: functools.partial(limited, limit=n)):
        one = make_one(5)
        before = code_of(one)
        one(["a"])
        assert code_of(one) == before == code_of(make_one(5)) != code_of(make_one(6))
    assert code_of(torch.nn.Linear(2, 2)) == code_of(torch.nn.Linear(2, 2))  # a reward model: its type


def test_the_hash_is_the_same_in_every_process():
    code = "from nbhelpers import rewards; from nbhelpers.training.identity import code_of; "
    code += "print(code_of(rewards.correctness), code_of(rewards.math_correctness), code_of(rewards.form))"
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
                           capture_output=True, text=True, timeout=120).stdout for seed in "12"}  # fmt: skip
    assert len(runs) == 1 and len(set(runs.pop().split())) == 3


def test_one_row_of_nine_thousand_is_noticed():
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "answer": str(2 * i)} for i in range(9000)]
    whole = identity.fingerprint(Dataset.from_list(rows))
    assert whole == identity.fingerprint(Dataset.from_list(rows).select(range(9000)))
    for row in (0, 4711, 8999):
        changed = [*rows[:row], {**rows[row], "answer": "x"}, *rows[row + 1 :]]
        assert identity.fingerprint(Dataset.from_list(changed)) != whole
    assert identity.fingerprint(Dataset.from_list(rows[::-1])) != whole
    assert identity.fingerprint(Dataset.from_list(rows).to_iterable_dataset()) is None


def test_what_changed_is_named_and_can_be_gone_on_with(tokenizer, tmp_path, capsys):
    def reward(text):
        room = {"__name__": "notebook"}
        exec(f"def nines(completions, **_): return [{text} for c in completions]", room)
        return room["nines"]

    body = 'float(sum(map(ord, c[0]["content"])) % 7)'
    kwargs = {"reward": reward(body), "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}
    make(tokenizer, tmp_path, max_steps=1, **kwargs).train()
    other = AutoTokenizer.from_pretrained(WORKSHOP)
    other.chat_template += " "
    for changes, message in [
        ({"reward": reward(body.replace("7", "5"))}, "the reward nines: its code"),
        ({"tokenizer": other}, "chat_template: "),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: "),
        ({"engine": "graph"}, "engine: 'hf' there, 'graph' here"),
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "vllm_importance_sampling_mode: 'token_truncate'"),
        ({"vllm_importance_sampling_correction": False}, "vllm_importance_sampling_correction: True there"),
        ({"entropy_coef": 0.1}, r"entropy_coef: 0\.0 there, 0\.1 here"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile: "),
        ({"data_seed": 3}, "data_seed: None there, 3 here"),
        ({"disable_dropout": True}, "disable_dropout: "),
        ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs: "),
        ({"dynamic_sampling": 2}, "dynamic_sampling: 0 there, 2 here"),
    ]:
        settings = {"tokenizer": tokenizer, "folder": tmp_path, "max_steps": 2, **kwargs, **changes}
        with pytest.raises(ValueError, match=message) as raised:
            make(**settings).train(resume_from_checkpoint="auto")
        assert "resume_anyway=True" in str(raised.value)
        assert "output_dir=" in str(raised.value) and "load the model anew" in str(raised.value)
        assert raised.value._render_traceback_() == [str(raised.value)]  # in a notebook no traceback
    # what is written or shown, and how often, is of no consequence
    run = make(tokenizer, tmp_path, max_steps=1, logging_steps=5, save_steps=7, **kwargs)
    assert run.train(resume_from_checkpoint="auto").metrics == {"finished": True}
    capsys.readouterr()
    changed = {**kwargs, "reward": reward(body.replace("7", "5")), "per_device_train_batch_size": 8}
    run = make(tokenizer, tmp_path, max_steps=3, learning_rate=1e-4, **changed)
    assert run.train(resume_from_checkpoint="auto", resume_anyway=True).global_step == 3
    said = capsys.readouterr().out
    assert all(word in said for word in ("Resuming although", "the reward nines", "learning_rate", "per_device_train"))
    wider = run.model.requires_grad_(False)
    wider.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the model \(trained\)"):  # there would be nothing to go on with
        make(tokenizer, tmp_path, max_steps=4, model=wider, **changed).train(
            resume_from_checkpoint="auto", resume_anyway=True
        )
