"""Checkpoints that are published in mxfp4 or fp8 pack to the weights those bits mean."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import UnsupportedModelError
from greenroom.packing import pack

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The sixteen values of a 4-bit float (OCP Microscaling formats, table of E2M1)."""


def to_mxfp4(weight: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """[E, rows, cols] → blocks [E, rows, cols/32, 16], exponents [E, rows, cols/32] + 127, and what they mean."""
    experts, rows, cols = weight.shape
    groups = weight.view(experts, rows, cols // 32, 32)
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).clamp_min(1e-9).log2().ceil()
    codes = ((groups / 2**exponent).unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)
    meaning = (E2M1[codes.long()] * 2**exponent).view(experts, rows, cols)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent.squeeze(-1) + 127).to(torch.uint8), meaning


def to_fp8(weight: torch.Tensor, block: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """[rows, cols] → float8_e4m3 of the same shape, one scale per block, and what they mean in bfloat16."""
    rows, cols = weight.shape
    tiles = weight.view(rows // block, block, cols // block, block)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meaning = (codes.float() * scale[:, None, :, None]).view(rows, cols)
    return codes.view(rows, cols).contiguous(), scale, meaning.bfloat16().float()


def write(folder: Path, tensors: "dict[str, torch.Tensor]", quantization: "dict[str, Any]") -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def difference(folder: Path, packed: Path, model: Any, inputs: Any) -> float:
    """Relative difference between transformers on the meant weights and greenroom on the quantised checkpoint."""
    engine = Engine(
        pack(folder, packed, expert_bits=16, attention_bits=16, head_bits=16), EngineSettings(experts_per_layer=1)
    )
    with torch.no_grad():
        want, got = families.logits(model, **inputs), families.logits(engine.model, **inputs)
    engine.close()
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def test_mxfp4(tmp_path: Path) -> None:
    family = families.FAMILIES["gpt_oss"]
    config = family.build().config
    config.hidden_size, config.intermediate_size = 64, 96  # blocks are 32 wide
    model = type(family.build())(config).eval()
    families.randomise(model, 0)
    model.save_pretrained(tmp_path / "source")
    tensors = {}
    for name, value in load_file(tmp_path / "source" / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales, meaning = to_mxfp4(value.float().transpose(1, 2).contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            model.get_parameter(name).copy_(meaning.transpose(1, 2))
        else:
            tensors[name] = value.bfloat16()
    write(tmp_path / "source", tensors, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    inputs = family.inputs(model)
    assert difference(tmp_path / "source", tmp_path / "packed", model, inputs) < 1e-5
    model.get_parameter("model.layers.0.mlp.experts.down_proj")[:, 5] *= 1.1  # the comparison can fail
    assert difference(tmp_path / "source", tmp_path / "packed", model, inputs) > 1e-4


@torch.no_grad()
def test_fp8(tmp_path: Path) -> None:
    family = families.FAMILIES["deepseek_v3"]
    model = family.build()
    model.save_pretrained(tmp_path / "source")
    tensors = {}
    for name, value in load_file(tmp_path / "source" / "model.safetensors").items():
        expert = re.match(r"(.*mlp\.experts)\.(\d+)\.(\w+)\.weight", name)
        if expert is None and not name.endswith("self_attn.o_proj.weight"):
            tensors[name] = value.bfloat16()
            continue
        tensors[name], tensors[f"{name}_scale_inv"], meaning = to_fp8(value.float(), block=8)
        part_of(model, name, expert).copy_(meaning)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [8, 8]}
    write(tmp_path / "source", tensors, settings)
    inputs = family.inputs(model)
    assert difference(tmp_path / "source", tmp_path / "packed", model, inputs) < 1e-5
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(1.1)  # the comparison can fail
    assert difference(tmp_path / "source", tmp_path / "packed", model, inputs) > 1e-4


def part_of(model: Any, name: str, expert: "re.Match[str] | None") -> torch.Tensor:
    """Where transformers keeps the tensor that the checkpoint calls `name`."""
    if expert is None:
        return model.get_parameter(name)
    module, number = model.get_submodule(expert[1]), int(expert[2])
    if expert[3] == "down_proj":
        return module.down_proj[number]
    half = module.gate_up_proj.shape[1] // 2
    return module.gate_up_proj[number, :half] if expert[3] == "gate_proj" else module.gate_up_proj[number, half:]


def test_others_are_refused(tmp_path: Path) -> None:
    family = families.FAMILIES["mixtral"]
    family.build().save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    write(tmp_path / "source", tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        pack(tmp_path / "source", tmp_path / "packed")
