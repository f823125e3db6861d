"""The rules of capture, watched on a device that has none: what a function does must not depend on what tensors hold,
and must be the same, on the same memory, whenever it is done.

Every operation is written down with its numbers and with the tensors that it reads: those made before by their place in
the order, others by their address. What reads values on the host, or takes values from it, is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from greenroom.device.protocol import CaptureError, T

_READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__",
}  # fmt: skip
"""Methods of tensors that let the host see values."""
_SENDS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "is_nonzero", "repeat_interleave",
}  # fmt: skip
"""Operators whose result's shape, or what follows, depends on values."""


@contextlib.contextmanager
def told_of_capture() -> "Iterator[None]":
    """Within it, who asks torch whether a stream is being captured is told that one is: transformers takes other ways
    then, and what is tried before a capture, or stands for one, has to take them, too."""
    real = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = real


class Rules:
    """A context within which operations are noted in `noted`."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.outside: set[int] = set()
        """addresses of what was read and not made within"""
        self._made: dict[int, tuple[int, torch.Tensor]] = {}
        self._resting = False
        self._modes: tuple[Any, ...] = (_Functions(self), _Operators(self))

    def __enter__(self) -> "Rules":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def kernel(self, kernel: "Callable[..., T]", arguments: "tuple[Any, ...]") -> T:
        """Call and note a kernel, whose inner life is free."""
        if self._resting:
            return kernel(*arguments)
        self.note("kernel", arguments, {})
        self._resting = True
        try:
            made = kernel(*arguments)
        finally:
            self._resting = False
        self.made(made)
        return made

    def watches(self) -> bool:
        """Whether what is called now has to keep to the rules."""
        return not self._resting

    def note(self, name: str, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> None:
        """An operation is called."""
        self.noted.append((name, *(self._name(leaf) for leaf in tree_leaves((args, kwargs)))))

    def made(self, result: Any) -> None:
        """An operation has given this."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._made.setdefault(id(leaf), (len(self._made), leaf))

    def _name(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf if isinstance(leaf, int | float | bool | str | type(None)) else type(leaf).__name__
        shape = (tuple(leaf.shape), leaf.stride(), leaf.dtype)
        if id(leaf) in self._made:
            return ("made", self._made[id(leaf)][0], *shape)
        self.outside.add(leaf.untyped_storage().data_ptr())
        return ("outside", leaf.data_ptr(), *shape)


class _Functions(TorchFunctionMode):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(
        self, func: Any, types: Any, args: "tuple[Any, ...]" = (), kwargs: "dict[str, Any] | None" = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._rules.watches() and (name in _READS or func in _SENDS):
            raise CaptureError(f"{name} moves values between host and device")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, rules: Rules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules

    def __torch_dispatch__(
        self, func: Any, types: Any, args: "tuple[Any, ...]" = (), kwargs: "dict[str, Any] | None" = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._rules.watches():
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1:2])
        )
        if name in _WAITS or by_mask:
            raise CaptureError(f"{name} waits for the device")
        self._rules.note(str(func), args, kwargs)
        result = func(*args, **kwargs)
        self._rules.made(result)
        return result
