"""Routing traces: what is recorded is what the model did; a damaged file is one clear line, never figures."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from greenroom import kernels
from greenroom.cache import POLICIES, ExpertCache, replay
from greenroom.cli import main
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import ConfigError, TraceError
from greenroom.kernels import native
from greenroom.model import routers
from greenroom.packed import PackedModel
from greenroom.trace import RoutingTrace, TraceWriter, import_arrays, read_trace, write_trace
from greenroom.trace.recorder import Recorder

PROMPTS = ([[3, 14, 15, 9, 2, 6], [5, 3]], [3, 4])
"""Token ids of two prompts, and how many tokens are generated after each."""


def same(one: RoutingTrace, other: RoutingTrace) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return (a is None and b is None) if a is None or b is None else np.array_equal(a, b)

    return all(equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def example(tokens: int = 40, layers: int = 3, experts: int = 6, k: int = 2, seed: int = 0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    return RoutingTrace(
        num_experts=experts,
        experts=np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.uint8),
        offsets=np.array([0, tokens // 3, tokens]),
        prompt=np.arange(tokens) % (tokens // 3 + 1) < 5,
        passes=np.unique([0, *range(5, tokens // 3), tokens // 3, *range(tokens // 3 + 5, tokens + 1)]),
        weights=rng.random((tokens, layers, k)).astype(np.float16),
        probabilities=rng.random((tokens, layers, experts)).astype(np.float16),
        guesses=np.argsort(rng.random((tokens, layers, 2, experts)), axis=3)[..., :4].astype(np.uint8),
        model="example",
    )


class Watched:
    """Beside the recorder: every call's inputs, to compute the gates the obvious way."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.calls = recorder, []

    def __call__(self, layer: int, x: torch.Tensor, index: Any, weights: Any, shares: Any) -> None:
        self.calls.append((layer, x.clone(), torch.as_tensor(index).clone(), torch.as_tensor(weights).clone()))
        self.recorder(layer, x, index, weights, shares)


@pytest.fixture(scope="module")
def recorded(packed4: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> "Any":
    """(the trace of PROMPTS, the calls it was made of, the gates, the runner's own trace, the hits of the run)"""
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    engine = Engine(packed4, EngineSettings(experts_per_layer=2, policy="learned", validate=True))
    gates = routers(engine.model, packed4)
    engine.runner.trace = []
    with Recorder(path, gates, 6, lookahead=2, ranked=4, model="tiny") as recorder:
        watched = engine.runner.observer = Watched(recorder)
        for ids, count in zip(*PROMPTS, strict=True):
            recorder.begin(len(ids))
            with torch.no_grad():
                out = engine.model(torch.tensor([ids]), use_cache=True)
                for _ in range(count):
                    token = out.logits[:, -1:].argmax(-1)
                    out = engine.model(token, past_key_values=out.past_key_values, use_cache=True)
    hits = engine.metrics().hits
    engine.close()
    return read_trace(path), watched.calls, gates, engine.runner.trace, hits


def test_tokens_passes_and_prompts(recorded: Any) -> None:
    trace = recorded[0]
    assert trace.experts.shape == (15, 3, 2) and trace.num_experts == 6 and trace.model == "tiny"
    assert trace.offsets.tolist() == [0, 9, 15]
    assert trace.passes.tolist() == [0, 6, 7, 8, 9, 11, 12, 13, 14, 15]
    assert np.flatnonzero(trace.prompt).tolist() == [0, 1, 2, 3, 4, 5, 9, 10]


def test_a_trace_holds_what_the_gates_said(recorded: Any) -> None:
    trace, calls, gates, _, _ = recorded
    layers = len(gates)
    for number, start in enumerate(trace.passes[:-1]):
        inputs = [x for _, x, _, _ in calls[number * layers : (number + 1) * layers]]
        rows = slice(start, start + len(inputs[0]))
        for layer, x, index, weights in calls[number * layers : (number + 1) * layers]:
            assert (np.sort(trace.experts[rows, layer], axis=1) == np.sort(index.numpy(), axis=1)).all()
            assert np.allclose(-np.sort(-weights.numpy(), axis=1), trace.weights[rows, layer], atol=1e-3)
            shares = gates[layer].scores(x).softmax(1)
            assert np.allclose(shares.numpy(), trace.probabilities[rows, layer], atol=1e-3)
            assert (shares.topk(2).indices.numpy() == trace.experts[rows, layer]).all()
            for ahead in (1, 2):
                guessed = trace.guesses[rows, layer, ahead - 1]
                if layer < ahead:
                    assert (guessed == 6).all()  # nobody looks ahead from before the first layer
                else:
                    best = gates[layer].scores(inputs[layer - ahead]).topk(4).indices.numpy()
                    assert (best == guessed).all()


def test_the_gates_of_other_layers_say_otherwise(recorded: Any) -> None:
    """Negative control: the comparison above notices an input taken from the wrong layer."""
    trace, calls, gates, _, _ = recorded
    wrong = gates[2].scores(calls[0][1]).topk(4).indices.numpy()
    assert not (wrong == trace.guesses[:6, 2, 0]).all()


def requests_of(trace: RoutingTrace, told: bool) -> "list[tuple[int, list[int], list[float] | None]]":
    """What the engine asked its cache: a set per pass and layer, least valuable first, and what the router thinks of
    all experts for a single token, if the cache was `told`."""
    requests = []
    for start, stop in zip(trace.passes[:-1], trace.passes[1:], strict=True):
        for layer in range(trace.layers):
            flat = trace.experts[start:stop, layer, ::-1].ravel().tolist()
            last = {expert: place for place, expert in enumerate(flat)}
            shares = trace.probabilities[start, layer].astype(np.float64).tolist() if stop - start == 1 else None
            requests.append((layer, sorted(last, key=lambda expert: last[expert]), shares if told else None))
    return requests


def test_a_trace_replays_to_the_hits_of_the_run(recorded: Any) -> None:
    trace, _, _, live, hits = recorded
    told = native.extension() is not None
    requests = requests_of(trace, told)
    assert requests == [(layer, list(experts), shares) for layer, experts, shares in live]
    cache = ExpertCache(layers=3, capacities=[2] * 3, staging=4, policy=POLICIES["learned"], validate=True)
    assert sum(len(access.hits) for access in replay(cache, requests)) == hits


def run_and_replay(
    packed: PackedModel, path: Path, policy: str, spoil: "Callable[[list[float]], list[float]]" = list
) -> "tuple[list[int], list[int]]":
    """(misses up to each call of a run of 60 tokens, the same of a replay of its trace, its probabilities spoilt)"""
    engine = Engine(packed, EngineSettings(experts_per_layer=2, policy=policy, staging=1, validate=True))
    misses = []
    with Recorder(path, routers(engine.model, packed), 6, lookahead=0, ranked=0) as recorder:
        engine.runner.observer = Watched(recorder)
        past = None
        recorder.begin(4)
        for ids in [torch.tensor([PROMPTS[0][0][:4]]), *(torch.tensor([[7 * n % 90 + 3]]) for n in range(60))]:
            with torch.no_grad():
                past = engine.model(ids, past_key_values=past, use_cache=True).past_key_values
            misses.append(engine.metrics().requests - engine.metrics().hits)
    told = engine.runner._cache.needs_probabilities or (
        engine.runner._cache.uses_probabilities and engine.decode.steps > 0
    )
    engine.close()
    trace = read_trace(path)
    cache = ExpertCache(layers=3, capacities=[2] * 3, staging=1, policy=POLICIES[policy], validate=True)
    again = []
    for layer, experts, shares in requests_of(trace, told):
        replay(cache, [(layer, experts, None if shares is None else spoil(shares))])
        if layer == 2:
            again.append(cache.counters.requests - cache.counters.hits)
    return misses, again


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("decode", ["modules", "compiled"])
def test_a_recorded_trace_replays_to_the_misses_of_the_run(
    packed4: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, decode: str
) -> None:
    monkeypatch.setenv("GREENROOM_DECODE", decode)
    live, again = run_and_replay(packed4, tmp_path / "t.npz", policy)
    assert again == live and len(set(live)) > 20


@pytest.mark.parametrize("policy", ["probability", "learned"])
def test_the_replay_notices_other_probabilities(packed4: PackedModel, tmp_path: Path, policy: str) -> None:
    """Negative control: what the gate thinks of all experts has a say in what the live cache keeps."""
    if policy == "learned" and native.extension() is None:
        pytest.skip("without the compiled step it is not told")
    live, again = run_and_replay(packed4, tmp_path / "t.npz", policy, spoil=lambda shares: shares[::-1])
    assert again != live


def test_recording_changes_no_bit(packed4: PackedModel, tmp_path: Path) -> None:
    engine = Engine(packed4, EngineSettings(experts_per_layer=1))
    ids = torch.tensor([PROMPTS[0][0]])
    with torch.no_grad():
        plain = engine.model(ids).logits
        with Recorder(tmp_path / "t", routers(engine.model, packed4), 6, lookahead=1, ranked=2) as recorder:
            engine.runner.observer = recorder
            assert torch.equal(engine.model(ids).logits, plain)
    engine.close()
    assert kernels.describe(torch.float32)


def test_an_interrupted_recording_leaves_what_was_there(packed4: PackedModel, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, example())
    engine = Engine(packed4, EngineSettings(experts_per_layer=1))
    with (
        pytest.raises(KeyboardInterrupt),
        Recorder(path, routers(engine.model, packed4), 6, lookahead=1, ranked=2) as recorder,
    ):
        engine.runner.observer = recorder
        with torch.no_grad():
            engine.model(torch.tensor([[1, 2, 3]]))
        recorder.begin(1)
        raise KeyboardInterrupt
    engine.close()
    assert same(read_trace(path), example()) and [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("tokens", [18, 40, 700])
def test_what_is_written_is_read(tmp_path: Path, tokens: int) -> None:
    trace = example(tokens)
    write_trace(tmp_path / "t.npz", trace)
    assert same(read_trace(tmp_path / "t.npz"), trace)
    assert not same(read_trace(tmp_path / "t.npz"), example(tokens, seed=1))  # negative control
    plain = np.load(tmp_path / "t.npz", allow_pickle=False)
    assert json.loads(str(plain["meta"]))["format"] == "greenroom-trace"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, example())
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: Path("/dev/full").open("r+b"))  # noqa: SIM115
    with pytest.raises(TraceError, match=r"No space left.*TMPDIR"):
        write_trace(path, example(seed=1))
    assert same(read_trace(path), example()) and [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_no_token_at_all(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.npz", layers=2, num_experts=4, top_k=1):
        pass
    trace = read_trace(tmp_path / "t.npz")
    assert trace.tokens == 0 and trace.offsets.tolist() == [0]


def test_every_damage_is_found(tmp_path: Path) -> None:
    """A byte turned anywhere, or an end cut off: an error that names the file, or the very same trace (zip has bytes
    that mean nothing). Never another trace, never another exception."""
    path = tmp_path / "t.npz"
    write_trace(path, example(12))
    raw, found = path.read_bytes(), 0
    for place in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[place] ^= 0xFF
        found += refused_or_same(path, bytes(damaged))
    assert found > len(raw) // 14
    for end in range(0, len(raw), 101):
        assert refused_or_same(path, raw[:end])


def refused_or_same(path: Path, raw: bytes) -> bool:
    path.write_bytes(raw)
    try:
        trace = read_trace(path)
    except TraceError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return True
    assert same(trace, example(12))
    return False


@pytest.mark.parametrize(
    "change,words",
    [
        ({"meta": np.array("{}")}, "not a greenroom trace"),
        ({"meta": np.array('{"format": "greenroom-trace", "version": 2, "num_experts": 6}')}, "version 2"),
        ({"meta": np.array('{"format": "greenroom-trace", "version": 1}')}, "num_experts"),
        ({"meta": np.array("[1]")}, "not a greenroom trace"),
        ({"experts": np.zeros((40, 3), np.uint8)}, "shape"),
        ({"experts": np.full((40, 3, 2), 9, np.uint8)}, "expert 9 of 6"),
        ({"experts": np.zeros((40, 3, 2), np.uint8)}, "twice"),
        ({"experts": np.array(["x"])}, "shape"),
        ({"offsets": np.array([0, 41])}, "offsets"),
        ({"offsets": np.array([0, 30, 13, 40])}, "offsets"),
        ({"offsets": np.array([0, 30, 13, 40], np.uint64)}, "offsets"),
        ({"offsets": np.array([0, 3, 40])}, "spans two prompts"),
        ({"passes": np.zeros((0,), np.int64)}, "passes"),
        ({"prompt": np.zeros(39, np.bool_)}, "prompt"),
        ({"weights": np.zeros((40, 3, 3), np.float16)}, "weights"),
        ({"guesses": np.zeros((40, 3, 2, 4), np.float32)}, "guesses"),
        ({"experts": np.array([{}], object)}, "cannot be read"),
        ({"experts": None}, "lacks experts"),
    ],
)
def test_a_foreign_trace_is_refused(tmp_path: Path, change: "dict[str, Any]", words: str) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, example())
    arrays = dict(np.load(path)) | change
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(TraceError, match=words) as caught:
        read_trace(path)
    assert "t.npz" in str(caught.value)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    for name, raw in {"empty": b"", "text": b"hello", "npy": b"\x93NUMPY\x01\x00"}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(TraceError, match=name):
            read_trace(tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("experts", "no array")
    for name in ("array.npy", "zip", "nowhere", "."):
        with pytest.raises(TraceError):
            read_trace(tmp_path / name)


# --- other people's arrays


def test_arrays_are_imported(tmp_path: Path) -> None:
    experts = np.array([[[5, 1]], [[0, 2]], [[1, 0]]], np.int64)
    probabilities = np.array([[[0.6, 0.4]]] * 3, np.float32)
    np.savez(tmp_path / "theirs.npz", experts=experts, offsets=[0, 1, 3], probs=probabilities, dataset=np.array(["a"]))
    trace = import_arrays(tmp_path / "theirs.npz")
    assert trace.num_experts == 6 and trace.experts.tolist() == experts.tolist()
    assert trace.offsets.tolist() == [0, 1, 3] and not trace.prompt.any() and trace.passes.tolist() == [0, 1, 2, 3]
    assert trace.weights is not None and trace.weights.dtype == np.float16
    assert import_arrays(tmp_path / "theirs.npz", num_experts=300).experts.dtype == np.uint16


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"routes": np.zeros((2, 2, 2))}, "no array named experts, only routes"),
        ({"experts": np.zeros((2, 2), int)}, "not integers"),
        ({"experts": np.zeros((2, 2, 1))}, "not integers"),
        ({"experts": np.array([[[1, 0]], [[1, -1]]])}, "from -1 to 1.*fill up a set with .* --num-experts"),
        ({"experts": np.full((2, 2, 1), 70000)}, "70000"),
        ({"experts": np.array([[[0, 1]], [[1, 1]]])}, "twice"),
        ({"experts": np.array([[[0, 0]]])}, "2 of 1"),
        ({"experts": np.zeros((2, 2, 1), int), "offsets": np.array([0, 7])}, "correct its array offsets"),
        ({"experts": np.zeros((2, 2, 1), int), "prompt": np.zeros(3, np.bool_)}, "correct its array prompt"),
        ({"experts": np.zeros((2, 2, 1), int), "weights": np.ones((2, 2))}, r"weights has shape .*\(2, 2, 1\)"),
        ({"experts": np.zeros((2, 2, 1), int), "probs": np.ones((2, 2, 8))}, r"probs has shape .*\(2, 2, 1\)"),
        ({"experts": np.zeros((2, 2, 1), int), "weights": np.full((2, 2, 1), "x")}, "weights has .*type"),
    ],
)
def test_arrays_that_are_no_routing(tmp_path: Path, arrays: "dict[str, Any]", words: str) -> None:
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(TraceError, match=words) as caught:
        import_arrays(tmp_path / "theirs.npz")
    assert "record it again" not in str(caught.value)


def test_too_few_experts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.npz"
    np.savez(path, experts=np.array([[[5, 1]], [[0, 2]]]))
    with pytest.raises(TraceError, match=r"4 experts are too few .* more with --num-experts"):
        import_arrays(path, num_experts=4)
    assert import_arrays(path, num_experts=5).num_experts == 5, "5 is nobody"


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 2, 1), int))
    with pytest.raises(TraceError, match=r"is a single array: save it with numpy.savez\('x', experts=…\)"):
        import_arrays(tmp_path / "x.npy")


# --- the command


def test_trace_records_and_imports(packed_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "t.npz"
    prompts.write_text("hello\n\nhello again\n")
    arguments = ["trace", str(packed_demo), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "6"]
    assert main([*arguments, "--guess-layers", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    trace = read_trace(out)
    assert report["prompts"] == len(trace.offsets) - 1 == 2
    assert report["prompt_tokens"] == trace.prompt.sum() and report["decode_tokens"] == (~trace.prompt).sum() <= 10
    assert trace.guesses is not None and trace.guesses.shape[2] == 2 and trace.probabilities is not None
    assert main(["trace", "--import", str(out), "--out", str(tmp_path / "again.npz")]) == 0
    assert read_trace(tmp_path / "again.npz").experts.tolist() == trace.experts.tolist()


def test_prompts_as_json_lines(tmp_path: Path) -> None:
    from greenroom.cli.trace import read_prompts

    (tmp_path / "p").write_text('{"prompt": "one\\ntwo", "id": 1}\n{"prompt": "three"}\n')
    assert read_prompts(tmp_path / "p") == ["one\ntwo", "three"]


@pytest.mark.parametrize("odd", ["null", "5", '["a"]'])
def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, odd: str) -> None:
    from greenroom.cli.trace import read_prompts

    (tmp_path / "p").write_text(f'{{"prompt": "one"}}\n\n{{"prompt": {odd}}}\n')
    with pytest.raises(ConfigError, match=r"p, line 3: .* text in the field prompt"):
        read_prompts(tmp_path / "p")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--out", "t"], "give a model"),
        (["demo", "--import", "x.npz", "--out", "t"], "give a model"),
        (["demo", "--out", "t"], "--prompts"),
        (["demo", "--prompts", "nowhere", "--out", "t"], "nowhere"),
        (["demo", "--prompts", "empty", "--out", "t"], "no prompt"),
        (["demo", "--prompts", "bad", "--out", "t"], "field prompt"),
        (["demo", "--prompts", "p", "--out", "no/where/t"], "does not exist"),
        (["demo", "--prompts", "p", "--out", "t", "--guess-layers", "-1"], "--guess-layers"),
        (["demo", "--prompts", "p", "--out", "t", "--vram", "1GiB"], "--vram"),
        (["--import", "nowhere.npz", "--out", "t"], "nowhere.npz"),
        (["--import", "x", "--out", "t", "--num-experts", "0"], "--num-experts"),
        (["demo", "--prompts", "p", "--out", "t", "--num-experts", "4"], "--num-experts"),
        (["demo", "--prompts", "p", "--out", "folder"], "folder"),
        (["demo", "--prompts", "p", "--out", "blocked"], "cannot write blocked"),
        (["demo", "--prompts", "p", "--out", "t" * 300], "cannot write"),
        (["--import", "x", "--out", "folder"], "folder"),
        (["--import", "x", "--out", "t", "--prompts", "p"], "--prompts"),
        (["--import", "x", "--out", "t", "--no-probabilities"], "--no-probabilities"),
        (["--import", "x", "--out", "t", "--temperature", "1"], "--temperature"),
        (["--import", "x", "--out", "t", "--ram", "1GiB"], "--ram"),
        (["--import", "x", "--out", "t", "--expert-bits", "2"], "--expert-bits"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n \n")
    Path("bad").write_text('{"text": 1}\n')
    Path("p").write_text("hello\n")
    for folder in ("folder", "blocked.partial"):
        Path(folder).mkdir()
    monkeypatch.setattr("greenroom.library.find", lambda *_, **__: pytest.fail("a model was looked for"))
    assert main(["trace", *arguments]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("greenroom: ") and words in err[0]
    assert not list(tmp_path.glob("t*"))
