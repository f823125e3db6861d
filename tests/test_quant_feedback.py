"""Codes for the inputs that a matrix gets: never worse than the nearest ones, and what the formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.errors import ConfigError
from greenroom.quant import Format, Layout, dequantize, feedback, quantize, recode
from greenroom.quant import bits as bitpack
from greenroom.quant.quantize import grids


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(count: int, cols: int, seed: int = 1) -> torch.Tensor:
    """Inputs of which a quarter as many numbers as there are columns decide nearly all."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, max(1, cols // 4), generator=generator)
    mix = torch.randn(factors.shape[1], cols, generator=generator)
    return factors @ mix + 0.3 * torch.randn(count, cols, generator=generator)


def error(weight: torch.Tensor, packed: torch.Tensor, format: Format, inputs: torch.Tensor) -> float:
    difference = dequantize(packed, *weight.shape, format) - weight
    return float((inputs @ difference.T).norm() / (inputs @ weight.T).norm())


def recoded(weight: torch.Tensor, format: Format, inputs: torch.Tensor) -> torch.Tensor:
    packed = quantize(weight, format)
    recode(weight, format, packed, inputs)
    return packed


@pytest.mark.parametrize(
    "rows,cols,format", [(24, 96, Format.of(4)), (40, 200, Format.of(3, 32)), (16, 130, Format.of(2))], ids=str
)
def test_outputs_are_nearer_than_with_the_nearest_codes(rows: int, cols: int, format: Format) -> None:
    """On inputs that it was not chosen for, too; control: inputs of other columns do harm."""
    weight, both = matrix(rows, cols), correlated(4 * cols, cols)
    seen, unseen = both[: 2 * cols], both[2 * cols :]
    nearest = error(weight, quantize(weight, format), format, unseen)
    assert error(weight, recoded(weight, format, seen), format, unseen) < 0.8 * nearest
    assert error(weight, recoded(weight, format, seen.roll(1, dims=1)), format, unseen) > nearest


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 150),
    format=st.sampled_from([Format.of(2), Format.of(2, 64), Format.of(3), Format.of(4, 32), Format.of(4, 128)]),
    count=st.integers(0, 40),
)
def test_grids_and_padding_stay(rows: int, cols: int, format: Format, count: int) -> None:
    weight = matrix(rows, cols)
    layout, nearest = Layout(rows, cols, format), quantize(weight, format)
    packed = recoded(weight, format, correlated(count, cols))
    codes = layout.parts()["codes"][1]
    assert torch.equal(packed[codes:], nearest[codes:])
    unpacked = [bitpack.unpack(layout.view(one, "codes"), format.bits)[:, cols:] for one in (packed, nearest)]
    assert torch.equal(*unpacked)


@pytest.mark.parametrize("inputs", [torch.zeros(0, 96), torch.zeros(5, 96)], ids=["none", "zeros"])
def test_without_inputs_codes_are_the_nearest(inputs: torch.Tensor) -> None:
    weight = matrix(12, 96)
    assert torch.equal(recoded(weight, Format.of(3), inputs), quantize(weight, Format.of(3)))
    assert not torch.equal(recoded(weight, Format.of(3), correlated(50, 96)), quantize(weight, Format.of(3)))


def by_definition(weight: torch.Tensor, format: Format, inputs: torch.Tensor, block: int) -> torch.Tensor:
    """Codes, int [rows, cols]: one column after the other, the rest of its block at the least squares left to it."""
    packed, layout = quantize(weight, format), Layout(*weight.shape, format)
    scale, zero = (
        grid.double().repeat_interleave(format.group_size, 1) for grid in grids(packed, layout, 0, len(weight))
    )
    codes, wrong = torch.zeros(weight.shape, dtype=torch.int64), torch.zeros(weight.shape).double()
    for start in range(0, weight.shape[1], block):
        moments = (inputs[:, start : start + block].T @ inputs[:, start : start + block]).double()
        moments.diagonal().add_(feedback.DAMPING * moments.diagonal().mean())
        order = moments.diagonal().argsort(descending=True, stable=True)
        for done, column in enumerate((start + order).tolist()):
            fixed, left = order[:done], order[done:]
            pull = moments[left][:, fixed] @ wrong[:, start + fixed].T
            wanted = weight[:, column].double() - torch.linalg.solve(moments[left][:, left], pull)[0]
            codes[:, column] = (wanted / scale[:, column] + zero[:, column]).round().clamp(0, format.top)
            wrong[:, column] = (codes[:, column] - zero[:, column]) * scale[:, column] - weight[:, column].double()
    return codes


@pytest.mark.parametrize("block", [128, 64])
def test_it_is_what_the_formula_says(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks, steps and chunks are smaller than the matrix; control: with other damping it is not."""
    weight, format, inputs = matrix(30, 128), Format.of(3), correlated(200, 128)
    expected = by_definition(weight, format, inputs, block)

    def share() -> float:
        codes = Layout(30, 128, format).view(recoded(weight, format, inputs), "codes")
        return float((bitpack.unpack(codes, 3) == expected).float().mean())

    monkeypatch.setattr(feedback, "BLOCK", block)
    monkeypatch.setattr(feedback, "_STEP", 40)
    monkeypatch.setattr(feedback, "_CHUNK", 1000)
    assert share() > 0.998
    monkeypatch.setattr(feedback, "DAMPING", 1.0)
    assert share() < 0.99


def test_a_prior_is_as_good_as_its_inputs() -> None:
    weight, format, inputs = matrix(12, 96), Format.of(3), correlated(300, 96)
    packed, prior = quantize(weight, format), inputs[100:].T @ inputs[100:]
    recode(weight, format, packed, inputs[:100], prior)
    codes = [
        dequantize(one, 12, 96, format)
        for one in (packed, recoded(weight, format, inputs), recoded(weight, format, inputs[:100]))
    ]
    assert (codes[0] == codes[1]).float().mean() > 0.998
    assert (codes[0] == codes[2]).float().mean() < 0.99, "control"


def test_what_cannot_be_is_refused() -> None:
    weight = matrix(4, 64)
    with pytest.raises(ConfigError, match="16-bit"):
        recode(weight, Format.of(16), quantize(weight, Format.of(16)), torch.zeros(0, 64))
    with pytest.raises(ConfigError, match="not finite"):
        recoded(weight, Format.of(4), torch.full((3, 64), float("nan")))
