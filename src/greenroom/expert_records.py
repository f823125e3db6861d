"""An expert's record: where its parameters lie in it, and how it is made of them."""

import dataclasses

import torch

from greenroom import seam
from greenroom.calibration import Given, Inputs
from greenroom.checkpoint import Checkpoint
from greenroom.errors import CheckpointError, ConfigError
from greenroom.packed import RECORD_ALIGNMENT, Entry, ExpertsEntry, RecordTensor, header_of
from greenroom.quant import Format, balance, quantize_for, quantize_into


def experts_entry(number: int, module: seam.ExpertsModule, format: Format, dtype: str) -> ExpertsEntry:
    """How a layer's experts lie in a file of their own, the `number`-th: matrices in `format`, biases as 16-bit `dtype`
    ("bfloat16" or "float16"). Checksums are left out."""
    tensors: list[RecordTensor] = []
    end = 0
    for parameter in module.parameters:
        own = Format(bits=16, group_size=0, dtype=dtype) if parameter.is_bias else format
        made = RecordTensor(name=parameter.name, rows=parameter.rows, cols=parameter.cols, offset=end, format=own)
        tensors.append(made)
        end += made.nbytes
    entry = ExpertsEntry(
        module=module.name,
        num_experts=module.num_experts,
        file=f"experts-{number:05d}.safetensors",
        offset=0,
        record_nbytes=end + -end % RECORD_ALIGNMENT,
        tensors=tuple(tensors),
        crc32=(),
    )
    return dataclasses.replace(entry, offset=len(header_of(record_entries(entry))[0]))


def record_entries(entry: ExpertsEntry) -> "list[Entry]":
    """The records of a layer's experts as its file has them."""
    size = entry.record_nbytes
    return [
        Entry(name=f"{entry.module}.{expert}", dtype="U8", shape=(size,), nbytes=size)
        for expert in range(entry.num_experts)
    ]


def record_of(
    checkpoint: Checkpoint,
    module: seam.ExpertsModule,
    entry: ExpertsEntry,
    inputs: "Inputs | None",
    expert: int,
    weights: "dict[str, torch.Tensor]",
) -> torch.Tensor:
    """An expert's record, uint8 [record_nbytes], of its weights as read and, if packed for a text, for its inputs.
    Raises CheckpointError where a weight cannot be quantised."""
    record = torch.zeros(entry.record_nbytes, dtype=torch.uint8)
    matrices = [tensor for tensor in entry.tensors if tensor.format.bits < 16]
    if matrices:
        weights = balanced(checkpoint, module, weights, matrices[0].format)
    given: dict[str, Given] = {}
    if inputs is not None:
        weights = {name: weight.float() for name, weight in weights.items()}
        given = inputs.of_matrices(expert, checkpoint.model.get_submodule(module.name), weights)
    for tensor in entry.tensors:
        what = f"{tensor.name} of expert {expert} of {module.name}"
        part, own = tensor.part(record), given.get(tensor.name)
        pack_weight(weights[tensor.name], tensor.format, part, checkpoint, what, own)
    return record


def balanced(
    checkpoint: Checkpoint, module: seam.ExpertsModule, weights: "dict[str, torch.Tensor]", format: Format
) -> "dict[str, torch.Tensor]":
    """One expert's parameters, of which the second matrix has its column scales in the first (see quant.balance), where
    the expert is linear in the upper half of its first product and `format` rounds."""
    kind = seam.activation_kind(checkpoint.model.get_submodule(module.name))
    if format.bits == 16 or not kind.endswith("_and_mul") or weights.keys() != {"gate_up_proj", "down_proj"}:
        return weights
    gate, up = weights["gate_up_proj"].float().chunk(2)
    up, down = balance(up, weights["down_proj"], format)
    return {"gate_up_proj": torch.cat((gate, up)), "down_proj": down}


def pack_weight(
    weight: torch.Tensor,
    format: Format,
    out: torch.Tensor,
    checkpoint: Checkpoint,
    what: str,
    given: "Given | None" = None,
) -> None:
    """Pack `weight` [rows, cols] into `out`, uint8 [nbytes]; `given` is what a text gives it. `what` stands in the
    CheckpointError if it cannot be packed."""
    try:
        if given is None:
            quantize_into(weight, format, out)
        else:
            quantize_for(weight, format, out, *given)
    except ConfigError as error:  # it does not know whose weight it has
        raise CheckpointError(f"{checkpoint.folder}: {what}: {error}: fetch the checkpoint again") from error
