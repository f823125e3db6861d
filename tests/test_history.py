"""What runs leave for the next: hit counts on disk, and the plan that is made of them."""

import json
from typing import Any

import pytest
import torch

from greenroom import planner, seam
from greenroom.cache.curve import HitCounts
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.history import MOST, History
from greenroom.packed import PackedModel

LAYERS, EXPERTS = 3, 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path))


def steep(layer: int, requested: float = 90_000.0) -> HitCounts:
    """`layer` needs one slot for all its hits, the others six."""
    counts = HitCounts(LAYERS)
    counts.requested = [requested] * LAYERS
    counts.found = [[0.0] * 5 + [requested] for _ in range(LAYERS)]
    counts.found[layer] = [requested]
    return counts


def test_counts_come_back(packed4: PackedModel) -> None:
    history = History(packed4.manifest)
    assert history.gains() is None
    history.add(HitCounts(LAYERS))
    assert not history.path.exists()  # nothing was seen
    history.add(steep(1, 10.0))
    history.add(steep(1, 5.0))
    assert history.read().requested == [15.0] * LAYERS
    assert history.read().found[1] == [15.0] and history.read().found[0][5] == 15.0
    assert [path.name for path in history.path.parent.iterdir()] == [history.path.name]


def test_old_runs_fade(packed4: PackedModel) -> None:
    history = History(packed4.manifest)
    for _ in range(4):
        history.add(steep(1))
    for _ in range(12):
        history.add(steep(2))
    read = history.read()
    assert read.requested == pytest.approx([MOST] * LAYERS)
    assert read.hit_rate(1, 1) < 0.01 < 0.99 < read.hit_rate(2, 1)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"requested": 3, "found": []}',
        json.dumps({"requested": [1.0] * LAYERS, "found": [[1.0]] * (LAYERS - 1)}),
        json.dumps({"requested": [1.0] * LAYERS, "found": [[2.0]] * LAYERS}),
        json.dumps({"requested": [1.0] * LAYERS, "found": [[-1.0]] * LAYERS}),
        json.dumps({"requested": [9.0] * LAYERS, "found": [[1.0] * (EXPERTS + 1)] * LAYERS}),
        '{"requested": [NaN, 1.0, 1.0], "found": [[], [], []]}',
    ],
)
def test_damage_counts_as_none(packed4: PackedModel, damage: str) -> None:
    history = History(packed4.manifest)
    history.path.parent.mkdir(parents=True)
    history.path.write_text(damage)
    assert history.gains() is None
    history.add(steep(0, 8.0))
    assert history.read().requested == [8.0] * LAYERS


def test_a_folder_that_cannot_be_written(packed4: PackedModel) -> None:
    history = History(packed4.manifest)
    history.path.parent.write_text("a file where the folder would be")
    history.add(steep(0))
    assert history.gains() is None


def test_a_budget_is_divided_by_what_was_seen(packed4: PackedModel) -> None:
    """And the answer is the same to the bit."""
    history = History(packed4.manifest)
    settings = EngineSettings(expert_budget=7 * packed4.manifest.experts[0].record_nbytes, context=64)
    prompt = torch.arange(12)[None]
    with torch.no_grad():
        before = Engine(packed4, settings, history=history)
        assert before.plan.capacities == (3, 2, 2)
        expected = before.model(prompt).logits
        before.close()
        history.add(steep(1))
        after = Engine(packed4, settings, history=history)
        assert after.plan.capacities == (3, 1, 3)
        assert torch.equal(after.model(prompt).logits, expected)
        after.close(remember=False)
    asked = Engine(packed4, EngineSettings(experts_per_layer=2), history=history)
    assert asked.plan.capacities == (2, 2, 2)  # what a user asks for per layer he gets
    asked.close()


def test_closing_an_engine_remembers(packed4: PackedModel) -> None:
    history = History(packed4.manifest)
    for remember in (False, True):
        engine = Engine(packed4, EngineSettings(experts_per_layer=2), history=history)
        with torch.no_grad():
            engine.model(torch.tensor([[3]]))
        engine.close(remember=remember)
        engine.close()
        assert (history.gains() is not None) == remember
    assert history.read().requested == [2.0] * LAYERS


def test_hit_rates_of_a_plan(packed4: PackedModel) -> None:
    record = packed4.manifest.experts[0].record_nbytes
    config = seam.load_config(packed4.folder)

    def plan(policy: str) -> planner.Plan:
        settings = EngineSettings(expert_budget=3 * record, policy=policy)
        return planner.make_plan(packed4.manifest, config, settings, runtime=0, budget=None, element_size=4)

    gains = [[0.0, 0.9, *[1.0] * 5], [0.0, 0.5, 0.9, *[0.9] * 4], [0.0] * 7]
    assert planner.hit_rate(plan("lru"), None) == pytest.approx(3 / 18)
    assert planner.hit_rate(plan("lru"), gains) == pytest.approx((0.9 + 0.5 + 0.0) / 3)
    assert planner.hit_rate(plan("lru-shared"), gains) == pytest.approx((0.9 + 0.9 + 0.0) / 3)
    more = planner.allot(plan("lru"), 100, gains)
    assert more.capacities == (6, 6, 6) and planner.allot(plan("lru-shared"), 100, gains).capacities == (18,)
    assert planner.allot(plan("lru"), 3, gains).capacities == (1, 2, 0)
