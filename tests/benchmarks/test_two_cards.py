"""What a step of two cards is compared with: the same texts, one card after the other."""

from benchmarks import common
from benchmarks.engines import grpo
from nbhelpers.engines import Completion, Sampling


def test_one_card_writes_in_its_turns_what_two_share():
    for most in (8, 768):
        shared = [sorted(grpo.lengths("ragged", turn, 0, 2, most) + grpo.lengths("ragged", turn, 1, 2, most))
                  for turn in (1, 2)]  # fmt: skip
        alone = [n for turn in (1, 2) for n in grpo.lengths("ragged", turn, (turn - 1) % 2, 2, most)]
        assert sorted(alone) == shared[0] == shared[1]
        assert (min(alone), max(alone)) == (most // 4, most)
    parts = [grpo.lengths("ragged", 1, part, 2, 768) for part in range(2)]
    assert sorted(parts[0]) != sorted(parts[1])
    assert grpo.lengths("ragged", 3, 0, 2, 768) != parts[0]
    assert grpo.lengths("equal", 1, 0, 2, 768) == [768] * 8


def test_completions_get_the_lengths_that_were_decided():
    class Engine:
        def generate(self, prompts, sampling):
            assert sampling.min_tokens == sampling.max_tokens  # no end token comes before
            return [Completion([5] * sampling.max_tokens, [-1.0] * sampling.max_tokens) for _ in range(8)]

    alone, shared = Engine(), [Engine(), Engine()]
    grpo.write_lengths(alone, "ragged", None, 2)
    for part, engine in enumerate(shared):
        grpo.write_lengths(engine, "ragged", part, 2)

    def turn(engine):
        completions = engine.generate([[1, 2]], Sampling(64, num_generations=8))
        assert all(len(one.token_ids) == len(one.logprobs) for one in completions)
        return [len(one.token_ids) for one in completions]

    for engine in (alone, *shared):
        turn(engine)  # the first is not timed
    assert turn(alone) + turn(alone) == turn(shared[0]) + turn(shared[1])


def test_the_share_of_the_time_of_one_card():
    one = common.row("m/1K-1-of-2-gpus/step_time", "ours", 9.0, "s", mean_s=6.0, steps=5)
    two = common.row("m/1K-2-gpus/step_time", "ours", 9.0, "s", mean_s=8.0, steps=5, alone="m/1K-1-of-2-gpus")
    (share,) = grpo.efficiencies([one, two])
    assert (share["what"], share["value"], share["unit"]) == ("m/1K-2-gpus/efficiency", 0.75, "share")
    assert grpo.efficiencies([two]) == []
