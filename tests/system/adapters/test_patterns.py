"""vLLM reads each module's rank and alpha from the canonical config."""

import re

import pytest
from vllm.lora.peft_helper import PEFTHelper

from lmaas.adapters.config import AdapterConfig, canonical_config
from tests.support.adapters import base


@pytest.mark.parametrize("layers", [2, 48])
def test_the_engine_finds_each_modules_rank_and_alpha_in_the_canonical_config(layers: int) -> None:
    modules = list(base(layers=layers).linears)
    ranks, alphas = {module: 1 + i % 16 for i, module in enumerate(modules)}, {module: (i % 7) / 2 - 1 for i, module in enumerate(modules)}
    for use_rslora in (False, True):
        config = AdapterConfig(8, 8, use_rslora, {}, {}, None, tied=False)
        canonical = canonical_config(config, ranks, alphas, modules)
        assert re.escape(modules[-1]) in "".join(canonical["rank_pattern"])
        engine = PEFTHelper.from_dict(canonical)
        found = {module: engine.get_rank_and_scaling(module) for module in modules}
        assert found == {module: (ranks[module], config.scaling(ranks[module], alphas[module])) for module in modules}
