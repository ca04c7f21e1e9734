"""The header reader accepts only well-formed safetensors files."""

import ast
import gzip
import importlib.util
import io
import json
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.adapters.safetensors import EMBEDDING_ARCHITECTURES, MAX_HEADER_BYTES, TensorRecord, base_model_shapes, loads_strict, read_header
from lmaas.errors import InvalidAdapter, InvalidRequest
from lmaas.states import PoolKind
from tests.support.adapters import frame, pack, tensors
from tests.support.effort import tries

GOOD = pack(tensors(), {"format": "pt"})
FOUR = b"\0" * 16


def entry(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def code_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InvalidAdapter) as caught:
        read_header(path)
    error = caught.value
    error.message.encode("ascii")
    assert error.param == "adapter_model.safetensors"
    assert len(error.message) < 500
    return error.error_code


def test_a_good_header(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(
        frame(b'{"a.b":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"c":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}  ', FOUR)
    )
    start = path.stat().st_size - 16
    assert read_header(path) == {"a.b": TensorRecord("F16", (2, 3), start, 12), "c": TensorRecord("F32", (), start + 12, 4)}


def test_metadata_and_empty_tensors_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(frame({"__metadata__": {"format": "pt"}, "z": entry([0, 4], [16, 16]), "a": entry()}, FOUR))
    assert set(read_header(path)) == {"a", "z"}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x05", id="one byte"),
        pytest.param(b"\0" * 8, id="no header"),
        pytest.param(b"\0" * 64, id="zeros"),
        pytest.param(GOOD[:-1], id="one byte short"),
        pytest.param(GOOD[: len(GOOD) // 2], id="half"),
        pytest.param(GOOD[:200], id="cut in the header"),
        pytest.param(GOOD + b"\0", id="one byte too many"),
        pytest.param((2**64 - 1).to_bytes(8, "little") + GOOD[8:], id="header length overflows"),
        pytest.param((2**63).to_bytes(8, "little") + GOOD[8:], id="header length is negative"),
        pytest.param((len(GOOD) - 7).to_bytes(8, "little") + GOOD[8:], id="header longer than the file"),
        pytest.param(frame(b"{" + b" " * MAX_HEADER_BYTES + b"}"), id="header over 1 MB"),
        pytest.param(frame(b'{"\xff\xfe":{}}'), id="not UTF-8"),
        pytest.param(frame(b'{"a":'), id="not JSON"),
        pytest.param(frame(b"[]"), id="a list"),
        pytest.param(frame(b'  {"a":1}'), id="leading spaces"),
        pytest.param(frame(b"{}x"), id="bytes after the object"),
        pytest.param(frame(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), id="depth 500,000"),
        pytest.param(frame(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}', FOUR), id="a tensor twice"),
        pytest.param(frame(b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', FOUR), id="a key twice"),
        pytest.param(frame({"__metadata__": {"a": 1}, "a": entry()}, FOUR), id="metadata is no text"),
        pytest.param(frame({"__metadata__": ["a"], "a": entry()}, FOUR), id="metadata is a list"),
        pytest.param(frame(b'{"__metadata__":{"a":"\\ud800"}}'), id="half a surrogate pair"),
        pytest.param(frame({"a": []}, FOUR), id="entry is a list"),
        pytest.param(frame({"a": {"dtype": "F32", "shape": [4]}}, FOUR), id="no offsets"),
        pytest.param(frame({"a": {**entry(), "code": "x"}}, FOUR), id="another key"),
        pytest.param(frame({"a": entry(dtype="F33")}, FOUR), id="unknown dtype"),
        pytest.param(frame({"a": entry(dtype=["F32"])}, FOUR), id="dtype is a list"),
        pytest.param(frame({"a": entry([-4])}, FOUR), id="negative size"),
        pytest.param(frame({"a": entry([-2, -2])}, FOUR), id="negative sizes whose product fits"),
        pytest.param(frame({"a": entry([4.0])}, FOUR), id="float size"),
        pytest.param(frame({"a": entry([True, 4])}, FOUR), id="boolean size"),
        pytest.param(frame({"a": entry("4")}, FOUR), id="shape is text"),
        pytest.param(frame({"a": entry([1] * 8 + [4])}, FOUR), id="nine dimensions"),
        pytest.param(frame({"a": entry([2**33, 2**33, 4])}, FOUR), id="shape overflows"),
        pytest.param(frame({"a": entry([2**62, 2**62, 0], [0, 0]), "b": entry()}, FOUR), id="shape overflows, then is zero"),
        pytest.param(frame(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,16]}}', FOUR), id="9000 digits"),
        pytest.param(frame({"a": entry([3])}, FOUR), id="shape does not match the offsets"),
        pytest.param(frame({"a": entry([1], [0, 0.5], "F4")}, FOUR), id="half a byte"),
        pytest.param(frame({"a": entry(offsets=[16, 0])}, FOUR), id="offsets backwards"),
        pytest.param(frame({"a": entry(offsets=[-16, 0])}, FOUR), id="negative offset"),
        pytest.param(frame({"a": entry(offsets=[0, 16, 32])}, FOUR), id="three offsets"),
        pytest.param(frame({"a": entry(offsets=[2**64 - 16, 2**64])}, FOUR), id="offset overflows"),
        pytest.param(frame({"a": entry(), "b": entry()}, FOUR), id="same bytes"),
        pytest.param(frame({"a": entry(), "b": entry(offsets=[8, 24])}, FOUR + FOUR[:8]), id="overlap"),
        pytest.param(frame({"a": entry(offsets=[4, 20])}, FOUR + FOUR[:4]), id="hole at the start"),
        pytest.param(frame({"a": entry(), "b": entry(offsets=[20, 36])}, FOUR * 2 + FOUR[:4]), id="hole between"),
        pytest.param(frame({}, FOUR), id="hole only"),
        pytest.param(frame({"a": entry(offsets=[1024, 1040])}, FOUR), id="beyond the file"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", id="LFS pointer"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    started = time.process_time()
    assert code_of(tmp_path / "f", content) == "invalid_safetensors"
    assert time.process_time() - started < 2


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def zip_in_tensor_data(comment: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
        archive.comment = comment
    raw = buffer.getvalue()
    return frame({"a": {"dtype": "U8", "shape": [len(raw)], "data_offsets": [0, len(raw)]}}, raw)


@pytest.mark.parametrize(
    "content",
    [
        *(
            pytest.param(pickle.dumps({"weight": [1.0, 2.0]}, protocol), id=f"pickle {protocol}")
            for protocol in range(1, 6)
            if protocol > 1
        ),
        pytest.param(pickle.dumps(np.ones(3), 0), id="pickle 0"),
        pytest.param(pickle.dumps(print, 0), id="pickle 0 of a function"),
        pytest.param(b"cos\nsystem\n(S'id'\ntR.", id="pickle 0 that runs a command"),
        pytest.param(b"(dp0\nS'a'\np1\nI1\ns.", id="pickle 0 of a dict"),
        pytest.param(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e80024de903"), id="old torch.save"),
        pytest.param(GOOD[:8] + pickle.dumps({"a": 1}, 4), id="pickle behind a header length"),
        pytest.param((2).to_bytes(8, "little") + zipped(), id="zip behind a header length"),
        pytest.param(zipped(), id="zip"),
        pytest.param(zip_in_tensor_data(b""), id="zip inside tensor data"),
        pytest.param(zip_in_tensor_data(b"c" * 60_000), id="zip inside tensor data with a comment"),
        pytest.param(gzip.compress(GOOD), id="gzip"),
        pytest.param(b"GGUF\x03\0\0\0" + b"\0" * 64, id="GGUF"),
        pytest.param(b"GGUF\x03\0\0\0{" + b"\0" * 64, id="GGUF with a brace"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + b"\0" * 64, id="HDF5"),
        pytest.param(b"\x93NUMPY\x01\0v\0" + b" " * 64, id="numpy"),
        pytest.param(b"#!/bin/sh\necho hello\n", id="script"),
        pytest.param(b"\x7fELF" + b"\0" * 64, id="program"),
        pytest.param(b"a" * 257 + b"ustar\x0000" + b"\0" * 300, id="tar"),
    ],
)
def test_other_formats_in_disguise(tmp_path: Path, content: bytes) -> None:
    assert code_of(tmp_path / "f", content) == "unsafe_format"


@pytest.mark.parametrize("length", range(0x0200, 0x0600, 0x80))
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(frame(json.dumps({"a": entry()}).encode().ljust(length), FOUR))
    assert set(read_header(path)) == {"a"}


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a..b", ".a", "a.", "../a", "a/b", "a\\b", "a b", "a\0b", "a\nb", "a\n", "a-b", "a:b", "%61", "$(id)", "{}"),
        *("\u00e9", "\u0430", "a\u202eb", "a" * 257, "__metadata__ "),
    ],
)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    assert code_of(tmp_path / "f", frame({name: entry()}, FOUR)) == "invalid_tensor_name"


def test_a_long_name_is_cut_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(frame({"x" * 100_000: entry()}, FOUR))
    with pytest.raises(InvalidAdapter, match=r"xxx\.\.\.'"):
        read_header(tmp_path / "f")


def test_strict_json() -> None:
    assert loads_strict(b'{"a":[1,-2.5,null,true,"\\ud83d\\ude00"]}') == {"a": [1, -2.5, None, True, "\U0001f600"]}
    for bad in (b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b"\xef\xbb\xbf{}", b"[]", b"1", b"", b'{"a":' * 9 + b"1" + b"}" * 9):
        with pytest.raises(ValueError, match=r"^[ -~]+$"):
            loads_strict(bad)


def write_model(folder: Path, names: dict[str, tuple[int, ...]], file: str = "model.safetensors") -> None:
    (folder / file).write_bytes(pack({name: ("BF16", np.zeros(shape, np.uint16)) for name, shape in names.items()}))


MODEL = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
}
LINEARS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.down_proj": (16, 24)}


def test_base_model_shapes(tmp_path: Path) -> None:
    write_model(tmp_path, MODEL)
    assert base_model_shapes(tmp_path) == LINEARS


BERT = {
    "embeddings.word_embeddings.weight": (32, 16),
    "encoder.layer.0.attention.self.query.weight": (16, 16),
    "encoder.layer.0.attention.self.query.bias": (16,),
    "encoder.layer.0.output.dense.weight": (16, 24),
    "encoder.layer.0.output.LayerNorm.weight": (16,),
    "pooler.dense.weight": (16, 16),
}


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("BertModel", {"encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"}),
        # vLLM would take adapters for these, but they were not compared with PEFT.
        ("RobertaModel", set()),
        ("", set()),
    ],
)
def test_of_a_model_that_embeds_only_what_was_compared_takes_adapters(tmp_path: Path, architecture: str, modules: set[str]) -> None:
    write_model(tmp_path, BERT)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert base_model_shapes(tmp_path, PoolKind.EMBED).keys() == modules


def test_base_model_shapes_of_shards(tmp_path: Path) -> None:
    names = list(MODEL.items())
    write_model(tmp_path, dict(names[:4]), "model-1.safetensors")
    write_model(tmp_path, dict(names[4:]), "model-2.safetensors")
    weight_map = {name: f"model-{1 if i < 4 else 2}.safetensors" for i, name in enumerate(MODEL)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert base_model_shapes(tmp_path) == LINEARS
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InvalidRequest, match="cannot be read"):
        base_model_shapes(tmp_path)


@pytest.mark.parametrize(
    "index", [None, "{", "{}", '{"weight_map":{}}', '{"weight_map":{"a":1}}', '{"weight_map":{"a":"../b.safetensors"}}']
)
def test_a_base_model_without_usable_files(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidRequest) as caught:
        base_model_shapes(tmp_path)
    assert caught.value.error_code == "invalid_base_model"


@pytest.mark.parametrize("content", [b"", zipped(), pack({"model.norm.weight": ("F32", np.ones(4, np.float32))})])
def test_a_base_model_with_bad_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        base_model_shapes(tmp_path)
    assert caught.value.error_code == "invalid_base_model"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "adapter_model.safetensors"


@settings(max_examples=tries(500), deadline=2000)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1) | st.integers(0, 700), st.binary(max_size=4), st.integers(0, 4)), max_size=5),
    cut=st.none() | st.integers(0, len(GOOD)),
)
def test_mutations_of_a_good_file(scratch: Path, edits: list[tuple[int, bytes, int]], cut: int | None) -> None:
    """If a file passes here, the format's own reader reads it too, with the same tensors, so the engine does not fail on it."""
    content = bytearray(GOOD)
    for position, new, remove in edits:
        content[position : position + remove] = new
    scratch.write_bytes(bytes(content[:cut]))
    try:
        records = read_header(scratch)
    except InvalidAdapter:
        return
    with safetensors.safe_open(scratch, framework="np") as theirs:
        assert {name: list(record.shape) for name, record in records.items()} == {n: theirs.get_slice(n).get_shape() for n in theirs.keys()}  # noqa: SIM118


def test_the_architectures_whose_embeddings_take_lora_are_those_of_vllm() -> None:
    """The names are read from the source of vLLM's classes and their bases, because importing them all takes long."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(found.origin).parent / "model_executor" / "models"
    registry = ast.parse((folder / "registry.py").read_text())
    [models] = [
        ast.literal_eval(node.value)
        for node in registry.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS"
    ]

    def embedding_modules(file: str, name: str) -> Any:
        tree = ast.parse((folder / f"{file}.py").read_text())
        [made] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        for node in made.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "embedding_modules":
                return ast.literal_eval(node.value)
        # Phi3ForCausalLM is a LlamaForCausalLM.
        sources = {
            alias.name: str(node.module).rpartition(".")[2]
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        return embedding_modules(sources[ast.unparse(made.bases[0])], ast.unparse(made.bases[0]))

    for name in EMBEDDING_ARCHITECTURES:
        assert set(embedding_modules(*models[name])) == {"embed_tokens", "lm_head"}
    assert not embedding_modules(*models["MistralForCausalLM"])
