"""One call of every kernel: small inputs of all dtypes, rules and formats that training uses.

A case builds its inputs on the CPU from a fixed seed, so that every backend gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import BlockGrid, weight_format

EXACT = 0.0
ROWS, COLUMNS = 96, 512
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FORMATS = ("int8", "nf4", "fp4", "int4", "int3", "int2")
_PRODUCT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
_HYPER = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, "alpha": 0.95, "t_alpha": 10.0, "t_beta3": 10.0}


@dataclass(frozen=True)
class Case:
    """``run(device)`` returns what the op wrote. ``tolerance``: of the relative error against the reference, which is
    a 2-norm; ``EXACT``: equal to the bit."""

    op: str
    name: str
    run: Callable[[torch.device], list[Tensor]]
    tolerance: float = EXACT


def cases() -> list[Case]:
    """All of them, in the order of their ops."""
    return [*_blockwise(), *_int8(), *_product(), *_convolution(), *_grouped(), *_lowbit(), *_steps()]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _blockwise() -> Iterator[Case]:
    for name, dtype in _DTYPES.items():
        x = _random(ROWS, COLUMNS + 7, dtype=dtype)

        def quantize(device: torch.device, x: Tensor = x) -> list[Tensor]:
            books = ("dynamic_signed", "dynamic_unsigned")
            return [t for book in books for t in kernels.quantize_blockwise(x.to(device), book)]

        yield Case("quantize_blockwise", name, quantize)

    codes = _codes(ROWS, COLUMNS)
    scales = _random(*BlockGrid.of(codes.shape, 256).scales_shape)
    for name, dtype in _DTYPES.items():

        def dequantize(device: torch.device, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [kernels.dequantize_blockwise(codes.to(device), scales.to(device), "dynamic_signed", 256, dtype)]

        yield Case("dequantize_blockwise", name, dequantize)


def _int8() -> Iterator[Case]:
    for op in ("quantize_rowwise", "quantize_colwise", "quantize_both", "quantize_channels", "quantize_image"):
        for name, dtype in _DTYPES.items():

            def quantize(device: torch.device, op: str = op, dtype: torch.dtype = dtype) -> list[Tensor]:
                x = _random(ROWS, COLUMNS, dtype=dtype).to(device)
                return [t for seed in (None, 7) for t in getattr(kernels, op)(x, seed)]

            yield Case(op, name, quantize)
    for name, dtype in _DTYPES.items():

        def rotate(device: torch.device, dtype: torch.dtype = dtype) -> list[Tensor]:
            x = _random(ROWS, COLUMNS + 7, dtype=dtype).to(device)
            return [kernels.hadamard(x, dim) for dim in (0, 1)]

        yield Case("hadamard", name, rotate)


def _product() -> Iterator[Case]:
    a, b = ((_random(rows, COLUMNS) * 40).clamp(-127, 127).to(torch.int8) for rows in (ROWS, ROWS + 32))
    factors = _random(ROWS), _random(ROWS + 32), _random(ROWS + 32)
    for name, dtype in _DTYPES.items():

        def product(device: torch.device, dtype: torch.dtype = dtype) -> list[Tensor]:
            a_scales, b_scales, bias = (t.to(device) for t in factors)
            return [kernels.int8_matmul(a.to(device), b.to(device), a_scales, b_scales, bias, dtype)]

        yield Case("int8_matmul", name, product)


def _convolution() -> Iterator[Case]:
    """Of 4 images of 6 x 4 pixels by 3 x 1 taps, and its gradients."""
    images, height, width, taps, channels, features = 4, 6, 4, 3, 64, 48
    pixels = height * width
    taken = torch.arange(pixels)[:, None] + width * (torch.arange(taps) - 1)
    table = torch.where((taken < 0) | (taken >= pixels), -1, taken).int()
    x, weight, dy = (
        _int8_of(images * pixels, channels),
        _int8_of(features, taps, channels),
        _int8_of(images * pixels, features),
    )
    of_pixels, of_features, of_channels = (_random(n).abs() for n in (images * pixels, features, channels))
    operands = {
        "int8_conv": (x, weight, of_pixels, of_features, table, images, None),
        "int8_conv_input": (dy, weight, of_pixels, of_channels, table, images, pixels),
        "int8_conv_weight": (dy.T.contiguous(), x, of_features, of_channels, table, images),
    }
    yield from _by_dtype(operands)


def _grouped() -> Iterator[Case]:
    """Three groups of rows, of which one is empty."""
    offs = torch.tensor([40, 40, ROWS])
    for op in ("quantize_groups", "quantize_group_columns"):
        for name, dtype in _DTYPES.items():

            def quantize(device: torch.device, op: str = op, dtype: torch.dtype = dtype) -> list[Tensor]:
                x = _random(ROWS, COLUMNS, dtype=dtype).to(device)
                return [t for seed in (None, 7) for t in getattr(kernels, op)(x, offs, seed)]

            yield Case(op, name, quantize)
    a, b, weights = _int8_of(ROWS, 64), _int8_of(ROWS, COLUMNS), _int8_of(3, 48, 64)
    scales = [_random(*shape).abs() for shape in ((ROWS,), (3, 48), (3, 64), (3, COLUMNS))]
    operands = {
        "int8_grouped_matmul": (a, weights, scales[0], scales[1], offs, _random(3, 48)),
        "int8_grouped_outer": (a, b, scales[2], scales[3], offs),
    }
    yield from _by_dtype(operands)


def _int8_of(*shape: int) -> Tensor:
    return (_random(*shape) * 40).clamp(-127, 127).to(torch.int8)


def _by_dtype(operands: Mapping[str, tuple]) -> Iterator[Case]:
    """Ops whose last argument is the dtype of the result."""
    for op, arguments in operands.items():
        for name, dtype in _DTYPES.items():

            def product(
                device: torch.device, op: str = op, arguments: tuple = arguments, dtype: torch.dtype = dtype
            ) -> list[Tensor]:
                there = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
                return [getattr(kernels, op)(*there, dtype)]

            yield Case(op, name, product)


def _lowbit() -> Iterator[Case]:
    x = _random(32, COLUMNS)
    x[:, 5] *= 60

    def split(device: torch.device) -> list[Tensor]:
        return [*torch.ops.lowbit_lightning.split_outliers(x.to(device), *_weight("int8", device), 6.0)]

    yield Case("split_outliers", "float32", split, 1e-5)
    for form in _FORMATS:

        def quantize(device: torch.device, form: str = form) -> list[Tensor]:
            return [*kernels.lowbit_quantize(_random(ROWS, COLUMNS).to(device), form)]

        def dequantize(device: torch.device, form: str = form) -> list[Tensor]:
            return [kernels.lowbit_dequantize(*_weight(form, device), form, COLUMNS)]

        def look_up(device: torch.device, form: str = form) -> list[Tensor]:
            indices = torch.arange(0, ROWS, 5, device=device)
            return [kernels.lowbit_embedding(indices, *_weight(form, device), form, COLUMNS)]

        yield Case("lowbit_quantize", form, quantize, 1e-6)
        yield Case("lowbit_dequantize", form, dequantize)
        yield Case("lowbit_embedding", form, look_up)
    for op, rows in (("lowbit_gemv", 1), ("lowbit_gemv", 4), ("lowbit_matmul", 32), ("lowbit_matmul_backward", 32)):
        for form in _FORMATS:
            for name, dtype in _DTYPES.items():

                def product(
                    device: torch.device, op: str = op, rows: int = rows, form: str = form, dtype: torch.dtype = dtype
                ) -> list[Tensor]:
                    weight = _weight(form, device)
                    if op == "lowbit_matmul_backward":
                        dy = _random(rows, ROWS, dtype=dtype).to(device)
                        return [torch.ops.lowbit_lightning.lowbit_matmul_backward(dy, *weight, form, COLUMNS)]
                    x = _random(rows, COLUMNS, dtype=dtype).to(device)
                    return [kernels.lowbit_matmul(x, *weight, None, form)]

                yield Case(op, f"{form} {name}{', one row' * (rows == 1)}", product, _PRODUCT_TOLERANCE[name])


def _weight(form: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Any codes are a weight; scales that are codes themselves too."""
    f = weight_format(form)
    scales = _random(ROWS, f.scales_width(COLUMNS)).abs().clamp(0.1, 2)
    if f.scales_dtype == torch.uint8:
        scales = scales * 100
    return _codes(ROWS, f.packed_width(COLUMNS)).to(device), scales.to(f.scales_dtype).to(device)


def _codes(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns).mul(7919).remainder(251).to(torch.uint8).view(rows, columns)


def _steps() -> Iterator[Case]:
    """Every rule with 8-bit states, and Adam in all its forms."""
    forms = [(name, "8 bits") for name in sorted(rules.RULES)]
    forms += [("adamw", form) for form in ("32 bits", "bfloat16", "bfloat16, 24-bit master", "bfloat16, stochastic")]
    for rule, form in forms:
        if rule not in rules.RULES:
            continue

        def step(device: torch.device, rule: str = rule, form: str = form) -> list[Tensor]:
            return _step(rules.get(rule), form, device)

        yield Case("optimizer_step", f"{rule}, {form}", step)
    for rule in sorted(name for name, found in rules.RULES.items() if found.norms):

        def norms(device: torch.device, rule: str = rule) -> list[Tensor]:
            return _step(rules.get(rule), "8 bits", device, norms_only=True)

        yield Case("optimizer_norms", rule, norms, 1e-6)


def _step(rule: rules.Rule, form: str, device: torch.device, norms_only: bool = False) -> list[Tensor]:
    dtype = torch.bfloat16 if form.startswith("bfloat16") else torch.float32
    shape, grid = (ROWS, COLUMNS), BlockGrid.of(torch.Size((ROWS, COLUMNS)), 256)
    states: list[list[Tensor]] = []
    scales: list[list[Tensor]] = []
    for i, state in enumerate(rule.states):
        in_32_bits = form == "32 bits" or state.slow
        held = _random(ROWS, COLUMNS + i)[:, i:] * 0.1 if in_32_bits else _codes(ROWS, COLUMNS)
        held_scales = torch.zeros(0) if in_32_bits else _random(*grid.scales_shape) * 0.1
        if state.non_negative:
            held, held_scales = held.abs() if in_32_bits else held, held_scales.abs()
        states.append([held.contiguous().to(device)])
        scales.append([held_scales.to(device)])
    parameter = _random(*shape, dtype=dtype).to(device)
    remainders = [torch.zeros(shape, dtype=torch.int8, device=device)] if form.endswith("master") else []
    arguments = kernels.StepArguments(
        rule.name,
        [parameter],
        [torch.full((), 3.0, device=device)],
        states,
        scales,
        stochastic_rounding=form.endswith("stochastic"),
        remainders=remainders,
    )
    gradients = [_random(ROWS, COLUMNS + 1)[:, :COLUMNS].contiguous().to(dtype).to(device)]
    scalars = kernels.StepScalars([_HYPER.get(name, 0.9) for name in rule.hyper], seed=7)
    norms = kernels.optimizer_norms(arguments, gradients, scalars) if rule.norms else None
    if norms_only:
        return [] if norms is None else [norms]
    kernels.optimizer_step(arguments, gradients, scalars, norms)
    return [parameter, *(t for held in (*states, *scales) for t in held), *remainders]
