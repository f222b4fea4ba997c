"""A tokenizer, and what makes the folder of a random model."""

import pytest
import torch
from export_cases import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers.architecture import Architecture
from nbhelpers.models import families, smoke
from nbhelpers.presets import WORKSHOP


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


@pytest.fixture
def base(tmp_path):
    """Makes the folder of a random model of an architecture."""

    def write(name: str, **changes):
        tied = name == "qwen2"
        architecture = Architecture(
            families.FAMILIES[name], tie_word_embeddings=tied, rope_theta=1e4, rms_norm_eps=1e-5, **SMALL
        )
        folder = smoke.write(architecture, tmp_path / f"base-{name}")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(3)
        for parameter_name, p in model.named_parameters():  # wide enough that an error shows; biases that are not 0
            torch.nn.init.normal_(p, 1.0 if "norm" in parameter_name else 0.0, 0.2)
        if changes:
            model.config.update(changes)
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return write
