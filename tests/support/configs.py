"""A small complete config for tests of the command line."""

from __future__ import annotations

from pathlib import Path

CONFIG = """\
name: small
seed_everything: 1
vars: {context: 16, width: 32}
trainer:
  precision: int8-mixed
  accelerator: cpu
  max_steps: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: LowBitMonitor
      init_args: {every_n_steps: 10, picture: false}
model:
  class_path: GPT
  init_args: {width: "${vars.width}", layers: 1, heads: 2}
data:
  class_path: Text
  init_args:
    text: words.txt
    context: ${vars.context}
    batches: ${trainer.max_steps}
    validation_batches: 1
    batch: 2
optimizer:
  class_path: AdamW
  init_args: {lr: 3e-4, min_size: 0}
lr_scheduler:
  class_path: WarmupCosine
  init_args: {steps: "${trainer.max_steps}"}
"""


def write(folder: Path, text: str = CONFIG, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    (folder / "words.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 20)
    return path
