"""A model's config, class and skeleton, as transformers knows them."""

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import AutoHfQuantizer

from greenroom.errors import CheckpointError, GreenroomError, UnsupportedModelError, first_line


def load_config(folder: Path) -> Any:
    """The transformers config of a local model folder.

    Raises CheckpointError where there is none, UnsupportedModelError for an unknown model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a Hugging Face model folder or a hub id")
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise UnsupportedModelError(f"{path} names no model_type: fetch the checkpoint again")
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(f"{folder}: {raw.get('model_type')} runs custom code, which greenroom does not")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configuration classes validate themselves, each in its own way
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} cannot read this configuration ({first_line(error)}): "
            "fetch the checkpoint again, or update transformers"
        ) from error


def model_class(config: Any) -> Any:
    """The class that `config.architectures` names, else the one AutoModelForCausalLM would take."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise UnsupportedModelError(
        f"no model class for architectures={getattr(config, 'architectures', None)} "
        f"(model_type {config.model_type}) in transformers {transformers.__version__}"
    )


_FORGETFUL = {"jamba", "minimax"}
"""Model types that cannot be given several tokens after others. Jamba's modules scan them from an empty state, and
MiniMax's cache says that it is empty."""


def continues(config: Any) -> bool:
    """Whether several tokens at once may follow a cache that is not empty."""
    return config.get_text_config().model_type not in _FORGETFUL


def makes_scores(config: Any) -> bool:
    """Whether attention has no fused kernel here, and makes all scores of a prompt at once."""
    return not model_class(config)._supports_sdpa


def dequantizer(config: Any, folder: Path) -> Any:
    """transformers' quantizer set to dequantise, for checkpoints that are published in fp8 or mxfp4; else None.

    Raises UnsupportedModelError for other quantised checkpoints.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method not in ("fp8", "mxfp4"):
        raise UnsupportedModelError(
            f"{folder} is already quantised ({method}): greenroom packs 16- and 32-bit, fp8 and mxfp4 checkpoints, "
            "so take another"
        )
    quantizer = AutoHfQuantizer.from_config({**settings, "quant_method": method}, pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the meta device: every module and shape, no bytes."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"), quiet():
            return model_class(config)._from_config(config, dtype=dtype).eval()
    except GreenroomError:
        raise
    except Exception as error:  # modelling code meets sizes that cannot be, or packages that are not there
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build a {config.model_type} model from this config.json "
            f"({first_line(error)}): fetch the checkpoint again, or install what it asks for"
        ) from error


def load_generation_config(model: Any, folder: Path) -> None:
    """Let the model generate as its authors set it, where they did."""
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def quiet() -> "Iterator[None]":
    """Silence transformers' own warnings while greenroom does what they warn about."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
