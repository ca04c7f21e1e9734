"""RMS normalisation by vLLM's compiled functions, against vLLM's own plain ones."""

# ruff: noqa: SLF001 (vLLM's operations are put back as they were)

from collections.abc import Iterator

import pytest
import torch
from vllm.ir import enable_torch_wrap
from vllm.ir.ops.layernorm import fused_add_rms_norm, rms_norm
from vllm.platforms import current_platform

from lmaas.engine.cpu_lora import norm

EPSILON = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """Install the operations as in a worker; restore them afterwards."""
    current_platform.import_kernels()
    before = [(operation, operation._priority_impls) for operation in (rms_norm, fused_add_rms_norm)]
    norm.install()
    norm.install()
    with enable_torch_wrap(False):
        yield
    for operation, implementations in before:
        operation._priority_impls = implementations


def some(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (8, 576), (33, 64), (7, 3, 128), (5, 32), (3, 2080)])
def test_it_is_what_vllm_computes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = some(*shape, dtype=dtype), some(*shape, dtype=dtype).flip(0), some(shape[-1], dtype=dtype)
    limits = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert rms_norm.dispatch(x, weight, EPSILON).provider == norm.PROVIDER
    kept = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), rms_norm.impls["native"].impl_fn(x, weight, EPSILON), **limits)
    assert torch.equal(x, kept)
    expected = fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPSILON)
    assert fused_add_rms_norm.dispatch(x, residual, weight, EPSILON).provider == norm.PROVIDER
    for computed in (fused_add_rms_norm(x, residual, weight, EPSILON), fused_add_rms_norm.maybe_inplace(x, residual, weight, EPSILON)):
        torch.testing.assert_close(computed[0], expected[0], **limits)
        assert torch.equal(computed[1], expected[1])


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    x, residual, weight = some(37, 576, dtype=torch.float32), some(37, 576, dtype=torch.float32).flip(0), some(576, dtype=torch.float32)
    together = fused_add_rms_norm(x, residual, weight, EPSILON)[0]
    for row in range(37):
        alone = fused_add_rms_norm(x[row : row + 1].clone(), residual[row : row + 1].clone(), weight, EPSILON)[0]
        assert torch.equal(alone[0], together[row])


def test_what_the_compiled_functions_do_not_know_is_left_to_vllm() -> None:
    x, weight = some(4, 64, dtype=torch.float32), some(64, dtype=torch.float32)
    for case in (
        (x.half(), weight.half(), EPSILON),
        (x.bfloat16(), weight, EPSILON),
        (x, None, EPSILON),
        (x, weight, EPSILON, 32),
        (some(4, 65, dtype=torch.float32), some(65, dtype=torch.float32), EPSILON),
        (some(4, 1, dtype=torch.float32), some(1, dtype=torch.float32), EPSILON),
        (some(4, 128, dtype=torch.float32)[:, :64], weight, EPSILON),
    ):
        assert rms_norm.dispatch(*case).provider == "native"
        assert fused_add_rms_norm.dispatch(case[0], case[0].clone(), *case[1:]).provider == "native"
    assert fused_add_rms_norm.dispatch(x, some(4, 128, dtype=torch.float32)[:, :64], weight, EPSILON).provider == "native"
