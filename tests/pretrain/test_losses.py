"""Losses and centring against slow float64 references written out by hand, and against a case worked on paper."""

import math

import pytest
import torch

from braindino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp

B, K, L = 5, 7, 8


def random_logits(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_sinkhorn(logits: torch.Tensor, temperature: float, iterations: int) -> list[list[float]]:
    """Textbook form on the matrix itself: total to 1, then prototypes to 1/K and samples to 1/N in turn, times N."""
    table = [[math.exp(value / temperature) for value in row] for row in logits.double().tolist()]
    num_samples, num_prototypes = len(table), len(table[0])
    total = sum(map(sum, table))
    table = [[value / total for value in row] for row in table]
    for _ in range(iterations):
        columns = [sum(row[k] for row in table) for k in range(num_prototypes)]
        table = [[value / columns[k] / num_prototypes for k, value in enumerate(row)] for row in table]
        table = [[value / sum(row) / num_samples for value in row] for row in table]
    return [[value * num_samples for value in row] for row in table]


def cross_entropy(target: list[float], logits: list[float], temperature: float) -> float:
    total = sum(math.exp(value / temperature) for value in logits)
    return -sum(q * math.log(math.exp(s / temperature) / total) for q, s in zip(target, logits, strict=True))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_textbook_iteration(iterations: int) -> None:
    logits = random_logits(B, K, seed=0, scale=0.2)
    expected = torch.tensor(reference_sinkhorn(logits, 0.05, iterations))
    result = sinkhorn_knopp(logits, temperature=0.05, iterations=iterations)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=1e-7)


def test_sinkhorn_of_two_samples_and_two_prototypes_by_hand() -> None:
    # exp(l / T) = [[3, 1], [1, 1]]; prototypes to 1: [[3/4, 1/2], [1/4, 1/2]]; samples to 1: [[3/5, 2/5], [1/3, 2/3]].
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = torch.tensor([[3 / 5, 2 / 5], [1 / 3, 2 / 3]])
    torch.testing.assert_close(sinkhorn_knopp(logits, temperature=1.0, iterations=1), expected)


def test_sinkhorn_stays_finite_where_exponentials_overflow() -> None:
    logits = random_logits(B, K, seed=1, scale=300.0)
    result = sinkhorn_knopp(logits, temperature=0.04)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.sum(dim=1), torch.ones(B))


def test_sinkhorn_uses_all_prototypes_evenly_and_ignores_a_shift_of_one_of_them() -> None:
    logits = random_logits(64, K, seed=2, scale=0.1)
    shifted = logits + torch.tensor([5.0, 0, 0, 0, 0, 0, 0])
    centred = sinkhorn_knopp(shifted, temperature=0.1, iterations=20)
    torch.testing.assert_close(centred.mean(dim=0), torch.full((K,), 1 / K), rtol=1e-3, atol=0)
    torch.testing.assert_close(centred, sinkhorn_knopp(logits, temperature=0.1, iterations=20))


def test_sinkhorn_takes_half_precision_logits_and_gives_no_gradient() -> None:
    logits = random_logits(B, K, seed=3).bfloat16().requires_grad_()
    result = sinkhorn_knopp(logits, temperature=0.1)
    assert result.dtype == torch.float32 and not result.requires_grad


@pytest.mark.parametrize("num_local", [8, 3])
def test_dino_loss_is_the_mean_over_all_pairs_of_different_crops(num_local: int) -> None:
    student = random_logits(2 + num_local, B, K, seed=4, scale=0.3)
    teacher = torch.softmax(random_logits(2, B, K, seed=5), dim=-1)
    pairs = [
        sum(cross_entropy(teacher[i, b].tolist(), student[j, b].tolist(), 0.1) for b in range(B)) / B
        for i in range(2)
        for j in range(2 + num_local)
        if i != j
    ]
    assert len(pairs) == 2 + 2 * num_local
    loss = dino_loss(student[:2], student[2:], teacher, temperature=0.1)
    assert loss.loss.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_dino_loss_weighs_global_and_local_pairs_one_to_eight() -> None:
    student = random_logits(2 + L, B, K, seed=6)
    loss = dino_loss(student[:2], student[2:], torch.softmax(random_logits(2, B, K, seed=7), -1), temperature=0.1)
    assert loss.loss.item() == pytest.approx(loss.global_loss.item() / 9 + 8 * loss.local_loss.item() / 9, rel=1e-6)


def test_dino_loss_never_compares_a_global_crop_with_itself() -> None:
    sharp = torch.tensor([[[100.0, 0, 0]], [[0, 100.0, 0]]])
    teacher = torch.softmax(sharp.flip(0), dim=-1)
    assert dino_loss(sharp, None, teacher, temperature=1.0).loss.item() == pytest.approx(0.0, abs=1e-6)
    assert dino_loss(sharp, None, teacher.flip(0), temperature=1.0).loss.item() == pytest.approx(100.0)


def test_dino_loss_without_local_crops_is_the_global_term() -> None:
    student, teacher = random_logits(2, B, K, seed=8), torch.softmax(random_logits(2, B, K, seed=9), dim=-1)
    loss = dino_loss(student, None, teacher, temperature=0.1)
    assert loss.loss.item() == loss.global_loss.item() and loss.local_loss.item() == 0.0


def test_ibot_loss_averages_in_each_image_and_counts_unmasked_images_as_zero() -> None:
    # Image 0 has patches 0-2 masked, image 1 none, image 2 patches 3-4, image 3 none: four images.
    student, teacher = random_logits(5, K, seed=10), torch.softmax(random_logits(5, K, seed=11), dim=-1)
    rows = [cross_entropy(teacher[m].tolist(), student[m].tolist(), 0.1) for m in range(5)]
    expected = (sum(rows[:3]) / 3 + sum(rows[3:]) / 2) / 4
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert ibot_loss(student, teacher, weights, num_images=4, temperature=0.1).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_losses_of_equal_logits_are_ln_k() -> None:
    teacher = torch.softmax(random_logits(2, B, K, seed=12), dim=-1)
    assert dino_loss(torch.zeros(2, B, K), torch.zeros(L, B, K), teacher).loss.item() == pytest.approx(math.log(K))
    # Half of the images masked: half of ln K.
    masked = ibot_loss(torch.zeros(B, K), teacher[0], torch.ones(B), num_images=2 * B)
    assert masked.item() == pytest.approx(0.5 * math.log(K))


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_neighbour() -> None:
    features = random_logits(6, 4, seed=13)
    points = [[v / math.hypot(*row) for v in row] for row in features.double().tolist()]
    nearest = [min(math.dist(p, q) for j, q in enumerate(points) if j != i) for i, p in enumerate(points)]
    assert koleo_loss(features).item() == pytest.approx(-sum(map(math.log, nearest)) / 6, rel=1e-5)


def test_koleo_of_four_directions_by_hand() -> None:
    # Neighbours on the square are sqrt(2) apart, whatever the lengths.
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-0.5, 0.0], [0.0, -2.0]])
    assert koleo_loss(features).item() == pytest.approx(-0.5 * math.log(2.0), rel=1e-6)


def test_koleo_stays_finite_on_duplicates_and_still_spreads_the_others() -> None:
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0], [1.0, -1.0]], requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()
    assert features.grad[2].abs().sum() > 0 and features.grad.abs().max() < 10


def test_koleo_computes_in_float32_under_autocast() -> None:
    # Directions 1e-3 apart, as neighbouring slices have: bfloat16 would see duplicates.
    features = torch.ones(8, 16) + 1e-3 * random_logits(8, 16, seed=14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = koleo_loss(features)
    assert inside.item() == pytest.approx(koleo_loss(features.double()).item(), rel=1e-3)


def test_koleo_of_one_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="KoLeo: a batch of 1 slice has no nearest neighbour"):
        koleo_loss(torch.ones(1, 4))
