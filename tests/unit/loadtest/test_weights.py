"""Adapters of load tests are files that the service reads, written without the library of the format."""

from pathlib import Path

import numpy as np

from lmaas.adapters.safetensors import read_header
from loadtest.population import save_tensors


def test_a_written_file_is_read_by_the_service(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 4), dtype=np.float32)}
    save_tensors(tensors, path)
    found = read_header(path)
    assert {name: (record.dtype, record.shape) for name, record in found.items()} == {"a": ("F32", (2, 3)), "b": ("F32", (1, 4))}
    assert path.read_bytes().endswith(tensors["a"].tobytes() + tensors["b"].tobytes())
