"""What a routing trace holds and how it is read and checked. The file is described in docs/trace.md."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import TraceError, first_line

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """`experts` uint16 [tokens, layers, k]: chosen experts, most valuable first; `num_experts` stands for nobody.

    `offsets` int64 [prompts + 1]: where each prompt's tokens begin. `prompt` bool [tokens]: read, not generated.
    `passes` int64 [passes + 1]: where the tokens of each forward pass begin. The others are None where not recorded:
    `weights` float16 [tokens, layers, k] of the chosen; `probabilities` float16 [tokens, layers, num_experts] of the
    router; `guesses` uint16 [tokens, layers, lookahead, m]: what the layer's gate would choose, likeliest first, from
    the input of the gate 1, 2, … layers before.
    """

    num_experts: int
    experts: "NDArray[np.uint16]"
    offsets: "NDArray[np.int64]"
    prompt: "NDArray[np.bool_]"
    passes: "NDArray[np.int64]"
    weights: "NDArray[np.float16] | None" = None
    probabilities: "NDArray[np.float16] | None" = None
    guesses: "NDArray[np.uint16] | None" = None
    model: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, read or generated."""
        return len(self.experts)

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.experts.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def check(self, name: str) -> None:
        """Raise TraceError, naming the trace `name`, where the arrays cannot belong together."""
        problem = self.problem()
        if problem:
            raise TraceError(f"{name} is no routing trace ({problem[1]}): record it again, or import the arrays")

    def problem(self) -> "tuple[str, str] | None":
        """(an array that cannot belong to the others, why), or None."""
        return _bad_shape(self) or _bad_experts(self)


def _bad_shape(trace: RoutingTrace) -> "tuple[str, str] | None":
    experts, tokens = trace.experts, trace.tokens
    if experts.ndim != 3 or experts.dtype.kind != "u":
        return (
            "experts",
            f"experts has shape {experts.shape} and type {experts.dtype}, not unsigned [tokens, layers, k]",
        )
    if not 0 <= trace.num_experts <= 65535 or trace.top_k > max(trace.num_experts, 1):
        return "experts", f"{trace.top_k} of {trace.num_experts} experts a token"
    for name, starts in (("offsets", trace.offsets), ("passes", trace.passes)):
        if starts.ndim != 1 or starts.dtype.kind not in "iu" or not len(starts):
            return name, f"{name} is no list of whole numbers"
        if starts[0] != 0 or starts[-1] != tokens or (starts[1:] < starts[:-1]).any():
            return name, f"{name} must rise from 0 to the {tokens} tokens"
    if not np.isin(trace.offsets, trace.passes).all():
        return "passes", "a pass spans two prompts"
    if trace.prompt.shape != (tokens,) or trace.prompt.dtype != np.bool_:
        return "prompt", "prompt is not one truth value a token"
    return _bad_extra(trace)


def _bad_extra(trace: RoutingTrace) -> "tuple[str, str] | None":
    """What need not be there and does not fit."""
    shapes = {"weights": (trace.top_k,), "probabilities": (trace.num_experts,), "guesses": (None, None)}
    for name, rest in shapes.items():
        array = getattr(trace, name)
        if array is None:
            continue
        wanted = (trace.tokens, trace.layers, *rest)
        if array.ndim != len(wanted) or any(w not in (None, h) for w, h in zip(wanted, array.shape, strict=True)):
            return name, f"{name} has shape {array.shape}"
        if array.dtype.kind != ("u" if name == "guesses" else "f"):
            return name, f"{name} has type {array.dtype}"
    return None


def _bad_experts(trace: RoutingTrace) -> "tuple[str, str] | None":
    """Experts out of range, or twice in one set; in blocks, so that memory stays small."""
    for start in range(0, trace.tokens, 4096):
        block = trace.experts[start : start + 4096]
        if block.size and int(block.max()) > trace.num_experts:
            return "experts", f"expert {int(block.max())} of {trace.num_experts}"
        ordered = np.sort(block, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] < trace.num_experts)
        if twice.any():
            token = start + int(np.argwhere(twice)[0, 0])
            return "experts", f"token {token} names an expert twice in one layer"
    return None


def read_trace(path: "str | Path") -> RoutingTrace:
    """Read and check a trace. Raises TraceError for a missing, foreign, truncated or corrupted file."""
    path = Path(path)
    arrays = read_arrays(path)
    try:
        meta = json.loads(str(arrays["meta"][()]))
        foreign = meta["format"] != "greenroom-trace"
    except (KeyError, ValueError, TypeError, IndexError):
        foreign = True
    if foreign:
        raise TraceError(f"{path} is not a greenroom trace: bring other arrays in with greenroom trace --import")
    if meta.get("version") != VERSION:
        raise TraceError(f"{path} has trace version {meta.get('version')}, this greenroom reads {VERSION}: update it")
    missing = {"experts", "offsets", "prompt", "passes"} - arrays.keys()
    if missing or not isinstance(meta.get("num_experts"), int):
        raise TraceError(f"{path} lacks {min(missing, default='num_experts')}: record it again")
    names = ("experts", "offsets", "prompt", "passes", "weights", "probabilities", "guesses")
    trace = RoutingTrace(
        num_experts=meta["num_experts"],
        model=str(meta.get("model", "")),
        **{name: arrays[name] for name in names if name in arrays},
    )
    trace.check(str(path))
    return trace


def read_arrays(path: Path) -> "dict[str, NDArray[Any]]":
    """All arrays of an npz file, its checksums compared; pickled objects are refused. Raises TraceError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded as file:
                return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise TraceError(f"{path} does not exist: record a trace with greenroom trace") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, KeyError, MemoryError) as error:
        raise TraceError(f"{path} cannot be read ({first_line(error)}): it is truncated or no npz file") from error
    except Exception as error:  # zlib.error, struct.error, tokenize errors of a damaged header
        raise TraceError(f"{path} is damaged ({first_line(error)}): record or fetch it again") from error
    raise TraceError(f"{path} is a single array: save it with numpy.savez({path.stem!r}, experts=…)")
