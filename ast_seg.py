"""AST-Seg: unsupervised multi-object segmentation using Attention and Soft-argmax, in one file.

Sauvalle and de La Fortelle, "Unsupervised multi-object segmentation using attention and soft-argmax". The
sections below follow the paper; read them side by side. In one breath: a Segformer turns the image into
features and K attention maps (4.1); each map's centre of mass is an object's position, the features under it
say what is there; a transformer refines both; a generator draws each object and a spatial transformer puts it
in place (Algorithm 2); an autoencoder draws the background; all layers compete for every pixel.

    python ast_seg.py                                        # coloured shapes, on a laptop, in minutes
    python ast_seg.py --dataset clevr --data-dir DIR         # the paper's model on CLEVR, on one GPU
    python ast_seg.py --dataset clevr --data-dir DIR --eval  # only score and draw what was trained

Shapes in comments: n images, K object queries, c channels, h x w pixels, h* x w* cells of a feature map.
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from matplotlib import colors, pyplot as plt
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import data


# --- Settings: Table 1 of the supplement, the architecture, the run -------------------------------
class SettingsError(ValueError):
    """Settings, or a run's folder, that cannot work; the message says what to do, in one sentence."""


def setting(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Settings:
    """Table 1 of the supplement, in its order, then the rest. Fields are flags; defaults are the paper's."""
    dataset: str = setting("clevr", "what to train on", tuple(data.DATASETS))
    # Table 1, background model pretraining (phase 1)
    background_batch_size: int = setting(128, "images per step in phase 1")
    background_lr: float = setting(2e-3, "learning rate in phase 1, divided by 10 after 80%% of its steps")
    background_steps: int = setting(2500, "steps of phase 1: 2500 for a fixed background, else 500000")
    # Table 1, foreground model training (phases 2 and 3)
    batch_size: int = setting(64, "images per step in phases 2 and 3")
    lr: float = setting(4e-5, "learning rate in phases 2 and 3")
    adam_beta1: float = setting(0.90, "Adam beta_1")
    adam_beta2: float = setting(0.98, "Adam beta_2")
    adam_epsilon: float = setting(1e-9, "Adam epsilon: tiny, as the first gradients are (see log_alpha_0)")
    steps: int = setting(125_000, "steps of phases 2 and 3 together; the schedules below scale with it")
    decay_at: float = setting(0.9, "share of these steps after which the rate is divided by 10 (section 5.1)")
    phase2_steps: int = setting(30_000, "of these, steps of phase 2 (frozen background)")
    warmup_steps: int = setting(5000, "quadratic warm-up of the learning rate")
    entropy_warmup_steps: int = setting(10_000, "N_pixel, quadratic warm-up of lambda_pixel (Eq. 22)")
    log_alpha_0: float = setting(11.0, "log of alpha_0, the background's activation, before training")
    d_z_what: int = setting(32, "numbers in z_what, an object's appearance")
    entropy_weight: float = setting(1e-2, "lambda_pixel, weight of the pixel entropy loss (Eq. 22)")
    s_min: float = setting(1.3, "minimum inverse scale: above 1, no glimpse is the whole image")
    s_max: float = setting(24.0, "maximum inverse scale: the smallest glimpse still has a gradient")
    d_t: int = setting(256, "d_T, width of the transformer encoder")
    heads: int = setting(8, "heads of a transformer layer")
    d_ff: int = setting(512, "width of its feed-forward part")
    layers: int = setting(6, "layers of the transformer encoder; 0: the model without transformer (Table 4)")
    # Sections 4 and 5, what depends on the dataset
    size: int = setting(128, "side of the training images, in pixels")
    slots: int = setting(10, "K, object queries: the maximum number of objects in a scene")
    anisotropic: bool = setting(False, "a scale for each axis, (s_x, s_y), instead of one")
    background: str = setting("simple", "width of the background model", ("small", "simple", "complex"))
    curriculum: str = setting("ct", "ct: three phases; bt: phase 3 from scratch (baseline training); frozen: "
                                    "phase 2 to the end", ("ct", "bt", "frozen"))
    generator: str = setting("b3", "feature map generator: a Segformer size, or a U-Net",
                             ("tiny", "b0", "b3", "unet", "unet-small"))
    backbone: str = setting("auto", "pretrained Segformer backbone: hub name or folder; auto: "
                                    "nvidia/mit-b3 for b3 and so on; random: none")
    # What lets a small model learn in minutes; off in the paper's settings
    glimpse_size: int = setting(0, "side of a glimpse; 0: as in Table 2", (0, 4, 8, 16, 32, 64, 128))
    glimpse_channels: int = setting(0, "channels of its first layer; 0: twice that", (0, 32, 64, 128, 256))
    identity_init: bool = setting(False, "let the transformer start as the identity")
    refine_lr: float = setting(0.0, "learning rate of the transformer; 0: that of the rest")
    refine_warmup_steps: int = setting(0, "its own warm-up; 0: that of the rest")
    finetune_lr: float = setting(0.0, "learning rate of the background model in phase 3; 0: that of the rest")
    switch_warmup_steps: int = setting(0, "second warm-up of all rates, at the switch to phase 3; 0: none")
    robust_warmup_steps: int = setting(0, "quadratic warm-up of the robustness of phase 1's loss; 0: none")
    # The run
    seed: int = setting(0, "seed of the weights, the batches and the dropout")
    precision: str = setting("auto", "of the feature maps; auto: bfloat16 (ours) on a GPU, else float32",
                             ("auto", "float32", "bfloat16"))
    limit: int = setting(0, "use at most so many scenes of each split; 0: all")
    log_every: int = setting(50, "steps between two lines of log.jsonl")
    validate_every: int = setting(2500, "steps between two scores on 256 scenes of the validation split")
    checkpoint_every: int = setting(1000, "steps between two checkpoints")


# The laptop's settings, measured on two CPU cores; the README says why under "The small model".
SHAPES = dict(
    size=64, slots=6, generator="unet-small", background="small", glimpse_size=16, glimpse_channels=64,
    background_steps=800, background_batch_size=32, background_lr=5e-4, robust_warmup_steps=720,
    steps=3600, phase2_steps=2250, batch_size=32, lr=1e-3, warmup_steps=200, decay_at=0.75,
    entropy_weight=5e-2, entropy_warmup_steps=2700, log_alpha_0=4.0, s_max=8.0,
    d_t=128, d_ff=256, layers=3, identity_init=True, refine_lr=1e-4, refine_warmup_steps=1500,
    finetune_lr=3e-4, switch_warmup_steps=100, validate_every=300, checkpoint_every=300)


def make_settings(dataset="shapes", **given):
    """The settings of a dataset, with the `given` ones on top. Where only the number of steps is given, the
    warm-ups and phase 2 keep their share of it. Raises SettingsError for settings that cannot work."""
    d = data.DATASETS[dataset]
    usual = Settings(dataset, **(SHAPES if dataset == "shapes" else dict(
        size=d.size, slots=d.slots, anisotropic=d.anisotropic, background=d.background,
        background_steps=d.background_steps)))
    s = dataclasses.replace(usual, **given)
    for name, of in (("phase2_steps", "steps"), ("warmup_steps", "steps"), ("entropy_warmup_steps", "steps"),
                     ("refine_warmup_steps", "steps"), ("switch_warmup_steps", "steps"),
                     ("robust_warmup_steps", "background_steps")):
        if name not in given:
            setattr(s, name, math.ceil(getattr(usual, name) * getattr(s, of) / max(1, getattr(usual, of))))
    if s.curriculum == "bt":
        s.background_steps = s.phase2_steps = 0
    s.phase2_steps = s.steps if s.curriculum == "frozen" else min(s.phase2_steps, s.steps)
    at_least_1 = ("background_batch_size", "steps", "d_z_what", "d_t", "heads", "d_ff", "slots", "log_every",
                  "validate_every", "checkpoint_every")
    for f in dataclasses.fields(s):
        value, flag = getattr(s, f.name), "--" + f.name.replace("_", "-")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise SettingsError(f"{flag} must be one of {str(f.metadata['choices'])[1:-1]}, not {value}.")
        least = -math.inf if f.name == "log_alpha_0" else int(f.name in at_least_1)
        if f.type in (int, float) and not (math.isfinite(value) and value >= least):
            raise SettingsError(f"{flag} must be a number of at least {least}, not {value}.")
    if s.size not in (64, 128, 192) or s.batch_size < 2:  # six halvings, [38] below 200; batch norm
        raise SettingsError(f"--size must be 64, 128 or 192, not {s.size}, and --batch-size at least 2.")
    if s.d_t % s.heads or (s.identity_init and s.d_t < s.d_z_what + 7):
        raise SettingsError(f"--d-t must be a multiple of --heads and well above --d-z-what, not {s.d_t}.")
    if not 1 <= s.s_min < s.s_max:
        raise SettingsError(f"--s-min must be at least 1 and less than --s-max, not {s.s_min}.")
    return s


# --- 2. Motivation: attention maps and soft-argmax are what equivariance asks for -----------------
def affine_localizer(phi, C=0.0):
    """The one way to locate that is equivariant and affine: sum a_i phi_i -> sum a_i M(phi_i) if sum a_i = 1.

    Let T shift an image: T_uv(phi)(i, j) = phi(i - u, j - v) (Eq. 1). A layer L should shift its map along
    with the image, L(T phi) = T L(phi) (Eq. 2), and convolutions do just that. But a position is no map. It
    lives in the plane, where T' shifts points: T'_uv(i, j) = (i + u, j + v). So of a localizer M we ask that
    M(T phi) = T' M(phi) (Eq. 3). On maps that sum to 1, every affine M that does so is, with a constant C,

        M(phi) = C + sum_p phi(p) p    (Eq. 4, Proposition 2.1)

    The proof: phi is a mixture of shifted points, phi = sum_q phi(q) delta(. - q) (Eq. 5), M of it the same
    mixture (Eq. 6) of M(delta) + q (Eq. 7); the phi(q) sum to 1, and C = M(delta) is left (Eq. 8, 9).
    This is why the rest of the model makes maps that sum to 1 and takes their centres of mass.

    phi: (..., h, w), summing to 1 over the last two; C: a number or (2,). Returns (..., 2): (x, y) in pixels,
    x along columns, y along rows, (0, 0) the first pixel.
    """
    h, w = phi.shape[-2:]
    x = phi.sum(-2) @ torch.arange(w, dtype=phi.dtype, device=phi.device)
    y = phi.sum(-1) @ torch.arange(h, dtype=phi.dtype, device=phi.device)
    return C + torch.stack([x, y], -1)  # Eq. (4)


def spatial_softmax(logits):
    """(..., h, w), any range -> (..., h, w), positive and summing to 1 over the last two (Eq. 11)."""
    return logits.flatten(-2).softmax(-1).view_as(logits)


def soft_argmax(logits):
    """The differentiable arg-max: a softmax makes the map sum to 1, then Eq. 4 with C = 0 locates it.

    logits: (..., h, w), any range. Returns (..., 2): (x, y) in pixels, x along columns, y along rows.
    """
    return affine_localizer(spatial_softmax(logits))  # Eq. (10)


# --- 4.1 Model architecture: feature maps and attention maps --------------------------------------
SEGFORMERS = {  # depths, widths and heads of the four stages, width of the decoder
    "tiny": ((1, 1, 1, 1), (16, 32, 64, 128), (1, 2, 4, 8), 64),  # ours, for laptops
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), (1, 2, 5, 8), 256),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), (1, 2, 5, 8), 768)}
UNETS = {  # widths from the first convolution to the centre, stride of the first convolution
    "unet": ((80, 128, 192, 256, 256, 256), 1),  # Table 3; what it calls d_Phi is K + d_phi here
    "unet-small": ((32, 48, 64, 64, 64), 4)}  # ours, for laptops


class Segformer(nn.Module):
    """Images (n, 3, h, w) -> `channels` maps of a quarter of the resolution, (n, channels, h/4, w/4)."""

    def __init__(self, name, channels):
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation  # a slow import
        depths, widths, heads, decoder = SEGFORMERS[name]
        self.net = SegformerForSemanticSegmentation(SegformerConfig(
            depths=list(depths), hidden_sizes=list(widths), num_attention_heads=list(heads),
            decoder_hidden_size=decoder, num_labels=channels))

    def load_backbone(self, source):
        """Take the hierarchical backbone from a hub name or folder; the decoder stays random (section 5.1).
        Raises SettingsError where there is none, or one of another size."""
        from transformers import SegformerModel
        try:
            pretrained, info = SegformerModel.from_pretrained(source, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError("it lacks Segformer weights")
            self.net.segformer.load_state_dict(pretrained.state_dict())
        except Exception as e:  # the library has many ways to refuse a missing, damaged or foreign folder
            raise SettingsError(f"Cannot load backbone {source} ({repr(e).splitlines()[0]}); check "
                                "its name and --generator, or use --backbone random.") from e

    def forward(self, images):
        return self.net(images).logits


def conv_block(c, c_out, kernel, stride, padding, conv=nn.Conv2d):
    conv = conv(c, c_out, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.CELU())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class UNet(nn.Module):
    """The other generator, of the ablation study (Table 3). Images (n, 3, h, w) -> (n, channels, h/stride,
    w/stride), for Table 3 at full resolution. Each level halves the map once more."""

    def __init__(self, name, channels):
        super().__init__()
        widths, stride = UNETS[name]
        kernel, padding = (3, 1) if stride == 1 else (2 * stride, stride // 2)
        self.first = conv_block(3, widths[0], kernel, stride, padding)
        self.down, self.up, below = nn.ModuleList(), nn.ModuleList(), widths[-1]
        for c, wider in zip(widths, widths[1:]):
            self.down.append(nn.Sequential(conv_block(c, wider, 4, 2, 1),
                                           Residual(conv_block(wider, wider, 3, 1, 1))))
        self.center = conv_block(below, below, 3, 1, 1)
        for skip, out in zip(widths[:0:-1], widths[-2::-1]):  # from the level below, and across from `down`
            c = below + skip
            self.up.append(nn.Sequential(Residual(conv_block(c, c, 3, 1, 1)),
                                         conv_block(c, out, 4, 2, 1, nn.ConvTranspose2d)))
            below = out
        self.last = nn.Sequential(conv_block(2 * widths[0], channels, 3, 1, 1),
                                  Residual(nn.Conv2d(channels, channels, 3, 1, 1)),
                                  nn.Conv2d(channels, channels, 1))

    def forward(self, images):
        skips = [self.first(images)]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = self.center(skips[-1])
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1))
        return self.last(torch.cat([x, skips.pop()], 1))


def coordinates(h, w, like):
    """Normalised coordinates of h x w cells, (2, h, w): x over columns, y over rows, from -1 to +1."""
    x = torch.linspace(-1, 1, w, device=like.device, dtype=like.dtype)  # Eq. (12)
    y = torch.linspace(-1, 1, h, device=like.device, dtype=like.dtype)  # Eq. (13)
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)])


def attend(attention, features):
    """What and where each query sees: features and coordinates, averaged with its attention map as weights.

    attention: (n, K, h*, w*), maps that sum to 1; features Phi: (n, d, h*, w*). Returns the (phi_k^0, x_k^0,
    y_k^0) as one tensor (n, K, d + 2). As one einsum, the n x K x d x h* x w* products are never in memory.
    """
    xy = coordinates(*features.shape[-2:], features).expand(len(features), -1, -1, -1)
    values = torch.cat([features, xy], 1)  # (n, d + 2, h*, w*)
    return torch.einsum("nkhw,ndhw->nkd", attention, values)  # Eq. (14, 15, 16)


class Refinement(nn.Module):
    """Transformer encoder over the K triplets, (n, K, d) -> (n, K, d): settles redundancies and occlusions.
    There is no positional encoding: queries have no order, permuting them permutes what comes out."""

    def __init__(self, d, s):
        super().__init__()
        self.embed = nn.Linear(d, s.d_t)
        layer = nn.TransformerEncoderLayer(s.d_t, s.heads, s.d_ff, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, s.layers, enable_nested_tensor=False)
        self.project = nn.Linear(s.d_t, d)
        if s.identity_init:
            self.start_as_identity()

    def forward(self, triplets):
        return self.project(self.encoder(self.embed(triplets)))

    @torch.no_grad()
    def start_as_identity(self, length=30.0):
        """Ours; the paper takes 125 000 small steps instead. At large rates a random transformer moves the
        positions as constants, off the image, before attention maps learn to depend on it. As the identity it
        lets them learn first: the residual branches start at 0, and each token gets a long constant beside
        its d numbers, all of mean 0, so that every layer norm divides by the same length."""
        for layer in self.encoder.layers:
            for linear in (layer.self_attn.out_proj, layer.linear2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        d_t, d = self.embed.weight.shape
        random = torch.randn(d_t, d + 1)
        directions = torch.linalg.qr(random - random.mean(0))[0]  # (d_t, d + 1), orthonormal and of mean 0
        self.embed.weight.copy_(directions[:, :d])
        self.embed.bias.copy_(directions[:, d] * length)
        self.project.weight.copy_(directions[:, :d].T * length / d_t ** 0.5)
        self.project.bias.zero_()


class Latents(NamedTuple):
    """What Algorithm 1 finds: K objects in each of n images."""
    x: torch.Tensor  # (n, K) in [-1, 1], over columns
    y: torch.Tensor  # (n, K) in [-1, 1], over rows
    s: torch.Tensor  # (n, K, 1 | 2) in [s_min, s_max], inverse scale: a glimpse is 1 / s of the image wide
    log_alpha: torch.Tensor  # (n, K), log of the activation: how strongly the object claims its pixels
    z_what: torch.Tensor  # (n, K, d_z_what), its appearance
    attention: torch.Tensor  # (n, K, h*, w*), maps that sum to 1


# --- 4.1 Rendering: glimpses, spatial transformer, compositing (Algorithm 2) ----------------------
class GlimpseGenerator(nn.Sequential):
    """z_what (m, d) -> glimpses (m, 4, g, g) in [0, 1]: the object's colours o_k and mask m_k (Table 2)."""

    def __init__(self, d, size, channels):
        side, c = 2, channels
        layers = [nn.Unflatten(1, (d, 1, 1)), nn.ConvTranspose2d(d, c, 2, 2, bias=False)]  # 1 x 1 -> 2 x 2
        while side < size:
            side, last = 2 * side, 2 * side >= size
            layers += [nn.GroupNorm(max(1, c // 16), c), nn.CELU(),
                       nn.ConvTranspose2d(c, 4 if last else c // 2, 4, 2, 1, bias=last)]
            c //= 2
        super().__init__(*layers, nn.Sigmoid())


def spatial_transformer(glimpses, x, y, s, h, w):
    """STN: put each glimpse at (x, y), 1/s times as large as the image, and zero around it.

    glimpses: (m, c, g, g); x, y: (m,) in [-1, 1]; s: (m, 1 | 2), inverse scales s or (s_x, s_y). Returns
    (m, c, h, w). The pixel at p shows the glimpse's point s (p - position), hence `inverse` scale.
    """
    s_x, s_y, zero = s[:, 0], s[:, -1], torch.zeros_like(x)
    theta = torch.stack([s_x, zero, -s_x * x, zero, s_y, -s_y * y], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(glimpses), glimpses.shape[1], h, w), align_corners=False)
    return F.grid_sample(glimpses, grid, align_corners=False)  # -1, 1: the image's edges, as the authors do


def layer_weights(masks, log_alpha, log_alpha_0):
    """The distribution of each pixel over the layers, w_k = alpha_k M_k / sum_i alpha_i M_i with M_0 = 1.

    masks: (n, K, h, w) in [0, 1]; log_alpha: (n, K); log_alpha_0: scalar. Returns (n, K + 1, h, w), index 0
    the background. It is the softmax of log alpha_k + log M_k, which no alpha can overflow.
    """
    inside = masks > 0
    log_masks = torch.where(inside, masks, 1.0).log()  # log 0 must not even meet the gradient
    logits = torch.where(inside, log_alpha[..., None, None] + log_masks, -math.inf)
    background = log_alpha_0.expand(len(masks), 1, *masks.shape[-2:])
    return torch.cat([background, logits], 1).softmax(1)  # Eq. (17)


class Scene(NamedTuple):
    """What Algorithm 2 draws. Layer 0 is the background."""
    image: torch.Tensor  # (n, 3, h, w), the reconstruction X_hat
    weights: torch.Tensor  # (n, K + 1, h, w), w_k, summing to 1 over the layers
    layers: torch.Tensor  # (n, K + 1, 3, h, w), L_k


# --- 4.1 Background model: the autoencoder of reference [38] --------------------------------------
BACKGROUNDS = {  # (kind, blocks): channels of the encoder, and of the generator read from image to latent
    ("simple", 7): ((3, 64, 160, 320, 160, 160, 32, 16), (4, 144, 256, 512, 256, 256, 32, 16)),
    ("simple", 6): ((3, 64, 160, 320, 160, 32, 16), (4, 144, 256, 512, 256, 32, 16)),
    ("complex", 7): ((3, 64, 320, 640, 640, 320, 16, 16), (4, 144, 640, 1280, 640, 320, 16, 16)),
    ("complex", 6): ((3, 64, 160, 320, 160, 16, 16), (4, 144, 640, 1280, 640, 16, 16)),
    ("small", 7): ((3, 8, 32, 64, 64, 64, 64, 16), (4, 8, 32, 64, 64, 64, 64, 16)),  # ours, for laptops
    ("small", 6): ((3, 8, 32, 64, 64, 64, 16), (4, 8, 32, 64, 64, 64, 16))}


def background_blocks(size):
    """(kernel, stride, padding, remainder) of each block from an image of `size` < 200 pixels to 1 x 1."""
    blocks = []
    while size > 1:
        kernel, stride, padding = (5, 2, 2) if size > 5 else (4, 2, 1) if size > 3 else (size, 1, 0)
        smaller, remainder = divmod(size + 2 * padding - kernel, stride)
        blocks.append((kernel, stride, padding, remainder))
        size = smaller + 1
    return blocks


class BackgroundBlock(nn.Module):
    """Append each cell's position, convolve, normalise. Positions let 16 numbers draw a whole picture."""

    def __init__(self, conv, c, last=False):
        super().__init__()
        self.conv = conv
        self.norm = nn.Sigmoid() if last else nn.Sequential(nn.GroupNorm(max(1, c // 16), c), nn.CELU())

    def forward(self, x):
        h, w = x.shape[-2:]
        position = coordinates(h, w, x) / 2 if h > 1 else x.new_ones(2, 1, 1)
        return self.norm(self.conv(torch.cat([x, position.expand(len(x), -1, -1, -1)], 1)))


class Background(nn.Module):
    """Images (n, 3, size, size) -> (n, 4, size, size) in [0, 1]: the background without its objects, and the
    error the model expects of itself in each pixel. Encoder and generator mirror each other."""

    def __init__(self, kind, size):
        super().__init__()
        blocks = background_blocks(size)
        e, g = BACKGROUNDS[kind, len(blocks)]
        self.encoder, self.generator = nn.Sequential(), nn.Sequential()
        for i, (kernel, stride, padding, remainder) in enumerate(blocks):
            conv = nn.Conv2d(e[i] + 2, e[i + 1], kernel, stride, padding, bias=False)
            self.encoder.append(BackgroundBlock(conv, e[i + 1]))
            conv = nn.ConvTranspose2d(g[i + 1] + 2, g[i], kernel, stride, padding, remainder, bias=False)
            self.generator.insert(0, BackgroundBlock(conv, g[i], last=i == 0))

    def forward(self, images):
        return self.generator(self.encoder(images))


# --- 4.1 The whole model (Fig. 1, Algorithms 1 and 2) ---------------------------------------------
class ASTSeg(nn.Module, PyTorchModelHubMixin, library_name="ast-seg", tags=["object-centric-learning"]):
    """`save_pretrained(folder)` writes config.json and model.safetensors; `from_pretrained(folder or hub
    name)` reads them, without the pretrained backbone."""

    def __init__(self, settings: Settings):
        super().__init__()
        s = self.settings = settings
        self.d_s = 2 if s.anisotropic else 1
        d_phi = self.d_s + 1 + s.d_z_what  # (s_k, alpha_k, z_k^what); the authors' code reads alpha in z_what
        self.feature_maps = (UNet if s.generator in UNETS else Segformer)(s.generator, s.slots + d_phi)
        self.refine = Refinement(d_phi + 2, s) if s.layers else nn.Identity()
        glimpse = s.glimpse_size or (32 if s.size <= 64 else 64 if s.size <= 128 else 128)  # Table 2
        self.glimpse_generator = GlimpseGenerator(s.d_z_what, glimpse, s.glimpse_channels or 2 * glimpse)
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(s.log_alpha_0)))
        self.background = Background(s.background, s.size)

    def encode(self, images):
        """Algorithm 1. images: (n, 3, h, w) in [0, 1]. Returns Latents."""
        s = self.settings
        bfloat16 = images.is_cuda if s.precision == "auto" else s.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            maps = self.feature_maps(images)
        maps = maps.float()  # (n, K + d_phi, h*, w*); a soft-argmax needs all its digits
        attention = spatial_softmax(maps[:, :s.slots])  # Eq. (11)
        triplets = self.refine(attend(attention, maps[:, s.slots:]))  # (n, K, d_phi + 2)
        scale, log_alpha, z_what, xy = triplets.split([self.d_s, 1, s.d_z_what, 2], -1)
        x, y = xy.clamp(-1, 1).unbind(-1)
        scale = s.s_min + (s.s_max - s.s_min) * scale.sigmoid()
        return Latents(x, y, scale, log_alpha.squeeze(-1), z_what, attention)  # its exp: in Eq. 17

    def draw(self, latents, h, w):
        """The objects in place, before they compete: L_k (n, K, 3, h, w) and M_k (n, K, h, w) in [0, 1]."""
        glimpses = self.glimpse_generator(latents.z_what.flatten(0, 1))  # (n K, 4, g, g)
        x, y, s = (v.flatten(0, 1) for v in (latents.x, latents.y, latents.s))
        placed = spatial_transformer(glimpses, x, y, s, h, w).unflatten(0, latents.x.shape)
        return placed[:, :, :3], placed[:, :, 3]

    def render(self, latents, background):
        """Algorithm 2. background: (n, 3, h, w), the layer L_0. Returns a Scene."""
        layers, masks = self.draw(latents, *background.shape[-2:])
        weights = layer_weights(masks, latents.log_alpha, self.log_alpha_0)
        layers = torch.cat([background[:, None], layers], 1)
        image = (weights[:, :, None] * layers).sum(1)  # Eq. (18); an einsum costs twice as much on a CPU
        return Scene(image, weights, layers)

    def forward(self, images):
        """(n, 3, h, w) in [0, 1] -> Scene."""
        return self.render(self.encode(images), self.background(images)[:, :3])

    @torch.no_grad()
    def segment(self, images):
        """(n, 3, h, w) in [0, 1] -> (n, h, w) int64, the layer of the largest weight, 0 the background. The
        background model is not needed for it."""
        latents = self.encode(images)
        masks = self.draw(latents, *images.shape[-2:])[1]
        return layer_weights(masks, latents.log_alpha, self.log_alpha_0).argmax(1)


# --- 4.2.1 Losses ---------------------------------------------------------------------------------
def background_loss(output, image, robustness=1.0):
    """The robust loss of [38] for phase 1: where a picture is badly rebuilt there is an object, and it counts
    up to e^6 times less. output: (n, 4, h, w) of the background model; image: (n, 3, h, w) in [0, 1].

    robustness: 1 as in [38]. In a short run it grows from 0, a plain L1 loss: while everything is badly
    rebuilt, everything would count as an object, and nothing be learned. Returns a scalar.
    """
    beta, radius = 3 / 255, image.shape[-1] // 75
    error = F.smooth_l1_loss(output[:, :3], image, beta=beta, reduction="none").sum(1, keepdim=True)
    noise = F.smooth_l1_loss(output[:, 3:], error.detach() / 3, beta=beta, reduction="none")
    mask = (error.detach() / 0.25).tanh()  # about 1 on objects
    mask = F.avg_pool2d(mask, 2 * radius + 1, 1, radius, count_include_pad=False)
    return ((-6 * robustness * mask).exp() * (error + robustness * noise)).mean()


def reconstruction_loss(image_hat, image):
    """Mean over pixels of the square of a pixel's L1 error. Both (n, 3, h, w). Returns a scalar in [0, 9]."""
    local_error = (image_hat - image).abs().sum(1)  # Eq. (19)
    return local_error.square().mean()  # Eq. (20)


def pixel_entropy_loss(weights):
    """Mean over pixels of the squared entropy of the weights, (n, K + 1, h, w): 0 where one layer takes all;
    squared, so that the gradient stays finite there. Returns a scalar in [0, log(K + 1)^2]."""
    return (weights * (weights + 1e-20).log()).sum(1).square().mean()  # Eq. (21)


def warmup(step, steps):
    """Quadratic warm-up, from 0 at step 0 to 1 from `steps` on."""
    return min(1.0, step / steps) ** 2 if steps else 1.0


def training_loss(model, images, phase, step):
    """The loss of a step, and its parts by name. images: (n, 3, h, w) in [0, 1]."""
    s = model.settings
    if phase == 1:
        loss = background_loss(model.background(images), images, warmup(step, s.robust_warmup_steps))
        return loss, {"background": loss}
    with torch.set_grad_enabled(phase == 3 and torch.is_grad_enabled()):  # frozen in phase 2
        background = model.background(images)[:, :3]  # its error channel is of no more use
    scene = model.render(model.encode(images), background)
    reconstruction, entropy = reconstruction_loss(scene.image, images), pixel_entropy_loss(scene.weights)
    loss = reconstruction + warmup(step, s.entropy_warmup_steps) * s.entropy_weight * entropy  # Eq. (22)
    return loss, {"reconstruction": reconstruction, "entropy": entropy}


# --- 4.2.2 Curriculum training ---------------------------------------------------------------------
def phase_at(s, t):
    """(phase, step) of step t of a run. Phase 1 trains the background alone, 2 the objects before the frozen
    background, 3 both. Phase 1 counts its own steps, 2 and 3 count on together."""
    step = t - s.background_steps
    return (1, t) if step < 0 else (2, step) if step < s.phase2_steps else (3, step)


def learning_rate(s, phase, step, lr=0.0, warmup_steps=0):
    """Phase 1: constant, a tenth after 80 % of its steps. Phases 2 and 3, as one schedule: quadratic warm-up,
    constant, a tenth from 90 % on (`decay_at`). lr, warmup_steps: a parameter group's; 0: the settings'."""
    if phase == 1:
        return s.background_lr * (0.1 if step >= 0.8 * s.background_steps else 1)
    rate = (lr or s.lr) * warmup(step, warmup_steps or s.warmup_steps)
    rate *= warmup(step - s.phase2_steps, s.switch_warmup_steps) if phase == 3 else 1
    return rate * (0.1 if step >= s.decay_at * s.steps else 1)


def make_optimizer(model, phase):
    """A new Adam over what the phase trains; its moments start at zero, also at the switch to phase 3."""
    s = model.settings
    background, refine = list(model.background.parameters()), list(model.refine.parameters())
    if phase == 1:
        return torch.optim.Adam(background, betas=(0.9, 0.999), fused=True)  # as in [38]
    apart = {id(p) for p in background + refine}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in apart], rate=())]
    if refine:
        groups.append(dict(params=refine, rate=(s.refine_lr, s.refine_warmup_steps)))
    if phase == 3:
        groups.append(dict(params=background, rate=(s.finetune_lr,)))
    return torch.optim.Adam(groups, betas=(s.adam_beta1, s.adam_beta2), eps=s.adam_epsilon, fused=True)


def train(model, train_scenes, val_scenes, run, device):
    """All three phases, from the run's checkpoint on. What is random in a step depends on (seed, step) alone,
    so that an interrupted run ends in the same weights: bit for bit on a CPU; on a GPU the gradient of
    grid_sample adds in no fixed order. Returns False if the user stopped it."""
    s, phase, stop = model.settings, 0, []
    total = s.background_steps + s.steps
    t, seconds, optimizer_state = run.restore(model)
    kept = [json.dumps(line) + "\n" for line in run.read_log() if line["t"] <= t]  # the rest will be redone
    replace(run.log_file, lambda path: path.write_text("".join(kept)))
    began = time.time() - seconds  # had it never been interrupted
    handlers = {number: signal.signal(number, lambda number, _: stop.append(number))  # end the step first
                for number in (signal.SIGINT, signal.SIGTERM)}
    with tqdm(total=total, initial=t, unit="step") as bar:
        while t < total and not stop:
            before, (phase, step) = phase, phase_at(s, t)
            if phase != before:  # a new phase: a new Adam
                optimizer = make_optimizer(model, phase)
                if optimizer_state and phase == phase_at(s, t - 1)[0]:
                    optimizer.load_state_dict(optimizer_state)
                batch_size = s.background_batch_size if phase == 1 else s.batch_size
                batches = data.Batches(train_scenes, batch_size, s.seed, t, total, device)
                images_ahead, since = iter(batches), time.time()
                bar.set_description(f"phase {phase}")

            torch.manual_seed(s.seed * 1_000_003 + t)  # for dropout
            images = next(images_ahead).float() / 255  # (n, 3, h, w) in [0, 1]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, phase, step, *group.get("rate", ()))
            model.train()
            loss, parts = training_loss(model, images, phase, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            t += 1
            bar.update()

            validate = phase > 1 and (t % s.validate_every == 0 or t == total)
            if validate or t % s.log_every == 0:  # only here are values fetched from the device
                line = {"t": t, "phase": phase, "step": step, "lr": optimizer.param_groups[0]["lr"]}
                line |= {name: value.item() for name, value in parts.items()}
                line["images_per_second"] = batch_size * (bar.format_dict["rate"] or 0)
                line["waited"] = batches.waited / (time.time() - since)  # share of the phase's time
                if validate:
                    line |= {name: v.mean() for name, v in evaluate(model, val_scenes, device).items()}
                with run.log_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix({k: f"{line[k]:.3g}" for k in (*parts, "mIoU", "ARI-FG") if k in line})
            if t % s.checkpoint_every == 0 or t == total or stop:
                run.save(model, optimizer, t, time.time() - began)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return t == total


class Run:
    """The folder of a run. Raises SettingsError if it holds a run with other settings, or something else."""

    def __init__(self, folder, settings):
        self.folder, self.settings = Path(folder), dataclasses.asdict(settings)
        self.checkpoint, self.log_file = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if self.checkpoint.exists():
            theirs = self.load()["settings"]
            other = [f"{k} = {theirs.get(k)} there, {v} here" for k, v in self.settings.items()
                     if theirs.get(k) != v and not k.endswith("_every")]
            if other:
                raise SettingsError(f"{folder} is a run with other settings ({'; '.join(other[:3])}): repeat "
                                    "the flags it was started with, or choose another --out.")
        elif self.folder.is_file() or any(path.suffix != ".part" for path in self.folder.glob("*")):
            raise SettingsError(f"{folder} is no run of ours, yet not empty; choose another --out.")

    def load(self):
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            return {k: saved[k] for k in ("settings", "t", "seconds", "model", "optimizer")}
        except Exception as e:
            raise SettingsError(f"{self.checkpoint} is damaged or not ours ({type(e).__name__}); move the "
                                "folder away to start anew, or choose another --out.") from e

    def restore(self, model):
        """Load the checkpoint's weights. Returns (steps done, seconds spent, optimizer's state or None)."""
        if not self.checkpoint.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.save(model, None, 0, 0.0)
        saved = self.load()
        model.load_state_dict(saved["model"])
        return saved["t"], saved["seconds"], saved["optimizer"]

    def save(self, model, optimizer, t, seconds):
        state = dict(settings=self.settings, t=t, seconds=seconds, model=model.state_dict(),
                     optimizer=optimizer and optimizer.state_dict())
        replace(self.checkpoint, lambda path: torch.save(state, path))

    def read_log(self):
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half


def replace(path, write):
    """Write under a temporary name, then rename: whatever interrupts us, nobody finds half a file."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


# --- 5. Experimental results: metrics --------------------------------------------------------------
def contingency(pred, true):
    """Counts of the pixels with each pair of labels, which all metrics below start from. pred, true: labels
    (n, h, w) from 0 on. Returns (n, m, m) float64, [image, predicted, true]; m - 1 is the largest label."""
    n, m = len(pred), int(max(pred.max(), true.max())) + 1
    pairs = (pred.long() * m + true.long()).flatten(1) + m * m * torch.arange(n, device=pred.device)[:, None]
    return torch.bincount(pairs.flatten(), minlength=n * m * m).view(n, m, m).cpu().double()


def pairwise_iou(table):
    """(n, m, m): intersection over union of each predicted with each true segment, 0 where both are empty."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp_min(1)


def mean_iou(pred, true, table=None):
    """mIoU as ClevrTex [29] has it: predicted and true segments, background included, are matched one to one
    for the largest sum of IoUs, which is divided by the number of segments of the side that has more.
    Labels (n, h, w) -> (n,) in [0, 1]. table: their contingency, if it is there already."""
    table = contingency(pred, true) if table is None else table
    iou, in_pred, in_true = (v.numpy() for v in (pairwise_iou(table), table.sum(2) > 0, table.sum(1) > 0))
    scores = np.empty(len(iou))
    for i in range(len(iou)):
        matching = linear_sum_assignment(iou[i], maximize=True)
        scores[i] = iou[i][matching].sum() / max(in_pred[i].sum(), in_true[i].sum())
    return torch.from_numpy(scores)


def adjusted_rand_index(pred, true, foreground_only=True, table=None):
    """ARI, by default ARI-FG: do pairs of (foreground) pixels belong together in both? 0 by chance, 1 if
    always or where nothing is to be told apart. Labels (n, h, w) -> (n,) in [-1, 1]. table: see mean_iou."""
    table = contingency(pred, true) if table is None else table
    table = table[:, :, 1:] if foreground_only else table

    def pairs(count):
        return (count * (count - 1) / 2).flatten(1).sum(1)
    both, in_pred, in_true = pairs(table), pairs(table.sum(2)), pairs(table.sum(1))
    by_chance = in_pred * in_true / pairs(table.sum((1, 2))[:, None]).clamp_min(1)
    most = (in_pred + in_true) / 2
    return torch.where(most == by_chance, 1.0, (both - by_chance) / (most - by_chance))


def segmentation_covering(pred, true, table=None):
    """MSC-FG as GENESIS has it: each true object's largest IoU with any predicted segment, averaged over
    the objects of an image; 0 without any. Labels (n, h, w) -> (n,) in [0, 1]. table: as in mean_iou."""
    table = contingency(pred, true) if table is None else table
    objects = table.sum(1)[:, 1:] > 0  # (n, m - 1)
    best = pairwise_iou(table)[:, :, 1:].amax(1)
    return (best * objects).sum(1) / objects.sum(1).clamp_min(1)


def squared_error(image_hat, image):
    """MSE as [29] has it, summed over channels and pixels. Both (n, 3, h, w) in [0, 1] -> (n,)."""
    return (image_hat - image).square().flatten(1).sum(1)


@torch.no_grad()
def evaluate(model, scenes, device, progress=False):
    """Each scene's scores by metric, arrays (N,), in the units of the paper's tables: percent, and the summed
    squared error, alone where there are no true labels. Leaves the model in evaluation mode."""
    model.eval()
    batches = []
    for i in tqdm(range(0, len(scenes), 64), desc="evaluation", unit="batch", disable=not progress):
        images, true = (torch.from_numpy(np.array(array[i:i + 64])).to(device)
                        for array in (scenes.images, scenes.labels))
        scene = model(images / 255)
        pred = scene.weights.argmax(1)
        table = contingency(pred, true)
        batches.append({"mIoU": 100 * mean_iou(pred, true, table),
                        "ARI-FG": 100 * adjusted_rand_index(pred, true, table=table),
                        "MSC-FG": 100 * segmentation_covering(pred, true, table),
                        "MSE": squared_error(scene.image, images / 255).double().cpu()})
    names = ("mIoU", "ARI-FG", "MSC-FG", "MSE") if scenes.labelled else ("MSE",)
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in names}


# --- 5. Experimental results: pictures -------------------------------------------------------------
@torch.no_grad()
def plot_segmentations(model, scenes, device, path, rows=6):
    """A row for each scene: input, reconstruction, background, found and true segments, and the K attention
    maps with the positions found, in the colours of their segments, faint where nothing is visible."""
    model.eval()
    images = torch.from_numpy(np.array(scenes.images[:rows])).to(device).float() / 255
    latents = model.encode(images)
    scene = model.render(latents, model.background(images)[:, :3])
    found, K = scene.weights.argmax(1).cpu(), latents.x.shape[1]
    palette = colors.ListedColormap(["black", *plt.get_cmap("tab10").colors, *plt.get_cmap("Set3").colors])
    figure, axes = plt.subplots(len(images), 5 + K, figsize=(7 + 1.4 * K, 1.4 * len(images)), squeeze=False)
    titles = ["input", "reconstruction", "background", "segments", "true"]
    for axis, title in zip(axes[0], titles + [f"query {k}" for k in range(1, K + 1)]):
        axis.set_title(title, fontsize=9)
    plt.setp(axes, xticks=[], yticks=[])
    for i, row in enumerate(axes):
        for axis, image in zip(row, (images[i], scene.image[i], scene.layers[i, 0])):
            axis.imshow(image.permute(1, 2, 0).cpu().clamp(0, 1).numpy())
        for axis, labels in zip(row[3:], (found[i].numpy(), scenes.labels[i])):
            axis.imshow(labels % palette.N, cmap=palette, vmin=0, vmax=palette.N - 1, interpolation="nearest")
        for k, axis in enumerate(row[5:]):
            axis.imshow(latents.attention[i, k].cpu().numpy(), cmap="gray", extent=(-1, 1, 1, -1))
            axis.plot(latents.x[i, k].item(), latents.y[i, k].item(), "+", color=palette((k + 1) % palette.N),
                      markersize=11, markeredgewidth=2.5, alpha=1 if (found[i] == k + 1).any() else 0.3,
                      scalex=False, scaley=False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_curves(log, path):
    """Losses and validation scores over a run's steps, its phases shaded. log: the lines of log.jsonl."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    for axis, names in ((above, ("background", "reconstruction", "entropy")),
                        (below, ("mIoU", "ARI-FG", "MSC-FG"))):
        for name in names:
            lines = [line for line in log if name in line]
            axis.plot([line["t"] for line in lines], [line[name] for line in lines], label=name)
        end = 0
        for phase, colour in ((1, "gray"), (2, "orange"), (3, "green")):
            start, end = end, max((line["t"] for line in log if line["phase"] == phase), default=end)
            axis.axvspan(start, end, color=colour, alpha=0.1, lw=0, label=f"phase {phase}")
        axis.legend(fontsize=8, loc="upper right" if axis is above else "lower right")
    above.set(yscale="log", ylabel="loss")
    below.set(ylabel="validation score (%)", xlabel="steps", ylim=(0, 100))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- The command -----------------------------------------------------------------------------------
def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
        epilog="The same command goes on after an interruption; once the run is done, it only evaluates.\n"
               "With other --steps the warm-ups and phase 2 keep their share of the run.")
    parser.add_argument("--data-dir", default="datasets", help="where the files are (default: datasets)")
    parser.add_argument("--out", help="folder of the run (default: runs/DATASET)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    parser.add_argument("--eval", action="store_true", help="only evaluate the run's model")
    group = parser.add_argument_group("settings, the paper's by default; [in brackets] for --dataset shapes")
    for f in dataclasses.fields(Settings):
        default = f"default: {f.default}" + (f" [{SHAPES[f.name]}]" if f.name in SHAPES else "")
        choices, kind = f.metadata["choices"], f.type.__name__.upper()
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else kind)
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how, help=(
            f.metadata["help"] + (" (default: shapes)" if f.name == "dataset" else f" ({default})")))
    return parser.parse_args(arguments)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise SettingsError(f"--device {name} is of no use here ({str(e).splitlines()[0]}); try auto.") from e


def announce(model, device, device_name):
    """Say what a run will do, where, and about how long, after trying steps with another such model."""
    s, trial, seconds = model.settings, ASTSeg(model.settings).to(device), 0.0
    for phase, steps, batch_size in ((1, s.background_steps, s.background_batch_size),
                                     (2, s.phase2_steps, s.batch_size),
                                     (3, s.steps - s.phase2_steps, s.batch_size)):
        print(f"  phase {phase}: {steps} steps of {batch_size} images")
        n = batch_size if device.type == "cuda" else min(16, batch_size)
        for _ in range(2 if steps else 0):  # the first one is slower
            began = time.time()
            training_loss(trial, torch.rand(n, 3, s.size, s.size, device=device), phase, 0)[0].backward()
            trial.background.generator[-1].conv.weight.sum().item()  # wait for the device
        seconds += steps and steps * (time.time() - began) * batch_size / n
    duration = f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.0f} hours"
    print(f"  on {device_name}: about {duration} in all", flush=True)


def train_and_evaluate(s, run, data_dir, device, only_evaluate):
    """The command once its flags are understood. Returns the exit code."""
    torch.manual_seed(s.seed)
    model, total, limit = ASTSeg(s).to(device), s.background_steps + s.steps, s.limit or None
    device_name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
                   f"{device}, {torch.get_num_threads()} threads")
    if only_evaluate and not run.checkpoint.exists():
        raise SettingsError(f"{run.folder} holds no checkpoint to evaluate; train first, without --eval.")
    if not only_evaluate and not (run.checkpoint.exists() and run.load()["t"] == total):
        source = f"nvidia/mit-{s.generator}" if s.backbone == "auto" else s.backbone
        if s.generator.startswith("b") and source != "random" and not run.checkpoint.exists():
            model.feature_maps.load_backbone(source)
        scenes = data.load(s.dataset, "train", data_dir, limit, s.size)
        val = data.load(s.dataset, "val", data_dir, limit, s.size)
        val = dataclasses.replace(val, images=val.images[:256], labels=val.labels[:256])
        print(f"AST-Seg on {len(scenes)} {s.dataset} scenes of {s.size}x{s.size}, into {run.folder}:")
        announce(model, device, device_name)
        if not train(model, scenes, val, run, device):
            print(f"Stopped. The same command goes on from {run.checkpoint}.")
            return 130
    test = data.load(s.dataset, "test", data_dir, limit, s.size)
    done, seconds, _ = run.restore(model)
    model.save_pretrained(run.folder / "model")
    print(f"Evaluating {run.folder} after {done} of {total} steps.")
    scores = evaluate(model, test, device, progress=True)
    results = {"dataset": s.dataset, "split": "test", "images": len(test),
               **{name: float(values.mean()) for name, values in scores.items()},
               "steps": max(0, done - s.background_steps), "seconds": seconds,
               "device": device_name, "torch": torch.__version__, "settings": dataclasses.asdict(s)}
    replace(run.folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    plot_segmentations(model, test, device, run.folder / "segmentations.png")
    plot_curves(run.read_log(), run.folder / "curves.png")
    print(f"\n{'':12}" + "".join(f"{name:>9}" for name in scores))
    print(f"{s.dataset:12}" + "".join(f"{results[name]:9.2f}" for name in scores) + f"   {len(test)} scenes")
    print(f"Look at segmentations.png and curves.png in {run.folder}.")
    return 0


def main(arguments=None):
    flags = vars(parse_arguments(arguments))
    data_dir, out, device, only_evaluate = (flags.pop(name) for name in ("data_dir", "out", "device", "eval"))
    try:
        s = make_settings(**flags)
        run = Run(out or f"runs/{s.dataset}", s)
        return train_and_evaluate(s, run, data_dir, pick_device(device), only_evaluate)
    except (SettingsError, data.DataError, OSError) as e:
        print(f"ast_seg.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
