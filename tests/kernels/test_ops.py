"""The ops as torch sees them: registration, fake implementations, counting, the choice of a backend."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lowbit_lightning import kernels
from lowbit_lightning.kernels import dispatch

OPS = torch.ops.lowbit_lightning


def step_arguments(n: int = 2) -> tuple:
    """Flat arguments of the op optimizer_step: SGD with momentum on n small matrices, 8-bit."""
    params = [torch.randn(3, 70) for _ in range(n)]
    states = [torch.full((3, 70), 127, dtype=torch.uint8) for _ in range(n)]
    scales = [torch.zeros(3, 1) for _ in range(n)]
    steps = [torch.zeros(()) for _ in range(n)]
    grads = [torch.randn(3, 70) for _ in range(n)]
    hyper = [0.1, 0.9, 0.0, 0.0]
    optional = [None] * 4
    keys: tuple = list(range(n)), [0] * n, False, []
    return ("sgd_momentum", params, steps, states, scales, 256, *keys, grads, hyper, *optional, 0, False)


def lamb_arguments() -> tuple:
    """Flat arguments of the op optimizer_norms: LAMB on one small matrix, 32-bit."""
    tensors = [torch.randn(3, 70)], [torch.zeros(())], [torch.zeros(3, 70), torch.zeros(3, 70)], [torch.zeros(0)] * 2
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.0]
    return ("lamb", *tensors, 256, [0], [0], False, [], [torch.randn(3, 70)], hyper, *[None] * 4, 0, False)


def lowbit(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [5, 70] in the format."""
    return kernels.lowbit_quantize(torch.randn(5, 70), form)


def convolution(
    rows: int, b: tuple[int, ...], a_scales: int, b_scales: int, *rest: int | torch.Tensor, columns: int = 16
) -> tuple:
    """Operands of 2 images of 6 pixels, results of 4, and 2 taps."""
    matrices = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, columns), b))
    table = torch.tensor([[0, 1], [2, 3], [-1, 4], [5, -1]], dtype=torch.int32)
    return (*matrices, torch.rand(a_scales), torch.rand(b_scales), table, 2, *rest, torch.float32)


def grouped(a: tuple[int, ...], b: tuple[int, ...], *rest: tuple[int, ...]) -> tuple:
    """Operands of two groups."""
    matrices = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in (a, b))
    a_scales, b_scales, *bias = rest
    return (
        *(*matrices, torch.rand(a_scales), torch.rand(b_scales), torch.tensor([2, 5])),
        *(torch.rand(shape) for shape in bias),
        torch.float32,
    )


CASES: list[tuple[str, Callable[[], tuple]]] = [
    ("quantize_blockwise", lambda: (torch.randn(3, 70), "dynamic_signed", None, 64)),
    (
        "dequantize_blockwise",
        lambda: (
            *kernels.quantize_blockwise(torch.randn(3, 70), block_size=64),
            *("dynamic_signed", None, 64, torch.bfloat16),
        ),
    ),
    ("quantize_blockwise", lambda: (torch.randn(3, 70), "custom", torch.linspace(-1, 1, 256), 64)),
    ("quantize_rowwise", lambda: (torch.randn(3, 70), None)),
    ("quantize_colwise", lambda: (torch.randn(3, 70), 2**40)),
    ("quantize_both", lambda: (torch.randn(3, 70), -1)),
    (
        "int8_matmul",
        lambda: (
            *(torch.randint(-127, 128, (n, 16), dtype=torch.int8) for n in (3, 5)),
            *(torch.rand(3), torch.rand(5), torch.rand(5), torch.float32),
        ),
    ),
    ("quantize_channels", lambda: (torch.randn(3, 70), 2**40)),
    ("quantize_image", lambda: (torch.randn(3, 70), None)),
    ("int8_conv", lambda: convolution(12, (5, 2, 16), 12, 5, torch.rand(5))),
    ("int8_conv_input", lambda: convolution(8, (16, 2, 5), 8, 5, 6)),
    ("int8_conv_weight", lambda: convolution(3, (12, 16), 3, 16, columns=8)),
    ("quantize_groups", lambda: (torch.randn(6, 70), torch.tensor([2, 5]), 2**40)),
    ("quantize_group_columns", lambda: (torch.randn(6, 70), torch.tensor([2, 6], dtype=torch.int32), None)),
    ("int8_grouped_matmul", lambda: grouped((5, 16), (2, 3, 16), (5,), (2, 3), (2, 3))),
    ("int8_grouped_outer", lambda: grouped((5, 16), (5, 3), (2, 16), (2, 3))),
    ("lowbit_quantize", lambda: (torch.randn(3, 70), "int3", "lsq")),
    ("lowbit_dequantize", lambda: (*lowbit("nf4-dq"), "nf4-dq", 70, torch.bfloat16)),
    ("lowbit_embedding", lambda: (*lowbit("int2"), torch.tensor([[1, 0], [4, 4]]), "int2", 70, torch.float16)),
    ("lowbit_matmul", lambda: (torch.randn(2, 3, 70), *lowbit("nf4"), torch.rand(5), "nf4")),
    (
        "lowbit_grouped_matmul",
        lambda: (
            *(torch.randn(6, 70), *kernels.lowbit_quantize(torch.randn(2, 5, 70), "nf4"), torch.tensor([2, 5])),
            *(torch.rand(2, 5), "nf4", 70, False),
        ),
    ),
    ("lowbit_matmul_backward", lambda: (torch.randn(2, 3, 5), *lowbit("int4"), "int4", 70)),
    ("int8_outlier_matmul", lambda: (torch.randn(16, 70), *lowbit("int8"), torch.rand(5), 2.0)),
    ("split_outliers", lambda: (torch.randn(16, 70), *lowbit("int8"), 2.0)),
    ("optimizer_step", lambda: (*step_arguments(), None)),
    ("optimizer_norms", lambda: lamb_arguments()),
]
"""Ops, and arguments of each."""


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_registered_as_torch_wants_it(op: str, arguments: Callable[[], tuple]) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(OPS, op).default, arguments(), test_utils=tests)


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_sizes_may_be_symbols(op: str, arguments: Callable[[], tuple]) -> None:
    """Every op under ``torch.compile(dynamic=True)``, with no size known: results have the shapes of a real call."""
    flat, spec = tree_flatten(arguments())
    known = tree_map_only(torch.Tensor, lambda x: (x.shape, x.dtype), getattr(OPS, op)(*tree_unflatten(flat, spec)))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        symbols = tree_map_only(torch.Tensor, partial(symbolic, mode), flat)
        found = getattr(OPS, op)(*tree_unflatten(symbols, spec))
        shapes = tree_map_only(torch.Tensor, lambda x: (torch.Size(map(int, x.shape)), x.dtype), found)
    assert shapes == known


def symbolic(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.ndim)
    return mode.from_tensor(x, symbolic_context=context)


def strided(x: object) -> object:
    """The same values with a gap behind each, and in the gaps others."""
    return torch.stack([x, x + 1], -1)[..., 0] if isinstance(x, torch.Tensor) and x.ndim else x


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "arguments"), [case for case in CASES if not case[0].startswith("optimizer")])
def test_tensors_need_not_be_contiguous(op: str, arguments: Callable[[], tuple], backend: str) -> None:
    given = arguments()
    with kernels.use_backend(backend):
        found, expected = (getattr(OPS, op)(*map(change, given)) for change in (strided, lambda x: x))
    for x, y in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, expected)), strict=True):
        assert torch.equal(x, y)


def test_calls_are_counted_by_backend() -> None:
    kernels.reset_calls()
    kernels.quantize_rowwise(torch.randn(2, 3))
    with kernels.use_backend("reference"):
        kernels.quantize_rowwise(torch.randn(2, 3))
        kernels.quantize_rowwise(torch.randn(2, 3))
    assert kernels.calls() == {("quantize_rowwise", "cpu"): 1, ("quantize_rowwise", "reference"): 2}
    kernels.reset_calls()
    assert kernels.calls() == {}


def test_calls_are_counted_under_compile() -> None:
    compiled = torch.compile(lambda x: kernels.quantize_rowwise(x)[0] * 2, fullgraph=True, backend="aot_eager")
    kernels.reset_calls()
    for _ in range(3):
        compiled(torch.randn(2, 3))
    assert kernels.calls() == {("quantize_rowwise", "cpu"): 3}


def test_a_step_is_seen_by_version_counters() -> None:
    flat = step_arguments(1)
    p = flat[1][0].requires_grad_()
    loss = (p * p).sum()
    with torch.no_grad():
        OPS.optimizer_step(*flat, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'tpu'"), kernels.use_backend("tpu"):
        pass


def test_long_sums_are_split() -> None:
    """127 * 127 * 140000 is more than an int32 holds."""
    k = 140_000
    a = torch.full((1, k), 127, dtype=torch.int8)
    result = kernels.int8_matmul(a, a, torch.ones(1), torch.ones(1), torch.ones(1))
    assert result.item() == pytest.approx(127 * 127 * k + 1, rel=1e-7)


STEP_TWICE = """
    import torch
    from lowbit_lightning import kernels
    for _ in range(2):
        kernels.quantize_blockwise(torch.randn(2, 300))
    print(kernels.calls())
"""


def test_without_a_compiler_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    """In a fresh interpreter with nothing on its path."""
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(STEP_TWICE)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", "HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    assert "{('quantize_blockwise', 'reference'): 2}" in done.stdout
    assert done.stderr.count("many times slower") == 1
    assert "compiler" in done.stderr


def test_the_reference_on_request_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_LIGHTNING_BACKEND", "reference")
    monkeypatch.setattr(dispatch, "_chosen", {})
    kernels.reset_calls()
    kernels.quantize_blockwise(torch.randn(2, 300))  # any warning is an error
    assert kernels.calls() == {("quantize_blockwise", "reference"): 1}
