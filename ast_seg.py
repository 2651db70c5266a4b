"""AST-Seg: unsupervised multi-object segmentation using Attention and Soft-argmax, in one file.

The sections below follow the paper by Sauvalle and de La Fortelle; read them side by side. In one breath: a
Segformer turns the image into features and K attention maps (4.1); each map's centre of mass is an object's
position, the features under it say what is there; a transformer refines both; a generator draws each object
and a spatial transformer puts it in place; an autoencoder draws the background; all compete for every pixel.

    python ast_seg.py                                             # coloured shapes, on a laptop, in minutes
    python ast_seg.py --dataset clevr --data-dir DIR              # the paper's model on CLEVR, on one GPU
    python ast_seg.py --eval --model runs/clevr --dataset clevr6  # score it, on its own or another set
    python ast_seg.py --segment photos/ --model runs/clevr        # segment images of your own

Shapes in comments: n images, K object queries, c channels, h x w pixels, h* x w* cells of a feature map.
"""
import argparse
import dataclasses
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from matplotlib import pyplot as plt
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import data

# --- Settings: Table 1 of the supplement, the architecture, the run -------------------------------
class SettingsError(ValueError):
    """Settings, or a run's folder, that cannot work; the message says what to do, in one sentence."""

def setting(default, help, choices=None, least=0):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least})

@dataclasses.dataclass
class Settings:
    """Table 1 of the supplement, in its order, then the rest. Fields are flags; defaults are the paper's."""
    dataset: str = setting("clevr", "what to train on", tuple(data.DATASETS))
    # Table 1, background model pretraining (phase 1)
    background_batch_size: int = setting(128, "images per step in phase 1", least=1)
    background_lr: float = setting(2e-3, "learning rate in phase 1, divided by 10 after 80%% of its steps")
    background_steps: int = setting(2500, "steps of phase 1: 2500 for a fixed background, else 500000")
    # Table 1, foreground model training (phases 2 and 3)
    batch_size: int = setting(64, "images per step in phases 2 and 3", least=2)  # two, for batch norm
    lr: float = setting(4e-5, "learning rate in phases 2 and 3")
    adam_beta1: float = setting(0.90, "Adam beta_1")
    adam_beta2: float = setting(0.98, "Adam beta_2")
    adam_epsilon: float = setting(1e-9, "Adam epsilon: tiny, as the first gradients are (see log_alpha_0)")
    steps: int = setting(125_000, "steps of phases 2 and 3 together; the schedules scale with it", least=1)
    phase2_steps: int = setting(30_000, "of these, steps of phase 2 (frozen background)")
    warmup_steps: int = setting(5000, "quadratic warm-up of the learning rate")
    entropy_warmup_steps: int = setting(10_000, "N_pixel, quadratic warm-up of lambda_pixel (Eq. 22)")
    log_alpha_0: float = setting(11.0, "log of alpha_0, the background's first activation", least=-1e12)
    d_z_what: int = setting(32, "numbers in z_what, an object's appearance", least=1)
    entropy_weight: float = setting(1e-2, "lambda_pixel, weight of the pixel entropy loss (Eq. 22)")
    s_min: float = setting(1.3, "minimum inverse scale: above 1, no glimpse is the whole image", least=1)
    s_max: float = setting(24.0, "maximum inverse scale: the smallest glimpse still has a gradient")
    d_t: int = setting(256, "d_T, width of the transformer encoder", least=1)
    heads: int = setting(8, "heads of a transformer layer", least=1)
    d_ff: int = setting(512, "width of its feed-forward part", least=1)
    layers: int = setting(6, "layers of the transformer encoder; 0: the model without transformer (Table 4)")
    # Sections 4 and 5, what depends on the dataset
    size: int = setting(128, "side of the training images, in pixels", (64, 128, 192))
    slots: int = setting(10, "K, object queries: the maximum number of objects in a scene", least=1)
    anisotropic: bool = setting(False, "a scale for each axis, (s_x, s_y), instead of one")
    background: str = setting("simple", "width of the background model", ("small", "simple", "complex"))
    curriculum: str = setting("ct", "three phases; bt: 3 alone; frozen: 2 to the end", ("ct", "bt", "frozen"))
    generator: str = setting("b3", "of feature maps", ("tiny", "b3", "unet", "unet-small"))
    backbone: str = setting("auto", "of Segformer b3: hub name, folder or random; auto: nvidia/mit-b3")
    window: int = setting(0, "soft-argmax over so many cells (odd) squared around the peak; 0: over all")
    mask_noise: float = setting(0.0, "uniform noise on the masks in training (DTI-Sprites, C.4: 0.4)")
    # Ours, to learn in minutes on a laptop
    small: bool = setting(False, "a small model and a short schedule: values in [brackets], and what follows")
    # The run
    seed: int = setting(0, "seed of the weights, the batches and the dropout")
    precision: str = setting("auto", "of the maps; auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16"))
    limit: int = setting(0, "use at most so many scenes of each split; 0: all")
    log_every: int = setting(50, "steps between two lines of log.jsonl", least=1)
    validate_every: int = setting(2500, "steps between two scores on 256 validation scenes", least=1)
    checkpoint_every: int = setting(1000, "steps between two checkpoints", least=1)

# What --small stands for, measured on two CPU cores; the README says why under "The small model".
SMALL = dict(
    small=True, size=64, generator="unet-small", background="small", background_steps=800,
    background_batch_size=32, background_lr=5e-4, steps=3600, phase2_steps=2250, batch_size=32, lr=1e-3,
    warmup_steps=200, entropy_weight=5e-2, entropy_warmup_steps=2700, log_alpha_0=4.0, s_max=8.0,
    d_t=128, d_ff=256, layers=3, validate_every=300, checkpoint_every=300)

def make_settings(dataset="shapes", **given):
    """The settings of a dataset, with the `given` ones on top; with other steps alone, warm-ups and phase 2
    keep their share. Raises SettingsError for settings that cannot work."""
    d = data.DATASETS[dataset]
    usual = dict(size=d.size, slots=d.slots, anisotropic=d.anisotropic, background=d.background,
                 background_steps=2500 if d.background == "simple" else 500_000)
    usual = Settings(dataset, **usual | (SMALL if given.get("small", dataset == "shapes") else {}))
    s = dataclasses.replace(usual, **given)
    for name in {"phase2_steps", "warmup_steps", "entropy_warmup_steps"} - given.keys():
        setattr(s, name, math.ceil(getattr(usual, name) * s.steps / usual.steps))
    if s.curriculum == "bt":
        s.background_steps = s.phase2_steps = 0
    s.phase2_steps = s.steps if s.curriculum == "frozen" else min(s.phase2_steps, s.steps)
    for f in dataclasses.fields(s):
        value, choices, least = getattr(s, f.name), f.metadata["choices"], f.metadata["least"]
        if value not in choices if choices else f.type in (int, float) and not least <= value < 1e12:
            wanted = f"one of {choices}" if choices else f"a number from {least} to 1e12"
            raise SettingsError(f"--{f.name.replace('_', '-')} must be {wanted}, not {value}.")
    if s.d_t % s.heads or s.small and s.d_t < s.d_z_what + 7 or s.s_max <= s.s_min:
        raise SettingsError("--d-t must be a multiple of --heads over --d-z-what + 6, --s-max over --s-min.")
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
    x along columns, y along rows, (0, 0) the first pixel."""
    h, w = phi.shape[-2:]
    x = phi.sum(-2) @ torch.arange(w, dtype=phi.dtype, device=phi.device)
    y = phi.sum(-1) @ torch.arange(h, dtype=phi.dtype, device=phi.device)
    return C + torch.stack([x, y], -1)  # Eq. (4)

def spatial_softmax(logits, window=0):
    """(..., h, w), any range -> (..., h, w), not negative and summing to 1 over the last two (Eq. 11).
    window: only a square of so many cells (odd) a side around the peak counts (keypoints, Eq. 5). What
    follows is still equivariant, yet no longer affine: of the mean of two maps it may see one peak alone."""
    if window:
        (h, w), peak = logits.shape[-2:], logits.flatten(-2).argmax(-1)[..., None]  # (..., 1)
        rows = (torch.arange(h, device=logits.device) - peak // w).abs() <= window // 2  # (..., h)
        columns = (torch.arange(w, device=logits.device) - peak % w).abs() <= window // 2  # (..., w)
        logits = logits.masked_fill(~(rows[..., None] & columns[..., None, :]), -math.inf)
    return logits.flatten(-2).softmax(-1).view_as(logits)

def soft_argmax(logits, window=0):
    """The differentiable arg-max: a softmax makes the map sum to 1, then Eq. 4 with C = 0 locates it.
    logits: (..., h, w), any range. Returns (..., 2): (x, y) in pixels, x along columns, y along rows."""
    return affine_localizer(spatial_softmax(logits, window))  # Eq. (10)

# --- 4.1 Model architecture: feature maps and attention maps --------------------------------------
SEGFORMERS = {  # depths, widths and heads of the four stages, width of the decoder
    "tiny": ((1, 1, 1, 1), (16, 32, 64, 128), (1, 2, 4, 8), 64),  # ours, for laptops
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
        """Take the backbone from a hub name or folder; the decoder stays random (section 5.1)."""
        from transformers import SegformerModel
        try:
            pretrained, info = SegformerModel.from_pretrained(source, output_loading_info=True)
            assert not info["missing_keys"], "it lacks Segformer weights"
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

class UNetLevel(nn.Module):
    """A level of a U-Net and all below: (n, c, h, w) -> (n, 2 c, h, w), what comes up beside what went in."""
    def __init__(self, c, *below):
        super().__init__()
        d = below[0] if below else c
        self.path = nn.Sequential(
            conv_block(c, d, 4, 2, 1), Residual(conv_block(d, d, 3, 1, 1)), UNetLevel(*below),
            Residual(conv_block(2 * d, 2 * d, 3, 1, 1)), conv_block(2 * d, c, 4, 2, 1, nn.ConvTranspose2d)
        ) if below else conv_block(c, c, 3, 1, 1)  # the centre

    def forward(self, x):
        return torch.cat([self.path(x), x], 1)

class UNet(nn.Sequential):
    """Another generator of maps (Table 3). Images (n, 3, h, w) -> (n, channels, h/stride, w/stride)."""
    def __init__(self, name, channels):
        widths, stride = UNETS[name]
        kernel, padding = (3, 1) if stride == 1 else (2 * stride, stride // 2)
        super().__init__(
            conv_block(3, widths[0], kernel, stride, padding), UNetLevel(*widths),
            conv_block(2 * widths[0], channels, 3, 1, 1), Residual(nn.Conv2d(channels, channels, 3, 1, 1)),
            nn.Conv2d(channels, channels, 1))

def coordinates(h, w, like):
    """Normalised coordinates of h x w cells, (2, h, w): x over columns, y over rows, from -1 to +1."""
    x = torch.linspace(-1, 1, w, device=like.device, dtype=like.dtype)  # Eq. (12)
    y = torch.linspace(-1, 1, h, device=like.device, dtype=like.dtype)  # Eq. (13)
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)])

def attend(attention, features):
    """What and where each query sees: features and coordinates, averaged with its attention map as weights.
    attention: (n, K, h*, w*), maps that sum to 1; features Phi: (n, d, h*, w*). Returns the (phi_k^0, x_k^0,
    y_k^0) as one tensor (n, K, d + 2). As an einsum, the n x K x d x h* x w* products are never in memory."""
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
        if s.small:
            self.start_as_identity()

    def forward(self, triplets):
        return self.project(self.encoder(self.embed(triplets)))

    @torch.no_grad()
    def start_as_identity(self, length=30.0):
        """Ours, for large rates: a random transformer then moves all positions off the image before the maps
        learn. So: residual branches of 0, and beside a token's d numbers a constant that rules its norm."""
        for layer in self.encoder.layers:
            for parameter in (*layer.self_attn.out_proj.parameters(), *layer.linear2.parameters()):
                parameter.zero_()
        d_t, d = self.embed.weight.shape
        random = torch.randn(d_t, d + 1)
        directions = torch.linalg.qr(random - random.mean(0))[0]  # (d_t, d + 1), orthonormal and of mean 0
        self.embed.weight.copy_(directions[:, :d])
        self.embed.bias.copy_(directions[:, d] * length)
        self.project.weight.copy_(directions[:, :d].T * length / d_t ** 0.5)  # undoes the norm
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
    def __init__(self, d, size, c):
        side, layers = 2, [nn.Unflatten(1, (d, 1, 1)), nn.ConvTranspose2d(d, c, 2, 2, bias=False)]  # 2 x 2
        while side < size:
            norm, last, side = nn.GroupNorm(max(1, c // 16), c), 2 * side >= size, 2 * side
            layers += [norm, nn.CELU(), nn.ConvTranspose2d(c, 4 if last else c // 2, 4, 2, 1, bias=last)]
            c //= 2
        super().__init__(*layers, nn.Sigmoid())

def spatial_transformer(glimpses, x, y, s, h, w):
    """STN: put each glimpse at (x, y), 1/s times as large as the image, and zero around it.
    glimpses: (m, c, g, g); x, y: (m,) in [-1, 1]; s: (m, 1 | 2), inverse scales s or (s_x, s_y). Returns
    (m, c, h, w). The pixel at p shows the glimpse's point s (p - position), hence `inverse` scale."""
    s_x, s_y, zero = s[:, 0], s[:, -1], torch.zeros_like(x)
    theta = torch.stack([s_x, zero, -s_x * x, zero, s_y, -s_y * y], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(glimpses), glimpses.shape[1], h, w), align_corners=False)
    return F.grid_sample(glimpses, grid, align_corners=False)  # -1, 1: the image's edges, as the authors do

def layer_weights(masks, log_alpha, log_alpha_0):
    """The distribution of each pixel over the layers, w_k = alpha_k M_k / sum_i alpha_i M_i with M_0 = 1.
    masks: (n, K, h, w) in [0, 1]; log_alpha: (n, K); log_alpha_0: scalar. Returns (n, K + 1, h, w), index 0
    the background: the softmax of log alpha_k + log M_k, which no alpha can overflow."""
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

class Background(nn.Sequential):
    """Images (n, 3, size, size) -> (n, 4, size, size) in [0, 1]: the background without its objects, and the
    error the model expects of itself in each pixel. Encoder and generator mirror each other."""
    def __init__(self, kind, size):
        e, g = BACKGROUNDS[kind, size.bit_length() - 1]
        encoder, generator = nn.Sequential(), nn.Sequential()
        for i in range(len(e) - 1):  # each halves its map, down to 1 x 1
            kernel, stride, padding = (5, 2, 2) if size > 5 else (4, 2, 1) if size > 3 else (size, 1, 0)
            size, remainder = divmod(size + 2 * padding - kernel + stride, stride)
            conv = nn.Conv2d(e[i] + 2, e[i + 1], kernel, stride, padding, bias=False)
            encoder.append(BackgroundBlock(conv, e[i + 1]))
            conv = nn.ConvTranspose2d(g[i + 1] + 2, g[i], kernel, stride, padding, remainder, bias=False)
            generator.insert(0, BackgroundBlock(conv, g[i], last=i == 0))
        super().__init__(encoder, generator)

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
        glimpse = 16 if s.small else 32 if s.size <= 64 else 64 if s.size <= 128 else 128  # Table 2
        self.glimpse_generator = GlimpseGenerator(s.d_z_what, glimpse, max(64, 2 * glimpse))
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(s.log_alpha_0)))
        self.background = Background(s.background, s.size)

    def encode(self, images):
        """Algorithm 1. images: (n, 3, h, w) in [0, 1]. Returns Latents."""
        s = self.settings
        bfloat16 = images.is_cuda if s.precision == "auto" else s.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            maps = self.feature_maps(images)
        maps = maps.float()  # (n, K + d_phi, h*, w*); a soft-argmax needs all its digits
        attention = spatial_softmax(maps[:, :s.slots], s.window)  # Eq. (11)
        triplets = self.refine(attend(attention, maps[:, s.slots:]))  # (n, K, d_phi + 2)
        scale, log_alpha, z_what, xy = triplets.split([self.d_s, 1, s.d_z_what, 2], -1)
        x, y = xy.clamp(-1, 1).unbind(-1)
        scale = s.s_min + (s.s_max - s.s_min) * scale.sigmoid()
        return Latents(x, y, scale, log_alpha.squeeze(-1), z_what, attention)  # its exp: in Eq. 17

    def draw(self, latents, h, w):
        """The objects in place, before they compete: L_k (n, K, 3, h, w) and M_k (n, K, h, w) in [0, 1]."""
        glimpses = self.glimpse_generator(latents.z_what.flatten(0, 1))  # (n K, 4, g, g)
        if self.training and self.settings.mask_noise:  # only masks of 0 and 1 do not mind
            noise = self.settings.mask_noise * (2 * torch.rand_like(glimpses[:, 3:]) - 1)
            glimpses = torch.cat([glimpses[:, :3], (glimpses[:, 3:] + noise).clamp(0, 1)], 1)
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

    def forward(self, images):  # (n, 3, h, w) in [0, 1] -> Scene
        return self.render(self.encode(images), self.background(images)[:, :3])

    @torch.no_grad()
    def segment(self, images):
        """(n, 3, size, size) in [0, 1] -> (n, size, size), the layer of largest weight, 0 the background."""
        latents = self.encode(images)
        masks = self.draw(latents, *images.shape[-2:])[1]
        return layer_weights(masks, latents.log_alpha, self.log_alpha_0).argmax(1)

# --- 4.2.1 Losses ---------------------------------------------------------------------------------
def background_loss(output, image, robustness=1.0):
    """The robust loss of [38] for phase 1: where a picture is badly rebuilt there is an object, and it counts
    up to e^6 times less. output: (n, 4, h, w) of the background model; image: (n, 3, h, w) in [0, 1];
    robustness: 1 in [38]; ours may grow from 0, as at first all is badly rebuilt. Returns a scalar."""
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
        robustness = warmup(step, 0.9 * s.background_steps) if s.small else 1.0
        loss = background_loss(model.background(images), images, robustness)
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

def learning_rate(s, phase, step, part="objects"):
    """Phase 1: constant, a tenth after 80 % of its steps. Phases 2 and 3, as one schedule: quadratic warm-up,
    constant, a tenth from 90 % on (section 5.1). A small run has large rates: so its transformer learns late,
    and all warm up anew in phase 3, where the first step of a new Adam moves each weight by its full rate."""
    if phase == 1:
        return s.background_lr * (0.1 if step >= 0.8 * s.background_steps else 1)
    rate = s.lr * warmup(step, s.steps * 5 / 12 if s.small and part == "refine" else s.warmup_steps)
    if s.small:
        rate *= {"objects": 1, "refine": 0.1, "background": 0.3}[part]
        rate *= warmup(step - s.phase2_steps, s.steps / 36) if phase == 3 else 1
    return rate * (0.1 if step >= (0.75 if s.small else 0.9) * s.steps else 1)

def make_optimizer(model, phase):
    """A new Adam over what the phase trains; its moments start at zero, also at the switch to phase 3."""
    s = model.settings
    parts = {"background": [*model.background.parameters()], "refine": [*model.refine.parameters()]}
    if phase == 1:
        return torch.optim.Adam(parts["background"], betas=(0.9, 0.999), fused=True)  # as in [38]
    apart = {id(p) for part in parts.values() for p in part}
    parts["objects"] = [p for p in model.parameters() if id(p) not in apart]
    groups = [dict(params=params, part=name) for name, params in parts.items()
              if params and (phase == 3 or name != "background")]
    return torch.optim.Adam(groups, betas=(s.adam_beta1, s.adam_beta2), eps=s.adam_epsilon, fused=True)

def train(model, train_scenes, val_scenes, run, device):
    """All three phases, from the run's checkpoint on. What is random in a step depends on (seed, step) alone,
    so that an interrupted run ends in the same weights: bit for bit on a CPU; on a GPU the gradient of
    grid_sample adds in no fixed order."""
    s, phase, total = model.settings, 0, run.total
    t, optimizer_state, seconds = run.restore(model)
    began = time.time() - seconds  # had it never been interrupted
    moments = {s.background_steps + int(i) for i in (0, *np.geomspace(10, s.steps, 20))}  # of training.gif
    with tqdm(total=total, initial=t, unit="step") as bar:
        while t < total:
            before, (phase, step) = phase, phase_at(s, t)
            if phase != before:  # a new phase: a new Adam
                optimizer = make_optimizer(model, phase)
                if optimizer_state and phase == phase_at(s, t - 1)[0]:
                    optimizer.load_state_dict(optimizer_state)
                batch_size = s.background_batch_size if phase == 1 else s.batch_size
                batches = data.batches(train_scenes, batch_size, s.seed, t, total, device)
                waited, since = 0.0, time.time()
                bar.set_description(f"phase {phase}")
            torch.manual_seed(s.seed * 1_000_003 + t)  # for dropout
            waiting = time.time()
            images = next(batches).float() / 255  # (n, 3, h, w) in [0, 1]
            waited += time.time() - waiting
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, phase, step, group.get("part"))
            model.train()
            loss, parts = training_loss(model, images, phase, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            t += 1
            bar.update()
            validate = phase > 1 and (t % s.validate_every == 0 or t == total)
            if validate or t % s.log_every == 0:  # only here are values fetched from the device
                line = {"t": t, "phase": phase, "step": step, "lr": learning_rate(s, phase, step)}
                line |= {name: value.item() for name, value in parts.items()}
                line |= {"images_per_second": batch_size * (bar.format_dict["rate"] or 0),
                         "waited": waited / (time.time() - since), "seconds": time.time() - began}
                if validate:
                    line |= {name: v.mean() for name, v in evaluate(model, val_scenes, device).items()}
                with run.log_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix({k: f"{line[k]:.3g}" for k in (*parts, "mIoU", "ARI-FG") if k in line})
            if t in moments:
                pictures = Pictures(model, val_scenes, device)
                pictures.segmentations(run.folder / f"frames/{t:07}.png", f"step {t}", dpi=60)
            if t % s.checkpoint_every == 0 or t == total:
                run.save(model, optimizer, t)

class Run:
    """The folder of a run. Raises SettingsError if it holds a run with other settings, or something else."""
    def __init__(self, folder, s):
        self.folder, self.settings, self.saved = Path(folder), dataclasses.asdict(s), dict(t=0)
        self.checkpoint, self.log_file = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        self.total = s.background_steps + s.steps
        if self.checkpoint.exists():
            try:
                saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                self.saved = {k: saved[k] for k in ("settings", "t", "model", "optimizer")}
            except Exception as e:
                raise SettingsError(f"{self.checkpoint} is damaged or foreign ({type(e).__name__}); move its "
                                    "folder away to start anew, or choose another --out.") from e
            theirs = dataclasses.asdict(Settings()) | self.saved["settings"]
            other = [f"{k} = {theirs[k]} there, {v} here" for k, v in self.settings.items()
                     if theirs[k] != v and not k.endswith("_every")]
            if other:
                raise SettingsError(f"{folder} is a run with other settings ({'; '.join(other[:3])}): repeat "
                                    "the flags it was started with, or choose another --out.")
        elif any(p.is_file() and p.suffix != ".part" for p in (self.folder, *self.folder.rglob("*"))):
            raise SettingsError(f"{folder} is no run of ours, yet not empty; choose another --out.")

    def restore(self, model):
        """Load the checkpoint's weights. Returns (steps done, optimizer's state or None, seconds spent)."""
        (self.folder / "frames").mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            self.save(model, None, 0)
        model.load_state_dict(self.saved["model"])
        log = [line for line in read_log(self.log_file) if line["t"] <= self.saved["t"]]  # redo the rest
        replace(self.log_file, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
        return self.saved["t"], self.saved["optimizer"], log[-1]["seconds"] if log else 0.0

    def save(self, model, optimizer, t):
        if t:  # at 0 the checkpoint comes first: by it we know the folder as ours
            model.save_pretrained(self.folder / "model")
        self.saved = dict(settings=self.settings, t=t, model=model.state_dict(),
                          optimizer=optimizer and optimizer.state_dict())
        replace(self.checkpoint, lambda path: torch.save(self.saved, path))

def read_log(file):
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half

def replace(path, write):
    """Write under a temporary name, then rename: whatever interrupts us, nobody finds half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)

# --- 5. Experimental results: metrics --------------------------------------------------------------
def contingency(pred, true):
    """What all metrics start from: counts of the pixels with each pair of labels. pred, true: (n, h, w)
    labels from 0 on. Returns (n, m, m) float64, [image, predicted, true]; m - 1 is the largest label."""
    n, m = len(pred), int(max(pred.max(), true.max())) + 1
    pairs = (pred.long() * m + true.long()).flatten(1) + m * m * torch.arange(n, device=pred.device)[:, None]
    return torch.bincount(pairs.flatten(), minlength=n * m * m).view(n, m, m).cpu().double()

def pairwise_iou(table):
    """(n, m, m): intersection over union of each predicted with each true segment, 0 where both are empty."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp_min(1)

def mean_iou(table):
    """mIoU as ClevrTex [29] has it: predicted and true segments, background included, are matched one to one
    for the largest sum of IoUs, which is divided by the number of segments of the side that has more."""
    iou, segments = pairwise_iou(table).numpy(), [(table.sum(side) > 0).sum(1) for side in (1, 2)]
    best = [matrix[linear_sum_assignment(matrix, maximize=True)].sum() for matrix in iou]
    return torch.tensor(best) / torch.maximum(*segments)

def adjusted_rand_index(table, foreground_only=True):
    """ARI, by default ARI-FG: do pairs of (foreground) pixels belong together in both? 0 by chance, 1 if
    always or where nothing is to be told apart; in [-1, 1]."""
    table = table[:, :, 1:] if foreground_only else table
    def pairs(count):
        return (count * (count - 1) / 2).flatten(1).sum(1)
    both, in_pred, in_true = pairs(table), pairs(table.sum(2)), pairs(table.sum(1))
    by_chance = in_pred * in_true / pairs(table.sum((1, 2))[:, None]).clamp_min(1)
    most = (in_pred + in_true) / 2
    return torch.where(most == by_chance, 1.0, (both - by_chance) / (most - by_chance))

def segmentation_covering(table):
    """MSC-FG as GENESIS has it: each true object's largest IoU with any predicted segment, averaged over
    the objects of an image; 0 without any."""
    objects = table.sum(1)[:, 1:] > 0  # (n, m - 1)
    best = pairwise_iou(table)[:, :, 1:].amax(1)
    return (best * objects).sum(1) / objects.sum(1).clamp_min(1)

def foreground_iou(table):
    """IoU of the unions of all objects (DRC supplement, section E); 1 where neither side has one."""
    union = table.sum((1, 2)) - table[:, 0, 0]
    return torch.where(union == 0, 1.0, table[:, 1:, 1:].sum((1, 2)) / union.clamp_min(1))

METRICS = {  # of a contingency table (n, m, m): (n,), in [0, 1] but for ARI-FG
    "mIoU": mean_iou, "ARI-FG": adjusted_rand_index, "MSC-FG": segmentation_covering,
    "IoU": foreground_iou, "Dice": lambda table: 2 / (1 + 1 / foreground_iou(table))}
PAPER = {  # Tables 1 to 3, three runs of AST-Seg-B3-BT and of -CT: mIoU, ARI-FG, MSC-FG, MSE
    "clevr": ("71.92±32.94 76.05±36.13 - 51±63", "90.27±0.20 98.26±0.07 - 16±1"),
    "clevrtex": ("57.30±15.72 71.79±22.88 - 152±39", "79.58±0.54 94.77±0.51 - 139±7"),
    "objects_room": ("74.50±8.61 74.96±10.02 69.86±10.13 11.7±2.1",
                     "85.02±0.79 87.23±0.88 82.22±0.96 6.7±0.9"),
    "shapestacks": ("70.18±12.68 73.77±7.56 74.12±8.63 11.8±7.0",
                    "78.84±0.21 79.34±0.73 77.65±1.3 4.5±0.2"),
    "ood": ("-", "67.50±0.75 83.14±0.75 - 832±24"), "camo": ("-", "73.07±0.65 87.27±3.78 - 145±6")}

@torch.no_grad()
def evaluate(model, scenes, device, progress=False):
    """Each scene's scores by metric, arrays (N,), in the paper's units: percent, and the squared
    error summed over pixels and channels [29], alone where labels are unknown. Ends in evaluation mode."""
    metrics = METRICS if scenes.labelled else {}
    scores = {name: [] for name in (*metrics, "MSE")}
    for i in tqdm(range(0, len(scenes), 64), desc="evaluation", unit="batch", disable=not progress):
        images, true = (torch.from_numpy(np.array(array[i:i + 64])).to(device)
                        for array in (scenes.images, scenes.labels))
        scene = model.eval()(images := images / 255)
        table = contingency(scene.weights.argmax(1), true)
        for name, metric in metrics.items():
            scores[name].append(100 * metric(table))
        scores["MSE"].append((scene.image - images).square().flatten(1).sum(1).cpu().double())
    return {name: torch.cat(values).numpy() for name, values in scores.items()}

# --- 5. Experimental results: pictures -------------------------------------------------------------
PALETTE = np.array([(0, 0, 0), *12 * (plt.get_cmap("tab10").colors + plt.get_cmap("Set3").colors)])[:256]

def draw_grid(path, rows, titles, names=(), crosses={}, dpi=100):
    """Save rows of pictures: images (3, h, w) in [0, 1], maps (h, w) or labels (h, w); None stays empty.
    crosses: by row and column, (x, y, label) of positions in [-1, 1]."""
    n, m, left = len(rows), len(titles), 0.12 if names else 0
    figure, axes = plt.subplots(n, m, figsize=(1.3 * m / (1 - left), 1.3 * n + 0.2), squeeze=False)
    for (i, j), axis in np.ndenumerate(axes):
        axis.axis("off")
        axis.set_title("" if i else titles[j], fontsize=9, pad=3)
        axis.text(-1.05, 0, names[i] if names and j == 0 else "", fontsize=9, ha="right", va="center")
        x = np.ones((3, 1, 1)) if rows[i][j] is None else np.asarray(rows[i][j].detach().cpu())
        x = x.transpose(1, 2, 0).clip(0, 1) if len(x) == 3 else PALETTE[x] if x.dtype.kind in "iu" else x
        axis.imshow(x, cmap="gray", vmin=0, extent=(-1, 1, 1, -1), interpolation="nearest")
        for x, y, k in crosses.get((i, j), ()):
            axis.plot(float(x), float(y), "+", color=PALETTE[k], ms=9, mew=2, scalex=False, scaley=False)
    figure.subplots_adjust(left, 0, 1, 1 - 0.2 / (1.3 * n + 0.2), 0.03, 0.03)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)

class Pictures:
    """What a model makes of the first six of `scenes`, drawn."""
    @torch.no_grad()
    def __init__(self, model, scenes, device):
        self.images, self.true = (torch.from_numpy(np.array(x[:6])) for x in (scenes.images, scenes.labels))
        self.images, self.model = self.images.to(device) / 255, model.eval()
        self.latents = model.encode(self.images)
        self.scene = model.render(self.latents, model.background(self.images)[:, :3])

    def segmentations(self, path, title="input", dpi=100):
        """Each scene, where each object was found, its pixels, what comes out, and the truth."""
        rows, crosses, latents, scene = [], {}, self.latents, self.scene
        for i, found in enumerate(scene.weights.argmax(1)):
            visible = [k for k in found.unique().tolist() if k]
            crosses[i, 1] = [(latents.x[i, k - 1], latents.y[i, k - 1], k) for k in visible]
            maps = latents.attention[i, [k - 1 for k in visible] or [0]]
            attention = (maps / maps.amax((1, 2), keepdim=True)).amax(0)
            rows.append([self.images[i], attention, found, scene.image[i], scene.layers[i, 0], self.true[i]])
        titles = (title, "attention", "segments", "output", "background", "truth")
        draw_grid(path, rows, titles, crosses=crosses, dpi=dpi)

    def objects(self, path):
        """Algorithms 1 and 2: the first scene taken apart into its layers, and put together again."""
        latents, shares, layers = self.latents, self.scene.weights[0, :, None], self.scene.layers[0]
        glimpses = self.model.glimpse_generator(latents.z_what[0])
        masks = self.model.draw(latents, *self.images.shape[2:])[1][0]
        rows, K = [[self.images[0], None, None, layers[0]]], len(masks)
        rows += [[latents.attention[0, k], glimpses[k, :3], glimpses[k, 3:].expand(3, -1, -1),
                  layers[k + 1] * masks[k]] for k in range(K)]
        for row, share, layer in zip(rows, shares, layers):
            row += [share.expand(3, -1, -1), share * layer]
        rows.append([None] * 5 + [self.scene.image[0]])
        draw_grid(path, rows, ("input, attention", "glimpse o", "mask m", "layer L M", "share w", "w L"),
                  ["background", *(f"query {k + 1}" for k in range(K)), "sum"],
                  {(k + 1, 0): [(latents.x[0, k], latents.y[0, k], k + 1)] for k in range(K)})

    def equivariance(self, path):
        """Proposition 2.1: the largest object of the first scene slides over its background, by the spatial
        transformer, and is found again: by the soft-argmax of a convolution of its mask, and by the model."""
        true, k = torch.linspace(-1, 1, 65), self.scene.weights[0, 1:].sum((1, 2)).argmax().item()
        moved = Latents(*(v[:1, k:k + 1].expand(len(true), *v[:1, k:k + 1].shape[1:]) for v in self.latents))
        moved = moved._replace(x=true[:, None].to(moved.y), y=0 * moved.y)
        slid = self.model.render(moved, self.scene.layers[:1, 0].expand(len(true), -1, -1, -1))
        again, mask, side = self.model.encode(slid.image), slid.weights[:, 1:], slid.image.shape[-1]
        seen = self.model.render(again, slid.layers[:, 0]).weights[:, 1:].sum((2, 3)).argmax(1, keepdim=True)
        centre = soft_argmax(F.conv2d(mask, torch.full((1, 1, 9, 9), 0.25).to(mask), padding=4))[..., 0]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
        for name, found in (("soft-argmax of a convolution", (2 * centre + 1) / side - 1),
                            ("the trained model", again.x.gather(1, seen))):
            axes[0].plot(true, found[:, 0].cpu(), label=name)
            axes[1].plot(true, (found[:, 0].cpu() - true) * side / 2)
        for axis, label in zip(axes, ("found position", "error in pixels")):
            axis.set(xlabel="true position", ylabel=label, xlim=(-1, 1))
            for sign in (-1, 1):
                axis.axvspan(sign, sign * (1 - 1 / moved.s[0, 0, 0].item()), color="gray", alpha=0.2, lw=0)
        axes[0].legend(title="grey: cut by the border", fontsize=8)
        figure.savefig(path, dpi=100, bbox_inches="tight")
        plt.close(figure)

def plot_curves(log, path):
    """Losses and validation scores over a run's steps. log: the lines of log.jsonl."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    for axis, names in zip(axes, (("background", "reconstruction", "entropy"), ("mIoU", "ARI-FG", "MSC-FG"))):
        for name in names:
            points = [(line["t"], line[name]) for line in log if name in line]
            axis.plot(*np.reshape(points, (-1, 2)).T, label=name)
        axis.legend()
    axes[0].set(yscale="log", ylabel="loss")
    axes[1].set(ylabel="validation score (%)", xlabel="steps", ylim=(0, 100))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)

# --- The command -----------------------------------------------------------------------------------
def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
        epilog="The same command goes on after an interruption; once the run is done, it only evaluates.")
    add = parser.add_argument
    add("--data-dir", default="datasets", help="where the files are (default: datasets)")
    add("--out", help="folder of the run (default: runs/DATASET), or of the segments")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    add("--eval", action="store_true", help="only evaluate the run, or each --model")
    add("--model", nargs="+", metavar="RUN", help="folders of runs, or names on the hub")
    add("--split", default="test", choices=data.SPLITS, help="what to evaluate on (default: test)")
    add("--foreground", action="store_true", help="also print IoU and Dice of the foreground")
    add("--segment", nargs="+", metavar="PATH", help="segment images, or folders of them")
    group = parser.add_argument_group("settings, by default the paper's [with --small, and for shapes]")
    for f in dataclasses.fields(Settings):
        default = f"default: {f.default}" + (f" [{SMALL[f.name]}]" if f.name in SMALL else "")
        choices, kind = f.metadata["choices"], f.type.__name__.upper()
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else kind)
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how, help=(
            f.metadata["help"] + (" (default: shapes)" if f.name == "dataset" else f" ({default})")))
    return parser.parse_args(arguments)

def pick_device(name):
    """The device, and what to call it."""
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device, _ = torch.device(name), torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise SettingsError(f"--device {name} is of no use here ({str(e).splitlines()[0]}); try auto.") from e
    gpu = device.type == "cuda"
    return device, torch.cuda.get_device_name(device) if gpu else f"{name}, {torch.get_num_threads()} threads"

def train_run(s, run, data_dir, device, device_name):
    """Say what will be done, where, and about how long; train a run to its end."""
    scenes, val = (data.load(s.dataset, split, data_dir, s.limit, s.size) for split in ("train", "val"))
    val = dataclasses.replace(val, images=val.images[:256], labels=val.labels[:256])
    model = ASTSeg(s).to(device)  # one to take the time of a step with
    for _ in range(2):  # the first step is slower
        began = time.time()
        training_loss(model, torch.rand(s.batch_size, 3, s.size, s.size, device=device), 3, 0)[0].backward()
        model.log_alpha_0.grad.item()  # wait for the device
    minutes = (time.time() - began) * (run.total - run.saved["t"]) / 60
    print(f"AST-Seg on {len(scenes)} {s.dataset} scenes of {s.size}x{s.size}, into {run.folder}: "
          f"{s.background_steps} steps of phase 1, {s.phase2_steps} of 2, {s.steps - s.phase2_steps} of 3,\n"
          f"on {device_name}, about {minutes:.0f} minutes.", flush=True)
    torch.manual_seed(s.seed)
    model = ASTSeg(s).to(device)
    if s.generator == "b3" and s.backbone != "random" and not run.checkpoint.exists():
        model.feature_maps.load_backbone("nvidia/mit-b3" if s.backbone == "auto" else s.backbone)
    train(model, scenes, val, run, device)

def load_model(source, device):
    """The model of a run's folder, of a folder of its own, or of a name on the hub, in evaluation mode."""
    folder = Path(source, "model") if Path(source, "model").is_dir() else source
    try:
        return ASTSeg.from_pretrained(folder, strict=True).to(device).eval()
    except Exception as e:  # the libraries have many ways to refuse a missing, damaged or foreign folder
        raise SettingsError(f"There is no model in {source} ({repr(e).splitlines()[0][:200]}): train one, or "
                            "give a run's folder or a name on the hub with --model.") from e

@torch.no_grad()
def evaluate_model(source, dataset, split, data_dir, limit, device, device_name):
    """Score a model; leave numbers and pictures in its folder. Returns (dataset, mean by metric)."""
    model, folder = load_model(source, device), Path(source if Path(source).is_dir() else f"runs/{source}")
    s, log, frames = model.settings, read_log(folder / "log.jsonl"), sorted(folder.glob("frames/*.png"))
    scenes = data.load(dataset := dataset or s.dataset, split, data_dir, limit, s.size)
    print(f"Evaluating {source} on {len(scenes)} {dataset} scenes ({split}).")
    scores = evaluate(model, scenes, device, progress=True)
    means = {name: values.mean().item() for name, values in scores.items()}
    if (dataset, split, limit) != (s.dataset, "test", s.limit):  # not the run's own result
        folder = folder / (f"{dataset}-{split}" + f"-{limit}" * (limit > 0))
    folder.mkdir(parents=True, exist_ok=True)
    results = {"dataset": dataset, "split": split, "images": len(scenes), **means, "device": device_name,
               "trained": log[-1] if log else None, "settings": vars(s), "python": sys.version,
               "versions": {p: version(p) for p in ("torch", "transformers", "numpy", "scipy", "pillow")}}
    replace(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    np.savez(folder / "scores.npz", **scores)
    pictures = Pictures(model, scenes, device)
    for name in ("segmentations", "objects", "equivariance"):
        getattr(pictures, name)(folder / f"{name}.png")
    if frames:
        plot_curves(log, folder / "curves.png")
        first, *rest = map(Image.open, frames)
        first.save(folder / "training.gif", save_all=True, append_images=rest, duration=500, loop=0)
    return dataset, means

def print_table(dataset, runs, foreground):
    """Our scores, and the paper's for the dataset. runs: by name, mean by metric."""
    names = [name for name in (*METRICS, "MSE") if foreground or name not in ("IoU", "Dice")]
    rows = {f"on {dataset}": {k: k for k in names}}
    rows |= {name: {k: f"{v:.2f}" for k, v in means.items()} for name, means in runs.items()}
    if len(runs) > 1:
        columns = {k: [means[k] for means in runs.values()] for k in next(iter(runs.values()))}
        rows["mean"] = {k: f"{np.mean(v):.2f}±{np.std(v, ddof=1):.2f}" for k, v in columns.items()}
    for training, text in zip(("BT", "CT"), PAPER.get(dataset, ())):
        rows[f"paper, B3-{training}"] = dict(zip(("mIoU", "ARI-FG", "MSC-FG", "MSE"), text.split()))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{row.get(k, '-'):>13}" for k in names))

@torch.no_grad()
def segment_files(paths, source, out, device):
    """Label and overlay each image, in its own size, and say where its objects are, in its own pixels."""
    files = [f for p in map(Path, paths) for f in ([p] if p.is_file() else sorted(p.rglob("*")))
             if f == p or f.suffix.lower() in data.SUFFIXES]
    if not files:
        raise SettingsError(f"There is no image in {', '.join(paths)}; give images, or folders of them.")
    model, out, found = load_model(source, device), Path(out), {}
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(files)} images with {source} on {device}; look at overlays, labels, objects.json in {out}.")
    for start in tqdm(range(0, len(files), 16), desc="segmenting", unit="batch"):
        images, size = [data.read_image(file, ()) for file in files[start:start + 16]], model.settings.size
        small = np.stack([Image.fromarray(image).resize((size, size), Image.BILINEAR) for image in images])
        latents = model.encode(torch.from_numpy(small).to(device).permute(0, 3, 1, 2).float() / 255)
        for i, (file, image) in enumerate(zip(files[start:], images)):
            one, (h, w), name = Latents(*(v[i:i + 1] for v in latents)), image.shape[:2], file.as_posix()
            zoom = max(1, max(h, w) / 512)  # larger pictures are drawn smaller, and their labels enlarged
            masks = model.draw(one, math.ceil(h / zoom), math.ceil(w / zoom))[1]
            labels = layer_weights(masks, one.log_alpha, model.log_alpha_0).argmax(1)[0].byte().cpu().numpy()
            flat = Image.fromarray(labels).resize((w, h), Image.NEAREST)
            stem = name.replace("_", "__").replace("/", "_")  # no two names become one
            flat.putpalette((255 * PALETTE).astype(np.uint8).tobytes())
            flat.save(out / f"{stem}_labels.png")
            labels, found[name] = np.asarray(flat), []
            mix = np.where(labels[..., None] > 0, image / 2 + 127.5 * PALETTE[labels], image)
            Image.fromarray(mix.astype(np.uint8)).save(out / f"{stem}_overlay.png")
            for k in np.unique(labels[labels > 0]).tolist():
                rows, columns = np.nonzero(labels == k)
                x, y, alpha = (v[0, k - 1].item() for v in (one.x, one.y, one.log_alpha.exp()))
                box = [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
                found[name].append({"label": k, "x": (x + 1) * w / 2, "y": (y + 1) * h / 2, "alpha": alpha,
                                    "s": one.s[0, k - 1].tolist(), "box": box, "area": len(rows)})
    replace(out / "objects.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))

def main(arguments=None):
    """Returns the exit code: 0, 2 for what cannot be done, 130 if the user stopped it."""
    given = vars(parse_arguments(arguments))
    data_dir, out, device, only_evaluate, models, split, foreground, paths = (given.pop(name) for name in (
        "data_dir", "out", "device", "eval", "model", "split", "foreground", "segment"))
    try:
        s, (device, name) = make_settings(**given), pick_device(device)
        if paths:
            segment_files(paths, (models or [f"runs/{s.dataset}"])[0], out or "segments", device)
            return 0
        if not models:
            run, models = Run(out or f"runs/{s.dataset}", s), [out or f"runs/{s.dataset}"]
            if not only_evaluate and run.saved["t"] < run.total:
                train_run(s, run, data_dir, device, name)
        dataset, runs = given.get("dataset"), {}
        for source in models:
            dataset, runs[source] = evaluate_model(source, dataset, split, data_dir, s.limit, device, name)
        print_table(dataset, runs, foreground)
        return 0
    except KeyboardInterrupt:
        print("Stopped. With the same command a training goes on from its last checkpoint.", file=sys.stderr)
        return 130
    except (SettingsError, data.DataError, OSError) as e:
        hint = "; check the path, its permissions and the room on the disk" if isinstance(e, OSError) else ""
        print(f"ast_seg.py: {e}{hint}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
