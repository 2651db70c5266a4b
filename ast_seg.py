"""AST-Seg finds, segments and re-draws the objects of a scene without labels. Here is all of it.

    Bruno Sauvalle and Arnaud de La Fortelle: Unsupervised Multi-Object Segmentation
    Using Attention and Soft-argmax. WACV 2023; also on arXiv, with its supplement.

A Segformer makes features and K attention maps. The centre of mass of a map is an object's place,
the features under it say what is there; a transformer refines both. A generator draws the object,
a spatial transformer places it, an autoencoder draws the background; all compete for each pixel.

    python ast_seg.py                                             # coloured shapes, on a laptop
    python ast_seg.py --dataset clevr --data-dir DIR              # the paper's model, on one GPU
    python ast_seg.py --segment photos/ --model runs/clevr        # segment images of your own

Tables 1 to 3 are the supplement's, Table 4 is the paper's.
Shapes in comments: n images, K object queries, c channels, h x w pixels, h* x w* cells of a map.
"""
import argparse
import gc
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":  # Ctrl-C ends the program at once, which harms nothing at any time
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from huggingface_hub import PyTorchModelHubMixin
from matplotlib import pyplot as plt
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

import data

# --- Configuration: Table 1 of the supplement, the architecture, the run ------------------------
@dataclass
class Config:
    """Table 1 in its order, then the rest. Defaults are the paper's for CLEVR, but `precision`."""
    dataset: Literal[tuple(data.DATASETS)] = "clevr"  # what to train on
    # Table 1, background model pretraining (phase 1)
    background_batch_size: int = 128  # images in a step of phase 1
    background_lr: float = 2e-3  # learning rate of phase 1, a tenth after 80 percent of it ([38])
    background_steps: int = 2500  # steps of phase 1: 2500 for a fixed background, else 500000

    # Table 1, foreground model training (phases 2 and 3)
    batch_size: int = 64  # images in a step of phases 2 and 3
    lr: float = 4e-5  # learning rate of phases 2 and 3
    adam_beta1: float = 0.90  # Adam beta_1
    adam_beta2: float = 0.98  # Adam beta_2
    adam_epsilon: float = 1e-9  # Adam epsilon: tiny, as the first gradients are (see log_alpha_0)
    steps: int = 125_000  # steps of phases 2 and 3 together; their schedule scales with it
    phase2_steps: int = 30_000  # of these, steps of phase 2
    warmup_steps: int = 5000  # quadratic warm-up of the rate
    entropy_warmup_steps: int = 10_000  # N_pixel, quadratic warm-up of lambda_pixel (Eq. 22)
    log_alpha_0: float = 11.0  # log of alpha_0, the background's activation before training
    d_z_what: int = 32  # numbers in z_what, an object's appearance
    entropy_weight: float = 1e-2  # lambda_pixel, weight of the pixel entropy loss (Eq. 22)
    s_min: float = 1.3  # smallest inverse scale; above 1, so that no glimpse is the whole image
    s_max: float = 24.0  # largest inverse scale; beyond, a glimpse is too small for a gradient
    d_t: int = 256  # d_T, width of the transformer encoder
    heads: int = 8  # attention heads of its layers
    d_ff: int = 512  # width of its feed-forward layers
    layers: int = 6  # its layers; 0: the model without transformer (Table 4)

    # Sections 4 and 5
    size: Literal[64, 128] = 128  # side of the training images, in pixels
    slots: int = 10  # K, object queries: the largest number of objects in a scene
    anisotropic: bool = False  # a scale for each axis, (s_x, s_y), instead of one
    background: Literal["small", "simple", "complex"] = "simple"  # width of the background model
    generator: Literal["b3", "tiny", "unet", "unet-small", "unet-fine"] = "b3"  # of feature maps
    backbone: str = "nvidia/mit-b3"  # pretrained part of b3: a hub name, a folder, or random
    glimpse_size: Literal[0, 16, 32, 64] = 0  # side of the glimpses; 0: half the image's (Table 2)
    curriculum: Literal["ct", "bt", "frozen"] = "ct"  # phases 1-3; bt: 3 only; frozen: 1 and 2
    lr_drop_at: float = 0.9  # share of the steps after which the learning rate is a tenth
    linear_decay: bool = False  # or after which it falls in a straight line to 0; not the paper's
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 where a GPU has it
    window: int = 0  # local soft-argmax, over window x window cells (odd); 0: over all

    # What SMALL needs to learn in minutes; these defaults leave the paper's training as it is
    background_input: float = 255.0  # factor of what its encoder sees; beside 255 positions fade
    residual: bool = False  # let the transformer add to the triplets: it starts as the identity
    dropout: float = 0.1  # of the transformer; the paper names none, so PyTorch's default
    robustness_warmup: float = 0.0  # share of phase 1 over which its loss becomes robust
    sharpness: float = 1.0  # factor of the first attention logits; small, and the maps start flat
    mask_bias: float = 0.0  # of the mask's logits before training; below 0, masks start empty
    shift: int = 0  # move the training scenes by up to so many pixels, borders repeated
    shift_from: float = 0.0  # share of the steps of phases 2 and 3 after which they are moved

    # The run
    background_from: str = ""  # a run whose background model is taken as its phase 1 left it
    compile: bool = False  # compile feature maps and background: a minute's work, then faster
    seed: int = 0  # of the weights, the batches and the dropout
    limit: int = 0  # use at most so many scenes of each split; 0: all
    log_every: int = 50  # steps between two lines of log.jsonl
    validate_every: int = 2500  # steps between two checkpoints, scores and pictures on the way

    def __post_init__(self):
        if self.background_from:
            self.background_steps = 0
        if self.curriculum == "bt":
            self.background_steps = self.phase2_steps = 0
        if self.curriculum == "frozen" or self.phase2_steps > self.steps:
            self.phase2_steps = self.steps

        least = dict(  # 0 for all other numbers; batch norm needs 2 images
            batch_size=2, background_batch_size=1, steps=1, slots=1, d_z_what=1, d_t=1, d_ff=1,
            heads=1, s_min=1, log_every=1, validate_every=1, log_alpha_0=-1e6, mask_bias=-1e6,
            adam_epsilon=1e-30)
        below = dict(  # a label map's byte holds 0 for the background and 255 queries
            adam_beta1=1, adam_beta2=1, dropout=1, slots=256)
        for name, value in asdict(self).items():
            low = least.get(name, 0)
            high = below.get(name, 1e12)
            if not isinstance(value, str) and not low <= value < high:
                flag = name.replace("_", "-")
                raise data.UserError(f"--{flag} must be {low} or more, and less than {high:g}.")
        if self.window and self.window % 2 == 0:
            raise data.UserError("--window must be odd, so that the peak is in its middle.")
        if self.s_max <= self.s_min:
            raise data.UserError("--s-max must be larger than --s-min.")
        if self.d_t % self.heads:
            raise data.UserError("--d-t must be a multiple of --heads.")

SMALL = dict(  # What a laptop does otherwise, and why: --small, and the default for shapes
    size=64, batch_size=16, background_batch_size=16,  # more steps beat larger ones, in equal time
    d_t=128, d_ff=256, layers=2, glimpse_size=16,  # enough for few objects in 64 x 64 pixels
    generator="unet-small",  # cheaper than a Segformer, and better without a pretrained backbone
    background="small", background_steps=900,  # enough for plain backdrops
    background_lr=3e-4,  # with twice that it stayed grey, too, from some starts
    background_input=1.0,  # with 255 ARI-FG was 2 and 4 points lower (two seeds)
    robustness_warmup=1.5,  # robust early, so small a model may stay a constant grey
    lr=7e-4, warmup_steps=175, steps=3300, phase2_steps=2200,  # fewer steps, but larger
    lr_drop_at=0.4, linear_decay=True,  # outlines become sharp only as the rate falls
    validate_every=700,
    sharpness=3.0,  # a query whose first map is flat finds an object last, when all are taken
    log_alpha_0=4.0, s_max=8.0,  # visible sooner, and no first glimpses of 5 pixels
    entropy_weight=5e-2, entropy_warmup_steps=2450,  # more, but later: early, queries fall asleep
    residual=True,  # at such rates a random transformer sends all queries to one place
    dropout=0.0)  # it shakes positions, which so short a training does not average out

SMALL_FOR = {"shapes": dict(s_min=3.0)}  # glimpses of at most 21 pixels; larger ones give halos
SMALL_FOR["clevr"] = SMALL_FOR["clevr6"] = dict(  # objects may be five pixels wide, and overlap
    generator="unet-fine", glimpse_size=32,  # cells of two pixels, not of four
    s_max=5.0,  # first glimpses of 20 pixels; with an s_min of 2 one seed cut large objects
    mask_bias=-3.0,  # masks grow where it pays; with 0 (s up to 14) one of two starts kept halos
    shift=2, shift_from=0.3,  # a thousand scenes are few, but enough to find objects
    sharpness=1.0,  # with 5.0 no query slept, but both seeds learned more slowly
    batch_size=32, lr=6e-4, entropy_weight=2e-2,  # with 3e-2 (s from 2 on) larger masks
    background_steps=3600,  # after 1200 larger ones some starts knew the mean backdrop alone
    steps=18_000, warmup_steps=720, entropy_warmup_steps=16_000,  # as SMALL, entropy later
    phase2_steps=18_000)  # no phase 3, where so small a background learned dark spots

def preset(dataset: str = "shapes", small: bool = False, steps: int = 0) -> Config:
    """The settings of a dataset as in the paper, or SMALL; with `steps`, their schedule scales."""
    known = data.DATASETS[dataset]
    config = Config(dataset, size=known.size, slots=known.slots, anisotropic=known.anisotropic,
                    background=known.background)
    if known.background != "simple":  # a background that varies takes longer to learn (5.1)
        config.background_steps = 500_000
    if small:
        config = replace(config, **SMALL | SMALL_FOR.get(dataset, {}))
    if known.background == "simple":  # it never varies, and must not learn the objects (phase 1)
        config.robustness_warmup = 0.0
    if steps > 0:
        # `steps` itself comes last, since the others are divided by it.
        for name in ("phase2_steps", "warmup_steps", "entropy_warmup_steps", "steps"):
            setattr(config, name, math.ceil(getattr(config, name) * steps / config.steps))
    return config

# --- 2. Motivation for using attention maps and soft-argmax for object localization -------------
# A translation by (u, v) moves an image phi, and a point of the plane:
#     T_uv(phi)(i, j) = phi(i - u, j - v)    and    T'_uv(i, j) = (i + u, j + v)    Eq. (1)
#
# When its input moves, the map that a layer L makes should move, as that of a convolution does,
# and so should the position that a localizer M makes:
#     L(T_uv phi) = T_uv L(phi)                                                     Eq. (2)
#     M(T_uv phi) = T'_uv M(phi)                                                    Eq. (3)
#
# No M does so for a constant map, which stays the same when it moves. So take maps that sum to 1,
# and let M be affine on them: M(sum_i a_i phi_i) = sum_i a_i M(phi_i) if the a_i sum to 1.
#
# Proposition 2.1. An affine M with Eq. 3 has the form, for some constant C,
#     M(phi) = C + sum_p phi(p) p                                                   Eq. (4)
#
# Proof. Let delta be the map with a 1 at the origin. Each map is a mixture of shifted deltas, with
# weights phi(q) that sum to 1, so M may be applied to each of them, where Eq. 3 adds q:
#     phi = sum_q phi(q) delta(. - q)                                               Eq. (5)
#     M(phi) = M(sum_q phi(q) delta(. - q))                                         Eq. (6)
#            = sum_q phi(q) M(delta(. - q)) = sum_q phi(q) (M(delta) + q)           Eq. (7)
#            = (sum_q phi(q)) M(delta) + sum_q phi(q) q                             Eq. (8)
#            = M(delta) + sum_q phi(q) q                                            Eq. (9)
#
# This is Eq. 4 with C = M(delta). So take the centre of mass of a map that sums to 1 to locate an
# object. A softmax makes any map A sum to 1, and the two together are the soft-argmax:
#     soft-argmax(A) = sum_p softmax(A)(p) p                                        Eq. (10)

def affine_localizer(phi: Tensor, C=0.0) -> Tensor:
    """The only equivariant and affine way to locate, but for C. phi: (..., h, w), of sum 1 each.
    Returns (..., 2): (x, y) in pixels, x along columns, y along rows, (0, 0) the first pixel."""
    h, w = phi.shape[-2:]
    x = phi.sum(-2) @ torch.arange(w, dtype=phi.dtype, device=phi.device)
    y = phi.sum(-1) @ torch.arange(h, dtype=phi.dtype, device=phi.device)
    return C + torch.stack([x, y], -1)  # Eq. (4)

def spatial_softmax(logits: Tensor) -> Tensor:
    """(..., h, w) of any range -> (..., h, w), positive and summing to 1 over the last two."""
    return logits.flatten(-2).softmax(-1).view_as(logits)  # Eq. (11)

def soft_argmax(logits: Tensor) -> Tensor:
    """(..., h, w) of any range -> (..., 2), pixels: a differentiable estimate of the arg-max."""
    return affine_localizer(spatial_softmax(logits))  # Eq. (10)

# --- 4.1 Model architecture: feature maps, attention maps, refinement (Algorithm 1) -------------
SEGFORMERS = {
    "b3": dict(depths=[3, 4, 18, 3], hidden_sizes=[64, 128, 320, 512],
               num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=768),
    "tiny": dict(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128],  # ours, for laptops
                 num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=64)}

def autocast(precision: str, images: Tensor):
    """The context in which convolutions and products are computed in bfloat16, or are not."""
    native = images.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = native if precision == "auto" else precision == "bfloat16"
    return torch.autocast(images.device.type, torch.bfloat16, enabled=enabled)

def exactly(layer: nn.Module, x: Tensor) -> Tensor:
    """A last layer without autocast: bfloat16 would round logits of 8 to 16 to 0.06."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))

class Segformer(nn.Module):
    """Images (n, 3, h, w) in [0, 1] -> maps of a quarter of the side, (n, channels, h/4, w/4)."""
    def __init__(self, name, channels):
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation  # a slow import
        config = SegformerConfig(**SEGFORMERS[name], num_labels=channels)
        self.net = SegformerForSemanticSegmentation(config)

    def load_backbone(self, source: str):
        """Take the backbone from a hub name or a folder; the decoder stays random (5.1)."""
        backbone = self.net.segformer
        with data.usable(f"The backbone {source}", "check its name, or use --backbone random"):
            pretrained, info = type(backbone).from_pretrained(source, output_loading_info=True)
            assert not info["missing_keys"], "it lacks Segformer weights"
            backbone.load_state_dict(pretrained.state_dict())

    def forward(self, images):
        # No ImageNet normalisation, as the authors. Levels: 1/4, 1/8, 1/16, 1/32 of the side.
        levels = self.net.segformer(images, output_hidden_states=True).hidden_states
        projections, fuse, norm, relu, dropout, classifier = self.net.decode_head.children()

        # The library projects each level to d channels, enlarges it and fuses all. That is linear:
        # one product per level, before it is enlarged, does the same with a twentieth of the work.
        maps = 0
        fusings = reversed(fuse.weight.flatten(1).chunk(4, 1))  # (d, d) for each level
        for level, projection, fusing in zip(levels, projections, fusings):
            weight = (fusing @ projection.proj.weight)[..., None, None]
            fused = F.conv2d(level, weight, fusing @ projection.proj.bias)
            maps = maps + F.interpolate(fused, levels[0].shape[2:], mode="bilinear")
        return exactly(classifier, dropout(relu(norm(maps))))

def coordinates(h: int, w: int, like: Tensor) -> Tensor:
    """Normalised coordinates of h x w cells, (2, h, w): x over columns, y over rows."""
    x = torch.linspace(-1, 1, w, device=like.device, dtype=like.dtype)  # Eq. (12)
    y = torch.linspace(-1, 1, h, device=like.device, dtype=like.dtype)  # Eq. (13)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))

def attend(attention: Tensor, features: Tensor) -> Tensor:
    """What and where each query sees. attention: (n, K, h*, w*), maps that sum to 1. features:
    Phi, (n, d, h*, w*). Returns triplets (phi_k^0, x_k^0, y_k^0) as one tensor, (n, K, d + 2)."""
    xy = coordinates(*features.shape[-2:], features).expand(len(features), -1, -1, -1)
    values = torch.cat([features, xy], 1)  # (n, d + 2, h*, w*)
    # Each map is a softmax, so the average of the coordinates *is* the soft-argmax of Eq. 10, in
    # half images from the middle. The features are averaged by the same weights.
    return torch.einsum("nkhw,ndhw->nkd", attention, values)  # (n, K, d + 2), Eq. (14, 15, 16)

class Refinement(nn.Module):
    """Transformer encoder over triplets (n, K, d). They are a set, so no code of an order."""
    def __init__(self, d, config):
        super().__init__()
        self.embed = nn.Linear(d, config.d_t)
        layer = nn.TransformerEncoderLayer(config.d_t, config.heads, config.d_ff, config.dropout,
                                           batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.project = nn.Linear(config.d_t, d)
        self.residual = config.residual
        if self.residual:  # it starts as the identity
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, triplets):
        refined = self.project(self.encoder(self.embed(triplets)))
        return triplets + refined if self.residual else refined

class Latents(NamedTuple):
    """The output of Algorithm 1: K objects in each of n images."""
    x: Tensor  # (n, K) in [-1, 1], over columns
    y: Tensor  # (n, K) in [-1, 1], over rows
    s: Tensor  # (n, K, 1 or 2) in [s_min, s_max], inverse scale: a glimpse is 1/s of the image
    log_alpha: Tensor  # (n, K), log of the activation: how strongly it claims its pixels
    z_what: Tensor  # (n, K, d_z_what), its appearance
    attention: Tensor  # (n, K, h*, w*), maps that sum to 1

# --- 4.1 Model architecture: glimpses, spatial transformer, compositing (Algorithm 2) -----------
def norm_celu(c):  # Table 2: one group for each 16 channels, at least one
    return nn.Sequential(nn.GroupNorm(max(1, c // 16), c), nn.CELU(inplace=True))

class GlimpseGenerator(nn.Sequential):
    """z_what (m, d), m = n K -> glimpses (m, 4, size, size) in [0, 1]: colours o_k, mask m_k."""
    def __init__(self, d, size):
        # Table 2: 1x1 -> 2x2 with c channels; each doubling halves c. Ours: 16x16 as 64x64.
        c = {16: 128, 32: 64, 64: 128}[size]
        layers = [nn.Unflatten(1, (d, 1, 1)), nn.ConvTranspose2d(d, c, 2, 2, bias=False)]
        for _ in range(int(math.log2(size)) - 2):  # 2x2 -> 4x4 -> 8x8 ...
            layers += [norm_celu(c), nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)]
            c = c // 2
        layers += [norm_celu(c), nn.ConvTranspose2d(c, 4, 4, 2, 1)]  # ... -> size x size
        super().__init__(*layers, nn.Sigmoid())

def bilinear(centre: Tensor, s: Tensor, pixels: int, cells: int) -> Tensor:
    """(m, pixels, cells): how much each cell of a glimpse counts in each pixel, along one axis."""
    # With the centre at 0.5 and s = 4, the pixel at 0.5 shows the point 4 * (0.5 - 0.5) = 0 of the
    # glimpse, its middle, and that at 0.75 shows 1, its border. So it is 1/4 of the image wide.
    # Eq. 12 puts -1 and 1 at the centres of a map's outer cells. Here they are the borders, of
    # image and glimpse, half a cell further out, as with the authors.
    pixel = torch.linspace(1 / pixels - 1, 1 - 1 / pixels, pixels, dtype=s.dtype, device=s.device)
    point = s[:, None] * (pixel - centre[:, None])  # (m, pixels)
    cell = ((point + 1) * cells - 1) / 2  # 0 is the centre of the first cell
    distance = (cell[..., None] - torch.arange(cells, device=s.device)).abs()
    return (1 - distance).relu()  # no other than the two next cells counts

def spatial_transformer(glimpses: Tensor, x: Tensor, y: Tensor, s: Tensor, h: int, w: int):
    """STN [24]: glimpses (m, c, g, g) -> (m, c, h, w), each at (x, y), 1/s times as large as the
    image, zeros around it. x, y: (m,) in [-1, 1]. s: (m, 1), or (m, 2) for (s_x, s_y)."""
    # Nothing turns, so rows and columns are apart. F.grid_sample does the same; for glimpses of
    # 16 x 16 on a CPU it takes twice the time.
    rows = bilinear(y, s[:, -1], h, glimpses.shape[2])
    columns = bilinear(x, s[:, 0], w, glimpses.shape[3])
    return torch.einsum("mhi,mcij,mwj->mchw", rows, glimpses, columns)

def layer_weights(masks: Tensor, log_alpha: Tensor, log_alpha_0: Tensor) -> Tensor:
    """How layers share each pixel: w_k = alpha_k M_k / sum_i alpha_i M_i, where M_0 = 1. masks:
    (n, K, h, w) in [0, 1]. log_alpha: (n, K). Returns (n, K + 1, h, w); 0 is the background."""
    # This is the softmax of log alpha_k + log M_k, which no alpha can overflow. Where M_k is 0 the
    # logit is -inf, and log 1 is computed instead: the gradient of log 0, even times 0, is NaN.
    inside = masks > 0
    logits = log_alpha[..., None, None] + masks.where(inside, 1.0).log()
    background_logit = log_alpha_0.expand(len(masks), 1, *masks.shape[-2:])
    logits = torch.cat([background_logit, logits.where(inside, -math.inf)], 1)
    return logits.softmax(1)  # Eq. (17)

class Scene(NamedTuple):
    """The output of Algorithm 2."""
    image: Tensor  # (n, 3, h, w), the reconstruction X_hat
    weights: Tensor  # (n, K + 1, h, w), w_k, summing to 1 over the layers; 0 is the background
    layers: Tensor  # (n, K, 3, h, w), L_k of the objects

# --- 4.1 Model architecture: the background model of reference [38] -----------------------------
BACKGROUNDS = {  # (kind, side): encoder, generator, image to code; the authors', not [38]'s
    ("simple", 64): ((3, 64, 160, 320, 160, 32, 16), (4, 144, 256, 512, 256, 32, 16)),
    ("simple", 128): ((3, 64, 160, 320, 160, 160, 32, 16), (4, 144, 256, 512, 256, 256, 32, 16)),
    ("complex", 64): ((3, 64, 160, 320, 160, 16, 16), (4, 144, 640, 1280, 640, 16, 16)),
    ("complex", 128): ((3, 64, 320, 640, 640, 320, 16, 16), (4, 144, 640, 1280, 640, 320, 16, 16)),
    ("small", 64): ((3, 8, 16, 32, 32, 32, 16), (4, 8, 16, 32, 32, 32, 16)),  # ours, for laptops
    ("small", 128): ((3, 8, 16, 32, 32, 32, 32, 16), (4, 8, 16, 32, 32, 32, 32, 16))}

class BackgroundBlock(nn.Sequential):
    """Convolve a map, its cells' positions in [-1/2, 1/2] appended; a lone cell's are 1 ([38])."""
    def forward(self, x):
        h, w = x.shape[-2:]
        position = coordinates(h, w, x)[None] / 2 if h > 1 else x.new_ones(1, 2, 1, 1)
        conv, activation = self
        # A convolution of both is the sum of one of each; that of positions serves all the batch.
        weights = conv.weight.split([x.shape[1], 2], 0 if conv.transposed else 1)
        x = torch.func.functional_call(conv, {"weight": weights[0]}, x)
        return activation(x + torch.func.functional_call(conv, {"weight": weights[1]}, position))

class Background(nn.Sequential):
    """Autoencoder: images (n, 3, size, size) -> (n, 4, size, size) in [0, 1], the background
    without objects and the error expected in it. Its code, 16 numbers, has no room for objects."""
    def __init__(self, config):
        e, g = BACKGROUNDS[config.background, config.size]
        encoder, generator = nn.Sequential(), nn.Sequential()
        # Kernel, stride, padding and output padding: 128 -> 64 -> ... -> 4, then 4 -> 2 and 2 -> 1
        geometry = [(5, 2, 2, 1)] * (len(e) - 3) + [(4, 2, 1, 0), (2, 1, 0, 0)]
        for i, (kernel, stride, padding, extra) in enumerate(geometry):
            down = nn.Conv2d(e[i] + 2, e[i + 1], kernel, stride, padding, bias=False)
            up = nn.ConvTranspose2d(g[i + 1] + 2, g[i], kernel, stride, padding, extra, bias=False)
            encoder.append(BackgroundBlock(down, norm_celu(e[i + 1])))
            generator.insert(0, BackgroundBlock(up, norm_celu(g[i]) if i else nn.Sigmoid()))
        super().__init__(encoder, generator)
        self.config = config

    def forward(self, images):
        encoder, generator = self
        with autocast(self.config.precision, images):
            code = encoder(self.config.background_input * images)
            return exactly(generator[-1], generator[:-1](code))

# --- 4.1 Model architecture: the whole model (Fig. 1) -------------------------------------------
class ASTSeg(nn.Module, PyTorchModelHubMixin, library_name="ast-seg"):
    """One batch of CLEVR on its way from pixels to the loss, K = 10 and d_phi = 1 + 1 + 32 = 34:

        images      (64, 3, 128, 128)       in [0, 1]
        maps        (64, 10 + 34, 32, 32)   attention logits A_k, and features Phi
        attention   (64, 10, 32, 32)        each map sums to 1                          Eq. 11
        triplets    (64, 10, 34 + 2)        (phi_k^0, x_k^0, y_k^0), then refined       Eq. 14-16
        latents     (64, 10) each           x, y, log_alpha; s: 1, z_what: 32 numbers   Algorithm 1
        glimpses    (640, 4, 64, 64)        colours o_k and mask m_k of each object     Table 2
        layers      (64, 10, 3, 128, 128)   L_k, and masks M_k, (64, 10, 128, 128)
        weights     (64, 11, 128, 128)      w_k, which sum to 1 in each pixel           Eq. 17
        image       (64, 3, 128, 128)       the reconstruction                          Eq. 18
        loss        ()                                                                  Eq. 19-22

    `save_pretrained(folder)` writes a model, `from_pretrained(folder or hub name)` reads it."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.d_s = 2 if config.anisotropic else 1
        d_phi = self.d_s + 1 + config.d_z_what  # (s_k, alpha_k, z_k^what)
        network = UNet if config.generator in UNETS else Segformer  # UNet: section 5.2, below
        self.feature_maps = network(config.generator, config.slots + d_phi)
        *_, classifier = self.feature_maps.modules()  # its first K rows: the attention logits
        classifier.weight.data[:config.slots] *= config.sharpness
        self.refine = Refinement(d_phi + 2, config) if config.layers else nn.Identity()
        glimpse_size = config.glimpse_size or config.size // 2
        self.glimpse_generator = GlimpseGenerator(config.d_z_what, glimpse_size)
        self.glimpse_generator[-2].bias.data[3] += config.mask_bias  # channel 3: the mask
        self.background = Background(config)

        # At first alpha_0 = e^11 dwarfs each alpha_k, so w_k is about alpha_k M_k / alpha_0, which
        # no other query changes: each follows its own small gradient (Adam makes it large again),
        # and finds where and what to draw before it appears and has to compete.
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(config.log_alpha_0)))
        self.to(memory_format=torch.channels_last)  # small U-Nets take 0.85 of the time on a CPU

    def encode(self, images: Tensor) -> Latents:
        """Algorithm 1. images: (n, 3, h, w) in [0, 1], RGB; the authors read CLEVR's as BGR."""
        config = self.config
        with autocast(config.precision, images):
            maps = self.feature_maps(images)
        # maps: (n, K + d_phi, h*, w*), float32 again; a soft-argmax needs all its digits
        logits, features = maps.split([config.slots, maps.shape[1] - config.slots], 1)

        attention = spatial_softmax(logits)  # Eq. (11)
        if config.window:
            attention = local_softmax(logits, config.window)
        triplets = self.refine(attend(attention, features))  # (n, K, d_phi + 2)

        s, log_alpha, z_what, xy = triplets.split([self.d_s, 1, config.d_z_what, 2], -1)
        s = config.s_min + (config.s_max - config.s_min) * s.sigmoid()
        x, y = xy.clamp(-1, 1).unbind(-1)
        return Latents(x, y, s, log_alpha.squeeze(-1), z_what, attention)

    def draw(self, latents: Latents, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The objects in place: L_k (n, K, 3, h, w) and M_k (n, K, h, w), both in [0, 1]."""
        glimpses = self.glimpse_generator(latents.z_what.flatten(0, 1))  # (n K, 4, g, g)
        x, y, s = latents.x.flatten(), latents.y.flatten(), latents.s.flatten(0, 1)
        placed = spatial_transformer(glimpses, x, y, s, h, w).unflatten(0, latents.x.shape)
        layers, masks = placed.split([3, 1], 2)  # two slices' gradients would be mostly zeros
        return layers, masks.squeeze(2)

    def render(self, latents: Latents, background: Tensor) -> Scene:
        """Algorithm 2. background: (n, 3, h, w), the layer L_0."""
        layers, masks = self.draw(latents, *background.shape[-2:])
        weights = layer_weights(masks, latents.log_alpha, self.log_alpha_0)
        # Eq. (18), L_0 apart; an einsum is slower on a CPU.
        image = weights[:, :1] * background + (weights[:, 1:, None] * layers).sum(1)
        return Scene(image, weights, layers)

    def forward(self, images: Tensor) -> Scene:
        """images: (n, 3, size, size) in [0, 1]."""
        return self.render(self.encode(images), self.background(images)[:, :3])

    def _save_pretrained(self, folder: Path):
        """What `save_pretrained` calls: the file of weights is replaced once another is whole."""
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        part = folder / "model.safetensors.part"
        part.write_bytes(safetensors.torch.save(weights))
        part.replace(folder / "model.safetensors")

    @torch.no_grad()
    def segment(self, images: Tensor, h: int = 0, w: int = 0) -> Tensor:
        """images (n, 3, size, size) -> labels (n, h or size, w or size): layers of most weight."""
        size = self.config.size
        dtype = self.log_alpha_0.dtype
        if images.shape[1:] != (3, size, size) or images.dtype != dtype:
            raise ValueError(f"images must be {dtype} (n, 3, {size}, {size}) in [0, 1], "
                             f"not {images.dtype} {tuple(images.shape)}")
        latents = self.encode(images)
        _, masks = self.draw(latents, h or images.shape[2], w or images.shape[3])
        return layer_weights(masks, latents.log_alpha, self.log_alpha_0).argmax(1)

# --- 4.2.1 Loss function ------------------------------------------------------------------------
def background_loss(output: Tensor, image: Tensor, robustness: float = 1.0) -> Tensor:
    """Loss of [38]: what is badly rebuilt must be an object, and hardly counts. But at first all
    is, so `robustness`, there 1, may grow from 0. output: (n, 4, h, w), RGB and expected error."""
    beta = 3 / 255
    radius = image.shape[-1] // 75

    # Smooth-L1: the pull of an outlier is bounded, and within three grey levels it fades to 0.
    error = F.smooth_l1_loss(output[:, :3], image, beta=beta, reduction="none")
    error = error.sum(1, keepdim=True)  # (n, 1, h, w); the fourth output learns its channels' mean
    noise = F.smooth_l1_loss(output[:, 3:], error.detach() / 3, beta=beta, reduction="none")
    # tanh: a soft mask of the objects, 0 where the error is small and 1 where it is large.
    mask = (error.detach() / 0.25).tanh()
    # Blur (not at 64 pixels): single pixels of an object may have the background's colour.
    mask = F.avg_pool2d(mask, 2 * radius + 1, 1, radius, count_include_pad=False)
    # exp: weights from 1 for the background down to e^-6 = 0.0025 for objects.
    weight = (-6 * robustness * mask).exp()
    return (weight * (error + robustness * noise)).mean()

def pixel_entropy_loss(weights: Tensor) -> Tensor:
    """Mean over pixels of the squared entropy of w, (n, K + 1, h, w): 0 where one layer takes all.
    Squared, since there the entropy has an infinite slope, but its square has slope 0."""
    return (weights * (weights + 1e-20).log()).sum(1).square().mean()  # Eq. (21)

def warmup(step: float, steps: float) -> float:
    """Quadratic warm-up, from 0 at step 0 to 1 from `steps` on."""
    return min(1.0, step / steps) ** 2 if steps else 1.0

def training_loss(model: ASTSeg, images: Tensor, phase: int, t: int) -> tuple[Tensor, dict]:
    """The loss of step t of a run, and its parts by name. images: (n, 3, h, w) in [0, 1]."""
    config = model.config
    if phase == 1:
        robustness = warmup(t, config.robustness_warmup * config.background_steps)
        loss = background_loss(model.background(images), images, robustness)
        return loss, {"background": loss}

    scene = model(images)
    local_error = (scene.image - images).abs().sum(1)  # (n, h, w), Eq. (19)
    reconstruction = local_error.square().mean()  # Eq. (20)
    entropy = pixel_entropy_loss(scene.weights)
    step = t - config.background_steps  # the paper counts from the start of phase 2
    weight = warmup(step, config.entropy_warmup_steps) * config.entropy_weight
    losses = {"reconstruction": reconstruction, "entropy": entropy}
    return reconstruction + weight * entropy, losses  # Eq. (22)

# --- 4.2.2 Curriculum training ------------------------------------------------------------------
def phase_bounds(config: Config) -> dict:
    """By phase: its first step, and the first one after it. Steps count through all of a run."""
    end_1 = config.background_steps
    end_2 = end_1 + config.phase2_steps
    return {1: (0, end_1), 2: (end_1, end_2), 3: (end_2, end_1 + config.steps)}

def learning_rate(config: Config, phase: int, t: int) -> float:
    """The rate of step t of a run (5.1)."""
    if phase == 1:
        return config.background_lr * (0.1 if t >= 0.8 * config.background_steps else 1.0)

    # Phases 2 and 3 have one schedule: a quadratic warm-up, then constant, at the end a tenth.
    step = t - config.background_steps
    rate = config.lr * warmup(step, config.warmup_steps)
    drop = config.lr_drop_at * config.steps
    if step < drop:
        return rate
    return rate * ((config.steps - step) / (config.steps - drop) if config.linear_decay else 0.1)

def make_optimizer(model: ASTSeg, phase: int) -> torch.optim.Adam:
    """A new Adam, its moments 0, over what learns in a phase."""
    if phase == 1:
        return torch.optim.Adam(model.background.parameters(), fused=True)  # 0.9, 0.999 ([38])
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (model.config.adam_beta1, model.config.adam_beta2)
    return torch.optim.Adam(learning, betas=betas, eps=model.config.adam_epsilon, fused=True)

RANK = int(os.environ.get("RANK", 0))  # torchrun starts WORLD processes and numbers them;
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # each takes an equal share of every batch
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

def average_gradients(gradients: list):
    """Over all processes. DistributedDataParallel needs `forward`, which phase 1 does not call."""
    total = torch.cat([gradient.flatten() for gradient in gradients])
    with data.usable("Another process of this run", "see its message; the same command goes on"):
        torch.distributed.all_reduce(total)
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient) / WORLD)

def train(config: Config, folder: Path, data_dir: str, device: torch.device):
    """Train in three phases, or go on where the run in `folder` stopped, to the same weights: all
    that is random depends on (seed, step), but for the order of sums in some gradients on GPUs."""
    saved = data.load_checkpoint(folder, asdict(config))
    if saved["t"] == config.background_steps + config.steps:
        if RANK == 0:
            print(f"{folder} is trained already, and only scored here")
        return
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.seed)
    model = ASTSeg(config).to(device)
    if saved["t"]:
        model.load_state_dict(saved["model"])
    elif config.generator == "b3" and config.backbone != "random":
        model.feature_maps.load_backbone(config.backbone)
    if config.background_from and not saved["t"]:
        file = Path(config.background_from, "background.pt")
        with data.usable(file, "give a run past phase 1, of the same --background and --size"):
            model.background.load_state_dict(torch.load(file, device, weights_only=True))
    if config.dataset == "folder" and Path(data_dir).resolve() in folder.resolve().parents:
        raise data.UserError("--out lies within --data-dir, among the images; choose another one.")
    # The test scenes, too, so that what is damaged fails now.
    _, val_scenes, scenes = data.load_splits(config.dataset, data_dir, config.limit, config.size)
    if config.dataset == "folder" and saved.setdefault("files", scenes.source) != scenes.source:
        raise data.UserError(f"{folder} is a run on other images; choose another --out.")
    if config.compile:  # after a first call, in which the library of b3 prepares itself
        model.eval().segment(torch.zeros(1, 3, config.size, config.size, device=device))
        model.feature_maps.compile()
        model.background.compile()
    if WORLD > 1:
        torch.distributed.init_process_group()  # all have read the checkpoint when it returns
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if RANK == 0:  # it alone writes and shows; where the disk refuses, fail now, not after hours
        data.save_checkpoint(folder, saved, model)
        print(f"Training on {len(scenes.images)} scenes of {config.dataset}, on {device} with "
              f"{torch.get_num_threads()} threads, into {folder}. End it at any time; the same "
              "command goes on from the last checkpoint.", flush=True)
    began = time.time() - saved["seconds"]  # as if there had been no interruption
    last_good = saved["t"] - 1  # the last step that was not skipped
    shift_from = config.background_steps + config.shift_from * config.steps

    for phase, (first, last) in phase_bounds(config).items():
        start = max(first, saved["t"])
        if start >= last:
            continue

        # Phase 1 trains the background, 2 all else, 3 both.
        model.train()
        model.background.requires_grad_(phase != 2)  # frozen in phase 2
        optimizer = make_optimizer(model, phase)
        if start > first:
            optimizer.load_state_dict(saved["optimizer"])
        batch_size = config.background_batch_size if phase == 1 else config.batch_size
        batches = data.batches(scenes, batch_size, config.seed, start, last, device,
                               slice(RANK, None, WORLD), config.shift, shift_from)
        bar = tqdm(batches, f"phase {phase}", last - first, initial=start - first, unit="step",
                   disable=RANK > 0)

        for t, images in enumerate(bar, start):
            torch.manual_seed((config.seed * 1_000_003 + t) * WORLD + RANK)  # for the dropout
            rate = learning_rate(config, phase, t)
            optimizer.param_groups[0]["lr"] = rate

            buffers = [buffer.clone() for buffer in model.buffers()]
            model.zero_grad()  # now, or old gradients take memory beside the activations
            loss, losses = training_loss(model, images / 255, phase, t)
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if WORLD > 1:
                average_gradients(gradients)

            # If the loss is not finite, this norm is not either, and Adam's moments would be
            # spoilt for good. Such a step leaves no trace.
            if torch.nn.utils.get_total_norm(gradients).isfinite():
                optimizer.step()
                last_good = t
            else:
                for buffer, before in zip(model.buffers(), buffers):
                    buffer.copy_(before)
                saved["skipped"] += 1
            if t - last_good == 10:
                raise data.UserError(f"Ten steps in a row, up to {t}, were not finite. The last "
                                     "checkpoint is good; start anew with a smaller --lr.")

            done = t + 1
            save = done % config.validate_every == 0 or done == last
            if RANK > 0 or not (save or done % config.log_every == 0):
                continue

            line = {"t": done, "phase": phase, "lr": rate, "skipped": saved["skipped"],
                    "seconds": time.time() - began}
            for name, value in losses.items():
                line[name] = value.item() if value.isfinite() else None  # JSON has no NaN
            if save:
                scores = evaluate(model, val_scenes, device)
                line |= {name: values.mean().item() for name, values in scores.items()}
            saved["log"].append(line)
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix({k: line[k] for k in (*losses, "mIoU", "ARI-FG") if k in line})
            if save:
                frame = folder / f"frames/{done:07}.png"
                draw_segmentations(model, val_scenes, frame, f"phase {phase}, step {done}")
                data.draw_curves(phase_bounds(config), saved["log"], folder / "curves.png")
                gc.collect()  # figures are cycles, and would pile up
                if phase == 1 and done == last:
                    data.save(model.background.state_dict(), folder / "background.pt")
                saved |= {"t": done, "seconds": line["seconds"], "model": model.state_dict(),
                          "optimizer": optimizer.state_dict()}
                data.save_checkpoint(folder, saved, model)
                model.train()

# --- 5. Experimental results: metrics -----------------------------------------------------------
def contingency(pred: Tensor, true: Tensor, labels: int) -> Tensor:
    """Labels (n, h, w) -> pixels of each [image, pred, true], (n, m, m), where m >= labels."""
    m = max(labels, int(true.max()) + 1)
    image = torch.arange(len(pred), device=pred.device)[:, None, None]
    pairs = (image * m + pred.long()) * m + true.long()  # (n, h, w)
    counts = pairs.flatten().bincount(minlength=len(pred) * m * m)
    return counts.view(-1, m, m).cpu().double()

def pairwise_iou(table: Tensor) -> Tensor:
    """(n, m, m): intersection over union of each predicted with each true segment, or 0."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp_min(1)

def mean_iou(table: Tensor) -> Tensor:
    """mIoU [29]: segments, the background's and empty ones too, are matched one to one for the
    largest sum of IoUs, divided by the number of pairs that are not both empty."""
    scores = []
    for counts, ious in zip(table, pairwise_iou(table)):
        # Where IoUs are 0, several matchings are best; [29] takes scipy's for the transpose.
        true, pred = linear_sum_assignment(ious.T, maximize=True)
        pairs = (counts.sum(0)[true] + counts.sum(1)[pred] > 0).sum()
        scores.append(ious[pred, true].sum() / pairs)
    return torch.stack(scores)

def adjusted_rand_index(table: Tensor) -> Tensor:
    """ARI-FG: do both join the same pairs of objects' pixels? 1 if always, 0 as if by chance."""
    def pairs(count):
        return (count * (count - 1) / 2).flatten(1).sum(1)
    table = table[:, :, 1:]  # without the true background
    both, in_pred, in_true = pairs(table), pairs(table.sum(2)), pairs(table.sum(1))
    by_chance = in_pred * in_true / pairs(table.sum((1, 2))[:, None]).clamp_min(1)
    most = (in_pred + in_true) / 2
    return torch.where(most == by_chance, 1.0, (both - by_chance) / (most - by_chance))

def segmentation_covering(table: Tensor) -> Tensor:
    """MSC-FG [16]: each true object's largest IoU with any predicted segment, on average."""
    objects = table.sum(1)[:, 1:] > 0  # (n, m - 1)
    best = pairwise_iou(table)[:, :, 1:].amax(1)
    return (best * objects).sum(1) / objects.sum(1).clamp_min(1)

def foreground_iou(table: Tensor) -> Tensor:
    """Not in this paper: IoU of the unions of all objects (DRC, its section E), 1 if none."""
    union = table.sum((1, 2)) - table[:, 0, 0]
    return torch.where(union == 0, 1.0, table[:, 1:, 1:].sum((1, 2)) / union.clamp_min(1))

METRICS = {  # of a contingency table (n, m, m): (n,), in [0, 1] but for ARI-FG
    "mIoU": mean_iou, "ARI-FG": adjusted_rand_index, "MSC-FG": segmentation_covering,
    "IoU": foreground_iou, "Dice": lambda table: 2 / (1 + 1 / foreground_iou(table))}

@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(model: ASTSeg, scenes: data.Scenes, device: torch.device) -> dict:
    """Scores of each scene, (N,) by metric, in percent; the MSE sums pixels and channels [29]."""
    model.eval()
    metrics = METRICS if scenes.labels.any() else {}  # 0 throughout: unknown
    scores = {name: [] for name in (*metrics, "MSE")}
    for i in tqdm(range(0, len(scenes.images), 64), "evaluation", leave=False, unit="batch"):
        images = torch.tensor(scenes.images[i:i + 64], device=device) / 255
        true = torch.tensor(scenes.labels[i:i + 64], device=device)
        scene = model(images)
        table = contingency(scene.weights.argmax(1), true, model.config.slots + 1)
        for name, metric in metrics.items():
            scores[name].append(100 * metric(table))
        scores["MSE"].append((scene.image - images).square().flatten(1).sum(1).cpu().double())
    return {name: torch.cat(values).numpy() for name, values in scores.items()}

# --- 5.2 Ablation study -------------------------------------------------------------------------
# The rows of Table 4 as flags, for CLEVR:
#     no transformer encoder     --layers 0           no pixel entropy loss     --entropy-weight 0
#     K = maximum + 1, or x 2    --slots 11, 20       frozen background model   --curriculum frozen
#     U-Net for Segformer        --generator unet     anisotropic scaling       --anisotropic
#     random backbone            --backbone random    baseline training         --curriculum bt
UNETS = {  # widths, first convolution to centre; its (kernel, stride); what lies beyond borders
    "unet": ((80, 128, 192, 256, 256, 256), (3, 1), nn.ZeroPad2d),  # Table 3; d_Phi: our K + d_phi
    # Ours. Zeros beyond the border tell convolutions where they are, against Eq. 2, and queries
    # may then settle at places instead of following objects; a border's own values do not.
    "unet-small": ((32, 32, 48, 64, 64), (8, 4), nn.ReplicationPad2d),
    "unet-fine": ((16, 32, 32, 48, 64, 64), (4, 2), nn.ReplicationPad2d)}

def conv_block(c, c_out, kernel, stride, pad, conv=nn.Conv2d, cut=0):
    """pad: what lies around a map. cut: cells that a transposed convolution removes again."""
    return nn.Sequential(pad((kernel - stride) // 2),
                         conv(c, c_out, kernel, stride, cut, bias=False),
                         nn.BatchNorm2d(c_out), nn.CELU(inplace=True))

class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)

class UNet(nn.Module):
    """Table 3. Images (n, 3, h, w) in [0, 1] -> (n, channels, h, w); small: h/4, fine: h/2."""
    def __init__(self, name, channels):
        super().__init__()
        widths, first, pad = UNETS[name]
        self.first = conv_block(3, widths[0], *first, pad)
        pairs = list(zip(widths, widths[1:]))
        self.down = nn.ModuleList(nn.Sequential(
            conv_block(c, d, 4, 2, pad), Residual(conv_block(d, d, 3, 1, pad))) for c, d in pairs)
        self.centre = conv_block(widths[-1], widths[-1], 3, 1, pad)
        self.up = nn.ModuleList(nn.Sequential(
            Residual(conv_block(2 * d, 2 * d, 3, 1, pad)),
            conv_block(2 * d, c, 4, 2, pad, nn.ConvTranspose2d, 3)) for c, d in reversed(pairs))
        self.last = nn.Sequential(conv_block(2 * widths[0], channels, 3, 1, pad),
                                  Residual(pad(1), nn.Conv2d(channels, channels, 3)))
        self.classifier = nn.Conv2d(channels, channels, 1)  # the authors: no bias here and above

    def forward(self, images):
        x = self.first(images)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        x = torch.cat([self.centre(x), x], 1)
        for up in self.up:
            x = torch.cat([up(x), skips.pop()], 1)
        return exactly(self.classifier, self.last(x))

def local_softmax(logits: Tensor, window: int) -> Tensor:
    """Not in this paper: softmax over window x window cells around the peak (keypoint prototypes).
    It locates equivariantly, but not affinely: of the mean of two maps it may see one peak."""
    h, w = logits.shape[-2:]
    peak = logits.flatten(-2).argmax(-1)[..., None]  # (..., 1)
    rows = (torch.arange(h, device=logits.device) - peak // w).abs() <= window // 2  # (..., h)
    columns = (torch.arange(w, device=logits.device) - peak % w).abs() <= window // 2  # (..., w)
    return spatial_softmax(logits.where(rows[..., None] & columns[..., None, :], -math.inf))

# --- The picture of a run -----------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def draw_segmentations(model: ASTSeg, scenes: data.Scenes, path: Path, title="input"):
    """Six scenes. Segments have the colours of the true objects with which mIoU matches them."""
    images = torch.tensor(scenes.images[:6], device=model.log_alpha_0.device) / 255
    true = torch.tensor(scenes.labels[:6])
    latents = model.eval().encode(images)
    background = model.background(images)[:, :3]
    scene = model.render(latents, background)
    pred = scene.weights.argmax(1).cpu()
    attention = latents.attention / latents.attention.amax((2, 3), keepdim=True)
    places = torch.stack([latents.x, latents.y]).cpu()
    ious = pairwise_iou(contingency(pred, true, scene.weights.shape[1]))
    ious[:, 0, 0] = 2  # the background stays black
    figure, axes = plt.subplots(len(images), 6, figsize=(7.8, 8), squeeze=False)
    for i, row in enumerate(axes):
        colours = data.PALETTE[linear_sum_assignment(ious[i], maximize=True)[1]]
        seen = pred[i][pred[i] > 0].unique() - 1  # the queries that have pixels
        columns = {title: images[i], "attention": attention[i, seen].sum(0),
                   "segments": colours[pred[i]], "output": scene.image[i],
                   "background": background[i], "truth": data.PALETTE[true[i]]}
        for axis, (name, picture) in zip(row, columns.items()):
            data.show(axis, picture, "" if i else name)
        row[1].scatter(*places[:, i, seen], 120, facecolors="none", edgecolors=colours[seen + 1])
    figure.subplots_adjust(0, 0, 1, 0.97, 0.03, 0.03)
    figure.savefig(path)
    plt.close(figure)

# --- The command --------------------------------------------------------------------------------
@dataclass
class Options:
    """Train on a dataset, then score the model. After an interruption the same command goes on."""
    config: tyro.conf.OmitArgPrefixes[Config]
    small: bool = False  # a laptop's settings (SMALL), as for shapes
    data_dir: str = "datasets"  # where the files are, or are downloaded to
    out: str = ""  # folder of the run (default: runs/DATASET, or with -small), or of segments
    device: str = DEVICE  # where to compute: cpu, cuda, cuda:1
    eval: bool = False  # only score the run, or each --model
    model: list[str] = field(default_factory=list)  # folders of runs, or hub names, to score
    split: Literal[data.SPLITS] = "test"  # what to score on
    segment: list[str] | None = None  # images, or folders of them, to segment

def parse(arguments) -> tuple[Options, str | None]:
    """The options, and --dataset if given. Three flags choose the defaults of all the others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=data.DATASETS)
    first.add_argument("--small", action=argparse.BooleanOptionalAction)
    first.add_argument("--steps", type=int, default=0)
    given, _ = first.parse_known_args(arguments)
    dataset = given.dataset or "shapes"
    small = dataset == "shapes" if given.small is None else given.small
    default = Options(preset(dataset, small, given.steps), small)
    return tyro.cli(Options, args=arguments, default=default), given.dataset

def load_model(source: str | Path, device: torch.device) -> ASTSeg:
    """The model of a run, of a folder of its own, or of a hub name, in evaluation mode."""
    folder = Path(source)
    local = len(folder.parts) != 2 or folder.parts[0] == "runs" or folder.parent.exists()
    trainer = data.trainer(folder)
    if trainer:
        print(f"{trainer} trains in {source}; this is the model that it saved last")
    with data.usable(f"The model {source}", "train one, or give a run's folder or a hub name"):
        checkpoint = folder / "checkpoint.pt"
        here = checkpoint.exists() or (folder / "config.json").exists()
        assert here or not local, "there is none"
        try:
            model = ASTSeg.from_pretrained(source, strict=True)
        except Exception:  # a damaged model, or none yet: a run's checkpoint has it, too
            if not checkpoint.exists():
                raise
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            assert "model" in saved, "its training has saved none yet"
            model = ASTSeg(Config(**saved["config"]))
            model.load_state_dict(saved["model"])
            if not trainer:
                with suppress(OSError):  # mend it, where that is possible
                    model.save_pretrained(folder)
    return model.to(device).eval()

def score(sources: list, dataset: str | None, options: Options, device: torch.device):
    """Score models, leave numbers and pictures in their folders, and print the mean scores."""
    means = {}
    failures = []
    for source in sources:
        try:
            model = load_model(source, device)
        except data.UserError as error:
            failures.append(str(error))
            continue
        dataset = dataset or model.config.dataset
        limit = options.config.limit
        scenes = data.load(dataset, options.split, options.data_dir, limit, model.config.size)
        files = f"{dataset}-{options.split}-{len(scenes.images)}{scenes.source}"
        run = Path(source if Path(source).is_dir() else f"runs/{source}")
        # What --eval finds does not replace what the run itself has found.
        folder = run / (f"eval-{files}" if options.eval or options.model else files)
        print(f"Scoring {source} on {device}; numbers and pictures in {folder}", flush=True)
        scores = evaluate(model, scenes, device)
        means[source] = {name: values.mean().item() for name, values in scores.items()}
        folder.mkdir(parents=True, exist_ok=True)
        results = {**means[source], "scenes": files, "torch": torch.__version__,
                   "config": asdict(model.config)}
        (folder / "results.json").write_text(json.dumps(results))
        np.savez(folder / "scores.npz", **scores)
        draw_segmentations(model, scenes, folder / "segmentations.png")
    if means:
        data.print_scores(dataset, means)
    if failures:
        raise data.UserError(" ".join(failures))

def main(arguments=None) -> int:
    """Returns the exit code: 0, 1 for what was done in part, 2 for what cannot be done."""
    try:
        options, dataset = parse(arguments)
        with data.usable(f"--device {options.device}", "choose another one"):
            number = torch.zeros(1, device=options.device)
            number.item()  # the device "meta" has none
            device = number.device
        run = f"runs/{options.config.dataset}" + options.small * "-small"
        if options.segment is not None:
            if not options.segment or options.eval or len(options.model) > 1:
                raise data.UserError("--segment takes images, one --model and no --eval.")
            model = load_model((options.model or [run])[0], device)
            out = Path(options.out or "segments")
            failures = data.segment_files(options.segment, out, model, device)
            for sentence in failures:
                print(f"ast_seg.py: {sentence}", file=sys.stderr)
            return 1 if failures else 0
        run = options.out or run
        if not options.eval and not options.model:
            with data.claim(Path(run)) if RANK == 0 else nullcontext():
                train(options.config, Path(run), options.data_dir, device)
        if RANK == 0:  # one of several processes scores
            score(options.model or [run], dataset, options, device)
        return 0
    except (data.UserError, OSError) as error:  # OSError: a full disk, a folder that is gone
        advice = "; mend that, and the same command goes on." if isinstance(error, OSError) else ""
        print(f"ast_seg.py: {error}{advice}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
