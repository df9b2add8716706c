"""Grouped attention against a dense reference, and what the probes say."""

import sys
import types

import pytest
import torch

from braindino import attention as module
from braindino.attention import (
    attention,
    available_backends,
    choose_backend,
    explain,
    rotate,
    split_and_rotate,
)

GROUPS = [(2, 5), (3, 2), (1, 7)]
TOTAL = 23


def _qkv(dtype=torch.float64, device="cpu", head_dim=64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(TOTAL, 2, head_dim, generator=generator, dtype=dtype).to(device) for _ in range(3)]


def _dense_reference(q, k, v, lengths):
    """Softmax over all tokens with everything outside the own sequence masked away, one head at a time."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    allowed = owner[:, None] == owner[None, :]
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h].T / q.shape[2] ** 0.5).masked_fill(~allowed, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, h])
    return torch.stack(heads, dim=1)


LENGTHS = [tokens for batch, tokens in GROUPS for _ in range(batch)]


def test_sdpa_equals_a_dense_block_diagonal_softmax_and_its_gradients():
    q, k, v = (x.requires_grad_() for x in _qkv())
    output = attention(q, k, v, GROUPS, backend="sdpa")
    reference = _dense_reference(q, k, v, LENGTHS)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    weight = torch.arange(output.numel(), dtype=torch.float64).reshape(output.shape).cos()
    for ours, theirs in zip(
        torch.autograd.grad((output * weight).sum(), (q, k, v)),
        torch.autograd.grad((reference * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def _plainly_rotated(x, angles):
    """Every pair (i, i + head_dim / 2) as a complex number, multiplied by e^(i angle)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rotation_is_multiplication_by_a_complex_number_in_value_and_gradient():
    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(TOTAL, 4, generator=generator, dtype=torch.float64) * 6
    rope = torch.stack([angles.cos(), angles.sin()]).tile(2)[:, :, None]
    qkv = torch.randn(TOTAL, 3 * 2 * 8, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unflatten(-1, (3, 2, 8)).unbind(dim=1)
    expected = _plainly_rotated(q, angles), _plainly_rotated(k, angles), v
    found = split_and_rotate(qkv, rope, num_heads=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(q, rope), expected[0], rtol=0, atol=1e-12)
    weights = torch.randn(3, *q.shape, generator=generator, dtype=torch.float64)
    (plain,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), qkv, retain_graph=True)
    (ours,) = torch.autograd.grad((torch.stack(found) * weights).sum(), qkv, retain_graph=True)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    (plain,) = torch.autograd.grad((expected[0] * weights[0]).sum(), qkv, retain_graph=True)
    (ours,) = torch.autograd.grad((rotate(q, rope) * weights[0]).sum(), qkv)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_half_precision_is_rotated_in_the_precision_of_the_table():
    angles = torch.rand(TOTAL, 4) * 6
    rope = torch.stack([angles.cos(), angles.sin()]).tile(2)[:, :, None]
    x = torch.randn(TOTAL, 2, 8).bfloat16()
    torch.testing.assert_close(rotate(x, rope), _plainly_rotated(x.float(), angles).bfloat16(), rtol=0, atol=0)


def test_a_token_never_sees_another_sequence():
    q, k, v = _qkv()
    before = attention(q, k, v, GROUPS)
    k[5:10], v[5:10] = 100.0, -100.0  # the second sequence of the first group
    after = attention(q, k, v, GROUPS)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[10:], after[10:])
    assert not torch.allclose(before[5:10], after[5:10])


def test_groups_that_do_not_add_up_are_an_error():
    with pytest.raises(ValueError, match=r"groups \[\(2, 5\)\] hold 10 tokens, but q has 23"):
        attention(*_qkv(), [(2, 5)])


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match=r"'flash' is unknown; choose one of auto, sdpa, varlen, xformers"):
        attention(*_qkv(), GROUPS, backend="flash")


def test_a_backend_that_does_not_work_here_says_why():
    with pytest.raises(ValueError, match=r"'varlen' does not work on cpu: \w+: .+; use 'auto' or 'sdpa'"):
        attention(*_qkv(), GROUPS, backend="varlen")


def test_on_the_cpu_auto_is_sdpa_and_explain_tells_it():
    assert available_backends("cpu")[0] == "sdpa"
    assert "varlen" not in available_backends("cpu")
    assert choose_backend("cpu", torch.bfloat16, num_groups=2) == "sdpa"
    text = explain("cpu")
    assert "sdpa: works" in text
    assert "varlen: no (" in text
    assert "auto uses: sdpa in bfloat16, sdpa in float32" in text


@pytest.mark.parametrize(
    ("working", "dtype", "num_groups", "expected"),
    [
        ({"sdpa", "varlen", "xformers"}, torch.bfloat16, 2, "varlen"),
        ({"sdpa", "xformers"}, torch.float16, 2, "xformers"),
        ({"sdpa"}, torch.bfloat16, 2, "sdpa"),
        ({"sdpa", "varlen", "xformers"}, torch.bfloat16, 1, "sdpa"),
        ({"sdpa", "varlen", "xformers"}, torch.float32, 2, "sdpa"),
    ],
)
def test_on_cuda_auto_takes_one_kernel_for_many_sizes_when_one_works(monkeypatch, working, dtype, num_groups, expected):
    monkeypatch.setattr(module, "_probe", lambda name, device: "" if name in working else "absent")
    monkeypatch.setattr(module, "_has_cudnn_attention", lambda device: False)
    assert choose_backend("cuda", dtype, num_groups=num_groups) == expected


def test_on_cuda_with_cudnn_attention_auto_takes_torchs_own_and_some_queries_still_one_kernel(monkeypatch):
    monkeypatch.setattr(module, "_probe", lambda name, device: "")
    monkeypatch.setattr(module, "_has_cudnn_attention", lambda device: True)
    assert choose_backend("cuda", torch.bfloat16, num_groups=2) == "sdpa"
    monkeypatch.setattr(module, "_varlen_of_queries", lambda *arguments: arguments)
    q, k, v = (torch.zeros(4, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    counts = [torch.tensor([2, 2])]
    found = module.attention_of_queries(q, k, v, [(2, 2)], counts, backend="sdpa")
    assert found == (q, k, v, [(2, 2)], counts)


def test_xformers_is_given_one_batch_and_the_length_of_every_sequence(monkeypatch):
    """xformers is optional, so a stand-in with its two entry points takes its place."""

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, *, device=None):
            mask = cls()
            mask.lengths = q_seqlen
            return mask

    def memory_efficient_attention(query, key, value, attn_bias):
        assert query.shape[0] == key.shape[0] == value.shape[0] == 1
        return _dense_reference(query[0], key[0], value[0], attn_bias.lengths)[None]

    names = ["xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"]
    fakes = {name: types.ModuleType(name) for name in names}
    fakes["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    fakes["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    module._probe.cache_clear()
    module._block_diagonal.cache_clear()
    try:
        assert "xformers" in available_backends("cpu")
        output = attention(*_qkv(), GROUPS, backend="xformers")
        torch.testing.assert_close(output, attention(*_qkv(), GROUPS, backend="sdpa"), rtol=0, atol=1e-12)
    finally:
        module._probe.cache_clear()
        module._block_diagonal.cache_clear()


def test_sequence_starts_are_cumulative_lengths_usable_for_training_after_inference():
    module._sequence_starts.cache_clear()
    with torch.inference_mode():
        starts = module._sequence_starts(tuple(GROUPS), torch.device("cpu"))
    assert starts.tolist() == [0, 5, 10, 12, 14, 16, 23]
    assert starts.dtype == torch.int32
    assert not starts.is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "xformers"])
def test_every_backend_that_works_on_the_gpu_agrees_with_the_reference(backend):
    if backend not in available_backends("cuda"):
        pytest.skip(explain("cuda"))
    q, k, v = _qkv(torch.bfloat16, "cuda")
    output = attention(q, k, v, GROUPS, backend=backend)
    reference = _dense_reference(q.double(), k.double(), v.double(), LENGTHS)
    torch.testing.assert_close(output.double(), reference, rtol=0, atol=2e-2)
