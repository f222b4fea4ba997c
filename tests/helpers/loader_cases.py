"""What the tests of the loader share."""

from nbhelpers import loader


def load(what, quantization="nf4", **more):
    """The model alone."""
    model, _ = loader.load(what, quantization=quantization, progress=False, **more)
    return model
