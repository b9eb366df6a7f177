"""Models and data of the packaged configs (``lowbit configs list``): small, complete, and without a network.

``text``: bytes of any text. ``gpt`` predicts the next, ``bert`` fills in masked ones, ``qlora`` fine-tunes a GPT
that is frozen in low bits. ``vision``: a transformer on pictures. ``transformer``: the block that they share.
"""

from lowbit_lightning.experiments.bert import BERT
from lowbit_lightning.experiments.gpt import GPT
from lowbit_lightning.experiments.qlora import LoRA, QLoRA
from lowbit_lightning.experiments.text import Text, Windows, read_text
from lowbit_lightning.experiments.transformer import Block, WarmupCosine
from lowbit_lightning.experiments.vision import Digits, ViT

__all__ = ["BERT", "GPT", "Block", "Digits", "LoRA", "QLoRA", "Text", "ViT", "WarmupCosine", "Windows", "read_text"]
