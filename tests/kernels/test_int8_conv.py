"""The int8 products of convolutions on every backend of this machine, against torch's convolutions in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support.instruction_sets import require
from support.int8_oracle import BACKENDS, FLOATS, assert_same, needs_compiler
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu import int8_conv as cpu
from lowbit_lightning.kernels.reference import int8_conv as reference
from lowbit_lightning.layers.windows import Windows

F = torch.nn.functional


class Case(NamedTuple):
    """A convolution: images, channels, results' channels, size, kernel, stride, padding, dilation."""

    images: int
    channels: int
    features: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def windows(self) -> Windows:
        n = len(self.size)
        return Windows(self.size, self.kernel, (self.stride,) * n, (self.padding,) * n, (self.dilation,) * n)


CASES = [
    Case(2, 16, 20, (7, 5), (3, 3), 1, 1),
    Case(3, 64, 70, (6, 6), (3, 3), 2, 1),
    Case(1, 17, 33, (9, 4), (2, 3), 2, 2, 2),
    Case(2, 5, 3, (4, 4), (1, 1), 3),
    Case(1, 100, 1, (12,), (5,), 1, 2),
    Case(2, 20, 19, (4, 3, 5), (3, 2, 1), 2, 1),
    Case(4, 1, 65, (3, 3), (3, 3), 1, 4),  # windows that see nothing of the image
]


def values(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of their rows."""
    return torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0]) + 0.1


def images_of(x: Tensor, case: Case) -> Tensor:
    """``[images, channels, *size]`` of rows."""
    return x.unflatten(0, (case.images, -1)).movedim(-1, 1)


def convolve(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    kind = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(case.size)]
    return kind(x, weight, None, case.stride, case.padding, case.dilation)


def expected(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Each op's result and what float64 gives, relative to its largest magnitude."""
    table, taps = case.windows().table(torch.device("cpu")), torch.Size(case.kernel).numel()
    pixels, results = torch.Size(case.size).numel(), len(table)
    x, x_scales = values(case.images * pixels, case.channels)
    w, w_scales = values(case.features, taps, case.channels)
    dy, dy_scales = values(case.images * results, case.features)
    of_channels, of_features = torch.rand(case.channels), torch.rand(case.features)
    bias = torch.randn(case.features)

    def image(q: Tensor, size: tuple[int, ...]) -> Tensor:
        return q.double().view(case.images, *size, -1).movedim(-1, 1)

    def weight(q: Tensor) -> Tensor:
        return q.double().view(case.features, *case.kernel, case.channels).movedim(-1, 1)

    size_out = convolve(case, image(x, case.size), weight(w)).shape[2:]
    real_x, real_w = image(x * x_scales.double()[:, None], case.size), weight(w * w_scales.double()[:, None, None])
    y = convolve(case, real_x, real_w).movedim(1, -1).reshape(-1, case.features) + bias
    found = {"conv": (kernels.int8_conv(x, w, x_scales, w_scales, table, case.images, bias), y)}

    real_w = weight(w * of_channels.double())
    zero = torch.zeros_like(real_x, requires_grad=True)
    real_dy = image(dy * dy_scales.double()[:, None], size_out)
    (dx,) = torch.autograd.grad(convolve(case, zero, real_w), zero, real_dy)
    actual = kernels.int8_conv_input(dy, w, dy_scales, of_channels, table, case.images, pixels)
    found["input"] = actual, dx.movedim(1, -1).reshape(-1, case.channels)

    zero = torch.zeros_like(real_w, requires_grad=True)
    real_dy, real_x = image(dy * of_features.double(), size_out), image(x * of_channels.double(), case.size)
    (dw,) = torch.autograd.grad(convolve(case, real_x, zero), zero, real_dy)
    actual = kernels.int8_conv_weight(dy.T.contiguous(), x, of_features, of_channels, table, case.images)
    found["weight"] = actual, dw.movedim(1, -1).reshape(case.features, taps, case.channels)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_convolution(case: Case, backend: str) -> None:
    with kernels.use_backend(backend):
        for actual, wanted in expected(case).values():
            torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


def assert_as_reference(case: Case, dtype: torch.dtype, hostile: bool = False) -> None:
    table, taps = case.windows().table(torch.device("cpu")), torch.Size(case.kernel).numel()
    pixels, results = torch.Size(case.size).numel(), len(table)
    x, x_scales = values(case.images * pixels, case.channels)
    w, w_scales = values(case.features, taps, case.channels)
    dy, dy_scales = values(case.images * results, case.features)
    bias = torch.randn(case.features)
    if hostile:
        for scales in (x_scales, w_scales, dy_scales):
            special = torch.tensor([0.0, -1.0, 1e-45, 3e38, float("inf"), float("nan")])
            chosen = torch.rand(len(scales)) < 0.3
            scales[chosen] = special[torch.randint(6, (int(chosen.sum()),))]
    of_channels, of_features = x_scales[: case.channels], w_scales
    if len(of_channels) < case.channels:
        of_channels = torch.rand(case.channels)
    calls = [
        ("int8_conv", (x, w, x_scales, w_scales, table, case.images, bias, dtype)),
        ("int8_conv", (x, w, x_scales, w_scales, table, case.images, None, dtype)),
        ("int8_conv_input", (dy, w, dy_scales, of_channels, table, case.images, pixels, dtype)),
        ("int8_conv_weight", (dy.T.contiguous(), x, of_features, of_channels, table, case.images, dtype)),
    ]
    for op, (a, b, a_scales, b_scales, *rest) in calls:
        wanted = getattr(reference, op)((a, a_scales), (b, b_scales), *rest)
        assert_same(getattr(kernels, op)(a, b, a_scales, b_scales, *rest), wanted)


@needs_compiler
@pytest.mark.parametrize("hostile", [False, True], ids=["", "hostile scales"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backends_are_equal_to_the_bit(dtype: torch.dtype, hostile: bool) -> None:
    threads = torch.get_num_threads()
    with kernels.use_backend("cpu"):
        for case in (*CASES, Case(2, 160, 100, (8, 8), (3, 3), 1, 1)):
            for count in (1, 3):
                torch.set_num_threads(count)
                assert_as_reference(case, dtype, hostile)
    torch.set_num_threads(threads)


@needs_compiler
def test_sums_of_more_pixels_than_an_int32_holds() -> None:
    """-128 times -128, over more pixels than one part has."""
    case = Case(3, 2, 1, (160, 161), (1, 1))
    table = case.windows().table(torch.device("cpu"))
    x = torch.full((3 * 160 * 161, 2), -128, dtype=torch.int8)
    arguments = x[:, :1].T.contiguous(), x, torch.ones(1), torch.ones(2), table, 3, torch.float32
    assert len(x) > reference.PART
    for backend in ("cpu", "reference"):
        with kernels.use_backend(backend):
            assert kernels.int8_conv_weight(*arguments).flatten().tolist() == [16384.0 * len(x)] * 2


BUILDS = {
    "AMX": (("-DLB_AMX_TWIN=1",), set()),
    "AVX-512 BW": (("-mno-avx512vnni", "-mno-amx-int8", "-mno-amx-tile"), {"avx512bw"}),
    "AVX2": (("-march=x86-64-v3",), {"avx2"}),
    "SSE2": (("-march=x86-64",), {"sse2"}),
    "no int8 instructions": (("-march=x86-64", "-U__SSE2__"), {"sse2"}),
}


@needs_compiler
@pytest.mark.parametrize("name", BUILDS)
def test_every_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, features = BUILDS[name]
    require(name, features)
    build = cpu.library((*flags, "-O1"))
    assert build.lb_int8_conv_instructions().decode() == name
    monkeypatch.setattr(cpu, "library", lambda: build)
    with kernels.use_backend("cpu"):
        for case in CASES:
            assert_as_reference(case, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_forms_of_an_image(dtype: torch.dtype, seed: int | None, backend: str) -> None:
    with kernels.use_backend(backend):
        for rows, columns in ((1, 1), (3, 64), (70, 20), (33, 130), (200, 65), (0, 4), (4, 0)):
            x = (torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, columns))).to(dtype)
            if x.numel() > 20:
                x.view(-1)[torch.randperm(x.numel())[:3]] = torch.tensor([float("nan"), float("inf"), 1e-45]).to(dtype)
            columnwise, scales = kernels.quantize_colwise(x, seed)
            wanted = (*kernels.quantize_rowwise(x, seed), columnwise.T, scales)
            for actual, right in zip(kernels.quantize_image(x, seed), wanted, strict=True):
                assert_same(actual, right)
            for actual, right in zip(kernels.quantize_channels(x, seed), wanted[2:], strict=True):
                assert_same(actual, right)


def test_messages() -> None:
    case = CASES[0]
    table = case.windows().table(torch.device("cpu"))
    x, scales = values(70, 16)
    w, w_scales = values(20, 9, 16)
    good = x, w, scales, w_scales, table, 2
    for place, value, message in (
        (0, x.float(), "a must be int8"),
        (0, x[:69], "a must be a matrix with the pixels of 2 images"),
        (1, w[:, :8], r"b must be of shape \[any, 9, 16\]"),
        (2, scales[:5], "a_scales must be float32"),
        (4, table.long(), "table must be int32"),
        (5, 0, "images must be at least 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            kernels.int8_conv(*good[:place], value, *good[place + 1 :])  # type: ignore[arg-type, call-arg]
