"""Sizes of launches. triton.cdiv and triton.next_power_of_2 do the same at 2 us a call, as they also serve inside
kernels; a decoder layer makes some hundred such calls, and small models wait for Python more than for the GPU."""


def ceil_div(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
