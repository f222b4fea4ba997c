"""Two processes, as on Kaggle's two T4s: the walk goes past DDP's forward, so the trainer adds up the gradients."""

import json
import os
import sys
from pathlib import Path


def run(folder: str) -> None:
    """In each of two processes: two updates by stock TRL and by ours; how far apart they end."""
    import trl
    from step_cases import difference, end_of_a_process, make_model, make_trainer

    from nbhelpers.training import trainer

    ends = []
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        model = make_model("qwen2")
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        one = make_trainer(
            cls, model, folder, optim="sgd", gradient_accumulation_steps=2, per_device_train_batch_size=4, beta=0.04,
            ddp_find_unused_parameters=False,
        )  # fmt: skip
        one.train()
        ends.append({n: p.detach() - start[n] for n, p in model.named_parameters() if p.requires_grad})
        log = next(entry for entry in reversed(one.state.log_history) if "entropy" in entry)
    reduced = {size: averaged(one, size) for size in (1e9, 2000)}
    total = sum(end.sum().item() for end in ends[1].values())
    found = {"difference": difference(ends[1], ends[0]), "sum": total, "entropy": log["entropy"], "lean": one.lean}
    found |= {"calls": [calls for calls, _ in reduced.values()], "right": [right for _, right in reduced.values()]}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    end_of_a_process()


def averaged(one, size: float) -> tuple[int, bool]:
    """How many calls the average of this process's own gradients takes where `size` bytes go together, and whether each
    is what the two have on average."""
    import torch

    from nbhelpers.training import step_hooks

    rank, parameters = int(os.environ["RANK"]), [p for p in one.model.parameters() if p.requires_grad]
    step_hooks.REDUCED_BYTES, calls, wanted = size, [], []
    for number, parameter in enumerate(parameters):
        both = [torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2 * number + r)) for r in (0, 1)]
        parameter.grad = both[rank]
        wanted.append((both[0] + both[1]) / 2)
    reduce = one.accelerator.reduce
    one.accelerator.reduce = lambda *args, **options: calls.append(1) or reduce(*args, **options)
    one._average_gradients(one.model)
    one.accelerator.reduce = reduce
    return len(calls), all(torch.equal(p.grad, mean) for p, mean in zip(parameters, wanted, strict=True))


def test_two_processes_learn_what_trls_two_learn(tmp_path, warm):
    from step_cases import in_two_processes

    in_two_processes(warm, __file__, tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["lean"] and one["difference"] < 1e-4
    assert all(one["right"] + two["right"])
    assert one["calls"][0] == 1 < one["calls"][1]  # all gradients of an adapter at once; less where that is too much
    assert one["sum"] == two["sum"] and one["entropy"] == two["entropy"]  # each has the other's gradients


if __name__ == "__main__":
    run(sys.argv[1])
