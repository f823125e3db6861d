"""Who looks on while modules run."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def forward_hooks(module: nn.Module) -> "list[Mapping[int, Any]]":
    """The tables of forward hooks of a module and all in it: one is not empty while somebody looks on. torch fills and
    empties them in place, so that they need to be looked for once."""
    return [hooks for one in module.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]
