"""Int8 layers in what wraps, compiles, shards and trains them: equal numbers, and the predicted count of products."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers import Int8Linear, Products
from lowbit_lightning.precision import FabricInt8MixedPrecision, Int8MixedPrecision

ROOT = Path(__file__).parents[1]
WIDTH, HEADS, TOKENS = 64, 4, 24
LINEARS = 4  # of a block


class Block(nn.Module):
    """Of a transformer; every linear layer's input needs a gradient, since a norm with weights comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, blocks: int, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 16)
        self.reentrant = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = self.tokens(tokens)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def swapped(module: nn.Module, **settings: Any) -> Any:
    convert.swap_linears(module, output_layer="head" if isinstance(module, GPT) else None, **settings)
    return module


def called() -> dict[str, int]:
    return {op: count for (op, _), count in kernels.calls().items()}


def matmuls() -> int:
    return called().get("int8_matmul", 0)


def gradients(module: Any, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    x = x.clone().requires_grad_(x.is_floating_point())
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.float().square().mean().backward()
    found = [p.grad.clone() for p in module.parameters()]
    return [y.detach(), *([] if x.grad is None else [x.grad]), *found]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {i} differs by {(a - b).abs().max()}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"save_inputs": "high"},
    {"grad_weight": "high"},
    {"grad_input": "high"},
    {"forward": "high"},
    {"forward": "high", "save_inputs": "high", "grad_input": "high"},
]
IDS = ["-".join(f"{k}={v}" for k, v in options.items()) or "default" for options in OPTIONS]


def products(options: dict[str, Any]) -> int:
    return len(Products(**options).int8)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_input": "high"}, {"forward": "high"}])
def test_saving_in_int8_changes_no_number(options: dict[str, Any], autocast: bool) -> None:
    block, x = Block(), torch.randn(2, TOKENS, WIDTH)
    results = []
    for save_inputs in ("int8", "high"):
        swapped(block, save_inputs=save_inputs, **options)
        kernels.reset_calls()
        results.append(gradients(block, x, autocast))
        assert matmuls() == LINEARS * products(options)
    assert_equal(*results)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_what_is_quantised_and_how_often(options: dict[str, Any]) -> None:
    """x, w and dy: both forms by one op where both are wanted at once."""
    p = Products(**options)
    layer = Int8Linear(WIDTH, WIDTH, **options)
    kernels.reset_calls()
    layer(torch.randn(8, WIDTH, requires_grad=True)).sum().backward()
    forward, dx, dw = (name in p.int8 for name in ("forward", "grad_input", "grad_weight"))
    at_once = p.save_inputs == "int8"
    expected = {
        "quantize_both": (forward and dw and at_once) + (dx and dw),
        "quantize_rowwise": (forward and not (dw and at_once)) + forward + (dx and not dw),
        "quantize_colwise": (dw and not (forward and at_once)) + dx + (dw and not dx),
        "int8_matmul": products(options),
    }
    assert called() == {op: count for op, count in expected.items() if count}


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    layer = Int8Linear(WIDTH, WIDTH)
    kernels.reset_calls()
    with torch.no_grad():
        layer(torch.randn(8, WIDTH))
    layer.weight.requires_grad_(False)
    layer(torch.randn(8, WIDTH))
    assert called() == {"quantize_rowwise": 4, "int8_matmul": 2}


def theory(a: Tensor, b: Tensor) -> float:
    """The expected relative error of ``a @ b.T`` where both have been rounded to multiples of their rows' absmax / 127.

    Rounding errors are uniform: of mean 0 and variance s^2 / 12. Those of different elements are independent.
    """
    s, t = ((m.abs().amax(1) / 127).square() / 12 for m in (a, b))
    variance = a.square().sum(1).unsqueeze(1) * t + s.unsqueeze(1) * b.square().sum(1)
    variance = variance + a.shape[1] * s.unsqueeze(1) * t
    return float(variance.sum().sqrt() / (a @ b.T).norm())


@pytest.mark.parametrize("data", ["normal", "uniform", "outliers"])
def test_errors_are_those_that_theory_gives(data: str) -> None:
    draw = torch.rand if data == "uniform" else torch.randn
    x, w, dy = draw(256, 512), draw(128, 512), draw(256, 128)
    if data == "outliers":
        x[:, :4] *= 20
    layer = Int8Linear(512, 128, bias=False)
    layer.weight = nn.Parameter(w)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    x64, w64, dy64 = (t.detach().double() for t in (x, w, dy))
    pairs = {
        "forward": (y, x64, w64),
        "grad_input": (x.grad, dy64, w64.T),
        "grad_weight": (layer.weight.grad, dy64.T, x64.T),
    }
    for name, (result, a, b) in pairs.items():
        assert result is not None
        exact = a @ b.T
        error = float((result.detach().double() - exact).norm() / exact.norm())
        assert error == pytest.approx(theory(a, b), rel=0.1), name


def test_stochastic_rounding_of_gradients() -> None:
    """Governed by torch's seed, without bias, and only in the backward."""
    layer = Int8Linear(WIDTH, WIDTH, gradient_rounding="stochastic")
    plain = Int8Linear(WIDTH, WIDTH)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(32, WIDTH), torch.randn(32, WIDTH)

    def run(module: Int8Linear) -> list[Tensor]:
        given = x.clone().requires_grad_()
        module.zero_grad()
        y = module(given)
        y.backward(dy)
        assert given.grad is not None
        assert module.weight.grad is not None
        return [y.detach(), given.grad, module.weight.grad.clone()]

    torch.manual_seed(3)
    first, second = run(layer), run(layer)
    torch.manual_seed(3)
    assert_equal(run(layer), first)
    nearest = run(plain)
    assert torch.equal(first[0], nearest[0])
    for a, b, c in zip(first[1:], second[1:], nearest[1:], strict=True):
        assert not torch.equal(a, b)
        assert not torch.equal(a, c)

    count = 200
    runs = [run(layer)[1:] for _ in range(count)]
    for i, (w, name) in enumerate(((layer.weight, "grad_input"), (x, "grad_weight"))):
        # Only dy is random: the expectation is the product of the exact dy with the quantised other operand.
        q, scales = kernels.quantize_colwise(w.detach())
        other = (q.double() * scales.double().unsqueeze(1)).T
        expected = (dy.double() if i == 0 else dy.double().T) @ other
        mean = torch.stack([r[i].double() for r in runs]).mean(0)
        deviation = torch.stack([r[i].double() for r in runs]).std(0) / count**0.5
        assert ((mean - expected).abs() / deviation).mean().item() == pytest.approx(0.8, abs=0.1), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_backends_agree_to_the_bit(rounding: str) -> None:
    block, x = swapped(Block(), gradient_rounding=rounding), torch.randn(2, TOKENS, WIDTH)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(5)
        kernels.reset_calls()
        with kernels.use_backend(backend):
            results.append(gradients(block, x))
        assert {name for _, name in kernels.calls()} == {backend}
        assert matmuls() == 3 * LINEARS
    assert_equal(*results)


def test_options_are_validated() -> None:
    for name, value in (("save_inputs", "int4"), ("gradient_rounding", "up"), ("cache_weights", "yes")):
        with pytest.raises(ValueError, match=rf"{name} must be .* or .*, got '{value}'"):
            Products(**{name: value})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="gradient_rounding='stochastic' does nothing where"):
        Int8MixedPrecision(gradient_rounding="stochastic", grad_input="high", grad_weight="high")
    with pytest.raises(ValueError, match=r"overrides\['\*\.down'\]=.* grad_weight must be 'int8' or 'high'"):
        Int8MixedPrecision(overrides={"*.down": {"grad_weight": "fp8"}})


# -- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def saved_by(module: nn.Module, found: dict[int, int]) -> Iterator[None]:
    """Collects {address: bytes} of the memory that the linear layers save for the backward, but for weights."""
    contexts: list[Any] = []
    shapes = {shape for p in module.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_: Any) -> None:
        contexts.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    handles = [h for m in linears for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    yield
    for handle in handles:
        handle.remove()


def test_inputs_are_kept_in_a_byte() -> None:
    """Of a GPT of 12 layers, against bf16-mixed: what its linear layers keep for the backward."""
    tokens = torch.randint(16, (4, 250))
    kept = {}
    for name in ("bf16-mixed", "int8", "high"):
        model = GPT(12)
        if name != "bf16-mixed":
            swapped(model, save_inputs=name)
        found: dict[int, int] = {}
        with saved_by(model.blocks, found), torch.autocast("cpu", torch.bfloat16):
            y = model(tokens)
        kept[name] = sum(found.values())
        kernels.reset_calls()
        y.float().mean().backward()
        assert matmuls() == (0 if name == "bf16-mixed" else 2 * 12 * LINEARS)
    features = 12 * (3 * WIDTH + 4 * WIDTH)  # inputs of qkv, proj, up and down
    assert kept["bf16-mixed"] == kept["high"] == 2 * 1000 * features
    assert kept["int8"] == (1000 + 4) * features  # a byte each, and a scale for each column
    assert kept["int8"] <= 0.6 * kept["bf16-mixed"]


# -- what wraps a layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_a_compiled_block_equals_eager(options: dict[str, Any]) -> None:
    block = swapped(Block(), **options)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, TOKENS, WIDTH)
        expected = gradients(block, x)
        kernels.reset_calls()
        actual = gradients(compiled, x)
        assert matmuls() == LINEARS * products(options)
        assert_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is first imported
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_block_compiled_by_inductor_is_eager_up_to_rounding(rounding: str) -> None:
    block, x = swapped(Block(), gradient_rounding=rounding), torch.randn(2, TOKENS, WIDTH)
    expected = gradients(block, x, autocast=True)
    kernels.reset_calls()
    actual = gradients(torch.compile(block, fullgraph=True), x, autocast=True)
    assert matmuls() == 3 * LINEARS
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.03


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_equals_keeping(reentrant: bool) -> None:
    tokens = torch.randint(16, (2, TOKENS))
    torch.manual_seed(1)
    expected = gradients(swapped(GPT(2)), tokens)
    torch.manual_seed(1)
    model = swapped(GPT(2, reentrant))
    kernels.reset_calls()
    assert_equal(gradients(model, tokens), expected)
    assert matmuls() == (3 + 1) * 2 * LINEARS  # the forward once more
    if reentrant:  # the first forward keeps nothing
        assert called()["quantize_both"] == 2 * 2 * LINEARS


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (r".*", 24),
        (r"(?!blocks.0.\w+.weight)|.*norm", 20),  # a frozen weight costs no grad_weight
        (r"blocks.1|head", 4 + 12),  # behind the first block nothing is trained; norms of the second are
        (r"blocks.1.(qkv|proj|up|down)|head", 4 + 12 - 1),  # nor before the first layer of the second
        (r"blocks.0.down|blocks.1.norm2|head", (3 + 2) + (2 + 2 + 2 + 2)),
        (r"head", 8),
    ],
)
def test_count_where_some_weights_are_frozen(trained: str, expected: int) -> None:
    model = swapped(GPT(2))
    for name, p in model.named_parameters():
        p.requires_grad_(re.match(trained, name) is not None)
    kernels.reset_calls()
    model(torch.randint(16, (2, TOKENS))).mean().backward()
    assert matmuls() == expected


# -- Lightning and Fabric --------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT(2)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]).flatten(0, 1).float(), batch[0].flatten())

    def test_step(self, batch: Any, index: int) -> Any:
        return {"logits": self.model(batch[0])}

    predict_step = test_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randint(16, (2 * batches, TOKENS), generator=torch.Generator())), 2)


def trainer(**settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **settings})  # type: ignore[arg-type]


def test_a_trainer_that_accumulates_quantises_weights_once_in_a_step() -> None:
    batches, window, layers = 6, 3, 2 * LINEARS
    weights = {}
    for reuse in (True, False):
        module = Module()
        run = trainer(plugins=Int8MixedPrecision(cache_weights=reuse), accumulate_grad_batches=window)
        kernels.reset_calls()
        run.fit(module, data(batches))
        counts = called()
        assert counts["int8_matmul"] == 3 * batches * layers
        first = window if reuse else batches  # passes in which each form of a weight is made where it is used
        assert counts["quantize_rowwise"] == counts["quantize_colwise"] == first * layers
        assert counts["quantize_both"] == (2 * batches + (batches // window - 1) * reuse) * layers
        weights[reuse] = [p.detach() for p in module.parameters()]
        for stage in ("test", "predict"):
            kernels.reset_calls()
            getattr(run, stage)(module, data(batches))
            assert called() == {"int8_matmul": batches * layers, "quantize_rowwise": 2 * batches * layers}
    assert_equal(*weights.values())


def test_overrides_on_the_plugin() -> None:
    plugin = Int8MixedPrecision(overrides={"*.down": {"grad_weight": "high"}, "*.blocks.0.qkv": None})
    module = Module()
    kernels.reset_calls()
    trainer(plugins=pickle.loads(pickle.dumps(plugin))).fit(module, data(2))
    assert matmuls() == 2 * (3 * 2 * LINEARS - 2 - 3)
    assert [type(block.qkv) for block in module.model.blocks] == [nn.Linear, Int8Linear]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"overrides='\*\.mlp' matches no linear layer; there are: model\.blocks"):
        trainer(plugins=Int8MixedPrecision(overrides={"*.mlp": None})).fit(Module(), data(2))


def test_fabric_with_accumulation_equals_a_plain_loop() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=FabricInt8MixedPrecision(autocast="off"))
    results = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model: Any = GPT(1) if wrapped else swapped(GPT(1))
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped:
            model, optimizer = fabric.setup(model, optimizer)
        kernels.reset_calls()
        backward: Callable[[Tensor], None] = fabric.backward if wrapped else Tensor.backward
        for step in range(4):
            backward(model(torch.randint(16, (2, TOKENS), generator=torch.Generator().manual_seed(step))).mean())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert matmuls() == 4 * 3 * LINEARS
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)


def test_plain_layers_come_back_after_training() -> None:
    module = Module()
    before = dict(module.named_parameters())
    trainer(precision="int8-mixed").fit(module, data(2))
    assert len(convert.restore(module)) == 2 * LINEARS
    assert not any(isinstance(m, Int8Linear) for m in module.modules())
    assert all(p is before[name] for name, p in module.named_parameters())
    kernels.reset_calls()
    trainer().fit(module, data(2))
    assert called() == {}


# -- two ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_two_ranks_equal_one_process() -> None:
    """DDP and FSDP2, with accumulation; tests/programs/int8_ranks.py says what is compared and counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ROOT / "tests" / "programs" / "int8_ranks.py"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # a checkout needs no install
    command = [sys.executable, str(program), str(port)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
