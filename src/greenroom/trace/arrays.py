"""Other people's routing traces: plain arrays in an npz file."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import TraceError
from greenroom.trace.format import RoutingTrace, read_arrays


def import_arrays(path: "str | Path", num_experts: "int | None" = None) -> RoutingTrace:
    """A trace from `experts` [tokens, layers, k], integers, most valuable first.

    Where fewer than k were chosen, the number of experts fills the end, and `num_experts` says which number that is.
    Taken as well where they are there: `offsets` [prompts + 1] (one prompt otherwise), `probs` or `weights`
    [tokens, layers, k] of the chosen, `prompt` [tokens]. Every token counts as a pass of its own. `num_experts`: the
    highest expert + 1 by default. Raises TraceError, which names the array to correct.
    """
    path = Path(path)
    arrays = read_arrays(path)
    if "experts" not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise TraceError(f"{path} has no array named experts, only {found}: rename the one [tokens, layers, k]")
    experts = arrays["experts"]
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise TraceError(
            f"{path}: experts has shape {experts.shape} and type {experts.dtype}, not integers [tokens, layers, k]"
        )
    high = _highest(path, experts, num_experts)
    tokens = len(experts)
    trace = RoutingTrace(
        num_experts=high + 1 if num_experts is None else num_experts,
        experts=experts.astype(smallest_type(max(high + 1, num_experts or 0))),
        offsets=arrays.get("offsets", np.array([0, tokens])),
        prompt=arrays.get("prompt", np.zeros(tokens, np.bool_)),
        passes=np.arange(tokens + 1, dtype=np.int64),
        weights=_weights(path, arrays, experts.shape),
        model=path.stem,
    )
    problem = trace.problem()
    if problem:
        raise TraceError(f"{path} holds no routing ({problem[1]}): correct its array {problem[0]}")
    return trace


def _highest(path: Path, experts: "NDArray[Any]", num_experts: "int | None") -> int:
    """The highest expert, −1 where there is none."""
    low, high = (int(experts.min()), int(experts.max())) if experts.size else (0, -1)
    if low < 0:
        raise TraceError(
            f"{path}: experts reach from {low} to {high}, not from 0 on: fill up a set with the number of experts "
            "instead, and name that number with --num-experts"
        )
    if high >= 65535:
        raise TraceError(f"{path}: experts reach to {high}, not to 65534 at most: number those of a layer from 0")
    if num_experts is not None and num_experts < max(high, experts.shape[2]):
        raise TraceError(
            f"{path}: {num_experts} experts are too few for the array experts, which reaches to {high} and has "
            f"{experts.shape[2]} a token: give more with --num-experts, or leave it out"
        )
    return high


def _weights(path: Path, arrays: "dict[str, NDArray[Any]]", shape: "tuple[int, ...]") -> "NDArray[np.float16] | None":
    name = "weights" if "weights" in arrays else "probs"
    weights = arrays.get(name)
    if weights is None:
        return None
    if weights.shape != shape or weights.dtype.kind not in "fiu":
        raise TraceError(
            f"{path}: {name} has shape {weights.shape} and type {weights.dtype}, not numbers {shape} [tokens, layers, "
            "k] like experts: correct it, or leave it out"
        )
    return weights.astype(np.float16)


def smallest_type(highest: int) -> "type[np.uint8] | type[np.uint16]":
    """uint8 where it holds `highest`, else uint16."""
    return np.uint8 if highest < 256 else np.uint16
