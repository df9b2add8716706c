"""Tokens that are read, computed alone, against the same tokens out of the whole forward pass: values and gradients."""

import pytest
import torch

from braindino.vision_transformer import VisionTransformer

GRID = 16


def encoder(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=32, depth=3, num_heads=2, layer_scale_init=0.5, **options).double().train()


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, s, s, generator=generator, dtype=torch.float64) for n, s in ((6, 64), (4, 32))]


def masks() -> torch.Tensor:
    """Two of six crops without a mask, one with a single masked patch, one wholly masked."""
    mask = torch.rand(6, GRID, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[2] = mask[5] = False
    mask[3] = False
    mask[3, 7] = True
    mask[4] = True
    return mask


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "num_storage_tokens": 0}], ids=["paper", "with qkv bias"])
def test_read_tokens_and_all_gradients_are_those_of_the_whole_pass(drop_path: float, options: dict) -> None:
    model, mask = encoder(drop_path=drop_path, **options), masks()
    positions = mask.flatten().nonzero()[:, 0]
    whole = model.forward_crops(crops(), masks=[mask, None], generator=torch.Generator().manual_seed(3))
    read = model.forward_read(
        crops(), [positions, None], masks=[mask, None], generator=torch.Generator().manual_seed(3)
    )
    expected = [whole[0].cls, whole[1].cls, whole[0].patches.flatten(0, 1)[positions]]
    found = [read[0].cls, read[1].cls, read[0].patches]
    assert read[1].patches.shape == (0, 32)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    factors = [torch.randn(part.shape, dtype=part.dtype) for part in expected]
    gradients = [
        torch.autograd.grad(
            sum((part * factor).sum() for part, factor in zip(parts, factors, strict=True)),
            list(model.parameters()),
            allow_unused=True,
        )
        for parts in (found, expected)
    ]
    for name, ours, theirs in zip(dict(model.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


def test_nothing_masked_leaves_the_cls_tokens() -> None:
    model = encoder().eval()
    read = model.forward_read(crops()[:1], [torch.zeros(0, dtype=torch.long)])[0]
    torch.testing.assert_close(read.cls, model(crops()[0]).cls)
    assert read.patches.shape == (0, 32)


def test_only_tokens_that_are_read_reach_the_mlp_of_the_last_block() -> None:
    model, seen = encoder().eval(), []
    model.blocks[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    positions = masks().flatten().nonzero()[:, 0]
    model.forward_read(crops(), [positions, None])
    assert seen == [6 + 4 + len(positions)]


def test_checkpointing_changes_neither_values_nor_gradients() -> None:
    model, mask = encoder(drop_path=0.4), masks()
    positions = mask.flatten().nonzero()[:, 0]
    results = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        read = model.forward_read(
            crops(), [positions, None], masks=[mask, None], generator=torch.Generator().manual_seed(4)
        )
        loss = read[0].patches.square().sum() + read[1].cls.sum()
        results.append((loss, *torch.autograd.grad(loss, list(model.blocks.parameters()))))
    for plain, checkpointed in zip(*results, strict=True):
        # Without it blocks work on pieces of the tokens on a CPU, whose gradients are summed in another order.
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-12)


def test_checkpointing_computes_blocks_again_in_the_backward_pass() -> None:
    model, calls = encoder(), []
    model.checkpointing = True
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.forward_crops(crops())[0].cls.sum().backward()
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own tracing
def test_compiled_blocks_give_the_same_values_and_gradients() -> None:
    model, positions = encoder(drop_path=0.4).float(), masks().flatten().nonzero()[:, 0]
    inputs = [crop.float() for crop in crops()]
    results = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        read = model.forward_read(
            inputs, [positions, None], masks=[masks(), None], generator=torch.Generator().manual_seed(4)
        )
        loss = read[0].patches.square().mean() + read[1].cls.mean()
        results.append((loss, *torch.autograd.grad(loss, list(model.blocks.parameters()))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-4)
