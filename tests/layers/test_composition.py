"""Int8 layers in what wraps, compiles, shards and trains them: equal numbers, and the predicted count of products."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.int8_models import (
    GPT,
    IDS,
    LINEARS,
    OPTIONS,
    TOKENS,
    WIDTH,
    Block,
    assert_equal,
    called,
    gradients,
    matmuls,
    products,
    swapped,
)
from support.quiet import quiet_trainer
from support.run_program import run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers import Int8Linear
from lowbit_lightning.layers.int8 import FEWEST_ROWS
from lowbit_lightning.precision import FabricInt8MixedPrecision, Int8MixedPrecision

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


def test_what_a_trainer_quantises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a weight outlives a pass, whatever a step accumulates."""
    monkeypatch.setitem(FEWEST_ROWS, "cpu", (1, 1, 1))
    batches, layers, module = 6, 2 * LINEARS, Module()
    run = quiet_trainer(precision="int8-mixed", accumulate_grad_batches=3)
    kernels.reset_calls()
    run.fit(module, data(batches))
    passes = batches * layers
    once = {"quantize_rowwise": passes, "quantize_colwise": passes}
    assert called() == {"int8_matmul": 3 * passes, "quantize_both": 2 * passes, **once}
    for stage in ("test", "predict"):
        kernels.reset_calls()
        getattr(run, stage)(module, data(batches))
        assert called() == {"int8_matmul": passes, "quantize_rowwise": 2 * passes}


@pytest.mark.usefixtures("stays_in_int8")
def test_overrides_on_the_plugin() -> None:
    plugin = Int8MixedPrecision(overrides={"*.down": {"grad_weight": "high"}, "*.blocks.0.qkv": None})
    module = Module()
    kernels.reset_calls()
    quiet_trainer(plugins=pickle.loads(pickle.dumps(plugin))).fit(module, data(2))
    assert matmuls() == 2 * (3 * 2 * LINEARS - 2 - 3)
    assert [type(block.qkv) for block in module.model.blocks] == [nn.Linear, Int8Linear]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"overrides='\*\.mlp' matches no layer; there are: model\.blocks"):
        quiet_trainer(plugins=Int8MixedPrecision(overrides={"*.mlp": None})).fit(Module(), data(2))


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
    quiet_trainer(precision="int8-mixed").fit(module, data(2))
    assert not any(isinstance(m, Int8Linear) for m in module.modules())
    assert convert.restore(module) == ()
    assert all(p is before[name] for name, p in module.named_parameters())
    kernels.reset_calls()
    quiet_trainer().fit(module, data(2))
    assert called() == {}


# -- two ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """DDP and FSDP2, with accumulation; tests/programs/int8_ranks.py says what is compared and counted."""
    run("int8_ranks.py", tmp_path)
