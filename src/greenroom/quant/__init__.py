"""Weights in 2, 3, 4, 8 or 16 bits: a float matrix to one packed record and back.

    format    what a record is: bits and group size          layout   where its parts lie
    bits      codes to bytes                                 metadata  scales and zeros in 8 bits
    rtn, hqq  the two published ways to find a grid          search   the competition between them and narrowed ranges
    settle    the grid the record can hold                   quantize  the way there and back
    balance   column scales that a gated MLP holds for free
    feedback  grids and codes for the inputs that a matrix gets

A weight is [rows = out_features, cols = in_features]; groups run along the columns. This package knows neither files
nor devices nor caches.
"""

from greenroom.quant.balance import balance
from greenroom.quant.feedback import quantize_for
from greenroom.quant.format import BITS, DEFAULT_GROUP_SIZE, DTYPES, GROUP_SIZES, Format
from greenroom.quant.layout import ALIGNMENT, Layout
from greenroom.quant.quantize import QuantizeReport, dequantize, quantize, quantize_into

__all__ = [
    "ALIGNMENT",
    "BITS",
    "DEFAULT_GROUP_SIZE",
    "DTYPES",
    "GROUP_SIZES",
    "Format",
    "Layout",
    "QuantizeReport",
    "balance",
    "dequantize",
    "quantize",
    "quantize_for",
    "quantize_into",
]
