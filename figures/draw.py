"""Draw the README's pictures: python figures/draw.py runs/shapes-small [FOLDER] [DATA_DIR]

shapes.png        six scenes of the test split, as the run itself draws them
objects.png       Algorithms 1 and 2: one scene taken apart into its layers, and put together again
equivariance.png  Proposition 2.1: an object slides over the image and is found again
curves.png        losses and scores, as the run itself draws them
training.gif      the frames of the run, with a pause at the end
"""
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import ast_seg
import data

CPU = torch.device("cpu")

@torch.no_grad()
def draw_objects(model, image, path):
    """image: (3, h, w) in [0, 1]. Rows for the background, for each query, and for their sum."""
    h, w = image.shape[-2:]
    latents = model.encode(image[None])
    background = model.background(image[None])[:, :3]
    scene = model.render(latents, background)
    glimpses = model.glimpse_generator(latents.z_what[0])  # (K, 4, g, g)
    layers, masks = (x[0] for x in model.draw(latents, h, w))
    weights = scene.weights[0]
    K = len(masks)
    claimed = weights[1:].sum((1, 2))  # pixels of each query

    titles = ("input, attention", "glimpse o", "mask m", "layer L M", "weight w", "w L")
    figure, axes = plt.subplots(K + 2, 6, figsize=(8.6, 1.25 * (K + 2)))
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9, pad=3)

    def put(row, column, picture):
        data.show(axes[row, column], picture, axes[row, column].get_title())

    put(0, 0, image)
    put(0, 3, background[0])
    put(0, 4, weights[0].expand(3, h, w))
    put(0, 5, weights[0] * background[0])
    for k in range(K):
        put(k + 1, 0, latents.attention[0, k])
        put(k + 1, 1, glimpses[k, :3])
        put(k + 1, 2, glimpses[k, 3].expand(3, *glimpses.shape[-2:]))
        put(k + 1, 3, layers[k] * masks[k])
        put(k + 1, 4, weights[k + 1].expand(3, h, w))
        put(k + 1, 5, weights[k + 1] * layers[k])
        place = (latents.x[0, k].item(), latents.y[0, k].item())
        axes[k + 1, 0].add_patch(plt.Circle(place, 0.15, fill=False, color="orange", lw=1.5))
    put(K + 1, 5, scene.image[0])

    names = ["background", *(f"query {k + 1}\n{claimed[k]:.0f} pixels" for k in range(K)), "sum"]
    for axis, name in zip(axes[:, 0], names):
        axis.text(-0.08, 0.5, name, fontsize=9, ha="right", va="center", transform=axis.transAxes)
    figure.subplots_adjust(0.12, 0.005, 1, 1 - 0.25 / (1.25 * (K + 2)), 0.03, 0.03)
    figure.savefig(path, dpi=90)
    plt.close(figure)

@torch.no_grad()
def draw_equivariance(model, image, path):
    """The largest object of an image (3, h, w) slides over its background, drawn by the model
    itself, and is found by the soft-argmax of a convolution of its mask, and by the model."""
    latents = model.encode(image[None])
    background = model.background(image[None])[:, :3]  # (1, 3, h, w)
    k = model.render(latents, background).weights[0, 1:].sum((1, 2)).argmax().item()

    true = torch.linspace(-1, 1, 129)
    n = len(true)
    alone = [field[:, k:k + 1].expand(n, *field[:, k:k + 1].shape[1:]) for field in latents]
    moved = ast_seg.Latents(*alone)._replace(x=true[:, None], y=torch.zeros(n, 1))
    background = background.expand(n, -1, -1, -1)
    scene = model.render(moved, background)
    h, w = image.shape[-2:]

    # Pixel j has its centre at (2 j + 1) / w - 1 where the image reaches from -1 to 1.
    blurred = F.conv2d(scene.weights[:, 1:], torch.full((1, 1, 9, 9), 0.25), padding=4)
    convolved = (2 * ast_seg.soft_argmax(blurred)[:, 0, 0] + 1) / w - 1

    again = model.encode(scene.image)
    seen = model.render(again, background).weights[:, 1:].sum((2, 3)).argmax(1)
    found = again.x[torch.arange(n), seen]

    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot(true, (convolved - true) * w / 2, label="soft-argmax of a convolution")
    axis.plot(true, (found - true) * w / 2, label="the trained model")
    inverse_scale = moved.s[0, 0, 0].item()
    for edge in (-1, 1):
        axis.axvspan(edge, edge * (1 - 1 / inverse_scale), color="gray", alpha=0.2, lw=0)
    axis.axhline(0, color="black", lw=0.5)
    axis.set(xlabel="true position x (grey: the glimpse is cut by the border)", xlim=(-1, 1),
             ylabel="error in pixels")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)

def draw_gif(frames, path):
    """Half a second for each frame, four for the last."""
    small = [Image.open(frame).convert("RGB").reduce(2).quantize(64) for frame in frames]
    first, *rest = small
    durations = [500] * len(rest) + [4000]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)

def main(run, folder="figures", data_dir="datasets"):
    run = Path(run)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = ast_seg.load_model(run, CPU)
    config = model.config
    scenes = data.load(config.dataset, "test", data_dir, config.limit, config.size)
    image = torch.from_numpy(np.array(scenes.images[1])) / 255
    ast_seg.draw_segmentations(model, scenes, folder / f"{config.dataset}.png")
    draw_objects(model, image, folder / "objects.png")
    draw_equivariance(model, image, folder / "equivariance.png")
    shutil.copy(run / "curves.png", folder / "curves.png")
    draw_gif(sorted(run.glob("frames/*.png")), folder / "training.gif")

if __name__ == "__main__":
    main(*sys.argv[1:])
