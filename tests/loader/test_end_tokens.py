"""A base model with a ChatML template whose only end token is that of a text: its answers would run to the limit."""

import json
import shutil

from nbhelpers import evaluate, loader, presets


def test_the_end_of_turn_of_the_template_becomes_an_end_token(tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(presets.WORKSHOP, folder)
    for name, fields in (
        ("tokenizer_config", {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}),
        ("config", {"eos_token_id": 0}),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    model, tokenizer = loader.load(folder, quantization="none", lora_rank=4, progress=False)
    assert model.generation_config.eos_token_id == [0, 2]
    assert "<|im_end|> ends a turn in the chat template" in capsys.readouterr().out
    (answer,) = evaluate.ask(model, tokenizer, ["Which is bigger? 9.11 or 9.9?"], max_new_tokens=150)
    assert answer.finished and answer.tokens < 150


def test_an_end_of_turn_that_ends_already_is_left_alone(capsys):
    model, _ = loader.load("workshop", quantization="none", lora_rank=4, progress=False)
    assert model.generation_config.eos_token_id == 2 and "ends a turn" not in capsys.readouterr().out
