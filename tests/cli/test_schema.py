"""``lowbit schema``: what an editor is told of configs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from lowbit_command.configs import NAMES, path_of
from lowbit_lightning import cli


@pytest.fixture(scope="module")
def found() -> Any:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["schema"]) == 0
    return json.loads(printed.getvalue())


def node(schema: Any, name: str) -> Any:
    """The arguments of a class."""
    (mapping,) = (one for one in schema["anyOf"] if one.get("type") == "object")
    (case,) = (c for c in mapping["allOf"] if c["if"]["properties"]["class_path"]["const"] == name)
    return case["then"]["properties"]["init_args"]


def test_it_knows_names_types_and_arguments(found: Any) -> None:
    top = found["properties"]
    assert {"name", "vars", "trainer", "model", "data", "optimizer", "lr_scheduler", "parameter_groups"} <= set(top)
    trainer = top["trainer"]["anyOf"][0]["properties"]
    assert "int8-mixed" in trainer["precision"]["anyOf"][0]["enum"]
    assert "lowbit_sharded" in trainer["strategy"]["anyOf"][0]["enum"]
    assert trainer["max_steps"]["anyOf"][0] == {"type": "integer"}
    assert node(top["model"], "GPT")["properties"]["width"]["anyOf"][0] == {"type": "integer"}
    assert not node(top["model"], "GPT")["additionalProperties"]
    assert {"lr", "betas", "bits", "paged"} <= set(node(top["optimizer"], "AdamW")["properties"])
    assert "params" not in node(top["optimizer"], "AdamW")["properties"]
    assert "every_n_steps" in node(trainer["callbacks"]["anyOf"][1]["items"], "LowBitMonitor")["properties"]


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configs_fit_it(name: str, found: Any) -> None:
    """Their keys, by hand: no validator is needed for that."""
    config, top = yaml.safe_load(path_of(name).read_text()), found["properties"]
    assert set(config) <= set(top)
    assert set(config["trainer"]) <= set(top["trainer"]["anyOf"][0]["properties"])
    for key in ("model", "data", "optimizer", "lr_scheduler"):
        assert set(config[key]["init_args"]) <= set(node(top[key], config[key]["class_path"])["properties"])
