"""An engine that writes what it is told, so that a test can say how good a model is."""

from collections.abc import Callable

from nbhelpers.engines import Engine
from nbhelpers.engines.base import STOP_ID, Completion


class Told(Engine):
    """Writes `text(prompt, i)` as the i-th completion of a prompt, cut off at the limit like anybody's."""

    name = "told"

    def __init__(self, tokenizer, text: Callable[[str, int], str]):
        self.tokenizer, self.text = tokenizer, text

    def generate(self, prompts, sampling):
        written = []
        for prompt in prompts:
            for i in range(sampling.num_generations):
                said = self.text(str(self.tokenizer.decode(prompt)), i)
                ids = [*self.tokenizer(said)["input_ids"], self.tokenizer.eos_token_id]
                ended = {"reason": STOP_ID} if len(ids) <= sampling.max_tokens else {}
                ids = ids[: sampling.max_tokens]
                written.append(Completion(ids, [-1.0] * len(ids), **ended))
        return written
