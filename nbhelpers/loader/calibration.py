"""The tokens on which dynamic 4-bit measures a model's layers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from nbhelpers.models import chat

from .request import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 512  # at most
# what is measured on when the caller has no prompts of its own
PROMPTS = (
    "A shop sells pencils in boxes of 12. Ana buys 7 boxes and gives 19 pencils away. How many are left?",
    "Which is bigger, 9.11 or 9.9? Explain step by step.",
    "A train leaves at 9:40 and arrives at 13:05. It stops for 25 minutes on the way. How long does it move?",
    "Solve for x: 3(x - 4) + 5 = 2x + 11. Show your work.",
    "A rectangle is 3 cm longer than it is wide and has an area of 88 square centimetres. Find its perimeter.",
    "Tom reads 18 pages a day. After 6 days he has read three quarters of his book. How many pages has the book?",
    "If every bloop is a razzle and some razzles are lazzles, must some bloops be lazzles? Why or why not?",
    "The price of a coat rises by 20 % and then falls by 20 %. Is it cheaper or dearer than before, and by how much?",
    "Write the numbers from 1 to 20 that leave a remainder of 2 when divided by 3, and add them up.",
    "Using 3, 5, 8 and 10 once each with + - * /, make 24. Check your answer.",
    "Three friends share 84 euros in the ratio 2:3:7. How much does each of them get?",
    "What is the probability that two fair dice show a sum of at least 10? Give a fraction in lowest terms.",
)


def token_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[Prompt] | None = None) -> torch.Tensor:
    """`LongTensor` [1, at most 512]: prompts one after another, as training sees them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        prompts (`Iterable[Prompt]`, *optional*): Texts or lists of messages; a dozen word problems if there are none.
    """
    ids: list[int] = []
    for prompt in prompts or PROMPTS:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids += chat.prompt_ids(tokenizer, messages)
    return torch.tensor([ids[:TOKENS]])
