"""The CPU backend: C++ from ``src/``, compiled by the host's compiler on first use and called through ctypes.

Each file has the functions of one class in ``backend.py``; their results are bit-identical to the reference.
"""

from lowbit_lightning.kernels.compile import host_compiler


def load() -> None:
    """Raise CompilerNotFound where there is no host compiler. Compiles nothing."""
    host_compiler()
