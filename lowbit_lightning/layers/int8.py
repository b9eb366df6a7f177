"""What int8 layers have in common, ``Int8Linear``, and how a plain layer becomes an int8 one in place."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit_lightning.kernels.dispatch import is_transformed
from lowbit_lightning.layers.ops import int8_linear
from lowbit_lightning.layers.product import HIGH, INT8, NEAREST, ROTATED, STOCHASTIC, product
from lowbit_lightning.layers.seen import MatmulSeen, Terms, is_noted

Product = Literal["int8", "hadamard", "high"]
Saved = Literal["int8", "high"]
Rotation = Literal["none", "hadamard"]
Rounding = Literal["auto", "nearest", "stochastic"]
PRODUCTS = ("forward", "grad_input", "grad_weight")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Asked once: the compiler of torch 2.7 cannot trace the question.
_AUTOCASTS = {kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(kind)}
FEWEST_ROWS = {"cpu": (64, 128, 256), "cuda": (128, 128, 1024)}
"""Device type -> rows of the input from which on int8 pays in evaluation, where each pass quantises the weight: of
float32 weights, of those under autocast, and of 16-bit ones, which high precision reads without a cast. Measured on
CPUs, estimated on GPUs."""

_KINDS = {"high": HIGH, "int8": INT8, "hadamard": ROTATED}
_CHOICES = {
    **dict.fromkeys(("forward", "grad_input", "grad_weight"), ("int8", "hadamard", "high")),
    "save_inputs": ("int8", "high"),
    "gradient_rounding": ("auto", "nearest", "stochastic"),
    "rotation": ("none", "hadamard"),
}


@dataclass(frozen=True)
class Products:
    """How a linear layer or a convolution computes its three products.

    Args:
        forward, grad_input, grad_weight: "int8"; "hadamard": in int8, with both operands rotated along the dimension
            that is contracted (``kernels.hadamard``), which spreads outliers; or "high": the dtype of the input.
            ``grad_weight="high"`` is what Wortsman et al. (2023) call SwitchBack.
        save_inputs: the form of the input that an int8 ``grad_weight`` keeps for the backward: "int8", a byte per
            element, or "high", the input itself. The results are the same.
        gradient_rounding: of the incoming gradient. "nearest"; "stochastic": without bias, by seeds from torch's
            default CPU generator; "auto": "nearest" in linear layers, and in convolutions too, except that they dither
            it for ``grad_weight`` (``layers.conv`` says why), which draws nothing.
        rotation: "none", or "hadamard", which makes each "int8" above "hadamard". Convolutions contract channels and
            taps, or pixels that overlap; only those of a single tap are rotated.

    Raises:
        ValueError: for any other value.
    """

    forward: Product = "int8"
    grad_input: Product = "int8"
    grad_weight: Product = "int8"
    save_inputs: Saved = "int8"
    gradient_rounding: Rounding = "auto"
    rotation: Rotation = "none"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                allowed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
                raise ValueError(f"{name} must be {allowed}, got {value!r}")

    @property
    def int8(self) -> tuple[str, ...]:
        """The names of the products that run in int8."""
        return tuple(name for name, kind in zip(PRODUCTS, self.kinds, strict=True) if kind != HIGH)

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How each of the three runs: ``product.HIGH``, ``INT8`` or ``ROTATED``."""
        kinds = [_KINDS[getattr(self, name)] for name in PRODUCTS]
        forward, grad_input, grad_weight = (ROTATED if self.rotation != "none" and k == INT8 else k for k in kinds)
        return forward, grad_input, grad_weight

    def changed(self, fields: Mapping[str, Any]) -> Products:
        """These products with other values in some fields."""
        return replace(self, **fields)

    def __str__(self) -> str:
        """'int8 (forward, grad_input, grad_weight)'."""
        random = self.gradient_rounding == "stochastic" and self.int8 not in ((), ("forward",))
        rotated = [name for name, kind in zip(PRODUCTS, self.kinds, strict=True) if kind == ROTATED]
        parts = [", ".join(self.int8) or "nothing"]
        if rotated:
            parts.append("rotated" if len(rotated) == len(self.int8) else f"{' and '.join(rotated)} rotated")
        return f"int8 ({', '.join([*parts, *(['gradients rounded at random'] if random else [])])})"


class Int8Layer(nn.Module):
    """What every layer in int8 has: ``products``, a weight, and a plain class that it can be turned back to."""

    plain: ClassVar[type[nn.Module]]
    """The class that it was, or would be, in high precision."""

    products: Products
    adopted: bool = False
    """True where a plain layer was turned into this one, and may be turned back."""

    seen: Any = None
    """What it has last been trained on (``layers.seen``): of a layer of matrices a ``MatmulSeen`` for each of them."""

    weight: Tensor
    bias: Any  # a Tensor or None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plain" in vars(cls):
            FORMS[cls.plain] = cls

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How the layer's products run: ``product.HIGH``, ``INT8`` or ``ROTATED``."""
        return self.products.kinds

    @property
    def rounding(self) -> int:
        """How the incoming gradient is rounded: ``product.NEAREST``, ``DITHERED`` or ``STOCHASTIC``."""
        return STOCHASTIC if self.products.gradient_rounding == "stochastic" else NEAREST

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that its products multiply by."""
        return (self.weight,)

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out_features, in_features]``."""
        return self.weight

    @property
    def turned_matrix(self) -> Tensor:
        """The weight as a matrix with a column for each input feature, which the gradient by the input quantises."""
        return self.matrix

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """An input, output or gradient as a matrix with a column for each feature; it may be nested."""
        if x.is_nested:
            return torch.cat([Int8Layer.rows(part) for part in x.unbind()])
        return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), str(self.products))))


class Projections(Int8Layer):
    """An int8 layer that multiplies by several weights."""

    _projection_hooks: Mapping[int, Callable[..., None]] = {}

    def register_projection_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call ``hook(layer, x, weight, y)`` after each projection, as forward hooks are called after a layer; of
        experts ``hook(layer, x, weights, y, offs)``, with the rows of all experts."""
        hooks = vars(self).setdefault("_projection_hooks", OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle


FORMS: dict[type[nn.Module], type[Int8Layer]] = {}
"""The int8 form of each plain class."""


def multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, products: Products, rounding: int) -> Tensor:
    """``rows @ matrix.T + bias`` of ``[M, K]`` and ``[N, K]``, as ``products`` says, in the dtype of the rows."""
    kinds = products.kinds
    if is_transformed():
        y = product(rows, matrix, kinds)
        return y if bias is None else y + bias.to(y.dtype)
    trains = matrix.requires_grad and torch.is_grad_enabled()
    save_int8 = trains and products.grad_weight != "high" and products.save_inputs == "int8"
    y, *_ = int8_linear(rows, matrix, bias, *kinds, save_int8, rounding)
    return y


def linear(layer: Int8Layer, input: Tensor, matrix: Tensor, bias: Tensor | None, number: int = 0) -> Tensor:
    """``input @ matrix.T + bias`` of ``[..., K]`` and ``[N, K]``, as the layer's products and its mode say.

    ``number``: which of the layer's matrices it is.

    Raises:
        TypeError, ValueError: if the input's dtype, device or shape does not fit the matrix.
    """
    if not (layer.training or torch.is_grad_enabled()) and input.numel() < fewest_rows(matrix) * matrix.shape[1]:
        return nn.functional.linear(input, matrix, bias)
    if input.ndim == 0 or input.shape[-1] != matrix.shape[1]:
        raise ValueError(f"input must be of shape [..., {matrix.shape[1]}], got {tuple(input.shape)}")
    x = in_compute_dtype(input, matrix)
    rows = Int8Matrix.rows(x)
    if is_noted():
        seen = MatmulSeen(rows.shape[0], matrix.shape[1], matrix.shape[0], Terms.of(x, matrix))
        layer.seen = (*(layer.seen or ())[:number], seen)
    y = multiply(rows, matrix, bias, layer.products, layer.rounding)
    return y.reshape(*x.shape[:-1], matrix.shape[0])


def of_nested(forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """What a linear layer's ``forward`` gives for a nested tensor ``[N, *, in_features]``: for all its rows at once.

    Raises:
        ValueError: for a jagged tensor that is not contiguous.
    """
    if input.layout is not torch.jagged:
        parts = input.unbind()
        results = forward(Int8Layer.rows(input)).split([part.shape[:-1].numel() for part in parts])
        shaped = [y.view(*part.shape[:-1], -1) for y, part in zip(results, parts, strict=True)]
        return torch.nested.as_nested_tensor(shaped)
    if not input.is_contiguous():
        raise ValueError("a jagged input must be contiguous, as for nn.Linear: call .contiguous() on it")
    offsets = input.offsets()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(forward(input.values()), offsets)


class Int8Matrix(Int8Layer):
    """What ``Int8Linear`` and the int8 form of Transformers' ``Conv1D`` have in common.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype, or autocast's if autocast is on;
    nested tensors as for ``nn.Linear``. A training step costs three int8 products; one less if the input needs no
    gradient, and one less if the weight is frozen. Higher derivatives and the transforms of ``torch.func`` work too
    (``product``), with incoming gradients rounded to nearest.

    Evaluation (``eval()``, and no gradients) runs the forward in int8 from ``fewest_rows`` rows on. With fewer rows,
    quantising the weight would cost more than the product saves, and high precision is used.

    Raises:
        TypeError, ValueError: in ``forward``, if the input's dtype, device or shape does not fit the weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return of_nested(self.forward, input)  # not the module itself: hooks run once
        return linear(self, input, self.matrix, self.bias)


class Int8Linear(Int8Matrix, nn.Linear):
    """``nn.Linear`` with its matmuls in int8: same parameters, same ``state_dict``, same gradients up to rounding.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; float32, float16 or bfloat16.
        settings: the fields of ``Products``: ``forward``, ``grad_input``, ``grad_weight``, ``save_inputs``,
            ``gradient_rounding``.

    Raises:
        ValueError: for a bad setting; and in ``forward``, TypeError too, for a dtype, device or shape of the input
            that doesn't fit the weight. ``Int8Matrix`` says more of the forward.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.products = Products(**settings)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this type of device; never on meta, which has none."""
    return kind in _AUTOCASTS and torch.is_autocast_enabled(kind)


def fewest_rows(weight: Tensor) -> int:
    """The smallest number of input rows with which an evaluation runs in int8."""
    kind = weight.device.type
    float32, autocast, half = FEWEST_ROWS.get(kind, (0, 0, 0))
    if weight.dtype != torch.float32:
        return half
    return autocast if autocasts(kind) else float32


def in_compute_dtype(x: Tensor, weight: Tensor) -> Tensor:
    """The input in the compute dtype (autocast's if it is on); raises if its device or dtype does not fit."""
    if x.device != weight.device:
        raise ValueError(f"input is on {x.device} but the weight on {weight.device}; move one of them")
    if weight.dtype not in FLOATS:
        raise TypeError(f"the weight of an int8 layer must be float32, float16 or bfloat16, got {weight.dtype}")
    kind = x.device.type
    if x.dtype in FLOATS and autocasts(kind):
        return x.to(torch.get_autocast_dtype(kind))
    if x.dtype != weight.dtype:
        raise TypeError(f"input must have the weight's dtype, {weight.dtype}, outside autocast, got {x.dtype}")
    return x


# -- in place, and back ----------------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Transformers' ``Conv1D``: a linear layer whose weight is ``[in_features, out_features]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def adopt(layer: nn.Module, products: Products) -> None:
    """Turn a plain layer into its int8 form (``FORMS``) in place: the object, its parameters and hooks stay."""
    if not isinstance(layer, Int8Layer):
        kind: Any = type(layer)
        layer.__class__ = FORMS.get(kind) or _int8_conv1d(kind)
    layer.products, layer.adopted = products, True  # type: ignore[assignment]


def can_be_released(layer: nn.Module) -> bool:
    """Whether the layer's class is still the one that ``adopt`` gives: ``fully_shard`` and parametrizations derive."""
    return isinstance(layer, Int8Layer) and "plain" in vars(type(layer))


def release(layer: Int8Layer) -> None:
    """Turn the layer into a plain one in place; the inverse of ``adopt``."""
    del layer.products
    for name in ("adopted", "seen", "_projection_hooks"):
        vars(layer).pop(name, None)
    layer.__class__ = layer.plain  # type: ignore[assignment]


@cache
def _int8_conv1d(plain: type[nn.Module]) -> type[Int8Layer]:
    """A subclass of Transformers' own class, which is not ours to import, so that ``isinstance`` stays true."""
    matrix = property(lambda layer: layer.weight.T, doc=Int8Layer.matrix.__doc__)

    def forward(self: Any, x: Tensor) -> Tensor:
        return Int8Matrix.forward(self, x)

    members = {"plain": plain, "matrix": matrix, "forward": forward, "__module__": __name__}
    return type("Int8Conv1D", (Int8Matrix, plain), {**members, "__doc__": "Transformers' ``Conv1D`` in int8."})


def __getattr__(name: str) -> Any:
    """Lets pickle find ``Int8Conv1D``."""
    if name == "Int8Conv1D":
        return _int8_conv1d(importlib.import_module("transformers.pytorch_utils").Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
