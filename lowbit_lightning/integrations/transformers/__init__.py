"""Low-bit weights in Transformers. Importing this module registers ``LowBitConfig`` with Transformers:

    from lowbit_lightning.integrations.transformers import LowBitConfig

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=LowBitConfig("nf4"))

Weights are quantised one tensor at a time while they are loaded, the experts of mixture-of-experts models too.
``save_pretrained`` writes them in low bits, and ``from_pretrained`` reads that back to the bit, once this module has
been imported. ``load_bitsandbytes`` loads checkpoints of bitsandbytes without it. Where PEFT is installed, its adapters
go on top (``integrations.peft``). ``optimizer`` hands an optimizer of this package to the Trainer.
"""

from lowbit_lightning.integrations.versions import check

check("transformers")
check("accelerate", optional=True)

from lowbit_lightning.integrations.transformers.bitsandbytes import load_bitsandbytes  # noqa: E402
from lowbit_lightning.integrations.transformers.config import LowBitConfig  # noqa: E402
from lowbit_lightning.integrations.transformers.quantizer import LowBitQuantizer, quantize_pretrained  # noqa: E402
from lowbit_lightning.integrations.transformers.trainer import optimizer  # noqa: E402

__all__ = ["LowBitConfig", "LowBitQuantizer", "load_bitsandbytes", "optimizer", "quantize_pretrained"]
