"""Weights must be finite and have an effect, in the engine's dtype and after its scaling."""

from pathlib import Path

import numpy as np
import pytest

from lmaas.adapters import validation
from tests.support.adapters import PREFIX, Tensors, base, check, config, encode, refused, tensors

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"


def filled(value: float, dtype: str, side: str = "B", last_only: bool = True) -> Tensors:
    content = tensors(dtype=dtype)
    name = f"{Q0}.lora_{side}.weight"
    array = content[name][1].copy()
    stored = encode(np.asarray([value], np.float32), dtype)[0]
    if last_only:
        array[-1, -1] = stored
    else:
        array[:] = stored
    content[name] = (dtype, array)
    return content


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("engine", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(file: Path, dtype: str, engine: str, side: str, value: float) -> None:
    error = refused(file, config(), filled(value, dtype, side), base(engine))
    assert error.error_code == "non_finite_weights"
    assert f"lora_{side} of 'model.layers.0.self_attn.q_proj'" in error.message


@pytest.mark.parametrize(
    ("dtype", "engine", "value", "fine"),
    [
        ("F32", "float16", 65504, True),
        ("F32", "float16", 65519.996, True),
        ("F32", "float16", 65520, False),
        ("F32", "float16", -70000, False),
        ("BF16", "float16", 65280, True),
        ("BF16", "float16", 65536, False),
        ("F32", "bfloat16", 3.3895e38, True),
        ("F32", "bfloat16", 3.3961e38, True),
        ("F32", "bfloat16", 3.3962e38, False),
        ("F32", "bfloat16", -3.4028234663852886e38, False),
        ("F32", "float32", 3.4028234663852886e38, True),
        ("F16", "bfloat16", 65504, True),
    ],
)
def test_the_cast_to_the_engines_dtype(file: Path, dtype: str, engine: str, value: float, fine: bool) -> None:
    content = filled(value, dtype, "A")
    if fine:
        check(file, config(), content, base(engine))
    else:
        assert refused(file, config(), content, base(engine)).error_code == "non_finite_weights"


def test_the_scaling_must_not_overflow(file: Path) -> None:
    """The engine multiplies lora_alpha / r into B, in its own dtype."""
    content = filled(60000, "F32")
    check(file, config(lora_alpha=4), content, base("float16"))
    error = refused(file, config(lora_alpha=8), content, base("float16"))
    assert error.error_code == "non_finite_weights"
    assert "lora_alpha" in error.message
    check(file, config(lora_alpha=6, use_rslora=False), filled(40000, "F32"), base("float16"))
    assert refused(file, config(lora_alpha=6, use_rslora=True), filled(40000, "F32"), base("float16")).error_code == "non_finite_weights"
    for alpha in (1e6, 1e300):
        error = refused(file, config(lora_alpha=alpha), tensors(), base("float16"))
        assert (error.error_code, error.param) == ("non_finite_weights", "adapter_config.json")


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_no_effect(file: Path, side: str, dtype: str) -> None:
    content = tensors(dtype=dtype)
    for name in content:
        if f"lora_{side}" in name:
            content[name] = (dtype, np.zeros_like(content[name][1]))
    assert refused(file, config(), content).error_code == "no_effect"


def test_no_effect_by_turns_and_by_rounding(file: Path) -> None:
    content = tensors()
    for index, name in enumerate(sorted(content)):
        if index % 4 in (0, 3):  # A of one module, B of the next
            content[name] = ("F32", np.zeros_like(content[name][1]))
    assert refused(file, config(), content).error_code == "no_effect"
    tiny = {n: (d, encode(np.full_like(a, 1e-9), "F32") if "lora_B" in n else a) for n, (d, a) in tensors().items()}
    check(file, config(), tiny, base("bfloat16"))
    assert refused(file, config(), tiny, base("float16")).error_code == "no_effect"
    assert refused(file, config(lora_alpha=1e-300), tensors(), base("float32")).error_code == "no_effect"
    negative_zero = {n: (d, -np.zeros_like(a) if "lora_B" in n else a) for n, (d, a) in tensors().items()}
    assert refused(file, config(), negative_zero).error_code == "no_effect"


def test_weights_are_read_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_CHUNK_BYTES", 64)
    for dtype in ("F32", "BF16"):
        check(file, config(), tensors(dtype=dtype))
        assert refused(file, config(), filled(np.nan, dtype, "A")).error_code == "non_finite_weights"
