"""The GPU's kernels against the reference, which defines the arithmetic: in Triton's interpreter, or on a GPU where
there is one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from greenroom.kernels import Activation, ExpertTask, reference
from greenroom.packed import RecordTensor
from greenroom.quant import Format, Layout, quantize
from test_native import FORMATS, distance, layout, record, swiglu, vectors, weight

pytest.importorskip("triton", reason="triton is not installed")

from greenroom.kernels import device, products
from greenroom.kernels import slots as reference_slots
from greenroom.kernels.gpu import launch
from samples import some

ON = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(bool(device.unusable(ON)), reason=device.unusable(ON))

ROUNDING = {torch.float32: 3e-4, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
"""Of the largest output, where weights and what lies between the products are rounded to the activations' dtype."""
TOLERANCE = ROUNDING[torch.float32]
"""Of the largest output: codes are summed above 1 in a float's mantissa, which loses 2^-15 of a code at most."""
K = 3
FEW = [FORMATS[i] for i in (0, 6, 9, 13, 16)]
"""One of each number of bits."""


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cost is per program."""
    if ON == "cpu":
        monkeypatch.setattr(launch, "ROWS", 64)
        monkeypatch.setattr(launch, "FEW_TOKENS", 1)
        monkeypatch.setattr(launch, "BLOCK", 4096)


def gate_of(kind: str, inner: int) -> Activation:
    """The family's own gate, in torch."""
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    name, *numbers = kind.split(":")
    if name in functions:
        return Activation(gate=functions[name], kind=kind)
    if name.removesuffix("_and_mul") in functions:
        function = functions[name.removesuffix("_and_mul")]
        return Activation(gate=lambda x: function(x[:, :inner]) * x[:, inner:], kind=kind)
    alpha, limit = (1.0, float(numbers[0])) if len(numbers) == 1 else map(float, numbers)
    plus = 0.0 if len(numbers) == 1 else 1.0

    def clamped(x: torch.Tensor) -> torch.Tensor:
        gate, up = (x[:, ::2], x[:, 1::2]) if name.endswith("interleaved") else (x[:, :inner], x[:, inner:])
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + plus)

    return Activation(gate=clamped, kind=kind)


KINDS = [f"{name}{form}" for name in device.FUNCTIONS for form in ("", "_and_mul")]
KINDS += ["clamped_silu_and_mul:1.0", "swigluoai:1.702:1.0", "swigluoai_interleaved:1.702:1.0"]


def arena_of(
    hidden: int, inner: int, format: Format, experts: int, gated: bool = True, biased: bool = False
) -> torch.Tensor:
    """uint8 [experts, record_nbytes], each record padded as on disk to a multiple of its alignment."""
    records = [record(hidden, inner, format, seed, gated, biased) for seed in range(experts)]
    return torch.stack([F.pad(one, (0, -len(one) % 256)) for one in records])


def wanted_pairs(
    x: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, its: "list[RecordTensor]", activation: Activation
) -> torch.Tensor:
    """float32 [T, k, H] by the reference, one pair after another; zeros where the slot is −1."""
    out = torch.zeros(*slots.shape, its[1].rows)
    for t, row in enumerate(slots.tolist()):
        for j, slot in enumerate(row):
            if slot >= 0:
                task = ExpertTask(arena[slot], torch.tensor([t]))
                out[t, j] = reference.experts(x.float(), [task], its, activation)[0][0]
    return out


def slots_of(tokens: int, experts: int, seed: int = 0, k: int = K) -> torch.Tensor:
    """int32 [tokens, k], distinct within a token, as a router chooses."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)]).to(torch.int32)


@pytest.mark.parametrize("format", some(FORMATS, FEW), ids=lambda format: format.name)
def test_linear_equals_the_reference(format: Format) -> None:
    for rows, cols, count in [(1, 48, 1), (13, 1040, 2)]:
        packed, bias, x = quantize(weight(rows, cols), format), torch.linspace(-1, 1, rows), vectors(count, cols)
        wanted = reference.linear(x, packed, rows, cols, format, bias)
        found = linear(x, packed, rows, cols, format, bias)
        assert distance(found, wanted, typical=float(weight(rows, cols).norm(dim=1).max())) < TOLERANCE


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None"
) -> torch.Tensor:
    bias = None if bias is None else bias.to(ON)
    return device.linear(x.to(ON), packed.to(ON), rows, cols, format, bias).cpu()


@pytest.mark.parametrize("format", some(FORMATS, FEW), ids=lambda format: format.name)
def test_one_code_bit_changes_one_row(format: Format) -> None:
    """Negative control: the comparison above sees every row, and no row reads its neighbour."""
    rows, cols = 17, 192
    packed, x = quantize(weight(rows, cols), format), vectors(1, cols)
    before = linear(x, packed, rows, cols, format, None)
    for row in (0, 16):
        changed = packed.clone()
        changed[row * Layout(rows, cols, format).code_row_bytes + 3] ^= 1
        after = linear(x, changed, rows, cols, format, None)
        assert (before != after)[0].nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_answers_in_the_activations_dtype(dtype: torch.dtype) -> None:
    format, x = Format.of(4), vectors(2, 128).to(dtype)
    packed = quantize(weight(9, 128), format)
    found = linear(x, packed, 9, 128, format, None)
    assert found.dtype == dtype
    wanted = reference.linear(x.float(), packed, 9, 128, format)
    assert distance(found.float(), wanted) < ROUNDING[dtype]


@pytest.mark.parametrize("tokens", some([1, 2, 5, 16], [1, 5]))
@pytest.mark.parametrize("format", some(FEW, [FORMATS[0], FORMATS[9]]), ids=lambda f: f.name)
def test_token_equals_the_reference(format: Format, tokens: int) -> None:
    hidden, inner, experts = 80, 56, 5
    its, arena, x = layout(hidden, inner, format), arena_of(hidden, inner, format, experts), vectors(tokens, hidden)
    slots, weights = slots_of(tokens, experts), torch.rand(tokens, K)
    slots[0, 1] = -1
    activation = Activation(gate=swiglu, kind="silu_and_mul")
    wanted = (wanted_pairs(x, arena, slots, its, activation) * weights.unsqueeze(-1)).sum(1)
    found = device.token(x.to(ON), arena.to(ON), slots.to(ON), weights.to(ON), its, activation.kind).cpu()
    assert found.dtype == torch.float32 and distance(found, wanted) < TOLERANCE
    swapped = torch.where(slots < 0, slots, (slots + 1) % experts)  # negative control
    other = device.token(x.to(ON), arena.to(ON), swapped.to(ON), weights.to(ON), its, activation.kind).cpu()
    assert distance(other, wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("format", some([f for f in FORMATS if f.bits != 16], [FORMATS[6]]), ids=lambda f: f.name)
def test_single_vectors_by_matrix_units_equal_the_reference(format: Format) -> None:
    """Whatever the size of weights and activations, and where rows are several tiles."""
    x = vectors(1, 2100)
    x[0, 7] = 1e5  # beyond float16
    for scale, dtype in [(1.0, torch.bfloat16), (1e-7, torch.float16), (1e4, torch.bfloat16)]:
        given = (x if dtype == torch.bfloat16 else vectors(1, 2100)).to(dtype)
        packed = quantize(weight(13, 2100) * scale, format)
        wanted = reference.linear(given.float(), packed, 13, 2100, format)
        matrix = RecordTensor(name="", rows=13, cols=2100, offset=0, format=format)
        found = torch.empty(1, 13, device=ON)
        arranged, identity = launch.arranged(given.to(ON), matrix), "identity"
        assert arranged.dtype == torch.float16
        launch.vectors(arranged, packed.to(ON), None, 1, matrix, None, identity, found, None)
        assert distance(found.cpu() / scale, wanted / scale) < ROUNDING[torch.float16]
        swapped = launch.arranged(given.roll(1).to(ON), matrix)  # negative control
        launch.vectors(swapped, packed.to(ON), None, 1, matrix, None, identity, found, None)
        assert distance(found.cpu() / scale, wanted / scale) > 10 * ROUNDING[torch.float16]


def test_rows_of_nothing_give_nothing() -> None:
    format, x = Format.of(4), vectors(1, 64).to(torch.float16)
    packed = quantize(weight(5, 64), format)
    for params in (0.0, 1e-39):
        Layout(5, 64, format).view(packed, "row_params")[2, :2] = params
        found = device.linear(x.to(ON), packed.to(ON), 5, 64, format)
        assert (found == 0)[0].nonzero().flatten().tolist() == [2]


def test_what_is_no_number_stays_so_in_float16() -> None:
    x, format = vectors(1, 64).to(torch.bfloat16), Format.of(4)
    x[0, 3] = float("nan")
    assert device.linear(x.to(ON), quantize(weight(5, 64), format).to(ON), 5, 64, format).isnan().all()


@pytest.mark.parametrize("kind", some(KINDS, ["silu_and_mul", "relu2", "gelu_tanh", "swigluoai_interleaved:1.702:1.0"]))
@pytest.mark.parametrize("tokens,biased", [(1, True), (2, False)])
def test_every_gate(kind: str, tokens: int, biased: bool) -> None:
    """A first product that spreads over [-6, 6], so that clamps and tails show."""
    hidden, inner, format = 64, 80, Format(bits=8, group_size=32)
    gated = "_and_mul" in kind or "oai" in kind
    its, arena = layout(hidden, inner, format, gated, biased), arena_of(hidden, inner, format, 2, gated, biased)
    x, activation, slots = 2 * vectors(tokens, hidden), gate_of(kind, inner), slots_of(tokens, 2, k=1)
    wanted = wanted_pairs(x, arena, slots, its, activation)
    found = device.pairs(x.to(ON), arena.to(ON), slots.to(ON), its, kind).cpu()
    assert distance(found, wanted) < TOLERANCE
    other = Activation(gate=lambda x: activation.gate(x) * (1 + 1e-2 * x[..., :inner].sign()))  # negative control
    assert distance(wanted_pairs(x, arena, slots, its, other), wanted) > 3 * TOLERANCE


@pytest.mark.slow
@settings(
    max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    format=st.sampled_from(FORMATS),
    hidden=st.integers(2, 150),
    inner=st.integers(1, 90),
    tokens=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_slots_and_turns_change_no_bit(
    format: Format, hidden: int, inner: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    """Other slot numbers, and hits first and misses later, give the same bits as all at once."""
    its, arena = layout(hidden, inner, format), arena_of(hidden, inner, format, 4).to(ON)
    x, weights, slots = (
        vectors(tokens, hidden).to(ON, dtype),
        torch.rand(tokens, K).to(ON),
        slots_of(tokens, 4, seed).to(ON),
    )
    kind = "silu_and_mul"
    whole = device.token(x, arena, slots, weights, its, kind)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(arena)
    moved[order] = arena
    assert torch.equal(device.token(x, moved, order.to(ON, torch.int32)[slots.long()], weights, its, kind), whole)
    late = (slots + torch.arange(tokens, device=ON).unsqueeze(1)) % 2 == 0
    out = device.pairs(x, arena, torch.where(late, -1, slots), its, kind)
    device.pairs(x, arena, torch.where(late, slots, -1), its, kind, out)
    places = torch.arange(tokens * K, dtype=torch.int32, device=ON).view(tokens, K)
    assert torch.equal(device.combine(out.view(tokens * K, hidden), places, weights), whole)
    assert torch.equal(device.combine(out.view(tokens * K, hidden), slots, weights, own=True), whole)
    rows = torch.where(late.unsqueeze(-1), torch.nan, out).view(tokens * K, hidden)  # never computed
    there = device.combine(rows, torch.where(late, -1, places), weights)
    assert torch.equal(device.combine(rows, torch.where(late, -1, slots), weights, own=True), there)
    wanted = reference_slots.combine(rows.cpu(), torch.where(late, -1, slots).cpu(), weights.cpu(), own=True)
    assert distance(there.cpu(), wanted) < TOLERANCE and there.isfinite().all()
    wanted = (
        wanted_pairs(x.cpu(), arena.cpu(), slots.cpu(), its, Activation(gate=swiglu)) * weights.cpu().unsqueeze(-1)
    ).sum(1)
    assert distance(whole.cpu(), wanted, typical=1e-3) < ROUNDING[dtype]


@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[6], FORMATS[9], FORMATS[16]], ids=lambda f: f.name)
def test_a_prompt_equals_the_reference(format: Format) -> None:
    """Experts in two calls, the second first: each pair's row, and their sum."""
    hidden, inner, tokens, experts = 80, 41, 25, 3
    its, arena, x = layout(hidden, inner, format), arena_of(hidden, inner, format, experts), vectors(tokens, hidden)
    chosen = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).sort(1).values
    order = chosen.flatten().argsort(stable=True)
    rows, ends = (order // 2).to(torch.int32), chosen.flatten().bincount(minlength=experts).cumsum(0).tolist()
    spans = [device.Span(e, start, end - start) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    out = torch.full((2 * tokens, hidden), float("nan"), device=ON)
    for part in (spans[1:], spans[:1]):
        device.prompt(x.to(ON), arena.to(ON), part, rows.to(ON), its, "silu_and_mul", out)
    activation = Activation(gate=swiglu)
    for span in spans:
        task = ExpertTask(arena[span.slot], rows[span.start : span.start + span.count].long())
        wanted = reference.experts(x, [task], its, activation)[0]
        assert distance(out[span.start : span.start + span.count].cpu(), wanted) < TOLERANCE
        swapped = dataclasses.replace(task, record=arena[(span.slot + 1) % experts])  # negative control
        assert distance(reference.experts(x, [swapped], its, activation)[0], wanted) > 100 * TOLERANCE
    weights, places = torch.rand(tokens, 2), order.argsort().view(tokens, 2).to(torch.int32)
    total = device.combine(out, places.to(ON), weights.to(ON)).cpu()
    wanted = (wanted_pairs(x, arena, chosen, its, activation) * weights.unsqueeze(-1)).sum(1)
    assert distance(total, wanted) < TOLERANCE


@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[6], FORMATS[9], FORMATS[16]], ids=lambda f: f.name)
@pytest.mark.parametrize("step", some([1 << 23, 7 * 80], [7 * 80]))
def test_products_over_dequantised_tiles_equal_the_reference(
    format: Format, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in tiles that divide nothing."""
    monkeypatch.setattr(products, "TILE", step)
    hidden, inner, tokens = 80, 41, 25
    its, arena, x = layout(hidden, inner, format), arena_of(hidden, inner, format, 2), vectors(tokens, hidden)
    rows, activation = torch.arange(tokens, dtype=torch.int32).flip(0), Activation(gate=swiglu)
    out = torch.full((tokens + 1, hidden), float("nan"), device=ON)
    products.prompt(x.to(ON), arena.to(ON), [(1, 0, tokens)], rows.to(ON), its, activation, out)
    wanted, other = (
        reference.experts(x, [ExpertTask(arena[slot], rows.long())], its, activation)[0] for slot in (1, 0)
    )
    assert distance(out[:tokens].cpu(), wanted) < TOLERANCE and out[tokens].isnan().all()
    assert distance(other, wanted) > 100 * TOLERANCE  # negative control
    first, bias = its[0], torch.randn(its[0].rows)
    packed = first.part(arena[0])
    found = products.linear(x.to(ON), packed.to(ON), first.rows, first.cols, format, bias.to(ON)).cpu()
    assert distance(found, reference.linear(x, packed, first.rows, first.cols, format, bias)) < TOLERANCE


def test_which_prompts_are_products() -> None:
    """A T4's of more than 16 tokens; the interpreter has no matrix units either."""
    if ON == "cpu":
        assert [device.multiplies(count, torch.device("cpu")) for count in (1, 16, 17)] == [True, True, False]


def test_absent_pairs_stay_untouched() -> None:
    its, arena = layout(64, 32, Format.of(4)), arena_of(64, 32, Format.of(4), 2)
    slots = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    out = torch.full((2, 2, 64), float("nan"), device=ON)
    device.pairs(vectors(2, 64).to(ON), arena.to(ON), slots.to(ON), its, "silu_and_mul", out)
    assert out.isnan().all(-1).tolist() == [[False, True], [True, True]]
    total = device.combine(
        out.view(4, 64), torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32, device=ON), torch.ones(2, 2).to(ON)
    )
    assert torch.equal(total[0], out[0, 0]) and not total[1].any()


@given(
    index=st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=1, max_size=5),
    table=st.lists(st.integers(-1, 9), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_lookup(index: "list[list[int]]", table: "list[int]") -> None:
    """6 and −1 are sentinels."""
    chosen, missing = torch.tensor(index), torch.full((1 + 3 * len(index),), 77, dtype=torch.int32)
    missing = missing.pin_memory() if ON == "cuda" else missing
    found = device.lookup(torch.tensor(table, dtype=torch.int32, device=ON), chosen.to(ON), missing).cpu()
    assert found.dtype == torch.int32
    assert found.tolist() == [[table[e] if 0 <= e < 6 else -1 for e in row] for row in index]
    absent = [e if 0 <= e < 6 and table[e] < 0 else -1 for row in index for e in row]
    assert missing.tolist() == [sum(e >= 0 for e in absent), *absent]


def test_what_the_kernels_decline() -> None:
    its = layout(64, 32, Format.of(4))
    assert device.declines(its, Activation(gate=swiglu, kind="silu_and_mul")) == ""
    assert "Python" in device.declines(its, Activation(gate=swiglu))
    assert "norm" in device.declines(its, Activation(gate=swiglu, after=F.relu, kind="silu_and_mul"))
    assert device.describe("meta") == "reference (torch): there is no meta device"
