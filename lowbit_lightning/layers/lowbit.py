"""Modules whose weight is kept in low bits: ``LowBitLinear``, its names by bits, and what every such module shares.

What a module holds
-------------------
``weight``: uint8 ``[out_features, bytes per row]``, the packed codes; ``weight_scales``: uint8 ``[out_features, bytes
per row]``, the bytes of the scales, so that no cast by a module, FSDP2's mixed precision or DeepSpeed rounds them;
``weight_format``: the format's name as bytes. The first two are parameters that need no gradient, so FSDP2 shards and
gathers them packed, by rows. All three are ordinary entries of ``state_dict``, so saving, loading with ``strict=True``,
safetensors, pickle and deepcopy need nothing special.

- Loading a state of another format raises, naming both. Loading a high-precision ``weight`` quantises it.
- ``.to(device)`` moves codes and scales. ``.to(dtype)`` changes the bias and so what callers see, but no code or scale.
- The weight cannot be trained: train adapters beside it. The gradient of the input is exact for the decoded weight.

In which dtype it computes
--------------------------
It computes in ``compute_dtype`` if one was given, otherwise in autocast's dtype if autocast is on, otherwise in the
input's dtype. Sums are float32. The output has the input's dtype, or autocast's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import Format, check_fit, weight_format
from lowbit_lightning.layers.int8 import FLOATS, autocasts, is_conv1d, of_nested

PARTS = ("weight", "weight_scales", "weight_format")
"""The entries of a low-bit weight in a ``state_dict``."""
ELEMENTS_AT_ONCE = 1 << 19
"""The number of elements of a weight that are quantised at once."""


@dataclass(frozen=True)
class Weights:
    """How a weight is stored, and how products with it are computed. ``Weights.of("nf4", fit="lsq")`` makes one from a
    name.

    Args:
        format: see ``kernels.formats.weight_format``.
        fit: how blocks are fitted, ``"absmax"`` or ``"lsq"``; None is the format's default.
        compute_dtype: float32, float16 or bfloat16; None: autocast's dtype or the input's.
        threshold: for ``"int8"`` only. 0 multiplies the input in its own precision. A positive value quantises the
            input's rows to int8 too, except the columns that have an element of at least this magnitude, which are
            multiplied in high precision (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339; 6.0 is usual).

    Raises:
        ValueError: for any other value.
    """

    format: Format
    fit: str | None = None
    compute_dtype: torch.dtype | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_fit(self.format, self.fit)
        if self.compute_dtype not in (None, *FLOATS):
            raise ValueError(f"compute_dtype must be None, float32, float16 or bfloat16, got {self.compute_dtype}")
        if self.threshold and (self.format.kind != "int8" or not self.threshold > 0):
            raise ValueError(f"threshold must be 0, or positive for int8, got {self.threshold} for {self.format}")

    @classmethod
    def of(cls, weights: str | Format, **fields: Any) -> Weights:
        """From a format's name and the other fields."""
        return cls(weight_format(weights), **fields)

    def changed(self, value: str | Format | Mapping[str, Any]) -> Weights:
        """These weights in another format (its name), or with other fields: ``{"weights": "int4", "fit": "absmax"}``.

        With another format, ``fit`` and ``threshold`` are its defaults unless they are given too.
        """
        fields = dict(value) if isinstance(value, Mapping) else {"weights": value}
        if "weights" in fields:
            fields = {"format": weight_format(fields.pop("weights")), "fit": None, "threshold": 0.0, **fields}
        return replace(self, **fields)

    def __str__(self) -> str:
        """'nf4', 'int4 (absmax)', 'int8 (threshold 6.0)'."""
        extra = [self.fit] if self.fit not in (None, self.format.default_fit) else []
        extra += [f"threshold {self.threshold}"] if self.threshold else []
        return f"{self.format} ({', '.join(extra)})" if extra else str(self.format)  # type: ignore[arg-type]


class LowBitWeight(nn.Module):
    """A module with a ``weight`` in low bits: holds it, and keeps it whole when it is moved, cast, saved or loaded.

    Mixed into classes whose own ``weight`` is ``[rows, row_length]``.
    """

    weight: nn.Parameter
    weight_scales: nn.Parameter
    weight_format: Tensor
    weights: Weights
    row_length: int
    dtype: torch.dtype
    """The dtype that ``dequantize`` and an embedding return by default: that of the weight, or of its last cast."""
    snr_db: float | None
    """Signal to rounding noise of this weight in dB, where it was quantised here; None where it was loaded."""

    def keep(self, weight: Tensor, weights: Weights) -> None:
        """Replace the ``weight`` parameter by codes and scales of ``weight``; on the meta device, by their shapes."""
        self.weights, self.row_length, self.dtype = weights, weight.shape[-1], weight.dtype
        packed, scales, self.snr_db = _quantised(weight.detach(), weights)
        self.hold(packed, scales)

    def hold(self, packed: Tensor, scales: Tensor, weights: Weights | None = None) -> None:
        """Take codes and scales unchanged; for another format, together with its settings."""
        self.weights = weights or self.weights
        for part in PARTS:
            self._parameters.pop(part, None)
            self._buffers.pop(part, None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.register_buffer("weight_format", _tag(self.format).to(packed.device))

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight in high precision, as others lay it out, with its rows first."""
        return weight

    def share(self, other: LowBitWeight) -> None:
        """Share the codes and scales of another layer, whose weight is the same."""
        self.weight, self.weight_scales, self.weight_format = other.weight, other.weight_scales, other.weight_format
        self.snr_db = other.snr_db

    def hold_saved(self, parts: Mapping[str, Tensor], name: str, device: torch.device) -> None:
        """Take a weight as ``state_dict`` has it, in the format that it was saved in. ``name``: what errors call it.

        Raises:
            ValueError: for a part that is missing, or of another dtype or shape than its format has.
        """
        if missing := [part for part in PARTS if part not in parts]:
            raise ValueError(f"{name} was saved in low bits, but the file lacks its {missing}")
        weights = self.weights.changed(saved) if (saved := _untag(parts["weight_format"])) != str(self.format) else None
        form, (*rows, length) = (weights or self.weights).format, self.weight_shape
        for part, width in (
            ("weight", form.packed_width(length)),
            ("weight_scales", form.scales_width(length) * form.scales_dtype.itemsize),
        ):
            if parts[part].dtype != torch.uint8 or list(parts[part].shape) != [*rows, width]:
                raise ValueError(
                    f"{name}: {part} of {form} must be torch.uint8 of shape {(*rows, width)}, the file has "
                    f"{parts[part].dtype} of {tuple(parts[part].shape)}"
                )
        self.snr_db = None
        packed, scales = (parts[part].clone().to(device) for part in PARTS[:2])  # off the file's mapping
        self.hold(packed, scales, weights)

    def check_format(self, name: str) -> None:
        """Raise a ValueError, which calls the layer ``name``, if ``weight_format`` was loaded of another format."""
        if not self.weight_format.is_meta and (saved := _untag(self.weight_format)) != str(self.format):
            raise ValueError(f"{name} was saved as {saved}, but its settings say {self.format}")

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """The entries that ``state_dict`` would have for a weight in high precision, ``weight_shape``."""
        packed, scales, self.snr_db = _quantised(weight, self.weights)
        return dict(zip(PARTS, (packed, scales.view(torch.uint8), _tag(self.format)), strict=True))

    @property
    def format(self) -> Format:
        return self.weights.format

    def drop(self, dtype: torch.dtype | None = None) -> None:
        """The inverse of ``keep``: ``weight`` is a parameter in ``dtype`` again, the decoded one; it is frozen."""
        weight = self.dequantize(dtype)
        for part in PARTS:
            self._parameters.pop(part, None)
            self._buffers.pop(part, None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name in ("weights", "row_length", "dtype", "snr_db"):
            vars(self).pop(name, None)

    @property
    def scales(self) -> Tensor:
        """``weight_scales`` as the kernels take them: ``[..., format.scales_width(row_length)]``."""
        dtype = self.weights.format.scales_dtype
        return self.weight_scales if dtype == torch.uint8 else self.weight_scales.view(dtype)

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the weight in high precision."""
        return torch.Size((*self.weight.shape[:-1], self.row_length))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, ``weight_shape`` in ``dtype`` (float32, float16 or bfloat16; None: ``self.dtype``)."""
        return kernels.lowbit_dequantize(self.weight, self.scales, self.format, self.row_length, dtype or self.dtype)

    # -- moved, cast, saved, loaded ----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        if not self.weight.is_meta:  # ``to_empty`` leaves arbitrary bytes
            self.weight_format = _tag(self.format).to(self.weight.device)
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tag, weight = state_dict.get(f"{prefix}weight_format"), state_dict.get(f"{prefix}weight")
        if tag is not None and (saved := _untag(tag)) != str(self.format):
            error_msgs.append(
                f"{prefix}weight was saved as {saved} but this layer is {self.format}: make the layer with "
                f"weights={saved!r}, or dequantize() the saved model and quantize it again"
            )
            return
        if tag is None and weight is not None and weight.is_floating_point():
            weight = self.oriented(weight)
            if weight.shape != self.weight_shape:
                expected = tuple(self.weight_shape)
                error_msgs.append(f"{prefix}weight must be of shape {expected}, got {tuple(weight.shape)}")
                return
            state_dict = {**state_dict, **{f"{prefix}{part}": x for part, x in self.saved(weight).items()}}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class LowBitLinear(LowBitWeight, nn.Linear):  # type: ignore[misc]  # both say what weight is
    """``nn.Linear`` with its weight in low bits, for inference and for training adapters beside it.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; ``dtype`` is that of the bias.
        weights: a format or its name: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"``, ``"int2"``, with
            ``-dq`` and ``-g128`` as ``kernels.formats.weight_format`` says.
        settings: the other fields of ``Weights``: ``fit``, ``compute_dtype``, ``threshold``.

    Input ``[..., in_features]`` or nested, output ``[..., out_features]``.

    Raises:
        ValueError: for a bad setting, and in ``forward`` for an input of another shape.
    """

    default: str = "nf4"
    plain: type[nn.Module] = nn.Linear
    """The class that the layer had, and has again when it is released."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weights: str | Format | None = None,
        **settings: Any,
    ) -> None:
        chosen = Weights.of(weights or self.default, **settings)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.keep(self.weight, chosen)

    @classmethod
    def adopt(cls, linear: nn.Module, weights: Weights) -> None:
        """Turn a plain ``nn.Linear``, or Transformers' ``Conv1D``, into this class in place: the object, its name and
        its hooks stay."""
        linear.plain = type(linear)  # type: ignore[assignment]
        if is_conv1d(linear):
            linear.in_features, linear.out_features = linear.weight.shape  # type: ignore
        linear.__class__ = cls
        linear.keep(linear.oriented(linear.weight), weights)  # type: ignore[operator]

    @classmethod
    def release(cls, layer: LowBitLinear, dtype: torch.dtype | None = None) -> None:
        """Turn the layer into a plain one in place, with the decoded weight in ``dtype``; the inverse of ``adopt``."""
        layer.drop(dtype)
        layer.weight = nn.Parameter(layer.oriented(layer.weight.data), requires_grad=False)
        layer.__class__ = vars(layer).pop("plain", nn.Linear)

    def oriented(self, weight: Tensor) -> Tensor:
        """``weight`` from the layout of the plain layer to ``[out_features, in_features]``, or back."""
        return weight if issubclass(self.plain, nn.Linear) else weight.T.contiguous()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does, and quantise. Does nothing on the meta device."""
        if not hasattr(self, "weights"):  # still being built as an ``nn.Linear``
            super().reset_parameters()
        elif not self.weight.is_meta:
            fresh = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device)
            self.keep(fresh.weight.to(self.dtype), self.weights)
            if self.bias is not None:
                self.bias.data.copy_(fresh.bias.data)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return of_nested(self.forward, input)
        own = self.weights
        dtype = own.compute_dtype or autocast_dtype(input)
        x = input if dtype is None else input.to(dtype)
        if own.threshold:
            y = kernels.int8_outlier_matmul(x, self.weight, self.scales, self.bias, own.threshold)
        else:
            y = kernels.lowbit_matmul(x, self.weight, self.scales, self.bias, own.format)
        return y if own.compute_dtype is None else y.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weights}"


class Linear8bit(LowBitLinear):
    """``LowBitLinear`` with ``weights="int8"``: a row has one scale."""

    default = "int8"


class Linear4bit(LowBitLinear):
    """``LowBitLinear`` with ``weights="nf4"``, or the 4-bit format that is named: ``"fp4"``, ``"int4"``."""

    default = "nf4"


class Linear3bit(LowBitLinear):
    """``LowBitLinear`` with ``weights="int3"``."""

    default = "int3"


class Linear2bit(LowBitLinear):
    """``LowBitLinear`` with ``weights="int2"``."""

    default = "int2"


def _tag(form: Format) -> Tensor:
    return torch.tensor(list(str(form).encode()), dtype=torch.uint8)


def _untag(tag: Tensor) -> str:
    return bytes(tag.tolist()).decode(errors="replace")


def _quantised(weight: Tensor, weights: Weights) -> tuple[Tensor, Tensor, float | None]:
    """Codes, scales, and signal to noise in dB. Works on some rows at a time, to avoid a decoded copy of the whole
    weight."""
    form, (*leading, length) = weights.format, weight.shape
    if weight.is_meta:
        return *kernels.lowbit_quantize(weight, form, weights.fit), None
    rows = weight.reshape(prod(leading), length)
    packed = rows.new_empty(len(rows), form.packed_width(length), dtype=torch.uint8)
    scales = rows.new_empty(len(rows), form.scales_width(length), dtype=form.scales_dtype)
    step = max(1, ELEMENTS_AT_ONCE // max(length, 1))
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)  # signal, noise
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        packed[part], scales[part] = kernels.lowbit_quantize(rows[part], form, weights.fit)
        exact = rows[part].float()
        squares[0] += exact.square().sum(dtype=torch.float64)
        error = exact - kernels.lowbit_dequantize(packed[part], scales[part], form, length, torch.float32)
        squares[1] += error.square().sum(dtype=torch.float64)
    snr = float(10 * torch.log10(squares[0] / squares[1]))
    return packed.reshape(*leading, packed.shape[1]), scales.reshape(*leading, scales.shape[1]), snr


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None where it is off."""
    kind = x.device.type
    if autocasts(kind):
        return torch.get_autocast_dtype(kind)
    return None
