"""transformers' decoders in the terms of the compiled one.

Modules are recognised by what they are made of, not by family: projections, norms and gates by their usual names, and
nothing beside them. Whether the recognised thing computes what the modules compute is for `proof` to find out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.activations import SiLUActivation

from greenroom import seam
from greenroom.decode import kv
from greenroom.kernels import native
from greenroom.model import PackedLinear
from greenroom.quant import Format


class NotUnderstoodError(Exception):
    """A module is not of the forms that the compiled decoder has; the message says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """A decoder's modules, and its layers described."""

    embed: nn.Module
    layers: "list[nn.Module]"
    norm: Any
    rotary: nn.Module
    width: int
    described: "list[Any]"
    """native.DecoderLayer, one per layer"""
    final_norm: Any
    layouts: "list[kv.Layout]"
    windows: "list[int | None]"
    moe: "list[Any]"
    """the experts module of each layer, None where it is dense"""
    top_k: int
    """experts per token, at most"""
    keep: "list[torch.Tensor]"
    """what the descriptions point to"""
    shapes: "list[Any]"
    """native.Shape, of each projection"""
    rotary_size: int
    """cosines of a position"""
    limit: "int | None"
    """the first position at which attention is another"""

    def turn(self, positions: "Sequence[int]") -> "Turn":
        """Their rotary embedding."""
        return Turn(self.rotary, positions, self.width, self.rotary_size)

    def no_kv(self, index: int, bits: int = 16) -> kv.CompiledKV:
        """What a layer holds of no positions."""
        return kv.CompiledKV(*self.layouts[index].empty(), self.windows[index], forget=False, bits=bits)

    def takes(self, tokens: int) -> bool:
        """Whether the compiled kernels are the faster ones for so many tokens."""
        return all(shape.takes(tokens) for shape in self.shapes)


def describe(base: Any) -> DecoderParts:
    """The decoder `base` (a model without its head). Raises NotUnderstoodError."""
    if native.extension() is None:
        raise NotUnderstoodError(native.unusable())
    children = {name for name, _ in base.named_children()}
    if children != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise NotUnderstoodError(f"{type(base).__name__} is made of {', '.join(sorted(children))}")
    writer = _Describer(base)
    layers = list(base.layers)
    described = [writer.layer(layer) for layer in layers]
    cache_layers = DynamicCache(config=base.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in cache_layers]
    if len(windows) != len(layers):
        windows = [None] * len(layers)
    return DecoderParts(
        embed=base.embed_tokens,
        layers=layers,
        norm=base.norm,
        rotary=base.rotary_emb,
        width=writer.width,
        described=described,
        final_norm=writer.norm(base.norm),
        layouts=writer.layouts,
        windows=windows,
        moe=writer.moe,
        top_k=writer.top_k,
        keep=writer.keep,
        shapes=writer.shapes,
        rotary_size=writer.rotary.cosine.shape[1],
        limit=_limit(base.config),
    )


def _limit(config: Any) -> "int | None":
    """Mistral 4 multiplies queries by a factor that is 1 up to where its context was extended."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("llama_4_scaling_beta") else None


class Turn:
    """Positions' rotary embedding: `cosine` and `sine`, float32 [n, rotary_dim / 2], of however a family writes it.

    `size`: rotary_dim / 2, known from another position; at 0 all cosines and sines are alike.
    """

    def __init__(self, rotary: Any, positions: "Sequence[int]", width: int, size: "int | None" = None) -> None:
        x = torch.empty(1, 1, width, dtype=torch.float32, device="cpu")
        found = rotary(x, torch.tensor([positions], device="cpu"))
        self.complex = isinstance(found, torch.Tensor) and found.is_complex()
        cosine, sine = (
            one.reshape(len(positions), -1) for one in ((found.real, found.imag) if self.complex else found)
        )
        if size is None:
            half = cosine.shape[1] // 2
            doubled = torch.equal(cosine[:, :half], cosine[:, half:]) and torch.equal(sine[:, :half], sine[:, half:])
            size = half if doubled and not self.complex else cosine.shape[1]
        self.cosine, self.sine = (one[:, :size].to(torch.float32).contiguous() for one in (cosine, sine))


class _Describer:
    """Describes one layer after another, and remembers the tensors that the descriptions point to."""

    def __init__(self, base: Any) -> None:
        self.core: Any = native.extension()
        self.config = base.config
        self.width = int(base.config.hidden_size)
        self.rotary = Turn(base.rotary_emb, [1], self.width)
        self.keep: list[torch.Tensor] = []
        self.layouts: list[kv.Layout] = []
        self.moe: list[Any] = []
        self.shapes: list[Any] = []
        self.top_k = 0

    def layer(self, layer: Any) -> Any:
        children = dict(layer.named_children())
        feed = [name for name in children if name not in ("self_attn", "input_layernorm", "post_attention_layernorm")]
        if len(children) != 4 or len(feed) != 1:
            raise NotUnderstoodError(f"{type(layer).__name__} is made of {', '.join(children)}")
        described = self.core.DecoderLayer()
        described.before_attention = self.norm(layer.input_layernorm)
        described.before_mlp = self.norm(layer.post_attention_layernorm)
        if hasattr(layer.self_attn, "kv_a_proj_with_mqa"):
            described.latent_attention = latent = self._latent_attention(layer.self_attn)
            self.layouts.append(kv.Latent(latent.latent_dim, latent.rotary_dim))
        else:
            described.attention = attention = self._attention(layer.self_attn)
            self.layouts.append(kv.Grouped(attention.kv_heads, attention.head_dim))
        self._feed_forward(children[feed[0]], described)
        return described

    def norm(self, module: Any) -> Any:
        eps = getattr(module, "variance_epsilon", None)
        if not type(module).__name__.endswith("RMSNorm") or eps is None or set(module.state_dict()) != {"weight"}:
            raise NotUnderstoodError(f"{type(module).__name__} is not a root-mean-square norm")
        return self.core.Norm(self._pointer(module.weight), float(eps))

    def weights(self, module: Any) -> Any:
        """A linear's packed bits; a plain one's in 16 bits, where they are exact."""
        if isinstance(module, PackedLinear):
            self.keep.append(module.packed)
            shape = native.shape(module.out_features, module.in_features, module.format)
            self._note(module.out_features, module.in_features, module.format)
            bias = 0 if module.bias is None else self._pointer(module.bias)
            return self.core.Weights(module.packed.data_ptr(), module.packed.numel(), shape, bias)
        if type(module) is not nn.Linear:
            raise NotUnderstoodError(f"{type(module).__name__} is not a plain linear")
        self._note(module.out_features, module.in_features, Format(bits=16, group_size=0, dtype="bfloat16"))
        return self.matrix(module.weight, module.bias)

    def _note(self, rows: int, cols: int, format: Format) -> None:
        if rows > 1:  # how a single row is multiplied matters to no one
            self.shapes.append(native.shape(rows, cols, format))

    def matrix(self, weight: torch.Tensor, bias: "torch.Tensor | None") -> Any:
        """A plain matrix in 16 bits."""
        for dtype in (torch.bfloat16, torch.float16):
            half = weight.detach().to(dtype).contiguous()
            if torch.equal(half.to(weight.dtype), weight):
                format = Format(bits=16, group_size=0, dtype=str(dtype).removeprefix("torch."))
                packed = torch.zeros(-(-half.numel() * 2 // 64) * 64, dtype=torch.uint8)
                packed[: half.numel() * 2] = half.view(torch.uint8).reshape(-1)
                self.keep.append(packed)
                shape = native.shape(weight.shape[0], weight.shape[1], format)
                pointer = 0 if bias is None else self._pointer(bias)
                return self.core.Weights(packed.data_ptr(), packed.numel(), shape, pointer)
        raise NotUnderstoodError("a matrix does not fit 16 bits")

    def _pointer(self, tensor: torch.Tensor) -> int:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise NotUnderstoodError("a vector is not float32 in memory")
        self.keep.append(tensor.detach())
        return tensor.data_ptr()

    def _attention(self, module: Any) -> Any:
        _made_of(module, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}, parameters={"sinks"})
        found = self.core.Attention()
        found.query, found.key = self.weights(module.q_proj), self.weights(module.k_proj)
        found.value, found.output = self.weights(module.v_proj), self.weights(module.o_proj)
        dim = int(module.head_dim)
        found.head_dim, found.rotary_dim = dim, 2 * self.rotary.cosine.shape[1]
        found.heads, found.kv_heads = module.q_proj.out_features // dim, module.k_proj.out_features // dim
        found.scale = float(module.scaling)
        if hasattr(module, "q_norm"):
            found.query_norm, found.key_norm = self.norm(module.q_norm), self.norm(module.k_norm)
            found.norm_each_head = module.q_norm.weight.numel() == dim
            wide = {module.q_norm.weight.numel(): dim, module.k_norm.weight.numel(): dim}
            if not found.norm_each_head and wide.keys() != {found.heads * dim, found.kv_heads * dim}:
                raise NotUnderstoodError("a norm of queries or keys is neither a head wide nor all of them")
        found.clip = float(getattr(self.config, "clip_qkv", None) or 0.0)
        if getattr(module, "sinks", None) is not None:
            found.sinks = self._pointer(module.sinks)
        return found

    def _latent_attention(self, module: Any) -> Any:
        query = {"q_proj"} if getattr(module, "q_proj", None) is not None else {"q_a_proj", "q_a_layernorm", "q_b_proj"}
        _made_of(module, query | {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}, set())
        found = self.core.LatentAttention()
        if "q_proj" in query:
            found.query = self.weights(module.q_proj)
        else:
            found.query_down, found.query = self.weights(module.q_a_proj), self.weights(module.q_b_proj)
            found.query_norm = self.norm(module.q_a_layernorm)
        found.latent, found.latent_norm = self.weights(module.kv_a_proj_with_mqa), self.norm(module.kv_a_layernorm)
        found.output = self.weights(module.o_proj)
        found.heads, found.nope_dim = int(module.num_heads), int(module.qk_nope_head_dim)
        found.rotary_dim, found.value_dim = int(module.qk_rope_head_dim), int(module.v_head_dim)
        found.latent_dim, found.scale = int(module.kv_lora_rank), float(module.scaling)
        if getattr(module.kv_b_proj, "bias", None) is not None:
            raise NotUnderstoodError("the latent's up-projection has a bias")
        up = module.kv_b_proj.weight.detach().view(found.heads, found.nope_dim + found.value_dim, found.latent_dim)
        key_up = up[:, : found.nope_dim].to(torch.float16).contiguous()
        value_up = up[:, found.nope_dim :].transpose(1, 2).to(torch.float16).contiguous()
        self.keep += [key_up, value_up]
        found.key_up, found.value_up = key_up.data_ptr(), value_up.data_ptr()
        found.up = self.weights(module.kv_b_proj)
        if self.rotary.complex:
            found.rotation = self.core.Rotation.pairs
        elif getattr(self.config, "rope_interleave", False):
            found.rotation = self.core.Rotation.pairs_to_halves
        return found

    def _feed_forward(self, module: Any, described: Any) -> None:
        if not hasattr(module, "experts"):
            described.mlp = self._mlp(module)
            self.moe.append(None)
            return
        gates = {name for name, _ in module.named_children()} & {"gate", "router"}
        shared = {"shared_expert", "shared_experts"} & {name for name, _ in module.named_children()}
        _made_of(module, {"experts", *gates}, {*shared, "shared_expert_gate"})
        if len(gates) != 1 or len(shared) > 1:
            raise NotUnderstoodError(f"{type(module).__name__} has no plain gate")
        experts = module.experts
        if not seam.activation_kind(experts) or experts.has_post_expert_norm:
            raise NotUnderstoodError(f"{type(experts).__name__} are not computed by the compiled kernels")
        described.router = self._router(getattr(module, gates.pop()), module)
        if shared:
            mlp = self._mlp(getattr(module, shared.pop()))
            if hasattr(module, "shared_expert_gate"):
                mlp.scale = self.weights(module.shared_expert_gate)
            described.mlp = mlp
        self.moe.append(module.experts)

    def _mlp(self, module: Any) -> Any:
        _made_of(module, {"gate_proj", "up_proj", "down_proj"}, {"act_fn"})
        if type(getattr(module, "act_fn", None)) not in (nn.SiLU, SiLUActivation):
            raise NotUnderstoodError(f"{type(module).__name__} has another activation than SiLU")
        found = self.core.Mlp()
        found.gate, found.up = self.weights(module.gate_proj), self.weights(module.up_proj)
        found.down = self.weights(module.down_proj)
        return found

    def _router(self, module: Any, block: Any) -> Any:
        own = dict(module.named_parameters()) | dict(module.named_buffers()) | dict(block.named_buffers(recurse=False))
        plain = {"weight"} <= own.keys() <= {"weight", "bias", "e_score_correction_bias"}
        if not plain or not hasattr(module, "top_k"):
            raise NotUnderstoodError(f"{type(module).__name__} is not a plain router")
        scores = self.core.Router.Scores
        found = self.core.Router()
        found.weights, found.top_k = self.matrix(own["weight"], own.get("bias")), int(module.top_k)
        self.top_k = max(self.top_k, found.top_k)
        found.scores = scores.softmax_of_chosen if "bias" in own else scores.softmax
        unless_said = not hasattr(module, "topk_method")  # Mixtral always does, DeepSeek-V2 never
        found.normalize = "bias" not in own and bool(getattr(module, "norm_topk_prob", unless_said))
        factors = (getattr(module, f"{name}_scaling_factor", None) for name in ("routed", "router"))
        found.scale = float(next((factor for factor in factors if factor), 1.0))
        if "e_score_correction_bias" in own:
            found.scores, found.correction = scores.sigmoid, self._pointer(own["e_score_correction_bias"])
            found.group_by_two = True
        if "e_score_correction_bias" in own or getattr(module, "topk_method", "") == "group_limited_greedy":
            found.groups = int(getattr(module, "num_group", 1) or 1)
            found.top_groups = int(getattr(module, "topk_group", 1) or 1)
        return found


def _made_of(module: Any, needed: "set[str]", optional: "set[str]", parameters: "set[str] | None" = None) -> None:
    children = {name for name, child in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if not needed <= children <= needed | optional or not own <= (parameters or set()):
        raise NotUnderstoodError(f"{type(module).__name__} is made of {', '.join(sorted(children | own))}")
