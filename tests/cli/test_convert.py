"""``lowbit convert``: what it makes of checkpoints, and that it spoils nothing."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from support.optimizers import FAMILY
from torch import Tensor, nn

from lowbit_lightning import cli, optim
from lowbit_lightning.convert import to_bitsandbytes
from lowbit_lightning.experiments import QLoRA

DATA = Path(__file__).resolve().parents[1] / "data" / "old_checkpoints"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.tall = nn.Linear(8, 8).requires_grad_(False), nn.Linear(512, 40)
        self.small, self.unused = nn.Linear(40, 3), nn.Linear(2, 2)

    def loss(self) -> Tensor:
        return self.small(self.tall(torch.ones(2, 512))).square().mean()


def trained(kind: Any, steps: int = 3, net: Net | None = None, **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = net or Net()
    optimizer = kind([{"params": list(net.tall.parameters()), "lr": 2e-3}, {"params": list(rest(net))}], **options)
    step(net, optimizer, steps)
    return net, optimizer


def rest(net: Net) -> list[Tensor]:
    return [p for name, p in net.named_parameters() if not name.startswith("tall")]


def step(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()


def saved(path: Path, net: Net, *optimizers: torch.optim.Optimizer, **more: Any) -> Path:
    """As Lightning writes it."""
    content = {"state_dict": net.state_dict(), "optimizer_states": [o.state_dict() for o in optimizers], "epoch": 3}
    torch.save({**content, "pytorch-lightning_version": L.__version__, **more}, path)
    return path


def convert(*arguments: Any) -> int:
    return cli.main(["convert", *map(str, arguments)])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def rest_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != "optimizer_states"}


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, dict(options)) for name, options in FAMILY.items()},
    "momentum": ("SGD", {"momentum": 0.9}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
    "centered": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "small blocks": ("AdamW", {"block_size": 64, "min_size": 100}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_what_the_optimizer_itself_makes_of_them(name: str, tmp_path: Path) -> None:
    kind, options = OPTIMIZERS[name]
    net, optimizer = trained(getattr(optim, kind), **options)
    path, there, back = saved(tmp_path / "last.ckpt", net, optimizer), tmp_path / "last-32bit.ckpt", tmp_path / "b.ckpt"
    assert convert(path, "--bits", 32) == 0
    found, before = torch.load(there), torch.load(path)
    expected = optimizer.state_dict(bits=32)  # type: ignore[call-arg]
    states = found["optimizer_states"][0]["state"]
    assert same(states, {key: expected["state"][key] for key in before["optimizer_states"][0]["state"]})
    assert not any("codes" in entry for entries in states.values() for entry in entries)
    assert same(found["optimizer_states"][0]["param_groups"], expected["param_groups"])
    assert same(rest_of(found), rest_of(before))
    kept = {name: options[name] for name in ("block_size", "min_size") if name in options}
    more = [x for name, value in kept.items() for x in (f"--{name.replace('_', '-')}", value)]
    assert convert(there, "--bits", 8, "-o", back, *more) == 0
    assert same(torch.load(back)["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"])


def test_torchs_own_optimizer_goes_on(tmp_path: Path) -> None:
    net, optimizer = trained(optim.AdamW)
    path = saved(tmp_path / "last.ckpt", net, optimizer)
    with pytest.raises(KeyError):  # which torch notices in its step, and not before
        step(*trained_from(path, torch.optim.AdamW), 1)
    assert convert(path, "--bits", 32) == 0
    theirs, their_optimizer = trained_from(tmp_path / "last-32bit.ckpt", torch.optim.AdamW)
    ours, our_optimizer = trained_from(path, optim.AdamW, bits=32)
    for each in ((theirs, their_optimizer), (ours, our_optimizer)):
        step(*each, 3)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def trained_from(path: Path, kind: Any, **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    checkpoint, (net, optimizer) = torch.load(path), trained(kind, 0, **options)
    net.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    return net, optimizer


def test_torchs_states_become_8_bits_together(tmp_path: Path) -> None:
    """As the low-bit twin takes them in; here of two optimizers in one file."""
    (net, adam), (_, sgd) = trained(torch.optim.Adam), trained(torch.optim.SGD, momentum=0.9)
    path, out = saved(tmp_path / "t.ckpt", net, adam, sgd), tmp_path / "t-8bit.ckpt"
    assert convert(path, "--bits", 8) == 0
    found = torch.load(out)["optimizer_states"]
    twins: list[tuple[Any, dict[str, Any]]] = [(optim.Adam, {}), (optim.SGD, {"momentum": 0.9})]
    for state, (kind, options) in zip(found, twins, strict=True):
        _, twin = trained(kind, 0, **options)
        twin.load_state_dict(torch.load(path)["optimizer_states"][found.index(state)])
        assert same(state["state"], twin.state_dict()["state"])


def test_old_checkpoints_and_folders_become_one_file(tmp_path: Path) -> None:
    single, out = tmp_path / "single.ckpt", tmp_path / "out.ckpt"
    states = [each.get("optimizer", each) for each in torch.load(DATA / "single.pt").values()]
    torch.save({"state_dict": {}, "optimizer_states": states}, single)
    for path in (single, DATA / "sharded"):
        assert convert(path, "--bits", 32, "-o", out, "--trust", "--overwrite") == 0
        found = torch.load(out, weights_only=False)
        entries = [e for state in found["optimizer_states"] for s in state["state"].values() for e in s]
        assert entries
        assert not [e for e in entries if e.endswith(("_codes", "_scales"))]


def test_a_master_copy_stays(tmp_path: Path) -> None:
    net, optimizer = trained(optim.AdamW, net=Net().bfloat16(), master="bf16+8", steps=0)
    for p in net.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    path = saved(tmp_path / "m.ckpt", net, optimizer)
    assert convert(path, "--bits", 32) == 0
    before, after = (torch.load(p)["optimizer_states"][0]["state"][0] for p in (path, tmp_path / "m-32bit.ckpt"))
    assert torch.equal(before["master_remainder"], after["master_remainder"])


# -- errors: one line, and nothing is spoilt ---------------------------------------------------------------------------


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert convert(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, optimizer = trained(optim.AdamW)
    path = saved(tmp_path / "last.ckpt", net, optimizer)
    there = tmp_path / "last-32bit.ckpt"
    there.write_text("mine")
    assert "last-32bit.ckpt exists: give another -o, or --overwrite" in failure(capsys, path, "--bits", 32)
    assert "last.ckpt exists" in failure(capsys, path, "--bits", 32, "-o", path)
    assert there.read_text() == "mine"
    assert convert(path, "--bits", 32, "--overwrite") == 0
    assert torch.load(there)["epoch"] == 3
    assert convert(path, "--bits", 32, "-o", path, "--overwrite") == 0  # which is read while it is replaced
    assert same(torch.load(path), torch.load(there))


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = trained(optim.AdamW)
    path, there = saved(tmp_path / "last.ckpt", net, optimizer), tmp_path / "out.ckpt"
    there.write_text("mine")

    def fails(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    assert "the disk is full" in failure(capsys, path, "--bits", 32, "-o", there, "--overwrite")
    assert there.read_text() == "mine"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["last.ckpt", "out.ckpt"]


def test_errors_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, optimizer = trained(optim.AdamW)
    _, other = trained(torch.optim.NAdam)
    files = {
        "foreign": saved(tmp_path / "foreign.ckpt", net, other),
        "empty": saved(tmp_path / "empty.ckpt", net),
        "objects": saved(tmp_path / "objects.ckpt", net, optimizer, hyper_parameters=argparse.Namespace(lr=1)),
        "text": tmp_path / "text.ckpt",
    }
    files["text"].write_text("no checkpoint")
    for told, says in {
        ("missing.ckpt",): "no checkpoint at .*missing.ckpt",
        (files["text"],): "text.ckpt is not a checkpoint",
        (files["empty"],): "empty.ckpt holds no optimizer states",
        (
            files["foreign"],
        ): r"states \['exp_avg', 'exp_avg_sq', 'mu_product'\] are of no optimizer that lowbit_lightning",
        (files["objects"],): "objects.ckpt holds more than tensors and plain values, .*: --trust loads it",
        (files["objects"], "--min-size", 3): "min_size do nothing without --bits 8",
    }.items():
        assert re.search(says, failure(capsys, *told, "--bits", 32)), told
    assert convert(files["objects"], "--bits", 32, "--trust") == 0
    assert len(list(tmp_path.iterdir())) == 5


# -- other forms -----------------------------------------------------------------------------------------------------


QLORA = """\
model:
  class_path: QLoRA
  init_args: {width: 64, layers: 1, heads: 2}
"""


@pytest.fixture
def low_bit(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint of a model with low-bit weights, in the folder of its run."""
    model = QLoRA(width=64, layers=1, heads=2)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(QLORA)
    path = folder / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "optimizer_states": []}, path)
    return path, model


def test_to_torch_decodes_weights(low_bit: tuple[Path, nn.Module]) -> None:
    path, model = low_bit
    expected = model.blocks[0].qkv.base.dequantize()  # type: ignore[index, union-attr]
    assert convert(path, "--to", "torch") == 0
    found = torch.load(path.with_name("last-torch.ckpt"))["state_dict"]
    assert torch.equal(found["blocks.0.qkv.base.weight"], expected)
    assert not [name for name in found if name.endswith(("weight_scales", "weight_format"))]


def test_to_bitsandbytes(low_bit: tuple[Path, nn.Module]) -> None:
    path, model = low_bit
    assert convert(path, "--to", "bitsandbytes") == 0
    found, expected = load_file(path.with_name("last-bitsandbytes.safetensors")), to_bitsandbytes(model)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in found)


def test_the_model_has_to_be_known(
    low_bit: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = low_bit
    alone = path.rename(tmp_path / "alone.ckpt")
    assert convert(alone, "--to", "bitsandbytes") == 2
    assert "lies in no run folder: --config FILE says which model it is of" in capsys.readouterr().err
    (tmp_path / "wide.yaml").write_text(QLORA.replace("64", "128"))
    assert convert(alone, "--to", "torch", "--config", tmp_path / "wide.yaml") == 2
    assert "is of another model than its config" in capsys.readouterr().err


def test_a_folder_becomes_a_file(tmp_path: Path) -> None:
    output = tmp_path / "one.ckpt"
    assert convert(DATA / "sharded", "--to", "file", "-o", output, "--trust") == 0
    assert torch.load(output, weights_only=False)["optimizer_states"]
