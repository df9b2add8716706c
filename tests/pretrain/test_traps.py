"""The table of traps in docs/pretraining.md: its tests exist, and those of them that had no other home."""

import ast
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from braindino.pretrain.distillation import Network, build_student, build_teacher
from braindino.pretrain.prototypes import sinkhorn_offset
from braindino.pretrain.recipes import STAGE1, STAGE2
from braindino.pretrain.schedules import build_schedules, effective_lr
from braindino.pretrain.views import Views, build_views

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "pretraining.md"
HEADING = "## Traps, one by one"


def trap_rows() -> list[list[str]]:
    text = TABLE.read_text(encoding="utf-8")
    assert text.count(HEADING) == 1
    section = re.split(r"^## ", text.split(HEADING)[1], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", trap_rows(), ids=lambda row: row[0])
def test_every_trap_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4 and all(row)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
    assert named, "no test is named"
    for file, name in named:
        assert name in functions_of(ROOT / "tests" / file), f"tests/{file} has no {name}"


def test_the_table_holds_the_traps_of_the_brief() -> None:
    traps = " / ".join(row[0] for row in trap_rows()).lower()
    for word in (
        "learning-rate rule",
        "minimum learning rate",
        "blur",
        "mask counts",
        "loss weights",
        "diagonal",
        "ibot",
        "sinkhorn",
        "koleo",
        "duplicates",
        "clip",
        "weight decay",
        "patch-embedding",
        "rope",
        "168 px",
        "prototypes",
        "gradients over processes",
        "qkv bias",
        "drop path",
        "last layer",
        "temperature",
        "layernorm",
        "1,024 px",
        "crop pair",
    ):
        assert word in traps, word


def student_of(architecture: str = "vit_tiny", **settings) -> Network:
    heads = dict(num_prototypes=32, head_hidden_dim=16, head_bottleneck_dim=8)
    values = dict(num_storage_tokens=4, layer_scale_init=1e-5, drop_path=0.0, **heads)
    return build_student(architecture, **{**values, **settings}, seed=0)


def views_of(slices: torch.Tensor, *, blur: tuple[float, float, float], num_local: int = 2) -> Views:
    """The whole slice, unflipped, at its own size: only the blur can change it."""
    return build_views(
        slices,
        torch.zeros(2 * len(slices), 256, dtype=torch.bool),
        sizes=(256, 256),
        num_local=num_local,
        global_scale=(1.0, 1.0),
        local_scale=(1.0, 1.0),
        aspect=(1.0, 1.0),
        canvas_size=256,
        flip_probability=0.0,
        blur_probabilities=blur,
        blur_sigma=(1.5, 2.0),
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("blurred", [0, 1, 2])
def test_each_kind_of_view_has_its_own_blur_probability(blurred: int) -> None:
    slices = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    views = views_of(slices, blur=tuple(float(kind == blurred) for kind in range(3)))
    parts = [views.global_crops[:3], views.global_crops[3:], views.local_crops]
    for kind, part in enumerate(parts):
        for view, original in zip(part[:, 0], slices.repeat(len(part) // 3, 1, 1), strict=True):
            # Noise loses most of its variance to a blur of 1.5 px.
            assert view.std() < 0.3 if kind == blurred else torch.allclose(view, original, atol=1e-4)


def test_the_minimum_learning_rate_is_not_scaled_with_the_batch() -> None:
    settings = STAGE1.optimizer
    ends = []
    for batch in (64, 1024):
        peak = effective_lr(settings.base_lr, batch, scaling="dinov3")
        schedules = build_schedules(
            100,
            peak_lr=peak,
            min_lr=settings.min_lr,
            warmup_iterations=10,
            last_layer_freeze_iterations=0,
            weight_decay=0.04,
            teacher_momentum=0.994,
            teacher_temperature=(0.04, 0.07),
            teacher_temperature_iterations=10,
        )
        assert schedules.lr.max() == pytest.approx(peak)
        ends.append(schedules.lr[-1])
    assert ends == pytest.approx([1e-6, 1e-6])


def test_every_layer_norm_has_the_eps_of_the_released_loaders() -> None:
    student = student_of()
    norms = [module for module in student.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 25 and {norm.eps for norm in norms} == {1e-6}


def test_no_recipe_has_a_qkv_bias_and_every_parameter_starts_finite() -> None:
    # MedDINOv3's fork leaves its bias mask NaN: biases there cannot be trained.
    for recipe in (STAGE1, STAGE2):
        with torch.device("meta"):
            encoder = student_of(recipe.model.architecture).encoder
        names = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
        assert not [name for name in names if "qkv.bias" in name or "bias_mask" in name]
        assert [name for name in names if name.endswith(("proj.bias", "fc1.bias", "fc2.bias"))]
    assert all(parameter.isfinite().all() for parameter in student_of().parameters())


def test_the_teacher_starts_as_the_student_without_weight_norm_and_drops_no_path() -> None:
    student = student_of(drop_path=0.5).train()
    teacher = build_teacher(student)
    pairs = zip(student.named_parameters(), teacher.named_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert [name for name, _ in teacher.dino_head.named_parameters() if "last_layer" in name] == ["last_layer.weight"]
    x = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.encoder(x).cls, teacher.encoder(x).cls)


@pytest.mark.parametrize("silenced", ["ls1", "ls2"])
def test_drop_path_leaves_the_same_share_of_images_in_every_block(silenced: str) -> None:
    encoder = student_of(drop_path=0.25, layer_scale_init=1.0).encoder.train()
    changed = []

    def count(_block: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        images = (made - given[0]).unflatten(0, (8, -1)).abs().amax(dim=(1, 2))
        changed.append(int((images > 0).sum()))

    for block in encoder.blocks:
        nn.init.zeros_(getattr(block, silenced).gamma)  # what changes is the other branch's doing
        block.register_forward_hook(count)
    with torch.no_grad():
        encoder.forward_crops([torch.randn(8, 1, 32, 32)], generator=torch.Generator().manual_seed(0))
    # Of 8 images 6 in each of the 12 blocks; timm's rate would rise from 0 in the first.
    assert changed == [6] * 12


def test_training_mode_leaves_positions_alone() -> None:
    encoder = student_of().encoder
    x = torch.randn(2, 1, 48, 32)
    with torch.no_grad():
        assert torch.equal(encoder.train()(x).patches, encoder.eval()(x).patches)


def test_sinkhorn_over_two_processes_equals_sinkhorn_over_all_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=1)
    prototypes = torch.randn(32, 8, generator=generator)
    meeting, shared = threading.Barrier(2), {}

    def process(rank: int, part: torch.Tensor) -> torch.Tensor:
        def all_reduce(local: torch.Tensor) -> torch.Tensor:
            shared[rank] = local
            meeting.wait(timeout=20)
            total = torch.logaddexp(shared[0], shared[1])
            meeting.wait(timeout=20)
            return total

        return sinkhorn_offset(part, prototypes, temperature=0.05, all_reduce=all_reduce)

    with ThreadPoolExecutor(2) as pool:
        # Unequal parts: masked patches are not divided evenly.
        offsets = list(pool.map(process, (0, 1), (rows[:7], rows[7:])))
    alone = sinkhorn_offset(rows, prototypes, temperature=0.05)
    torch.testing.assert_close(offsets[0], alone, rtol=0, atol=1e-5)
    assert torch.equal(offsets[0], offsets[1])
    assert (sinkhorn_offset(rows[:7], prototypes, temperature=0.05) - alone).abs().max() > 0.1
