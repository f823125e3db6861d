"""What stands between an expert's two products: see `Activation.kind`."""

import triton
import triton.language as tl


@triton.jit
def apply(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """The function alone, of float32; ALPHA is silu's."""
    if FUNCTION == "silu":
        y = x * tl.sigmoid(x * ALPHA)
    elif FUNCTION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # tanh(y) = 2 sigmoid(2 y) - 1, and y = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif FUNCTION == "relu":
        y = tl.where(x <= 0, 0.0, x)  # and what is no number stays so
    elif FUNCTION == "relu2":
        y = tl.where(x <= 0, 0.0, x) * x
    else:
        tl.static_assert(FUNCTION == "identity", "unknown function")
        y = x
    return y


@triton.jit
def gated(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr):
    """F(gate) · (up + PLUS), after gate ≤ LIMIT and −LIMIT ≤ up ≤ LIMIT; no clamp where LIMIT is 0."""
    if LIMIT > 0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return apply(gate, FUNCTION, ALPHA) * (up + PLUS)
