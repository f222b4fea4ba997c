"""What lesson 4 looks through counts right: operations, and bytes that come and go."""

import torch

from nbhelpers.lessons.spy import PARTS, Spy, Watch


def test_operations_are_counted_and_views_are_not():
    x = torch.zeros(4, 4)
    with Spy() as spy:
        (x.T[1:] + 1).relu()
    assert spy.operations == 2


def test_bytes_come_and_go_and_what_was_there_counts_nothing():
    x, seen = torch.zeros(8), []
    with Spy([x]) as spy:
        y = torch.ones(100)
        z = y[:10]  # a view keeps the storage
        x += 1
        seen.append(spy.bytes)
        del y
        seen.append(spy.bytes)
        del z
        seen.append(spy.bytes)
    assert seen == [400, 400, 0]


def test_a_step_is_told_part_by_part():
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    with Watch(model, optimizer) as watch:
        watch.phase("writing")
        cache = torch.zeros(25)
        watch.is_cache(cache)
        model(torch.ones(1, 10))
        del cache
        watch.phase("training")
        model(torch.ones(3, 10)).sum().backward()
        optimizer.step()
        torch.ones(1)
    assert watch.peak("writing", "KV cache") == 1e-4 and watch.peak("training", "KV cache") == 0
    assert watch.peak("writing", "gradients") == 0 and watch.peak("training", "gradients") == 4e-4
    assert watch.peak("training", "optimizer") >= 8e-4 and watch.peak("writing", "LoRA") == 4e-4
    assert watch.peak("training") >= watch.peak("training", "work") > 0
    picture = watch.picture()
    assert "training" in picture.words and [*PARTS] == [text.get_text() for text in picture.axes[0].get_legend().texts]
