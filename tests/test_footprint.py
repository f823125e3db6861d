"""What a model takes beside its experts, for whatever a configuration may look like."""

import itertools

import pytest

from families import FAMILIES, VARIANTS
from greenroom.config import EngineSettings
from greenroom.footprint import Footprint
from greenroom.packed import PackedModel

ALL = {**FAMILIES, **VARIANTS}


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_family_has_a_footprint(name: str, packed4: PackedModel) -> None:
    """The modules' prompts take more than compiled ones, scores more than a fused kernel, and a context its share."""
    config = ALL[name].build().config

    def taken(context: int, compiled: bool, scores: bool, vram: "int | None" = None) -> int:
        settings = EngineSettings(context=context, vram=vram)
        footprint = Footprint(packed4.manifest, config, settings, 4, compiled, scores)
        return footprint.kv_cache + footprint.working_set

    for vram in (None, 1 << 30):
        for compiled, scores in itertools.product((False, True), (False, True)):
            assert taken(8192, compiled, scores, vram) > taken(512, compiled, scores, vram) > 0
    assert taken(512, False, True) >= taken(512, False, False) > taken(512, True, False) == taken(512, True, True)
