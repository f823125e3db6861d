"""Perplexity and divergence against transformers' own models in memory, with controls that must fail."""

import math
import random
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import families
from families import FAMILIES
from greenroom.errors import BudgetError, ConfigError
from greenroom.evaluate import WindowScore, score, summarise
from greenroom.evaluate.score import mean
from greenroom.original import Head, Original, Text, Window, cut, stream
from greenroom.original.states import windows_at_a_time
from samples import some

ROOM = 1 << 30
STREAMED = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "nemotron_h", "zaya", "glm4v_moe"]
"""plain and grouped attention; sliding windows and sinks; latent attention; recurrent layers; layers that pass on more
than hidden states; a vision tower beside"""
NO_TEXT = {"diffusion_gemma", "openai_privacy_filter"}
"""a model that starts from noise, and one that labels tokens"""
OTHERS = FAMILIES.keys() - {*STREAMED, *NO_TEXT}
ROUNDED = 1e-6
"""largest |difference| / largest |logit| where sums run in another order"""


def ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(families.FIRST_ID, families.LAST_ID, (count,), generator=torch.Generator().manual_seed(seed))


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def logits_of(original: Original, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([original.head.logits(states) for states in original.states(tokens)])


# --- the original, streamed


@pytest.mark.parametrize("name", some([*STREAMED, *sorted(OTHERS)], STREAMED))
def test_streamed_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path)
    families.realign(model)
    tokens = ids(24).view(2, 12)
    with torch.no_grad():
        want = model(input_ids=tokens).logits
    with Original(tmp_path) as original:
        assert distance(logits_of(original, tokens), want) < ROUNDED
        held = [name for name, value in original.model.named_parameters() if not value.is_meta]
        inside = [name for name in held if name.startswith(original.stack_name)]
        assert held and not inside, "layers' weights stay in memory"


def test_a_dense_checkpoint_streams(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    families.randomise(model, 3)
    model.save_pretrained(tmp_path)
    families.realign(model)
    tokens = ids(12)[None]
    with torch.no_grad(), Original(tmp_path) as original:
        assert distance(logits_of(original, tokens), model(input_ids=tokens).logits) < ROUNDED


def test_one_wrong_expert_shows(checkpoint: Path) -> None:
    """Negative control: the comparison above with one expert's product zeroed."""
    tokens = ids(24).view(2, 12)
    with Original(checkpoint) as original:
        want = logits_of(original, tokens)
    with Original(checkpoint, lambda name, value: value * (name != "model.layers.1.mlp.experts.2.down_proj")) as wrong:
        assert distance(logits_of(wrong, tokens), want) > 1e-3


def test_a_transform_sees_every_weight_once(checkpoint: Path) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: torch.Tensor) -> torch.Tensor:
        assert name not in seen
        seen[name] = tuple(value.shape)
        return value

    with Original(checkpoint, see) as original:
        logits_of(original, ids(64)[None])
    model = FAMILIES["mixtral"].build()
    dense = {name: tuple(value.shape) for name, value in model.state_dict().items() if ".experts." not in name}
    assert {name: shape for name, shape in seen.items() if ".experts." not in name} == dense
    assert seen["model.layers.2.mlp.experts.0.gate_up_proj"] == (160, 96)
    assert seen["model.layers.2.mlp.experts.5.down_proj"] == (96, 80)


def test_a_broken_transform_leaves_no_weights_behind(checkpoint: Path) -> None:
    def fail(name: str, value: torch.Tensor) -> torch.Tensor:
        if "layers.1" in name:
            raise RuntimeError("planted")
        return value

    with Original(checkpoint, fail) as original:
        with pytest.raises(RuntimeError, match="planted"):
            original.states(ids(8)[None])
        held = [name for name, value in original.model.named_parameters() if not value.is_meta]
        assert not [name for name in held if "layers" in name]


def test_states_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    windows = cut(ids(75), 8, 3)
    with Original(checkpoint) as original:
        together = stream(original, windows, ROOM)
        least = original.layer_nbytes + original.outer_nbytes
        each = windows_at_a_time(original, 8, ROOM)
        alone = [window.predicting(original.states(window.ids[None])[0]) for window in windows]
        assert each > 1
        for number, want in enumerate(alone):
            assert distance(together.get(number), want) < ROUNDED
        with pytest.raises(BudgetError, match="--ram"):
            stream(original, windows, least)
    together.close()


# --- windows


@given(st.integers(2, 300), st.integers(2, 40), st.integers(1, 40))
def test_strided_windows_score_every_token_once(count: int, context: int, stride: int) -> None:
    stride = min(stride, context - 1)
    text = torch.arange(count)
    windows = cut(text, context, stride)
    assert torch.cat([window.targets for window in windows]).tolist() == list(range(1, count))
    for window in windows:
        assert len(window.ids) <= context
        assert (window.predicting(window.ids) + 1).tolist() == window.targets.tolist()


@given(st.integers(1, 300), st.integers(2, 40))
def test_separate_windows_drop_the_rest(count: int, context: int) -> None:
    if count < context:
        with pytest.raises(ConfigError):
            cut(torch.arange(count), context)
        return
    windows = cut(torch.arange(count), context)
    assert torch.cat([window.ids for window in windows]).tolist() == list(range(count // context * context))
    assert all(window.targets.tolist() == window.ids[1:].tolist() for window in windows)


@pytest.mark.parametrize("arguments", [(1,), (8, 0), (8, 9), (8, None, 0), (8, -1)])
def test_windows_that_cannot_be(arguments: "tuple[int, ...]") -> None:
    with pytest.raises(ConfigError):
        cut(torch.arange(50), *arguments)


def test_a_text_is_read_as_it_should_be(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo ‖ three\n".encode())
    text = Text.read(path)
    assert text.content == path.read_text() and text.nbytes == path.stat().st_size and not text.truncated
    path.write_bytes(b"latin \xe9 one")
    with pytest.raises(ConfigError, match=r"byte 6.*iconv"):
        Text.read(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Text.read(tmp_path)


def test_a_long_text_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ééééé")
    monkeypatch.setattr("greenroom.original.windows.MAX_TEXT_NBYTES", 5)
    text = Text.read(path)
    assert text.truncated and text.content == "éé"


# --- figures


class Given(Head):
    """States that are logits already."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states


def made_up(rows: int, seed: int, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_score_is_the_textbook_formula() -> None:
    window = Window(ids=torch.arange(200) % 11, scored=150)
    p, q = made_up(150, 1), made_up(150, 2)
    got = score(window, p, Given(11), q, Given(11))
    want = torch.nn.functional.cross_entropy(p.double(), window.targets, reduction="sum")
    assert got.tokens == 150 and got.nll == pytest.approx(float(want), rel=1e-12)
    kl = (q.double().softmax(-1) * (q.double().log_softmax(-1) - p.double().log_softmax(-1))).sum()
    assert got.kl == pytest.approx(float(kl), rel=1e-9)
    assert got.agreed == int((p.argmax(-1) == q.argmax(-1)).sum())
    same = score(window, q, Given(11), q, Given(11))
    assert same.kl == 0 and same.agreed == 150 and same.nll == same.original_nll


def test_impossible_tokens_add_nothing_to_the_divergence() -> None:
    window = Window(ids=torch.ones(9, dtype=torch.int64), scored=8)
    p, q = made_up(8, 1), made_up(8, 2)
    p[:, 5] = q[:, 5] = -math.inf
    assert math.isfinite(score(window, p, Given(11), q, Given(11)).kl)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 50)), min_size=2, max_size=8))
def test_standard_errors_are_those_of_a_ratio(windows: "list[tuple[int, float]]") -> None:
    counts, sums = [n for n, _ in windows], [s for _, s in windows]
    got = mean(sums, counts)
    centre = sum(sums) / sum(counts)
    residuals = [s - centre * n for n, s in windows]  # their mean is zero
    want = statistics.stdev(residuals) / statistics.fmean(counts) / math.sqrt(len(windows))
    assert got.value == pytest.approx(centre) and got.se == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_standard_errors_match_what_repeated_samples_spread() -> None:
    """Brute force: the spread of means over many texts of dependent tokens; the plain formula must miss it."""
    draw = random.Random(1)

    def text() -> "list[list[float]]":
        return [[level + draw.gauss(0, 1) for _ in range(20)] for level in (draw.gauss(0, 1) for _ in range(30))]

    texts = [text() for _ in range(300)]
    clustered = [mean([sum(window) for window in one], [20] * 30) for one in texts]
    spread = statistics.stdev(estimate.value for estimate in clustered)
    assert statistics.fmean(estimate.se or 0 for estimate in clustered) == pytest.approx(spread, rel=0.1)
    flat = [mean([token for window in one for token in window], [1] * 600).se or 0 for one in texts]
    assert statistics.fmean(flat) < 0.5 * spread


def test_one_window_has_no_standard_error() -> None:
    summary = summarise(
        [WindowScore(tokens=4, nll=4 * math.log(7), original_nll=4 * math.log(5), kl=2, agreed=3)], True
    )
    assert summary.perplexity.value == pytest.approx(7) and summary.perplexity.se is None
    assert summary.perplexity_ratio and summary.perplexity_ratio.value == pytest.approx(1.4)
    assert summary.kl and summary.kl.value == 0.5 and summary.top1_agreement and summary.top1_agreement.value == 0.75
    assert summarise([WindowScore(tokens=4, nll=1)], False).kl is None
