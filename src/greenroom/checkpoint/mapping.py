"""transformers' own weight conversion, applied to one expert or one dense tensor at a time.

Hub files often name one tensor per expert and projection; transformers stacks them with the converters of
`conversion_mapping.py`. Here those converters run on the tensors of a single expert (a merge of one), so memory is
bounded by one expert, and a family that transformers learns needs no code of ours. Checkpoints that are stacked on
disk already are sliced.
"""

import copy
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from greenroom import seam
from greenroom.checkpoint.shards import Shards
from greenroom.errors import CheckpointError


@dataclasses.dataclass(slots=True)
class _Route:
    """How checkpoint tensors become one target (or, through a splitting converter, several)."""

    target: str
    converter: "WeightConverter | None" = None
    sources: "list[tuple[str, str]]" = dataclasses.field(default_factory=list)  # (source pattern, checkpoint name)

    def patterns(self) -> "tuple[str, ...]":
        return () if self.converter is None else tuple(self.converter.source_patterns)

    def targets(self) -> "list[str]":
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseGroup:
    """Dense tensors that one conversion makes: `shapes` by the model's names; `dtype`, `nbytes` as in the shards."""

    number: int
    dtype: torch.dtype
    shapes: "dict[str, tuple[int, ...]]"
    nbytes: int


class Checkpoint:
    """A checkpoint folder, its model's skeleton, and the way from the one to the other.

    Raises CheckpointError or UnsupportedModelError at construction where the folder does not hold every weight of a
    model that greenroom serves; `dense_too` allows models without experts.
    """

    def __init__(self, folder: Path, dense_too: bool = False) -> None:
        self.folder = folder
        self.config = seam.load_config(folder)
        self._quantizer = seam.dequantizer(self.config, folder)
        self.model = seam.skeleton(self.config)
        experts = seam.experts_modules(self.model, dense_too)
        self.shards = Shards(folder)
        self._state: dict[str, torch.Tensor] = self.model.state_dict()
        self._parameters = {
            f"{module.name}.{parameter.name}": (module, parameter)
            for module in experts
            for parameter in module.parameters
        }
        routes = self._map()
        self._expert_routes = {
            target: route for route in routes for target in route.targets() if target in self._parameters
        }
        self._dense_routes = [route for route in routes if route.target not in self._parameters]
        self.tied = self._check_complete(routes)
        self.experts = [module for module in experts if f"{module.name}.down_proj" not in self.tied]
        """modules with experts of their own; the others share those of one of these"""
        self._check_experts()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the shards."""
        return self.shards.nbytes

    def fingerprint(self) -> str:
        """Identifies the checkpoint by its configuration, its tensors' places and a sample of each: not all is read."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, info in sorted(self.shards.tensors.items()):
            digest.update(f"{name} {info.path.name} {info.dtype} {info.shape} {info.offset}\n".encode())
            digest.update(self.shards.sample(name))  # another training run of the same model differs only here
        return digest.hexdigest()

    def experts_nbytes(self, module: seam.ExpertsModule) -> int:
        """Bytes in the shards of one module's experts."""
        routes = [self._expert_routes[f"{module.name}.{parameter.name}"] for parameter in module.parameters]
        names = {name for route in routes for _, name in route.sources}
        return sum(self.shards.tensors[name].nbytes for name in names)

    def expert_dtype(self, module: seam.ExpertsModule) -> torch.dtype:
        """The dtype the module's experts are stored in."""
        route = self._expert_routes[f"{module.name}.down_proj"]
        return self.shards.tensors[route.sources[0][1]].dtype

    def expert(self, module: seam.ExpertsModule, index: int) -> "dict[str, torch.Tensor]":
        """Parameter name → [rows, cols] of one expert, in the checkpoint's dtype."""
        tensors = {}
        for parameter in module.parameters:
            target = f"{module.name}.{parameter.name}"
            value = self._convert_one(self._expert_routes[target], target, module.num_experts, index)
            expected = (parameter.cols,) if parameter.is_bias else (parameter.rows, parameter.cols)
            value = value.T if parameter.transposed else value
            if tuple(value.shape) != expected:
                raise CheckpointError(
                    f"{self.folder}: {target}[{index}] has shape {tuple(value.shape)}, not {expected}: "
                    "fetch the checkpoint again"
                )
            tensors[parameter.name] = value.reshape(parameter.rows, parameter.cols)
        return tensors

    def dense_groups(self) -> "list[DenseGroup]":
        """Every dense tensor, in groups that are converted together."""
        groups = []
        for number, route in enumerate(self._dense_routes):
            sources = [self.shards.tensors[name] for _, name in route.sources]
            tensors = {name: tuple(self._state[name].shape) for name in route.targets() if name in self._state}
            nbytes = sum(info.nbytes for info in sources)
            groups.append(DenseGroup(number=number, dtype=sources[0].dtype, shapes=tensors, nbytes=nbytes))
        return groups

    def dense(self, group: "DenseGroup") -> "dict[str, torch.Tensor]":
        """The tensors of one group by the model's names for them, in the checkpoint's dtype."""
        route = self._dense_routes[group.number]
        if route.converter is None:
            tensors = {route.target: self.shards.read(route.sources[0][1])}
        else:
            converter = copy.deepcopy(route.converter)
            for pattern, name in route.sources:
                converter.add_tensor(route.target, name, pattern, self.shards.read(name))
            tensors = _run(converter, route.target, self.model, self.folder)
        for name, shape in group.shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found} where the model has {shape}: fetch the checkpoint again"
                )
        return {name: tensors[name] for name in group.shapes}

    def _map(self) -> "list[_Route]":
        """The same walk that transformers' loader takes over the sorted checkpoint names."""
        transforms = get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, state = self.model.base_model_prefix, self._state
        routes: dict[str, _Route] = {}
        for source in sorted(self.shards.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if target not in state and source in state:
                target, pattern = rename_source_key(source, [], [], prefix, state)
            if target not in state:
                continue  # e.g. next-token-prediction layers that transformers does not run
            route = routes.setdefault(target, _Route(target, by_pattern.get(pattern) if pattern else None))
            route.sources.append((pattern or source, source))
        return list(routes.values())

    def _check_complete(self, routes: "list[_Route]") -> "dict[str, str]":
        """Refuse a checkpoint that lacks weights; return the tied ones (name → name of the weight it shares)."""
        served = {target for route in routes for target in route.targets()}
        tied = {name: other for name, other in self.model.all_tied_weights_keys.items() if name not in served}
        missing = [
            name
            for name in seam.required_weights(self.model)
            if name not in served
            and name not in tied
            and not any("*" in target and re.fullmatch(target.replace("*", r"\d+"), name) for target in served)
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder} holds no weight for {missing[0]}{more}: fetch the rest of the checkpoint"
            )
        return tied

    def _check_experts(self) -> None:
        """Every expert of every module has its tensors, before hours of packing start."""
        patterns: dict[tuple[str, ...], set[str]] = {}  # a converter's sources → those that some layer has
        routes = {target: self._expert_routes[target] for target in self._parameters if target not in self.tied}
        for route in routes.values():
            patterns.setdefault(route.patterns(), set()).update(self._by_pattern(route))
        for target, route in routes.items():
            module, _ = self._parameters[target]
            found = self._by_pattern(route)
            missing = patterns[route.patterns()] - found.keys() if route.converter is not None else None
            if missing:
                raise CheckpointError(
                    f"{self.folder} holds no {min(missing)} for {target}: fetch the rest of the checkpoint"
                )
            for names in found.values():
                self._select(route, names, target, module.num_experts, 0)
                self._check_numbers(names, target)

    def _check_numbers(self, names: "list[str]", target: str) -> None:
        """Experts stored one by one are numbered 0, 1, 2 …; a gap would shift all that follow."""
        parts = [name.split(".") for name in names]
        varying = [column for column in zip(*parts, strict=False) if len(set(column)) > 1]
        if len(names) > 1 and varying[:1] != [tuple(str(number) for number in range(len(names)))]:
            raise CheckpointError(
                f"{self.folder}: the experts of {target} are not numbered 0 to {len(names) - 1}: fetch it again"
            )

    def _by_pattern(self, route: _Route) -> "dict[str, list[str]]":
        grouped: dict[str, list[str]] = {}
        for pattern, name in route.sources:
            grouped.setdefault(pattern, []).append(name)
        return grouped

    def _select(self, route: _Route, names: "list[str]", target: str, num_experts: int, index: int) -> "list[str]":
        """The checkpoint tensors among `names` that make expert `index`; a stacked tensor is kept for slicing."""
        if self._is_stacked(names, target):
            count = self.shards.tensors[names[0]].shape[0]
            chosen = names
        else:
            groups = len(route.targets())  # a splitting converter takes one share of the list per target
            count = len(names) // groups if len(names) % groups == 0 else len(names)
            chosen = [names[index + share * count] for share in range(groups)] if count == num_experts else []
        if count != num_experts:
            raise CheckpointError(
                f"{self.folder} holds {count} experts for {target} where the model has {num_experts}: fetch it again"
            )
        return chosen

    def _is_stacked(self, names: "list[str]", target: str) -> bool:
        """Whether one checkpoint tensor holds all experts of `target`."""
        return len(names) == 1 and len(self.shards.tensors[names[0]].shape) >= self._state[target].ndim

    def _convert_one(self, route: _Route, target: str, num_experts: int, index: int) -> torch.Tensor:
        converter = copy.deepcopy(route.converter)
        for pattern, names in self._by_pattern(route).items():
            stacked = self._is_stacked(names, target)
            for name in self._select(route, names, target, num_experts, index):
                value = self.shards.read_slice(name, index) if stacked else self.shards.read(name)
                if converter is None:
                    return value[0] if stacked else value
                converter.add_tensor(route.target, name, pattern, value)
        assert converter is not None
        result = _run(converter, route.target, _OneExpert(self.model, set(self._parameters)), self.folder)
        return result[target][0]


class _OneExpert:
    """Stands in for the model where a converter asks for a parameter's shape: one expert instead of all."""

    def __init__(self, model: Any, stacked: "set[str]") -> None:
        self._model, self._stacked, self.config = model, stacked, model.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self._model.get_parameter(name)
        return parameter[:1] if name in self._stacked else parameter


def _run(converter: WeightConverter, target: str, model: Any, folder: Path) -> "dict[str, torch.Tensor]":
    try:
        result = converter.convert(target, model=model, config=model.config)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot convert the tensors of {target} ({error}): fetch the checkpoint again"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}
