"""The GPU suite's own code, on a CPU: tiny shapes, Triton's interpreter, and a clock that calls once."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_check, gpu_kernels, gpu_peers, gpu_suite
from benchmarks.kernels import MODELS, Model, in_turns, layout
from benchmarks.shapes import SHAPES
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from greenroom import seam
from greenroom.expert_records import experts_entry
from greenroom.kernels import device
from greenroom.kernels.gpu import launch
from greenroom.quant import Format
from samples import some

CPU = torch.device("cpu")
TINY = Model("tiny", 64, 32, 2)
TURNS = dataclasses.replace(TINY, activation=in_turns(1.0), biased=True)
pytestmark = pytest.mark.skipif(bool(device.unusable("cpu")), reason=device.unusable("cpu"))


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cost is per program."""
    monkeypatch.setattr(launch, "ROWS", 64)
    monkeypatch.setattr(launch, "BLOCK", 4096)


class OnceClock:
    """Calls everything once and says that it took a millisecond."""

    def seconds(self, calls: "Sequence[Callable[[], Any]]", *, graph: bool = True) -> float:
        for call in calls:
            call()
        return 1e-3


def box(**result: Any) -> gpu_suite.Box:
    return gpu_suite.Box(CPU, OnceClock(), ends=10.0, result=result, now=lambda: 0.0)


def test_floors() -> None:
    found = gpu_kernels.floors(OnceClock(), CPU, nbytes=1 << 16, side=64)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 65536 / 1e-3 / 1e9)
    assert found["matmul_tflops"] == pytest.approx(2 * 64**3 / 1e-3 / 1e12)


TRUE_SHAPES = ("mixtral-8x7b-4", "qwen3-30b-a3b-48", "gpt-oss-20b-24")


@pytest.mark.parametrize("model,name", list(zip(MODELS, TRUE_SHAPES, strict=True)))
def test_kernels_are_timed_on_true_shapes(tmp_path: Path, model: Model, name: str) -> None:
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.config()))
    skeleton = seam.skeleton(seam.load_config(tmp_path))
    experts = seam.experts_modules(skeleton)[0]
    entry = experts_entry(0, experts, Format.of(4), "bfloat16")
    assert layout(model, Format.of(4)) == list(entry.tensors)
    assert layout(dataclasses.replace(model, biased=not model.biased), Format.of(4)) != list(entry.tensors)  # control
    assert (model.top_k, gpu_kernels.EXPERTS[model.name]) == (shape.top_k, entry.num_experts)
    assert model.activation.kind == seam.activation_kind(skeleton.get_submodule(experts.name))


def test_gpt_oss_s_gate_is_transformers() -> None:
    family, x = SimpleNamespace(alpha=1.702, limit=7.0), 9 * torch.randn(5, 64)
    wanted = GptOssExperts._apply_gate(family, x)
    assert torch.equal(MODELS[-1].activation.gate(x), wanted)
    assert not torch.equal(in_turns(6.0).gate(x), wanted)  # the control


@pytest.mark.parametrize(
    "model,variant,tokens",
    some(
        [(TINY, "", 1), (TINY, "together", 2), (TINY, "rows 32", 1), (TURNS, "together", 2)],
        [(TINY, "together", 2), (TURNS, "together", 2)],
    ),
)
def test_decode(model: Model, variant: str, tokens: int) -> None:
    before = launch.FEW_TOKENS, launch.ROWS
    line = gpu_kernels.decode(OnceClock(), CPU, 10.0, model, Format.of(4), tokens, 1, variant)
    assert before == (launch.FEW_TOKENS, launch.ROWS)
    its = gpu_kernels.arena(model, Format.of(4), 1, CPU)[1]
    routes = gpu_kernels.routes(tokens, 2, 4, 8, 1, CPU)
    each = sum(len(set(slots.flatten().tolist())) for slots in routes) / 8
    assert line["gb_per_s"] == pytest.approx(each * sum(tensor.nbytes for tensor in its) / 1e-3 / 1e9)
    assert line["share"] == pytest.approx(line["gb_per_s"] / 10.0)


def test_prompt_linear_and_peers() -> None:
    line = gpu_kernels.prompt(OnceClock(), CPU, 1.0, TINY, Format.of(2), 20, 4)
    assert line["each"] == 10 and line["tflops"] == pytest.approx(6 * 64 * 32 * 40 / 1e-3 / 1e12)
    assert gpu_kernels.linear(OnceClock(), CPU, 1.0, 16, 64, Format.of(3), count=1)["kernel"] == "greenroom"
    peers = {line["kernel"]: line for line in gpu_peers.lines(OnceClock(), CPU, 1.0, 64, 1024, count=1)}
    assert set(peers) == {"tinygemm", "gemlite"} and all("us" in line or "absent" in line for line in peers.values())


@pytest.mark.slow
def test_the_check_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("tiny", 72, 33, 2)
    found = list(gpu_check.check(Format.of(4), torch.float16, (1, 3, 20), CPU, model))
    assert [one.kernel for one in found] == ["token 1", "token 3", "prompt", "combine", "linear"]
    assert all(one.right for one in found), found
    token = device.token
    monkeypatch.setattr(device, "token", lambda x, *others: token(x.roll(1, 1), *others))  # negative control
    found = list(gpu_check.check(Format.of(4), torch.float16, (1, 3, 20), CPU, model))
    assert [one.right for one in found] == [False, False, True, True, True]


@pytest.mark.slow
def test_the_check_sees_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(one.right for one in gpu_check.check(Format.of(4), torch.float16, (2,), CPU, TURNS))
    token = device.token

    def unbiased(x: torch.Tensor, arena: torch.Tensor, slots: Any, weights: Any, its: Any, kind: str) -> torch.Tensor:
        return token(x, arena, slots, weights, its[:2], kind)

    monkeypatch.setattr(device, "token", unbiased)  # negative control
    found = gpu_check.check(Format.of(4), torch.float16, (2,), CPU, TURNS)
    assert [one.right for one in found] == [False, True, True, True]


def test_a_part_that_fails_leaves_the_others() -> None:
    def bad(box: gpu_suite.Box) -> None:
        raise RuntimeError("no such thing")

    def good(box: gpu_suite.Box) -> None:
        box.lines("linear").append({"kernel": "greenroom", "us": 3.0, "share": 0.5})

    result = gpu_suite.run(box(), [("bad", bad), ("good", good)])
    text = gpu_suite.table(result)
    assert "failed  bad: RuntimeError: no such thing" in text and "greenroom" in text
    late, kept = box(), []
    late.ends, late.keep = -1.0, lambda result: kept.append(dict(result))
    assert gpu_suite.run(late, [("good", good)])["failed"] == [{"part": "good", "error": "no time left"}]
    assert len(kept) == 1 and late.late("tier", 0.1) and "cut     tier" in gpu_suite.table(late.result)


def test_the_tier_is_measured_after_a_kernel_that_faulted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a process of its own, and this one's calls of CUDA all fail from then on."""

    def faulted() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run(command: "list[str]", **options: Any) -> "subprocess.CompletedProcess[str]":
        seconds = float(command[command.index("--seconds") + 1])
        assert seconds < options["timeout"] < made.left  # it ends by itself before it is stopped, and before the suite
        assert "stderr" not in options and "capture_output" not in options
        Path(command[-1]).write_text('{"tier": {"failed": []}}')
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(torch.cuda, "empty_cache", faulted)
    monkeypatch.setattr(subprocess, "run", run)
    made = box()
    made.ends = made.seconds
    assert gpu_suite.run(made, [("tier", gpu_suite.tier)])["tier"] == {"failed": []} and "failed" not in made.result


@pytest.mark.parametrize("stopped", [False, True])
def test_the_profile_is_kept(monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    def run(command: "list[str]", stdout: Any, **options: Any) -> None:
        assert command[1:3] == ["-m", "benchmarks.gpu_profile"] and options["timeout"] < made.left
        stdout.write("one\ntwo\n")
        if stopped:
            raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    made = box()
    made.ends = made.seconds
    result = gpu_suite.run(made, [("profile", gpu_suite.profile)])
    assert result["profile"] == ["one", "two"] and ("failed" in result) == stopped


@pytest.mark.parametrize("status,error", [(0, None), (3, None), (1, "status 1")])
def test_a_tier_that_broke_off_has_failed(monkeypatch: pytest.MonkeyPatch, status: int, error: "str | None") -> None:
    """1 is what a process gives that hung and was ended by its own watch, or that raised."""

    def run(command: "list[str]", **options: Any) -> "subprocess.CompletedProcess[str]":
        Path(command[-1]).write_text('{"tier": {"failed": []}}')
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    made = box()
    made.ends = made.seconds
    result = gpu_suite.run(made, [("tier", gpu_suite.tier)])
    failed = result.get("failed", [])
    assert result["tier"] == {"failed": []} and len(failed) == bool(error)
    assert not error or error in failed[0]["error"]


def _wrong(model: str) -> "dict[str, Any]":
    one = gpu_check.Checked(model=model, kernel="token 1", format="4-bit g64", dtype="float16", error=1.0)
    return dataclasses.asdict(one) | {"right": one.right}


@pytest.mark.slow
def test_what_checks_found_before_they_failed_or_were_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(_wrong("odd"))
    scripts = [f"print({line!r}, flush=True); {end}" for end in ("exit(1)", "exit(7)", "import time; time.sleep(60)")]
    started: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: "list[str]", **options: Any) -> "subprocess.Popen[bytes]":
        started.append(command)
        return popen(
            [sys.executable, "-c", scripts[len(started) - 1]], stdout=options["stdout"], stderr=options["stderr"]
        )

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    made = box()
    made.seconds, made.now = 15.0, time.monotonic
    made.ends = made.now() + 15
    result = gpu_suite.run(made, [("correctness", gpu_suite.correctness)])
    assert [command[-1] for command in started] == ["0/3", "1/3", "2/3"]
    assert [one["model"] for one in result["check"]] == ["odd"] * 3 and result["check_cut"]
    assert result["failed"] == [{"part": "correctness", "error": "status 7"}]


def test_every_case_is_a_part_of_one_process() -> None:
    every = gpu_check.cases(small=False)
    assert every[0][0] is gpu_check.EVEN and len(every) == 6 * len(gpu_check.FORMATS) + 9 == len(set(every))
    assert len(gpu_check.cases(small=True)) == 3


@pytest.mark.slow
def test_the_table_of_everything() -> None:
    clock = OnceClock()
    result = {
        "floors": gpu_kernels.floors(clock, CPU, nbytes=1 << 16, side=64),
        "decode": [gpu_kernels.decode(clock, CPU, 10.0, TINY, Format.of(4), 1, 1)],
        "prompt": [gpu_kernels.prompt(clock, CPU, 1.0, TINY, Format.of(4), 20, 4)],
        "linear": list(gpu_peers.lines(clock, CPU, 1.0, 64, 1024, count=1)),
        "check": [_wrong("odd")],
        "sanitizer": "clean",
    }
    text = gpu_suite.table(result)
    assert "wrong 1 token 1 odd 4-bit g64 float16 1.0e+00" in text
    assert [line.split()[0] for line in text.splitlines()] == [
        "floors", "checks", "decode", "prompt", "linear", "linear", "sanitizer",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", some(["gpu_suite", "gpu_check"], []))
def test_without_a_gpu_it_ends_with_one_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}"], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
