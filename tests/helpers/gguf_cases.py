"""GGUF files to read: of a small random model, with other values or tensors, in every type."""

from pathlib import Path

import gguf
import numpy as np
import torch
from export_cases import SMALL
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

from nbhelpers import loader

TEXTS = ("Which is bigger, 9.11 or 9.9?", "<answer>3.41</answer>  two  spaces\n\n x", "Grüße 你好", "a  1234567 b")


def the_same(ours, wanted):
    for text in TEXTS:
        assert ours(text, add_special_tokens=False)["input_ids"] == wanted(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()


def write_base(folder: Path, name: str, tokenizer, **changes) -> Path:
    """A random model wide enough that an error shows."""
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(name, **{**SMALL, "rms_norm_eps": 1e-5, **special, **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(what, quantization="none", **more):
    model, _ = loader.load(what, **{"quantization": quantization, "progress": False, "lora_rank": 2, **more})
    return model


def rewritten(file: Path, out: Path, values=None, drop=(), add=None, rename=None, **writer) -> Path:
    """The file again, with other values, without some tensors, with others, or in parts (`split_max_tensors`)."""
    reader = gguf.GGUFReader(file)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items() if name[:5] != "GGUF."}
    arch = (values or {}).get("general.architecture", fields.pop("general.architecture")[1])
    new = gguf.GGUFWriter(str(out), arch, **writer)
    for name, (types, content) in fields.items():
        if (values or {}).get(name, content) is not None:
            new.add_key_value(name, (values or {}).get(name, content), types[0], *(types[1:] or [None]))
    for name in (values or {}).keys() - fields.keys() - {"general.architecture"}:
        kind = gguf.GGUFValueType.get_type(values[name])
        new.add_key_value(name, values[name], kind)
    tensors = {(rename or {}).get(t.name, t.name): t.data for t in reader.tensors if t.name not in drop} | (add or {})
    for name, data in tensors.items():
        new.add_tensor(name, np.array(data))
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    return out


def blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Rows in a type: quantised by gguf where it can, else random blocks whose scales are finite."""
    rng = np.random.default_rng(0)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    raw = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    scales = rng.normal(size=(*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    raw[..., -2:] = scales[..., :2]  # Q6_K's d is its last two bytes; of the others d and dmin are the first four
    if kind != Kind.Q6_K:
        raw[..., :4] = scales
    return raw.reshape(rows, -1)
