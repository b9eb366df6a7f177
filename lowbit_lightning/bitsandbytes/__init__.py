"""``import lowbit_lightning.bitsandbytes as bnb``: the names of bitsandbytes that other projects use.

They have bitsandbytes' signatures and, where that is sound, its behaviour, over the kernels, formats and optimizers of
this package; docs/bitsandbytes.md lists what differs and why. Reading a name that is not served raises an
AttributeError that says what to do instead. bitsandbytes itself is never imported.
"""

from lowbit_lightning.bitsandbytes import functional, nn, optim
from lowbit_lightning.bitsandbytes.products import MatmulLtState, matmul, matmul_4bit
from lowbit_lightning.bitsandbytes.refused import refusing

__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "nn", "optim", "supported_torch_devices"]

supported_torch_devices = {"cpu", "cuda"}
features = {"multi_backend"}
"""What Transformers and diffusers look for."""

__getattr__ = refusing(
    __name__,
    {
        **dict.fromkeys(
            ("cextension", "lib", "backends", "cuda_specs", "autograd"),
            "it is the door to bitsandbytes' own C library; there is none here to load",
        ),
        "research": "bitsandbytes has removed it; lowbit_lightning.layers.Int8Linear trains in int8",
        "utils": "it has nothing that other projects use",
        "diagnostics": "kernels are compiled on this machine, on first use, and say so where that fails",
    },
)
