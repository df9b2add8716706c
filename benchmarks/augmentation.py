"""Time of cutting the views of a slice (2 x 256 px, 8 x 112 px) on one CPU thread: image by image, and our products.

    python benchmarks/augmentation.py [--batch-size 16] [--repeats 5]

The other side is what DINOv2, DINOv3 and their forks run in their loader's processes, per image, without what grey
images cannot use (colour jitter, grey-scale, solarisation): `pil-rgb`, torchvision on an 8-bit RGB image, as there;
`tensor-grey`, torchvision on one float32 channel, the best one can do that way. Ours: `cpu`, the batched matrix
products of braindino.pretrain.views; and `gpu: the CPU's share`, what is left for the CPU when the products run on a
GPU, namely the random numbers. Reading is on neither side. Processor time, so that other programs count
less; medians of interleaved repeats, ratios last.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_pil_image

from braindino.pretrain.augment import draw_crops
from braindino.pretrain.recipes import STAGE1
from braindino.pretrain.views import build_views

CROPS = STAGE1.crops
GLOBAL_SIZE, LOCAL_SIZE = CROPS.sizes(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slices = torch.randn(arguments.batch_size, 256, 256).half()
    pictures = [
        to_pil_image(np.uint8(np.clip(part.float().numpy() * 40 + 128, 0, 255))).convert("RGB") for part in slices
    ]
    sides: dict[str, Callable[[int], None]] = {
        "pil-rgb": per_image(pictures, [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
        "tensor-grey": per_image(list(slices.float()[:, None]), []),
        "ours, cpu": lambda seed: ours(slices, seed),
        "ours, gpu: the CPU's share": lambda seed: draws_alone(len(slices), seed),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        for name, side in sides.items():
            started = time.process_time()
            side(repeat)
            if repeat:  # the first is not counted
                times[name].append((time.process_time() - started) / len(slices) * 1e3)
    print(f"{len(slices)} slices a batch, one thread, torch {torch.__version__}, ms per slice (least to most):")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"  {name:28s} {medians[name]:8.3f}  ({min(values):.3f} to {max(values):.3f})")
    for theirs in ("pil-rgb", "tensor-grey"):
        for name in ("ours, cpu", "ours, gpu: the CPU's share"):
            print(f"{theirs} / {name}: {medians[theirs] / medians[name]:.2f}")


def per_image(images: list, ending: list) -> Callable[[int], None]:
    """A function that cuts the ten views of each image, one after the other, by torchvision's transforms."""

    def pipeline(size: int, scale: tuple[float, float], blur: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, CROPS.aspect, InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(CROPS.flip_probability),
                v2.RandomApply([v2.GaussianBlur(9, CROPS.blur_sigma)], p=blur),
                *ending,
            ]
        )

    first, second, local = CROPS.blur_probabilities
    pipelines = [
        pipeline(GLOBAL_SIZE, CROPS.global_scale, first),
        pipeline(GLOBAL_SIZE, CROPS.global_scale, second),
        *[pipeline(LOCAL_SIZE, CROPS.local_scale, local)] * CROPS.num_local,
    ]

    def run(_seed: int) -> None:
        views = [[cut(image) for cut in pipelines] for image in images]
        for kind in zip(*views, strict=True):
            torch.stack(kind)

    return run


def ours(slices: torch.Tensor, seed: int) -> None:
    """All views of a batch, as in training on a CPU."""
    build_views(
        slices,
        torch.zeros(2 * len(slices), 256, dtype=torch.bool),
        sizes=(GLOBAL_SIZE, LOCAL_SIZE),
        num_local=CROPS.num_local,
        global_scale=CROPS.global_scale,
        local_scale=CROPS.local_scale,
        aspect=CROPS.aspect,
        canvas_size=CROPS.canvas_size,
        flip_probability=CROPS.flip_probability,
        blur_probabilities=CROPS.blur_probabilities,
        blur_sigma=CROPS.blur_sigma,
        generator=torch.Generator().manual_seed(seed),
        device=torch.device("cpu"),
    )


def draws_alone(batch_size: int, seed: int) -> None:
    """The random numbers of a batch: all that the CPU does when its slices are on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    scales = [CROPS.global_scale] * 2 + [CROPS.local_scale] * CROPS.num_local
    for scale in scales:
        draw_crops(
            batch_size,
            canvas_size=CROPS.canvas_size,
            scale=scale,
            aspect=CROPS.aspect,
            flip_probability=CROPS.flip_probability,
            blur_probability=0.5,
            blur_sigma=CROPS.blur_sigma,
            generator=generator,
        )


if __name__ == "__main__":
    main()
