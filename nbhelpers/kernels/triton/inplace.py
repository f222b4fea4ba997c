"""When a kernel may write its result over its input, and how autograd is told.

A kernel writes through a raw pointer, which autograd does not see. `overwritten` tells it: another operation that saved
the old values then raises "modified by an inplace operation" in its backward, and so does a second backward through the
same graph, instead of computing with wrong numbers.
"""

import torch
from torch import Tensor


def may_overwrite(t: Tensor) -> bool:
    """Whether t is an intermediate result that can be written over.

    That is, t is neither a leaf that requires a gradient (a parameter, a test's input) nor a view of one, and no
    element of it stands for several (an expanded dimension).
    """
    base = t if t._base is None else t._base  # of a view: the tensor that it views
    if base.requires_grad and base.is_leaf:
        return False
    strides = t.stride()
    return 0 not in strides or all(stride or n <= 1 for n, stride in zip(t.shape, strides, strict=True))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of one storage (they may still be disjoint parts of it)."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def overwritten(*tensors: Tensor) -> None:
    """Tell autograd that the tensors' values have changed."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
