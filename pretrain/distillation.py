"""Student and teacher, and the objective of one iteration (paper sec. 4.2, Eq. 1-3)."""

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from braindino.pretrain.distributed import all_reduce, all_reduce_logaddexp
from braindino.pretrain.heads import ProjectionHead
from braindino.pretrain.losses import gram_loss, koleo_loss
from braindino.pretrain.prototypes import Teacher, mean_logits, prototype_loss, sinkhorn_offset
from braindino.pretrain.randomness import torch_generator
from braindino.pretrain.views import Views
from braindino.transfer import send
from braindino.vision_transformer import ARCHITECTURES, ReadTokens, VisionTransformer

Centering = Literal["sinkhorn_knopp", "softmax"]


class Network(nn.Module):
    """An encoder with its two heads: the student, or the teacher."""

    def __init__(self, encoder: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        # Of a teacher with softmax centring. Not an attribute of the class: that would hide the module set later.
        self.centre: Centre | None = None


class Targets(NamedTuple):
    """What the student is to predict of one micro-batch: the teacher's distributions, not yet formed."""

    cls: Teacher
    """Of the CLS token of both global crops: 2 views of B slices."""
    patches: Teacher
    """Of the M patches masked for the student."""
    features: Tensor
    """(2B, D) the teacher's CLS tokens themselves."""
    gram: Tensor | None = None
    """(2B, N, D) patch tokens that Gram anchoring holds the student's to; None without it."""


class Objective(NamedTuple):
    """Terms of the objective (scalars, on the device) and what collapse indicators are computed from."""

    loss: Tensor
    dino: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor
    """Sum over both global crops, before its weight."""
    gram: Tensor
    """Before its weight; 0 without Gram anchoring."""
    dino_per_slice: Tensor
    """(B,) the DINO term of each slice, detached."""
    teacher_entropy: Tensor
    """Mean entropy of the teacher's CLS distributions, nats."""
    prototype_usage: Tensor
    """(K,) their mean over the micro-batch."""
    student_cls: Tensor
    """(2B, D) of the global crops, detached."""
    teacher_cls: Tensor
    """(2B, D) of the global crops, whole."""


class Centre(nn.Module):
    """Moving means of the teacher's logits, by which softmax centring shifts them (DINO, DINOv2)."""

    dino: Tensor
    ibot: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("dino", torch.zeros(num_prototypes))
        self.register_buffer("ibot", torch.zeros(num_prototypes))


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
    depth: int | None = None,
    layer_norm_eps: float | None = None,
) -> Network:
    """A freshly initialised student, in training mode; the seed decides its weights. Depth and eps are the
    architecture's own where they are not given."""
    given = {name: value for name, value in (("depth", depth), ("layer_norm_eps", layer_norm_eps)) if value is not None}
    encoder = ARCHITECTURES[architecture](
        num_storage_tokens=num_storage_tokens, layer_scale_init=layer_scale_init, drop_path=drop_path, **given
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


def build_teacher(student: Network, *, centering: Centering = "sinkhorn_knopp") -> Network:
    """An exact copy of the student that is never trained by gradients and drops no path."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    if centering == "softmax":
        weight = teacher.dino_head.last_layer.weight
        teacher.centre = Centre(len(weight)).to(weight.device)
    return teacher


@torch.no_grad()
def teacher_targets(
    teacher: Network,
    micro_batches: Sequence[Views],
    *,
    temperature: float,
    sinkhorn_iterations: int,
    centre_momentum: float = 0.9,
    gram_teacher: VisionTransformer | None = None,
) -> list[Targets]:
    """The targets of each micro-batch, centred over all of them and over all processes.

    The teacher sees the global crops whole and computes of their patches only those that are masked for the student.
    A teacher with a :class:`Centre` shifts by it and updates it afterwards; any other is centred by Sinkhorn-Knopp.
    """
    tokens = [teacher.encoder.forward_read([views.global_crops], [views.masked])[0] for views in micro_batches]
    features = {
        "dino": [teacher.dino_head.project(part.cls) for part in tokens],
        "ibot": [teacher.ibot_head.project(part.patches) for part in tokens],
    }
    prototypes = {"dino": teacher.dino_head.last_layer.weight, "ibot": teacher.ibot_head.last_layer.weight}
    offsets = {}
    for name, parts in features.items():
        rows = torch.cat(parts)
        if teacher.centre is None:
            offsets[name] = sinkhorn_offset(
                rows,
                prototypes[name],
                temperature=temperature,
                iterations=sinkhorn_iterations,
                all_reduce=all_reduce_logaddexp,
            )
        else:
            centre = getattr(teacher.centre, name)
            offsets[name] = -centre / temperature
            # Over all processes, of which one may have no masked patch at all; and nothing is learnt from no row.
            total = mean_logits(rows, prototypes[name]) * len(rows) if len(rows) else torch.zeros_like(centre)
            summed = all_reduce(torch.cat([total, total.new_tensor([len(rows)])]))
            mean = summed[:-1] / summed[-1]
            centre.lerp_(torch.where(torch.isfinite(mean), mean, centre), 1 - centre_momentum)
    return [
        Targets(
            Teacher(cls.unflatten(0, (2, -1)), prototypes["dino"], offsets["dino"], temperature),
            Teacher(patches[None], prototypes["ibot"], offsets["ibot"], temperature),
            part.cls,
            None if gram_teacher is None else gram_teacher(views.global_crops).patches,
        )
        for views, part, cls, patches in zip(micro_batches, tokens, features["dino"], features["ibot"], strict=True)
    ]


def distillation_objective(
    student: Network,
    views: Views,
    targets: Targets,
    *,
    student_temperature: float,
    ibot_weight: float,
    koleo_weight: float,
    gram_weight: float = 0.0,
    generator: torch.Generator | None = None,
) -> Objective:
    """L = L_DINO + ibot_weight L_iBOT + koleo_weight (KoLeo(g1) + KoLeo(g2)) + gram_weight L_Gram.

    Of one micro-batch; the student sees all crops in one pass, and computes to the end only the tokens that the losses
    read (with Gram anchoring that is all of them). `generator`, on the CPU, draws its drop path.
    """
    num_global = views.global_crops.shape[0]
    batch = num_global // 2
    num_local = 0 if views.local_crops is None else len(views.local_crops) // batch
    crops, masks = [views.global_crops], [views.masks]
    if views.local_crops is not None:
        crops.append(views.local_crops)
    hidden = [*masks, *[None] * (len(crops) - 1)]
    if targets.gram is None:
        read = [views.masked, *[None] * (len(crops) - 1)]
        tokens = student.encoder.forward_read(crops, read, masks=hidden, generator=generator)
        patches, gram = tokens[0].patches, tokens[0].cls.new_zeros((), dtype=torch.float32)
    else:
        whole = student.encoder.forward_crops(crops, masks=hidden, generator=generator)
        patches = whole[0].patches.flatten(0, 1)[send(views.masked, views.masks.device)]
        gram = gram_loss(whole[0].patches, targets.gram)
        tokens = [ReadTokens(part.cls, patches) for part in whole]

    # Every pair of different crops counts alike; a local crop meets the mean of both teachers (losses.dino_loss).
    num_views = 2 + num_local
    weights = torch.full((num_views, batch), 1 / ((1 + num_local) * batch), device=patches.device)
    weights[:2] /= 2
    dino = prototype_loss(
        student.dino_head.project(torch.cat([part.cls for part in tokens])).unflatten(0, (num_views, batch)),
        student.dino_head.last_layer.weight,
        targets.cls,
        targets=((0.0, 1.0), (1.0, 0.0), *[(0.5, 0.5)] * num_local),
        weights=weights,
        temperature=student_temperature,
    )
    ibot = prototype_loss(
        student.ibot_head.project(patches)[None],
        student.ibot_head.last_layer.weight,
        targets.patches,
        targets=((1.0,),),
        weights=views.mask_weights[None] / num_global,
        temperature=student_temperature,
        with_usage=False,
    )
    assert dino.usage is not None
    cls = tokens[0].cls
    koleo = koleo_loss(cls[:batch]) + koleo_loss(cls[batch:])
    dino_global = dino.rows[:2].mean()
    return Objective(
        loss=dino.loss + ibot_weight * ibot.loss + koleo_weight * koleo + gram_weight * gram,
        dino=dino.loss,
        dino_global=dino_global,
        dino_local=dino.rows[2:].mean() if num_local else torch.zeros_like(dino_global),
        ibot=ibot.loss,
        koleo=koleo,
        gram=gram,
        dino_per_slice=(dino.rows * weights).sum(dim=0) * batch,
        teacher_entropy=dino.entropy.mean(),
        prototype_usage=dino.usage,
        student_cls=cls.detach(),
        teacher_cls=targets.features,
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
    teacher_std: as feature_std, of the teacher, which sees the crops whole: the student's features differ by their
    masks even where the slices do not. neighbour_distance: mean distance of the teacher's directions of one view to the
    nearest other, over what teacher_std lets expect of directions without order: 0 where features sit on few points.
    """
    centered, seen = (_centred_directions(cls) for cls in (objective.student_cls, objective.teacher_cls))
    gram = centered @ centered.T
    trace = gram.diagonal().sum()
    teacher_std = (seen.square().sum() / len(seen)).sqrt()
    tiny = torch.finfo(torch.float32).tiny
    return {
        "teacher_entropy": objective.teacher_entropy,
        "prototype_entropy": torch.special.entr(objective.prototype_usage).sum(),
        "feature_std": (trace / len(centered)).sqrt(),
        "feature_rank": trace.square() / gram.square().sum().clamp_min(tiny),
        "teacher_std": teacher_std,
        "neighbour_distance": _nearest(seen[: len(seen) // 2]).mean() / (math.sqrt(2) * teacher_std).clamp_min(tiny),
    }


def _nearest(points: Tensor) -> Tensor:
    """(N,) distance of each of the points (N, D) to the nearest other."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(torch.inf).min(dim=1).values


def _centred_directions(features: Tensor) -> Tensor:
    directions = nn.functional.normalize(features.float(), dim=1)
    return directions - directions.mean(dim=0)
