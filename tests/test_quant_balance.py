"""Column scales: what the scaled MLP computes is the same, and its second matrix is easier to quantise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.errors import ConfigError
from greenroom.quant import Format, balance, dequantize, quantize
from greenroom.quant.balance import column_scales


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, cols: int, seed: int, spread: float = 0.7) -> torch.Tensor:
    """Columns and rows of different sizes."""
    columns, sides = normal(cols, seed=seed + 1) * spread, normal(rows, 1, seed=seed + 2) * spread
    return normal(rows, cols, seed=seed) * columns.exp() * sides.exp()


def mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def error(weight: torch.Tensor, scales: torch.Tensor, format: Format) -> float:
    """Of the quantised weight / scales, in those units."""
    scaled = weight / scales
    return float((dequantize(quantize(scaled, format), *weight.shape, format) - scaled).square().sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(64, 64), (48, 128), (100, 70)]), st.sampled_from([2, 3, 4, 8]))
def test_the_balanced_mlp_computes_the_same(seed: int, shape: "tuple[int, int]", bits: int) -> None:
    hidden, inner = shape
    gate, up, down = normal(inner, hidden, seed=seed), normal(inner, hidden, seed=seed + 1), uneven(hidden, inner, seed)
    x = normal(5, hidden, seed=seed + 5).double()
    new_up, new_down = balance(up, down, Format.of(bits))
    want = mlp(gate.double(), up.double(), down.double(), x)
    got = mlp(gate.double(), new_up.double(), new_down.double(), x)
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert not torch.equal(new_down, down), "control: nothing was scaled"
    half = mlp(gate.double(), up.double(), new_down.double(), x)
    assert float((half - want).norm() / want.norm()) > 0.1, "control: one matrix alone is another MLP"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(20, 90), st.integers(20, 90))
def test_columns_come_out_alike(seed: int, rows: int, cols: int) -> None:
    weight = uneven(rows, cols, seed)
    scaled = weight / column_scales(weight)
    sides = scaled.std(1, correction=0, keepdim=True)
    spread = (scaled / sides).std(0, correction=0)
    before = (weight / weight.std(1, correction=0, keepdim=True)).std(0, correction=0)
    assert float(spread.max() / spread.min()) < 1.1 < float(before.max() / before.min())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_scales_do_not_depend_on_rows_sizes(seed: int, factor: float) -> None:
    """But for what the rounds leave, and the means that deviations leave out."""
    weight = uneven(60, 80, seed)
    scales = column_scales(weight)
    assert float(scales.log().mean().abs()) < 1e-5
    other = column_scales(weight * torch.linspace(1, factor, 60)[:, None])
    assert float((other / scales).log().std()) < 0.03 < float(scales.log().std())
    once = weight.std(0)
    again = (weight * torch.linspace(1, factor, 60)[:, None]).std(0)
    assert abs(factor - 1) < 5 or float((again / once).log().std()) > 0.03, "control: plain deviations do"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_small_columns_are_met_better(bits: int) -> None:
    """In the balanced units, in which every column counts alike: the error of the plain matrix, and of the scaled."""
    down, format = uneven(96, 256, 3), Format.of(bits)
    scales = column_scales(down)
    plain = (dequantize(quantize(down, format), 96, 256, format) - down) / scales
    assert error(down, scales, format) < 0.8 * float(plain.square().sum())


def test_weights_on_a_grid_of_their_own_are_left_alone() -> None:
    """Blocks of 32 on 16 levels, as they come out of a 4-bit file: groups of 32 meet them, until they are scaled."""
    codes = torch.randint(0, 16, (96, 8, 32), generator=torch.Generator().manual_seed(1)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    down = ((codes - 7.5) * normal(96, 8, 1, seed=2).exp()).view(96, 256)
    up = normal(256, 64, seed=4)
    same_up, same_down = balance(up, down, Format.of(4, 32))
    assert torch.equal(same_up, up) and torch.equal(same_down, down)
    _, coarser = balance(up, down * uneven(1, 256, 7).sign() * normal(256, seed=8).exp(), Format.of(2))
    assert not torch.equal(coarser, down), "control"


@pytest.mark.parametrize("weight", [torch.zeros(32, 64), torch.eye(64), normal(64, 64) * (torch.arange(64) > 3)])
def test_empty_columns_do_no_harm(weight: torch.Tensor) -> None:
    scales = column_scales(weight)
    assert bool(scales.isfinite().all()) and bool((scales > 0).all())
    up, down = balance(normal(64, 32), weight, Format.of(4))
    assert bool(up.isfinite().all()) and bool(down.isfinite().all())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_left_for_quantize_to_refuse(wrong: float) -> None:
    up, down = normal(64, 32), uneven(32, 64, 1)
    down[3, 4] = wrong
    assert torch.equal(balance(up, down, Format.of(4))[0], up)
    with pytest.raises(ConfigError):
        quantize(balance(up, down, Format.of(4))[1], Format.of(4))
