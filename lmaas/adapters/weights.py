"""Computes with an adapter's numbers as the engine does. Imported only where an upload is checked, because numpy takes memory that an idle
gateway does not need."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_STORED: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def look_at(data: bytes, stored: str, dtype: str, scaling: float) -> tuple[bool, bool]:
    """Return whether all of these weights, stored as `stored`, are finite in the engine's `dtype`, also after scaling, and whether any is
    nonzero."""
    with np.errstate(all="ignore"):
        weights = as_engine(as_engine(_as_float32(data, stored), dtype) * np.float32(scaling), dtype)
    return bool(np.isfinite(weights).all()), bool(weights.any())


def same(data: bytes, stored: str, base: bytes, base_stored: str) -> bool:
    """Return whether weights are those of a base model, rounded to the dtype in which they are stored."""
    with np.errstate(all="ignore"):
        wanted = as_engine(_as_float32(base, base_stored), {"F16": "float16", "BF16": "bfloat16"}.get(stored, "float32"))
        return bool((_as_float32(data, stored) == wanted).all())


def _as_float32(data: bytes, stored: str) -> Floats:
    raw = np.frombuffer(data, _STORED[stored])
    return (raw.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else raw.astype(np.float32, copy=False)


def as_engine(weights: Floats, dtype: str) -> Floats:
    """Round to the nearest number of the dtype, ties to even, as torch casts; too large becomes infinite, and NaN stays NaN."""
    if dtype == "float16":
        return weights.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = weights.view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
        # The addition may carry out of a NaN's bits and make it a number.
        return np.where(np.isfinite(weights), rounded, weights)
    return weights
