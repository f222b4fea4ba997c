"""Rows that a trainer cannot train on are refused with their number, before a model is loaded."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import tasks
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import rows, trainer

CHAT = [{"role": "user", "content": "Which is bigger? 9.11 or 9.9?"}]
TASK = tasks.decimals(n_train=8, n_test=4)


def config(folder, **changes):
    settings = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 1,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return trainer.LeanGRPOConfig(str(folder), **settings | changes)


def refused(folder, data, match, evaluation=None, **changes):
    """The model's name is one that cannot be loaded: whoever gets that far fails otherwise."""
    with pytest.raises((TypeError, ValueError), match=match):
        trainer.LeanGRPOTrainer("no/such-model", [score], config(folder, **changes), data, eval_dataset=evaluation)


def score(completions, **_):
    return [float(i) for i in range(len(completions))]


def test_what_is_no_data_set_is_named_with_what_to_pass(tmp_path):
    import pandas

    refused(tmp_path, TASK, "got `Task`: pass a datasets.Dataset .task.train")
    refused(tmp_path, pandas.DataFrame({"prompt": ["?"]}), "got `DataFrame`: pass .*Dataset.from_pandas")
    refused(tmp_path, "openai/gsm8k", "`train_dataset` must be .*got `str`")
    refused(
        tmp_path, DatasetDict(train=TASK.train, test=TASK.test), r'DatasetDict of train, test: .*dataset\["train"\]'
    )
    refused(tmp_path, [{"prompt": "?"}, "?"], "`train_dataset` must be .*got `list`: pass")
    refused(tmp_path, [{"prompt": "?"}, {"prompt": 5}], "train_dataset is a list whose rows differ in their types")
    refused(tmp_path, [], "train_dataset is empty")
    refused(tmp_path, TASK.train, "`eval_dataset` must be .*got `Task`", evaluation=TASK)
    refused(tmp_path, TASK.train, "eval_dataset is empty", evaluation={"easy": TASK.test, "hard": TASK.test.select([])})


@pytest.mark.parametrize(
    "prompt, why",
    [
        (None, "its prompt is None"),
        ([], r"its prompt is \[\]"),
        ([{"role": "user", "content": None}], "message 0 of its prompt has no content"),
        ([*CHAT, {"role": None, "content": "x"}], "message 1 of its prompt is .* without a role"),
    ],
)
def test_a_prompt_that_is_none_is_named_with_its_row(tmp_path, prompt, why):
    refused(tmp_path, [{"prompt": CHAT}] * 3 + [{"prompt": prompt}], rf"train_dataset, row 3 \(the first is 0\): {why}")
    refused(tmp_path, TASK.train, rf"eval_dataset, row 1 .*: {why}", evaluation=[{"prompt": CHAT}, {"prompt": prompt}])


def test_an_empty_text_is_no_prompt(tmp_path):
    refused(tmp_path, [{"prompt": "?"}] * 4 + [{"prompt": ""}], "row 4 .*its prompt is ''")


@pytest.mark.parametrize("column", rows.TAKEN)
def test_a_column_that_trl_would_overwrite_is_named(tmp_path, column):
    data = TASK.train.add_column(column, ["x"] * 8)
    refused(tmp_path, data, rf'has a column \'{column}\'.*rename_column\("{column}", "my_{column}"\)')


@pytest.mark.parametrize(
    "count, changes, remedy",
    [
        (3, {"gradient_accumulation_steps": 4}, "3 rows and a step takes 4 .*gradient_accumulation_steps to 3"),
        (3, {"per_device_train_batch_size": 16}, "per_device_train_batch_size to 12, or"),
        (1, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
         "1 row and a step takes 4 .*per_device_train_batch_size to 4 and gradient_accumulation_steps to 1"),
        (3, {"per_device_train_batch_size": 2, "steps_per_generation": 8}, "steps_per_generation to 6"),
        (3, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 6}, "gradient_accumulation_steps to 2"),
    ],
)  # fmt: skip
def test_fewer_rows_than_a_step_takes_are_refused_and_the_advice_works(tmp_path, count, changes, remedy):
    data = TASK.train.select(range(count))
    refused(tmp_path, data, f"train_dataset has .*{remedy}", **changes)
    advice = {name: int(n) for name, n in _settings_in(remedy)}
    rows.enough(data, config(tmp_path, **changes | advice))


def _settings_in(remedy):
    import re

    return re.findall(r"(\w+_\w+) to (\d+)", remedy)


def test_a_list_a_stream_and_columns_made_on_the_fly_are_taken():
    made = rows.as_dataset([{"prompt": CHAT, "answer": "9.9"}], "train_dataset")
    assert isinstance(made, Dataset) and made[0]["answer"] == "9.9"
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": None}]))
    rows.check(rows.as_dataset(stream, "train_dataset"), "train_dataset")  # not read
    on_the_fly = TASK.train.with_transform(lambda batch: pytest.fail("a transform may be costly"))
    rows.check(on_the_fly, "train_dataset")


def test_a_prompt_too_long_for_the_model_is_named_with_its_row_before_step_1(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
    limit = model.config.max_position_embeddings
    long = [{"role": "user", "content": "9.11 or 9.9? " * limit}]
    data = [{"prompt": CHAT}] * 5 + [{"prompt": long}]
    for train, evaluation, name in ((data, None, "train_dataset"), (data[:5], data, "eval_dataset")):
        with pytest.raises(ValueError, match=rf"{name}, row 5 \(the first is 0\): its prompt has \d+ tokens, and "
                                             rf"all that the model can hold is {limit}"):  # fmt: skip
            trainer.LeanGRPOTrainer(
                model, [score], config(tmp_path), train, eval_dataset=evaluation, processing_class=tokenizer
            )


def test_only_prompts_with_many_bytes_are_tokenized():
    counted = []

    def tokens(prompts):
        counted.append(len(prompts))
        return [len(prompt) for prompt in prompts]

    data = Dataset.from_dict({"prompt": ["x" * 10] * 50 + ["x" * 95]})
    rows.refuse_longer(data, "train_dataset", 100, tokens, "too many")
    assert counted == [1, 1]
    with pytest.raises(ValueError, match=r"row 50 .*has 95 tokens, too many"):
        rows.refuse_longer(data, "train_dataset", 94, tokens, "too many")
