"""What decides how long an int8 layer takes, as a value that can be timed: both its int8 form and its plain one.

There is a shape for linear layers and the projections of an attention, one for convolutions, and one for experts. Large
layers are timed on fewer rows, images or experts than they have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowbit_lightning.layers.attention import Int8MultiheadAttention
from lowbit_lightning.layers.conv import Int8Conv
from lowbit_lightning.layers.grouped_ops import grouped_linear
from lowbit_lightning.layers.int8 import FLOATS, FORMS, Int8Layer, Int8Linear, Products
from lowbit_lightning.layers.moe import Int8ExpertsForm, linear_by_groups
from lowbit_lightning.layers.seen import ExpertsSeen, ImagesSeen, MatmulSeen, Terms
from lowbit_lightning.layers.windows import Windows

ENOUGH = {"cpu": 3e8, "cuda": 3e11}
"""Device type -> most multiplications of a timed forward, unless a single image, expert or ``FEW_ROWS`` have more."""

FEW_ROWS = 512
"""Matrices are timed with as many rows at least. Quantising the weight takes as long for few rows as for many, so with
fewer ones it would seem to cost more than it does."""

DTYPES = {str(dtype): dtype for dtype in FLOATS}


class Shape(Protocol):
    """``str(shape)`` is what a report shows."""

    def __hash__(self) -> int:
        """A shape is timed once."""

    @property
    def terms(self) -> Terms:
        """The dtypes of the layer, and which gradients it needs."""

    @property
    def multiplications(self) -> int:
        """Those of a forward."""

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """A function that runs the forward and backward once: in int8, or as the plain layer does."""


def shape_of(layer: Int8Layer) -> Shape | None:
    """The shape of a layer; None if it hasn't trained yet. That of an attention contains its output projection."""
    if isinstance(layer, Int8Conv):
        return ConvShape.of(layer)
    if isinstance(layer, Int8ExpertsForm):
        return ExpertsShape.of(layer)
    return MatmulsShape.of(layer)


class MatmulsShape(NamedTuple):
    """The products of a linear layer, or of all projections of an attention."""

    matmuls: tuple[tuple[Products, MatmulSeen], ...]

    @classmethod
    def of(cls, layer: Int8Layer) -> MatmulsShape | None:
        """See ``shape_of``."""
        layers = [layer, layer.out_proj] if isinstance(layer, Int8MultiheadAttention) else [layer]
        int8 = [part for part in layers if isinstance(part, Int8Layer)]
        if not all(part.seen for part in int8):
            return None
        return cls(tuple((part.products, seen) for part in int8 for seen in part.seen))

    def __str__(self) -> str:
        return ", ".join(f"{seen.rows} rows of {seen.inputs} to {seen.outputs} features" for _, seen in self.matmuls)

    @property
    def terms(self) -> Terms:
        """See ``Shape``."""
        return self.matmuls[0][1].terms

    @property
    def multiplications(self) -> int:
        """See ``Shape``."""
        return sum(seen.rows * seen.inputs * seen.outputs for _, seen in self.matmuls)

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """See ``Shape``."""
        passes = [_matmul(products, seen, device, high) for products, seen in self.matmuls]
        return lambda: [run() for run in passes]


def _matmul(products: Products, seen: MatmulSeen, device: torch.device, high: bool) -> Callable[[], object]:
    terms, (inputs, outputs) = seen.terms, (seen.inputs, seen.outputs)
    rows = min(seen.rows, max(FEW_ROWS, _most(device) // (inputs * outputs)))
    settings = {} if high else vars(products)
    layer = (nn.Linear if high else Int8Linear)(inputs, outputs, bias=False, device="meta", **settings)
    layer.weight = nn.Parameter(_values(outputs, inputs, dtype=terms.weight, device=device), terms.weight_grad)
    x, dy = (_values(rows, n, dtype=terms.dtype, device=device) for n in (inputs, outputs))
    return _pass(layer, x.requires_grad_(terms.input_grad), layer.weight, dy)


class ConvShape(NamedTuple):
    """The shape of a convolution."""

    channels: int
    features: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    products: Products
    seen: ImagesSeen

    @classmethod
    def of(cls, layer: Int8Conv) -> ConvShape | None:
        """See ``shape_of``."""
        if layer.seen is None:
            return None
        padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else tuple(layer.padding)
        sizes = tuple(layer.kernel_size), tuple(layer.stride), padding, tuple(layer.dilation)
        return cls(layer.in_channels, layer.out_channels, *sizes, layer.products, layer.seen)

    def __str__(self) -> str:
        kernel, size = (" x ".join(map(str, sizes)) for sizes in (self.kernel, self.seen.size))
        stride = "" if set(self.stride) == {1} else f", stride {self.stride[0]}"
        channels = f"{self.channels} to {self.features} channels"
        return f"{kernel}{stride}, {channels}, {self.seen.images} images of {size}"

    @property
    def terms(self) -> Terms:
        """See ``Shape``."""
        return self.seen.terms

    @property
    def multiplications(self) -> int:
        """See ``Shape``."""
        return self.seen.images * self._of_an_image

    @property
    def _results(self) -> tuple[int, ...]:
        return Windows(self.seen.size, self.kernel, self.stride, self.padding, self.dilation).results

    @property
    def _of_an_image(self) -> int:
        return prod(self._results) * self.features * self.channels * prod(self.kernel)

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """See ``Shape``."""
        plain: type = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(self.kernel)]
        sizes = self.channels, self.features, self.kernel, self.stride, self.padding, self.dilation
        terms, last = self.terms, self.seen.channels_last
        layer: Any = (plain if high else FORMS[plain])(*sizes, bias=False, device="meta")
        weight = _image(self.features, self.channels, self.kernel, True, terms.weight, device)
        layer.weight = nn.Parameter(weight, terms.weight_grad)
        if not high:
            layer.products = self.products
        images = max(1, min(self.seen.images, _most(device) // max(1, self._of_an_image)))
        x = _image(images, self.channels, self.seen.size, last, terms.dtype, device)
        dy = _image(images, self.features, self._results, last, terms.dtype, device)
        return _pass(layer, x.requires_grad_(terms.input_grad), layer.weight, dy)


class ExpertsShape(NamedTuple):
    """Of experts: the shapes of their two parameters, whether these are transposed, and what they were trained on."""

    matrices: tuple[tuple[int, ...], ...]
    transposed: bool
    products: Products
    seen: ExpertsSeen

    @classmethod
    def of(cls, layer: Int8ExpertsForm) -> ExpertsShape | None:
        """See ``shape_of``."""
        if layer.seen is None:
            return None
        transposed: Any = layer.is_transposed
        shapes = (getattr(w, "ds_shape", w.shape) for w in layer.weights)  # DeepSpeed takes them apart at stage 3
        return cls(tuple(map(tuple, shapes)), transposed, layer.products, layer.seen)

    def __str__(self) -> str:
        (experts, *_), _ = self.matrices
        sizes = " and ".join(" x ".join(map(str, shape[1:])) for shape in self.matrices)
        return f"{experts} experts of {sizes}, {self.seen.rows} rows"

    @property
    def terms(self) -> Terms:
        """See ``Shape``."""
        return self.seen.terms

    @property
    def multiplications(self) -> int:
        """See ``Shape``."""
        return self.seen.rows * sum(length * width for _, length, width in self.matrices)

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """See ``Shape``. All experts have equally many rows."""
        experts, terms = self.matrices[0][0], self.terms
        rows = max(1, self.seen.rows // experts)
        each = rows * sum(length * width for _, length, width in self.matrices)
        few = max(1, min(experts, _most(device) // max(1, each)))
        offs = torch.arange(1, few + 1) * rows
        project = self._in_torch(offs, device) if high else partial(self._in_int8, offs)
        passes = []
        for _, length, width in self.matrices:
            inputs, outputs = (length, width) if self.transposed else (width, length)
            x, dy = (_values(few * rows, n, dtype=terms.dtype, device=device) for n in (inputs, outputs))
            weight = _values(few, length, width, dtype=terms.weight, device=device).requires_grad_(terms.weight_grad)
            passes.append(_pass(partial(project, weight), x.requires_grad_(terms.input_grad), weight, dy))
        return lambda: [run() for run in passes]

    def _in_int8(self, offs: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return grouped_linear(x, weight, offs, None, self.products, self.transposed)

    def _in_torch(self, offs: Tensor, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """By torch's fastest."""
        ends = offs.to(device, torch.int32)
        grouped_mm = getattr(nn.functional, "grouped_mm", None)

        def project(weight: Tensor, x: Tensor) -> Tensor:
            turned = weight.to(x.dtype) if self.transposed else weight.to(x.dtype).mT
            if grouped_mm is not None and x.dtype == torch.bfloat16:
                return grouped_mm(x, turned, offs=ends)
            return linear_by_groups(x, turned.mT, offs)

        return project


def _most(device: torch.device) -> int:
    return int(ENOUGH.get(device.type, ENOUGH["cuda"]))


def _pass(forward: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> Callable[[], object]:
    wanted = [t for t in (x, weight) if t.requires_grad]
    return lambda: torch.autograd.grad(forward(x), wanted, dy) if wanted else forward(x)


def _image(n: int, channels: int, size: tuple[int, ...], last: bool, dtype: str, device: torch.device) -> Tensor:
    x = _values(n, *size, channels, dtype=dtype, device=device).movedim(-1, 1)
    return x if last else x.contiguous()


def _values(*shape: int, dtype: str, device: torch.device) -> Tensor:
    """Fixed values, because the run's random generators must not be used."""
    values = torch.arange(prod(shape), device=device).remainder_(251).sub_(125)
    return values.to(DTYPES[dtype]).view(shape)
