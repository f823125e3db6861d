"""Other people's routing traces: plain arrays in an npz file."""

from pathlib import Path

import numpy as np

from greenroom.errors import TraceError
from greenroom.trace.format import RoutingTrace, read_arrays


def import_arrays(path: "str | Path", num_experts: "int | None" = None) -> RoutingTrace:
    """A trace from `experts` [tokens, layers, k], integers, most valuable first.

    Taken as well where they are there: `offsets` [prompts + 1] (one prompt otherwise), `probs` or `weights`
    [tokens, layers, k] of the chosen, `prompt` [tokens]. Every token counts as a pass of its own. `num_experts`: the
    highest expert + 1 by default. Raises TraceError.
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
    low, high = (int(experts.min()), int(experts.max())) if experts.size else (0, -1)
    if low < 0 or high >= 65535:
        raise TraceError(f"{path}: experts reach from {low} to {high}, not from 0 to 65534 at most")
    weights = arrays.get("weights", arrays.get("probs"))
    tokens = len(experts)
    trace = RoutingTrace(
        num_experts=high + 1 if num_experts is None else num_experts,
        experts=experts.astype(smallest_type(max(high + 1, num_experts or 0))),
        offsets=arrays.get("offsets", np.array([0, tokens])),
        prompt=arrays.get("prompt", np.zeros(tokens, np.bool_)),
        passes=np.arange(tokens + 1, dtype=np.int64),
        weights=weights.astype(np.float16) if weights is not None and weights.shape == experts.shape else None,
        model=path.stem,
    )
    trace.check(str(path))
    return trace


def smallest_type(highest: int) -> "type[np.uint8] | type[np.uint16]":
    """uint8 where it holds `highest`, else uint16."""
    return np.uint8 if highest < 256 else np.uint16
