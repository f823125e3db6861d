"""The compiled kernels against the reference, which defines the arithmetic, and against themselves."""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES
from greenroom import kernels, seam, threads
from greenroom.kernels import Activation, ExpertTask, dispatch, native, reference
from greenroom.packed import RecordTensor
from greenroom.quant import Format, Layout, dequantize, quantize

EXTENSION = native._native  # None where it is not built
built = pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")

FORMATS = [Format(bits=bits, group_size=group) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128)]
FORMATS += [Format(bits=16, group_size=0, dtype=dtype) for dtype in ("bfloat16", "float16")]
SHAPES = [(1, 48), (3, 80), (17, 576), (5, 1536), (130, 64), (2, 1)]
MANY = 8
"""Vectors from which on another kernel may serve."""
EXACT = 1e-5
"""Of the largest output, or of a row's norm where outputs happen to be small: float32 is summed in another order, and
a weight rounded once where the reference rounds it twice."""
TOLERANCE = 3e-4
"""The same for a whole expert: each of its three products adds the error that `rounding` bounds, 1e-4 of a typical
output for vectors whose largest element is four times the typical one."""


@pytest.fixture(params=EXTENSION.available() if EXTENSION else ["none"])
def isa(request: pytest.FixtureRequest) -> "Iterator[str]":
    """Each instruction set of this machine in turn."""
    if EXTENSION is None:
        pytest.skip("the extension is not built")
    before = EXTENSION.active()
    assert EXTENSION.choose(request.param)
    yield request.param
    EXTENSION.choose(before)


@pytest.fixture
def two_threads() -> "Iterator[None]":
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A weight whose rows and columns differ in size, so that a wrong scale shows."""
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, cols, generator=g) * (1 + torch.arange(rows)).sqrt().unsqueeze(1)
    return (made * torch.linspace(0.5, 2, cols) + 0.3) / cols**0.5


def vectors(count: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(seed))


def distance(found: torch.Tensor, wanted: torch.Tensor, typical: float = 0.0) -> float:
    """The largest difference, as a share of the largest output or of what is `typical`."""
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), typical)


def rounding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What rounding x [n, cols] to 16 bits may change in x times weight [rows, cols], transposed.

    An element is off by up to half a step of its panel's largest over 32639, so the sum's standard deviation is at most
    step · norm / √12; six of those.
    """
    step = x.abs().amax(1, keepdim=True) / 32639
    return 6 * step * weight.norm(dim=1) / 12**0.5


def record(
    hidden: int, inner: int, format: Format, seed: int, gated: bool = True, biased: bool = False
) -> torch.Tensor:
    parts = [quantize(weight((2 if gated else 1) * inner, hidden, seed), format)]
    parts += [quantize(weight(hidden, inner, seed + 100), format)]
    if biased:
        parts += [quantize(weight(1, t.cols, seed), t.format) for t in layout(hidden, inner, format, gated, True)[2:]]
    return torch.cat(parts)


def layout(hidden: int, inner: int, format: Format, gated: bool = True, biased: bool = False) -> "list[RecordTensor]":
    plain = Format(bits=16, group_size=0)
    wide = 2 * inner if gated else inner
    shapes = [("gate_up_proj", wide, hidden, format), ("down_proj", hidden, inner, format)]
    if biased:
        shapes += [("gate_up_proj_bias", 1, wide, plain), ("down_proj_bias", 1, hidden, plain)]
    tensors, offset = [], 0
    for name, rows, cols, its in shapes:
        tensors.append(RecordTensor(name=name, rows=rows, cols=cols, offset=offset, format=its))
        offset += tensors[-1].nbytes
    return tensors


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


SWIGLU = Activation(gate=swiglu, kind="silu_and_mul")


def tasks_of(records: "Sequence[torch.Tensor]", rows: "Sequence[Sequence[int]]") -> "list[ExpertTask]":
    return [ExpertTask(one, torch.tensor(its, dtype=torch.int64)) for one, its in zip(records, rows, strict=True)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_linear_equals_the_reference(isa: str, format: Format) -> None:
    for rows, cols in SHAPES:
        packed, bias = quantize(weight(rows, cols), format), torch.linspace(-1, 1, rows)
        typical = float(weight(rows, cols).norm(dim=1).max())  # of outputs for vectors of random numbers
        whole = dequantize(packed, rows, cols, format)
        for count in (1, 2, 3, 4, 5, 8, 11, 16, 32, 40):
            x = vectors(count, cols)
            for added in (None, bias):
                found = native.linear(x, packed, rows, cols, format, added)
                if found is None:
                    assert count > 32
                    continue
                wanted = reference.linear(x, packed, rows, cols, format, added)
                exact = EXACT * max(float(wanted.abs().max()), typical)
                assert bool(((found - wanted).abs() <= rounding(x, whole) + exact).all())


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_one_code_bit_changes_one_row(isa: str, format: Format) -> None:
    """Negative control: the comparison above sees every row, and no row reads its neighbour."""
    rows, cols = 17, 576
    packed, x = quantize(weight(rows, cols), format), vectors(1, cols)
    before = native.linear(x, packed, rows, cols, format)
    stride = Layout(rows, cols, format).code_row_bytes
    for row in (0, 5, 16):
        changed = packed.clone()
        changed[row * stride + 3] ^= 1
        after = native.linear(x, changed, rows, cols, format)
        assert before is not None and after is not None
        assert (before != after)[0].nonzero().flatten().tolist() == [row]
        assert distance(after, reference.linear(x, changed, rows, cols, format)) < TOLERANCE


@built
def test_every_float16_is_the_same(isa: str) -> None:
    """All finite values: subnormals and both zeros too."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    values = values[values.isfinite()].view(-1, 64)
    format = Format(bits=16, group_size=0, dtype="float16")
    packed = quantize(values, format)
    for column in (0, 13, 63):
        x = torch.zeros(1, 64)
        x[0, column] = 1.0
        found = native.linear(x, packed, len(values), 64, format)
        assert found is not None and torch.equal(found[0], values[:, column].float())


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_padding_is_never_read_as_weights(isa: str, format: Format) -> None:
    rows, cols = 3, 80
    if format.bits == 16:
        return
    its, packed, x = Layout(rows, cols, format), quantize(weight(rows, cols), format), vectors(2, cols)
    before = native.linear(x, packed, rows, cols, format)
    ends = [start + length for start, length in its.parts().values()]
    starts = [*(start for start, _ in its.parts().values()), its.nbytes][1:]
    for end, start in zip(ends, starts, strict=True):
        packed[end:start] = 255
    block = its.view(packed, "codes")[:, 8 * format.bits :]
    if format.bits == 8:
        block[:, cols - 64 :] = 255  # the second block's columns beyond 80
    after = native.linear(x, packed, rows, cols, format)
    assert before is not None and after is not None and torch.equal(before, after)


@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[5], FORMATS[9], FORMATS[14], FORMATS[16]], ids=lambda f: f.name)
@pytest.mark.parametrize("most,counts", [(MANY - 1, (1, 2, 3, 5)), (32, (MANY, 13, 18, 31))])
def test_a_vector_alone_and_in_a_batch(
    isa: str, format: Format, most: int, counts: "tuple[int, ...]", two_threads: None
) -> None:
    """Few vectors and many may be computed by different kernels; within each, a vector's bits are its own."""
    rows, cols = 301, 1040
    packed, x = quantize(weight(rows, cols), format), vectors(most, cols)
    whole = native.linear(x, packed, rows, cols, format)
    assert whole is not None
    for count in counts:
        for start in range(0, most - count + 1, 3):
            part = native.linear(x[start : start + count], packed, rows, cols, format)
            assert part is not None and torch.equal(part, whole[start : start + count])
    torch.set_num_threads(1)
    alone = native.linear(x, packed, rows, cols, format)
    assert alone is not None and torch.equal(alone, whole)


@pytest.mark.parametrize("format", FORMATS[:16], ids=lambda format: format.name)
def test_many_vectors_that_end_anywhere(isa: str, format: Format) -> None:
    """Rows that fill no tile and columns that fill no panel, for every size of a tile; a wrong column shows."""
    for rows, cols in ((33, 520), (1, 1000), (70, 513), (31, 16)):
        packed = quantize(weight(rows, cols), format)
        whole = dequantize(packed, rows, cols, format)
        for count in (*range(MANY, 14), 33, 129):
            x = vectors(count, cols)
            found = native.linear(x, packed, rows, cols, format)
            if found is None:
                assert isa not in ("avx512vnni", "avxvnni") and count > 32
                continue
            wanted = reference.linear(x, packed, rows, cols, format)
            allowed = rounding(x, whole) + EXACT * max(float(wanted.abs().max()), float(whole.norm(dim=1).max()))
            assert bool(((found - wanted).abs() <= allowed).all())
            x[:, -1] += 0.1  # negative control
            control = reference.linear(x, packed, rows, cols, format)
            assert not bool(((found - control).abs() <= allowed).all())


@pytest.mark.parametrize("hidden,inner", [(64, 32), (80, 56), (96, 1040)])
@pytest.mark.parametrize("format", [FORMATS[9], FORMATS[0], FORMATS[12], FORMATS[16]], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", ["silu_and_mul", "", "silu"])
def test_experts_equal_the_reference(isa: str, kind: str, format: Format, hidden: int, inner: int) -> None:
    gated = kind != "silu"
    activation = Activation(gate=swiglu if gated else F.silu, kind=kind)
    records = [record(hidden, inner, format, seed, gated) for seed in range(3)]
    tasks = tasks_of(records, [[0], [2, 0, 3], [1, 1, 2, 3, 0]])
    x, its = vectors(4, hidden), layout(hidden, inner, format, gated)
    found = native.experts(x, tasks, its, activation)
    for one, wanted in zip(found, reference.experts(x, tasks, its, activation), strict=True):
        assert distance(one, wanted) < TOLERANCE
    swapped = native.experts(x, tasks[::-1], its, activation)  # negative control
    assert distance(swapped[0][:1], found[0]) > 100 * TOLERANCE
    for one, other in zip(found, swapped[::-1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", FORMATS[:16], ids=lambda format: format.name)
def test_activations_in_8_bits(isa: str, format: Format) -> None:
    """Near what 16 bits give and not the same, beside weights of 4 bits or fewer; for fewer rows than MANY the same."""
    hidden, inner = 320, 208
    its, x = layout(hidden, inner, format), vectors(40, hidden)
    records = [record(hidden, inner, format, seed) for seed in range(3)]
    tasks = tasks_of(records, [list(range(40)), [1, 5, 2], list(range(30, 30 + MANY))])
    exact, rough = (native.experts(x, tasks, its, SWIGLU, rough) for rough in (False, True))
    assert torch.equal(rough[1], exact[1])
    for one, near in ((rough[0], exact[0]), (rough[2], exact[2])):
        error = float((one - near).norm() / near.norm())
        if isa == "portable" or format.bits == 8:
            assert error == 0.0
        else:
            assert TOLERANCE < error < 2e-2  # two roundings of 0.6 % each, some amplified by the gate
    for task, one in zip(tasks, rough, strict=True):
        assert torch.equal(native.experts(x, [task], its, SWIGLU, True)[0], one)


def test_biases_and_a_norm_after(isa: str) -> None:
    format = FORMATS[9]
    its = layout(96, 80, format, biased=True)
    tasks = tasks_of([record(96, 80, format, seed, biased=True) for seed in range(2)], [[0], [1, 0]])
    activation = dataclasses.replace(SWIGLU, after=lambda out: out / out.norm(dim=-1, keepdim=True))
    x = vectors(2, 96)
    for layouts in (its, its[:2]):
        pairs = zip(
            native.experts(x, tasks, layouts, activation), reference.experts(x, tasks, layouts, activation), strict=True
        )
        assert all(distance(found, wanted) < TOLERANCE for found, wanted in pairs)


def test_a_task_alone_and_among_others(isa: str, two_threads: None) -> None:
    hidden, inner, format = 320, 208, FORMATS[9]
    records, its = [record(hidden, inner, format, seed) for seed in range(5)], layout(hidden, inner, format)
    x = vectors(40, hidden)
    tasks = tasks_of(records, [[0], list(range(33)), [3, 0, 7], list(range(32)), [39]])
    together = kernels.experts(x, tasks, its, SWIGLU)
    for count in (2, 1):
        torch.set_num_threads(count)
        for task, wanted in zip(tasks, together, strict=True):
            assert torch.equal(kernels.experts(x, [task], its, SWIGLU)[0], wanted)
    for number, rows, places in ((2, [7], [2]), (3, list(range(3, 3 + MANY)), list(range(3, 3 + MANY)))):
        part = native.experts(x, tasks_of([records[number]], [rows]), its, SWIGLU)[0]
        assert torch.equal(part, together[number][places])


@built
def test_what_the_kernels_decline() -> None:
    format, packed, x = FORMATS[9], quantize(weight(8, 64), FORMATS[9]), vectors(2, 64)
    assert native.linear(x, packed, 8, 64, format) is not None
    assert native.linear(x.to(torch.bfloat16), packed, 8, 64, format) is None
    assert native.linear(x.requires_grad_(), packed, 8, 64, format) is None
    with torch.no_grad():
        assert native.linear(x, packed, 8, 64, format) is not None
    assert dispatch.linear(x, packed, 8, 64, format).requires_grad
    strided = vectors(64, 2).t()
    found = native.linear(strided, packed, 8, 64, format)
    assert found is not None and torch.equal(found, native.linear(strided.contiguous(), packed, 8, 64, format))


def test_a_linear_on_a_device_without_kernels_of_its_own_is_the_references() -> None:
    """As on a GPU that is too old for them, or without Triton; a meta tensor is on no device that they serve."""
    format = Format.of(4)
    packed = torch.empty(Layout(8, 64, format).nbytes, dtype=torch.uint8, device="meta")
    for vectors in (1, 40):
        out = dispatch.linear(torch.empty(vectors, 64, dtype=torch.float16, device="meta"), packed, 8, 64, format)
        assert (out.shape, out.dtype, out.device.type) == ((vectors, 8), torch.float16, "meta")


@built
def test_sizes_are_checked() -> None:
    format, x = FORMATS[9], vectors(1, 64)
    with pytest.raises(ValueError, match="another size"):
        native.linear(x, quantize(weight(9, 64), format), 8, 64, format)
    its = layout(64, 32, format)
    made = record(64, 32, format, 0)
    for row in (-1, 1):
        with pytest.raises(ValueError, match="a row"):
            native.experts(x, tasks_of([made], [[row]]), its, SWIGLU)
    with pytest.raises(ValueError, match="beyond the record"):
        native.experts(x, tasks_of([made[:-64]], [[0]]), its, SWIGLU)


@built
def test_callers_at_the_same_time(two_threads: None) -> None:
    format = FORMATS[9]
    packed, x = quantize(weight(600, 640), format), vectors(4, 640)
    wanted = native.linear(x, packed, 600, 640, format)
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(200):
            found = native.linear(x, packed, 600, 640, format)
            if wanted is None or found is None or not torch.equal(found, wanted):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def python(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


COMPUTE = """
import os, torch
from greenroom.kernels import describe, native
from greenroom.quant import Format, quantize
torch.set_num_threads(2)
format = Format.of(4)
packed, x = quantize(torch.randn(900, 640), format), torch.randn(1, 640)
wanted = native.linear(x, packed, 900, 640, format)
"""


@built
def test_a_forked_child_computes_and_both_exit() -> None:
    program = COMPUTE + (
        "child = os.fork()\n"
        "same = torch.equal(native.linear(x, packed, 900, 640, format), wanted)\n"
        "if child == 0: os._exit(0 if same else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)"
    )
    done = python(program)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "True"]), done.stderr


@built
@pytest.mark.slow
def test_the_instruction_set_can_be_named() -> None:
    assert EXTENSION is not None
    for name in EXTENSION.available():
        done = python(COMPUTE + f"assert native._native.active() == {name!r}; print(describe())", GREENROOM_ISA=name)
        assert done.returncode == 0 and done.stdout.startswith("native ("), done.stderr
        assert "2 threads" in done.stdout
    refused = python("from greenroom.kernels import describe; describe()", GREENROOM_ISA="sse9")
    assert refused.returncode == 1 and "ConfigError: GREENROOM_ISA=sse9: this machine runs" in refused.stderr


def test_none_asks_for_the_reference() -> None:
    done = python(COMPUTE + "assert wanted is None; print(describe())", GREENROOM_ISA="none")
    assert done.returncode == 0 and done.stdout.startswith("reference (torch): "), done.stderr


def test_without_the_extension_the_reference_serves() -> None:
    program = (
        "import sys; sys.modules['greenroom.kernels._native'] = None\n" + COMPUTE + "assert wanted is None\n"
        "from greenroom import kernels\n"
        "assert kernels.linear(x, packed, 900, 640, format).shape == (1, 900)\n"
        "print(describe())"
    )
    done = python(program, GREENROOM_ISA="")
    assert done.stdout.strip() == "reference (torch): the extension is not built", done.stderr


def test_bfloat16_is_the_references() -> None:
    assert kernels.describe(torch.bfloat16).startswith("reference (torch): ")


GATES = {
    "mixtral": "silu_and_mul",
    "qwen3_moe": "silu_and_mul",
    "lfm2_moe": "silu_and_mul",
    "gemma4": "gelu_tanh_and_mul",
    "nemotron_h": "relu2",
    "gpt_oss": "swigluoai_interleaved:1.702:1.0",
    "openai_privacy_filter": "swigluoai:1.702:1.0",
    "minimax_m3_vl": "swigluoai:1.702:1.0",
    "deepseek_v4": "clamped_silu_and_mul:1.0",
    "hy_v4": "clamped_silu_and_mul:1.0",
    "glm5_next": "clamped_silu_and_mul:1.0",
    "inkling2": "",
    "beam": "",
}


@pytest.mark.parametrize("family", GATES)
def test_a_familys_gate_is_what_is_compiled(family: str) -> None:
    """On every kernel, against the family's own code; a clamp that does nothing or a wrong half would show."""
    model = FAMILIES[family].build()
    module = model.get_submodule(seam.experts_modules(model)[0].name)
    kind = seam.activation_kind(module)
    assert kind == GATES[family]
    if kind and EXTENSION is not None:
        gate = module._apply_gate if module.has_gate else module.act_fn
        compare_gates(Activation(gate=gate, kind=kind), gated=module.has_gate)
    if hasattr(module, "act_fn") and isinstance(module.act_fn, torch.nn.Module):
        module.act_fn.register_forward_hook(lambda *_: None)
        assert seam.activation_kind(module) == ""


def compare_gates(activation: Activation, gated: bool) -> None:
    """An expert whose first product spreads over [-6, 6], computed by the kernels and by the reference."""
    hidden, inner, format = 64, 80, Format(bits=8, group_size=32)
    its = layout(hidden, inner, format, gated, biased=True)
    tasks = tasks_of([record(hidden, inner, format, 0, gated, biased=True)], [[0, 1, 2]])
    x = 2 * vectors(3, hidden)
    wanted = reference.experts(x, tasks, its, activation)[0]
    before = EXTENSION.active()
    for isa in EXTENSION.available():
        EXTENSION.choose(isa)
        found = native.experts(x, tasks, its, activation)[0]
        assert distance(found, wanted) < TOLERANCE
    EXTENSION.choose(before)
    other = Activation(gate=lambda x: activation.gate(x) * (1 + 1e-2 * x[..., :inner].sign()))  # negative control
    assert distance(reference.experts(x, tasks, its, other)[0], wanted) > 3 * TOLERANCE


@built
@pytest.mark.parametrize("name", native.FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_function_with_and_without_a_gate(name: str, gated: bool) -> None:
    function = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }[name]
    if gated:
        compare_gates(Activation(gate=lambda x: function(x[:, :80]) * x[:, 80:], kind=f"{name}_and_mul"), gated)
    else:
        compare_gates(Activation(gate=function, kind=name), gated)


@pytest.mark.parametrize("width", [3, 512, 1300])
def test_weighted_rows_are_added_in_their_order(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits as one by one, though a row comes twice, and for any number of threads."""
    out, x, weights = torch.randn(9, width), torch.randn(60, width), torch.randn(60, 1)
    rows = torch.randint(0, 9, (60,))
    want = out.clone()
    for row, one in zip(rows.tolist(), x * weights, strict=True):
        want[row] += one
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "_ours", count)
        got = out.clone()
        assert native.add_weighted(got, x, rows, weights)
        assert torch.equal(got, want)
    got = out.clone()
    assert native.add_weighted(got, x.flip(0), rows, weights)
    assert not torch.equal(got, want)
    assert not native.add_weighted(got.double(), x.double(), rows, weights.double())
    with pytest.raises(ValueError, match="row"):
        native.add_weighted(got, x, rows + 1, weights)
