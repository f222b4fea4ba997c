"""A whole run of a model whose frozen layers wait on the host, from its first look at the weights to what it saves."""

import torch
from peft import LoraConfig, get_peft_model
from resume_cases import make, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers.models import swap
from nbhelpers.presets import WORKSHOP


def test_what_stands_in_a_place_before_it_is_needed_is_no_weight(tmp_path):
    """On a card a place is memory that something else was in: NaN, for all that anybody knows."""
    tokenizer, ends = AutoTokenizer.from_pretrained(WORKSHOP), []
    for count in (0, 3):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32).requires_grad_(False)
        if count:
            for place in swap.attach(model, count, torch.device("cpu")).places:
                place.fill_(255)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        run = make(tokenizer, tmp_path / str(count), model=adapted, max_steps=2, beta=0.0, engine="graph")
        run.train()
        ends.append(weights(run))
    assert same(*ends)
