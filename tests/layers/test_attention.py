"""nn.MultiheadAttention in int8: torch's own module is what it is compared with."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support.attentions import HEADS, HIGH, E, L, N, S, encoder, inputs, int8, results
from support.int8_models import counted
from torch import Tensor, nn

from lowbit_lightning import convert
from lowbit_lightning.layers import Int8MultiheadAttention, Products
from lowbit_lightning.layers.attention import Int8OutProjection
from lowbit_lightning.layers.int8 import FEWEST_ROWS, adopt

CAUSAL = torch.full((L, L), float("-inf")).triu(1)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "self": ({}, "self", {}),
    "self, no weights": ({}, "self", {"need_weights": False}),
    "memory": ({"bias": False}, "memory", {}),
    "apart": ({}, "apart", {"need_weights": False}),
    "sequence first": ({"batch_first": False}, "self", {"average_attn_weights": False}),
    "sequence first, memory": ({"batch_first": False}, "memory", {"need_weights": False}),
    "one sequence": ({}, "memory", {"key_padding_mask": torch.arange(S) > 4}),
    "one sequence, no weights": ({"batch_first": False}, "self", {"need_weights": False}),
    "other widths": ({"kdim": 40, "vdim": 40}, "memory", {}),
    "other widths, no bias": ({"kdim": 40, "vdim": 40, "bias": False}, "apart", {"need_weights": False}),
    "causal": ({}, "self", {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "causal, padded": (
        {},
        "self",
        {"attn_mask": CAUSAL < 0, "is_causal": True, "need_weights": False, "key_padding_mask": None},
    ),
    "causal, weights": ({}, "self", {"attn_mask": CAUSAL, "is_causal": True}),
    "a mask for each head": ({}, "memory", {"attn_mask": torch.randn(N * HEADS, L, S), "need_weights": False}),
    "a mask for each head, padded": (
        {},
        "memory",
        {"attn_mask": torch.randn(N * HEADS, L, S), "key_padding_mask": torch.randn(N, S)},
    ),
    "padded": ({"batch_first": False}, "memory", {"key_padding_mask": torch.arange(S).repeat(N, 1) > 4}),
    "longer keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        "memory",
        {"attn_mask": torch.ones(L, S).triu(2).bool(), "need_weights": False},
    ),
    "longer keys, padded": (
        {"add_bias_kv": True, "batch_first": False},
        "self",
        {"key_padding_mask": torch.arange(L).repeat(N, 1) > 3},
    ),
    "dropout": ({"dropout": 0.3}, "self", {}),
    "dropout, no weights": ({"dropout": 0.3, "add_zero_attn": True}, "self", {"need_weights": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_without_int8_it_is_torch_s_own(name: str) -> None:
    """And with int8 it is off by little."""
    arguments, kind, options = CASES[name]
    plain = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **arguments})
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
    given = inputs(kind, plain.batch_first, arguments.get("kdim", E), "one sequence" in name)
    expected = results(plain, given, **options)
    high = copy.deepcopy(plain)
    for layer in (high.out_proj, high):
        adopt(layer, HIGH)
    with counted(0):
        found = results(high, given, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    products = 3 * (2 if kind == "self" else 4 if kind == "apart" or plain.in_proj_weight is None else 3)
    with counted(products):
        found = results(int8(plain), given, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-4


def test_a_causal_hint_never_hides_the_keys_that_were_added() -> None:
    """torch's own module hides ``bias_k`` from all but the last query where the hint is given."""
    attention = int8(nn.MultiheadAttention(E, HEADS, add_bias_kv=True, batch_first=True))
    given, mask = inputs("self"), {"attn_mask": CAUSAL, "need_weights": False}
    assert torch.equal(attention(*given, is_causal=True, **mask)[0], attention(*given, **mask)[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_error_of_projections_is_what_theory_says(rounding: str) -> None:
    """Rounding is uniform within half a step, or at random within one, which doubles its variance."""
    attention = int8(nn.MultiheadAttention(256, 4, batch_first=True), gradient_rounding=rounding)
    x = torch.randn(2, 48, 256, requires_grad=True)
    caught: list[Tensor] = []

    def catch(layer: nn.Module, x: Tensor, matrix: Tensor, y: Tensor) -> None:
        y.register_hook(lambda grad: caught.extend([y.detach(), grad]))

    handle = attention.register_projection_hook(catch)
    dx, dw = torch.autograd.grad(attention(x, x, x)[0].square().sum(), [x, attention.in_proj_weight])
    handle.remove()
    attention(x, x, x)
    y, dy = (t.flatten(0, 1).double() for t in caught)
    x64, w64 = x.detach().flatten(0, 1).double(), attention.in_proj_weight.detach().double()

    def check(found: Tensor, a: Tensor, b: Tensor, noisier: float) -> None:
        """``a @ b.T``; the rounding of a has ``noisier`` times the variance."""
        a_scale, b_scale = a.abs().amax(1, keepdim=True) / 127, b.abs().amax(1, keepdim=True) / 127
        variance = noisier * a_scale**2 * b.square().sum(1) + (b_scale**2).T * a.square().sum(1, keepdim=True)
        error = (found.double() - a @ b.T).square().mean()
        assert error == pytest.approx((variance / 12).mean().item(), rel=0.1)

    noisier = 2.0 if rounding == "stochastic" else 1.0
    check(y, x64, w64, 1.0)
    check(dx.flatten(0, 1), dy, w64.T, noisier)
    check(dw, dy.T, x64.T, noisier)


# -- in a model ------------------------------------------------------------------------------------------------------


def test_a_swap_is_in_place_and_reversible() -> None:
    model = encoder()
    before = {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()}
    kept, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    report = convert.swap_linears(model)
    assert str(report) == (
        "int8 (forward, grad_input, grad_weight) in 8 of 8 layers: layers.*.self_attn (2), "
        "layers.*.self_attn.out_proj (2), layers.*.linear1 (2), layers.*.linear2 (2)"
    )
    attention: Any = model.layers[0].self_attn
    assert (type(attention), type(attention.out_proj)) == (Int8MultiheadAttention, Int8OutProjection)
    assert issubclass(type(attention), nn.MultiheadAttention)
    assert convert.swap_linears(model) == report
    assert all(p is parameters[name] for name, p in model.named_parameters())
    handle = attention.register_projection_hook(lambda *_: None)
    handle.remove()
    again: Any = pickle.loads(pickle.dumps(model))
    again.load_state_dict(kept)
    assert list(model.state_dict()) == list(kept)
    assert convert.restore(model) == report.swapped
    assert {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert model.layers[0].self_attn._qkv_same_embed_dim  # type: ignore[union-attr]
    assert convert.restore(again) == report.swapped


@pytest.mark.parametrize("settings", [{}, {"kdim": 48, "vdim": 48, "bias": False}])
def test_one_that_is_built_has_the_parameters_of_torch_s(settings: dict[str, Any]) -> None:
    plain, built = nn.MultiheadAttention(E, HEADS, **settings), Int8MultiheadAttention(E, HEADS, **settings)
    built.load_state_dict(plain.state_dict())
    given = inputs("memory", batch_first=False, kdim=settings.get("kdim", E))
    for own, swapped in zip(results(built, given), results(int8(plain), given), strict=True):
        assert torch.equal(own, swapped)
    convert.restore(built)
    assert built._qkv_same_embed_dim == plain._qkv_same_embed_dim


def test_names_stand_for_projections() -> None:
    """The attention's for the input projections, ``out_proj`` for the output's, which can't be int8 alone."""
    model = encoder()
    owned = "its nn.MultiheadAttention runs in high precision, and reads this weight itself"
    report = convert.swap_linears(model, exclude="layers.0.self_attn")
    assert report.skipped == {
        "layers.0.self_attn": "in exclude=['layers.0.self_attn']",
        "layers.0.self_attn.out_proj": owned,
    }
    assert "note: layers.0: nn.TransformerEncoderLayer whose attention is not in int8" in str(report)
    switchback = {"*.self_attn": {"grad_weight": "high"}, "layers.1.self_attn.out_proj": None}
    report = convert.swap_linears(model, overrides=switchback)
    assert set(report.overridden) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert set(report.skipped) == {"layers.1.self_attn.out_proj"}
    with counted(3 * 7 - 2):
        model(torch.randn(N, L, E, requires_grad=True)).square().sum().backward()


def test_attentions_that_stay_plain() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({
        "own": Own(E, HEADS), "small": nn.MultiheadAttention(E, HEADS, kdim=16), "body": nn.Linear(E, E),
        "wide": nn.MultiheadAttention(E, HEADS, dtype=torch.float64), "built": Int8MultiheadAttention(E, HEADS),
    })  # fmt: skip
    report = convert.swap_linears(model, output_layer=None)
    assert report.swapped == ("body",)
    reasons = {name: why for name, why in report.skipped.items() if not name.endswith("out_proj")}
    assert reasons == {
        "own": "Own is a subclass of nn.MultiheadAttention",
        "small": "fewer than min_features=32 features",
        "wide": "weight is torch.float64; int8 takes float32, float16 and bfloat16",
        "built": "was built as Int8MultiheadAttention; left as it is",
    }
    assert model["built"].out_proj.products == Products()  # type: ignore[union-attr]


def test_a_transformer_of_torch_trains_in_int8() -> None:
    torch.manual_seed(0)
    plain: Any = nn.Transformer(E, HEADS, 1, 1, 2 * E, dropout=0.0, batch_first=True)
    given = torch.randn(N, S, E, requires_grad=True), torch.randn(N, L, E, requires_grad=True)
    masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "src_key_padding_mask": torch.arange(S).repeat(N, 1) > 4}
    expected = plain(*given, **masks)
    with counted(3 * ((2 + 2) + (2 + 3 + 2))):
        y = int8(plain)(*given, **masks)
        y.square().sum().backward()
    assert ((y - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_takes_no_fused_path_around_int8(
    norm_first: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask torch fuses the layer; with one the encoder hands nested tensors to its layers too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True, but")
        plain = encoder(norm_first=norm_first).eval()
    model = int8(plain)
    x = torch.randn(N, S, E)
    mask = torch.arange(S) >= torch.tensor([[7], [4], [2]]) if padded else None
    with torch.inference_mode():
        expected = plain(x, src_key_padding_mask=mask)
        with counted(0):  # so few rows don't pay
            torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-4, atol=1e-5)
        monkeypatch.setitem(FEWEST_ROWS, "cpu", (1, 1, 1))
        with counted(2 * 4):
            y = model(x, src_key_padding_mask=mask)
    assert y.shape == expected.shape
    seen = torch.ones(N, S, dtype=torch.bool) if mask is None else ~mask
    assert 1e-4 < ((y - expected)[seen].norm() / expected[seen].norm()).item() < 0.03
    assert not y[~seen].any() or norm_first
    trained = model.train()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[seen], trained.detach()[seen], rtol=1e-3, atol=2e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors_are_sequences_of_their_own() -> None:
    attention = int8(nn.MultiheadAttention(E, HEADS, batch_first=True))
    parts = [torch.randn(n, E) for n in (3, 1, 6)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        y, _ = attention(nested, nested, nested, need_weights=False)
        for part, own in zip(parts, y.unbind(), strict=True):
            alone = attention(*[part.unsqueeze(0)] * 3, need_weights=False)[0].squeeze(0)
            torch.testing.assert_close(own, alone, rtol=1e-3, atol=5e-3)
    with pytest.raises(ValueError, match="a nested query must be the key and the value too, without masks"):
        attention(nested, nested, nested, attn_mask=CAUSAL)


def test_autocast() -> None:
    """bias_kv and masks go along; what is around the projections computes in bf16."""
    plain = nn.MultiheadAttention(E, HEADS, batch_first=True, add_bias_kv=True)
    given, mask = inputs("memory"), {"key_padding_mask": torch.arange(S).repeat(N, 1) > 4}
    with torch.autocast("cpu", torch.bfloat16):
        y, weights = int8(plain)(*given, **mask)
    expected, own_weights = plain(*given, **mask)
    assert y.dtype == torch.bfloat16
    assert ((y - expected).norm() / expected.norm()).item() < 0.05
    torch.testing.assert_close(weights.float(), own_weights, rtol=0.1, atol=0.01)


def test_bad_arguments() -> None:
    attention = int8(nn.MultiheadAttention(E, HEADS, batch_first=True))
    x, longer = torch.randn(N, L, E), torch.randn(N, S, E)
    for arguments, error, said in (
        ((x, longer, x), ValueError, "key and value must fit the query, got"),
        ((x, longer, longer, torch.zeros(S, N)), ValueError, r"key_padding_mask must be of shape \(3, 7\), got"),
        ((x, x, x, None, True, torch.zeros(S, S)), ValueError, r"attn_mask must be of shape \(5, 5\) or \(12, 5, 5\)"),
        ((x, x, x, None, True, torch.zeros(L, L).int()), TypeError, "attn_mask must be bool .* got torch.int32"),
        ((x, x, x, None, True, None, True, True), ValueError, "give attn_mask too"),
        ((x.double(),) * 3, TypeError, "must have the weight's dtype"),
        ((x[..., :32],) * 3, ValueError, r"input must be of shape \[\.\.\., 64\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            attention(*arguments)
