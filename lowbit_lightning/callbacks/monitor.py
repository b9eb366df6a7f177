"""``LowBitMonitor``: measures the error of rounding to 8 bits in each layer from time to time, and guards against
outliers.

How it works
    Every ``every_n_steps`` optimizer steps, for that one step (all its accumulated batches), each int8 layer gets
    hooks that quantise the operands of its products once more and compare. On all other steps nothing is installed
    and nothing runs. The hooks draw no random numbers and change nothing: the losses of a run are bit-identical with
    and without the callback. ``quantization`` defines the measures and gives the reasons.

    Logged, to every logger of the Trainer and to ``trainer.callback_metrics`` (so that EarlyStopping and
    ModelCheckpoint can watch them), for each product (forward, grad_input, grad_weight)::

        int8/forward/snr_min, snr_median              dB, over the layers
        int8/forward/saturation_max, underflow_max,   shares, of the worst layer
        int8/forward/nonfinite_max, overflow_max
        int8/forward/snr/NAME                         with per_layer=True
        int8/optimizer/STATE/zero, smallest, largest  how 8-bit optimizer states use their codes
        pages/resident_share, bytes_in, bytes_out,    of paged optimizer states, on this rank: means over the
        pages/stalls, stall_seconds, overlap          steps so far (``PageStatistics``)

Interactions
    - Gradient accumulation and ranks: means over both (the largest, for overflow); all ranks see equal values.
    - ``kernels.calls()`` counts the quantisers that a sample runs; int8 products are not touched.
    - Layers that ``swap="faster"`` returns to high precision after the first step are not measured again.
    - Activation checkpointing: a layer's input is measured twice, with the same result.
    - Checkpoints hold which products have fallen back. The picture does not show measurements from before a resume.

Limitations
    - Hooks do not run inside ``torch.compile``: a warning names the layers inside it, and they are not measured.
      The first sample may cost one more compilation.
    - A sampled step takes about three times as long on the CPU, and memory for a few million elements in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lowbit_lightning.callbacks import paging
from lowbit_lightning.callbacks import picture as pictures
from lowbit_lightning.callbacks.quantization import PRODUCTS, SHARES, QuantizationError, StateCodes
from lowbit_lightning.callbacks.sample import Sample
from lowbit_lightning.layers import Int8Layer
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import codes_name, is_coded

VERSION = 1


class LowBitMonitor(Callback):
    """Measures the error of int8 products and the use of 8-bit optimizer states, logs it, and guards against outliers.

    Args:
        every_n_steps: optimizer steps from one sample to the next; the first step is sampled.
        minimum_snr: products below this signal-to-noise ratio, in dB, are reported by name (normally distributed
            data has 35 to 40; at 20 the noise is a tenth of the signal). None: no guard.
        patience: how many samples in a row a product must be below it.
        fallback: True changes such a product from the next step on, permanently; checkpoints keep this. At first its
            operands are rotated (``Products``, "hadamard"); if it stays below, for as many samples again, it runs in
            high precision.
        per_layer: log the ratio of every layer too.
        picture: write ``int8_snr.png`` to the logger's folder (``default_root_dir`` without one) when training ends.
            None: if matplotlib is installed.

    ``metrics``: the last sample, by the names it was logged under. ``rotated``: layer -> its products that are
    rotated now; ``fallen_back``: those that run in high precision. ``str(monitor)``: a few lines about the last sample.

    Raises:
        ValueError: for a number out of range. ModuleNotFoundError: ``picture=True`` without matplotlib.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        minimum_snr: float | None = 20.0,
        patience: int = 2,
        fallback: bool = False,
        per_layer: bool = False,
        picture: bool | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if fallback and minimum_snr is None:
            raise ValueError("fallback=True needs minimum_snr, the ratio in dB below which a product falls back")
        if picture is None:
            picture = pictures.is_possible()
            if not picture:
                rank_zero_info(f"LowBitMonitor draws no picture: {pictures.MISSING}, or say picture=False")
        elif picture and not pictures.is_possible():
            raise ModuleNotFoundError(f"LowBitMonitor(picture=True): {pictures.MISSING}, or say picture=False")
        self.every_n_steps, self.minimum_snr, self.patience = every_n_steps, minimum_snr, patience
        self.fallback, self.per_layer, self.picture = fallback, per_layer, picture
        self.metrics: dict[str, Tensor] = {}
        self.fallen_back: dict[str, list[str]] = {}
        self.rotated: dict[str, list[str]] = {}
        self._below: dict[str, dict[str, int]] = {}  # layer -> product -> samples in a row
        self._history: list[tuple[int, np.ndarray]] = []
        self._layers: dict[str, Int8Layer] = {}
        self._sample: Sample | None = None
        self._next = self._sampled_step = 0
        self._unseen_reported = False
        self._folder: str | None = None

    # -- the run -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, Int8Layer)}
        if not self._layers:
            rank_zero_warn(
                "LowBitMonitor finds no int8 layer in the model: precision='int8-mixed' is not set, or leaves every "
                "layer in high precision (its report says why)"
            )
        self._history, self._unseen_reported = [], False
        self._next = -(-trainer.global_step // self.every_n_steps) * self.every_n_steps
        if self.picture:  # now, for it asks the other ranks, and at the end one may have failed
            self._folder = trainer.log_dir or trainer.default_root_dir
        self._apply(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._sample is None and trainer.global_step >= self._next:
            self._sample = Sample(self._layers)
            self._next = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
            self._sampled_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._sample is None or trainer.global_step == self._sampled_step:
            return  # no sample, or more batches to accumulate
        sample, self._sample = self._sample, None
        sample.remove()
        self.metrics = {
            **self._products(trainer, sample),
            **_optimizer_states(trainer),
            **paging.metrics(trainer.optimizers),
        }
        trainer.callback_metrics.update({k: v for k, v in self.metrics.items() if "/snr/" not in k})
        values = {name: value.item() for name, value in self.metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        if self._sample is not None:
            self._sample.remove()
            self._sample = None
        paged = paging.report(trainer.optimizers)
        if paged is not None:
            rank_zero_info(f"LowBitMonitor: {paged}")
        if not self._history:
            return
        rank_zero_info(str(self))
        if self._folder is not None and trainer.is_global_zero:
            steps, snr = zip(*self._history, strict=True)
            try:
                pictures.draw(self._folder, steps, list(self._layers), PRODUCTS, np.stack(snr), self.minimum_snr)
            except OSError as error:
                rank_zero_warn(f"LowBitMonitor could not write a picture into {self._folder}: {error}")

    # -- a sample ----------------------------------------------------------------------------------------------------

    def _products(self, trainer: L.Trainer, sample: Sample) -> dict[str, Tensor]:
        if not self._layers:
            return {}
        error = QuantizationError(len(self._layers)).to(trainer.strategy.root_device)
        error.update(*sample.result())  # on every rank, also where nothing was seen: ranks compute together
        measured = {name: values.cpu() for name, values in error.compute().items()}
        if not measured["snr"].isnan().all():
            self._history.append((self._sampled_step, measured["snr"].numpy()))
        self._report_unseen(measured["operands"])
        self._guard(measured["snr"])
        return self._named(measured)

    def _named(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for i, product in enumerate(PRODUCTS):
            snr = measured["snr"][:, i]
            seen = ~snr.isnan()
            if not seen.any():
                continue
            named[f"int8/{product}/snr_min"] = snr[seen].min()
            named[f"int8/{product}/snr_median"] = snr.nanquantile(0.5)
            for name in (*SHARES, "overflow"):
                named[f"int8/{product}/{name}_max"] = measured[name][:, i][seen].max()
            if self.per_layer:
                named |= {f"int8/{product}/snr/{n}": v for n, v in zip(self._layers, snr, strict=True) if not v.isnan()}
        return named

    def _report_unseen(self, operands: Tensor) -> None:
        """Name, once, the layers that no hook has seen."""
        hidden = operands.isnan().flatten(1).all(1).tolist()
        expected = [isinstance(layer, Int8Layer) and bool(layer.products.int8) for layer in self._layers.values()]
        unseen = [n for n, h, e in zip(self._layers, hidden, expected, strict=True) if h and e]
        if unseen and not self._unseen_reported:
            self._unseen_reported = True
            rank_zero_warn(
                f"LowBitMonitor could not measure {len(unseen)} of {len(self._layers)} int8 layers. Either the step "
                "didn't run them, or they are inside torch.compile, which hooks can't see into (monitor a run without "
                f"compiling): {', '.join(unseen[:8])}{' and others' if len(unseen) > 8 else ''}"
            )

    def by_layer(self) -> tuple[int, dict[str, dict[str, float]]]:
        """The last sample: its step, and layer -> product -> signal-to-noise ratio in dB. Empty before the first."""
        if not self._history:
            return 0, {}
        step, snr = self._history[-1]
        rows = zip(self._layers, snr.tolist(), strict=True)
        found = {name: {p: v for p, v in zip(PRODUCTS, row, strict=True) if v == v} for name, row in rows}
        return step, {name: row for name, row in found.items() if row}

    def __str__(self) -> str:
        if not self._history:
            return "LowBitMonitor: no sample yet"
        step, snr = self._history[-1]
        lines = [f"LowBitMonitor: int8 products, signal to noise in dB at step {step}"]
        names = list(self._layers)
        for i, product in enumerate(PRODUCTS):
            values = snr[:, i]
            if not np.isnan(values).all():
                worst = int(np.nanargmin(values))
                lines.append(
                    f"  {product}: median {np.nanmedian(values):.1f}, lowest {values[worst]:.1f} ({names[worst]})"
                )
        if self.rotated:
            lines.append(f"  rotated since they fell below {self.minimum_snr}: {_listed(self.rotated)}")
        if self.fallen_back:
            lines.append(f"  in high precision since they fell below {self.minimum_snr}: {_listed(self.fallen_back)}")
        return "\n".join(lines)

    # -- the guard ---------------------------------------------------------------------------------------------------

    def _guard(self, snr: Tensor) -> None:
        """Count samples below ``minimum_snr``; report products that were below it ``patience`` times, and change them:
        those that can be rotated are rotated, others fall back."""
        if self.minimum_snr is None:
            return
        suffering: dict[str, dict[str, str]] = {}
        shown = []
        for name, values in zip(self._layers, snr.tolist(), strict=True):
            counts = self._below.setdefault(name, {})
            for product, value in zip(PRODUCTS, values, strict=True):
                counts[product] = counts.get(product, 0) + 1 if value < self.minimum_snr else 0
                if counts[product] == self.patience and isinstance(self._layers[name], Int8Layer):
                    suffering.setdefault(name, {})[product] = _next(self._layers[name], product)
                    shown.append(f"{name} ({product}, {value:.1f} dB)")
        if not suffering:
            return
        what = (
            f"LowBitMonitor: signal-to-noise ratio below minimum_snr={self.minimum_snr:g} dB in {self.patience} "
            f"samples in a row: {', '.join(shown)}. "
        )
        if not self.fallback:
            rank_zero_warn(
                f"{what}Outliers make the rest coarse. Rotate these products, or run them in high precision, "
                f"Int8MixedPrecision(overrides={suffering}), leave the layers out (exclude=), or say fallback=True here"
            )
            return
        told = {"hadamard": "are rotated", "high": "run in high precision"}
        parts = [verb for kind, verb in told.items() if any(kind in p.values() for p in suffering.values())]
        rank_zero_warn(f"{what}They {' or '.join(parts)} from the next step on, and in runs resumed from here")
        for name, products in suffering.items():
            for product, kind in products.items():
                self._below[name][product] = 0
                (self.fallen_back if kind == "high" else self.rotated).setdefault(name, []).append(product)
                if kind == "high" and product in self.rotated.get(name, ()):
                    self.rotated[name].remove(product)
            self._change(name, self._layers[name])
        self.rotated = {name: products for name, products in self.rotated.items() if products}

    def _apply(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply all changes again: after a resume, or after ``convert_module``, which resets all layers."""
        if not (self.fallen_back or self.rotated):
            return
        modules = dict(pl_module.named_modules())
        for name in {**self.fallen_back, **self.rotated}:
            layer = modules.get(name)
            if isinstance(layer, Int8Layer):
                self._change(name, layer)

    def _change(self, name: str, layer: Int8Layer) -> None:
        kinds: dict[str, Any] = dict.fromkeys(self.rotated.get(name, ()), "hadamard")
        kinds |= dict.fromkeys(self.fallen_back.get(name, ()), "high")
        layer.products = replace(layer.products, **kinds)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = _apply

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        below = {n: dict(counts) for n, counts in self._below.items()}
        changed = {key: {n: list(p) for n, p in getattr(self, key).items()} for key in ("fallen_back", "rotated")}
        return {"version": VERSION, **changed, "below": below}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != VERSION:
            raise ValueError(
                f"LowBitMonitor knows version {VERSION} of its state, not {state_dict.get('version')!r}: update "
                "lowbit_lightning"
            )
        self.fallen_back = {name: list(products) for name, products in state_dict["fallen_back"].items()}
        self.rotated = {name: list(products) for name, products in state_dict.get("rotated", {}).items()}
        self._below = {name: dict(counts) for name, counts in state_dict["below"].items()}


# -- what the callback needs of layers and optimizers -----------------------------------------------------------------


def _next(layer: Int8Layer, product: str) -> str:
    """How a product should run that has too much noise now: rotated if it is not, and the layer can be."""
    trial: dict[str, Any] = {product: "hadamard"}
    kept, before = layer.products, layer.kinds
    layer.products = replace(kept, **trial)
    changes = layer.kinds != before
    layer.products = kept
    return "hadamard" if changes else "high"


def _listed(products: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} ({', '.join(names)})" for name, names in products.items())


def _optimizer_states(trainer: L.Trainer) -> dict[str, Tensor]:
    optimizers = paging.low_bit(trainer.optimizers)
    formats = [group["state_format"]["maps"] for optimizer in optimizers for group in optimizer.param_groups]
    maps = {name: codebook for held in formats for name, codebook in held.items()}
    names = tuple(sorted(maps))  # on every rank the same
    if not names:
        return {}
    metric = StateCodes(names).to(trainer.strategy.root_device)
    for name in names:  # so that every rank takes part, whatever its shard holds
        metric.update(name, torch.empty(0, dtype=torch.uint8), "dynamic_signed")
    for entries in (entries for optimizer in optimizers for entries in optimizer.state.values()):
        for name in (n for n in names if is_coded(entries, n)):
            metric.update(name, shards.local(entries[codes_name(name)]), maps[name])
    shares = metric.compute().cpu()
    return {
        f"int8/optimizer/{name}/{kind}": value
        for name, row in zip(names, shares, strict=True)
        for kind, value in zip(StateCodes.SHARES, row, strict=True)
        if not value.isnan()
    }
