"""Configs: what interpolation and overrides do, and what is said of mistakes before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.configs import CONFIG, write

from lowbit_lightning import cli
from lowbit_lightning.cli.check import checked
from lowbit_lightning.cli.config import ConfigError, load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def values(*overrides: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    files = [Path("small.yaml")]
    for i, text in enumerate(more):
        files.append(write(Path(), text, f"more{i}.yaml"))
    return checked(load(files, overrides))


def at(found: Any, key: str) -> Any:
    for step in key.split("."):
        found = found[int(step) if isinstance(found, list) else step]
    return found


DATA, MODEL = "data.init_args", "model.init_args"
MATRIX: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, Any]] = {
    "across keys": ((), (), f"{DATA}.batches", 4),
    "an override of the source is followed": (("trainer.max_steps=9",), (), f"{DATA}.batches", 9),
    "a variable": ((), (), f"{MODEL}.width", 32),
    "an override of a variable": (("vars.width=64",), (), f"{MODEL}.width", 64),
    "a second file sets the source": ((), ("trainer: {max_steps: 7}",), f"{DATA}.batches", 7),
    "a second file refers to the first": ((), ("data: {init_args: {batch: '${vars.width}'}}",), f"{DATA}.batch", 32),
    "both, then an override": (("vars.width=8",), ("data: {init_args: {batch: '${vars.width}'}}",), f"{DATA}.batch", 8),
    "the first refers to the second": ((), ("vars: {width: 24}",), f"{MODEL}.width", 24),
    "relative": (("data.batch=${.context}",), (), f"{DATA}.batch", 16),
    "absolute, typed": (("data.batch=${vars.width}",), (), f"{DATA}.batch", 32),
    "inside a string": (("data.text=${name}-${vars.width}.txt",), (), f"{DATA}.text", "small-32.txt"),
    "the environment (text; the parser makes a number of it)": (
        ("optimizer.lr=${oc.env:LR_OF_THE_TEST,0.25}",),
        (),
        "optimizer.init_args.lr",
        "0.25",
    ),
    "a chain": (("data.batch=${model.init_args.width}", "vars.width=12"), (), f"{DATA}.batch", 12),
    "an exponent is a number": ((), (), "optimizer.init_args.lr", 3e-4),
    "an exponent, typed": (("optimizer.lr=1e-2",), (), "optimizer.init_args.lr", 1e-2),
    "init_args may be typed": (("optimizer.init_args.lr=0.5",), (), "optimizer.init_args.lr", 0.5),
    "a list": (("optimizer.betas=[0.8,0.9]",), (), "optimizer.init_args.betas", [0.8, 0.9]),
    "an item of a list": (
        ("trainer.callbacks.0.every_n_steps=3",),
        (),
        "trainer.callbacks.0.init_args.every_n_steps",
        3,
    ),
    "a list grows": (
        ("trainer.callbacks+=DeterministicResume",),
        (),
        "trainer.callbacks.1.class_path",
        "lowbit_lightning.callbacks.resume.DeterministicResume",
    ),
    "ours before torch's": ((), (), "optimizer.class_path", "lowbit_lightning.optim.family.AdamW"),
    "torch's by its path": (
        ("optimizer=torch.optim.AdamW", "optimizer.lr=0.1"),
        (),
        "optimizer.class_path",
        "torch.optim.adamw.AdamW",
    ),
    "another class keeps what fits it": (("optimizer=Lion",), (), "optimizer.init_args", {"lr": 3e-4, "min_size": 0}),
    "a strategy": (("trainer.strategy=lowbit_sharded",), (), "trainer.strategy", "lowbit_sharded"),
    "a strategy with options": (
        ("trainer.strategy={class_path: lowbit_sharded, init_args: {replicas: 2}}",),
        (),
        "trainer.strategy.init_args",
        {"replicas": 2},
    ),
    "a strategy's option alone": (
        ("trainer.strategy=lowbit_sharded_paged", "trainer.strategy.replicas=2"),
        (),
        "trainer.strategy.init_args",
        {"paged": True, "replicas": 2},
    ),
    "a plugin": (
        ("trainer.precision=null", "trainer.plugins=Int8MixedPrecision"),
        (),
        "trainer.plugins.0.class_path",
        "lowbit_lightning.precision.int8.Int8MixedPrecision",
    ),
    "null": (("lr_scheduler=null",), (), "lr_scheduler", None),
}


@pytest.mark.parametrize("case", MATRIX)
def test_interpolation_and_overrides(case: str, folder: Path) -> None:
    overrides, more, key, expected = MATRIX[case]
    assert at(values(*overrides, more=more), key) == expected


def test_a_section_in_a_file_of_its_own(folder: Path) -> None:
    write(folder, "class_path: GPT\ninit_args: {width: '${vars.width}', heads: 4}\n", "model.yaml")
    found = values(more=("model: model.yaml",))
    assert at(found, MODEL) == {"width": 32, "layers": 1, "heads": 4}


def test_arguments_of_another_class_are_left_out_aloud(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values("optimizer.betas=[0.8, 0.9]", "optimizer=torch.optim.AdamW", more=("optimizer: SGD",))
    assert found["optimizer"]["init_args"]["lr"] == 3e-4
    assert values("optimizer=torch.optim.SGD")["optimizer"]["init_args"] == {"lr": 3e-4}
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "optimizer.init_args.min_size (small.yaml line 27): left out; SGD takes none"


def wrong(*overrides: str, text: str = CONFIG, more: tuple[str, ...] = ()) -> str:
    write(Path(), text)
    with pytest.raises(ConfigError) as caught:
        values(*overrides, more=more)
    said = str(caught.value)
    assert "\n" not in said
    return said


def changed(old: str, new: str) -> str:
    assert old in CONFIG
    return CONFIG.replace(old, new, 1)


def test_a_typo_in_a_key(folder: Path) -> None:
    assert wrong(text=changed("trainer:", "trainr:")).startswith(
        "trainr (small.yaml line 4): unknown key; did you mean trainer? Allowed: data, lr_scheduler, model, name, "
    )
    said = "trainer.max_step (small.yaml line 7): the Trainer has no 'max_step'; did you mean max_steps?"
    assert wrong(text=changed("max_steps: 4", "max_step: 4").replace("${trainer.max_steps}", "3")) == said
    assert wrong("vars.wdth=3") == "'vars.wdth=3': no file has vars.wdth; did you mean vars.width?"
    said = "data.lr (small.yaml line 19): stands beside class_path, where only init_args may; put lr under it"
    assert wrong(text=changed("class_path: Text", "class_path: Text\n  lr: 3")) == said


def test_a_typo_in_a_class(folder: Path) -> None:
    said = wrong(text=changed("class_path: GPT", "class_path: GPTT"))
    assert said.startswith("model (small.yaml line 14): no model 'GPTT'; did you mean GPT? Short names: ")
    assert wrong("trainer.callbacks.0=LowBitMonitr").startswith(
        "trainer.callbacks.0 (command line): no callback 'LowBitMonitr'; did you mean LowBitMonitor? Short names: "
    )
    said = "model (command line): lowbit_lightning.experiments has no 'GTP'; did you mean GPT?"
    assert wrong("model=lowbit_lightning.experiments.GTP") == said
    assert wrong("model=my_modle.Net") == (
        "model (command line): no module 'my_modle'; run this in the folder that holds it, or install it"
    )
    assert wrong("model=torch.nn.Linear") == "model (command line): torch.nn.Linear is not a LightningModule"


def test_a_typo_in_an_argument(folder: Path) -> None:
    said = "model.init_args.widht (command line): GPT has no argument 'widht'; did you mean width?"
    assert wrong("model.widht=3") == said
    said = "optimizer.init_args.min_sise (small.yaml line 27): AdamW has no argument 'min_sise'; did you mean min_size?"
    assert wrong(text=changed("min_size", "min_sise")) == said
    assert wrong("trainer.strategy={class_path: lowbit_sharded, init_args: {pagd: true}}") == (
        "trainer.strategy.init_args.pagd (command line): ShardedStrategy has no argument 'pagd'; did you mean paged?"
    )


def test_a_wrong_type(folder: Path) -> None:
    assert wrong("trainer.max_steps=many") == "trainer.max_steps (command line): expected int, got 'many'"
    said = "model.init_args.heads (small.yaml line 16): expected int, got 'two'"
    assert wrong(text=changed("heads: 2", "heads: two")) == said
    assert wrong("optimizer.lr=fast") == "optimizer.init_args.lr (command line): expected float or Tensor, got 'fast'"
    assert wrong("optimizer.betas=[1]") == (
        "optimizer.init_args.betas (command line): expected tuple with 2 elements, got [1]"
    )
    assert wrong("lr_scheduler={class_path: WarmupCosine}", "lr_scheduler.steps=???").startswith(
        "lr_scheduler.init_args.steps (command line): ??? stands for a value that must be given"
    )


def test_a_missing_interpolation(folder: Path) -> None:
    said = "model.init_args.width (small.yaml line 16): ${vars.widht} refers to no key; did you mean vars.width?"
    assert wrong(text=changed("${vars.width}", "${vars.widht}")) == said
    assert wrong("data.text=${oc.env:NOT_SET_AT_ALL}") == (
        "data.init_args.text (command line): the environment variable NOT_SET_AT_ALL is not set; "
        "${oc.env:NOT_SET_AT_ALL,DEFAULT} has a default"
    )


def test_unknown_names(folder: Path) -> None:
    said = wrong("trainer.strategy=lowbit_shard")
    assert said.startswith("trainer.strategy (command line): unknown strategy 'lowbit_shard'; did you mean lowbit_")
    assert ", lowbit_sharded, " in said
    said = wrong(text=changed("int8-mixed", "int8-mixd"))
    assert said.startswith("trainer.precision (small.yaml line 5): unknown precision 'int8-mixd'; did you mean int8-")
    assert wrong("optimizer=AdamWW").startswith(
        "optimizer (command line): no optimizer 'AdamWW'; did you mean AdamW? Short names: ASGD, AdEMAMix, "
    )
    assert wrong("trainer.accelerator=gpuu").startswith("trainer.accelerator (command line): unknown accelerator")
    assert wrong("lr_scheduler=null", "optimizer=null").startswith(
        "optimizer: none is given, and GPT configures none: optimizer: AdamW, or any of "
    )


def test_two_files_in_conflict(folder: Path) -> None:
    said = "trainer (small.yaml line 4) is a mapping, and 5 in more0.yaml line 1: these do not merge"
    assert wrong(more=("trainer: 5",)) == said
    assert wrong(more=("optimizer: {class_path: SGD, init_args: {betas: [0.1, 0.2]}}",)).startswith(
        "optimizer.init_args.betas (more0.yaml line 1): SGD has no argument 'betas'; "
    )


def test_yaml_that_is_none(folder: Path) -> None:
    said = wrong(text=changed("heads: 2}", "heads: 2"))
    assert said.startswith("small.yaml line 17, column 5: not YAML: ")
    assert wrong(text="just words") == "small.yaml line 1: a config is keys with values, such as name: gpt"
    assert wrong("trainer.max_steps=[1").startswith("'trainer.max_steps=[1': the value is not YAML: ")
    assert wrong("trainer").startswith("'trainer' is no override: write key=value, such as ")


def test_the_program_says_it_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "small.yaml", "model.widht=3"]) == 2
    assert cli.main(["fit", "--config", "nowhere.yaml"]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fit", "--trainer.max_steps=3"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "lowbit fit: model.init_args.widht (command line): GPT has no argument 'widht'; did you mean width?",
        "lowbit fit: --config nowhere.yaml: No such file or directory; lowbit configs copy nowhere.yaml may be meant",
        "lowbit fit: --trainer.max_steps=3 is no option: settings of the config have no dashes: trainer.max_steps=3",
    ]
    assert not Path("runs").exists()
