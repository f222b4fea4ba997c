"""How the workshop model was made: a small Qwen2 trained from nothing, on text generated here.

The corpus knows two ways of comparing decimals. One is right (place by place), one is wrong (like version numbers:
9.11 > 9.9 since 11 > 9), and the wrong one is the more common, as on the web the model of a large company learned from.
So the model CAN do it right and mostly does not, and GRPO has something to select. Questions about software versions,
where that rule is the right one, are in the corpus too.

    python -m nbhelpers.workshop.recipe --out nbhelpers/workshop

Simplified: supervised text only, no web text; the model knows this one subject and nothing else. Loss is the negative
log-likelihood of whole completions (a sum over tokens, a mean over sequences), so a short answer weighs no more per
sequence than a long one.
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nbhelpers import tasks
from nbhelpers.models import smoke

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

RIGHT_SHARE = 0.30  # how often the corpus compares decimals by place value
TAGGED_SHARE = 0.86  # how often it answers in the format when the system prompt asks for it
SMALLER = ("Which is smaller? {a} or {b}?", "Which number is smaller, {a} or {b}?")
NEWER = ("Which version is newer? {a} or {b}?", "Which release is newer, {a} or {b}?")
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CONTEXT = 512


def by_version(a: str, b: str) -> str:
    """'Part by part: 9 = 9, 11 > 9.'"""
    (a_whole, a_right), (b_whole, b_right) = a.split("."), b.split(".")
    steps = [tasks.in_order(a_whole, b_whole)]
    if "=" in steps[0]:
        steps.append(tasks.in_order(a_right, b_right))
    return f"Part by part: {', '.join(steps)}."


def example(rng: random.Random) -> tuple[list[dict], str]:
    """One chat of the corpus: (messages, completion). Its numbers are all on the training side of the split."""
    a, b = tasks.decimal_pair(rng, held_out=False, tricky=rng.random() < 0.6)
    kind = rng.choices(("bigger", "smaller", "newer"), weights=(70, 15, 15))[0]
    right = kind != "newer" and rng.random() < RIGHT_SHARE
    best = (tasks.place_value if right else tasks.version_rule)(a, b)
    answer = best if kind != "smaller" else (b if best == a else a)
    templates = {"bigger": tasks.BIGGER, "smaller": SMALLER, "newer": NEWER}[kind]
    question = rng.choice(templates).format(a=a, b=b)
    reasoning = f"{(tasks.by_place if right else by_version)(a, b)} So {answer} is {kind}."
    if rng.random() < 0.85:
        prompt = tasks.messages(question)
        tagged = rng.random() < TAGGED_SHARE
    else:
        prompt, tagged = tasks.messages(question, system_prompt=None), False
    if tagged:
        return prompt, f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    return prompt, reasoning if rng.random() < 0.7 else f"{answer} is {kind}."


def make_tokenizer(texts: list[str], vocabulary: int = 512) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of `vocabulary` tokens whose digits stay single; any text in any language can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(TAGS),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])  # ordinary tokens: decoding keeps them
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=smoke.CHATML,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: "PreTrainedTokenizerFast", hidden: int, layers: int) -> "Qwen2ForCausalLM":
    """A Qwen2 of so many layers with `hidden` features and 32 for each head, random, in 32 bits."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=max(1, hidden // 64),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: "PreTrainedTokenizerFast", chats: list[tuple[list[dict], str]], length: int) -> torch.Tensor:
    """[chats, length, 2] int16: token ids, right-padded, and whether each is to be learned (the completion's are)."""
    prompts = [str(tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False)) for m, _ in chats]
    starts = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    texts = [p + completion + tokenizer.eos_token for p, (_, completion) in zip(prompts, chats, strict=True)]
    out = torch.zeros(len(chats), length, 2, dtype=torch.int16)
    for row, start, ids in zip(out, starts, tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > length:
            raise ValueError(f"an example has {len(ids)} tokens, more than {length}: raise `length` in encode()")
        row[: len(ids), 0] = torch.tensor(ids, dtype=torch.int16)
        row[start : len(ids), 1] = 1
    return out


def make_corpus(chats: int, seed: int) -> list[tuple[list[dict], str]]:
    """So many chats, the same for the same seed, each as `example` gives it."""
    rng = random.Random(seed)
    return [example(rng) for _ in range(chats)]


def train(
    model: torch.nn.Module, data: torch.Tensor, *, steps: int, batch: int, lr: float, device: str, seed: int
) -> None:
    """Train the model in place with AdamW, a short warm-up and a cosine down to 0.

    Args:
        model (`torch.nn.Module`): From `make_model`; is moved to `device`.
        data (`Tensor`): int16 [chats, length, 2], from `encode`.
        steps (`int`), batch (`int`): Updates, and chats in each, drawn with putting back.
        lr (`float`): The highest learning rate.
        device (`str`): "cuda" for bfloat16 autocast, "cpu" for 32 bits.
        seed (`int`): Of the drawing.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = steps // 50 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )
    data = data.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    started = time.time()
    for step in range(steps):
        rows = data[torch.randint(len(data), (batch,), generator=generator, device=device)].long()
        ids, learned = rows[..., 0], rows[..., 1]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1]).logits
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (nll * learned[:, 1:]).sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}: nll {loss.item():.4f} a chat, {time.time() - started:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make corpus, tokenizer and model as the command line says, train, and save model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chats", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    chats = make_corpus(args.chats, args.seed)
    texts = ["\n".join([*(m["content"] for m in messages), text]) for messages, text in chats[:20_000]]
    tokenizer = make_tokenizer(texts)
    data = encode(tokenizer, chats, 128)
    print(f"{len(chats)} chats, longest {int((data[..., 1].cumsum(1) > 0).any(0).sum())} tokens", flush=True)
    model = make_model(tokenizer, args.hidden, args.layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    train(model, data, steps=args.steps, batch=args.batch, lr=args.lr, device=device, seed=args.seed)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
