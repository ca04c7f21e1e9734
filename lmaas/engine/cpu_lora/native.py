"""The compiled kernel (kernel.cpp), which pip builds with lmaas if there is a C++ compiler. Otherwise fallback.py is used."""

import ctypes
import importlib.util
import os
from pathlib import Path

import torch

from lmaas.engine.cpu_lora.layer import StackedLoRA
from lmaas.engine.cpu_lora.plugin import logger
from lmaas.engine.cpu_lora.rows import Groups, Integers

#: The environment variable that selects the kernel. "torch" selects fallback.py even if there is a compiled kernel.
CHOICE = "LMAAS_CPU_LORA_KERNEL"
_MODULE = "lmaas.engine.cpu_lora._kernel"


# These mirror the structs of kernel.cpp.
class _Slice(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p),
        ("a_slot", ctypes.c_int64), ("b_slot", ctypes.c_int64), ("b_rank", ctypes.c_int64),
        ("out", ctypes.c_int64), ("offset", ctypes.c_int64), ("rank", ctypes.c_void_p),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [("n_slices", ctypes.c_int64), ("inputs", ctypes.c_int64), ("bfloat16", ctypes.c_int64), ("slices", ctypes.c_void_p)]


class _Groups(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("slot", ctypes.c_void_p), ("start", ctypes.c_void_p), ("rows", ctypes.c_void_p)]


class _Call(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.c_void_p), ("groups", ctypes.c_void_p), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("x_row", ctypes.c_int64), ("y_row", ctypes.c_int64), ("h", ctypes.c_void_p), ("h_row", ctypes.c_int64), ("scale", ctypes.c_float),
    ]  # fmt: skip


class NativeKernel:
    """The functions of the library at `path`. `choice` selects one of the instruction sets that this processor supports; 0 is the best.

    Raises OSError if the library cannot be loaded, and ValueError for an unknown choice.
    """

    def __init__(self, path: str, choice: int = 0) -> None:
        library = ctypes.CDLL(path)
        library.lmaas_lora_use.argtypes, library.lmaas_lora_use.restype = [ctypes.c_int64], ctypes.c_char_p
        instructions = library.lmaas_lora_use(choice)
        if instructions is None:
            raise ValueError(f"this processor has no choice {choice} of instructions")
        self.instructions = instructions.decode()
        self._add = library.lmaas_lora_add
        self._add.argtypes, self._add.restype = [ctypes.c_void_p], None
        self._call = _Call()
        self._call_at = ctypes.addressof(self._call)
        self._scratch = _floats(0)

    def __str__(self) -> str:
        return f"compiled kernel, {self.instructions}"

    def takes(self, y: torch.Tensor, x: torch.Tensor, layer: StackedLoRA) -> bool:
        """Return whether the kernel supports tensors of these types and layouts."""
        if layer.native is None:
            layer.native = _PreparedLayer(layer) if _is_plain(layer) else False
        if not layer.native:
            return False
        prepared = layer.native
        return (
            x.dtype is prepared.dtype
            and x.device.type == y.device.type == "cpu"
            and x.shape[0] == y.shape[0]
            and y.dtype is x.dtype
            and x.shape[1] == prepared.inputs
            and y.shape[1] >= prepared.outputs
            and _adjacent(x, 1)
            and _adjacent(y, 1)
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: StackedLoRA, groups: Groups, scale: float) -> None:
        """Do the same as fallback.add, for tensors that `takes` accepts."""
        if groups.native is None:
            groups.native = _Groups(len(groups.slot), *(_address(part) for part in (groups.slot, groups.start, groups.rows)))
        h_row = layer.highest_rank
        size = len(layer.b) * len(groups.rows) * h_row
        if self._scratch.numel() < size:
            self._scratch = _floats(size)
        call = self._call
        call.layer, call.groups, call.scale = layer.native.at, ctypes.addressof(groups.native), scale
        call.x, call.x_row, call.y, call.y_row = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)
        call.h, call.h_row = self._scratch.data_ptr(), h_row
        self._add(self._call_at)


class _PreparedLayer:
    def __init__(self, layer: StackedLoRA) -> None:
        self.dtype = layer.a[0].dtype
        self.inputs = layer.a[0].shape[3]
        self.outputs = max(offset + width for offset, width in zip(layer.offsets, layer.widths, strict=True))
        self._slices = (_Slice * len(layer.b))(*(
            _Slice(a.data_ptr(), b.data_ptr(), a.stride(0), b.stride(0), b.stride(3), width, offset, _address(rank))
            for a, b, width, offset, rank in zip(layer.a, layer.b, layer.widths, layer.offsets, layer.rank, strict=True)
        ))  # fmt: skip
        bfloat16 = int(self.dtype is torch.bfloat16)
        self._layer = _Layer(len(layer.b), self.inputs, bfloat16, ctypes.addressof(self._slices))
        self.at = ctypes.addressof(self._layer)


def _is_plain(layer: StackedLoRA) -> bool:
    if not layer.a:
        return False
    tensors = (*layer.a, *layer.b)
    return (
        tensors[0].dtype in {torch.float32, torch.bfloat16}
        and all(t.dtype is tensors[0].dtype and t.device.type == "cpu" for t in tensors)
        and all(_adjacent(a, 3) and a.stride(2) == a.shape[3] and a.shape[2] == b.shape[3] for a, b in zip(layer.a, layer.b, strict=True))
        and all(_adjacent(b, 2) for b in layer.b)
    )


def _floats(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.float32, device="cpu")  # independent of torch's current defaults


def _adjacent(t: torch.Tensor, dim: int) -> bool:
    return bool(t.stride(dim) == 1 or t.shape[dim] == 1)


def _address(numbers: Integers) -> int:
    return int(numbers.ctypes.data)


def library() -> Path | None:
    """Return the path of the compiled library. None if there is none, or if a newer source file lies beside it, as in a clone that was
    updated but not installed again."""
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        return None
    path, source = Path(found.origin), Path(__file__).with_name("kernel.cpp")
    # Files that were copied together differ by less than a minute.
    outdated = source.exists() and source.stat().st_mtime > path.stat().st_mtime + 60
    return None if outdated else path


def load() -> NativeKernel | None:
    """Return the compiled kernel, or None if there is none or it is not selected."""
    if os.environ.get(CHOICE) == "torch":
        return None
    path = library()
    if path is None:
        # This is not a warning, because the installation has already reported it and its cost.
        logger.info("the compiled LoRA kernel is missing or older than its source; torch's matrix products are used, which is slower")
        return None
    try:
        return NativeKernel(str(path))
    except OSError as error:
        logger.warning("lmaas's compiled LoRA kernel cannot be loaded, so LoRA on CPU is slower, not wrong: %s", error)
        return None
