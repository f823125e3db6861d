"""Who looks on while modules run."""

from torch import nn

from greenroom.seam import is_idle


class Hooks:
    """Forward hooks of a module and all in it: true while somebody looks on."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.renew()

    def renew(self) -> None:
        """Look for modules anew: torch fills and empties their tables in place, but modules may be replaced."""
        modules = self._module.modules()
        self._tables = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]

    def __bool__(self) -> bool:
        if not any(self._tables):  # the usual case, asked at every token
            return False
        return not all(is_idle(hook) for hooks in self._tables if hooks for hook in hooks.values())
