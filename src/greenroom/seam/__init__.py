"""What greenroom knows of transformers' modelling internals; no other room touches them.

transformers ≥ 5 sends the experts of 64 modelling files through one seam: modules decorated with
`use_experts_implementation` call `fn(module, hidden_states, top_k_index, top_k_weights)`, `fn` being registered by
name in `ALL_EXPERTS_FUNCTIONS`. This room finds those modules, says what their tensors mean, and finds what stays
dense: linears, routers, the output head. Unknown combinations are refused here, before a byte is packed.
"""

from greenroom.seam.architecture import (
    continues,
    dequantizer,
    load_config,
    load_generation_config,
    makes_scores,
    model_class,
    quiet,
    skeleton,
)
from greenroom.seam.dense import (
    decoder_layers,
    in_attention,
    output_head,
    owner,
    packable_linears,
    plain_embeddings,
    required_weights,
    stacked_layers,
)
from greenroom.seam.experts import (
    IMPLEMENTATION,
    ExpertParameter,
    ExpertsModule,
    ServeExperts,
    expert_inner,
    expert_output,
    experts_modules,
    serve_experts,
)
from greenroom.seam.gates import activation_kind
from greenroom.seam.outputs import is_idle
from greenroom.seam.routers import Gate, norm_before, router
from greenroom.seam.weights import assign, dtype_of, materialize, replace, share, tensor, tensors

__all__ = [
    "IMPLEMENTATION",
    "ExpertParameter",
    "ExpertsModule",
    "Gate",
    "ServeExperts",
    "activation_kind",
    "assign",
    "continues",
    "decoder_layers",
    "dequantizer",
    "dtype_of",
    "expert_inner",
    "expert_output",
    "experts_modules",
    "in_attention",
    "is_idle",
    "load_config",
    "load_generation_config",
    "makes_scores",
    "materialize",
    "model_class",
    "norm_before",
    "output_head",
    "owner",
    "packable_linears",
    "plain_embeddings",
    "quiet",
    "replace",
    "required_weights",
    "router",
    "serve_experts",
    "share",
    "skeleton",
    "stacked_layers",
    "tensor",
    "tensors",
]
