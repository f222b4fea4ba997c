import re

import pytest
import tiny_model
import torch
from transformers import GenerationConfig, Qwen2ForCausalLM

from nbhelpers import engines, evaluate
from nbhelpers.evaluate import Answer, Proportion, Score, accuracy, ask, ask_again, paired
from nbhelpers.rewards import is_correct, right

QUESTIONS = ["short?", "a somewhat longer question?", "b?", "which is bigger, 9.11 or 9.9?", "c?", "why?"]
GOOD = "<reasoning>\nwhy\n</reasoning>\n<answer>\n{}\n</answer>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model.model()


class Scripted(Qwen2ForCausalLM):
    """Writes what `script` says for the question in the prompt."""

    script: dict

    def generate(self, tokens, attention_mask, generation_config, logits_processor):
        tok = tiny_model.tokenizer()
        said = []
        for row, mask in zip(tokens.tolist(), attention_mask.tolist(), strict=True):
            prompt = tok.decode([token for token, seen in zip(row, mask, strict=True) if seen])
            text = next(text for question, text in self.script.items() if question in prompt)
            said.append((tok(text)["input_ids"] + [tok.eos_token_id])[: generation_config.max_new_tokens])
        width = max(map(len, said))
        for i in range(width):  # the engine's sampler sees no other choice
            logits = torch.full((len(said), len(tok)), float("-inf"))
            logits[torch.arange(len(said)), [row[i] if i < len(row) else 0 for row in said]] = 0.0
            logits_processor(None, logits)
        return torch.tensor(
            [row + new + [0] * (width - len(new)) for row, new in zip(tokens.tolist(), said, strict=True)]
        )


def scripted(script):
    made = tiny_model.model(Scripted)
    made.script = script
    return made


# ---- asking ----


def by_hand(model, tokenizer, question: str, new: int) -> list[int]:
    """Greedy decoding without batch, padding and cache."""
    ids = tokenizer(f"u:{question}<|turn|>a:", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + new and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("engine", ["graph", "hf"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_answers_equal_decoding_by_hand_in_any_batch(model, tokenizer, batch_size, engine):
    answers = ask(model, tokenizer, QUESTIONS, max_new_tokens=12, batch_size=batch_size, engine=engine)
    assert {answer.decoding.engine for answer in answers} == {engine}
    assert [answer.question for answer in answers] == QUESTIONS  # in order, though batches go by length
    for answer in answers:
        tokens = by_hand(model, tokenizer, answer.question, 12)
        assert answer.completion == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.tokens == len(tokens)
        assert answer.finished == (tokens[-1] == tokenizer.eos_token_id)
    assert len({answer.completion for answer in answers}) > 3  # the model is not one that always says the same


def test_system_prompt_and_template_reach_the_model(model, tokenizer):
    (answer,) = ask(model, tokenizer, ["b?"], system_prompt="be brief", max_new_tokens=2)
    assert answer.prompt == "s:be brief<|turn|>u:b?<|turn|>a:"
    assert ask(model, tokenizer, ["b?"], max_new_tokens=2)[0].prompt == "u:b?<|turn|>a:"


def test_answers_of_two_engines_are_not_compared(model, tokenizer):
    graph, plain = (ask(model, tokenizer, ["b?"], max_new_tokens=2, engine=name) for name in ("graph", "hf"))
    with pytest.raises(ValueError, match="the decoding differs"):
        evaluate.check_comparable(graph, plain)


def test_end_and_cut_off(tokenizer):
    told = scripted({"short?": GOOD.format("9.9"), "b?": "<answer>9.11</answer>"})
    done, cut = ask(told, tokenizer, ["b?", "short?"], max_new_tokens=40)
    assert (done.answer, done.finished, done.tokens) == ("9.11", True, len("<answer>9.11</answer>") + 1)
    assert (cut.answer, cut.finished, cut.tokens) == (None, False, 40)


def test_every_end_token_of_the_model_ends(model, tokenizer):
    first = by_hand(model, tokenizer, "b?", 12)
    third = first[2]
    assert third not in first[:2]
    other = tiny_model.model()
    other.generation_config.eos_token_id = [1, third]
    (answer,) = ask(other, tokenizer, ["b?"], max_new_tokens=12)
    assert answer.tokens == 3 and answer.finished


@pytest.mark.parametrize("engine", ["graph", "hf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_generation_defaults_do_not_sneak_in(model, tokenizer, temperature, engine):
    plain = ask(model, tokenizer, QUESTIONS, max_new_tokens=12, temperature=temperature, engine=engine)
    other = tiny_model.model()
    other.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=5.0,
        no_repeat_ngram_size=2, num_beams=2, max_length=3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    assert ask(other, tokenizer, QUESTIONS, max_new_tokens=12, temperature=temperature, engine=engine) == plain


def test_drawing_follows_the_models_probabilities(model, tokenizer):
    answers = ask(model, tokenizer, ["b?"] * 2000, max_new_tokens=1, temperature=2.0, batch_size=2000)
    ids = tokenizer("u:b?<|turn|>a:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = (model(ids).logits[0, -1] / 2.0).softmax(-1)
    drawn = [tokenizer(answer.completion)["input_ids"] for answer in answers]
    counts = torch.bincount(torch.tensor([tokens[0] for tokens in drawn if tokens]), minlength=len(wanted))
    counts[:3] = wanted[:3] = 0  # special tokens leave no text to count
    assert counts.gt(0).sum() > 55  # no top-k 50
    assert (counts / 2000 - wanted).abs().sum() / 2 < 0.12


def test_drawing_repeats_by_seed_whatever_the_batches_before_did(tokenizer):
    model = tiny_model.model()
    model.generation_config.eos_token_id = list(range(1, 104, 9))  # ends often, so that the lengths differ

    def two(first: str, seed: int = 0) -> list[Answer]:
        settings = {"max_new_tokens": 24, "temperature": 2.0, "seed": seed, "batch_size": 1}
        return ask(model, tokenizer, [first, "a longer question?"], **settings)

    runs = [two(f"{letter}?") for letter in "abcdefgh"]
    assert len({first.tokens for first, _ in runs}) > 1
    assert len({second.completion for _, second in runs}) == 1
    assert two("a?", seed=1)[1].completion != runs[0][1].completion


def test_asking_leaves_no_trace(tokenizer):
    model = tiny_model.model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    other = tiny_model.tokenizer()
    other.padding_side, other.pad_token = "right", None
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    ask(model, other, QUESTIONS, max_new_tokens=4, temperature=1.0, batch_size=2)
    assert torch.equal(torch.rand(3), wanted)
    assert [module.training for module in model.modules()] == modes
    assert other.padding_side == "right" and other.pad_token is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error(tokenizer):
    model = scripted({}).train()
    with pytest.raises(StopIteration):
        ask(model, tokenizer, ["b?"])
    assert model.training and model.model.layers[0].training


def test_it_is_evaluation_mode_within(tokenizer):
    model = tiny_model.model(attention_dropout=0.9).train()
    assert ask(model, tokenizer, QUESTIONS, max_new_tokens=8) == ask(
        model.eval(), tokenizer, QUESTIONS, max_new_tokens=8
    )


def test_a_lora_model_answers_like_its_base_and_keeps_its_defaults(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = ask(model, tokenizer, QUESTIONS, max_new_tokens=8, temperature=1.0)
    base = tiny_model.model()
    base.generation_config.temperature = 0.3
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))  # a fresh adapter adds zero
    assert ask(lora, tokenizer, QUESTIONS, max_new_tokens=8, temperature=1.0) == plain
    assert base.generation_config.temperature == 0.3


def test_mistakes_are_named(model, tokenizer):
    with pytest.raises(ValueError, match=r"write \['9.9 or 9.11\?'\]"):
        ask(model, tokenizer, "9.9 or 9.11?")
    with pytest.raises(ValueError, match=r"prompt 1 has 506 tokens.*lower max_new_tokens to 6"):
        ask(model, tokenizer, ["b?", "x" * 501], max_new_tokens=7)
    assert ask(model, tokenizer, []) == []


def test_asking_again_is_the_same_question(model, tokenizer):
    before = ask(model, tokenizer, QUESTIONS[:3], system_prompt="s", max_new_tokens=6, temperature=1.0, seed=3)
    assert ask_again(model, tokenizer, before) == before
    engine = engines.choose("graph", model, tokenizer, quiet=True)
    assert ask_again(model, tokenizer, before, engine) == before
    plain = ask(model, tokenizer, QUESTIONS[:3], max_new_tokens=6, engine="hf")
    assert {answer.decoding.engine for answer in ask_again(model, tokenizer, plain, engine)} == {"hf"}
    assert ask_again(model, tokenizer, []) == []
    with pytest.raises(ValueError, match=r"one call of evaluate\.ask"):
        ask_again(model, tokenizer, [before[0], plain[0]])


# ---- pass@k ----


@pytest.mark.parametrize("engine", ["graph", "hf"])
def test_pass_at_k_counts_each_questions_completions(model, tokenizer, engine):
    rows = [{"prompt": [{"role": "user", "content": question}], "answer": "e"} for question in QUESTIONS]
    settings = {"max_new_tokens": 20, "temperature": 3.0, "engine": engine, "correct": lambda text, gold: gold in text}
    found = evaluate.pass_at_k(model, tokenizer, rows, k=(1, 2, 6), num_generations=6, n=4, **settings)
    assert found.num_generations == 6 and len(found.rows) == 4 and {len(group) for group in found.rows} == {6}
    assert [{row.question for row in group} for group in found.rows] == [{question} for question in QUESTIONS[:4]]
    assert found.correct == [sum("e" in row.completion for row in group) for group in found.rows]
    assert any(0 < hits < 6 for hits in found.correct)  # the completions of a question differ
    assert found.values[1] == pytest.approx(sum(found.correct) / 24)
    assert found.values[6] == pytest.approx(sum(hits > 0 for hits in found.correct) / 4)
    assert found.values[1] < found.values[2] <= found.values[6]
    again = evaluate.pass_at_k(model, tokenizer, rows, k=(1,), num_generations=6, n=4, batch_size=5, **settings)
    assert [[r.completion for r in g] for g in again.rows] == [[r.completion for r in g] for g in found.rows]
    assert str(found).endswith("(4 questions, 6 completions each)") and "pass@6" in str(found)


def test_a_prompt_is_computed_once_for_all_its_completions(model, tokenizer):
    calls = []

    class Counting(engines.Engine):
        name = "counting"

        def generate(self, prompts, sampling):
            calls.append((len(prompts), sampling.num_generations))
            return [engines.Completion([1], [0.0], "stop_id")] * (len(prompts) * sampling.num_generations)

    evaluate.pass_at_k(model, tokenizer, ROWS, k=(1, 8), num_generations=8, engine=Counting())
    assert calls == [(4, 8)]


def test_pass_at_k_refuses_what_makes_no_sense(model, tokenizer):
    with pytest.raises(ValueError, match=r"k=\(1, 8\): each is between 1 and num_generations=4"):
        evaluate.pass_at_k(model, tokenizer, ROWS, num_generations=4)
    with pytest.raises(ValueError, match="temperature 0"):
        evaluate.pass_at_k(model, tokenizer, ROWS, temperature=0.0)
    with pytest.raises(ValueError, match="no rows"):
        evaluate.pass_at_k(model, tokenizer, [])


# ---- scoring ----

ROWS = [
    {"prompt": [{"role": "user", "content": f"question {name}?"}], "answer": answer}
    for name, answer in (("one", "9.9"), ("two", "1,000"), ("three", "x"), ("four", "2"))
]
BEFORE = {"one": GOOD.format("9.11"), "two": GOOD.format("1000.0"), "three": "<answer>x</answer>", "four": "2"}
AFTER = {"one": GOOD.format("9.90"), "two": GOOD.format("1000"), "three": "x", "four": GOOD.format("3")}


def score(script, tokenizer, rows=ROWS, **kwargs) -> Score:
    """What stands in the tags counts, so that right and in form differ in known rows."""
    return accuracy(scripted(script), tokenizer, rows, **{"batch_size": 3, "correct": is_correct, **kwargs})


def test_right_is_in_whatever_form(tokenizer):
    """Unless another rule is given: the bare "2" is right, and not in form."""
    before = score(BEFORE, tokenizer, correct=right)
    assert before.rows == accuracy(scripted(BEFORE), tokenizer, ROWS, batch_size=3).rows
    assert [row.correct for row in before.rows] == [False, True, True, True]
    assert [row.formatted for row in before.rows] == [True, True, False, False]


def test_accuracy_counts(tokenizer):
    before = score(BEFORE, tokenizer)
    assert before.accuracy == Proportion.of(2, 4) and before.format == Proportion.of(2, 4)
    assert [row.correct for row in before.rows] == [False, True, True, False]
    assert [row.formatted for row in before.rows] == [True, True, False, False]
    assert [row.question for row in before.rows] == [row["prompt"][-1]["content"] for row in ROWS]
    assert [row.gold for row in before.rows] == ["9.9", "1,000", "x", "2"]
    assert before.mean_length == sum(len(text) + 1 for text in BEFORE.values()) / 4
    assert str(before) == repr(before)
    assert re.match(
        r"accuracy 50\.0% \(15\.0% to 85\.0%, n = 4\) · format 50\.0% .* · mean length \d+\.\d tokens", str(before)
    )
    assert "50.0% (15.0% to 85.0%, n = 4)" in before._repr_html_()


def test_first_n_and_a_rule_of_ones_own(tokenizer):
    assert score(BEFORE, tokenizer, n=2).accuracy == Proportion.of(1, 2)
    assert score(BEFORE, tokenizer, n=9).accuracy.n == 4
    assert score(BEFORE, tokenizer, correct=lambda text, gold: gold in text).accuracy.value == 0.5
    assert score(BEFORE, tokenizer, correct=lambda text, gold: True).accuracy.value == 1.0


def test_a_datasets_dataset(tokenizer):
    from datasets import Dataset

    assert score(BEFORE, tokenizer, Dataset.from_list(ROWS)).rows == score(BEFORE, tokenizer).rows


def test_unusable_data_is_named(tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        score(BEFORE, tokenizer, [])
    with pytest.raises(ValueError, match="this data set has question, gold"):
        score(BEFORE, tokenizer, [{"question": "a", "gold": "b"}])


def test_paired_counts(tokenizer):
    before, after = score(BEFORE, tokenizer), score(AFTER, tokenizer)
    table = paired(before, after)
    assert (table.both_right, table.gained, table.lost, table.both_wrong) == (1, 1, 1, 1)
    assert str(table) == "both right 1 · gained 1 · lost 1 · both wrong 1"
    table = paired(score(BEFORE, tokenizer, n=1), score(AFTER, tokenizer, n=1))
    assert (table.both_right, table.gained, table.lost, table.both_wrong) == (0, 1, 0, 0)
    table = paired(score(AFTER, tokenizer, n=3), score(BEFORE, tokenizer, n=3))
    assert (table.both_right, table.gained, table.lost, table.both_wrong) == (1, 1, 1, 0)


def with_system(rows):
    return [{**row, "prompt": [{"role": "system", "content": "hint"}, *row["prompt"]]} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 3}, "4 answers before and 3 after"),
        ({"temperature": 0.5}, "the decoding differs"),
        ({"seed": 1}, "the decoding differs"),
        ({"max_new_tokens": 99}, "the decoding differs"),
        ({"batch_size": 2}, "the decoding differs"),
        ({"rows": ROWS[::-1]}, "question 0 differs"),
        ({"rows": with_system(ROWS)}, "its prompt is not"),
        ({"rows": [{**ROWS[0], "answer": "9.11"}, *ROWS[1:]]}, "the right answer to question 0 was '9.9'"),
    ],
)
def test_what_cannot_be_compared_is_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        paired(score(BEFORE, tokenizer), score(AFTER, tokenizer, **change))
