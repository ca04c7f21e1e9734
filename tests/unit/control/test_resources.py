"""The setting LMAAS_RAY_RESOURCES."""

import pytest

from lmaas.control.provisioners.resources import parse_resources
from lmaas.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("lora=1", {"lora": 1.0}),
        (" lora = 0.5, memory=2e9,", {"lora": 0.5, "memory": 2e9}),
        ("lora", None),
        ("lora=", None),
        ("=1", None),
        ("lora=0", None),
        ("lora=-1", None),
        ("lora=nan", None),
        ("lora=inf", None),
    ],
)
def test_resources_by_setting(text: str, found: dict[str, float] | None) -> None:
    if found is None:
        with pytest.raises(SettingsError, match="LMAAS_RAY_RESOURCES"):
            parse_resources(text)
    else:
        assert parse_resources(text) == found
