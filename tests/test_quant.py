"""Float weights to packed records and back: the byte layout, the error, and that both depend on the weights alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import greenroom.quant as quant
from greenroom.errors import ConfigError
from greenroom.quant import DEFAULT_GROUP_SIZE, Format, Layout, dequantize, quantize, quantize_into
from greenroom.quant.bits import pack, unpack
from greenroom.quant.hqq import bound
from greenroom.quant.metadata import RowParams

few = settings(max_examples=40, deadline=None)
narrow = st.builds(lambda bits, group: Format(bits=bits, group_size=group), st.sampled_from((2, 3, 4, 8)),
                   st.sampled_from((16, 32, 64, 128)))  # fmt: skip
shapes = st.tuples(st.integers(1, 9), st.integers(1, 300))


def matrix(rows, cols, seed=0, scale=0.02):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale


def back(packed, W, format, **slices):
    return dequantize(packed, *W.shape, format, **slices)


def test_public_names():
    assert quant.__all__ == [
        "ALIGNMENT", "BITS", "DEFAULT_GROUP_SIZE", "DTYPES", "GROUP_SIZES", "Format", "Layout", "QuantizeReport",
        "balance", "dequantize", "quantize", "quantize_for", "quantize_into",
    ]  # fmt: skip


# --- format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 5, "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 0},
        {"bits": 16, "group_size": 64},
        {"bits": 16, "group_size": 0, "dtype": "float32"},
        {"bits": 4, "group_size": 64, "dtype": "float16"},
        {"bits": True, "group_size": 64},
        {"bits": "4", "group_size": 64},
        {"bits": 4, "group_size": 64.0},
    ],
)
def test_bad_formats_raise(bad):
    with pytest.raises(ConfigError):
        Format(**bad)


def test_format_json_round_trip():
    for bits in DEFAULT_GROUP_SIZE:
        format = Format.of(bits)
        assert Format.from_json(format.to_json()) == format
    with pytest.raises(ConfigError, match="colour"):
        Format.from_json({"bits": 4, "group_size": 64, "colour": 1})
    with pytest.raises(ConfigError, match="group_size"):
        Format.from_json({"bits": 4})
    with pytest.raises(ConfigError):
        Format.of(7)


def test_format_names_and_sizes():
    assert [Format.of(bits).name for bits in (2, 4, 16)] == ["2-bit g16", "4-bit g64", "16-bit bfloat16"]
    assert Format.of(4).bits_per_weight(4096, 4096) == 4 + 16 / 64 + 64 / 4096
    assert Format.of(2).bits_per_weight(4096, 4096) == 2 + 16 / 16 + 64 / 4096
    assert Format.of(16).bits_per_weight(64, 64) == 16
    assert Format.of(4).bits_per_weight(64, 1) > 256  # one column is padded to a block of 64


# --- layout ---------------------------------------------------------------------------------------------------------


@few
@given(narrow, shapes)
def test_parts_are_aligned_and_do_not_overlap(format, shape):
    layout = Layout(*shape, format)
    end = 0
    for start, length in layout.parts().values():
        assert start % 64 == 0 and end <= start < end + 64
        end = start + length
    assert layout.nbytes % 64 == 0 and end <= layout.nbytes < end + 64
    assert layout.padded_cols % 64 == 0 and layout.padded_cols % format.group_size == 0


def test_layout_by_hand():
    layout = Layout(3, 100, Format.of(3))  # two blocks of 24 bytes a row, two groups
    assert layout.parts() == {
        "codes": (0, 144), "scale_codes": (192, 6), "zero_codes": (256, 6), "row_params": (320, 24),
    }  # fmt: skip
    assert layout.nbytes == 384
    assert Layout(2, 5, Format(bits=4, group_size=128)).padded_cols == 128
    assert Layout(3, 5, Format.of(16)).parts() == {"codes": (0, 30)}
    with pytest.raises(ConfigError):
        Layout(0, 5, Format.of(4))
    with pytest.raises(ConfigError, match="384 bytes"):
        layout.view(torch.zeros(383, dtype=torch.uint8), "codes")


def spec_bytes(codes, bits):
    """The bytes of one block of 64 codes, word for word from the format's definition."""
    w = codes
    if bits == 8:
        return list(w)
    if bits == 4:
        return [w[j] | w[j + 32] << 4 for j in range(32)]
    low = [(w[j] & 3) | (w[j + 16] & 3) << 2 | (w[j + 32] & 3) << 4 | (w[j + 48] & 3) << 6 for j in range(16)]
    if bits == 2:
        return low
    return low + list(sum((w[i] >> 2) << i for i in range(64)).to_bytes(8, "little"))


@few
@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_pack_is_the_specified_layout_and_unpack_its_inverse(bits, rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, blocks * 64), generator=generator).to(torch.uint8)
    packed = pack(codes, bits, torch.empty((rows, blocks * 8 * bits), dtype=torch.uint8))
    for row in range(rows):
        for block in range(blocks):
            lanes = codes[row, block * 64 : (block + 1) * 64].tolist()
            found = packed[row, block * 8 * bits : (block + 1) * 8 * bits].tolist()
            assert found == spec_bytes(lanes, bits)
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(unpack(packed, bits, torch.empty_like(codes)), codes)


def test_bit_layouts_by_hand():
    def one(bits, values):
        codes = torch.zeros((1, 64), dtype=torch.uint8)
        for index, value in values.items():
            codes[0, index] = value
        packed = pack(codes, bits, torch.zeros((1, 8 * bits), dtype=torch.uint8))[0].tolist()
        return {at: byte for at, byte in enumerate(packed) if byte}

    assert one(4, {0: 0x5, 32: 0xA, 31: 0x1, 63: 0xF}) == {0: 0xA5, 31: 0xF1}
    assert one(2, {0: 1, 16: 2, 32: 3, 48: 1, 15: 3}) == {0: 0b01_11_10_01, 15: 0b11}
    assert one(3, {0: 0b101, 16: 0b110, 63: 0b100, 9: 0b011}) == {0: 0b10_01, 9: 0b11, 16: 1, 18: 1, 23: 0x80}
    assert one(8, {5: 200}) == {5: 200}


def test_a_record_by_hand():
    format = Format.of(4)
    layout = Layout(1, 64, format)
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.view(packed, "codes")[0, 0] = 0x3C  # weight 0 has code 12, weight 32 has code 3
    layout.view(packed, "scale_codes")[0, 0] = 2
    layout.view(packed, "zero_codes")[0, 0] = 4
    layout.view(packed, "row_params")[0] = torch.tensor([0.5, 0.25, 5.0, 0.5])
    W = dequantize(packed, 1, 64, format)
    assert (W[0, 0], W[0, 32], W[0, 1]) == (12 - 7, 3 - 7, -7)  # scale 1, zero 7


# --- there and back -------------------------------------------------------------------------------------------------


@few
@given(narrow, shapes, st.integers(0, 2**32), st.sampled_from((1e-8, 0.02, 1.0, 1e6)))
def test_error_is_about_a_step(format, shape, seed, scale):
    W = matrix(*shape, seed, scale)
    packed = torch.empty(Layout(*shape, format).nbytes, dtype=torch.uint8)
    report = quantize_into(W, format, packed, report=True)
    assert torch.equal(packed, quantize(W, format))
    D = back(packed, W, format)
    step = (W.amax(1, keepdim=True) - W.amin(1, keepdim=True)).maximum(W.abs().amax(1, keepdim=True)) / format.top
    assert D.shape == W.shape and D.dtype == torch.float32
    # narrowed ranges may clip the largest weights by a third of the range; others are within a step
    assert ((D - W).abs() <= step * max(1.2, 0.4 * format.top)).all()
    assert ((D - W).square().mean(1) <= step[:, 0].square()).all()
    assert report.mse == pytest.approx((D - W).double().square().mean().item(), rel=1e-3, abs=1e-14 * scale**2)
    assert report.mae == pytest.approx((D - W).double().abs().mean().item(), rel=1e-3, abs=1e-7 * scale)
    assert 0 <= report.hqq_share <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_and_zero_matrices(bits):
    format = Format.of(bits)
    zeros = torch.zeros(3, 200)
    assert torch.equal(back(quantize(zeros, format), zeros, format), zeros)
    for value in (1.0, -0.3, 1e-8, -7e4):
        W = torch.full((2, 130), value)
        torch.testing.assert_close(back(quantize(W, format), W, format), W, rtol=1e-4, atol=0)


def relative(packed, W, format, where=slice(None)):
    D = back(packed, W, format)
    return ((D - W)[where].norm() / W[where].norm()).item()


def test_odd_groups_do_not_spoil_their_row():
    format = Format.of(4)
    W = matrix(4, 512)
    plain = relative(quantize(W, format), W, format)
    rest = (slice(None), slice(128, None))
    for odd in (0.0, 0.05, -0.05):
        mixed = W.clone()
        mixed[:, 64:128] = odd
        packed = quantize(mixed, format)
        assert relative(packed, mixed, format, rest) < 1.1 * plain
        error = (back(packed, mixed, format) - mixed)[:, 64:128].abs().max()
        assert error <= 1e-3  # a fifth of the neighbours' step; exact to rounding for 0
    spread = (back(quantize(W, format), W, format) - W).std()
    near = W + 0.1  # five deviations from zero
    assert (back(quantize(near, format), near, format) - near).std() < 1.1 * spread
    far = W + 5.0  # hundreds: the zero point's bound makes the grid coarser than the spread, but not wrong
    assert relative(quantize(far, format), far, format) < 0.01
    wild = W.clone()
    wild[:, :64] *= 1e6
    assert relative(quantize(wild, format), wild, format) < 1.2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_lossless(dtype):
    W = matrix(7, 33).to(dtype)
    format = Format(bits=16, group_size=0, dtype=str(dtype).removeprefix("torch."))
    packed = quantize(W, format)
    assert torch.equal(back(packed, W, format, dtype=dtype), W)
    assert torch.equal(packed[: W.numel() * 2].view(dtype).view(W.shape), W)
    assert quantize_into(W, format, packed, report=True).mse == 0
    assert torch.equal(back(quantize(W.float(), format), W, format, row_start=2, row_end=5), W.float()[2:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_dequantize_rounds_to_the_dtype_asked_for(dtype):
    W, format = matrix(5, 70), Format.of(4)
    packed = quantize(W, format)
    assert torch.equal(back(packed, W, format, dtype=dtype), back(packed, W, format).to(dtype))


def test_low_precision_input_is_taken_as_it_is():
    W = matrix(5, 70).to(torch.bfloat16)
    assert torch.equal(quantize(W, Format.of(4)), quantize(W.float(), Format.of(4)))
    transposed = matrix(70, 5).t()
    assert torch.equal(quantize(transposed, Format.of(4)), quantize(transposed.contiguous(), Format.of(4)))
    assert not quantize(matrix(5, 70).requires_grad_(), Format.of(4)).requires_grad


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_do_not_depend_on_threads_or_chunks(bits, monkeypatch):
    format, W = Format.of(bits), matrix(67, 1100)
    expected = quantize(W, format)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(quantize(W, format), expected)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setitem(quantize.__globals__, "CHUNK", 5000)
    assert torch.equal(quantize(W, format), expected)
    alone = quantize(W[13:14], format)
    for part in Layout(1, 1100, format).parts():
        whole = Layout(67, 1100, format).view(expected, part)[13]
        assert torch.equal(Layout(1, 1100, format).view(alone, part)[0], whole)


@few
@given(narrow, shapes, st.data())
def test_a_slice_is_a_slice(format, shape, data):
    start = data.draw(st.integers(0, shape[0]))
    end = data.draw(st.integers(start, shape[0]))
    W = matrix(*shape)
    packed = quantize(W, format)
    assert torch.equal(back(packed, W, format, row_start=start, row_end=end), back(packed, W, format)[start:end])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_flipped_bit_changes_one_weight(bits):
    format, W = Format.of(bits), matrix(4, 128)
    packed = quantize(W, format)
    before = back(packed, W, format)
    codes = unpack(Layout(4, 128, format).view(packed, "codes"), bits).clone()
    codes[2, 77] ^= 1 << (bits - 1)
    pack(codes, bits, Layout(4, 128, format).view(packed, "codes"))
    assert (back(packed, W, format) != before).nonzero().tolist() == [[2, 77]]


def test_bad_weights_raise():
    format = Format.of(4)
    for bad in (torch.ones(4), torch.ones(4, 4, dtype=torch.int32), torch.ones(0, 4), torch.ones(2, 2, 2)):
        with pytest.raises(ConfigError):
            quantize(bad, format)
    for value in (torch.inf, -torch.inf, torch.nan):
        W = matrix(3, 100)
        W[1, 50] = value
        for bits in (2, 4, 16):
            with pytest.raises(ConfigError, match="finite"):
                quantize(W, Format.of(bits))
    with pytest.raises(ConfigError, match="float16"):
        quantize(torch.full((2, 2), 1e5), Format(bits=16, group_size=0, dtype="float16"))
    with pytest.raises(ConfigError, match="bytes"):
        quantize_into(matrix(3, 100), format, torch.empty(5, dtype=torch.uint8))
    packed = quantize(matrix(3, 100), format)
    for start, end in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ConfigError, match="rows"):
            dequantize(packed, 3, 100, format, row_start=start, row_end=end)


@few
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_row_params_reach_the_whole_row(values):
    row = torch.tensor([values])
    params = RowParams.of(row)
    assert torch.equal(params.minimum, params.minimum.bfloat16().float())
    assert torch.equal(params.step, params.step.bfloat16().float())
    assert params.minimum <= row.min() and params.decode(torch.tensor(255)) >= row.max() - row.abs().max() * 1e-6
    assert (params.decode(params.encode(row)) - row).abs().max() <= params.step * 0.51 + row.abs().max() * 1e-6


# --- against plain HQQ ----------------------------------------------------------------------------------------------


def plain_hqq(W, bits, group_size):
    """HQQ as published, in the weights' own units, with scale and zero kept in float32."""
    groups, top = W.reshape(-1, group_size), 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    s, beta, best = top / (high - low), 10.0, float("inf")
    z = kept = -low * s
    for _ in range(20):
        W_q = (groups * s + z).round().clamp(0, top)
        W_r = (W_q - z) / s
        x = groups - W_r
        if x.abs().mean() >= best:
            break
        best, kept = x.abs().mean(), z
        W_e = x.sign() * (x.abs() - x.abs().clamp(min=1e-12) ** -0.3 / beta).relu()
        z = (W_q - (groups - W_e) * s).mean(1, keepdim=True)
        beta *= 1.01
    W_q = (groups * s + kept).round().clamp(0, top)
    return ((W_q - kept) / s).view_as(W)


@functools.cache
def weights(kind):
    torch.manual_seed(1)
    if kind == "gauss":
        return torch.randn(128, 1024) * 0.02
    law = torch.distributions.Laplace(0.0, 0.05) if kind == "laplace" else torch.distributions.StudentT(3.0)
    return law.sample((128, 1024))


@pytest.mark.parametrize("kind", ["gauss", "laplace", "student-t"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_worse_than_plain_hqq_with_exact_metadata(bits, kind):
    W, format = weights(kind), Format.of(bits)
    ours = (back(quantize(W, format), W, format) - W).double()
    theirs = (plain_hqq(W, bits, format.group_size) - W).double()
    assert ours.square().mean() <= theirs.square().mean()
    assert ours.abs().mean() <= theirs.abs().mean()


def test_the_fast_power_is_close():
    x = torch.logspace(-6, 2, 1000)
    torch.testing.assert_close(bound(x, 3.0, torch.empty_like(x)), x**-0.3 / 3, rtol=0.06, atol=0)
    assert bound(torch.zeros(1), 1.0, torch.empty(1)).isfinite().all()
