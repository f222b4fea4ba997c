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
    total = sum(end.sum().item() for end in ends[1].values())
    found = {"difference": difference(ends[1], ends[0]), "sum": total, "entropy": log["entropy"], "lean": one.lean}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    end_of_a_process()


def test_two_processes_learn_what_trls_two_learn(tmp_path, warm):
    from step_cases import in_two_processes

    in_two_processes(warm, __file__, tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["lean"] and one["difference"] < 1e-4
    assert one["sum"] == two["sum"] and one["entropy"] == two["entropy"]  # each has the other's gradients


if __name__ == "__main__":
    run(sys.argv[1])
