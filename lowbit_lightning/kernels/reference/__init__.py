"""What every op means, in plain torch, on any device: slow, obviously right, and the yardstick of the other backends.

All arithmetic is float32 with one rounding per operation, in the order written, so that another backend that does
the same agrees to the bit.
"""


def load() -> None:
    """The reference needs nothing."""
