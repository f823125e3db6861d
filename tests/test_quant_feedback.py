"""Codes for the inputs that a matrix gets: never worse than the nearest ones, and what the formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.errors import ConfigError
from greenroom.quant import Format, Layout, dequantize, feedback, quantize, quantize_for
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


def calibrated(
    weight: torch.Tensor, format: Format, inputs: torch.Tensor, prior: "torch.Tensor | None" = None
) -> torch.Tensor:
    packed = torch.empty(Layout(*weight.shape, format).nbytes, dtype=torch.uint8)
    quantize_for(weight, format, packed, inputs, prior)
    return packed


def nearest(weight: torch.Tensor, format: Format, packed: torch.Tensor) -> torch.Tensor:
    """The codes nearest to the weights on the grids of `packed`, int [rows, cols]."""
    scale, zero = spread_grids(weight, format, packed)
    return (weight / scale + zero).round().clamp(0, format.top).long()


def spread_grids(weight: torch.Tensor, format: Format, packed: torch.Tensor) -> "list[torch.Tensor]":
    """Scale and zero of each weight, [rows, cols]."""
    found = grids(packed, Layout(*weight.shape, format), 0, len(weight))
    return [grid.repeat_interleave(format.group_size, 1)[:, : weight.shape[1]] for grid in found]


def codes_of(weight: torch.Tensor, format: Format, packed: torch.Tensor) -> torch.Tensor:
    codes = bitpack.unpack(Layout(*weight.shape, format).view(packed, "codes"), format.bits)
    return codes[:, : weight.shape[1]].long()


@pytest.mark.parametrize(
    "rows,cols,format", [(24, 96, Format.of(4)), (40, 200, Format.of(3, 32)), (16, 130, Format.of(2))], ids=str
)
def test_outputs_are_nearer_than_with_the_nearest_codes(rows: int, cols: int, format: Format) -> None:
    """On inputs that it was not chosen for, too; control: inputs of other columns do harm."""
    weight, both = matrix(rows, cols), correlated(4 * cols, cols)
    seen, unseen = both[: 2 * cols], both[2 * cols :]
    plain = error(weight, quantize(weight, format), format, unseen)
    assert error(weight, calibrated(weight, format, seen), format, unseen) < 0.8 * plain
    assert error(weight, calibrated(weight, format, seen.roll(1, dims=1)), format, unseen) > plain


def test_grids_suit_what_columns_are_given() -> None:
    """Without correlation, where codes are nearly the nearest ones; control: as if columns were given alike."""
    weight, format, loud = matrix(64, 128), Format.of(3), torch.ones(128)
    loud[::16] = 20
    alike = torch.randn(4000, 128, generator=torch.Generator().manual_seed(2))
    plain = error(weight, quantize(weight, format), format, alike * loud)
    assert error(weight, calibrated(weight, format, alike * loud), format, alike * loud) < 0.7 * plain
    assert error(weight, calibrated(weight, format, alike), format, alike * loud) > 0.9 * plain


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 150),
    format=st.sampled_from([Format.of(2), Format.of(2, 64), Format.of(3), Format.of(4, 32), Format.of(4, 128)]),
    count=st.integers(0, 40),
    silent=st.booleans(),
)
def test_any_shape_and_inputs_give_a_record(rows: int, cols: int, format: Format, count: int, silent: bool) -> None:
    """Also where a column is never given anything; nothing in it depends on what was in the buffer."""
    weight, inputs = matrix(rows, cols), correlated(count, cols)
    if silent:
        inputs[:, : cols // 2] = 0
    packed = calibrated(weight, format, inputs)
    again = torch.full_like(packed, 255)
    quantize_for(weight, format, again, inputs)
    assert torch.equal(packed, again)
    step = spread_grids(weight, format, packed)[0]
    assert float((dequantize(packed, rows, cols, format) - weight).abs().max()) < 40 * float(step.max())


@pytest.mark.parametrize("inputs", [torch.zeros(0, 96), torch.zeros(5, 96)], ids=["none", "zeros"])
def test_without_inputs_codes_are_the_nearest(inputs: torch.Tensor) -> None:
    weight, format = matrix(12, 96), Format.of(3)
    packed = calibrated(weight, format, inputs)
    assert torch.equal(codes_of(weight, format, packed), nearest(weight, format, packed))
    other = calibrated(weight, format, correlated(50, 96))
    assert not torch.equal(codes_of(weight, format, other), nearest(weight, format, other)), "control"


def by_definition(
    weight: torch.Tensor, format: Format, inputs: torch.Tensor, block: int, packed: torch.Tensor
) -> torch.Tensor:
    """Codes, int [rows, cols], on the grids of `packed`: one column after the other, the rest of its block at the
    least squares left to it."""
    scale, zero = (grid.double() for grid in spread_grids(weight, format, packed))
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
    monkeypatch.setattr(feedback, "BLOCK", block)
    monkeypatch.setattr(feedback, "_STEP", 40)
    monkeypatch.setattr(feedback, "_CHUNK", 1000)
    packed = calibrated(weight, format, inputs)
    found = codes_of(weight, format, packed)
    assert (found == by_definition(weight, format, inputs, block, packed)).float().mean() > 0.998
    monkeypatch.setattr(feedback, "DAMPING", 1.0)
    assert (found == by_definition(weight, format, inputs, block, packed)).float().mean() < 0.99


def test_a_prior_is_as_good_as_its_inputs() -> None:
    weight, format, inputs = matrix(12, 96), Format.of(3), correlated(300, 96)
    packed = calibrated(weight, format, inputs[:100], inputs[100:].T @ inputs[100:])
    together, fewer = calibrated(weight, format, inputs), calibrated(weight, format, inputs[:100])
    codes = [dequantize(one, 12, 96, format) for one in (packed, together, fewer)]
    assert (codes[0] == codes[1]).float().mean() > 0.998
    assert (codes[0] == codes[2]).float().mean() < 0.99, "control"


def test_singular_moments_are_damped_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five inputs for 96 columns without damping, and inputs that one direction nearly is all of."""
    weight, format, inputs = matrix(12, 96), Format.of(3), correlated(300, 96)
    monkeypatch.setattr(feedback, "DAMPING", 0.0)
    few = dequantize(calibrated(weight, format, inputs[:5]), 12, 96, format)
    assert error(weight, calibrated(weight, format, inputs[:5]), format, inputs[:5]) < 0.2 and few.isfinite().all()
    monkeypatch.undo()
    loud = inputs + 3e5 * torch.randn(300, 1, generator=torch.Generator().manual_seed(3))
    assert error(weight, calibrated(weight, format, loud), format, loud) < 0.2


def test_what_cannot_be_is_refused() -> None:
    weight = matrix(4, 64)
    with pytest.raises(ConfigError, match="16-bit"):
        calibrated(weight, Format.of(16), torch.zeros(0, 64))
    with pytest.raises(ConfigError, match="inputs have values that are not finite"):
        calibrated(weight, Format.of(4), torch.full((3, 64), float("nan")))
    with pytest.raises(ConfigError, match="weight has values that are not finite"):
        calibrated(torch.full((4, 64), float("nan")), Format.of(4), correlated(3, 64))
