"""The main job, small: what it refuses, what it reads, and that it trains, compares and reports."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import gpt
import pytest
import train_gpt
from gpt_settings import Settings, parse
from omegaconf import OmegaConf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_yaml_file_lists_every_default() -> None:
    written = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "train_gpt.yaml"))
    assert written == dataclasses.asdict(Settings())


def test_full_is_larger_and_known() -> None:
    full, default = parse(["--full"]), Settings()
    assert full.layers >= 12
    assert full.bf16
    assert full.width >= 512
    assert full.out != default.out


def test_command_line_goes_over_config_goes_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("width: 64\nsteps: 20\n")
    settings = parse(["--config", str(config), "--steps", "40", "--learning-rate", "1e-4", "--no-progress"])
    assert (settings.width, settings.steps, settings.learning_rate) == (64, 40, 1e-4)
    assert settings.progress is False
    assert settings.layers == Settings().layers


@pytest.mark.parametrize("name", ["lowbit_sharded", "lowbit_deepspeed_stage_2"])
@pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux")
def test_strategies_leave_the_first_runs_optimizer_alone(name: str) -> None:
    assert train_gpt.strategy_of(Settings(strategy=name)).optimizer_bits is None
    assert train_gpt.strategy_of(Settings(strategy="ddp")) == "ddp"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("widht: 64", "widht"),
        ("width: wide", "wide"),
        ("steps: 250\nvalidate_every: 100", "steps=250"),
        ("width: 30", "width=30"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, line: str, said: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(line)
    with pytest.raises(SystemExit, match=said):
        parse(["--config", str(config)])


def test_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--widht", "64"])
    assert "--widht" in capsys.readouterr().err


def test_absent_config_is_named() -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.yaml"):
        parse(["--config", "nowhere.yaml"])


@pytest.mark.parametrize("content", [b"", b"too short"])
def test_too_little_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"at least 1290"):
        gpt.Text(Settings(text=str(path)))
    with pytest.raises(SystemExit, match="no such file"):
        gpt.Text(Settings(text=str(tmp_path / "absent")))


def result(loss: float, ran: int, predicted: int, int8_layers: int = 8) -> dict[str, object]:
    return {"val_loss": loss, "int8_layers": int8_layers, "int8_matmuls": ran, "int8_matmuls_predicted": predicted}


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (result(2.019, 48, 48), None),
        (result(2.021, 48, 48), "validation loss"),
        (result(1.979, 48, 48), "validation loss"),
        (result(float("nan"), 48, 48), "validation loss"),
        (result(2.0, 47, 48), "47 int8 matmuls"),
        (result(2.0, 0, 0, int8_layers=0), "0 int8 matmuls"),
    ],
)
def test_a_bad_outcome_is_said(low: dict[str, object], said: str | None) -> None:
    found = train_gpt.complaints(result(2.0, 0, 0, 0), low, 0.01)
    assert len(found) == bool(said)
    assert not said or said in found[0]


def test_a_killed_run_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise train_gpt.SIGTERMException

    monkeypatch.setattr(train_gpt, "run", killed)
    text = tmp_path / "text"
    text.write_bytes(b"x" * 2000)
    assert train_gpt.main(["--text", str(text), "--out", str(tmp_path / "out")]) == 143


SMALL = """
    --width 64 --layers 2 --heads 2 --context 32 --batch 4 --steps 20 --warmup 4 --validate-every 10
    --validation-batches 3 --tolerance 0.05 --no-progress
"""


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    status = train_gpt.main([*SMALL.split(), "--bf16", "--text", str(text), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "int8 matmuls predicted" in printed.out

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, half, low = results["runs"]
    assert [run["name"] for run in (plain, half, low)] == ["fp32", "bf16-mixed", "int8-mixed"]
    assert plain["int8_matmuls"] == plain["int8_layers"] == half["int8_matmuls"] == half["int8_layers"] == 0
    assert low["int8_layers"] == 8  # two blocks of four; the head stays in high precision
    assert low["int8_matmuls"] == 3 * 8 * 20 + 8 * 2 * 3
    assert low["train_losses"][0] == pytest.approx(plain["train_losses"][0], rel=2e-3), "another start or other data"
    assert low["val_perplexity"] == pytest.approx(2.718281828 ** low["val_loss"], rel=0.02)
    for run in (plain, half, low):
        assert run["train_losses"][-1] < 0.8 * run["train_losses"][0]
        assert (tmp_path / "out" / run["name"] / "version_0" / "checkpoints" / "last.ckpt").exists()
        assert (tmp_path / "out" / run["name"] / "version_0" / "metrics.csv").exists()
    assert low["parameter_bytes"] == plain["parameter_bytes"]
    assert low["optimizer_state_bytes"] < 0.5 * plain["optimizer_state_bytes"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
