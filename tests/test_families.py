"""Every family behind the seam, packed and run from a cache of one expert per layer, against transformers itself.

The oracle is transformers' own model in float32: on the saved weights at 16 bits, on the dequantised weights at 4.
`python tests/test_families.py` rewrites docs/families.md.
"""

import contextlib
import dataclasses
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import families
from families import FAMILIES, UNSERVED, VARIANTS
from greenroom import seam
from greenroom.config import EngineSettings
from greenroom.device import FakeDevice
from greenroom.engine import Engine
from greenroom.errors import UnsupportedModelError
from greenroom.packed import ExpertsEntry, PackedModel
from greenroom.packing import pack
from greenroom.prompts import Prompts
from greenroom.quant import dequantize
from greenroom.store import DiskStore, Store
from samples import some

ALL = {**FAMILIES, **VARIANTS}
REFUSED = {"qwen3_omni_moe_talker": "a part of a model, with a configuration that transformers reads only inside it"}
RUN = sorted(ALL.keys() - REFUSED.keys())
GENERATING = [name for name in RUN if ALL[name].generates]
BITS = {
    16: {"expert_bits": 16, "attention_bits": 16, "head_bits": 16},
    4: {"expert_bits": 4, "attention_bits": 4, "head_bits": 8},
}
SETTINGS = EngineSettings(experts_per_layer=1, prefetch=1, validate=True, context=64)
TOLERANCE = 1e-4
"""largest |difference| / largest |logit|; float32 sums in another order stay near 1e-6"""
ROUNDED = 2e-3
"""the same below 16 bits: products round activations to 16-bit integers, and these weights exaggerate"""
CONTROL = 1e-3
"""what one wrong expert moves at least"""
NEW_TOKENS = 6
OWN_WAY = {"dots3_note_text", "gemma4", "gemma4_text"}
"""captured layers, around which transformers' own code goes on"""
UNCAPTURED = {
    "axk2",
    "bailing_hybrid",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note",
    "glm5_next",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hy_v4",
    "inkling",
    "inkling2",
    "inkling2_text",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "mistral_large4",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "unlimited_ocr",
    "zaya",
}
"""Families of which no layer is captured on a device: what they remember is more than keys and values."""
FEW = ["deepseek_v3", "gemma4_text", "gpt_oss", "jamba", "mixtral", "nemotron_h", "qwen2_moe", "qwen3_moe"]
"""Of each kind one, for what takes long."""
CONTINUED = ["gpt_oss", "jamba", "minimax"]
"""With windows, and those that cannot be given several tokens after others."""
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"


@dataclasses.dataclass
class Case:
    """A tiny model, saved; what transformers makes of its inputs; its packed forms."""

    name: str
    model: transformers.PreTrainedModel
    inputs: "dict[str, torch.Tensor]"
    folder: "tempfile.TemporaryDirectory[str]"

    @functools.cached_property
    def want(self) -> torch.Tensor:
        return families.logits(self.model, **self.inputs)

    @functools.cached_property
    def packed(self) -> "dict[int, PackedModel]":
        return {}

    def pack(self, bits: int) -> PackedModel:
        if bits not in self.packed:
            root = Path(self.folder.name)
            self.packed[bits] = pack(root / "saved", root / f"packed-{bits}", **BITS[bits])
        return self.packed[bits]


@functools.cache
def case_of(name: str) -> Case:
    model = ALL[name].build()
    folder = tempfile.TemporaryDirectory(prefix=f"greenroom-{name}-")
    model.save_pretrained(Path(folder.name) / "saved")
    families.realign(model)
    return Case(name, model, ALL[name].inputs(model), folder)


def folder_of(name: str) -> str:
    folder: str = ALL[name].build.args[0]
    return folder


@functools.cache
def on_seam() -> "frozenset[str]":
    return frozenset(families.families_on_seam())


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    if folder_of(name) not in on_seam():
        pytest.skip(f"transformers {transformers.__version__} has no {folder_of(name)} behind the seam")
    return case_of(name)


def each(names: "list[str]", kept: "list[str] | None" = None) -> pytest.MarkDecorator:
    """A case for each name; those that are not `kept` are slow."""
    return pytest.mark.parametrize("case", some(names, names if kept is None else kept), indirect=True)


@contextlib.contextmanager
def running(
    packed: PackedModel, store: "Store | None" = None, settings: EngineSettings = SETTINGS
) -> "Iterator[Engine]":
    engine = Engine(packed, settings, store=store)
    engine.runner.trace = []
    try:
        yield engine
    finally:
        engine.close()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and want.isfinite().all()
    return float((got - want).abs().max() / want.abs().max())


def run(case: Case, packed: PackedModel, store: "Store | None" = None) -> torch.Tensor:
    with running(packed, store) as engine:
        return families.logits(engine.model, **case.inputs)


# --- what is served is what transformers computes


@each(RUN, FEW)
def test_16_bits_equal_transformers(case: Case) -> None:
    packed = case.pack(16)
    with running(packed) as engine:
        assert distance(families.logits(engine.model, **case.inputs), case.want) < TOLERANCE
        layers = {layer for layer, *_ in engine.runner.trace}
        assert layers == set(range(len(packed.manifest.experts))), "some experts were never asked for"
        assert engine.runner.metrics.hits < engine.runner.metrics.requests, "one slot cannot serve it all"


@each(RUN, FEW)
def test_4_bits_equal_transformers_on_the_dequantised_weights(case: Case) -> None:
    packed = case.pack(4)
    want = families.logits(dequantised(case, packed), **case.inputs)
    assert distance(run(case, packed), want) < ROUNDED
    assert distance(want, case.want) > 5 * ROUNDED, "the oracle still has the weights that were packed"


@each(GENERATING, FEW)
def test_greedy_generation_equals_transformers(case: Case) -> None:
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (2, 9), generator=torch.Generator().manual_seed(3))
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **how}
    want = case.model.generate(**arguments)
    with running(case.pack(16)) as engine:
        got = engine.model.generate(**arguments)
    assert want.shape == (ids.shape[0], ids.shape[1] + NEW_TOKENS)
    assert got.tolist() == want.tolist()


@each(GENERATING, CONTINUED)
def test_a_prompt_in_pieces_equals_a_whole_one(case: Case) -> None:
    """For two sequences, one of them padded; and transformers' modules by themselves cannot do it where we say so."""
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (2, 17), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    want = first_logits(case.model, ids, mask)
    with running(case.pack(16), settings=dataclasses.replace(SETTINGS, prompt_chunk=10)) as engine:
        assert distance(first_logits(engine.model, ids, mask), want) < TOLERANCE
    base, forward, wrong = case.model.base_model, case.model.base_model.forward, True
    try:
        Prompts(base, 10, continues=True)
        with contextlib.suppress(RuntimeError):  # masks that do not fit
            wrong = distance(first_logits(case.model, ids, mask), want) > CONTROL
    finally:
        base.forward = forward
    assert wrong == (not seam.continues(case.model.config))


@each(GENERATING, CONTINUED)
def test_the_next_turn_equals_the_whole_conversation(case: Case) -> None:
    """What `generate` kept of a conversation's first turn, continued by several tokens."""
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 12), generator=torch.Generator().manual_seed(3))
    with running(case.pack(16)) as engine:
        fresh = first_logits(engine.model, ids)
        forget_batch(engine.model)
        cache = engine.model.generate(ids[:, :7], max_new_tokens=1, return_dict_in_generate=True).past_key_values
        if cache.get_seq_length() != 7:
            assert case.name == "minimax", "chat starts over each turn"
            return
        assert distance(first_logits(engine.model, ids, past_key_values=cache), fresh) < TOLERANCE


def first_logits(
    model: transformers.PreTrainedModel, ids: torch.Tensor, mask: "torch.Tensor | None" = None, **others: object
) -> torch.Tensor:
    """Of the first token that is generated."""
    if not others:
        forget_batch(model)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **others,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def forget_batch(model: transformers.PreTrainedModel) -> None:
    """Vision-language models keep positions of the last batch that they generated from."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


@each(GENERATING, FEW)
def test_captured_tokens_equal_transformers(case: Case) -> None:
    """On a fake device: the same bits as uncaptured ones, and transformers' logits."""
    settings = dataclasses.replace(SETTINGS, vram=1 << 30, cpu_experts=False, prefetch=0)
    found = []
    for graphs in (True, False):
        engine = Engine(case.pack(16), settings, device=FakeDevice())
        engine.steps.ahead, engine.steps.graphs = True, graphs
        found.append(decoded(engine.model))
        if graphs and case.name in UNCAPTURED:
            assert engine.steps.replayed == 0, "it is captured: take it off the list"
        elif graphs:
            assert engine.steps.replayed > 0, str(engine.steps)
            passed = engine.around is not None and engine.around.tokens > 0
            assert passed == (case.name not in OWN_WAY), str(engine.around)
        engine.close()
    assert all(map(torch.equal, *found))
    for one, other in zip(found[0], decoded(case.model), strict=True):
        assert distance(one, other) < TOLERANCE


@torch.no_grad()
def decoded(model: transformers.PreTrainedModel) -> "list[torch.Tensor]":
    """Logits of a few tokens after a prompt."""
    forget_batch(model)
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 9), generator=torch.Generator().manual_seed(3))
    out, found = model(input_ids=ids, use_cache=True), []
    for token in (11, 12, 13, 14):
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


# --- negative controls: a wrong expert shows


class TamperedStore:
    """The packed experts, except that reading one gives another's bytes, or zeros."""

    def __init__(self, packed: PackedModel, layer: int, expert: int, instead: "int | None") -> None:
        self._disk, self._victim, self._instead = DiskStore(packed), (layer, expert), instead
        self.record_nbytes = self._disk.record_nbytes

    def nbytes(self, layer: int) -> int:
        return self._disk.nbytes(layer)

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        if (layer, expert) != self._victim:
            self._disk.read(layer, expert, start, into)
        elif self._instead is None:
            into[:] = bytes(len(into))
        else:
            self._disk.read(layer, self._instead, start, into)

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        if (layer, expert) != self._victim:
            self._disk.check(layer, expert, record)

    def close(self) -> None:
        self._disk.close()


@each(RUN, FEW)
@pytest.mark.parametrize("instead", ["zeros", "another"])
def test_one_wrong_expert_moves_the_logits(case: Case, instead: str) -> None:
    packed = case.pack(16)
    for layer, expert in most_valued(case, packed).items():
        other = (expert + 1) % packed.manifest.experts[layer].num_experts
        store = TamperedStore(packed, layer, expert, None if instead == "zeros" else other)
        assert distance(run(case, packed, store), case.want) > CONTROL, f"expert {expert} of layer {layer} is idle"


def most_valued(case: Case, packed: PackedModel) -> "dict[int, int]":
    """Layer → the expert that weighs most in its last token."""
    with running(packed) as engine:
        families.logits(engine.model, **case.inputs)
        return {layer: experts[-1] for layer, experts, _ in engine.runner.trace}


# --- the oracle at 4 bits


@torch.no_grad()
def dequantised(case: Case, packed: PackedModel) -> transformers.PreTrainedModel:
    """Transformers' own model, its weights overwritten with what the packed files hold."""
    model = ALL[case.name].build()
    for entry in packed.manifest.experts:
        overwrite_experts(model.get_submodule(entry.module), entry, packed)
    embedding = model.get_input_embeddings().weight
    for linear in packed.manifest.linears:
        module = model.get_submodule(linear.module)
        assert type(module) is nn.Linear
        with safe_open(packed.folder / linear.file, "pt") as file:
            weight = dequantize(file.get_tensor(linear.module), linear.rows, linear.cols, linear.format)
        if module.weight is embedding:  # the head is packed, the embedding it is tied to is not
            module.weight = nn.Parameter(weight)
        else:
            module.weight.copy_(weight)
    families.realign(model)
    return model


def overwrite_experts(module: nn.Module, entry: ExpertsEntry, packed: PackedModel) -> None:
    with safe_open(packed.folder / entry.file, "pt") as file:
        for expert in range(entry.num_experts):
            record = file.get_tensor(f"{entry.module}.{expert}")
            for tensor in entry.tensors:
                part = record[tensor.offset : tensor.offset + tensor.nbytes]
                value = dequantize(part, tensor.rows, tensor.cols, tensor.format)
                target = getattr(module, tensor.name)[expert]
                is_matrix = target.ndim == 2
                target.copy_(value.T if is_matrix and module.is_transposed else value.view(target.shape))


# --- which families there are


def test_every_family_of_the_installed_transformers_is_accounted_for() -> None:
    missing = on_seam() - FAMILIES.keys() - UNSERVED.keys()
    assert not missing, f"add to tests/families.py: {sorted(missing)}"


@each(sorted(REFUSED))
def test_what_is_not_served_is_refused_in_one_line(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match="names no model_type") as error:
        case.pack(16)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_document_says_what_is_served() -> None:
    committed = DOCUMENT.read_text()
    stated = re.search(r"transformers (\d[\w.+]*\w)", committed)
    assert stated, "the document names no version of transformers"
    if stated[1] != transformers.__version__:
        pytest.skip(f"the document is of transformers {stated[1]}, installed is {transformers.__version__}")
    assert committed == render(), "run: python tests/test_families.py"


# --- docs/families.md


def render() -> str:
    """The document: a row per class, from packing it at 16 bits and comparing its logits with transformers'."""
    rows = [row(name) for name in sorted(ALL, key=lambda name: (folder_of(name), name))]
    rows += [f"| {name} | | | no: {reason} | |" for name, reason in sorted(UNSERVED.items())]
    served = {folder_of(name) for name in ALL if not refusal(name)}
    return "\n".join([*header(len(served)), *rows]) + "\n"


def header(served: int) -> "list[str]":
    version, total = transformers.__version__, len(FAMILIES.keys() | UNSERVED.keys())
    return [
        "# Families",
        "",
        "Made by `python tests/test_families.py`, not by hand; `tests/test_families.py` fails where it is out of date.",
        f"It describes transformers {version}: {served} of its {total} families behind the experts seam are served.",
        "",
        "A class is served if a small random model of it, as transformers saves it, packs and then runs with one",
        f"expert per layer in memory, with transformers' own logits to {TOLERANCE:g} at 16 bits. The tests hold it to",
        "the same at 4 bits against the dequantised weights, compare greedy generation, and check that a wrong expert",
        "shows.",
        "",
        "*Experts on disk* is how transformers saves them, and how published checkpoints hold them. Where that is one",
        "tensor per expert, a checkpoint whose experts are stacked, as they are in the running model, packs as well.",
        "",
        "*Decodes* says what computes single tokens: compiled code, where it understands the decoder and agrees with",
        "its modules (see [design.md](design.md)), or transformers' modules.",
        "",
        "| family | class | experts on disk | served | decodes |",
        "|---|---|---|---|---|",
    ]


def row(name: str) -> str:
    case = case_of(name)
    reason = refusal(name)
    served = f"no: {reason}" if reason else "yes"
    return f"| {folder_of(name)} | `{type(case.model).__name__}` | {form_on_disk(case)} | {served} | {decoder(name)} |"


@functools.cache
def refusal(name: str) -> str:
    """Why a class is not served; empty if it is."""
    case = case_of(name)
    try:
        moved = distance(run(case, case.pack(16)), case.want)
    except UnsupportedModelError as error:
        return REFUSED.get(name, str(error))
    return "" if moved < TOLERANCE else "its logits differ from transformers'"


def decoder(name: str) -> str:
    """What decodes its single tokens; empty for a class that is not served."""
    if refusal(name):
        return ""
    with running(case_of(name).pack(16)) as engine:
        return "modules" if engine.decode.prove() else "compiled"


def form_on_disk(case: Case) -> str:
    names = []
    for path in (Path(case.folder.name) / "saved").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return "one tensor per expert" if any(re.search(r"\bexperts\.\d+\.", name) for name in names) else "stacked"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render())
