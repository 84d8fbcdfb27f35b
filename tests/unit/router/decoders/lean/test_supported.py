"""The constants that the lean decoder takes where a config leaves them out."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from router.decoders.lean.supported import _FAMILIES


@pytest.mark.parametrize("family", sorted(_FAMILIES))
def test_the_constants_are_those_of_the_config_class(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    ours = _FAMILIES[family]
    assert (ours.norm_eps, ours.rope_theta) == (config.rms_norm_eps, config.rope_parameters["rope_theta"])
