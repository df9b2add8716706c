"""One training iteration of segmentation, side by side: seconds, processor seconds, peak memory; ratios last.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/segmentation_step.py                    CPU: ViT-B, 4 slices of 256x256
    python benchmarks/segmentation_step.py --batch 49 --steps 20                      a GPU: the paper's setting
    python benchmarks/segmentation_step.py --batch 49 --steps 20 --compile            the same through torch.compile

Each side runs in a process of its own, on the same batches: four channels, three regions, nnU-Net's loss, its clip at
norm 12, and on CUDA float16 autocast and cuDNN's choice of the fastest kernels. nnU-Net compiles its own networks on
CUDA; our trainers do not. A side that fails is named last, and the others are measured.

    frozen     nnUNetTrainerBrainDINOFrozen
    fixed      nnUNetTrainerBrainDINOFrozenFixedFusion after its first epochs
    context    nnUNetTrainerBrainDINOContext, the slices as one stack
    finetune   nnUNetTrainerBrainDINOFinetune
    release    fine-tuning as the paper's code release does it: everything trained, the decoder in plain layers; the
               encoder is timm's, without drop path
    stock      nnU-Net's own 2d network, as its planner lays it out for BraTS (patches 192x160), with deep supervision

On a shared machine processor time (of all threads, system included) is the steadier witness: run with
OMP_WAIT_POLICY=PASSIVE, else waiting threads count. --rounds alternates the sides and takes the median of their rounds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from braindino.allocation import give_back_large_arrays
from braindino.vision_transformer import ARCHITECTURES
from nnunet_braindino.decoder import PatchDecoder
from nnunet_braindino.trainer import BETAS, LEARNING_RATE, WEIGHT_DECAY
from nnunet_braindino.trainer_context import nnUNetTrainerBrainDINOContext
from nnunet_braindino.trainer_finetune import nnUNetTrainerBrainDINOFinetune
from nnunet_braindino.trainer_variants import FULL_TRAINERS

SIDES = ("frozen", "fixed", "context", "finetune", "release", "stock")
CHANNELS, REGIONS, SIZE = 4, 3, 256
PLANNED_PATCH = (192, 160)  # of nnU-Net's planner for a BraTS 2021 fingerprint
WARM_UP = {"cpu": 1, "cuda": 5}
"""Steps that are not counted."""
TIMM_NAMES = {"vit_small": "vit_small_patch16_dinov3", "vit_base": "vit_base_patch16_dinov3"}


class Release(nn.Module):
    """The network with plain layers: each makes a tensor of its own."""

    def __init__(self, model: str) -> None:
        super().__init__()
        import timm

        self.fusion = nn.Conv2d(CHANNELS, 3, kernel_size=1, bias=False)
        self.encoder = timm.create_model(TIMM_NAMES[model], num_classes=0, dynamic_img_size=True)
        self.decoder = PatchDecoder(self.encoder.num_features, REGIONS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.cat(
            self.encoder.forward_intermediates(
                self.fusion(images), indices=[2, 5, 8, 11], norm=True, intermediates_only=True
            ),
            dim=1,
        )
        for convolution, norm in self.decoder.stages:
            x = norm(convolution(x).movedim(1, -1)).movedim(-1, 1)
            x = F.gelu(x)
        return self.decoder.to_logits(x)


def adamw(groups: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)  # type: ignore[arg-type]


def build(side: str, model: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if side == "stock":
        network = stock_network()
        return network, torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    if side == "release":
        network = Release(model)
        encoder, others = network.encoder, [*network.fusion.parameters(), *network.decoder.parameters()]
        return network, adamw([{"params": others}, {"params": encoder.parameters(), "lr": LEARNING_RATE / 10}])
    kinds = {"context": nnUNetTrainerBrainDINOContext, "finetune": nnUNetTrainerBrainDINOFinetune}
    trainer = kinds.get(side, FULL_TRAINERS["nnUNetTrainerBrainDINOFrozen"])
    network = trainer.build_from_encoder(ARCHITECTURES[model](), CHANNELS, REGIONS)
    if side == "fixed":
        network.fix_fusion()
    # The groups depend on the network alone.
    return network, adamw(trainer.parameter_groups(trainer, network))


def stock_network() -> nn.Module:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    _, strides, kernels, _, _ = get_pool_and_conv_props((1.0, 1.0), PLANNED_PATCH, 4, 999999)
    widths = [min(512, 32 * 2**stage) for stage in range(len(strides))]  # the planner's, in two dimensions
    architecture = {
        "n_stages": len(strides),
        "features_per_stage": widths,
        "conv_op": nn.Conv2d,
        "kernel_sizes": kernels,
        "strides": strides,
        "n_conv_per_stage": [2] * len(strides),
        "n_conv_per_stage_decoder": [2] * (len(strides) - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    return get_network_from_plans(name, architecture, (), CHANNELS, REGIONS, deep_supervision=True)


def build_loss(num_outputs: int) -> nn.Module:
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    loss = DC_and_BCE_loss(
        {},
        {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    if num_outputs == 1:
        return loss
    weights = [2.0**-k for k in range(num_outputs - 1)]
    return DeepSupervisionWrapper(loss, [*(weight / sum(weights) for weight in weights), 0.0])


def make_batch(side: str, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in the shape of a brain, and balls in it: an iteration takes the same time whatever it shows."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(batch, CHANNELS, SIZE, SIZE)
    images[:, :, 40:216, 60:196] = torch.randn(batch, CHANNELS, 176, 136, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    distance = torch.hypot(y - 120.0, x - 110.0)
    target = torch.stack([distance < radius for radius in (40, 25, 12)]).float().expand(batch, -1, -1, -1).contiguous()
    if side == "context":
        images, target = (tensor.transpose(0, 1)[None].contiguous() for tensor in (images, target))
    return images.to(device), target.to(device)


def make_step(side: str, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        give_back_large_arrays()
    network, optimizer = build(side, options.model)
    network.to(device).train()
    images, target = make_batch(side, options.batch, device)
    targets: torch.Tensor | list[torch.Tensor] = target
    with torch.no_grad():
        outputs = network(images)
    if isinstance(outputs, list):
        targets = [F.interpolate(target, size=output.shape[2:], mode="nearest") for output in outputs]
    loss = build_loss(len(targets) if isinstance(targets, list) else 1)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    called = torch.compile(network) if options.compile else network

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
            objective = loss(called(images), targets)
        scaler.scale(objective).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()

    return step


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median of the steps after those to warm up, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as nnU-Net's training
    step = make_step(side, options, device)
    seconds, processor = [], []
    for _ in range(WARM_UP[device.type] + options.steps):
        start, spent = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - spent)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {
        "seconds": statistics.median(seconds[-options.steps :]),
        "processor": statistics.median(processor[-options.steps :]),
        "memory": memory / 1024**3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base", choices=sorted(TIMM_NAMES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the medians there, too")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return 0
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    shared = ["--model", options.model, "--batch", str(options.batch), "--steps", str(options.steps)]
    shared += ["--compile"] if options.compile else []
    for _ in range(options.rounds):
        for side in options.sides:
            done = subprocess.run(
                [sys.executable, __file__, "--one", side, *shared], stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode == 0:
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for side, rounds in found.items()
        if rounds
    }
    print(f"{options.model}, {options.batch} slices of {SIZE}x{SIZE}, {CHANNELS} channels, {REGIONS} regions; "
          f"median of {options.rounds} rounds of {options.steps} steps, compiled {options.compile}, "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'side':<10} {'s':>7} {'cpu s':>7} {'GiB':>6}   of rounds: cpu s")
    for side, row in medians.items():
        spread = " ".join(f"{each['processor']:.2f}" for each in found[side])
        print(f"{side:<10} {row['seconds']:7.2f} {row['processor']:7.2f} {row['memory']:6.2f}   {spread}")
    for reference in ("release", "finetune"):
        if reference in medians:
            for side in (side for side in medians if side != reference):
                ratios = [medians[side][key] / medians[reference][key] for key in ("seconds", "processor", "memory")]
                print(f"{side} / {reference}: seconds {ratios[0]:.2f}, cpu {ratios[1]:.2f}, memory {ratios[2]:.2f}")
    if options.json is not None:
        rows = {
            side: {
                "seconds": row["seconds"],
                "rate": options.batch / row["seconds"],
                "peak_gb": row["memory"] * 1024**3 / 1e9,
            }
            for side, row in medians.items()
        }
        options.json.write_text(json.dumps(rows))
    for side in (missing := [side for side in options.sides if side not in medians]):
        print(f"{side}: could not run")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
