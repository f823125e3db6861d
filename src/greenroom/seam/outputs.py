"""The hooks with which transformers collects hidden states, attentions and router logits for calls that ask."""

from typing import Any

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # another version collects in another way
    _active_collector = None


def is_idle(hook: Any) -> bool:
    """Whether a hook is one of those, which stay in place once a call has asked, while no call asks."""
    if _active_collector is None or getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return False
    return _active_collector.get() is None
