"""The benchmark of docs/outgrow.md runs the page's own lines by the page's own command."""

from pathlib import Path

import pytest

from benchmarks import outgrow


def test_the_lines_and_the_command_are_the_pages():
    page = outgrow.PAGE.read_text()
    script = outgrow.script(Path("somewhere"))
    compile(script, "split.py", "exec")
    lines = page.partition("```python\n")[2].partition("```")[0]
    assert lines in script and "FOLDER = 'somewhere'" in script
    assert " ".join(outgrow.command(smoke=False)[3:]) in page and "--fsdp_version 2" in " ".join(outgrow.command(False))


def test_an_adapter_with_numbers_that_are_none_is_refused(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    outgrow.checkpoint(tmp_path / "model", smoke=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "new")
    assert outgrow.adapted(tmp_path / "model", tmp_path / "new") == 0  # B is zero: nothing was learned
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="NaN"):
        outgrow.adapted(tmp_path / "model", tmp_path / "broken")
