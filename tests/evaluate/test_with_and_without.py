"""Before and after from one model: its adapter off, and on again."""

import pytest
import tiny_model
import torch

from nbhelpers import evaluate, panel
from nbhelpers.models import adapter

QUESTIONS = ["short?", "which is bigger, 9.11 or 9.9?"]


@pytest.fixture
def trained():
    model = adapter.attach(tiny_model.model(), 4, 8, 0.0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model


@pytest.mark.parametrize("engine", ["graph", "hf"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_before_is_the_base_and_after_is_the_model(trained, engine, temperature):
    tokenizer = tiny_model.tokenizer()
    how = dict(max_new_tokens=12, engine=engine, temperature=temperature)
    learned = {name: weight.requires_grad for name, weight in trained.named_parameters()}
    before, after = evaluate.with_and_without(trained, tokenizer, QUESTIONS, **how)
    assert before == evaluate.ask(tiny_model.model(), tokenizer, QUESTIONS, **how)
    assert after == evaluate.ask(trained, tokenizer, QUESTIONS, **how)
    assert [answer.completion for answer in before] != [answer.completion for answer in after]
    assert {name: weight.requires_grad for name, weight in trained.named_parameters()} == learned
    assert before[0].decoding == after[0].decoding and before[0].decoding.engine == engine
    assert panel.before_after(before, after, "9.9").header == ("question", "before", "after")


def test_a_question_that_fails_leaves_the_adapter_on(trained):
    tokenizer = tiny_model.tokenizer()
    with pytest.raises(ValueError, match="must be a list"):
        evaluate.with_and_without(trained, tokenizer, "one?", max_new_tokens=4)
    before, after = evaluate.with_and_without(trained, tokenizer, QUESTIONS, max_new_tokens=12)
    assert before != after


def test_without_an_adapter_it_says_why_not():
    with pytest.raises(ValueError, match="no adapter to switch off"):
        evaluate.with_and_without(tiny_model.model(), tiny_model.tokenizer(), QUESTIONS)
