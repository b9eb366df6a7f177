"""The CUDA backend on a GPU: bit for bit against the reference on the CPU, and what no emulator can see: streams,
graphs, synchronisation. `make gpu` runs it; elsewhere it is left out, and the closing lines of pytest say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cuda_waits import no_synchronisation
from support.step_case import StepCase
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.cuda import int8_product, int8_wgmma, table
from lowbit_lightning.kernels.reference.blockwise import quantize_blockwise
from lowbit_lightning.kernels.reference.int8_product import int8_matmul

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GPU = torch.device("cuda", 0)
SHAPES = [(), (5,), (1000,), (3, 256), (2, 5, 77), (64, 4096), (7, 1001)]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        x, y = x.cpu(), y.cpu()
        same = (x == y) | (x.isnan() & y.isnan() if x.is_floating_point() else torch.zeros_like(x == y))
        bad = (~same).nonzero()
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert not len(bad), f"tensor {i}: first difference at {bad[0].tolist()}: {x[~same][0]} against {y[~same][0]}"


def spread(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation


@pytest.mark.parametrize("codebook", ["dynamic_signed", "dynamic_unsigned", "linear", "nf4"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_blockwise(codebook: str, dtype: torch.dtype, block_size: int) -> None:
    for shape in SHAPES:
        x = spread(*shape).to(dtype)
        if x.numel() > 500:
            x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
        with kernels.use_backend("reference"):
            codes, scales = kernels.quantize_blockwise(x, codebook, block_size)
            decoded = kernels.dequantize_blockwise(codes, scales, codebook, block_size, dtype)
        ours = kernels.quantize_blockwise(x.to(GPU), codebook, block_size)
        assert_same_bits(
            [*ours, kernels.dequantize_blockwise(*ours, codebook, block_size, dtype)], [codes, scales, decoded]
        )


@pytest.mark.parametrize("codebook", formats.MAPS)
def test_quantising_again_changes_nothing(codebook: str) -> None:
    x = spread(4096, 1024).to(GPU)
    x = x if codebook == "dynamic_signed" else x.abs()
    codes, scales = kernels.quantize_blockwise(x, codebook)
    decoded = kernels.dequantize_blockwise(codes, scales, codebook)
    assert_same_bits([*kernels.quantize_blockwise(decoded, codebook)], [codes, scales])


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(GPU).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    rows = 2**31 // 4096 + 3
    x = torch.zeros(rows, 4096, dtype=BF16, device=GPU)
    tail = spread(2, 4096).to(BF16)
    x[-2:] = tail.to(GPU)
    codes, scales = kernels.quantize_blockwise(x)
    expected = quantize_blockwise(tail, "dynamic_signed", None, 256)
    assert_same_bits([codes[-2:], scales[-2:]], list(expected))
    assert int((codes[:-2] != 127).sum()) == 0


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_int8(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 1, 1), (5, 3, 7), (16, 8, 8), (17, 1001, 513), (256, 512, 1024)):
        a, b = spread(m, k).to(dtype), spread(n, k).to(dtype)
        bias = torch.randn(n).to(dtype)
        expected: list[Tensor] = []
        ours: list[Tensor] = []
        for out, backend, place in ((expected, "reference", "cpu"), (ours, "cuda", "cuda")):
            with kernels.use_backend(backend):
                qa, sa = kernels.quantize_rowwise(a.to(place))
                qb, sb = kernels.quantize_rowwise(b.to(place))
                out += [qa, sa, qb, sb, *kernels.quantize_colwise(a.to(place))]
                out += [*kernels.quantize_both(a.to(place)), *kernels.quantize_both(a.to(place), 2**64 - 77)]
                out += [kernels.int8_matmul(qa, qb, sa, sb, bias.to(place), dtype)]
        assert_same_bits(ours, expected)


ENGINES: dict[str, Callable[..., Tensor]] = {
    "mma.sync": int8_product.fused_product,
    "cuBLASLt": int8_product.cublaslt_product,
    **int8_wgmma.engines(),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Each engine of the int8 product that this GPU has."""
    if request.param.startswith("wgmma") and not int8_wgmma.exists(GPU):
        pytest.skip("wgmma is an instruction of Hopper (compute capability 9.0)")
    return ENGINES[request.param]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_int8_products(engine: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Ragged shapes, every tile, and more blocks than run at a time."""
    for m, n, k in ((1, 1, 1), (5, 3, 7), (129, 257, 65), (130, 72, 4000), (20, 24, 0), (2050, 4100, 208)):
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        arguments = a, b, torch.rand(m), torch.rand(n), torch.randn(n).to(dtype)
        ours = engine(*(t.to(GPU) for t in arguments), dtype)
        assert_same_bits([ours], [int8_matmul(*arguments, dtype)])


def test_an_engine_is_chosen_by_measurement_and_used_in_a_graph() -> None:
    """On Hopper. wgmma must have passed its check, or a warning, which is an error here, says so."""
    if not int8_wgmma.exists(GPU):
        pytest.skip("elsewhere than on Hopper the engine is estimated")
    a, b = (torch.randint(-128, 128, (rows, 1024), dtype=torch.int8, device=GPU) for rows in (2048, 1024))
    arguments = a, b, torch.rand(2048, device=GPU), torch.rand(1024, device=GPU)
    ours = kernels.int8_matmul(*arguments)
    assert int8_wgmma.is_right(GPU, int8_product.fused_product)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = kernels.int8_matmul(*arguments)
    graph.replay()
    assert_same_bits([ours, again], [int8_product.cublaslt_product(*arguments, None, F32)] * 2)
    print(f"chosen: {int8_product.fastest.chosen}")


def test_the_longest_int8_sum(engine: Callable[..., Tensor]) -> None:
    for value, k in ((127, kernels.int8_product.LONGEST_INT8_SUM), (-128, 131071)):
        q, ones = torch.full((20, k), value, dtype=torch.int8, device=GPU), torch.ones(20, device=GPU)
        expected = torch.full((20, 20), float(k * value**2))
        assert_same_bits([engine(q, q, ones, ones, None, F32)], [expected])


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer step

HYPER = {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.05, "momentum": 0.9, "alpha": 0.95, "beta1": 0.9, "beta2": 0.99}
HYPER |= {"dampening": 0.1, "lr_decay": 0.1, "variance_floor": 1 / 64, "trust_coefficient": 0.01}
HYPER |= {"log_beta1": -0.1, "log_beta3": -0.001, "t_alpha": 5.0, "t_beta3": 5.0, "beta3": 0.999}
PARAMETERS = [(64, 700), (300,), (3, 5, 77), (128, 512), (5, 33), (1,)]


def arguments_of(
    rule: str, dtype: torch.dtype = F32, coded: int = 0b111, block_size: int = 256, **options: Any
) -> StepCase:
    """Arguments in mid-training, on the CPU."""
    states: list[list[Tensor]] = []
    scales: list[list[Tensor]] = []
    for s, state in enumerate(rules.get(rule).states):
        values = [torch.randn(p).abs() if state.non_negative else torch.randn(p) for p in PARAMETERS]
        pairs = [quantize_blockwise(v, state.codebook, None, block_size) for v in values]
        states.append([q for q, _ in pairs] if coded >> s & 1 else values)
        scales.append([c for _, c in pairs])
    grads = [spread(*p) for p in PARAMETERS]
    grads[0].view(-1)[3], grads[1].view(-1)[-1] = float("nan"), float("inf")
    return StepCase(
        rule,
        params=[torch.randn(p).to(dtype) for p in PARAMETERS],
        grads=[g.to(dtype) for g in grads],
        steps=[torch.tensor(float(i)) for i in range(len(PARAMETERS))],
        states=states,
        scales=scales,
        hyper=[HYPER[name] for name in rules.get(rule).hyper],
        block_size=block_size,
        seed=2**62 + 12345,
        **options,
    )


def on_gpu(a: StepCase) -> StepCase:
    return moved(a, lambda t: t.to(GPU, copy=True))


def moved(a: StepCase, place: Callable[[Tensor], Tensor]) -> StepCase:
    def places(tensors: list[Tensor]) -> list[Tensor]:
        return [place(t) for t in tensors]

    def one(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else place(tensor)

    a = replace(a, params=places(a.params), grads=places(a.grads), steps=places(a.steps))
    a = replace(a, remainders=places(a.remainders))
    a = replace(a, states=[places(s) for s in a.states], scales=[places(s) for s in a.scales])
    return replace(a, lr=one(a.lr), unscale=one(a.unscale), clip=one(a.clip), skip=one(a.skip))


def step(a: StepCase) -> list[Tensor]:
    norms = a.norms() if rules.get(a.rule).norms else None
    a.step(norms)
    written = [*a.params, *a.remainders, *a.steps, *(t for s in (*a.states, *a.scales) for t in s)]
    return written if norms is None else [*written, norms]


def reference_step(a: StepCase, times: int = 1) -> list[Tensor]:
    a = moved(a, Tensor.clone)
    written: list[Tensor] = []
    with kernels.use_backend("reference"):
        for _ in range(times):
            written = step(a)
    return written


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("coded", [0b111, 0])
def test_every_rule(rule: str, coded: int) -> None:
    a = arguments_of(rule, coded=coded)
    assert_same_bits(step(on_gpu(a)), reference_step(a))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("block_size", [32, 128, 512, 4096])
def test_types_and_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    for rule in ("adamw", "lamb"):
        a = arguments_of(rule, dtype, block_size=block_size)
        assert_same_bits(step(on_gpu(a)), reference_step(a))


def test_stochastic_rounding_and_scalars_on_the_device() -> None:
    offsets = [0, 3, 8, 2**33 + 5, 2**40, 7]
    scalars: dict[str, Any] = {"lr": torch.tensor(0.3), "unscale": torch.tensor(1 / 1024), "clip": torch.tensor(0.37)}
    a = arguments_of("adamw", BF16, stochastic_rounding=True, offsets=offsets, maximize=True, **scalars)
    assert_same_bits(step(on_gpu(a)), reference_step(a))


def test_remainders_of_bfloat16_parameters() -> None:
    a = arguments_of("adamw", BF16)
    a.remainders = [torch.randint(-128, 128, p.shape, dtype=torch.int8) for p in a.params]
    assert_same_bits(step(on_gpu(a)), reference_step(a))


def test_skip_changes_nothing() -> None:
    a = arguments_of("adamw", skip=torch.ones(()))
    written = [*a.params, *a.steps, *(t for s in (*a.states, *a.scales) for t in s)]
    assert_same_bits(step(on_gpu(a)), written)


# ---------------------------------------------------------------------------------------------------------------------
# What no emulator sees


def test_nothing_synchronises() -> None:
    """After the first use, which compiles."""
    a, lamb = on_gpu(arguments_of("adamw", skip=torch.zeros(()))), on_gpu(arguments_of("lamb"))
    x = spread(128, 512).to(GPU)

    def everything() -> None:
        step(a)
        step(lamb)
        codes, scales = kernels.quantize_blockwise(x)
        kernels.dequantize_blockwise(codes, scales)
        q, s = kernels.quantize_rowwise(x)
        kernels.quantize_colwise(x)
        kernels.int8_matmul(q, q, s, s)

    everything()
    table.forget()  # the tables are sent again
    with no_synchronisation():
        everything()


def test_a_stream_of_its_own() -> None:
    """Work waits for what is before it on its stream, and what is after it waits for the work."""
    a = arguments_of("adamw")
    expected = reference_step(a)
    step(on_gpu(a))  # compiled
    stream = torch.cuda.Stream(GPU)
    ours = moved(on_gpu(a), torch.empty_like)
    source = on_gpu(a)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds, in which nothing below may run
        for target, value in zip(_tensors(ours), _tensors(source), strict=True):
            target.copy_(value, non_blocking=True)
        written = [t.clone() for t in step(ours)]
    stream.synchronize()
    assert_same_bits(written, expected)


def test_a_graph_replays_the_step_at_moved_gradients() -> None:
    a = arguments_of("adamw", skip=torch.zeros(()), lr=torch.tensor(0.02))
    ours = on_gpu(a)
    start = [t.clone() for t in _tensors(ours)]
    side = torch.cuda.Stream(GPU)
    with torch.cuda.stream(side):
        step(ours)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step(ours)
    # Other steps in between send other tables, which must not disturb the graph's.
    step(on_gpu(a))
    table.forget()
    junk = [torch.full((1 << 16,), 7, dtype=torch.int64, device=GPU) for _ in range(20)]
    for target, value in zip(_tensors(ours), start, strict=True):
        target.copy_(value)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert len(junk) == 20
    assert_same_bits(written, reference_step(a, times=3))


def test_a_thread_that_has_not_used_cuda_yet() -> None:
    from threading import Thread

    x = spread(64, 256)
    on_device, results = x.to(GPU), []
    thread = Thread(target=lambda: results.append(kernels.quantize_blockwise(on_device)))
    thread.start()
    thread.join()
    assert_same_bits([*results[0]], [*quantize_blockwise(x, "dynamic_signed", None, 256)])


def test_the_current_device_need_not_be_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = spread(64, 256)
    codes, scales = kernels.quantize_blockwise(x.to("cuda:1"))
    assert codes.device == torch.device("cuda:1")
    assert_same_bits([codes, scales], [*quantize_blockwise(x, "dynamic_signed", None, 256)])


def test_calls_say_cuda() -> None:
    kernels.reset_calls()
    kernels.quantize_blockwise(torch.ones(300, device=GPU))
    assert kernels.calls() == {("quantize_blockwise", "cuda"): 1}


def _tensors(a: StepCase) -> list[Tensor]:
    return [*a.params, *a.grads, *a.steps, *(t for s in (*a.states, *a.scales) for t in s)]
