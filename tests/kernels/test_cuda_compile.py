"""Every CUDA kernel compiles, without spilling registers: for one architecture here, for six by `make cuda-compile`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit_lightning.kernels import compile, rules
from lowbit_lightning.kernels.cuda import int8_wgmma, table
from lowbit_lightning.kernels.cuda.lowbit_form import text_of
from lowbit_lightning.kernels.sources import MAP_NUMBERS, StepVariant, specialised

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


def optimizer_texts() -> Iterator[tuple[str, str]]:
    """Every rule as it is used most, and the types and block sizes that change a kernel's shape for some."""
    for rule in rules.RULES:
        yield f"prepare {rule}", specialised("optimizer_prepare.cu", rule)
        yield f"step {rule}", StepVariant(rule, F32, F32, 0b111, 256).text("optimizer_step.cu")
    variants = [
        ("adamw", BF16, BF16, 0b11, 256, False),
        ("adamw", BF16, BF16, 0b11, 32, True),
        ("adamw", BF16, F32, 0b11, 4096, True),
        ("adamw", F16, F32, 0b11, 4096, False),
        ("adamw", F32, BF16, 0b00, 256, False),
        ("sgd", BF16, BF16, 0, 256, True),
        ("adamw_amsgrad", F32, F32, 0b111, 4096, False),
        ("ademamix", BF16, F32, 0b111, 256, True),
    ]
    with_remainders = StepVariant("adamw", BF16, BF16, 0b11, 256, remainder=True)
    yield "step adamw with remainders", with_remainders.text("optimizer_step.cu")
    for variant in variants:
        yield f"step {variant}", StepVariant(*variant).text("optimizer_step.cu")
    for rule in (name for name, rule in rules.RULES.items() if rule.norms):
        for param, block_size in ((F32, 256), (BF16, 4096), (F32, 4096)):
            name = f"norms {rule} {param} block {block_size}"
            yield name, StepVariant(rule, param, param, 0b11, block_size).text("optimizer_norms.cu")


def texts(every: bool) -> dict[str, str]:
    """Those of optimizers and of int8: in every type, or in those that take the most registers."""
    found = dict(optimizer_texts())
    for dtype, codebook, block_size in (
        (F32, "dynamic_signed", 256),
        (BF16, "dynamic_unsigned", 4096),
        (F16, "dynamic_signed", 32),
        (F32, "custom", 256),
        (BF16, "custom", 4096),
    ):
        text = specialised("quantize.cu", ELEMENT=dtype, MAP=MAP_NUMBERS[codebook], BLOCK=block_size)
        found[f"quantize {dtype} {codebook} block {block_size}"] = text
    for dtype, threads in ((F32, 256), (F32, 32), (BF16, 256), (F16, 32)) if every else ((F16, 32), (BF16, 256)):
        for dithered in (0, 1, 2):
            text = specialised("int8.cu", ELEMENT=dtype, ROW_THREADS=threads, DITHERED=dithered)
            found[f"int8 {dtype} threads {threads} dithered {dithered}"] = text
    for out, bias in ((F32, F32), (BF16, BF16), (F16, F32)) if every else ((BF16, BF16),):
        found[f"int8 product's epilogue {out} bias {bias}"] = specialised("int8_scale_sums.cu", ELEMENT=out, BIAS=bias)
        found[f"int8 convolution {out} bias {bias}"] = specialised("int8_conv.cu", ELEMENT=out, BIAS=bias, STAGES=3)
        for tile_n in (128, 256):
            text = specialised("int8_product.cu", ELEMENT=out, BIAS=bias, TILE_N=tile_n, STAGES=3)
            found[f"int8 product {out} bias {bias} tile {tile_n}"] = text
    for dtype, rotated in ((F32, F32), (F16, F32), (BF16, BF16)) if every else ((F32, F32),):
        found[f"hadamard {dtype}"] = specialised("int8_hadamard.cu", ELEMENT=dtype, ROTATED=rotated)
    found["table"] = specialised("table.cu", WORDS=table._WORDS)
    return found


def hopper_texts(every: bool) -> Iterator[tuple[str, str]]:
    """Those with instructions that only sm_90a has."""
    for out, bias in ((F32, F32), (BF16, BF16), (F16, F32)) if every else ((BF16, F32),):
        for tile in int8_wgmma.TILES if every else ((192, 256),):
            yield f"int8 product by wgmma {out} bias {bias} tile {tile}", int8_wgmma.text_of(out, bias, tile)


def lowbit_texts(every: bool) -> dict[str, str]:
    """Those of low-bit weights: of every format, or of some."""
    found = {}
    forms = ("int8", "nf4", "nf4-dq-g128", "fp4", "int4", "int3", "int2") if every else ("nf4",)
    for form in forms:
        for dtype in (F32, BF16, F16) if every else (BF16,):
            found[f"decode {form} {dtype}"] = text_of("lowbit_decode.cu", form, ELEMENT=dtype)
        for dtype, packets in ((F16, 1), (BF16, 0)) if every else ((F16, 1),):
            macros = {"ELEMENT": dtype, "BIAS": F32, "PACKETS": packets}
            found[f"gemv {form} {dtype} one row"] = text_of("lowbit_row.cu", form, **macros)
        for columns in (8, 16, 32) if every else (8,):
            dtypes = {"ELEMENT": BF16 if columns == 16 else F16, "BIAS": F32}
            stages = {"COLUMNS": columns, "PACKETS": columns != 16, "STAGES": 4 if columns == 8 else 2}
            found[f"gemv {form} {columns} rows"] = text_of("lowbit_gemv.cu", form, **dtypes, **stages)
        for columns, dtype in ((1, F32), (8, F32), (4, BF16)) if every else ((1, F32),):
            macros = {"ELEMENT": dtype, "BIAS": BF16, "COLUMNS": columns}
            found[f"plain gemv {form} {dtype} {columns} rows"] = text_of("lowbit_gemv_plain.cu", form, **macros)
        for tile, transposed, dtype in ((64, 0, F16), (128, 0, BF16), (128, 1, F16)) if every else ((128, 1, BF16),):
            macros = {"ELEMENT": dtype, "BIAS": F32, "TRANSPOSED": transposed, "TILE_M": tile, "STAGES": 3}
            found[f"product {form} {dtype} tile {tile} transposed {transposed}"] = text_of(
                "lowbit_product.cu", form, **macros
            )
    for dtype in (F32, BF16, F16) if every else (BF16,):
        found[f"outliers {dtype}"] = specialised("lowbit_outliers.cu", ELEMENT=dtype)
    made = ((F32, "int2"), (BF16, "nf4"), (F16, "nf4-dq-g128"), (F32, "int3-g512"), (BF16, "int4-g4096"))
    for dtype, form in made if every else ((F16, "nf4"),):
        found[f"quantise {form} {dtype}"] = text_of("lowbit_quantize.cu", form, ELEMENT=dtype)
    return found


def compile_all(architecture: str, every: bool = True) -> list[tuple[str, str, compile.Resources]]:
    """Text, kernel and resources of every kernel; a warning of the compiler fails."""
    rows = []
    found = [(name, text, architecture) for name, text in (texts(every) | lowbit_texts(every)).items()]
    if architecture == "sm_90":
        found += [(name, text, "sm_90a") for name, text in hopper_texts(every)]
    for name, text, target in found:
        log = compile.cubin(text, target).log
        assert "warning" not in log, f"{name} for {architecture}:\n{log}"
        rows += [(name, kernel, resources) for kernel, resources in compile.resources(log).items()]
    return rows


def assert_nothing_spills(rows: list[tuple[str, str, compile.Resources]]) -> None:
    # An old compiler is worse at it: CUDA 12.6's NVRTC keeps 8 and 24 bytes of two kernels on the stack.
    allowed = 24 if tuple(map(int, compile.nvrtc_version().split("."))) < (12, 8) else 0
    bad = [row for row in rows if max(row[2].stack, row[2].spill_stores) > allowed]
    assert not bad, "\n".join(map(str, bad))
    assert {kernel for _, kernel, _ in rows} - {"int8_product_wgmma"} == {
        *("prepare", "step", "norm_blocks", "norm_fold", "quantize", "dequantize", "write_words"),
        *("quantize_rows", "find_tops", "quantize_tiles", "scale_sums", "int8_product", "int8_conv"),
        *("rotate_rows", "rotate_columns"),
        *("decode", "quantize_weight", "lowbit_row", "lowbit_gemv", "lowbit_gemv_plain", "lowbit_product"),
        *("sum_parts", "flag_columns", "list_columns", "multiply_columns"),
    }
    # A thread of a product holds up to 128 sums. With 256 threads of at most 255 registers a multiprocessor runs it.
    # A step of three states has more of them than two blocks of 256 threads could have each.
    wide = ("int8_product", "int8_product_wgmma", "int8_conv", "lowbit_product", "lowbit_gemv", "lowbit_gemv_plain")
    most = {**dict.fromkeys(wide, 255), "step": 192}
    assert all(8 <= r.registers <= most.get(kernel, 128) for _, kernel, r in rows)
    assert all(r.registers <= 128 for name, _, r in rows if name in ("step adamw", "step lion", "step sgd"))
    assert all(r.shared <= 48 * 1024 for _, _, r in rows)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    rows = compile_all("sm_90", every=False)
    assert_nothing_spills(rows)
    step = max(r.registers for name, _, r in rows if name == "step adamw")
    with capsys.disabled():
        print(f" [sm_90: {len(rows)} kernels, at most {max(r.registers for *_, r in rows)} registers, AdamW {step}] ")


def test_a_kernel_that_spills_is_seen() -> None:
    """The check above reads the compiler's log: it has to see a kernel whose values cannot all be in registers."""
    values = "".join(f"float v{i} = x[threadIdx.x + {i} * 999];" for i in range(300))
    uses = "".join(f"x[threadIdx.x * 7 + {i}] = v{i};" for i in range(300))
    text = f'extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {{ {values} __syncthreads(); {uses} }}'
    (spill,) = compile.resources(compile.cubin(text, "sm_90").log).values()
    assert spill.spill_stores > 0
    assert spill.spill_loads > 0


@pytest.mark.six_architectures
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_six_architectures(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compile_all(architecture)
    with capsys.disabled():
        print(f"\n{architecture}: registers, bytes of shared memory")
        for name, kernel, r in rows:
            print(f"  {r.registers:4d} {r.shared:6d}  {kernel:18s} {name}")
    assert_nothing_spills(rows)
