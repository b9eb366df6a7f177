"""Int8Conv1d to 3d: their products against float64 and the theory of their error, what each option switches, and all
that they promise beside it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.int8_models import OPTIONS, assert_equal, called, gradients
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers import Int8Conv1d, Int8Conv2d, Int8Conv3d, Products

F = torch.nn.functional
FORMS: list[Any] = [
    (nn.Conv1d, Int8Conv1d, (9,), {"kernel_size": 3, "padding": 1, "stride": 2}),
    (nn.Conv2d, Int8Conv2d, (6, 5), {"kernel_size": (3, 2), "padding": (1, 0), "dilation": (2, 1)}),
    (nn.Conv2d, Int8Conv2d, (6, 5), {"kernel_size": (2, 3), "padding": "same", "bias": False}),
    (nn.Conv2d, Int8Conv2d, (6, 5), {"kernel_size": 1, "stride": 2}),
    (nn.Conv3d, Int8Conv3d, (4, 3, 5), {"kernel_size": 2, "padding": "valid"}),
]
OPS = ("int8_conv", "int8_conv_input", "int8_conv_weight")


def conv(**settings: Any) -> Int8Conv2d:
    torch.manual_seed(0)
    return Int8Conv2d(16, 24, 3, padding=1, **settings)


def image(*size: int, last: bool = True) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(size)
    return x.to(memory_format=torch.channels_last) if last else x


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


# -- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_the_plain_convolution_up_to_rounding(form: Any, last: bool) -> None:
    plain_class, int8_class, size, arguments = form
    torch.manual_seed(0)
    int8 = int8_class(16, 24, **arguments)
    plain = plain_class(16, 24, **arguments).double()
    plain.load_state_dict(int8.state_dict())
    x = torch.randn(3, 16, *size)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = int8(ours), plain(exact)
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy.double())
    for actual, right in (
        (y, wanted),
        (ours.grad, exact.grad),
        *((a.grad, b.grad) for a, b in zip(int8.parameters(), plain.parameters(), strict=True)),
    ):
        assert actual.shape == right.shape
        assert relative(actual, right) < 0.03
    assert y.movedim(1, -1).is_contiguous() == last
    assert ours.grad is not None
    assert ours.grad.movedim(1, -1).is_contiguous() == last
    assert int8.weight.grad.stride() == int8.weight.stride()
    with torch.no_grad():
        assert_equal([int8(x[0])], [int8(x)[0]])


def variance(signal: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the values, and of a step of their scale over 12."""
    return signal.square(), (scale.square() / 12).expand_as(signal)


def test_error_is_that_of_theory_within_a_tenth() -> None:
    """``layers/conv.py`` has the formulas. Pixels and channels differ in size, so that it matters where scales lie."""
    torch.manual_seed(0)
    n, c, o, h = 4, 48, 40, 9
    x = torch.randn(n, c, h, h, dtype=torch.double) * torch.exp(torch.randn(n, 1, h, h))
    dy = torch.randn(n, o, h, h, dtype=torch.double) * torch.exp(torch.randn(1, o, 1, 1))
    w = torch.randn(o, c, 3, 3, dtype=torch.double)
    layer = Int8Conv2d(c, o, 3, padding=1, bias=False)
    layer.weight.data.copy_(w)
    x32 = x.float().requires_grad_()
    y = layer(x32)
    y.backward(dy.float())

    def step(v: Tensor, *dims: int) -> Tensor:
        return v.abs().amax(dims, keepdim=True) / 127

    def predicted(kind: str, a: Tensor, a_step: Tensor, b: Tensor, b_step: Tensor) -> Tensor:
        (a2, a_noise), (b2, b_noise) = variance(a, a_step), variance(b, b_step)
        if kind == "y":
            return F.conv2d(a_noise, b2, padding=1) + F.conv2d(a2, b_noise, padding=1)
        if kind == "dx":
            return F.conv_transpose2d(a_noise, b2, padding=1) + F.conv_transpose2d(a2, b_noise, padding=1)
        both = ((a_noise, b2), (a2, b_noise))
        return sum((conv2d_weight(q, w.shape, p, padding=1) for p, q in both), torch.zeros(()))

    cases = {
        "y": (y, F.conv2d(x, w, padding=1), x, step(x, 1), w, step(w, 1, 2, 3)),
        "dx": (x32.grad, F.conv_transpose2d(dy, w, padding=1), dy, step(dy, 1), w, step(w, 0, 2, 3)),
        "dw": (
            *(layer.weight.grad, conv2d_weight(x, w.shape, dy, padding=1)),
            *(dy, 2**0.5 * step(dy, 0, 2, 3), x, step(x, 0, 2, 3)),  # dithered: twice the variance
        ),
    }
    for kind, (actual, exact, *operands) in cases.items():
        assert actual is not None
        theory = (predicted(kind, *operands).sum().sqrt() / exact.norm()).item()
        assert relative(actual, exact) == pytest.approx(theory, rel=0.1), kind
        assert 0.003 < theory < 0.05


def test_small_gradients_count_where_few_pixels_stand_out() -> None:
    """As of a network that labels pixels, behind a batch norm: they balance the large ones. To nearest all become zero,
    which adds the mean of x to dw, the same in each batch; dithered, the error stays that of theory."""
    torch.manual_seed(0)
    x, dy = torch.rand(4, 16, 24, 24), torch.zeros(4, 24, 24, 24)
    dy[:, :, 3::8, 5::8] = torch.randn(4, 24, 3, 3).abs()
    dy -= dy.mean((0, 2, 3), keepdim=True)
    exact = conv2d_weight(x.double(), torch.Size((24, 16, 3, 3)), dy.double(), padding=1)
    steps = [v.abs().amax((0, 2, 3), keepdim=True).double() / 127 for v in (x, dy)]
    noises = [s.square().expand_as(v) / n for s, v, n in zip(steps, (x, dy), (12, 6), strict=True)]
    variance = conv2d_weight(noises[0], exact.shape, dy.double().square(), padding=1)
    variance += conv2d_weight(x.double().square(), exact.shape, noises[1], padding=1)
    theory, state, found = variance.sum().sqrt() / exact.norm(), torch.get_rng_state(), {}
    for rounding in ("auto", "stochastic", "nearest"):
        layer = conv(gradient_rounding=rounding)
        torch.set_rng_state(state)
        layer(x).backward(dy)
        assert layer.weight.grad is not None
        found[rounding] = relative(layer.weight.grad, exact) / theory
        assert torch.equal(torch.get_rng_state(), state) == (rounding != "stochastic")
    assert found["auto"] < 1.1
    assert found["stochastic"] < 1.1
    assert found["nearest"] > 4


def test_backends_agree_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for backend in ("cpu", "reference"):
            with kernels.use_backend(backend):
                layer = conv(dtype=dtype)
                found.append(gradients(layer, image(2, 16, 7, 6).to(dtype)))
        assert_equal(*found)


def test_inputs_are_saved_as_bytes() -> None:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    layer = conv()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(image(2, 16, 8, 8).requires_grad_())
    kept = sum(x.numel() * x.itemsize for x in saved if x is not layer.weight)
    assert kept == 2 * 64 * 16 + 4 * 16


# -- what switches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_are_those_that_the_settings_predict(options: dict[str, Any]) -> None:
    products = Products(**options)
    for needs_input, trains in itertools.product((True, False), repeat=2):
        layer = conv(**options)
        layer.weight.requires_grad_(trains)
        kernels.reset_calls()
        layer(image(2, 16, 6, 6).requires_grad_(needs_input)).sum().backward()
        wanted = (products.forward, needs_input and products.grad_input, trains and products.grad_weight)
        assert [called().get(op, 0) for op in OPS] == [int(kind == "int8") for kind in wanted]


def test_saving_int8_changes_nothing() -> None:
    assert_equal(gradients(conv(save_inputs="high"), image(2, 16, 6, 6)), gradients(conv(), image(2, 16, 6, 6)))


def test_high_products_are_those_of_torch() -> None:
    layer = conv(forward="high", grad_input="high", grad_weight="high")
    plain = nn.Conv2d(16, 24, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    for ours, theirs in zip(*(gradients(m, image(2, 16, 6, 6)) for m in (layer, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_stochastic_rounding_repeats_by_seed_and_has_no_bias() -> None:
    layer, x = conv(gradient_rounding="stochastic"), image(1, 16, 5, 5)
    dy = torch.randn(1, 24, 5, 5) * 0.01
    dy[:, :, 2, 2] = 1.0

    def weight_gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        layer.zero_grad()
        layer(x).backward(dy)
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    assert torch.equal(weight_gradient(0), weight_gradient(0))
    assert not torch.equal(weight_gradient(0), weight_gradient(1))
    mean = torch.stack([weight_gradient(seed) for seed in range(64)]).mean(0)
    exact = conv2d_weight(x, layer.weight.shape, dy, padding=1)
    assert relative(mean, exact.double()) < 0.5 * relative(weight_gradient(0), exact.double())


def test_evaluation_of_few_pixels_is_plain() -> None:
    layer = conv().eval()
    plain = nn.Conv2d(16, 24, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        kernels.reset_calls()
        torch.testing.assert_close(layer(image(1, 16, 5, 5)), plain(image(1, 16, 5, 5)))
        assert called() == {}
        layer(image(4, 16, 8, 8))
        assert called()["int8_conv"] == 1


def test_empty_and_hostile_inputs() -> None:
    layer = conv()
    x = torch.zeros(0, 16, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    x = image(1, 16, 9, 9)
    x[0, 3, 4, 4] = float("nan")
    y = layer(x)[0, 0]
    assert y.isnan().sum() == 9  # the windows that see the pixel
    assert y[3:6, 3:6].isnan().all()


# -- beside it -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 4)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.body(x) if self.recompute is None else checkpoint(self.body, x, use_reentrant=self.recompute)
        return self.head(self.depthwise(x).mean((2, 3)))


def net(**arguments: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    convert.swap_linears(model)
    return model


def test_swapped_in_place_and_back() -> None:
    model = net()
    weight = model.body[0].weight
    report = str(convert.swap_linears(model))
    assert "in 2 of 5 layers: body.* (2)" in report
    assert "not first: a convolution of fewer than 16 channels" in report
    assert "not depthwise: grouped and depthwise convolutions" in report
    assert isinstance(model.body[0], Int8Conv2d)
    assert type(copy.deepcopy(model).body[0]) is Int8Conv2d
    assert convert.restore(model) == ("body.0", "body.3")
    assert type(model.body[0]) is nn.Conv2d
    assert model.body[0].weight is weight


def test_what_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(16, 16, 3), nn.Conv2d(32, 32, 1)
    )
    with pytest.raises(convert.NothingToSwap, match="transposed convolutions run in high precision") as raised:
        convert.swap_linears(model)
    assert "padding_mode='reflect'" in str(raised.value)
    assert "the model's last convolution" in str(raised.value)
    assert convert.swap_linears(model, output_layer=None).swapped == ("2",)
    for arguments, message in (({"groups": 2}, "groups must be 1"), ({"padding_mode": "circular"}, "must be 'zeros'")):
        with pytest.raises(ValueError, match=message):
            Int8Conv1d(16, 16, 3, **arguments)
    with pytest.raises(ValueError, match=r"input must be of shape \[N, 16, \*size\]"):
        conv()(torch.zeros(1, 15, 4, 4))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        Int8Conv2d(16, 16, 5)(torch.zeros(1, 16, 4, 4))
    with pytest.raises(TypeError, match="input must have the weight's dtype"):
        conv()(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))


def test_autocast_gives_its_dtype() -> None:
    y, dx, dw, db = gradients(conv(), image(2, 16, 6, 6), autocast=True)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, *[torch.float32] * 3)


def test_compiled_is_the_same() -> None:
    x = image(2, 3, 12, 12)
    plain, compiled = net(), net()
    compiled_forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), compiled_forward(x))
    y, z = plain(x), compiled_forward(x)
    y.square().sum().backward()
    z.square().sum().backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is first imported
def test_compiled_by_inductor_is_eager_up_to_rounding() -> None:
    x, layers = image(2, 16, 12, 12), nn.Sequential(conv(), nn.ReLU(), Int8Conv2d(24, 16, 1))
    expected = gradients(layers, x)
    kernels.reset_calls()
    actual = gradients(torch.compile(layers, fullgraph=True), x)
    assert [called().get(op, 0) for op in (*OPS, "int8_matmul")] == [1, 1, 1, 3]
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b.double()) < 0.02


def test_exported_is_the_same() -> None:
    x, model = image(2, 3, 12, 12), net().eval()
    exported = torch.export.export(model, (x,))
    with torch.no_grad():
        kernels.reset_calls()
        assert_equal([exported.module()(x)], [model(x)])
    assert called()["int8_conv"] == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_is_the_same(reentrant: bool) -> None:
    x = image(2, 3, 12, 12)
    assert_equal(gradients(net(recompute=reentrant), x), gradients(net(), x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_double_backward_and_transforms() -> None:
    layer = conv(save_inputs="high").double().float()
    plain = nn.Conv2d(16, 24, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    x = image(2, 16, 6, 6)

    def penalty(m: nn.Module) -> list[Any]:
        m.zero_grad()
        inputs = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(inputs).square().sum(), inputs, create_graph=True)
        dx.square().sum().backward()
        return [p.grad.clone() for p in m.parameters() if p.grad is not None] + [inputs.grad]

    for ours, theirs in zip(penalty(layer), penalty(plain), strict=True):
        assert relative(ours, theirs.double()) < 0.05

    def per_sample(m: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
            return functional_call(m, parameters, (one.unsqueeze(0),)).square().sum()

        return vmap(grad(loss), (None, 0))(dict(m.named_parameters()), x)

    of_plain = per_sample(plain)
    for name, value in per_sample(layer).items():
        assert relative(value, of_plain[name].double()) < 0.05
    direction = torch.randn_like(x)
    found: Any = [jvp(m, (x,), (direction,))[1] for m in (layer, plain)]
    assert relative(found[0], found[1].double()) < 0.05
    with pytest.raises(RuntimeError, match="save_inputs='high'"):
        penalty_of_weight(conv(), x)


def penalty_of_weight(layer: nn.Conv2d, x: Tensor) -> None:
    inputs = x.clone().requires_grad_()
    (dw,) = torch.autograd.grad(layer(inputs).square().sum(), layer.weight, create_graph=True)
    dw.square().sum().backward()
