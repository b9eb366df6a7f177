"""The ops: validate once, pick the backend by device, count calls.

Backends are modules of equal functions: ``reference`` (plain torch, anywhere), ``cpu`` (C++ by the host's compiler)
and ``cuda`` (CUDA C++ by NVRTC). Nothing is compiled or loaded before the first call on a device.
``LOWBIT_LIGHTNING_BACKEND=reference`` forces the reference everywhere, ``use_backend`` does so for a block of code.

Every op is registered with ``torch.library`` in the namespace ``lowbit_lightning``, with a fake implementation and
its mutated arguments, so that autograd, ``torch.compile`` and version counters know what it touches.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.arguments import FLOATS, StepArguments
from lowbit_lightning.kernels.backends import calls, reset_calls, run, use_backend

__all__ = [
    "StepArguments",
    "calls",
    "dequantize_blockwise",
    "int8_matmul",
    "optimizer_norms",
    "optimizer_step",
    "quantize_blockwise",
    "quantize_both",
    "quantize_colwise",
    "quantize_rowwise",
    "reset_calls",
    "use_backend",
]

LONGEST_INT8_SUM = (2**31 - 1) // 127**2
"""Products of two int8 in [-127, 127] that an int32 holds in the worst case: 133,144."""


# -- block-wise quantisation -----------------------------------------------------------------------------------------


def quantize_blockwise(
    x: Tensor, codebook: str | Tensor = "dynamic_signed", block_size: int = formats.DEFAULT_BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to 8-bit codes, block by block inside its rows (a row: everything behind dimension 0).

    Args:
        x: float32, float16 or bfloat16, of any shape.
        codebook: a name that ``formats.codebook`` knows, or a sorted float32 vector of 2 to 256 values in [-1, 1]
        that ends at 1.
        block_size: a power of two from 32 to 4096.

    Returns:
        codes (uint8, x's shape) and scales (float32, ``[rows, ceil(row_length / block_size)]``; signed where the
        codebook has no -1).

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    formats.check_block_size(block_size)
    name, values = _codebook(codebook, x.device)
    return torch.ops.lowbit_lightning.quantize_blockwise(x, name, values, block_size)


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    codebook: str | Tensor = "dynamic_signed",
    block_size: int = formats.DEFAULT_BLOCK_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The inverse of ``quantize_blockwise``: ``codebook[codes] * scales``, of the codes' shape, in ``dtype``.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    formats.check_block_size(block_size)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    expected = formats.BlockGrid.of(codes.shape, block_size).scales_shape
    if scales.dtype != torch.float32 or tuple(scales.shape) != expected or scales.device != codes.device:
        raise ValueError(
            f"scales must be float32 of shape {expected} on {codes.device} for codes of shape {tuple(codes.shape)} in "
            f"blocks of {block_size}, got {scales.dtype} of shape {tuple(scales.shape)} on {scales.device}"
        )
    name, values = _codebook(codebook, codes.device)
    return torch.ops.lowbit_lightning.dequantize_blockwise(codes, scales, name, values, block_size, dtype)


def _codebook(codebook: str | Tensor, device: torch.device) -> tuple[str, Tensor | None]:
    if isinstance(codebook, str):
        formats.check_name(codebook)
        return codebook, None
    formats.check_codebook(codebook)
    return "custom", codebook.to(device)


@cache
def _named_values(name: str, device: torch.device) -> Tensor:
    return formats.codebook(name).to(device)


def _resolved(name: str, values: Tensor | None, device: torch.device) -> tuple[str, Tensor | None]:
    """What a backend takes: one of the dynamic maps, or "custom" with values."""
    if values is not None or name in formats.MAPS:
        return name, values
    return "custom", _named_values(name, device)


def _quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    return run("quantize_blockwise", x.device, x.contiguous(), *_resolved(codebook, values, x.device), block_size)


def _quantize_blockwise_fake(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(formats.BlockGrid.of(x.shape, block_size).scales_shape, dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), scales


def _dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    book = _resolved(codebook, values, codes.device)
    return run("dequantize_blockwise", codes.device, codes.contiguous(), scales.contiguous(), *book, block_size, dtype)


def _dequantize_blockwise_fake(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


# -- optimizer step --------------------------------------------------------------------------------------------------


def optimizer_step(arguments: StepArguments, norms: Tensor | None = None) -> None:
    """One optimizer step for all parameters of a group, in place; see ``StepArguments`` and
    ``reference.optimizer_step``.

    ``norms``: what ``optimizer_norms`` returned, summed over the ranks that share a parameter; only for rules with
    norms.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed.
    """
    arguments.check()
    rule = rules.get(arguments.rule)
    expected = (len(arguments.params), len(rule.norms))
    if rule.norms and (norms is None or tuple(norms.shape) != expected):
        raise ValueError(
            f"norms must be float64 of shape {expected} for rule {rule.name!r}; optimizer_norms gives them"
        )
    norms = norms if rule.norms else None
    if _through_dispatcher(arguments):
        torch.ops.lowbit_lightning.optimizer_step(*_flatten(arguments), norms)
    else:
        _step(arguments, norms)


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """Sums of squares of what the rule wants norms of: float64 ``[n, len(rule.norms)]``, in a fixed order of
    summation.

    The first phase of rules with a trust ratio; reads the arguments and changes nothing.
    """
    arguments.check()
    if _through_dispatcher(arguments):
        return torch.ops.lowbit_lightning.optimizer_norms(*_flatten(arguments))
    return _norms(arguments)


def _through_dispatcher(arguments: StepArguments) -> bool:
    """Whether torch has to see the op: when it traces, or with tensor subclasses. Thousands of tensors take it
    milliseconds, a good part of what the step itself takes."""
    return torch.compiler.is_compiling() or any(type(p) not in (Tensor, torch.nn.Parameter) for p in arguments.params)


def _flatten(a: StepArguments) -> tuple:
    states, scales = [t for s in a.states for t in s], [t for s in a.scales for t in s]
    tensors = a.rule, a.params, a.grads, a.steps, states, scales, a.hyper, a.block_size, a.lr, a.unscale, a.clip, a.skip
    return *tensors, _as_int64(a.seed), a.ordinals, a.offsets, a.maximize, a.stochastic_rounding, a.remainders


def _as_int64(seed: int) -> int:
    """The same 64 bits as what a schema's int holds."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63


def _unflatten(*flat: Any) -> StepArguments:
    rule, params, grads, steps, states, scales, hyper, block_size, *rest = flat
    n, count = len(params), len(rules.get(rule).states)
    nested = [[flat[s * n : (s + 1) * n] for s in range(count)] for flat in (states, scales)]
    return StepArguments(rule, params, grads, steps, nested[0], nested[1], list(hyper), block_size, *rest)


def _optimizer_step(*flat: Any) -> None:
    _step(_unflatten(*flat[:-1]), flat[-1])


def _step(arguments: StepArguments, norms: Tensor | None) -> None:
    contiguous = _contiguous(arguments)
    for indices, part in contiguous.parts():
        chosen = norms if norms is None or part is contiguous else norms.index_select(0, _index(part, indices))
        run("optimizer_step", arguments.device, part, chosen)
    for original, p, step in zip(arguments.params, contiguous.params, arguments.steps, strict=True):
        if p is not original:
            original.copy_(p)
        if not p.numel():  # an empty shard: its count keeps pace with the other ranks'
            step.add_(1.0 if arguments.skip is None else (arguments.skip == 0).float().reshape(()))
    torch.autograd.graph.increment_version(_written(arguments))


def _index(part: StepArguments, indices: list[int]) -> Tensor:
    """The indices of a part's parameters, on their device; sent there once, since every copy waits for the host."""
    if "index" not in part.cache:
        part.cache["index"] = torch.tensor(indices, device=part.device)
    return part.cache["index"]


def _written(arguments: StepArguments) -> list[Tensor]:
    """All that a step writes: autograd must see that a saved tensor was overwritten by a kernel."""
    if "written" not in arguments.cache:
        a = arguments
        tensors = [*a.params, *a.steps, *a.remainders, *(t for s in (*a.states, *a.scales) for t in s)]
        arguments.cache["written"] = [t for t in dict.fromkeys(tensors) if not t.is_inference()]
    return arguments.cache["written"]


def _contiguous(arguments: StepArguments) -> StepArguments:
    """The arguments with copies of what is not contiguous: parameters and gradients in channels_last, say."""
    grads = arguments.grads
    if not all(g.is_contiguous() for g in grads):
        grads = arguments.grads = [g.contiguous() for g in grads]
    if all(p.is_contiguous() for p in arguments.params):
        return arguments
    _warn_of_copies()
    return replace(arguments, params=[p.contiguous() for p in arguments.params])


@cache
def _warn_of_copies() -> None:
    warnings.warn(
        "an optimizer's parameters are not all contiguous (channels_last, say): every step copies those that are not, "
        "there and back; model.to(memory_format=torch.contiguous_format) before training avoids it",
        stacklevel=2,
    )


def _optimizer_norms(*flat: Any) -> Tensor:
    return _norms(_unflatten(*flat))


def _norms(arguments: StepArguments) -> Tensor:
    contiguous = _contiguous(arguments)
    result = _optimizer_norms_fake(arguments.rule, arguments.params).zero_()
    for indices, part in contiguous.parts():
        found = run("optimizer_norms", arguments.device, part)
        if part is contiguous:
            return found
        result.index_copy_(0, _index(part, indices), found)
    return result


def _optimizer_norms_fake(rule: str, params: list[Tensor], *_: Any) -> Tensor:
    device = params[0].device if params else None
    return torch.empty(len(params), len(rules.get(rule).norms), dtype=torch.float64, device=device)


# -- int8 ------------------------------------------------------------------------------------------------------------


def quantize_rowwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` (absmax / 127) of a matrix, one scale for a row.

    Args:
        x: float32, float16 or bfloat16 ``[R, C]``.
        seed: None rounds to nearest, ties to even. An int of 64 bits rounds at random and without bias; the same seed
        gives the same result on every backend.

    Raises:
        TypeError: if x is no such matrix, or seed no int.
    """
    return torch.ops.lowbit_lightning.quantize_rowwise(*_matrix_and_seed(x, seed))


def quantize_colwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """``quantize_rowwise`` of ``x.T``: int8 ``[C, R]``, contiguous, and float32 scales ``[C]``, of a float matrix
    ``[R, C]``. An element's random bits are those that ``quantize_rowwise(x, seed)`` gives it."""
    return torch.ops.lowbit_lightning.quantize_colwise(*_matrix_and_seed(x, seed))


def quantize_both(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(*quantize_rowwise(x, seed), *quantize_colwise(x, seed))`` in one op that reads x less often."""
    return torch.ops.lowbit_lightning.quantize_both(*_matrix_and_seed(x, seed))


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``, summed in int32.

    Args:
        a, b: int8 ``[M, K]`` and ``[N, K]``.
        a_scales, b_scales: float32 ``[M]`` and ``[N]``.
        bias: float ``[N]`` or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[M, N]`` of ``out_dtype``. Above K = 133,144, where int32 could overflow, partial sums are added in float32.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"a and b must be int8, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, scales, length in (("a_scales", a_scales, a.shape[0]), ("b_scales", b_scales, b.shape[0])):
        if scales.dtype != torch.float32 or tuple(scales.shape) != (length,):
            raise ValueError(
                f"{name} must be float32 of shape ({length},), got {scales.dtype} of {tuple(scales.shape)}"
            )
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (b.shape[0],)):
        raise ValueError(
            f"bias must be a float vector of shape ({b.shape[0]},), got {bias.dtype} of {tuple(bias.shape)}"
        )
    for name, other in (("b", b), ("a_scales", a_scales), ("b_scales", b_scales), ("bias", bias)):
        if other is not None and other.device != a.device:
            raise ValueError(f"{name} is on {other.device} but a on {a.device}; move one of them")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be torch.float32, torch.float16 or torch.bfloat16, got {out_dtype}")
    return torch.ops.lowbit_lightning.int8_matmul(a, b, a_scales, b_scales, bias, out_dtype)


def _matrix_and_seed(x: Tensor, seed: int | None) -> tuple[Tensor, int | None]:
    if x.dtype not in FLOATS or x.ndim != 2:
        raise TypeError(f"x must be a float32, float16 or bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if seed is not None and not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int, or None to round to nearest, got {type(seed).__name__}")
    return x, None if seed is None else _as_int64(seed)


def _quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return run("quantize_rowwise", x.device, x.contiguous(), seed)


def _quantize_rowwise_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


def _quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return run("quantize_colwise", x.device, x.contiguous(), seed)


def _quantize_colwise_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return _quantize_rowwise_fake(x.T, seed)


def _quantize_both(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("quantize_both", x.device, x.contiguous(), seed)


def _quantize_both_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_quantize_rowwise_fake(x, seed), *_quantize_rowwise_fake(x.T, seed)


def _int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    a, b, a_scales, b_scales = a.contiguous(), b.contiguous(), a_scales.contiguous(), b_scales.contiguous()
    if a.shape[1] <= LONGEST_INT8_SUM:
        return run("int8_matmul", a.device, a, b, a_scales, b_scales, bias, out_dtype)
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for a_part, b_part in zip(a.split(LONGEST_INT8_SUM, 1), b.split(LONGEST_INT8_SUM, 1), strict=True):
        parts = a_part.contiguous(), b_part.contiguous()
        total += run("int8_matmul", a.device, *parts, a_scales, b_scales, None, torch.float32)
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _int8_matmul_fake(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


# -- registration ----------------------------------------------------------------------------------------------------

_STEP = (
    "str rule, Tensor{a} params, Tensor[] grads, Tensor{b} steps, Tensor{c} states, Tensor{d} scales, float[] hyper, "
    "int block_size, Tensor? lr, Tensor? unscale, Tensor? clip, Tensor? skip, int seed, int[] ordinals, int[] offsets, "
    "bool maximize, bool stochastic_rounding, Tensor{e} remainders"
)
_SCHEMAS = {
    "quantize_blockwise": "(Tensor x, str codebook, Tensor? values, int block_size) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor codes, Tensor scales, str codebook, Tensor? values, int block_size, "
    "ScalarType dtype) -> Tensor",
    "optimizer_step": f"({_STEP.format(**{x: f'({x}!)[]' for x in 'abcde'})}, Tensor? norms) -> ()",
    "optimizer_norms": f"({_STEP.format(**dict.fromkeys('abcde', '[]'))}) -> Tensor",
    "quantize_rowwise": "(Tensor x, SymInt? seed) -> (Tensor, Tensor)",
    "quantize_colwise": "(Tensor x, SymInt? seed) -> (Tensor, Tensor)",
    "quantize_both": "(Tensor x, SymInt? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    "int8_matmul": "(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor",
}
_library = torch.library.Library("lowbit_lightning", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    _fake = globals().get(f"_{_name}_fake", lambda *_: None)
    torch.library.register_fake(f"lowbit_lightning::{_name}", _fake, lib=_library)
