"""The losses of the pretraining objective and the centring of the teacher (paper sec. 4.2, Eq. 1-3).

Free functions on tensors. Training computes DINO, iBOT and Sinkhorn-Knopp with ``prototypes``, which never holds all
logits; here they stand as the formulas say, and its tests and benchmark compare it with these. All of them compute in
float32 whatever the precision of their input. Throughout, B is the number of slices of the batch, K the number of
prototypes, M the number of masked patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Two unit vectors closer than this are one and the same to float32: KoLeo does not try to push them apart.
DUPLICATE_DISTANCE = 1e-6


class DinoLoss(NamedTuple):
    """Mean cross-entropies (nats, scalars): over pairs of global crops, over global-local pairs, and all pairs."""

    global_loss: Tensor
    local_loss: Tensor
    loss: Tensor


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher probabilities, centred so that the batch uses all prototypes evenly. (N, K) -> (N, K) float32.

    With l = logits / temperature and Q = exp(l), each iteration scales the columns of Q (prototypes) to sum to N/K and
    then its rows (samples) to sum to 1. Q is never formed: its scalings are kept as two vectors of logarithms,

        r_k = -log sum_n exp(l_nk + c_n),     c_n = -log sum_k exp(l_nk + r_k),

    in which the constants N and K cancel; the result is exp(l + r + c), that is softmax over k of (l + r) with the last
    r. No logit, however large, overflows.
    """
    scaled = logits.float() / temperature
    samples = scaled.new_zeros(scaled.shape[0], 1)
    prototypes = -torch.logsumexp(scaled, dim=0, keepdim=True)
    for _ in range(iterations - 1):
        samples = -torch.logsumexp(scaled + prototypes, dim=1, keepdim=True)
        prototypes = -torch.logsumexp(scaled + samples, dim=0, keepdim=True)
    return torch.softmax(scaled + prototypes, dim=1)


def cross_entropy_rows(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """-sum_k q_k log softmax(s / T)_k for each row: (..., K) logits and (..., K) probabilities -> (...) nats.

    As the targets sum to 1 this is logsumexp(s / T) - sum_k q_k s_k / T.
    """
    scaled = logits.float() / temperature
    return torch.logsumexp(scaled, dim=-1) - (targets * scaled).sum(dim=-1)


def dino_loss(
    student_global: Tensor, student_local: Tensor | None, teacher: Tensor, *, temperature: float = 0.1
) -> DinoLoss:
    """Cross-entropy between teacher and student distributions of the CLS token over pairs of crops (Eq. 1).

    student_global (2, B, K) and student_local (L, B, K) are logits, teacher (2, B, K) probabilities. A global crop is
    never compared with itself (the diagonal i = j is left out), so that with H(q, s) averaged over the batch

        L_global = 1/2  sum_{i != j} H(q_i, s_j)                2 pairs
        L_local  = 1/2L sum_{i, j}   H(q_i, s_j)                2L pairs
        L        = (2 L_global + 2L L_local) / (2 + 2L)         1/9 and 8/9 for L = 8

    The cross-entropy is linear in the target: a local crop meets the mean of both teachers in one pass.
    """
    global_loss = cross_entropy_rows(student_global, teacher.flip(0), temperature=temperature).mean()
    if student_local is None:
        return DinoLoss(global_loss, torch.zeros_like(global_loss), global_loss)
    local_loss = cross_entropy_rows(student_local, teacher.mean(dim=0), temperature=temperature).mean()
    num_local = student_local.shape[0]
    return DinoLoss(global_loss, local_loss, (global_loss + num_local * local_loss) / (1 + num_local))


def ibot_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, *, num_images: int, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy of the masked patches, averaged in each image, summed over images, divided by all of them (Eq. 2).

    student (M, K) logits, teacher (M, K) probabilities, weights (M,) = 1 / (masked patches of that patch's image);

        L = 1 / num_images  sum_m w_m H(q_m, s_m),      num_images = 2B.

    Images without a mask count as zero: with half the crops masked the value starts at 0.5 ln K, not at ln K.
    """
    rows = cross_entropy_rows(student, teacher, temperature=temperature)
    return (rows * weights).sum() / num_images


def koleo_loss(features: Tensor) -> Tensor:
    """Kozachenko-Leonenko regulariser of one global crop, features (B, D) -> scalar:

        L = -1/B  sum_i log min_{j != i} |x_i - x_j|,      x L2-normalised.

    In float32 even under autocast: neighbouring brain slices are so alike that bfloat16 distorts their distances. A
    pair of exact duplicates (the same empty slice twice) adds the finite -log(DUPLICATE_DISTANCE) and no gradient.
    """
    if features.shape[0] < 2:
        raise ValueError(
            f"KoLeo: a batch of {features.shape[0]} slice has no nearest neighbour; use a batch of 2 or more"
        )
    with torch.autocast(device_type=features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.T
            similarity.fill_diagonal_(-torch.inf)
            nearest = similarity.argmax(dim=1)
        squared = (x - x[nearest]).square().sum(dim=-1)
        return -0.5 * squared.clamp_min(DUPLICATE_DISTANCE**2).log().mean()


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Gram anchoring (DINOv3; off in the paper): mean squared difference of all patch similarities of a crop.

    student and anchor (2B, N, D) patch tokens -> scalar, the mean over crops and pairs of patches of
    (x_i . x_j - y_i . y_j)^2 with x and y L2-normalised, in float32.
    """
    with torch.autocast(device_type=student.device.type, enabled=False):
        x, y = (F.normalize(part.float(), dim=-1, eps=1e-8) for part in (student, anchor))
        return (x @ x.mT - y @ y.mT).square().mean()
