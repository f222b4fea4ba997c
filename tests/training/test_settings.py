"""Every setting that makes no sense is one sentence that names it, before a model is looked at."""

import math
import warnings

import pytest
import trl

from nbhelpers.training import config, settings, trainer
from nbhelpers.training.stages import Stage

NAN, INF = math.nan, math.inf
# setting: values that are refused, values that are taken
VALUES = {
    "learning_rate": ([0, 0.0, -1e-4, INF, NAN, "1e-3", None, True], [1e-6, 1]),
    "max_steps": ([0, -2, 2.5, 2.0, "5", None, INF], [-1, 1, 10**6]),
    "num_train_epochs": ([0, -1, NAN, INF, "3", None], [0.5, 3]),
    "per_device_train_batch_size": ([0, -8, 8.0, None, "8"], [8]),
    "per_device_eval_batch_size": ([0, None], [8]),
    "gradient_accumulation_steps": ([0, -1, 1.5, None, "4"], [1, 4]),
    "max_grad_norm": ([-1, NAN, "1"], [0, 0.2, INF, None]),
    "weight_decay": ([-0.1, INF, NAN], [0, 0.1]),
    "adam_beta1": ([-0.1, 1, NAN], [0, 0.9]),
    "adam_beta2": ([-0.1, 1.0, NAN, None], [0.999]),
    "adam_epsilon": ([0, -1e-8, NAN], [1e-8]),
    "warmup_steps": ([-1, NAN, INF], [0, 0.1, 10]),
    "loss_type": (["foo", None, ["grpo"]], ["grpo", "dapo"]),
    "beta": ([-1, -0.04, NAN, INF, None, "0.04"], [0, 0.04]),
    "epsilon": ([-1, -0.2, NAN, None], [0, 0.2, INF]),
    "epsilon_high": ([-0.1, NAN], [None, 0.28]),
    "delta": ([0, -1, NAN], [None, 4.0]),
    "num_iterations": ([0, 1.5, None], [1, 4]),
    "importance_sampling_level": (["sentence", None], ["token", "sequence"]),
    "top_entropy_quantile": ([-0.1, 1.1, NAN], [0, 0.2, 1]),
    "entropy_coef": ([NAN, INF, None], [0, 0.01]),
    "sapo_temperature_neg": ([0, -1, NAN], [1.05]),
    "sapo_temperature_pos": ([0, INF], [1]),
    "off_policy_mask_threshold": ([NAN, "1"], [None, 2.0]),
    "ref_model_mixup_alpha": ([-0.1, 1.1, NAN], [0.6]),
    "ref_model_sync_steps": ([0, 1.5], [512]),
    "vllm_importance_sampling_mode": (["token", None], ["token_mask"]),
    "vllm_importance_sampling_clip_max": ([0, NAN], [None, 3.0]),
    "vllm_importance_sampling_clip_min": ([-1, NAN], [None, 0.3]),
    "reward_weights": ([[NAN], [INF], [0.0], [1, "2"], [3e38], 1.0, "11", []], [None, [1.0], [1, -0.5], [1, 0]]),
    "reward_clip_range": ([[1.0, 0.0], [1.0], "01", [NAN, 1.0], 2.0], [None, (0.5, 2.0), [-1, 1]]),
    "missing_eos_penalty": ([0, -1.0, NAN, INF, "1"], [None, 0.5]),
    "multi_objective_aggregation": (["sum", None], ["sum_then_normalize"]),
    "reward_seconds": ([0, -1, NAN, INF, None, "300"], [0.5, 300]),
    "num_generations": ([0, 1, -4, 4.0, None], [2, 8]),
    "num_generations_eval": ([0, 1.5], [None, 1]),
    "max_completion_length": ([0, -1, None, 2.5, "256"], [1]),
    "steps_per_generation": ([0, -1, 1.5], [None, 4]),
    "generation_batch_size": ([0, -8], [None, 32]),
    "temperature": ([0, 1e-9, -1, NAN, INF, None, "1"], [0.01, 0.6, 1, 2]),
    "top_p": ([0, -0.5, 1.1, NAN, None], [0.1, 1]),
    "top_k": ([-2, 2.5], [None, -1, 0, 50]),
    "min_p": ([-0.1, 1.1, NAN], [None, 0, 0.1]),
    "repetition_penalty": ([0, -1, NAN, INF], [1, 1.1]),
    "dynamic_sampling": ([-1, 0.5, None, True], [0, 2]),
    "kv_bits": ([4, 0, 12, "8", None, True], [8, 16]),
    "stages": (
        [
            [],
            5,
            [8],
            [Stage(0)],
            [Stage(8), Stage(9)],
            [Stage(8, steps=1)],
            [Stage(8, 0), Stage(9)],
            [Stage(2.5)],
            [Stage(8, cut_off=1.5), Stage(9)],
            [Stage(8, cut_off=NAN), Stage(9)],
            [Stage(8, plateau=0), Stage(9)],
        ],
        [None, [Stage(8)], [Stage(9, 2, 0.5, 3), Stage(8, cut_off=1), Stage(24576)]],
    ),
    "seed": ([-1, 1.5, 2**32, None], [0, 42]),
    "data_seed": ([-1, 0.5], [None, 7]),
    "logging_steps": ([0, -1, 1.5, NAN, None], [1, 0.1, 20.0]),
    "save_steps": ([0, -20, 2.5, "20", INF], [20, 0.5]),
    "eval_steps": ([0, -1, 1.5], [None, 10]),
    "dataloader_num_workers": ([-1, None], [0, 2]),
}


def test_the_table_has_no_row_without_values_here():
    names = [setting.name for setting in settings.SETTINGS]
    assert sorted(names) == sorted(VALUES) and len(set(names)) == len(names)


@pytest.mark.parametrize("setting", settings.SETTINGS, ids=lambda setting: setting.name)
def test_what_makes_no_sense_is_a_sentence_and_the_rest_is_taken(setting):
    refused, taken = VALUES[setting.name]
    for value in refused:
        sentence = setting.why_not(value)
        assert sentence is not None and sentence.startswith(f"{setting.name}={value!r}: it must be "), value
    for value in taken:
        assert setting.why_not(value) is None, value


@pytest.mark.parametrize(
    "changes",
    [
        {name: refused[0]}
        for name, (refused, _) in VALUES.items()
        if name not in ("eval_steps", "num_train_epochs", "reward_clip_range", "missing_eos_penalty")
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_lean_config_refuses_it_before_trl_computes_with_it(tmp_path, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*it must be"):
        trainer.LeanGRPOConfig(str(tmp_path), **changes)


def test_what_another_setting_switches_off_may_hold_anything(tmp_path):
    kept = trainer.LeanGRPOConfig(str(tmp_path), max_steps=5, num_train_epochs=0, save_strategy="no", save_steps=0)
    assert kept.save_steps == 0 and kept.num_train_epochs == 0
    with pytest.raises(ValueError, match="num_train_epochs=0"):
        trainer.LeanGRPOConfig(str(tmp_path), num_train_epochs=0)
    with pytest.raises(ValueError, match="eval_steps=-1"):
        trainer.LeanGRPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=-1)


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.0}, {"beta": -1.0}, {"temperature": 0.0}, {"max_steps": 0}, {"epsilon": NAN}],
    ids=str,
)  # fmt: skip
def test_a_plain_config_is_refused_before_the_model_is_loaded(tmp_path, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own
        args = trl.GRPOConfig(str(tmp_path), **config.precision(), **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*it must be"):
        trainer.LeanGRPOTrainer("no/such-model", [len], args, [{"prompt": "?"}])


def test_defaults_of_trl_and_ours_make_sense(tmp_path):
    assert settings.why_not(trainer.LeanGRPOConfig(str(tmp_path))) is None


def test_a_weight_for_each_reward(tmp_path):
    args = trainer.LeanGRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, reward_weights=[1.0, 2.0]
    )
    with pytest.raises(ValueError, match=r"reward_weights=\[1\.0, 2\.0\] are 2, and there are 1 reward functions"):
        trainer.LeanGRPOTrainer("no/such-model", [len], args, [{"prompt": "?"}])
