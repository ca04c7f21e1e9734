"""Registrations of base models that are refused, without a database."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.base_models import write_model

MODELS = "/admin/v1/base-models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "Tiny"}, "invalid_name", "name"),
    ({"name": "../x"}, "invalid_name", "name"),
    ({"name": "a@1"}, "invalid_name", "name"),
    ({"name": "mod_1"}, "invalid_name", "name"),
    ({"name": 5}, "invalid_type", "name"),
    ({"source": ""}, "out_of_range", "source"),
    ({"source": " "}, "out_of_range", "source"),
    ({"source": "--trust-remote-code"}, "out_of_range", "source"),
    ({"source": "/\u0001"}, "out_of_range", "source"),
    ({"source": "x" * 1001}, "out_of_range", "source"),
    ({"source": "/no/such/folder"}, "invalid_base_model", "source"),
    ({"source": "/"}, "invalid_base_model", "source"),
    ({"source": "../../../../etc"}, "invalid_base_model", "source"),
    ({"dtype": "int8"}, "out_of_range", "dtype"),
    ({"dtype": "float64; rm"}, "out_of_range", "dtype"),
    ({"kind": "rerank"}, "out_of_range", "kind"),
    ({"kind": 1}, "invalid_type", "kind"),
    ({"kind": "embed", "completion_price": 1}, "out_of_range", "completion_price"),
    ({"max_replicas": 0}, "out_of_range", "max_replicas"),
    ({"max_replicas": 1.5}, "invalid_type", "max_replicas"),
    ({"min_replicas": 3, "max_replicas": 2}, "out_of_range", "min_replicas"),
    ({"cpus": 0}, "out_of_range", "cpus"),
    ({"cpus": -1}, "out_of_range", "cpus"),
    ({"cpus": "all"}, "invalid_type", "cpus"),
    ({"accelerators": -1}, "out_of_range", "accelerators"),
    ({"accelerators": 0.5}, "invalid_type", "accelerators"),
    ({"max_loras": 0}, "out_of_range", "max_loras"),
    ({"max_loras": 9, "max_cpu_loras": 8}, "out_of_range", "max_loras"),
    ({"max_lora_rank": 513}, "out_of_range", "max_lora_rank"),
    ({"max_num_seqs": 10**9}, "out_of_range", "max_num_seqs"),
    ({"max_model_len": 513}, "out_of_range", "max_model_len"),
    ({"kv_cache_bytes": 10**30}, "out_of_range", "kv_cache_bytes"),
    ({"idle_timeout_s": 0}, "out_of_range", "idle_timeout_s"),
    ({"engine_price": 10**12}, "out_of_range", "engine_price"),
    ({"source": None}, "invalid_type", "source"),
    ({"max_loras": True}, "invalid_type", "max_loras"),
    ({"linears": {}}, "unsupported_parameter", "linears"),
    ({"id": "mod_1"}, "unsupported_parameter", "id"),
    ({"engine_args": "--port 1"}, "out_of_range", "engine_args"),
    ({"engine_args": "--trust_remote_code"}, "out_of_range", "engine_args"),
    ({"engine_args": "--trust-rem"}, "out_of_range", "engine_args"),
    ({"engine_args": "--no-enable-lora"}, "out_of_range", "engine_args"),
    ({"engine_args": "--host=0.0.0.0"}, "out_of_range", "engine_args"),
    ({"engine_args": "'"}, "out_of_range", "engine_args"),
    ({"engine_args": "a\nb"}, "out_of_range", "engine_args"),
]


async def test_bad_values_are_refused_by_name(operator: httpx.AsyncClient, folder: Path) -> None:
    for change, code, param in BAD:
        answer = await operator.post(MODELS, content=json.dumps({"name": "tiny", "source": str(folder)} | change))
        assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (400, code, param), answer.text


async def test_nan_and_infinity_are_no_numbers(operator: httpx.AsyncClient, folder: Path) -> None:
    for value in ("NaN", "Infinity", "1e999"):
        body = f'{{"name": "tiny", "source": "{folder}", "cpus": {value}}}'
        assert (await operator.post(MODELS, content=body)).status_code == 400


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
async def test_a_folder_that_is_no_model_is_refused(operator: httpx.AsyncClient, folder: Path, broken: str) -> None:
    for content in (None, b"", b"[]", b"{" * 10**5, b"\xff" * 1000):
        (folder / broken).unlink(missing_ok=True)
        if content is not None:
            (folder / broken).write_bytes(content)
        answer = await operator.post(MODELS, json={"name": "tiny", "source": str(folder)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_base_model"), answer.text


async def test_a_kind_that_the_files_contradict_is_refused(operator: httpx.AsyncClient, tmp_path: Path) -> None:
    for architecture, kind in (("LlamaForCausalLM", "embed"), ("BertModel", "generate")):
        folder = write_model(tmp_path / architecture, architectures=[architecture])
        answer = await operator.post(MODELS, json={"name": "tiny", "source": str(folder), "kind": kind})
        assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (400, "out_of_range", "kind")
    folder = write_model(tmp_path / "classifier", architectures=["BertForSequenceClassification"])
    answer = await operator.post(MODELS, json={"name": "tiny", "source": str(folder)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_base_model"), answer.text
