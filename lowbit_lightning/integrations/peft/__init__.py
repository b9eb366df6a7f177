"""Adapters of PEFT on low-bit weights. Importing this module is enough; ``integrations.transformers`` does it.

PEFT asks a list of functions for the LoRA layer that fits a module. Without this module a low-bit layer gets the one of
``nn.Linear``, which trains but fails on the shape of the packed weight when it is merged. Here a low-bit layer gets
``LoraLinear``, ``LoraEmbedding`` or ``LoraExperts``, also when an adapter is loaded from a folder:

- **Training** is as on a plain layer. Adapters are float32, the base layer computes in the dtype of its input.
- **Merging** gives a plain layer: the decoded weight plus the adapter, in float32, rounded once to the dtype that the
  weight had. Unmerging puts the low-bit layer back, to the bit.
- **DoRA** takes its norms from the decoded weight.

``merge_and_unload`` merges to another dtype, or back to low bits.
"""

from lowbit_lightning.integrations.versions import check

check("peft")

from lowbit_lightning.integrations.peft.experts import LoraExperts  # noqa: E402
from lowbit_lightning.integrations.peft.layers import LoraEmbedding, LoraLinear  # noqa: E402
from lowbit_lightning.integrations.peft.merging import merge_and_unload  # noqa: E402
from lowbit_lightning.integrations.peft.registration import register  # noqa: E402

__all__ = ["LoraEmbedding", "LoraExperts", "LoraLinear", "merge_and_unload"]

register()
