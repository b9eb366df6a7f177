"""The order of the layers, the public names, and what importing the package may not do."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit_lightning.kernels import backend

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lowbit_lightning"

# Unit -> layer. A unit is a module or folder of the package; the parts of kernels/ and state/ are units of their own,
# because an order holds inside them too. A unit may import what lies in a lower layer, and inside its own layer only
# what SAME_LAYER names.
LAYERS = {
    "kernels.formats": 0,
    "kernels.rules": 0,
    "kernels.arguments": 0,
    "kernels.groups": 0,
    "kernels.compile": 0,
    "kernels.reference": 0,
    "kernels.sources": 0,
    "kernels.structs": 0,
    "kernels.cpu": 0,
    "kernels.cuda": 0,
    "kernels": 0,
    "state.bitsandbytes": 1,
    "state.blocks": 1,
    "state.form": 1,
    "state.pagers": 1,
    "state.pages": 1,
    "state.saved": 1,
    "state.shards": 1,
    "state.store": 1,
    "state": 1,
    "optim": 2,
    "layers": 2,
    "sharding": 2,
    "convert": 3,
    "memory": 3,
    "precision": 4,
    "strategies": 4,
    "callbacks": 4,
    "bitsandbytes": 5,
    "experiments": 4,
    "cli": 5,
    "integrations": 5,
    "": 5,
}
# What every backend may use; they share nothing else, so that any of them can be read, or left out, alone.
BACKEND_BASE = {
    *("kernels.arguments", "kernels.compile", "kernels.formats", "kernels.groups", "kernels.rules", "kernels.sources"),
    "kernels.structs",
}
SAME_LAYER = {
    "kernels.arguments": {"kernels.formats", "kernels.rules"},
    "kernels.groups": {"kernels.arguments"},
    "kernels.reference": BACKEND_BASE - {"kernels.compile", "kernels.sources", "kernels.structs"},
    "kernels.sources": BACKEND_BASE - {"kernels.sources"},
    "kernels.structs": {"kernels.arguments", "kernels.formats"},
    "kernels.cpu": BACKEND_BASE | {"kernels.reference"},
    "kernels.cuda": BACKEND_BASE,
    "kernels": BACKEND_BASE,  # it loads the backends by name, when they are first needed
    "state.bitsandbytes": {"state.form"},
    "state.blocks": {"state.form"},
    "state.form": {"state.pages"},
    "state.pages": {"state.shards"},
    "state.pagers": {"state.form", "state.pages", "state.shards"},
    "state.saved": {"state.bitsandbytes", "state.blocks", "state.form", "state.shards"},
    "state.store": {"state.blocks", "state.form", "state.pagers", "state.pages", "state.shards"},
    "memory": {"convert"},
}
LIGHTNING_FROM = 4  # below this layer nothing knows of Lightning

# Module -> its public names, in ruff's order. Add to them; renaming one breaks somebody.
PUBLIC = {
    "": (
        "Int8MixedPrecision LowBitWeights callbacks convert dequantize kernels layers load_quantized memory optim "
        "precision quantize strategies"
    ),
    "callbacks": "DeterministicResume LowBitMonitor RunReport",
    "convert": (
        "MIN_FEATURES NothingToQuantize NothingToSwap Report WeightReport dequantize empty_parameters load_quantized "
        "quantize restore swap_linears to_bitsandbytes weight_report"
    ),
    "kernels": (
        "StepArguments StepScalars calls dequantize_blockwise hadamard int8_conv int8_conv_input int8_conv_weight "
        "int8_grouped_matmul int8_grouped_outer int8_matmul int8_outlier_matmul lowbit_dequantize lowbit_embedding "
        "lowbit_grouped_matmul lowbit_matmul lowbit_quantize optimizer_norms optimizer_step quantize_blockwise "
        "quantize_both quantize_channels quantize_colwise quantize_group_columns quantize_groups "
        "quantize_image quantize_rowwise reset_calls use_backend"
    ),
    "experiments": "BERT GPT Block Digits LoRA QLoRA Text ViT WarmupCosine Windows read_text",
    "layers": (
        "Embedding4bit Embedding8bit Embedding32bit Experts Int8Conv1d Int8Conv2d Int8Conv3d Int8Experts "
        "Int8ExpertsForm Int8Layer Int8Linear Int8MultiheadAttention "
        "Linear2bit Linear3bit Linear4bit Linear8bit LowBitEmbedding "
        "LowBitLinear Products StableEmbedding Weights"
    ),
    "memory": "Advice Plan Run plan",
    "optim": (
        "LAMB LARS SGD AdEMAMix Adagrad Adam AdamW Lion LowBitOptimizer Options RMSprop convert_ group_parameters "
        "release_gradients"
    ),
    "precision": "FabricInt8MixedPrecision Int8MixedPrecision LowBitWeights PrecisionNotApplied register",
    "strategies": "AtomicCheckpointIO DeepSpeedStrategy ShardedStrategy check_deepspeed consolidate register",
}


def unit_of(module: str) -> str:
    """'kernels.cuda.launch' -> 'kernels.cuda'; 'optim.base' -> 'optim'; '' -> ''."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in LAYERS:
            return ".".join(parts[:length])
    return module


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import statement in the file, those inside functions included."""
    package = ["lowbit_lightning", *module.split(".")] if module else ["lowbit_lightning"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{prefix}.{alias.name}"
                yield node.lineno, target if is_module(target) else prefix


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_module_has_a_layer() -> None:
    unknown = [module for module, _ in modules() if unit_of(module) not in LAYERS]
    assert not unknown, f"not in the table of layers: {unknown}"


def test_imports_go_down_only() -> None:
    wrong = []
    for module, path in modules():
        importer = unit_of(module)
        for line, target in imports(module, path):
            where = f"{path.relative_to(ROOT)}:{line}"
            top = target.split(".")[0]
            if top in ("lightning", "pytorch_lightning", "torchmetrics") and LAYERS[importer] < LIGHTNING_FROM:
                wrong.append(f"{where}: layer {LAYERS[importer]} knows nothing of {top}")
            if top != "lowbit_lightning":
                continue
            imported = unit_of(target.removeprefix("lowbit_lightning").lstrip("."))
            if imported == importer or LAYERS[imported] < LAYERS[importer]:
                continue
            if imported not in SAME_LAYER.get(importer, set()) and importer != "":
                wrong.append(f"{where}: {importer} (layer {LAYERS[importer]}) imports {imported or 'the root'}")
    assert not wrong, "\n".join(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The first circle that there is, as a path that ends where it begins."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                found = search(target, [*path, node])
                if found:
                    return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and under TYPE_CHECKING included."""
    graph = {
        module: {
            target.removeprefix("lowbit_lightning").lstrip(".")
            for _, target in imports(module, path)
            if target.split(".")[0] == "lowbit_lightning"
        }
        for module, path in modules()
    }
    assert not circle(graph), " -> ".join(circle(graph))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}}) == ["b", "c", "b"]


def test_the_order_test_sees_relative_and_local_imports(tmp_path: Path) -> None:
    source = tmp_path / "formats.py"
    source.write_text(
        "def f():\n    from ..optim import Adam\n    import lowbit_lightning.layers\n    from . import cpu\n"
    )
    found = {target for _, target in imports("kernels.formats", source)}
    assert {"lowbit_lightning.optim", "lowbit_lightning.layers"} <= found
    assert any(target.startswith("lowbit_lightning.kernels") for target in found)


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_backends_keep_the_contract(name: str) -> None:
    """A file for each class of ``kernels/backend.py``, with its functions and their signatures."""
    assert callable(importlib.import_module(f"lowbit_lightning.kernels.{name}").load)
    for file, contract in backend.FILES.items():
        module = importlib.import_module(f"lowbit_lightning.kernels.{name}.{file}")
        for op in (op for op, where in backend.OPS.items() if where == file):
            wanted, found = inspect.signature(getattr(contract, op)), inspect.signature(getattr(module, op))
            assert [*found.parameters.values()] == [*wanted.parameters.values()][1:], f"{name}.{file}.{op}"
            assert found.return_annotation == wanted.return_annotation, f"{name}.{file}.{op}"


def test_ops_are_declared_by_one_function() -> None:
    doors = [path.name for module, path in modules() if "torch.library" in path.read_text()]
    assert doors == ["dispatch.py"], "kernels.dispatch.declare gives an op its schema, fake, autograd and count"


def test_every_op_of_a_backend_is_declared_and_has_a_reference() -> None:
    assert {"reference", "cpu", "cuda"} <= set(backend.BACKENDS)
    assert set(backend.OPS) <= set(dir(torch.ops.lowbit_lightning))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_pinned(name: str) -> None:
    module = importlib.import_module(f"lowbit_lightning{name and '.'}{name}")
    names = PUBLIC[name].split()
    assert sorted(module.__all__) == sorted(names)
    missing = [public for public in names if not hasattr(module, public)]
    assert not missing


def test_only_users_import_the_integrations() -> None:
    """They import Transformers and PEFT at once, so nothing else in the package may import them."""
    importers = {
        module
        for module, path in modules()
        for _, target in imports(module, path)
        if target.startswith("lowbit_lightning.integrations") and unit_of(module) != "integrations"
    }
    assert not importers


def test_importing_starts_nothing() -> None:
    """No compiler, no subprocess, no GPU, and none of the heavy optional packages before they are used."""
    script = """
        import os, sys
        from time import process_time
        import torch
        start = process_time()
        import lightning, torchmetrics
        if os.fork() == 0:  # what only examples or a GPU need is not asked for
            refused = "omegaconf cuda cuda.core cuda.bindings deepspeed jsonargparse bitsandbytes"
            sys.modules.update(dict.fromkeys(refused.split()))  # importing one of them raises ImportError
            import lowbit_lightning
            import lowbit_lightning.bitsandbytes
            os._exit(0)
        assert os.wait()[1] == 0
        theirs = process_time() - start
        before = set(sys.modules)
        started = []
        processes = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
        sys.addaudithook(lambda event, args: started.append((event, args[:1])) if event in processes else None)
        start = process_time()
        import lowbit_lightning
        from lowbit_lightning import kernels, optim
        ours = process_time() - start
        new = set(sys.modules) - before
        heavy = ("deepspeed", "cuda.core", "cuda.bindings", "jsonargparse", "bitsandbytes", "torchao", "triton")
        heavy += ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing", "torch.utils.tensorboard", "sympy")
        heavy += ("matplotlib", "tensorboard", "omegaconf", "transformers", "peft", "pandas", "sklearn", "hypothesis")
        heavy += ("lowbit_lightning.bitsandbytes",)
        found = sorted(m for m in new if m in heavy or m.startswith(tuple(h + "." for h in heavy)))
        assert not found, f"imported: {found}"
        assert not started, f"started: {started}"
        assert ours < theirs / 4, f"{ours:.2f} s of CPU; Lightning takes {theirs:.2f}"
        assert not torch.cuda.is_initialized()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_line_is_longer_than_120_columns() -> None:
    suffixes = {".py", ".h", ".cpp", ".cu", ".inc", ".toml", ".yaml", ".yml", ".txt"}
    folders = [ROOT / name for name in ("lowbit_lightning", "lowbit_command", "tests", "examples", "benchmarks")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes]
    files += [p for p in ROOT.iterdir() if p.suffix in suffixes or p.name == "Makefile"]
    assert len(files) > 10
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long, f"longer than 120 columns: {long}"


def test_kernels_and_states_name_the_dtype_of_what_they_allocate() -> None:
    """The default dtype is the user's: Lightning sets it to bfloat16 in a step of bf16-true."""
    makers = {"empty", "zeros", "ones", "full", "linspace", "rand", "randn"}
    unnamed = [
        f"{module}:{node.lineno}"
        for module, path in modules()
        if module.startswith(("kernels", "state", "optim"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in makers}
        if "dtype" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not unnamed, f"no dtype: {unnamed}"


def test_version_is_said_once() -> None:
    from importlib.metadata import PackageNotFoundError, version

    package = importlib.import_module("lowbit_lightning")
    declared = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version =")
    )
    assert package.__version__ == declared
    try:
        installed = version("lowbit-lightning")
    except PackageNotFoundError:  # run from a checkout with PYTHONPATH=.
        return
    assert installed == declared
