"""torch's file formats are refused as adapters, and lmaas casts to the engine's dtype as torch does."""

import io
from pathlib import Path

import numpy as np
import pytest

from lmaas.adapters.safetensors import read_header
from lmaas.adapters.weights import as_engine
from lmaas.errors import InvalidAdapter

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_real_torch_file(tmp_path: Path, zip_format: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zip_format)
    path = tmp_path / "f"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InvalidAdapter) as caught:
        read_header(path)
    assert caught.value.error_code == "unsafe_format"


def test_the_cast_is_the_one_of_torch() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32)
    bits = np.concatenate(
        [bits, bits & np.uint32(0xFFFF8000), np.arange(0x7F7F0000, 0x7F810000, 7, np.uint32), np.asarray([2**32 - 1], np.uint32)]
    )
    values = bits.view(np.float32)
    for dtype in ("float16", "bfloat16", "float32"):
        with np.errstate(all="ignore"):
            ours = as_engine(values, dtype)
        theirs = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(ours, theirs)
