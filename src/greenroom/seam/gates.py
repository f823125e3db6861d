"""What stands between an expert's two products, by name: transformers' own functions and gates."""

from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations import moe

_FUNCTIONS: "dict[Any, str]" = {nn.SiLU: "silu", nn.ReLU: "relu", F.silu: "silu", F.relu: "relu"}
"""Activation modules and functions by what they compute."""

for _name, _kind in {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}.items():
    if hasattr(activations, _name):
        _FUNCTIONS[getattr(activations, _name)] = _kind

_GATES = {
    "gpt_oss.GptOssExperts": "swigluoai_interleaved:{alpha}:{limit}",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "swigluoai:{alpha}:{limit}",
    "minimax_m3_vl.MiniMaxM3VLExperts": "swigluoai:{swiglu_alpha}:{swiglu_limit}",
    "deepseek_v4.DeepseekV4Experts": "clamped_silu_and_mul:{limit}",
    "hy_v4.HYV4Experts": "clamped_silu_and_mul:{swiglu_limit}",
    "glm5_next.Glm5NextTextExperts": "clamped_silu_and_mul:{swiglu_limit}",
}
"""Classes with a gate of their own, and the kind it is, from the module's numbers."""


def activation_kind(module: Any) -> str:
    """What an experts module computes between its two products, as `kernels.Activation.kind` names it; "" for what is
    not one of transformers' own functions and gates, and for anything with a hook."""
    act = getattr(module, "act_fn", None)
    if getattr(act, "_forward_hooks", None) or getattr(act, "_forward_pre_hooks", None):
        return ""
    function = _FUNCTIONS.get(type(act) if isinstance(act, nn.Module) else act, "")
    if not module.has_gate:
        return function
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or "_apply_gate" in vars(module):
        return ""
    if gate is getattr(moe, "_default_apply_gate", None):
        return f"{function}_and_mul" if function and module.is_concatenated else ""
    return _own_gate(module, gate, function)


def _own_gate(module: Any, gate: Any, function: str) -> str:
    family = gate.__module__.removeprefix("transformers.models.").partition(".")[0]
    kind = _GATES.get(f"{family}.{gate.__qualname__.removesuffix('._apply_gate')}", "")
    if not kind or (hasattr(module, "act_fn") and function != "silu"):
        return ""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
    try:
        return kind.format_map(numbers)
    except KeyError:
        return ""
