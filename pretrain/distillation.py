"""Student and teacher, and the objective of one iteration (paper sec. 4.2, Eq. 1-3)."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from braindino.pretrain.heads import ProjectionHead
from braindino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from braindino.pretrain.randomness import torch_generator
from braindino.pretrain.views import Views
from braindino.vision_transformer import ARCHITECTURES, VisionTransformer


class Network(nn.Module):
    """An encoder with its two heads: the student, or the teacher."""

    def __init__(self, encoder: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.dino_head = dino_head
        self.ibot_head = ibot_head


class Objective(NamedTuple):
    """Terms of the objective (scalars, on the device) and what collapse indicators are computed from."""

    loss: Tensor
    dino: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor
    """Sum over both global crops, before its weight."""
    teacher_probabilities: Tensor
    """(2B, K) of the CLS token, centred."""
    student_cls: Tensor
    """(2B, D) of the global crops, detached."""


def build_student(
    architecture: str,
    *,
    num_storage_tokens: int,
    layer_scale_init: float,
    drop_path: float,
    num_prototypes: int,
    head_hidden_dim: int,
    head_bottleneck_dim: int,
    seed: int,
) -> Network:
    """A freshly initialised student, in training mode; the seed decides its weights."""
    encoder = ARCHITECTURES[architecture](
        num_storage_tokens=num_storage_tokens, layer_scale_init=layer_scale_init, drop_path=drop_path
    )
    encoder.initialize(torch_generator(seed, 0, "encoder"))
    dino_head, ibot_head = (
        ProjectionHead(
            encoder.embed_dim,
            num_prototypes=num_prototypes,
            hidden_dim=head_hidden_dim,
            bottleneck_dim=head_bottleneck_dim,
            generator=torch_generator(seed, 0, name),
        )
        for name in ("dino head", "ibot head")
    )
    return Network(encoder, dino_head, ibot_head)


def build_teacher(student: Network) -> Network:
    """An exact copy of the student that is never trained by gradients and drops no path."""
    return copy.deepcopy(student).requires_grad_(False).eval()


def distillation_objective(
    student: Network,
    teacher: Network,
    views: Views,
    *,
    teacher_temperature: float,
    student_temperature: float,
    sinkhorn_iterations: int,
    ibot_weight: float,
    koleo_weight: float,
    generator: torch.Generator | None = None,
) -> Objective:
    """L = L_DINO + ibot_weight L_iBOT + koleo_weight (KoLeo(g1) + KoLeo(g2)).

    The teacher sees the global crops whole and its iBOT head only the patches that are masked for the student; the
    student sees all crops in one pass. `generator` draws the student's drop path.
    """
    num_global = views.global_crops.shape[0]
    batch = num_global // 2
    with torch.no_grad():
        target = teacher.encoder.forward_crops([views.global_crops])[0]
        teacher_cls = sinkhorn_knopp(
            teacher.dino_head(target.cls), temperature=teacher_temperature, iterations=sinkhorn_iterations
        )
        teacher_patches = sinkhorn_knopp(
            teacher.ibot_head(target.patches.flatten(0, 1)[views.masked]),
            temperature=teacher_temperature,
            iterations=sinkhorn_iterations,
        )

    crops, masks = [views.global_crops], [views.masks]
    if views.local_crops is not None:
        crops.append(views.local_crops)
    tokens = student.encoder.forward_crops(crops, masks=[*masks, *[None] * (len(crops) - 1)], generator=generator)
    student_cls = student.dino_head(torch.cat([part.cls for part in tokens])).unflatten(0, (-1, batch))
    student_patches = student.ibot_head(tokens[0].patches.flatten(0, 1)[views.masked])

    dino = dino_loss(
        student_cls[:2],
        student_cls[2:] if views.local_crops is not None else None,
        teacher_cls.unflatten(0, (2, batch)),
        temperature=student_temperature,
    )
    ibot = ibot_loss(
        student_patches,
        teacher_patches,
        views.mask_weights,
        num_images=num_global,
        temperature=student_temperature,
    )
    koleo = koleo_loss(tokens[0].cls[:batch]) + koleo_loss(tokens[0].cls[batch:])
    return Objective(
        loss=dino.loss + ibot_weight * ibot + koleo_weight * koleo,
        dino=dino.loss,
        dino_global=dino.global_loss,
        dino_local=dino.local_loss,
        ibot=ibot,
        koleo=koleo,
        teacher_probabilities=teacher_cls,
        student_cls=tokens[0].cls.detach(),
    )


def expected_initial_loss(
    num_prototypes: int, *, masked_fraction: float, ibot_weight: float, koleo_weight: float, koleo: float
) -> float:
    """What the objective is before anything is learnt: (1 + weight * masked fraction) ln K + KoLeo as measured.

    With half the crops masked, 1.5 ln K: 16.6 for 65,536 prototypes. Holds while logits are small beside the student's
    temperature, as at 0.1; at a temperature of 0.02 the start lies a few percent higher.
    """
    return (1 + ibot_weight * masked_fraction) * math.log(num_prototypes) + koleo_weight * koleo


@torch.no_grad()
def collapse_indicators(objective: Objective) -> dict[str, Tensor]:
    """Scalars that fall towards 0 (rank: 1) when representations collapse.

    teacher_entropy: mean entropy of the teacher's distributions, nats; prototype_entropy: of their mean over the batch.
    feature_std: standard deviation over the batch of L2-normalised CLS features times sqrt(D), 1 = spread evenly.
    feature_rank: effective dimensions (sum e)^2 / sum e^2 over the eigenvalues e of their covariance.
    """
    q = objective.teacher_probabilities
    features = nn.functional.normalize(objective.student_cls.float(), dim=1)
    centered = features - features.mean(dim=0)
    gram = centered @ centered.T
    trace = gram.diagonal().sum()
    tiny = torch.finfo(torch.float32).tiny
    return {
        "teacher_entropy": torch.special.entr(q).sum(dim=1).mean(),
        "prototype_entropy": torch.special.entr(q.mean(dim=0)).sum(),
        "feature_std": (trace / len(features)).sqrt(),
        "feature_rank": trace.square() / gram.square().sum().clamp_min(tiny),
    }
