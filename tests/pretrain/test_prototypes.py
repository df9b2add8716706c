"""The fused prototype loss against the plain formulas, in float64 and by autograd; and what it never holds."""

import importlib
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from braindino.pretrain import prototypes as module
from braindino.pretrain.losses import dino_loss, ibot_loss, sinkhorn_knopp
from braindino.pretrain.prototypes import Teacher, mean_logits, prototype_loss, sinkhorn_offset

B, L, K, WIDTH, M = 5, 3, 301, 16, 37
MIXTURES = ((0.0, 1.0), (1.0, 0.0), *[(0.5, 0.5)] * L)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def weight(seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(K, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["one piece", "one row at a time", "GPU kernels", "GPU kernels, a few rows at a time"])
def pieces(request, monkeypatch) -> None:
    if request.param == "one row at a time":
        monkeypatch.setattr(module, "PIECE_BYTES", {"cpu": 1})
    if "GPU" in request.param:
        request.getfixturevalue("interpreted_kernels")
        # Smaller than the scores, so that the last block of a row and the last tile are not full.
        kernels = importlib.import_module("braindino.pretrain.prototype_kernels")
        monkeypatch.setattr(kernels, "ROW_BLOCK", 128)
        monkeypatch.setattr(kernels, "TILE_ROWS", 8)
    if "few" in request.param:
        monkeypatch.setattr(module, "PIECE_BYTES", {"cpu": 4 * 5 * K})


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_offset_is_sinkhorns_scaling_of_the_prototypes(iterations: int) -> None:
    features, prototypes = unit(M, WIDTH, seed=0), weight(1)
    offset = sinkhorn_offset(features, prototypes, temperature=0.05, iterations=iterations)
    logits = features.double() @ prototypes.double().T / 0.05
    found = torch.softmax(logits + offset.double(), dim=1)
    expected = sinkhorn_knopp(logits * 0.05, temperature=0.05, iterations=iterations)
    torch.testing.assert_close(found.float(), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.usefixtures("pieces")
def test_dino_equals_the_plain_formulation_in_value_and_gradients() -> None:
    student, prototypes = unit(2 + L, B, WIDTH, seed=2).requires_grad_(), weight(3).requires_grad_()
    features, teacher_prototypes = unit(2, B, WIDTH, seed=4), weight(5)
    q = sinkhorn_knopp(features.flatten(0, 1) @ teacher_prototypes.T, temperature=0.05).unflatten(0, (2, B))
    logits = student.double() @ prototypes.double().T
    # In float64 throughout: dino_loss itself rounds to float32.
    rows = torch.logsumexp(logits / 0.1, dim=-1) - (mixed(q.double()) * logits / 0.1).sum(dim=-1)
    expected = (rows[:2].mean() + L * rows[2:].mean()) / (1 + L)
    assert expected.item() == pytest.approx(dino_loss(logits[:2], logits[2:], q).loss.item(), rel=1e-6)

    offset = sinkhorn_offset(features.flatten(0, 1), teacher_prototypes, temperature=0.05)
    weights = torch.full((2 + L, B), 1 / ((1 + L) * B))
    weights[:2] /= 2
    found = prototype_loss(
        student,
        prototypes,
        Teacher(features, teacher_prototypes, offset, 0.05),
        targets=MIXTURES,
        weights=weights,
        temperature=0.1,
    )
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found.rows.double(), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, torch.special.entr(q).sum(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.usage, q.mean(dim=(0, 1)), rtol=1e-4, atol=1e-9)
    compare_gradients(3.0 * found.loss, 3.0 * expected, student, prototypes)


@pytest.mark.usefixtures("pieces")
def test_ibot_equals_the_plain_formulation_in_value_and_gradients() -> None:
    student, prototypes = unit(M, WIDTH, seed=6).requires_grad_(), weight(7).requires_grad_()
    features, teacher_prototypes = unit(M, WIDTH, seed=8), weight(9)
    weights = torch.rand(M, generator=torch.Generator().manual_seed(10))
    q = sinkhorn_knopp(features @ teacher_prototypes.T, temperature=0.07)
    expected = ibot_loss(student @ prototypes.T, q, weights, num_images=8)
    offset = sinkhorn_offset(features, teacher_prototypes, temperature=0.07)
    found = prototype_loss(
        student[None],
        prototypes,
        Teacher(features[None], teacher_prototypes, offset, 0.07),
        targets=((1.0,),),
        weights=weights[None] / 8,
        temperature=0.1,
    )
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    compare_gradients(found.loss, expected, student, prototypes)


def mixed(q: torch.Tensor) -> torch.Tensor:
    return torch.stack([q[1], q[0], *[q.mean(dim=0)] * L])


def compare_gradients(found: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for ours, plain in pairs:
        assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def test_softmax_centring_is_an_offset_too() -> None:
    features, prototypes, centre = unit(M, WIDTH, seed=11), weight(12), 0.2 * weight(13)[:, 0]
    logits = features @ prototypes.T
    torch.testing.assert_close(mean_logits(features, prototypes), logits.mean(dim=0))
    found = prototype_loss(
        unit(1, M, WIDTH, seed=14),
        weight(15),
        Teacher(features[None], prototypes, -centre / 0.05, 0.05),
        targets=((1.0,),),
        weights=torch.full((1, M), 1 / M),
        temperature=0.1,
    )
    q = torch.softmax((logits - centre) / 0.05, dim=1)
    torch.testing.assert_close(found.usage, q.mean(dim=0), rtol=1e-4, atol=1e-8)


def test_logits_that_overflow_exponentials_stay_finite() -> None:
    features, prototypes = unit(M, WIDTH, seed=16), 1e3 * weight(17)
    offset = sinkhorn_offset(features, prototypes, temperature=0.04)
    student = unit(1, M, WIDTH, seed=18).requires_grad_()
    found = prototype_loss(
        student,
        prototypes,
        Teacher(features[None], prototypes, offset, 0.04),
        targets=((1.0,),),
        weights=torch.ones(1, M),
        temperature=0.1,
    )
    found.loss.backward()
    assert torch.isfinite(offset).all() and torch.isfinite(found.loss) and torch.isfinite(student.grad).all()


def test_equal_logits_cost_ln_k_and_no_rows_cost_nothing() -> None:
    features, zero = unit(1, M, WIDTH, seed=19), torch.zeros(K, WIDTH)
    teacher = Teacher(features, weight(20), torch.zeros(K), 0.05)
    found = prototype_loss(
        features, zero, teacher, targets=((1.0,),), weights=torch.full((1, M), 1 / M), temperature=0.1
    )
    assert found.loss.item() == pytest.approx(math.log(K), rel=1e-6)
    nothing = teacher._replace(features=features[:, :0])
    prototypes = weight(21).requires_grad_()
    empty = prototype_loss(
        features[:, :0], prototypes, nothing, targets=((1.0,),), weights=torch.ones(1, 0), temperature=0.1
    )
    empty.loss.backward()
    assert empty.loss.item() == 0.0 and prototypes.grad is not None and not prototypes.grad.any()


def test_autocast_computes_products_in_bfloat16_and_sums_in_float32() -> None:
    student, prototypes = unit(1, M, WIDTH, seed=22).requires_grad_(), weight(23).requires_grad_()
    features, teacher_prototypes = unit(1, M, WIDTH, seed=24), weight(25)

    def loss() -> torch.Tensor:
        offset = sinkhorn_offset(features[0], teacher_prototypes, temperature=0.07)
        return prototype_loss(
            student,
            prototypes,
            Teacher(features, teacher_prototypes, offset, 0.07),
            targets=((1.0,),),
            weights=torch.full((1, M), 1 / M),
            temperature=0.1,
        ).loss

    exact = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss()
    assert half.dtype == torch.float32 and half.item() != exact.item()
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    (gradient,) = torch.autograd.grad(half, prototypes)
    (plain,) = torch.autograd.grad(exact, prototypes)
    assert gradient.dtype == torch.float32
    assert F.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) > 0.99


class _Largest(TorchDispatchMode):
    """The largest number of values that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_the_scores_of_all_rows_are_never_held_at_once(monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", {"cpu": 4 * K * 2 * 4})
    features = unit(1, M, WIDTH, seed=26)
    prototypes, teacher = weight(27).requires_grad_(), Teacher(features, weight(28), torch.zeros(K), 0.05)
    with _Largest() as largest:
        prototype_loss(features, prototypes, teacher, targets=((1.0,),), weights=torch.ones(1, M), temperature=0.1)
    assert M > 4 and largest.values == max(4 * K, WIDTH * K)


@pytest.mark.parametrize("strip", [1, 3 * 2 * K * 4, 1 << 22])
def test_strips_of_any_size_give_the_same_loss_and_offset(monkeypatch, strip: int) -> None:
    features = unit(1, M, WIDTH, seed=26)
    prototypes, teacher_prototypes = weight(27).requires_grad_(), weight(28)

    def results() -> tuple[torch.Tensor, ...]:
        offset = sinkhorn_offset(features[0], teacher_prototypes, temperature=0.05)
        loss = prototype_loss(
            features,
            prototypes,
            Teacher(features, teacher_prototypes, offset, 0.05),
            targets=((1.0,),),
            weights=torch.ones(1, M),
            temperature=0.1,
        )
        return offset, loss.rows, loss.entropy, loss.usage, *torch.autograd.grad(loss.loss, prototypes)

    whole = results()
    monkeypatch.setattr(module, "STRIP_BYTES", {"cpu": strip})
    for found, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
