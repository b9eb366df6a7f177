"""``Sample``: hooks on int8 layers that measure the operands of their int8 products, for one step.

Which operand is quantised how (``layers`` says why), and along what its features lie::

    forward       x [M, K] by rows        columns      w [N, K] by rows        columns
    grad_input    dy [M, N] by rows       columns      w [N, K] by columns     columns of w.T
    grad_weight   dy [M, N] by columns    rows of dy.T     x [M, K] by columns     rows of x.T

Of a convolution, the rows of x and dy are pixels, and those of w are [N, taps * K], or for grad_input [N * taps, K]. Of
an attention each input projection is measured, of experts each projection of each expert with its own rows, and means
are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit_lightning.callbacks.quantization import SHARES, Slot, measure
from lowbit_lightning.kernels.groups import ends_of, spans
from lowbit_lightning.layers import Int8ExpertsForm, Int8Layer, Int8MultiheadAttention
from lowbit_lightning.layers.product import HIGH, NEAREST, ROTATED, STOCHASTIC, form


class Sample:
    """Hooks on the layers, and what they have measured, for the time of one optimizer step."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._measured: list[tuple[Slot, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        for i, layer in enumerate(layers.values()):
            if isinstance(layer, (Int8MultiheadAttention, Int8ExpertsForm)):
                of_each = self._grouped if isinstance(layer, Int8ExpertsForm) else self._projected
                self._handles.append(layer.register_projection_hook(partial(of_each, i)))
                continue
            if not isinstance(layer, Int8Layer):  # in high precision since an earlier step
                continue
            # The weight is read before the layer runs: after it a sharded one may be in pieces again.
            self._handles.append(layer.register_forward_pre_hook(partial(self._before, i), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(partial(self._after, i), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self) -> tuple[list[Slot], Tensor]:
        """The operands, and what ``measure`` gave for each: ``[n, 5]``."""
        if not self._measured:
            return [], torch.zeros(0, 2 + len(SHARES), dtype=torch.float32)
        return [slot for slot, _ in self._measured], torch.stack([values for _, values in self._measured])

    def _off(self, layer: nn.Module) -> bool:
        """Inside torch.compile, in a validation that interrupts the step, in a first pass that will be repeated, or in
        a layer that went back to high precision in the middle of the step (another optimizer's turn)."""
        return torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(layer, Int8Layer)

    def _before(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._off(layer):
            assert isinstance(layer, Int8Layer)
            self._operands(index, layer, _input(args, kwargs), layer.matrix, layer.turned_matrix)

    def _after(self, index: int, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if not self._off(layer):
            assert isinstance(layer, Int8Layer)
            self._gradients(index, layer, _input(args, kwargs), layer.weight, output, layer.rows)

    def _projected(self, index: int, layer: Int8MultiheadAttention, x: Tensor, matrix: Tensor, output: Tensor) -> None:
        if not self._off(layer):
            self._operands(index, layer, x, matrix, matrix)
            self._gradients(index, layer, x, matrix, output, layer.rows)

    def _grouped(
        self, index: int, layer: Int8ExpertsForm, x: Tensor, weight: Tensor, output: Tensor, offs: Tensor
    ) -> None:
        if self._off(layer):
            return
        for own, (first, last) in zip(weight, spans(ends_of(offs, len(x))), strict=True):
            part, matrix = x[first:last], own.T if layer.is_transposed else own
            self._operands(index, layer, part, matrix, matrix)
            self._gradients(index, layer, part, matrix, output, itemgetter(slice(first, last)))

    def _operands(self, index: int, layer: Int8Layer, x: Tensor, weight: Tensor, turned: Tensor) -> None:
        forward, grad_input, grad_weight = layer.kinds
        with torch.no_grad():
            rows = layer.rows(_as_computed(x).detach())
            self._rowwise(Slot(index, 0, 0), rows, forward)
            self._rowwise(Slot(index, 0, 1), weight.detach(), forward)
            if x.requires_grad:
                self._colwise(Slot(index, 1, 1), turned.detach(), "columns", grad_input)
            if weight.requires_grad:
                self._colwise(Slot(index, 2, 1), rows, "rows", grad_weight)

    def _gradients(
        self,
        index: int,
        layer: Int8Layer,
        x: Tensor,
        weight: Tensor,
        output: Tensor,
        as_rows: Callable[[Tensor], Tensor],
    ) -> None:
        """``as_rows``: the rows of a gradient that are measured."""
        if not output.requires_grad:
            return
        _, grad_input, grad_weight = layer.kinds
        grad_input, grad_weight = grad_input * x.requires_grad, grad_weight * weight.requires_grad
        seeds = 0 if layer.rounding == STOCHASTIC else None, 0 if layer.rounding != NEAREST else None  # none is drawn
        output.register_hook(partial(self._backward, index, as_rows, grad_input, grad_weight, seeds))

    def _backward(
        self,
        index: int,
        as_rows: Callable[[Tensor], Tensor],
        grad_input: int,
        grad_weight: int,
        seeds: tuple[int | None, int | None],
        grad: Tensor,
    ) -> None:
        if torch.compiler.is_compiling():
            return
        with torch.no_grad():
            rows = as_rows(grad.detach())
            self._rowwise(Slot(index, 1, 0), rows, grad_input, seeds[0])
            self._colwise(Slot(index, 2, 0), rows, "rows", grad_weight, seeds[1])

    def _rowwise(self, slot: Slot, x: Tensor, kind: int, seed: int | None = None) -> None:
        if x.numel() and kind != HIGH:
            self._measured.append((slot, measure(x, *form(x, 1, kind, seed), "columns", kind == ROTATED)))

    def _colwise(self, slot: Slot, x: Tensor, features: str, kind: int, seed: int | None = None) -> None:
        """``features``: "rows" or "columns" of ``x.T``, the matrix that is quantised."""
        if x.numel() and kind != HIGH:
            self._measured.append((slot, measure(x.T, *form(x, 0, kind, seed), features, kind == ROTATED)))


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _as_computed(x: Tensor) -> Tensor:
    """The input in the dtype that the layer computes in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
