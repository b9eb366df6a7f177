"""A model that was trained in int8 leaves the product: it is saved, scripted, exported and quantised as any model.

What is saved is loaded by a process that can't import ``lowbit_lightning``, and must compute the same.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowbit_lightning
from lowbit_lightning import convert

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.example_input_array = torch.randn(3, 32)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lowbit_lightning.optim.AdamW(self.parameters(), lr=1e-3, min_size=0)


@pytest.fixture(scope="module")
def trained() -> Model:
    model, plugin = Model(), lowbit_lightning.Int8MixedPrecision()
    run = quiet_trainer(plugins=plugin)
    run.fit(model, DataLoader(TensorDataset(torch.randn(64, 32)), 8))
    assert plugin.report is not None
    assert plugin.report.swapped == ("net.0", "net.2")
    return model.eval()


WAYS: dict[str, tuple[Any, str]] = {
    "torch.save": (lambda net, x, file: torch.save(net, file), "torch.load(file, weights_only=False)"),
    "torch.jit.script": (lambda net, x, file: torch.jit.script(net).save(file), "torch.jit.load(file)"),
    "torch.export": (
        lambda net, x, file: torch.export.save(torch.export.export(net, (x,)), file),
        "torch.export.load(file).module()",
    ),
}


def test_a_process_without_the_package_loads_it(tmp_path: Path, trained: Model) -> None:
    x, files = torch.randn(3, 32), {way: str(tmp_path / f"{way}.pt2") for way in WAYS}
    torch.save(x, tmp_path / "x")
    for way, (save, _) in WAYS.items():
        save(trained.net, x, files[way])
    loads = "\n".join(f"file = {files[way]!r}\nfound[{way!r}] = {load}(x)" for way, (_, load) in WAYS.items())
    script = f"""\
import sys
sys.modules["lowbit_lightning"] = None
import torch
x, found = torch.load({str(tmp_path / "x")!r}), {{}}
{loads}
torch.save({{way: y.detach() for way, y in found.items()}}, {str(tmp_path / "y")!r})
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "y")
    assert found.keys() == WAYS.keys()
    for y in found.values():
        torch.testing.assert_close(y, trained(x))


def test_what_onnx_gets_is_of_torchs_own_ops(trained: Model) -> None:
    """Both exporters need packages of their own; up to there torch does the work."""
    exported = torch.export.export(trained.net, (trained.example_input_array,)).run_decompositions()
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls
    assert all(name.startswith("aten.") for name in calls)
    try:
        to: Any = io.BytesIO()
        torch.onnx.export(trained.net, (trained.example_input_array,), to, dynamo=False)
    except torch.onnx.OnnxExporterError as error:  # after the export, when the result would be checked
        assert "onnx is not installed" in str(error)  # noqa: PT017


def test_dynamic_quantization_finds_the_layers(trained: Model) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(trained.net), {nn.Linear})
    assert [type(m).__module__.startswith("torch.ao") for m in quantised if isinstance(m, nn.Module)].count(True) == 3


def test_models_outside_of_a_trainer_are_one_call_away(trained: Model) -> None:
    """``restore``, on a copy where training goes on."""
    model = copy.deepcopy(trained.net)
    convert.swap_linears(model)
    with pytest.raises(Exception):  # noqa: B017, PT011 (torch's own, and not to be relied on)
        torch.jit.script(model)
    plain = copy.deepcopy(model)
    assert convert.restore(plain) == ("0", "2")
    assert torch.equal(torch.jit.script(plain)(trained.example_input_array), trained(trained.example_input_array))
