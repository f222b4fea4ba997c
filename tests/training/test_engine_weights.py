"""Where the engine draws with filters or penalties, the trainer's importance weights compare like with like."""

from typing import Any

import pytest
import step_cases
import tiny_model
import trl

from nbhelpers.training import trainer

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
]


def reward(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def one_step(config, engine, folder, **settings):
    """The log of one update with 4 completions of 256 tokens, which stop ids that may not be drawn make so long."""
    model = step_cases.make_model(
        "qwen2", lora=False, num_hidden_layers=1, initializer_range=0.2, max_position_embeddings=300
    )
    args = config(
        str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=256,
        learning_rate=1e-3, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, use_cpu=True,
        bf16=False, report_to="none", logging_steps=1, seed=3, max_grad_norm=1e9,
        generation_kwargs={"min_new_tokens": 256}, **settings,
    )  # fmt: skip
    run = trainer.LeanGRPOTrainer(
        model, reward, args, step_cases.ROWS, processing_class=tiny_model.tokenizer(), engine=engine
    )
    run.train()
    return next(log for log in run.state.log_history if "reward" in log)


@pytest.mark.parametrize(
    "engine, filters",
    [*(("graph", filters) for filters in FILTERS), ("hf", FILTERS[1]), ("hf", FILTERS[-1])],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "minimum length",
)
def test_what_decides_the_draws_does_not_weigh_a_long_completion(engine, filters, tmp_path):
    """TRL's GRPOConfig multiplies the weights of a completion's tokens, ours takes them one by one."""
    off = one_step(trainer.LeanGRPOConfig, engine, tmp_path, vllm_importance_sampling_correction=False, **filters)
    assert off["completions/min_length"] == 256 and off["grad_norm"] > 0.1
    for config in (trl.GRPOConfig, trainer.LeanGRPOConfig):
        log = one_step(config, engine, tmp_path, **filters)
        for name in ("min", "mean", "max"):
            assert log[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1.0, abs=1e-3)
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["grad_norm"] == pytest.approx(off["grad_norm"], rel=1e-3)
