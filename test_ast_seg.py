"""What is true of AST-Seg, and how do we know? The second half of the lesson, beside ast_seg.py.

Each test states a truth, and holds the program against an authority that shares no code with it:
the equation as plain loops in float64, a proof, a table of the paper typed in again, a library, or
a real run. The order is that of the paper.

    pytest test_ast_seg.py
"""
import base64
import gzip
import http.server
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import struct
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; read once, by the imports below
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers  # noqa: F401; now, so that its warnings do not go to the stderr of a test
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

import ast_seg
import data

torch.set_num_threads(1)  # sums are added in the same order everywhere, and quickly on busy cores
CPU = torch.device("cpu")
TINY = dict(  # a run of 18 steps, each in a tenth of a second: 6 of phase 1, 8 of 2, 4 of 3
    background_steps=6, steps=12, phase2_steps=8, batch_size=4, background_batch_size=4,
    lr=1e-3, warmup_steps=2, entropy_warmup_steps=6, entropy_weight=0.01, slots=4, d_t=64,
    d_ff=64, layers=1, s_min=1.3, s_max=24.0, limit=12, log_every=1, validate_every=6)

def tiny(**given):
    """The configuration of a tiny model and run, with changes."""
    return replace(ast_seg.preset("shapes", small=True), **TINY | given)

@pytest.fixture(autouse=True)
def same_randomness_every_time():
    torch.manual_seed(0)

def close(ours, truth, tolerance=1e-5):
    truth = truth.detach() if isinstance(truth, torch.Tensor) else torch.tensor(np.asarray(truth))
    pair = (ours.detach().double(), truth.double())  # of equal shapes, too
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)

def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)

# --- 2. Motivation: soft-argmax, and Proposition 2.1 --------------------------------------------
def softmax_by_hand(logits, window=math.inf):
    """Eq. 11 for one map (h, w). With a window, of the window x window cells around the highest
    one alone, which is Eq. 5 of the keypoint paper's supplement with tau = 1."""
    logits = logits.double().numpy()
    rows, columns = np.indices(logits.shape)
    row, column = np.unravel_index(logits.argmax(), logits.shape)
    distance = np.maximum(abs(rows - row), abs(columns - column))
    phi = np.where(distance <= (window - 1) / 2, np.exp(logits - logits.max()), 0)
    return phi / phi.sum()

def centre_of_mass(phi):
    """sum_p phi(p) p for one map (h, w), as (x, y): x counts columns, y rows."""
    return sum(phi[i, j] * np.array([j, i]) for i, j in np.ndindex(phi.shape))

SHIFTS = list(itertools.product(range(-3, 4), repeat=2))

def shift(phi, u, v):
    """T_uv of Eq. 1: u columns to the right and v rows down, of a map with room for it."""
    return phi.roll((v, u), (-2, -1))

def random_map(total=1.0):
    """(11, 12): positive and negative values with the given sum, and room of 3 cells around."""
    phi = torch.zeros(11, 12, dtype=torch.float64)
    phi[3:-3, 3:-3] = randn(5, 6)
    phi[4, 5] += total - phi.sum()
    return phi

def test_soft_argmax_is_equation_10():
    """sum_p softmax(A)(p) p; and no logit is too large for it."""
    logits = torch.tensor([3, 1e4]).view(2, 1, 1, 1) * randn(2, 3, 5, 8)
    truth = [[centre_of_mass(softmax_by_hand(A)) for A in maps] for maps in logits]
    close(ast_seg.soft_argmax(logits), truth, 1e-13)

C = torch.tensor([0.7, -40.0], dtype=torch.float64)
M = partial(ast_seg.affine_localizer, C=C)

@pytest.mark.parametrize("total", [1.0, 0.0, 0.9, 2.0])
def test_forward_equation_4_is_equivariant_and_affine_where_sums_are_1_and_not_elsewhere(total):
    """Eq. 8 has sum phi where Eq. 9 has 1. So what moves by (u, v) is found (total - 1) (u, v)
    away from there; and if weights sum to `total`, their mixture is found (1 - total) C away."""
    phi = random_map(total)
    for u, v in SHIFTS:
        error = M(shift(phi, u, v)) - (M(phi) + torch.tensor([u, v]))  # Eq. (3)
        close(error, [(total - 1) * u, (total - 1) * v], 1e-12)
    a = torch.tensor([0.3, -2.0, total + 1.7], dtype=torch.float64)
    maps = torch.stack([random_map() for _ in a])
    close(M(torch.einsum("a,ahw->hw", a, maps)) - a @ M(maps), (1 - total) * C, 1e-12)

def test_backward_nothing_else_is_affine_and_equivariant():
    """A map that sums to 1 is a mixture of deltas, so an affine M is known by V_p = M(delta_p):
    M(phi) = sum_p phi(p) V_p. And delta_q is delta_p, shifted by q - p, so Eq. 3 says of them
    V_q - V_p = q - p for all p and q. These linear equations have solutions, and their kernel
    is, for each coordinate, the constants. So V_p = p + C is all there is: Eq. 4."""
    p = np.array([(x, y) for y in range(11) for x in range(12)])  # all pixels, (h w, 2)
    some, others = np.array(list(itertools.permutations(range(len(p)), 2))).T
    E = np.eye(len(p))[others] - np.eye(len(p))[some]  # E V is all V_q - V_p
    assert np.linalg.matrix_rank(E.T @ E) == len(p) - 1  # as of E: the kernel has one dimension
    assert not (E @ np.ones(len(p))).any()  # and constants are in it

    V = np.linalg.lstsq(E.T @ E, E.T @ (p[others] - p[some]), rcond=None)[0]  # (h w, 2)
    V += C.numpy() - V[0]  # of all solutions, ours with C
    np.testing.assert_allclose(E @ V, p[others] - p[some], atol=1e-10)
    np.testing.assert_allclose(V, p + C.numpy(), atol=1e-10)
    phi = random_map()
    close(M(phi), phi.flatten().numpy() @ V, 1e-10)

@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_what_it_buys_a_convolution_finds_what_moved_where_it_moved_to(padding):
    """A convolution is equivariant (Eq. 2) and a soft-argmax is (Eq. 3): so are both together."""
    features = nn.Conv2d(1, 4, 5, padding=2, padding_mode=padding, bias=False).double()
    image = torch.zeros(1, 1, 24, 30, dtype=torch.float64)
    image[0, 0, 9:14, 12:17] = randn(5, 5)

    def find(image):  # the softmax of the logs of positive features divides them by their sum
        return ast_seg.soft_argmax(features(image).square().log())[0]  # (4, 2)
    for u, v in SHIFTS:
        close(find(shift(image, u, v)), find(image) + torch.tensor([u, v]), 1e-10)

def test_what_breaks_it_a_border():
    """A detector of edges, on a bright square before grey. Without padding the square is found 5
    pixels further when it moves by 5. With zeros around the image, its border is an edge as well,
    and one that stays where it is. And of a square that leaves the image a part is gone."""
    detector = torch.tensor([[[[-1.0, 0.0, 1.0]]]], dtype=torch.float64)

    def find(u, padding):
        image = torch.full((1, 1, 24, 40), 0.5, dtype=torch.float64)
        image[..., 8:16, 10 + u:18 + u] = 1.0
        edges = F.conv2d(image, detector, padding=(0, padding))
        return ast_seg.soft_argmax(40 * edges.relu())[0, 0]
    close(find(5, 0) - find(0, 0), [5.0, 0.0], 1e-4)
    assert (find(5, 1) - find(0, 1))[0] < 3
    assert (find(-14, 0) - find(0, 0))[0] > -13

def test_the_object_that_the_model_draws_is_found_wherever_it_slides():
    """The generator draws an object, the spatial transformer puts it somewhere, a convolution and
    a soft-argmax find it: exactly if it moves by whole pixels. In between its outline is sampled
    anew, and the error stays below a quarter of a pixel where the kernel is positive; another one
    may cancel an object but for the outline."""
    h, w = 48, 64
    for _ in range(9):
        mask = ast_seg.ASTSeg(tiny()).double().glimpse_generator(3 * randn(1, 32))[:, 3:].detach()
        kernel = randn(1, 1, 5, 5)

        def find(u, v, kernel):
            where = torch.tensor([[2 * u / w], [2 * v / h], [4.0]], dtype=torch.float64)
            placed = ast_seg.spatial_transformer(mask, where[0], where[1], where[2:], h, w)
            return ast_seg.soft_argmax(F.conv2d(placed, kernel, padding=2).square().log())[0, 0]
        for u, v in [(1, 0), (0, 1), (-20, 3), (7, -14), (19, 15)]:
            close(find(u, v, kernel) - find(0, 0, kernel), [u, v], 1e-9)
        for u, v in [(0.5, 0), (0, 0.5), (7.25, -3.75), (-13.4, 9.9)]:
            moved = find(u, v, kernel.abs()) - find(0, 0, kernel.abs())
            assert (moved - torch.tensor([u, v])).abs().max() < 0.25

@pytest.mark.parametrize("h, w, g", [(48, 64, 16), (64, 64, 32), (9, 5, 4)])
def test_the_spatial_transformer_samples_as_the_library_does(h, w, g):
    """Forward and backward, beyond the border, too: F.affine_grid, where a grid is s (p - x), and
    F.grid_sample."""
    glimpses, x, y, s = randn(7, 4, g, g), randn(7), randn(7), 1 + 5 * torch.rand(7, 2).double()
    inputs = [tensor.requires_grad_() for tensor in (glimpses, x, y, s)]
    upper = torch.stack([s[:, 0], 0 * x, -s[:, 0] * x], -1)
    lower = torch.stack([0 * x, s[:, 1], -s[:, 1] * y], -1)
    grid = F.affine_grid(torch.stack([upper, lower], 1), [7, 4, h, w], align_corners=False)
    library = F.grid_sample(glimpses, grid, align_corners=False)
    ours = ast_seg.spatial_transformer(*inputs, h, w)
    close(ours, library, 1e-12)
    upstream = randn(*ours.shape)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, upstream),
                            torch.autograd.grad(library, inputs, upstream)):
        close(mine, theirs, 1e-10)

def test_the_local_soft_argmax_is_equivariant_but_not_affine():
    """So it does not contradict the proposition. It follows a peak over a floor that stays, which
    holds the whole map back. Of 0.6 delta + 0.4 delta' it sees delta alone; Eq. 4 sees both."""
    def local(logits):
        return ast_seg.affine_localizer(ast_seg.local_softmax(logits, 5))
    logits = torch.zeros(16, 18, dtype=torch.float64)
    logits[6:11, 6:11] = randn(5, 5)
    logits[8, 8] = 6.0
    for u, v in SHIFTS:
        close(local(shift(logits, u, v)) - local(logits), [u, v], 1e-12)
    assert ast_seg.soft_argmax(shift(logits, 3, 0))[0] - ast_seg.soft_argmax(logits)[0] < 2.5

    deltas = torch.zeros(2, 11, 16, dtype=torch.float64)
    deltas[0, 2, 3] = 1
    deltas[1, 8, 13] = 1
    mixture = 0.6 * deltas[0] + 0.4 * deltas[1]
    close(local(deltas.log()), [[3, 2], [13, 8]], 1e-12)
    close(local(mixture.log()), [3, 2], 1e-12)
    close(ast_seg.affine_localizer(mixture), [0.6 * 3 + 0.4 * 13, 0.6 * 2 + 0.4 * 8], 1e-12)

# --- Table 1 of the supplement ------------------------------------------------------------------
def test_the_defaults_are_table_1():
    table_1 = dict(
        background_batch_size=128, background_lr=0.002, background_steps=2500, batch_size=64,
        lr=0.00004, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-9, steps=125000,
        phase2_steps=30000, warmup_steps=5000, entropy_warmup_steps=10000, log_alpha_0=11,
        d_z_what=32, entropy_weight=0.01, s_min=1.3, s_max=24, d_t=256, heads=8, d_ff=512,
        layers=6)
    config = ast_seg.preset("clevr")
    assert {name: getattr(config, name) for name in table_1} == table_1
    assert ast_seg.preset("clevrtex").background_steps == 500000

# --- 4.1 Feature maps and attention (Algorithm 1) -----------------------------------------------
def attend_by_loops(attention, features):
    """Eq. 12-16, with indices from 1 as there. (K, h, w), (d, h, w) -> (K, d + 2)."""
    K, h, w = attention.shape
    triplets = np.zeros((K, len(features) + 2))
    for k, j, i in np.ndindex(K, h, w):
        x = 2 * (i + 1 - 1) / (w - 1) - 1
        y = 2 * (j + 1 - 1) / (h - 1) - 1
        triplets[k] += float(attention[k, j, i]) * np.array([*features[:, j, i].tolist(), x, y])
    return triplets

@pytest.mark.parametrize("anisotropic, window", [(False, 0), (True, 0), (True, 3), (False, 5)])
def test_encode_is_algorithm_1(anisotropic, window):
    """From the generator's maps, all of which learn, to the latents. A multiplication by 5 stands
    for the refinement: it moves some objects beyond the image."""
    model = ast_seg.ASTSeg(tiny(anisotropic=anisotropic, window=window, layers=0)).eval()
    maps = (3 * torch.randn(2, 4 + 1 + anisotropic + 1 + 32, 6, 9)).requires_grad_()
    model.feature_maps.forward = lambda images: maps
    model.refine.forward = lambda triplets: 5 * triplets
    latents = model.encode(torch.rand(2, 3, 64, 64))
    sum(tensor.sum() for tensor in latents[:5]).backward()
    assert maps.grad.any(-1).any(-1).all()
    for n in range(2):
        logits = maps[n, :4].detach()
        attention = np.stack([softmax_by_hand(A, window or math.inf) for A in logits])
        close(latents.attention[n], attention)  # Eq. (11)
        phi = 5 * attend_by_loops(attention, maps[n, 4:])
        s, log_alpha, z_what, x, y = np.split(phi, np.cumsum([1 + anisotropic, 1, 32, 1]), axis=1)
        close(latents.x[n], x[:, 0].clip(-1, 1))
        close(latents.y[n], y[:, 0].clip(-1, 1))
        close(latents.s[n], 1.3 + (24 - 1.3) / (1 + np.exp(-s)))
        close(latents.log_alpha[n], log_alpha[:, 0])
        close(latents.z_what[n], z_what)

@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_bfloat16_is_used_where_it_is_asked_for_but_not_in_the_last_layers(precision):
    """`auto` asks for it on a GPU. Positions need float32: 0.504 comes after 0.5 in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ast_seg.ASTSeg(tiny(precision=precision)).to(device).eval()
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device == "cuda")
    images = torch.rand(2, 3, 64, 64, device=device)
    outputs = [*model.encode(images), *model(images)]
    assert {value.dtype for value in outputs} == {torch.float32}
    for part in (model.feature_maps, model.background):
        seen = []
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        part(images) if part is model.background else model.encode(images)
        last = 2 if part is model.background else 1  # of the image, and of its pixels' positions
        assert set(seen[:-last]) == {torch.bfloat16 if bfloat16 else torch.float32}
        assert set(seen[-last:]) == {torch.float32}

def test_the_decoder_computes_what_the_librarys_own_computes():
    """But for dropout, and to rounding: here at 1/4, 1/8, 1/16 and 1/32 of 96 x 64 pixels."""
    maps = ast_seg.Segformer("tiny", 9).double().eval()
    for parameter in maps.net.decode_head.parameters():
        nn.init.normal_(parameter, std=0.1)  # its biases start at 0
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    close(maps(images), maps.net(images).logits, 1e-12)

def test_the_feature_maps_are_those_of_segformer_b3():
    """47.3 million parameters and heads of 64 numbers, as in [48], for K + d_phi maps of a quarter
    of the image's side, where d_phi = 1 + 1 + 32, or 2 + 1 + 32 with two scales."""
    for name, channels in (("clevr", 10 + 34), ("clevrtex", 10 + 35)):
        with torch.device("meta"):  # shapes without numbers
            maps = ast_seg.ASTSeg(ast_seg.preset(name)).feature_maps
        shape = maps.net(torch.rand(2, 3, 128, 96, device="meta")).logits.shape
        assert shape == (2, channels, 32, 24)
    assert sum(p.numel() for p in maps.parameters()) == pytest.approx(47.3e6, rel=0.002)
    widths = np.array(maps.net.config.hidden_sizes)
    assert (widths / maps.net.config.num_attention_heads == 64).all()

def test_a_pretrained_backbone_comes_from_a_folder_and_the_decoder_stays_random(tmp_path):
    backbone = ast_seg.Segformer("tiny", 9).net.segformer
    backbone.save_pretrained(tmp_path)
    model = ast_seg.Segformer("tiny", 20)
    decoder = [weight.clone() for weight in model.net.decode_head.parameters()]
    model.load_backbone(str(tmp_path))
    ours = model.net.segformer.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in backbone.state_dict().items())
    assert all(map(torch.equal, decoder, model.net.decode_head.parameters()))

def trace(network, *inputs):
    """Its layers in turn, as rows of Table 2: of convolutions kernel, size, channels, stride and
    padding, then norm and activation."""
    words = []
    pad = 0

    def note(layer, args, out):
        nonlocal pad
        if isinstance(layer, nn.ZeroPad2d):  # what the next convolution would do itself
            pad = layer.padding[0]
            return
        row = type(layer).__name__
        if isinstance(layer, nn.GroupNorm):
            row += f" {layer.num_groups},{layer.num_channels}"
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            row += f" {layer.kernel_size[0]} {out.shape[2]} {out.shape[1]}"
            stride = layer.stride[0]
            more = -stride if isinstance(layer, nn.ConvTranspose2d) else 1  # it cuts its output
            row += f" {stride} {layer.padding[0] + more * pad}"
            pad = 0
            row += " bias" * (layer.bias is not None)
        if len(args[0]) == len(inputs[0]):  # not what is computed once for all of the batch
            words.append(row)
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    network(*inputs)
    return " ".join(words)

def rows(*parts):
    return " ".join(" ".join(parts).split())

def test_the_unet_is_table_3_layer_by_layer():
    """Its d_Phi is K + d_phi = 44 here; images of 64 x 64. The text says what the blocks are."""
    norm = "BatchNorm2d CELU"
    down = [f"Conv2d 4 {size} {c} 2 1 {norm} Conv2d 3 {size} {c} 1 1 {norm}"
            for c, size in ((128, 32), (192, 16), (256, 8), (256, 4), (256, 2))]
    up = [f"Conv2d 3 {size} {both} 1 1 {norm} ConvTranspose2d 4 {2 * size} {c} 2 1 {norm}"
          for size, both, c in ((2, 512, 256), (4, 512, 256), (8, 512, 192), (16, 384, 128),
                                (32, 256, 80))]  # from below and from across
    ours = trace(ast_seg.UNet("unet", 44), torch.rand(2, 3, 64, 64))
    assert ours == rows(
        f"Conv2d 3 64 80 1 1 {norm}", *down, f"Conv2d 3 2 256 1 1 {norm}", *up,
        f"Conv2d 3 64 44 1 1 {norm} Conv2d 3 64 44 1 1 bias Conv2d 1 64 44 1 0 bias")

@pytest.mark.parametrize("name, cell", [("unet-small", 4), ("unet-fine", 2)])
def test_the_unet_joins_levels_of_equal_size_and_its_residual_blocks_add_their_input(name, cell):
    unet = ast_seg.UNet(name, 5).eval()
    images = torch.rand(2, 3, 64, 128)
    across = [unet.first(images)]
    for down, residual in unet.down:
        x = down(across[-1])
        across.append(x + residual[0](x))
    x = unet.centre(across[-1])
    for residual, up in unet.up:
        x = torch.cat([x, across.pop()], 1)
        x = up(x + residual[0](x))
    x = unet.last[0](torch.cat([x, across.pop()], 1))
    x = unet.classifier(x + nn.Sequential(*unet.last[1])(x))
    assert x.shape == (2, 5, 64 // cell, 128 // cell)
    close(unet(images), x)

def test_blocks_of_the_small_unets_cannot_tell_places_by_the_border():
    """Of a constant map they make one that repeats itself after 2 cells, the stride of the blocks
    that enlarge it: else Eq. 2 would not hold. With the zeros of Table 3 the border is seen."""
    deviations = []
    for name in ("unet-small", "unet-fine", "unet"):
        _, first, pad = ast_seg.UNETS[name]
        shapes = [(*first, pad), (4, 2, pad), (3, 1, pad), (4, 2, pad, nn.ConvTranspose2d, 3)]
        blocks = [ast_seg.conv_block(3, 3, *shape).eval() for shape in shapes]
        outs = [block(torch.ones(1, 3, 16, 16)) for block in blocks]
        deviations.append([max(out[..., i::2, j::2].std((2, 3)).max().item()
                               for i in (0, 1) for j in (0, 1)) for out in outs])
    assert max(deviations[0] + deviations[1]) < 1e-6 and min(deviations[2]) > 1e-3

# --- 4.1 Refinement -----------------------------------------------------------------------------
def test_the_transformer_is_that_of_table_1():
    """PyTorch's own, with its defaults: norms after the branches, ReLU, a dropout of 0.1."""
    with torch.device("meta"):
        refine = ast_seg.ASTSeg(ast_seg.preset("clevr")).refine
    assert refine.embed.weight.shape == (256, 36) and refine.project.weight.shape == (36, 256)
    assert len(refine.encoder.layers) == 6 and refine.encoder.norm is None
    for layer in refine.encoder.layers:
        assert (layer.self_attn.num_heads, layer.linear1.out_features) == (8, 512)
        assert (layer.dropout.p, layer.norm_first, layer.activation) == (0.1, False, F.relu)

@pytest.mark.parametrize("generator", ["tiny", "unet-small"])
def test_sharpness_is_a_power_of_the_first_attention_maps_and_of_nothing_else(generator):
    """A softmax of logits three times as large is the cube of the softmax, normalised."""
    images = torch.rand(3, 3, 64, 64)
    models = []
    for sharpness in (1.0, 3.0):
        torch.manual_seed(0)
        model = ast_seg.ASTSeg(tiny(generator=generator, sharpness=sharpness)).double().eval()
        models.append(model)
    plain, sharp = (model.encode(images.double()).attention for model in models)
    close(sharp, plain**3 / (plain**3).sum((2, 3), keepdim=True), 1e-10)
    assert (sharp.amax((2, 3)) > plain.amax((2, 3))).all()
    maps, others = (model.feature_maps(images.double())[:, 4:] for model in models)
    close(others, maps, 1e-12)

def test_a_mask_bias_lowers_the_first_logits_of_the_masks_and_nothing_else():
    z_what = torch.randn(5, 32, dtype=torch.float64)
    glimpses = []
    for mask_bias in (0.0, -3.0):
        torch.manual_seed(0)
        model = ast_seg.ASTSeg(tiny(mask_bias=mask_bias)).double()
        glimpses.append(model.glimpse_generator(z_what).logit())
    difference = torch.zeros_like(glimpses[0])
    difference[:, 3] = -3
    close(glimpses[1] - glimpses[0], difference, 1e-6)  # the bias is float32

@pytest.mark.parametrize("residual", [False, True])
def test_the_refinement_treats_queries_alike_and_may_start_as_the_identity(residual):
    """Permuting the queries permutes what comes out. They see each other, or else start as they
    are, which does not last: after one step of gradient descent every weight has a gradient."""
    refine = ast_seg.Refinement(36, tiny(layers=3, residual=residual)).eval()
    triplets = torch.randn(64, 5, 36)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(refine(triplets)[:, order], refine(triplets[:, order]))
    changed = torch.cat([triplets[:, :1] + 1, triplets[:, 1:]], 1)
    effect = (refine(changed) - refine(triplets))[:, 1:].abs().max()
    assert (effect > 1e-3) == (not residual)
    distance = (refine(triplets) - triplets).norm() / triplets.norm()
    assert distance == 0 if residual else distance > 0.5

    descent = torch.optim.SGD(refine.parameters(), 0.1)
    for _ in range(2):
        descent.zero_grad()
        refine(triplets).pow(3).mean().backward()
        descent.step()
    assert all(parameter.grad.any() for parameter in refine.parameters())

# --- 4.1 Rendering (Algorithm 2) ----------------------------------------------------------------
TABLE_2 = {  # for images of 64x64 and of 128x128
    "objects_room": """ConvTranspose2d 2  2  64 2 0 GroupNorm 4,64 CELU
                       ConvTranspose2d 4  4  32 2 1 GroupNorm 2,32 CELU
                       ConvTranspose2d 4  8  16 2 1 GroupNorm 1,16 CELU
                       ConvTranspose2d 4 16   8 2 1 GroupNorm 1,8  CELU
                       ConvTranspose2d 4 32   4 2 1 bias Sigmoid""",
    "clevr":        """ConvTranspose2d 2  2 128 2 0 GroupNorm 8,128 CELU
                       ConvTranspose2d 4  4  64 2 1 GroupNorm 4,64 CELU
                       ConvTranspose2d 4  8  32 2 1 GroupNorm 2,32 CELU
                       ConvTranspose2d 4 16  16 2 1 GroupNorm 1,16 CELU
                       ConvTranspose2d 4 32   8 2 1 GroupNorm 1,8  CELU
                       ConvTranspose2d 4 64   4 2 1 bias Sigmoid"""}

@pytest.mark.parametrize("name", TABLE_2)
def test_the_glimpse_generator_is_table_2_row_by_row(name):
    with torch.device("meta"):
        generator = ast_seg.ASTSeg(ast_seg.preset(name)).glimpse_generator
        assert trace(generator, torch.rand(1, 32)) == rows("Unflatten", TABLE_2[name])

def place(glimpse, x, y, s_x, s_y, h, w):
    """The spatial transformer by loops: (c, g, g) -> (c, h, w). Pixel j of w has its centre at
    (2 j + 1) / w - 1. Between its pixels a glimpse is bilinear, beyond the last it fades to 0."""
    c, g, _ = glimpse.shape
    placed = np.zeros((c, h, w))
    for i, j in np.ndindex(h, w):
        column = ((s_x * ((2 * j + 1) / w - 1 - x) + 1) * g - 1) / 2  # in pixels of the glimpse
        row = ((s_y * ((2 * i + 1) / h - 1 - y) + 1) * g - 1) / 2
        for a, b in itertools.product((0, 1), repeat=2):
            r = math.floor(row) + a
            q = math.floor(column) + b
            if 0 <= r < g and 0 <= q < g:
                placed[:, i, j] += (1 - abs(row - r)) * (1 - abs(column - q)) * glimpse[:, r, q]
    return placed

@pytest.mark.parametrize("anisotropic", [False, True])
def test_render_is_algorithm_2(anisotropic):
    """Object by object: place the glimpse by loops; Eq. 17 with M_0 = 1; Eq. 18. And all latents
    learn."""
    model = ast_seg.ASTSeg(tiny(log_alpha_0=0.5, anisotropic=anisotropic)).double().eval()
    x = 2 * torch.rand(2, 3, dtype=torch.float64) - 1
    y = 2 * torch.rand(2, 3, dtype=torch.float64) - 1
    s = 1.3 + 3 * torch.rand(2, 3, 1 + anisotropic, dtype=torch.float64)
    z_what = 2 * randn(2, 3, 32)
    latents = ast_seg.Latents(x, y, s, 2 * randn(2, 3), z_what, attention=None)
    background = randn(2, 3, 7, 10)
    learning = [tensor.requires_grad_() for tensor in latents[:5]]
    scene = model.render(latents, background)
    scene.image.sum().backward()
    assert all(tensor.grad.any() for tensor in learning)
    for n in range(2):
        layers = [background[n].numpy()]
        masks = [np.ones((7, 10))]
        for k in range(3):
            glimpse = model.glimpse_generator(z_what[n, k][None])[0].detach().numpy()
            where = x[n, k].item(), y[n, k].item(), s[n, k, 0].item(), s[n, k, -1].item()
            placed = place(glimpse, *where, 7, 10)
            layers.append(placed[:3])
            masks.append(placed[3])
        alphas = np.exp([0.5, *latents.log_alpha[n].tolist()])
        claims = alphas[:, None, None] * np.stack(masks)
        w = claims / claims.sum(0)  # Eq. (17)
        close(scene.layers[n], np.stack(layers[1:]), 1e-12)
        close(scene.weights[n], w, 1e-12)
        close(scene.image[n], sum(w[k] * layers[k] for k in range(4)), 1e-12)  # Eq. (18)

@pytest.mark.parametrize("log_alpha_0", [-100.0, 100.0])
@pytest.mark.parametrize("log_alphas", [(100.0, -100.0, 100.0), (-100.0, -100.0, -100.0)])
def test_no_activation_overflows(log_alpha_0, log_alphas):
    """e^100 is beyond float32. The weights are those of Eq. 17 all the same, and have finite
    gradients, also where masks are 0, or as small as numbers get."""
    masks = torch.rand(2, 3, 5, 6)
    masks[:, :, 0] = 0
    masks[:, 1, 1] = 1e-38
    inputs = [masks, torch.tensor([log_alphas] * 2), torch.tensor(log_alpha_0)]
    for tensor in inputs:
        tensor.requires_grad_()
    weights = ast_seg.layer_weights(*inputs)
    alphas = torch.tensor([log_alpha_0, *log_alphas], dtype=torch.float64).exp()
    claims = alphas[:, None, None] * torch.cat([torch.ones(2, 1, 5, 6), masks], 1).double()
    close(weights, claims / claims.sum(1, keepdim=True))
    (ast_seg.pixel_entropy_loss(weights) + (weights * torch.rand(2, 4, 5, 6)).sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)

def many_labels(**given):
    """A model that shows objects before any training."""
    model = ast_seg.ASTSeg(tiny(log_alpha_0=-1.0, s_max=2.5, **given))
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64))  # in training mode: batch norm learns the mean of images
    return model.eval()

def test_segment_is_the_arg_max_of_the_weights_and_never_calls_the_background_model():
    model = many_labels()
    images = torch.rand(3, 3, 64, 64)
    scene = model(images)
    close(scene.image, model.render(model.encode(images), model.background(images)[:, :3]).image)
    wide = model.render(model.encode(images), torch.zeros(3, 3, 32, 128)).weights.argmax(1)
    del model.background
    assert torch.equal(model.segment(images), scene.weights.argmax(1))
    assert torch.equal(model.segment(images, 32, 128), wide)  # in any size
    assert len(wide.unique()) > 1 and 0 in wide

    for wrong in (images[0], images[:, :, 1:], (255 * images).byte()):
        with pytest.raises(ValueError, match=r"float32 \(n, 3, 64, 64\) in \[0, 1\], not torch"):
            model.segment(wrong)

# --- 4.1 The background model, reference [38] ---------------------------------------------------
FACTS = {  # kind and image side: channels of the encoder; of the generator, from image to code
    ("simple", 128): ("3 64 160 320 160 160 32 16", "4 144 256 512 256 256 32 16"),
    ("simple", 64): ("3 64 160 320 160 32 16", "4 144 256 512 256 32 16"),
    ("complex", 128): ("3 64 320 640 640 320 16 16", "4 144 640 1280 640 320 16 16"),
    ("complex", 64): ("3 64 160 320 160 16 16", "4 144 640 1280 640 16 16")}

@pytest.mark.parametrize("kind, size", FACTS)
def test_the_background_model_has_the_channels_of_its_table(kind, size):
    """Blocks halve the image down to a code of 16 numbers, and double it again."""
    encoder, generator = ([int(c) for c in line.split()] for line in FACTS[kind, size])
    blocks = []
    for i in reversed(range(len(encoder) - 1)):  # from the code outwards
        side = size >> i
        kernel, step = {2: (2, "1 0"), 4: (4, "2 1")}.get(side, (5, "2 2"))
        norms = [f"GroupNorm {max(1, c // 16)},{c} CELU" for c in (encoder[i + 1], generator[i])]
        blocks.insert(0, f"Conv2d {kernel} {side // 2} {encoder[i + 1]} {step} {norms[0]}")
        blocks.append(f"ConvTranspose2d {kernel} {side} {generator[i]} {step} {norms[1]}")
    blocks[-1] = blocks[-1].replace(norms[1], "Sigmoid")
    model = ast_seg.Background(tiny(background=kind, size=size))
    assert trace(model, torch.rand(2, 3, size, size)) == rows(*blocks)

def test_every_block_of_the_background_model_knows_where_its_pixels_are():
    """Its convolution sees two inputs more: j / (w - 1) - 0.5 and i / (h - 1) - 0.5, or 1 and 1.
    The first one sees images from 0 to 255."""
    model = ast_seg.Background(tiny(background_input=255.0)).double()
    inputs = []

    def check(block, args, out):
        inputs.append(*args)
        side = inputs[-1].shape[-1]
        i, j = np.indices((side, side)) / max(side - 1, 1) - (0.5 if side > 1 else -1)
        positions = torch.tensor(np.stack([j, i])).expand(2, -1, -1, -1)
        close(out, nn.Sequential.forward(block, torch.cat([inputs[-1], positions], 1)), 1e-12)
    for block in (*model[0], *model[1]):
        block.register_forward_hook(check)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    model(images)
    assert [x.shape[-1] for x in inputs] == [64, 32, 16, 8, 4, 2, 1, 2, 4, 8, 16, 32]
    close(inputs[0], 255 * images)

# --- 4.2.1 Losses -------------------------------------------------------------------------------
def background_loss_by_hand(output, image, robustness=1.0):
    """The loss of [38] and its gradient for the output, where weights and e count as constants if
    the text stops their gradient. (n, 4, h, w), (n, 3, h, w) -> number, (n, 4, h, w)."""
    def smooth_l1(d, beta=3 / 255):
        return np.where(abs(d) < beta, d * d / beta / 2, abs(d) - beta / 2)

    def slope(d, beta=3 / 255):
        return np.clip(d / beta, -1, 1)
    n, _, h, w = image.shape
    r = w // 75
    d = output[:, :3] - image
    e = smooth_l1(d).sum(1)
    noise = output[:, 3] - e / 3
    m = np.tanh(e / 0.25)
    blurred = [m[b, max(0, i - r):i + r + 1, max(0, j - r):j + r + 1].mean()
               for b, i, j in np.ndindex(m.shape)]
    weight = np.exp(-6 * robustness * np.reshape(blurred, m.shape)) / (n * h * w)
    loss = (weight * (e + robustness * smooth_l1(noise))).sum()
    gradients = [weight[:, None] * slope(d), robustness * (weight * slope(noise))[:, None]]
    return loss, np.concatenate(gradients, 1)

@pytest.mark.parametrize("h, w", [(5, 20), (6, 80), (7, 160)], ids=["window 1", "3", "5"])
def test_the_background_loss_is_that_of_38_and_its_weights_carry_no_gradient(h, w):
    """If the weights had a gradient, or the error channel one into e, the second would differ."""
    image = torch.rand(2, 3, h, w, dtype=torch.float64)
    output = torch.cat([image + 0.1 * randn(2, 3, h, w) ** 3, torch.rand(2, 1, h, w) / 20], 1)
    output.requires_grad_()
    loss = ast_seg.background_loss(output, image)
    truth, gradient = background_loss_by_hand(output.detach().numpy(), image.numpy())
    assert loss.item() == pytest.approx(truth, rel=1e-10)
    loss.backward()
    close(output.grad, gradient, 1e-10)

@pytest.mark.parametrize("warmup, t, robustness", [
    (0.0, 0, 1.0), (0.9, 0, 0.0), (0.9, 450, 0.25), (0.9, 900, 1.0), (0.9, 999, 1.0)])
def test_the_loss_of_phase_1_is_the_background_loss_which_may_become_robust(warmup, t, robustness):
    model = ast_seg.ASTSeg(tiny(background_steps=1000, robustness_warmup=warmup))
    images = torch.rand(1, 3, 64, 64)
    loss, losses = ast_seg.training_loss(model, images, 1, t)
    output = model.background(images).detach().double().numpy()
    truth, _ = background_loss_by_hand(output, images.double().numpy(), robustness)
    assert loss.item() == losses["background"].item() == pytest.approx(truth)

@pytest.mark.parametrize("step, share", [(0, 0), (5000, 0.25), (10_000, 1), (12_000, 1)])
def test_the_loss_of_phases_2_and_3_is_equation_22(step, share):
    """Steps count from the start of phase 2, and the entropy's weight warms up quadratically."""
    model = many_labels(entropy_warmup_steps=10_000, entropy_weight=0.7)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        scene = model(images)
        loss, losses = ast_seg.training_loss(model, images, 3, 6 + step)
    image, image_hat, w = (np.float64(tensor) for tensor in (images, scene.image, scene.weights))
    reconstruction = (abs(image_hat - image).sum(1) ** 2).mean()  # Eq. (19), (20)
    entropy = ((w * np.log(w + 1e-20)).sum(1) ** 2).mean()  # Eq. (21)
    assert reconstruction > 0.01 and entropy > 0.01
    assert losses["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-5)
    assert losses["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert loss.item() == pytest.approx(reconstruction + share * 0.7 * entropy, rel=1e-5)

# --- 4.2.2 Curriculum training ------------------------------------------------------------------
@pytest.mark.parametrize("phase, t, rate", [
    (1, 0, 2e-3), (1, 1999, 2e-3), (1, 2000, 2e-4), (1, 2499, 2e-4),  # a tenth after 80 %
    (2, 2500, 0), (2, 2550, 4e-9), (2, 5000, 1e-5), (2, 7500, 4e-5), (2, 32_499, 4e-5),  # warm-up
    (3, 32_500, 4e-5), (3, 114_999, 4e-5), (3, 115_000, 4e-6), (3, 127_499, 4e-6)])  # 90 %
def test_the_learning_rate_of_the_paper_at_its_corners(phase, t, rate):
    assert ast_seg.learning_rate(ast_seg.preset("clevr"), phase, t) == pytest.approx(rate)

def test_a_new_phase_has_a_new_adam_over_what_it_trains():
    model = ast_seg.ASTSeg(tiny(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7))
    background = set(model.background.parameters())
    everything = set(model.parameters())
    for phase, learning in (1, background), (2, everything - background), (3, everything):
        model.background.requires_grad_(phase != 2)
        adam = ast_seg.make_optimizer(model, phase)
        (group,) = adam.param_groups
        assert type(adam) is torch.optim.Adam and not adam.state
        assert set(group["params"]) == learning and group["weight_decay"] == 0
        assert group["betas"] == ((0.9, 0.999) if phase == 1 else (0.8, 0.9))
        assert group["eps"] == (1e-8 if phase == 1 else 1e-7)

@pytest.fixture()
def no_pictures(monkeypatch):
    """They take longer than the steps."""
    monkeypatch.setattr(ast_seg, "draw_segmentations", lambda *_, **__: None)
    monkeypatch.setattr(data, "draw_curves", lambda *_, **__: None)

def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def train(folder, **given):
    """A real run. Returns its log."""
    ast_seg.train(tiny(**given), folder, str(folder / "data"), CPU)
    return read_log(folder)

def test_training_learns(tmp_path, no_pictures):
    """Sixty steps of phase 1 on one drawn scene more than halve the background loss. Here it does
    not become robust, since a robust loss is also small where all is badly rebuilt."""
    log = train(tmp_path, background_steps=60, steps=1, background_lr=2e-3, limit=1,
                robustness_warmup=1e6, validate_every=99)
    losses = [line["background"] for line in log[:60]]
    assert np.mean(losses[-5:]) < losses[0] / 2

def test_scenes_are_moved_after_a_share_of_phases_2_and_3(tmp_path, monkeypatch, no_pictures):
    training_loss = ast_seg.training_loss
    seen = {0: [], 2: []}
    monkeypatch.setattr(ast_seg, "training_loss", lambda model, images, *step: (
        seen[model.config.shift].append(images), training_loss(model, images, *step))[1])
    for shift in seen:
        train(tmp_path / str(shift), shift=shift, shift_from=0.5, validate_every=99)
    same = [torch.equal(*batches) for batches in zip(seen[0], seen[2])]
    assert all(same[:12]) and sum(same[12:]) <= 1  # of 25 moves one is none

def test_the_small_background_learns_from_an_unlucky_start_too(tmp_path, no_pictures):
    """With twice the rate it stayed a constant grey from this start, 20 levels off, and queries
    drew the backdrop instead."""
    config = replace(ast_seg.preset("shapes", True), slots=8, seed=2, steps=1, phase2_steps=1,
                     validate_every=9999)
    ast_seg.train(config, tmp_path / "run", str(tmp_path), CPU)
    scenes = data.load("shapes", "val", tmp_path, 64)
    images = torch.tensor(scenes.images) / 255
    with torch.no_grad():
        background = ast_seg.load_model(tmp_path / "run", CPU).background(images)[:, :3]
    levels = 255 * (background - images).abs().mean(1)
    assert levels[torch.tensor(scenes.labels) == 0].mean() < 8

def test_each_phase_trains_what_it_should_and_nothing_else(tmp_path, monkeypatch, no_pictures):
    """We look at the gradients of every step of a run. Only phase 1 teaches the expected error."""
    training_loss = ast_seg.training_loss
    seen = []

    def watched_loss(model, images, phase, t):
        assert model.training and images.min() >= 0 and 0.5 < images.max() <= 1
        assert (tmp_path / "background.pt").exists() == (phase > 1)  # it is what phase 1 made
        model.zero_grad()  # what an earlier phase left behind does not count
        loss, losses = training_loss(model, images, phase, t)
        loss.backward(retain_graph=True)
        learning = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        last = model.background[1][-1][0].weight  # (channels, 4, kernel, kernel)
        seen.append((phase, t, learning, last.grad is not None and last.grad[:, 3].any().item()))
        model.zero_grad()
        return loss, losses
    monkeypatch.setattr(ast_seg, "training_loss", watched_loss)
    train(tmp_path, robustness_warmup=0.0, validate_every=2)

    objects = {"feature_maps", "refine", "glimpse_generator", "log_alpha_0"}
    learning = {1: {"background"}, 2: objects, 3: objects | {"background"}}
    phases = [1] * 6 + [2] * 8 + [3] * 4
    assert seen == [(phase, t, learning[phase], phase == 1) for t, phase in enumerate(phases)]

@pytest.mark.parametrize("linear, phase_3", [
    (False, [0.01, 0.01, 0.01]), (True, [0.1, 0.075, 0.05])])  # and 0.025, and then the end
def test_every_step_goes_downhill_by_the_rate_of_its_schedule(tmp_path, monkeypatch, no_pictures,
                                                              linear, phase_3):
    """On a constant slope Adam moves a weight by exactly the rate, whatever its betas are. So what
    a run does to its weights shows the rates."""
    places = []

    def slope(model, images, phase, t):
        weights = [model.background[1][-1][0].weight[0, 0, 0, 0], model.log_alpha_0]
        places.append([weight.item() for weight in weights])
        return sum(weights), {}
    monkeypatch.setattr(ast_seg, "training_loss", slope)
    train(tmp_path, background_steps=5, background_lr=0.1, steps=10, phase2_steps=6, lr=0.1,
          warmup_steps=2, lr_drop_at=0.6, linear_decay=linear, log_alpha_0=1.0)
    rates = [  # background, objects
        [0.1, 0], [0.1, 0], [0.1, 0], [0.1, 0], [0.01, 0],  # phase 1, drop at 80 %
        [0, 0], [0, 0.025], [0, 0.1], [0, 0.1], [0, 0.1], [0, 0.1],  # phase 2: warm-up of 2 steps
        *([rate, rate] for rate in phase_3)]  # it begins at 60 %, where the rate falls
    np.testing.assert_allclose(-np.diff(places, axis=0), rates, atol=1e-6)

# --- 5. Metrics ---------------------------------------------------------------------------------
def iou(a, b):
    """Intersection over union of two sets of pixels, given as masks."""
    return (a & b).sum() / max((a | b).sum(), 1)

@pytest.mark.parametrize("found, objects", [(4, 4), (6, 3), (2, 5), (1, 4), (5, 1)])
def test_the_metrics_are_their_definitions(found, objects):
    """All one-to-one matchings for the IoUs' sum, scikit-learn for ARI, sets of pixels for others.
    Where a missed object meets a false alarm their IoU is 0, matched or not: the evaluator of
    ClevrTex takes the pairs that SciPy returns, and counts those of which one segment is there."""
    rng = np.random.default_rng(0)
    true = rng.integers(objects, size=(20, 5, 7))
    pred = np.stack([rng.permutation(max(found, objects))[labels] % found for labels in true])
    pred = np.where(rng.random(true.shape) < 0.6, pred, rng.integers(found, size=true.shape))
    pred[:2] = 0  # none found
    true[1:4] = 0  # none there
    true[3, 0, 0] = 1  # one of a single pixel, which has no pairs
    table = ast_seg.contingency(torch.from_numpy(pred), torch.from_numpy(true), found)
    scores = {name: metric(table).tolist() for name, metric in ast_seg.METRICS.items()}
    for n, (p, t) in enumerate(zip(pred, true)):
        labels = range(table.shape[1])
        ious = np.array([[iou(p == i, t == j) for j in labels] for i in labels])
        best = max(ious[labels, order].sum() for order in itertools.permutations(labels))
        matched = zip(*linear_sum_assignment(ious.T, maximize=True))
        A = p > 0
        B = t > 0
        there = np.unique(t[B])
        truth = {
            "mIoU": best / sum(i in p or j in t for j, i in matched),
            "ARI-FG": adjusted_rand_score(t[B], p[B]) if B.any() else 1.0,
            "MSC-FG": ious[:, there].max(0).mean() if B.any() else 0.0,
            "IoU": iou(A, B) if (A | B).any() else 1.0,
            "Dice": 2 * (A & B).sum() / (A.sum() + B.sum()) if (A | B).any() else 1.0}
        assert {k: values[n] for k, values in scores.items()} == pytest.approx(truth, abs=1e-12)

@pytest.mark.parametrize("pred, true, miou", [
    ("222030", "031444", 1 / 4), ("000402", "123323", 5 / 18), ("210410", "412404", 1 / 3)])
def test_missed_objects_and_false_alarms_count_as_in_the_evaluator_of_clevrtex(pred, true, miou):
    """Their IoU is 0, matched or not, so that the best matching is open. The evaluator takes that
    of SciPy, of the transposed matrix, and counts the pairs of which one segment is there. With
    the matrix itself these three would be 1/5, 5/24 and 4/15."""
    p, t = (np.array([[[int(label) for label in labels]]]) for labels in (pred, true))
    ours = ast_seg.mean_iou(ast_seg.contingency(torch.from_numpy(p), torch.from_numpy(t), 5))
    ious = np.array([[iou(p == i, t == j) for i in range(5)] for j in range(5)])  # true, predicted
    pairs = list(zip(*linear_sum_assignment(ious, maximize=True)))
    truth = sum(ious[pair] for pair in pairs) / sum(j in t or i in p for j, i in pairs)
    assert ours.item() == pytest.approx(truth) == pytest.approx(miou)

def test_evaluate_scores_every_scene_in_percent(tmp_path):
    """70 scenes are more than a batch. The squared error is summed over channels and pixels."""
    model = many_labels().train()
    scenes = data.load("shapes", "test", tmp_path, 70)
    scores = ast_seg.evaluate(model, scenes, CPU)
    for n in (0, 69):
        image = torch.from_numpy(scenes.images[n:n + 1] / np.float32(255))
        squares = (model(image).image - image).square()
        assert scores["MSE"][n] == pytest.approx(squares.sum().item(), rel=1e-4)
        truth = 100 * iou(model.segment(image)[0].numpy() > 0, scenes.labels[n] > 0)
        assert scores["IoU"][n] == pytest.approx(truth, abs=0.1) and truth > 0

# --- From here on the tests guard the program; skip them on a first reading ---------------------
def contents(folder):
    """{path: bytes} of all files in a folder, but for caches and locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files
            if ".cache" not in path.parts and path.name != "run.lock"}

# --- The program: configuration -----------------------------------------------------------------
@pytest.mark.parametrize("arguments, config", [
    ("", ast_seg.preset("shapes", True)), ("--no-small", ast_seg.preset("shapes")),
    ("--lr 7 --dataset ood --small", replace(ast_seg.preset("ood", True), lr=7)),
    ("--steps=1250 --dataset=ood --warmup-steps=7",
     replace(ast_seg.preset("ood", False, 1250), warmup_steps=7))])
def test_dataset_small_and_steps_choose_the_preset_which_other_flags_override(arguments, config):
    assert ast_seg.parse(arguments.split())[0].config == config

@pytest.mark.parametrize("name, values", {
    "shapes": (64, 6, False, "small", 500_000), "clevr": (128, 10, False, "simple", 2500),
    "clevr6": (128, 6, False, "simple", 2500), "clevrtex": (128, 10, True, "complex", 500_000),
    "objects_room": (64, 3, True, "complex", 500_000)}.items())
def test_a_preset_is_the_facts_of_its_set_then_small_then_a_schedule_in_proportion(name, values):
    names = ("size", "slots", "anisotropic", "background", "background_steps")
    facts = dict(zip(names, values), dataset=name)
    assert ast_seg.preset(name) == ast_seg.Config(**facts)
    small = ast_seg.Config(**facts | ast_seg.SMALL | ast_seg.SMALL_FOR.get(name, {}))
    if facts.get("background") != "complex" and name != "shapes":  # one that never varies
        small = replace(small, robustness_warmup=0.0)
    assert ast_seg.preset(name, small=True) == small
    assert ast_seg.preset(name, steps=1250) == ast_seg.Config(
        **facts, steps=1250, phase2_steps=300, warmup_steps=50, entropy_warmup_steps=100)

# --- The program: a run, and its interruptions --------------------------------------------------
CONFIG = tiny(lr=0.01, log_alpha_0=0.0, s_max=3.0)  # blurred, visible objects
RUN = [f"--{name.replace('_', '-')}={getattr(CONFIG, name)}" for name in (*TINY, "log_alpha_0")]

@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The arguments of the command: `arguments(folder, more flags ...)`."""
    start = ["--device=cpu", f"--data-dir={tmp_path_factory.mktemp('data')}", *RUN]
    return lambda folder, *more: [*start, f"--out={folder}", *map(str, more)]

@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments):
    """The folder of a run of the command."""
    folder = tmp_path_factory.mktemp("command") / "run"
    assert ast_seg.main(arguments(folder)) == 0
    return folder

def test_a_run_leaves_a_model_a_log_pictures_and_the_scores_of_that_model(finished, arguments):
    scored = ("results.json", "scores.npz", "segmentations.png")
    assert contents(finished).keys() == {
        "checkpoint.pt", "background.pt", "log.jsonl", "curves.png", "README.md",
        "config.json", "model.safetensors", *(f"frames/{t:07}.png" for t in (6, 12, 14, 18)),
        *(f"shapes-test-12/{name}" for name in scored)}
    for picture in finished.rglob("*.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 10  # not blank

    phases = 6 * [1] + 8 * [2] + 4 * [3]
    for t, (line, phase) in enumerate(zip(read_log(finished), phases, strict=True)):
        assert (line["t"], line["phase"]) == (t + 1, phase)
        assert line["lr"] == ast_seg.learning_rate(CONFIG, phase, t)
        losses = {"background"} if phase == 1 else {"reconstruction", "entropy"}
        scores = {*ast_seg.METRICS, "MSE"} if line["t"] in (6, 12, 14, 18) else set()
        assert line.keys() == {"t", "phase", "seconds", "lr", "skipped"} | losses | scores

    model = ast_seg.ASTSeg.from_pretrained(finished)
    last = torch.load(finished / "checkpoint.pt")["model"]
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())
    scenes = data.load("shapes", "test", arguments("")[1].removeprefix("--data-dir="), 12)
    truth = ast_seg.evaluate(model, scenes, CPU)
    results = json.loads((finished / "shapes-test-12/results.json").read_text())
    assert results.pop("config") == asdict(CONFIG) and results.pop("torch") == torch.__version__
    assert results.pop("scenes") == "shapes-test-12"
    assert results == {name: values.mean() for name, values in truth.items()}
    scores = np.load(finished / "shapes-test-12/scores.npz")
    assert all(np.array_equal(scores[name], truth[name]) for name in results)
    assert 0 < results["MSC-FG"] < 100

def test_wherever_a_run_is_killed_the_same_command_goes_on_to_the_same_bits(
        finished, tmp_path, arguments, monkeypatch, no_pictures):
    """One run, killed again and again: in a step, or when half of a file is written. A Ctrl-C
    stands for whatever ends a program between two of its lines."""
    folder = tmp_path / "run"
    training_loss = ast_seg.training_loss
    save = torch.save
    export = ast_seg.ASTSeg.save_pretrained

    def deadly_loss(model, images, phase, t):
        if killed == ("step", t):
            raise KeyboardInterrupt
        return training_loss(model, images, phase, t)

    def deadly_save(state, file):
        save(state, file)
        if killed == ("save", state.get("t")):
            file.truncate(999)
            raise KeyboardInterrupt

    def deadly_export(model, folder):
        Path(folder, "model.safetensors").write_bytes(b"half")
        saved = torch.load(folder / "checkpoint.pt")["t"]
        assert saved < 18  # that of the last step means that the model is there
        if killed == ("export", saved):
            raise KeyboardInterrupt
        export(model, folder)
    monkeypatch.setattr(ast_seg, "training_loss", deadly_loss)
    monkeypatch.setattr(torch, "save", deadly_save)
    monkeypatch.setattr(ast_seg.ASTSeg, "save_pretrained", deadly_export)
    for killed, left in (  # and how many steps are in the checkpoint that this leaves
            (("save", 0), None), (("step", 0), 0), (("step", 3), 0),
            (("save", 6), 0), (("step", 6), 6), (("step", 9), 6),  # where phase 2 begins, and 3:
            (("export", 12), 12), (("save", 14), 12), (("step", 14), 14), (("step", 17), 14),
            (("export", 14), 14), (("save", 18), 14)):
        with pytest.raises(KeyboardInterrupt):
            ast_seg.main(arguments(folder))
        if left is not None:
            assert torch.load(folder / "checkpoint.pt")["t"] == left
            with (folder / "log.jsonl").open("a") as file:
                file.write('{"t": 1')  # half a line
    killed = None
    assert ast_seg.main(arguments(folder)) == 0

    truth = contents(finished)
    ours = contents(folder)
    for name in ("model.safetensors", "shapes-test-12/scores.npz"):
        assert ours[name] == truth[name]
    logs = [[line | {"seconds": 0} for line in read_log(run)] for run in (folder, finished)]
    assert logs[0] == logs[1]

def test_so_it_does_after_a_real_process_was_killed(finished, tmp_path, arguments, no_pictures):
    folder = tmp_path / "run"
    log = folder / "log.jsonl"
    command = [sys.executable, ast_seg.__file__, *arguments(folder, "--validate-every=3")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.DEVNULL)
    while not log.exists() or log.read_text().count("\n") < 7:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 1 < torch.load(folder / "checkpoint.pt")["t"] < 18
    assert ast_seg.main(arguments(folder)) == 0
    for name in ("model.safetensors", "shapes-test-12/scores.npz"):
        assert contents(folder)[name] == contents(finished)[name]

def test_a_finished_run_is_only_scored(finished, arguments, monkeypatch, capsys):
    before = contents(finished)
    monkeypatch.setattr(ast_seg, "training_loss", lambda *_: pytest.fail("nothing is left to do"))
    (finished / "shapes-test-12/segmentations.png").unlink()
    for more in (("--log-every=5", "--validate-every=7"), ("--eval", "--lr=7")):
        assert ast_seg.main(arguments(finished, *more)) == 0
        after = contents(finished)
        assert {name: after[name] for name in before} == before
        assert {name.removeprefix("eval-") for name in after} == before.keys()
        assert "Training" not in capsys.readouterr().out

def test_one_process_at_a_time_trains_in_a_folder(finished, arguments, capsys):
    """Meanwhile others score its model."""
    before = contents(finished)
    with data.claim(finished):
        assert ast_seg.main(arguments(finished)) == 2
        assert f"Process {os.getpid()} on " in capsys.readouterr().err
        assert contents(finished) == before
        assert ast_seg.main(arguments(finished, "--eval")) == 0
        assert f"Process {os.getpid()} on " in capsys.readouterr().out
        (finished / "run.lock").write_text("")  # as some versions of filelock do
        assert data.trainer(finished) == "Another process"
    assert data.trainer(finished) == ""
    assert ast_seg.main(arguments(finished)) == 0

def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, monkeypatch, no_pictures):
    """Ten in a row end the run, and the last checkpoint is a good one."""
    bad = {2, 3, 6, *range(8, 18)}
    training_loss = ast_seg.training_loss
    states = []

    def loss(model, images, phase, t):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        loss, losses = training_loss(model, images * math.nan if t in bad else images, phase, t)
        return loss, losses
    monkeypatch.setattr(ast_seg, "training_loss", loss)
    with pytest.raises(data.UserError, match="up to 17, .* smaller --lr"):
        train(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt")
    states.append(saved["model"])
    assert saved["t"] == 14 and saved["skipped"] == 9
    for t, (one, other) in enumerate(itertools.pairwise(states)):
        assert all(torch.equal(one[name], other[name]) for name in one) == (t in bad)
    assert all(value.isfinite().all() for value in states[-1].values())
    for line in read_log(tmp_path):
        lost = line["t"] - 1 in bad
        assert line["skipped"] == sum(t < line["t"] for t in bad)
        assert (None in line.values()) == lost and "NaN" not in json.dumps(line)

@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scenes_without_anything_do_no_harm(precision, tmp_path, monkeypatch, no_pictures):
    images = np.zeros((9, 3, 64, 64), np.uint8)  # black,
    images[3:6] = 255  # white,
    images[6:] = np.array([200, 30, 90])[:, None, None]  # or of one colour
    scenes = data.Scenes(images, np.zeros((9, 64, 64), np.uint8))
    monkeypatch.setattr(data, "load", lambda *_: scenes)
    log = train(tmp_path, precision=precision)
    assert log[-1]["skipped"] == 0 and math.isfinite(log[-1]["MSE"])

def test_a_full_disk_costs_no_checkpoint(finished, tmp_path, arguments, capsys, no_pictures):
    """No file may grow beyond some bytes, as torch and safetensors find out for themselves."""
    folder = tmp_path / "run"
    model = many_labels()
    unlimited = resource.RLIM_INFINITY
    for most, left in ((300, None), (300_000, 0), (12_000_000, 6), (unlimited, 18)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited))
        try:
            code = ast_seg.main(arguments(folder))
            if left == 0:
                with pytest.raises(OSError):
                    data.save_checkpoint(tmp_path, {"t": 1, "log": []}, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        error = capsys.readouterr().err.split("ast_seg.py: ")[1:]
        assert code == (2 if error else 0) and sum(text.count("\n") for text in error) == code / 2
        assert left is None or torch.load(folder / "checkpoint.pt")["t"] == left
    assert contents(folder)["model.safetensors"] == contents(finished)["model.safetensors"]

def test_ctrl_c_leaves_no_traceback_not_even_during_the_imports():
    process = subprocess.Popen([sys.executable, ast_seg.__file__, "--help"], text=True, stderr=-1)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT

def test_randomness_in_a_step_depends_on_seed_and_step_alone(tmp_path, monkeypatch, no_pictures):
    training_loss = ast_seg.training_loss
    seen = []

    def loss(model, images, phase, t):
        weight = model.refine.embed.weight[0, 0].item()
        seen.append((images.sum().item(), torch.initial_seed(), weight))
        return training_loss(model, images, phase, t)
    monkeypatch.setattr(ast_seg, "training_loss", loss)
    for run, seed in enumerate((0, 0, 1)):
        train(tmp_path / f"{run}", seed=seed, background_steps=1, steps=1, validate_every=99)
    assert seen[:2] == seen[2:4]
    assert [len(set(values)) for values in zip(*seen)] == [4, 4, 2]  # batches, dropout, weights

@pytest.mark.parametrize("flags", [
    "--layers=0 --anisotropic", "--slots=8 --entropy-weight=0 --size=128", "--curriculum=frozen",
    "--curriculum=bt", "--generator=unet", "--generator=tiny", "--generator=b3",
    "--generator=b3 --backbone=random", "--window=3 --precision=bfloat16"])
def test_every_ablation_trains_and_is_scored(flags, tmp_path, arguments, monkeypatch, no_pictures):
    """The rows of Table 4, and what peers do otherwise. Large generators are made small."""
    backbones = []
    monkeypatch.setattr(ast_seg.Segformer, "load_backbone", lambda _, name: backbones.append(name))
    monkeypatch.setitem(ast_seg.SEGFORMERS, "b3", ast_seg.SEGFORMERS["tiny"])
    monkeypatch.setitem(ast_seg.UNETS, "unet", ((4, 6, 8, 8, 8, 8), (3, 1), nn.ZeroPad2d))
    short = ("--background-steps=1", "--steps=4", "--phase2-steps=2", "--limit=2")
    assert ast_seg.main(arguments(tmp_path / "run", *short, *flags.split())) == 0

    assert backbones == ["nvidia/mit-b3"] * (flags == "--generator=b3")
    log = read_log(tmp_path / "run")
    phases = {"--curriculum=frozen": [1, 2, 2, 2, 2], "--curriculum=bt": [3, 3, 3, 3]}
    assert [line["phase"] for line in log] == phases.get(flags, [1, 2, 2, 3, 3])
    assert math.isfinite(log[-1]["reconstruction"]) and 0 < log[-1]["mIoU"] <= 100

def test_a_run_on_images_of_ones_own_goes_on_with_no_others(
        tmp_path, arguments, monkeypatch, capsys, no_pictures):
    training_loss = ast_seg.training_loss
    monkeypatch.setattr(ast_seg, "training_loss", lambda *given: (
        training_loss(*given) if given[3] < last else pytest.exit("killed")))
    for name in ("a", "b"):
        write_pairs("folder", tmp_path / name, 10)
    for name, last, code in (("a", 9, None), ("b", 99, 2), ("a", 99, 0), ("b", 99, 0)):
        options = arguments(tmp_path / "run", "--dataset=folder", "--small",
                            f"--data-dir={tmp_path / name}")
        if code is None:
            with pytest.raises(pytest.exit.Exception):
                ast_seg.main(options)
        else:
            assert ast_seg.main(options) == code
            out, err = capsys.readouterr()
            assert ("is a run on other images" in err) == (code == 2)
    assert "is trained already, and only scored here" in out

def test_phase_1_of_one_run_serves_others(finished, tmp_path, arguments, monkeypatch, no_pictures):
    """They start with phase 2, from the background model as it was where phase 1 ended."""
    training_loss = ast_seg.training_loss
    background = torch.load(finished / "background.pt")
    seen = []

    def watched_loss(model, images, phase, t):
        weights = model.background.state_dict()
        seen.append((phase, all(torch.equal(weights[name], background[name]) for name in weights)))
        return training_loss(model, images, phase, t)
    monkeypatch.setattr(ast_seg, "training_loss", watched_loss)
    options = arguments(tmp_path / "run", f"--background-from={finished}", "--seed=1")
    assert ast_seg.main(options) == 0
    assert seen[:9] == [(2, True)] * 8 + [(3, True)] and seen[-1] == (3, False)

def test_feature_maps_and_background_compile_without_a_graph_break():
    """And so they compute the same. The library prepares itself in a first call."""
    model = ast_seg.ASTSeg(tiny(generator="tiny"))
    images = torch.rand(2, 3, 64, 64)
    scene = model.eval()(images)
    for part in (model.feature_maps, model.background):
        part.compile(fullgraph=True, backend="aot_eager")
    for ours, truth in zip(model(images), scene):
        close(ours, truth)

PROCESS = """  # one of several; in float64, without batch norm and dropout, it notes its losses
import os, sys, torch
torch.set_default_dtype(torch.float64)
torch.nn.BatchNorm2d = torch.nn.Identity
import ast_seg
training_loss = ast_seg.training_loss
def noting_loss(model, images, phase, t):
    if f"{t}" == os.environ.get("DIES_AT"):
        os._exit(1)
    loss, losses = training_loss(model, images, phase, t)
    print("loss", t, loss.item(), flush=True)
    return loss, losses
ast_seg.training_loss = noting_loss
ast_seg.draw_segmentations = ast_seg.data.draw_curves = lambda *_, **__: None
sys.exit(ast_seg.main(sys.argv[1:]))
"""

def test_several_processes_do_what_one_does(tmp_path, arguments):
    """Each takes its share of the batch, and they average their gradients. If one dies the others
    end with a sentence, and any number of processes goes on."""
    def run(folder, world, **last):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", PROCESS, *arguments(
            folder, "--layers=0", "--background-steps=10", "--steps=20",
            "--phase2-steps=10", "--limit=8", "--lr=1e-4")]
        processes = []
        for rank in range(world):
            more = dict(RANK=f"{rank}", WORLD_SIZE=f"{world}", MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=f"{port}", OMP_NUM_THREADS="1")
            more |= last if rank == world - 1 else {}
            processes.append(subprocess.Popen(
                command, env=os.environ | more, text=True, stdout=-1, stderr=-1,
                cwd=Path(ast_seg.__file__).parent))
        out, err = zip(*(process.communicate() for process in processes))
        losses = [re.findall(r"^loss \d+ (.+)$", text, re.M) for text in out]
        return np.array([*zip(*losses)], float).mean(1), [p.returncode for p in processes], err[0]

    truth, codes, _ = run(tmp_path / "one", 1)
    assert codes == [0] and len(truth) == 30
    losses, codes, error = run(tmp_path / "two", 2, DIES_AT="25")
    np.testing.assert_allclose(losses, truth[:25], rtol=1e-10)
    assert codes == [2, 1] and "Another process of this run" in error.splitlines()[-1]
    losses, codes, _ = run(tmp_path / "two", 1)
    assert codes == [0]
    np.testing.assert_allclose(losses, truth[24:], rtol=1e-8)

# --- The program: scores, and the model as a file -----------------------------------------------
MODEL = ("model.safetensors", "config.json")

@pytest.mark.parametrize("lost, cut, works", [
    (MODEL, (), True), ((), MODEL[:1], True), (("checkpoint.pt",), (), True),
    ((), ("checkpoint.pt",), True), (("checkpoint.pt", *MODEL), (), False)])
def test_a_model_is_found_wherever_a_run_still_has_it(
        lost, cut, works, finished, tmp_path, arguments, capsys, no_pictures):
    """And is then put where it was missing. Without its checkpoint a run cannot go on."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in lost:
        (folder / name).unlink()
    for name in cut:
        os.truncate(folder / name, 99)
    assert ast_seg.main(arguments(folder, "--eval")) == (0 if works else 2)
    if works:
        assert all(contents(folder)[name] == contents(finished)[name] for name in MODEL)
    goes_on = "checkpoint.pt" not in (*lost, *cut)
    assert ast_seg.main(arguments(folder)) == (0 if goes_on else 2)
    if not goes_on:
        expected = "--eval scores its model" if works else "no run of ours"
        assert expected in capsys.readouterr().err

def test_one_model_that_is_missing_does_not_hide_the_scores_of_another(
        finished, arguments, capsys, no_pictures):
    assert ast_seg.main(arguments("", "--model", "runs/none", finished, "shapes")) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith(str(finished))
    assert "The model runs/none " in err and "The model shapes " in err

@pytest.mark.parametrize("more, name", [
    ("--split=val --limit=3", "eval-shapes-val-3"),
    ("--dataset=tm_dsprites --limit=4", "eval-tm_dsprites-test-4"),
    ("--dataset=folder --data-dir=PHOTOS", "eval-folder-test-1")])  # images without labels
def test_another_set_has_its_own_folder(more, name, finished, arguments, photos, capsys):
    more = more.replace("PHOTOS", str(photos)).split()
    options = [*arguments("")[:2], "--limit=12", "--eval", *more, f"--out={finished}"]
    for date in (1, 2):  # of the photos: then they are other ones, whose scores stand beside
        before = contents(finished)
        for photo in photos.rglob("*.*"):
            os.utime(photo, (date, date))
        assert ast_seg.main(options) == 0
        assert contents(finished).items() >= before.items()
    folders = list(finished.glob(f"{name}*"))
    assert len(folders) == (2 if "folder" in name else 1)
    scores = np.load(folders[0] / "scores.npz")
    assert set(scores) == ({"MSE"} if "folder" in name else {*ast_seg.METRICS, "MSE"})
    assert {len(values) for values in scores.values()} == {int(name.split("-")[-1])}
    out = capsys.readouterr().out
    assert f" {scores['MSE'].mean():.2f}\n" in out and ("no labels" in out) == ("folder" in name)

def test_models_are_compared_with_their_mean(capsys):
    one = {"mIoU": 1.0, "ARI-FG": 2.0, "Dice": 3.0, "MSE": 4.0}
    data.print_scores("clevr", {"one": one, "two": one | {"mIoU": 4.0}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["on", "clevr", "mIoU", "ARI-FG", "Dice", "MSE"],
        ["one", "1.00", "2.00", "3.00", "4.00"], ["two", "4.00", "2.00", "3.00", "4.00"],
        ["mean", "2.50", "2.00", "3.00", "4.00"],
        ["deviation", "2.12", "0.00", "0.00", "0.00"]]  # 3 / sqrt(2)

def test_segments_are_drawn_in_the_colours_of_the_truth(tmp_path, monkeypatch):
    """Here the truth is what the model found, but in another order in each scene."""
    drawn = []
    monkeypatch.setattr(data, "show", lambda axis, picture, title: drawn.append(picture))
    model = many_labels(slots=8)
    pixels = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8)
    orders = torch.stack([torch.tensor([0, *torch.randperm(8) + 1]) for _ in pixels])
    pred = model.segment(pixels / 255)
    true = orders.gather(1, pred.flatten(1)).view_as(pred)
    scenes = data.Scenes(pixels.numpy(), true.byte().numpy())
    ast_seg.draw_segmentations(model, scenes, tmp_path / "a.png")
    assert np.array_equal(drawn[2::6], data.PALETTE[true])  # the third of six columns

# --- The program: images of one's own -----------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of many sizes, modes and names."""
    folder = tmp_path_factory.mktemp("photos")
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3)).astype("u1"))
    for name, size, mode in (("wide.jpg", (200, 80), "RGB"), ("tall.PNG", (50, 131), "RGBA"),
                             ("deeper/large.webp", (1024, 600), "RGB"), ("a/b.png", (8, 9), "P"),
                             ("a_b.png", (9, 9), "L")):
        (folder / name).parent.mkdir(exist_ok=True)
        noise.resize(size).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder

def test_each_image_gets_labels_an_overlay_and_measures_and_a_bad_one_costs_no_other(
        photos, tmp_path, monkeypatch, capsys):
    model = many_labels()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("wide.png", "a/b_mask.png"):
        Image.new("L", (8, 8)).save(name)
    for _ in range(2):  # the output lies among the images
        assert ast_seg.main(["--device=cpu", "--segment", ".", "notes.txt", "nowhere", str(photos),
                             f"--model={tmp_path}/model", "--out=a/out"]) == 1
    lines = re.findall("^ast_seg.py: .+$", capsys.readouterr().err, re.M)
    listing = Path("a/out/objects.json").read_text()
    assert ast_seg.main(["--device=cpu", "--segment", "wide.jpg", f"--model={tmp_path}/model",
                         "--out=a/out"]) == 0  # what was there before stays
    assert json.loads(Path("a/out/objects.json").read_text()) == json.loads(listing)
    found = json.loads(Path("a/out/objects.json").read_text())
    bad = ["wide.png", "nowhere", "notes.txt", *(f"{photos}/{name}" for name in found)]
    assert len(lines) == 2 * len(bad) and all(f" {name}" in str(lines) for name in bad)
    assert len(found) == 5 and len(contents(Path("a/out"))) == 2 * 5 + 1

    for name, objects in found.items():
        stem = Path("a/out", name).with_suffix("")
        flat = Image.open(f"{stem}_labels.png")
        labels = np.array(flat)
        image = data.read_image(Path(name))
        square = np.array(Image.fromarray(image).resize((64, 64), Image.BILINEAR))
        square = torch.from_numpy(square).movedim(2, 0)[None] / 255
        drawn = Image.fromarray(model.segment(square, 256, 256)[0].byte().numpy())
        assert np.array_equal(labels, drawn.resize(flat.size, Image.NEAREST))  # never mixed

        overlay = np.array(Image.open(f"{stem}_overlay.png"))
        mixed = (image.astype(float) + np.array(flat.convert("RGB"))) / 2
        truth = np.where(labels[..., None] > 0, mixed, image)
        assert np.abs(overlay - truth).max() <= 1

        assert [o["label"] for o in objects] == [k for k in range(1, 5) if (labels == k).any()]
        for o in objects:
            cells = np.array([at for at in np.ndindex(labels.shape) if labels[at] == o["label"]])
            assert o["area"] == len(cells)
            assert o["box"] == [*cells.min(0)[::-1], *cells.max(0)[::-1] + 1]  # x, y, x, y
            assert [o["y"], o["x"]] == pytest.approx(cells.mean(0) + 0.5)
    assert len(found["wide.jpg"]) > 1

# --- The program: what is refused ---------------------------------------------------------------
@pytest.fixture(scope="module")
def mine(tmp_path_factory, finished):
    """A user's folder, where much is damaged or foreign."""
    folder = tmp_path_factory.mktemp("mine")
    checkpoint = (finished / "checkpoint.pt").read_bytes()
    config = (finished / "config.json").read_bytes()
    part = safetensors.torch.save({"log_alpha_0": torch.zeros(())})
    files = {
        "run/checkpoint.pt": checkpoint, "cut/checkpoint.pt": checkpoint[:len(checkpoint) // 2],
        "thesis/chapter.tex": b"all my work", "photos/text.png": b"text",
        "lost/images/a.png": b"", "lost/masks/a_mask.png": b"",
        "vit/config.json": b'{"model_type": "vit"}',
        "bert/config.json": b'{"architectures": ["Bert"]}',
        "half/config.json": config, "half/model.safetensors": part[:30],
        "part/config.json": config, "part/model.safetensors": part}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    code = {"config": asdict(CONFIG), "t": 1, "run": Path()}  # unpickling may run any code
    begun = {"config": asdict(CONFIG), "t": 0, "log": []}
    for name, state in {"foreign": {"epoch": 3}, "code": code, "begun": begun}.items():
        (folder / name).mkdir()
        torch.save(state, folder / name / "checkpoint.pt")
    return folder

REFUSED = {  # what the answer names: what is asked for in the folder `mine`, one a word
    "--lr ": "--lr=nan --lr=-1", "--steps ": "--steps=0", "--batch-size ": "--batch-size=1",
    "--s-min": "--s-min=0.5 --s-max=1.2", "--d-t ": "--d-t=60",
    "--window ": "--window=-1 --window=4", "--adam-beta": "--adam-beta1=1",
    "--device": "--device=toaster --device=meta", "no run of ours": "--out=thesis --out=.",
    "Not a directory": "--out=thesis/chapter.tex/run --data-dir=thesis/chapter.tex",
    "checkpoint.pt is of no use": "--out=cut --out=foreign --out=code",
    "other settings (lr, entropy_weight)": "--out=run,--lr=0.5,--entropy-weight=7",
    "The model ": "--eval --model=nobody/none --model=bert --model=half --model=part",
    "has saved none yet": "--eval,--out=begun",
    "is of no use (there is none":  # so the hub was not asked for what looks like a folder
        "--model=thesis --model=thesis/run --model=run/none --model=runs/none --model=a/b/c",
    "--segment takes": "--segment --segment,thesis,--eval --segment,a,--model,a,b",
    "no output of --segment": "--segment,photos,--model=RUN,--out=thesis",
    "lies within --data-dir": "--dataset=folder,--data-dir=photos,--out=photos/run,--small",
    "lost/masks/a_mask.png belongs to no image": "--dataset=folder,--data-dir=lost,--small",
    "background.pt is of no use": "--background-from=thesis --background-from=RUN,--size=128",
    "The backbone ": "--generator=b3 --generator=b3,--backbone=vit,--dataset=folder",
    "no image in": "--segment,thesis,nowhere,--model=RUN",
    "photos/text.png": "--segment,photos/text.png,--model=RUN",
    "too few scenes in thesis": "--dataset=folder,--data-dir=thesis,--backbone=random",
    "Damaged scenes: 1": "--dataset=folder,--data-dir=photos,--backbone=random"}  # at once

@pytest.mark.parametrize("named, asked", [
    (named, asked) for named, words in REFUSED.items() for asked in words.split()],
    ids=lambda text: text[:40])
def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(
        named, asked, mine, finished, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ast_seg.SEGFORMERS, "b3", ast_seg.SEGFORMERS["tiny"])
    monkeypatch.chdir(mine)
    before = contents(mine)
    asked = asked.replace("RUN", str(finished)).split(",")
    assert ast_seg.main(arguments(tmp_path / "new", *asked)) == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    (line,) = [line for line in lines if line.strip() and "/s]" not in line]  # no progress bars
    assert line.startswith("ast_seg.py: ") and named in line
    assert contents(mine) == before and not contents(tmp_path)

# --- The program: README.md ---------------------------------------------------------------------
def test_the_map_of_the_readme_is_true():
    """Each range goes from a banner to the line before the next; no banner is left out."""
    readme = Path(ast_seg.__file__).with_name("README.md").read_text()
    lines = Path(ast_seg.__file__).read_text().splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("# --- ")]
    block = readme.split("<!-- map -->")[1].split("<!-- /map -->")[0]
    row = r"^\| (.+) \| \[(\d+)-(\d+)\]\(ast_seg\.py#L(\d+)-L(\d+)\) \|$"
    rows = re.findall(row, block, re.M)
    assert len(rows) == block.strip().count("\n") - 1 == len(starts)  # all but the head
    for (text, *numbers), first, after in zip(rows, starts, [*starts[1:], len(lines) + 1]):
        assert numbers == [str(first), str(after - 1)] * 2
        section = re.match(r"# --- ([\d.]*\d|)", lines[first - 1])[1]
        assert text.startswith(section)  # the number in the paper

def test_every_command_of_the_readme_runs_after_those_before_it(
        tmp_path, monkeypatch, no_pictures):
    """In one folder, from top to bottom, with few steps, small models and miniature files."""
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ast_seg.SEGFORMERS, "b3", ast_seg.SEGFORMERS["tiny"])
    monkeypatch.setattr(ast_seg.Segformer, "load_backbone", lambda *_: None)
    tiny_records(tmp_path / "DIR", monkeypatch, size=64, background="small")
    for name in ("clevrtex", "camo"):
        miniature(monkeypatch, name, source=(6, 8), crop=6, size=64, background="small")
        write_pairs(name, tmp_path / "DIR", 10)
    for folder in ("photos", "squares"):
        write_pairs("folder", tmp_path / folder, 10)

    readme = Path(ast_seg.__file__).with_name("README.md").read_text()
    short = ["--steps=2", "--phase2-steps=1", "--background-steps=1", "--batch-size=2",
             "--background-batch-size=2", "--limit=2", "--background=small", "--size=64"]
    commands = re.findall(r"python ast_seg\.py([^`\n#&|]*)", ast_seg.__doc__ + readme)
    commands = [shlex.split(command) for command in commands if "--help" not in command]
    for command in sorted(commands, key=lambda words: "--segment" in words or "--eval" in words):
        more = [] if "--segment" in command else short[5:6] if "--eval" in command else short
        assert ast_seg.main([*command, *more]) == 0, command
    assert len(commands) > 20

def test_the_pictures_of_the_readme_can_be_drawn(finished, tmp_path, arguments):
    from figures import draw
    draw.main(finished, tmp_path, arguments("")[1].removeprefix("--data-dir="))
    readme = Path(ast_seg.__file__).with_name("README.md").read_text()
    shown = set(re.findall(r"\(figures/(\w+\.\w+)\)", readme)) - {"clevr.png"}  # of another run
    assert shown == contents(tmp_path).keys() and len(shown) == 5

# --- data.py: scenes as the benchmarks publish them ---------------------------------------------
SHARED = Path(data.__file__).resolve().parent.parent / "shared"
RECORD_SETS = ("clevr", "objects_room", "multi_dsprites", "tetrominoes")
PAIR_SETS = ("clevrtex", "camo", "ood", "shapestacks")
TENSORFLOW_RECORD = (  # a record of tetrominoes, deflated, in base85
    "c-rlkKS~2Z97gvCF2YyIkjBDBtgJ)=R^lyI+chk4F#p(<pq&S>5mM^~#L80$cCi%?AlTX|S_BmXn~)5NdBY1lNb!XiNM"
    ";YR=<D2E_xkGJo8EFQHPhnQz2<t!W$yq0b3*hJh8PMk1ZDb9?^{^3p$UEfhWPOTn2~=6000002u!d`8bh-`1ONa4+#DF"
    "<b_W0e0000003$uxPwxSrA%?;a0l>IiC5nABt!J*6=rWOQ%4)J51VIo4K@bE%5M;sRPPQSdmlKMSj&!6W9qCAiAV?Uwk"
    "lo6PafNiGBi;W<_b6MIJ(m;Gk&bkvn^Pejf*=TjAjqU;Rd(ho&S@q3b+oIv)^4<OS9ROkibgzIm%6_2hrZ!Y1{3Fd-(R"
    "2Wr$g4)6c<NnC;R*D{fDR42mTOL(f")

def crc32c(message):
    """By its definition: division by Castagnoli's polynomial, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF

def record(payload):
    """The bytes of a TFRecord; the masked CRC-32C is that of TensorFlow's record_writer.h."""
    assert crc32c(b"123456789") == 0xE3069283  # the published check value
    content = b""
    for part in (struct.pack("<Q", len(payload)), payload):
        crc = crc32c(part)
        content += part + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)
    return content

def field(number, content):
    """A field of a protobuf message: tag, length in groups of 7 bits, content (below 2 MiB)."""
    n = len(content)
    length = [n] if n < 128 else [n & 127 | 128, n >> 7 & 127 | 128, n >> 14]
    return bytes([number << 3 | 2, *length]) + content

def example(**features):
    """A tf.train.Example: uint8 arrays as lists of one-byte strings, others as lists of floats."""
    entries = b""
    for name, values in features.items():
        content = field(2, field(1, values.astype("<f4").tobytes()))
        if values.dtype == np.uint8:
            content = field(1, b"".join(field(1, bytes([value])) for value in values.ravel()))
        entries += field(1, field(1, name.encode()) + field(2, content))
    return field(1, entries)

def random_scene(dataset, rng, objects):
    """Image and labels before the crop, and the Example that holds them, its features in any
    order. Where masks overlap the first one wins; no mask covers the pixels of index 0."""
    image = rng.integers(0, 256, (*dataset.source, 3), np.uint8)
    index = rng.integers(0, dataset.masks, dataset.source)
    k = np.arange(dataset.masks)[:, None, None]
    masks = (index > 0) & ((k == index) | (k > index) & (rng.random(index.shape) < 0.5))
    masks = np.moveaxis(np.where(masks, 255, 0).astype(np.uint8), 0, dataset.mask_axis)
    visible = np.arange(dataset.masks) <= objects
    features = dict(image=image, mask=masks, color=image[0], visibility=visible)
    labels = np.maximum(index - dataset.background_masks + 1, 0).astype(np.uint8)
    order = rng.permutation(list(features))
    return image, labels, example(**{name: features[name] for name in order})

def miniature(monkeypatch, name, **changes):
    """The layout of a set at 6x8 pixels."""
    dataset = replace(data.DATASETS[name], **dict(source=(6, 8), crop=6, size=4) | changes)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    return dataset

def tiny_records(root, monkeypatch, name="clevr", objects=(3,) * 14, packed=True, **more):
    """A file of small scenes, of 14 two test, two val, ten train. Returns its path, the scenes."""
    dataset = miniature(monkeypatch, name, **dict(splits=(2, 2, 10)) | more)
    rng = np.random.default_rng(7)
    scenes = [random_scene(dataset, rng, count) for count in objects]
    content = b"".join(record(payload) for *_, payload in scenes)
    (root / dataset.path).write_bytes(gzip.compress(content, 1) if packed else content)
    return root / dataset.path, scenes

@pytest.fixture()
def clevr(tmp_path, monkeypatch):
    return tiny_records(tmp_path, monkeypatch)

def pair_files(name, root, i):
    """Image and label map number i of a set, where the public archives have them."""
    if name == "folder":
        file = root / f"sub{i % 2}/photo{i:02}.png"
        return file, file.with_stem(f"{file.stem}_mask")
    if name == "shapestacks":  # two views of each scenario
        scenario, view = f"env-{i // 2}", f"cam_{i % 2 + 1}-mono-0"
        return (root / f"shapestacks/recordings/{scenario}/rgb-w=1-f=0-l=2-c=unique-{view}.png",
                root / f"shapestacks/iseg/{scenario}/iseg-w=0-f=0-l=0-c=original-{view}.map")
    path = data.DATASETS[name].path  # the folders run against the numbers
    file = root / path / f"{9 - i // 5}/CLEVRTEX_{path[-4:]}_{i:06}.png"
    return file, file.with_stem(f"{file.stem}_flat")

def write_pairs(name, root, count):
    """`count` scenes under `root`. Returns (image, labels, image file, label file) of each, in the
    order of the splits."""
    rng = np.random.default_rng(4)
    height, width = data.DATASETS[name].source or (20, 30)
    truth = []
    for i in range(count):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        labels = rng.integers(0, 6, (height, width), np.uint8)
        file, label_file = pair_files(name, root, i)
        flat = Image.fromarray(labels)
        if name == "shapestacks":
            flat = Image.fromarray(np.stack([labels * 32, labels, labels], 2))
        elif name != "folder":
            flat.putpalette(list(rng.integers(0, 256, 768)))
        for folder in (file.parent, label_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        flat.save(label_file, "PNG")
        if "_flat" in label_file.stem:  # a render pass beside it, which is no scene
            Image.fromarray(image).save(file.with_stem(f"{file.stem}_albedo_0001"))
        truth.append((image, labels, file, label_file))
    if name == "shapestacks":
        lists = root / "shapestacks/splits/default"
        lists.mkdir(parents=True)
        for split, lines in (("test", "env-0"), ("eval", "env-1"), ("train", "env-2 env-3 env-4")):
            (lists / f"{split}.txt").write_text(lines.replace(" ", "\n"))
    return truth

def fitted(pixels, crop, size):
    """Centre square and Pillow's resize, bilinear for images and nearest for labels."""
    image = Image.fromarray(pixels)
    side = crop or min(image.size)
    left, top = [(length - side) // 2 for length in image.size]
    how = Image.NEAREST if pixels.ndim == 2 else Image.BILINEAR
    square = image.crop((left, top, left + side, top + side)).resize((size, size), how)
    return np.moveaxis(np.asarray(square), -1, 0) if pixels.ndim == 3 else np.asarray(square)

def assert_scenes(name, scenes, truth, size=0):
    """Exactly these scenes in this order. truth: image, labels, ... before crop and resize."""
    crop = data.DATASETS[name].crop
    size = size or data.DATASETS[name].size
    for image, labels, scene in zip(scenes.images, scenes.labels, truth, strict=True):
        assert np.array_equal(image, fitted(scene[0], crop, size))
        assert np.array_equal(labels, fitted(scene[1], crop, size))

def all_splits(name, root, sizes=None, **options):
    """All scenes in the order test, val, train, which have these sizes."""
    splits = data.SPLITS[:1] if name == "ood" else data.SPLITS
    parts = [data.load(name, split, root, **options) for split in splits]
    assert sizes in (None, [len(part.images) for part in parts])
    images = np.concatenate([part.images for part in parts])
    return data.Scenes(images, np.concatenate([part.labels for part in parts]))

def caches(root, kind="uint8"):
    return sorted((Path(root) / ".cache").glob(f"*.{kind}"))

def refused(name, root, *words, split="train", **options):
    """The UserError is one line that names all `words`, and no cache stays behind."""
    before = caches(root)
    with pytest.raises(data.UserError) as caught:
        data.load(name, split, root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    assert caches(root) == before

@pytest.mark.parametrize("name, test, val, train", [
    ("clevr", 10_000, 10_000, 80_000), ("multi_dsprites", 10_000, 10_000, 40_000),
    ("tetrominoes", 10_000, 10_000, 40_000), ("objects_room", 10_000, 10_000, 980_000),
    ("clevrtex", 5_000, 5_000, 40_000), ("ood", 10_000, 0, 0), ("clevr", 76, 76, 611),
    ("objects_room", 1, 1, 1), ("clevr", 0, 0, 0)])
def test_splits_lie_one_after_the_other_as_published_or_in_proportion(name, test, val, train):
    parts = data.split_bounds(test + val + train, data.DATASETS[name].splits)
    bounds = range(test), range(test, test + val), range(test + val, test + val + train)
    assert parts == dict(zip(data.SPLITS, bounds))

def test_a_record_that_tensorflow_wrote_comes_back_exactly(tmp_path):
    content = zlib.decompress(base64.b85decode(TENSORFLOW_RECORD))
    (tmp_path / "tetrominoes_train.tfrecords").write_bytes(content)
    image = np.full((35, 35, 3), (42, 99, 55), np.uint8)
    labels = np.zeros((35, 35), np.uint8)
    blocks = [(np.s_[23:28, 13:18], (213, 7, 224)), (np.s_[11:17, 15:20], (180, 36, 103)),
              (np.s_[20:27, 3:10], (140, 174, 115))]
    for label, (where, colour) in enumerate(blocks, 1):
        image[where] = colour
        labels[where] = label
    scenes = data.load("tetrominoes", "test", tmp_path, size=35)
    assert_scenes("tetrominoes", scenes, [(image, labels)], 35)

@pytest.mark.parametrize("name", RECORD_SETS)
def test_records_of_the_published_splits_come_back_exactly(tmp_path, monkeypatch, name):
    packed = name in ("clevr", "tetrominoes")
    _, scenes = tiny_records(tmp_path, monkeypatch, name, packed=packed, splits=(3, 2, 7))
    assert_scenes(name, all_splits(name, tmp_path, [3, 2, 7]), scenes[:12])

@pytest.mark.parametrize("name", PAIR_SETS)
def test_image_files_come_back_in_the_order_of_their_numbers_without_render_passes(tmp_path, name):
    truth = write_pairs(name, tmp_path, 10)
    sizes = {"ood": [10], "shapestacks": [2, 2, 6]}.get(name, [1, 1, 8])
    assert_scenes(name, all_splits(name, tmp_path, sizes), truth)

@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="needs ../shared/formats")
@pytest.mark.parametrize("name", RECORD_SETS + PAIR_SETS)
def test_files_of_the_public_formats_come_back_exactly(name, tmp_path):
    dataset = data.DATASETS[name]
    formats = SHARED / "formats"
    (tmp_path / dataset.path).symlink_to(formats / dataset.path)  # found under its public name
    truth = np.load(formats / f"{Path(dataset.path).stem}.truth.npz")
    order = range(20)
    if name == "shapestacks":
        lists = formats / "shapestacks/splits/default"
        views = [(lists / f"{split}.txt").read_text() for split in ("test", "eval", "train")]
        order = [int(view.split("v=")[-1]) for view in "\n".join(views).split()]
    labels = np.maximum(truth["labels"].astype(int) - dataset.background_masks + 1, 0)
    scenes = [(truth["images"][i], labels[i].astype(np.uint8)) for i in order]
    assert_scenes(name, all_splits(name, tmp_path), scenes)

def test_clevr6_keeps_scenes_of_at_most_six_objects_in_the_splits_of_clevr(tmp_path, monkeypatch):
    objects = [3, 7, 6, 10, 5, 6, 8, 7, 3, 10, 4, 9, 6, 6]  # test 0-1, val 2-3, train 4-13
    _, scenes = tiny_records(tmp_path, monkeypatch, "clevr6", objects)
    kept = [scenes[i] for i in (0, 2, 4, 5, 8, 10, 12, 13)]
    assert_scenes("clevr6", all_splits("clevr6", tmp_path), kept)
    assert_scenes("clevr6", data.load("clevr6", "train", tmp_path, limit=1), kept[2:3])

# --- data.py: drawn scenes, and images of one's own ---------------------------------------------
@pytest.mark.parametrize("name, most", [("shapes", 4), ("tm_dsprites", 3)])
def test_a_drawn_scene_depends_on_split_and_number_alone(tmp_path, name, most):
    few = [data.load(name, split, tmp_path / "a", limit=60) for split in data.SPLITS]
    more = data.load(name, "test", tmp_path / "b", limit=70)
    assert np.array_equal(few[0].images, more.images[:60])
    assert np.array_equal(few[0].labels, more.labels[:60])
    assert len({image.tobytes() for scenes in few for image in scenes.images}) == 180
    for scenes in few:
        counts = scenes.labels.max((1, 2))
        assert set(counts) == set(range(2, most + 1))
        for k in range(1, most + 1):  # most of an object is seen, and none fills the image
            areas = (scenes.labels[counts >= k] == k).mean((1, 2))
            assert 0.02 < np.median(areas) < 0.12 and areas.max() < 0.2

def test_tm_dsprites_are_whole_saturated_sprites_on_a_grey_texture(tmp_path):
    scenes = data.load("tm_dsprites", "test", tmp_path, limit=60)
    for image, labels in zip(scenes.images, scenes.labels):
        for k in range(1, labels.max() + 1):
            pixels = image[:, labels == k]
            assert pixels.shape[1] > 380  # the smallest, the triangle, has 402 pixels
            colour = np.median(pixels, axis=1)
            assert colour.min() == 0 and colour.max() == 255
            assert (np.abs(pixels - colour[:, None]).max(0) <= 1).mean() > 0.85
        assert (np.ptp(image[:, labels == 0], axis=0) == 0).mean() > 0.9

GREY = np.linspace(0, 254, 16 * 24).astype(np.uint8).reshape(16, 24)
COLOURS = np.stack([GREY, GREY[::-1], 255 - GREY], 2)

@pytest.mark.parametrize("name, image, expected", [
    ("a.TIF", COLOURS, COLOURS), ("dot.png", COLOURS[:1, :1], COLOURS[:1, :1]),
    ("transparent.png", np.dstack([COLOURS, GREY]), COLOURS),
    ("16 bits.png", GREY.astype(np.uint16) * 257 + 100, np.stack([GREY] * 3, 2)),
    ("turned.png", COLOURS, np.rot90(COLOURS, -1).copy())])
def test_images_of_any_kind_come_upright_and_square(tmp_path, name, image, expected):
    labels = expected[..., 0]  # more than K labels stay
    exif = Image.Exif()
    exif[0x0112] = 6 if "turned" in name else 1  # 6: the camera was held sideways
    Image.fromarray(image).save(tmp_path / name, exif=exif)
    Image.fromarray(labels).save(tmp_path / f"{Path(name).stem}_mask.png")
    assert_scenes("folder", data.load("folder", "test", tmp_path), [(expected, labels)])

def test_damages_of_all_splits_are_named_at_once_up_to_five_of_each(tmp_path):
    for *_, labels in write_pairs("folder", tmp_path, 10):
        labels.write_bytes(b"")
    with pytest.raises(data.UserError) as error:
        data.load_splits("folder", tmp_path, 0, 64)
    assert re.findall(r"Damaged scenes: (\d+)\.", str(error.value)) == ["1", "1", "8"]
    assert str(error.value).count("mask.png is of no use") == 1 + 1 + 5
    shapes = data.load_splits("shapes", tmp_path, 3, 64)
    assert [len(scenes.images) for scenes in shapes] == [3, 3, 3]

def test_folder_splits_are_disjoint_mixed_and_the_same_wherever_it_lies(tmp_path):
    truth = write_pairs("folder", tmp_path / "one", 30)
    images = all_splits("folder", tmp_path / "one", [3, 3, 24], size=8).images
    found = [image.tobytes() for image in images]
    in_order = [fitted(image, 0, 8).tobytes() for image, *_ in truth]
    assert sorted(in_order) == sorted(found) and not set(in_order[:6]) <= set(found[:8])
    os.rename(tmp_path / "one", tmp_path / "two")
    assert np.array_equal(all_splits("folder", tmp_path / "two", size=8).images, images)

# --- data.py: the life of a cache ---------------------------------------------------------------
def test_a_cache_is_built_once_and_as_a_whole(clevr, tmp_path, monkeypatch):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/clevr-4-test-0-0.part").write_bytes(bytes(9999))  # it was interrupted
    assert_scenes("clevr", all_splits("clevr", tmp_path), clevr[1])
    assert len(caches(tmp_path)) == 3 and not caches(tmp_path, "part")
    monkeypatch.setattr(data, "iterate_records", lambda *_: pytest.fail("read again"))
    assert_scenes("clevr", all_splits("clevr", tmp_path), clevr[1])
    assert isinstance(data.load("clevr", "val", tmp_path).images, np.memmap)
    cache = caches(tmp_path)[1]
    os.truncate(cache, 100)
    refused("clevr", tmp_path, cache, "remove")

def test_whatever_changes_in_source_or_program_makes_another_cache(tmp_path, monkeypatch):
    miniature(monkeypatch, "folder", source=(), size=8, splits=(1, 0, 0))
    *_, image, labels = write_pairs("folder", tmp_path, 10)[0]
    changes = [
        lambda: None, lambda: os.utime(labels, ns=(1, 1)),
        lambda: image.write_bytes(image.read_bytes() + b"more"),
        lambda: monkeypatch.setattr(data, "CACHE_VERSION", data.CACHE_VERSION + 1), image.unlink]
    for change, count in zip(changes, (10, 10, 10, 10, 9)):
        before = caches(tmp_path)
        change()
        assert len(data.load("folder", "test", tmp_path).images) == count
        assert len(caches(tmp_path)) == 1 and caches(tmp_path) != before

    elsewhere = tmp_path / "elsewhere/.."  # the same files under another name: nothing is decoded
    elsewhere.parent.mkdir()
    monkeypatch.setattr(data, "write_cache", lambda *_: pytest.fail("decoded again"))
    assert len(data.load("folder", "test", elsewhere).images) == 9

def test_a_folder_that_may_not_be_written_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    path, scenes = tiny_records(folder, monkeypatch)
    access = os.access
    monkeypatch.setenv("HOME", str(tmp_path))  # to root every folder is writable: it is played
    monkeypatch.setattr(os, "access", lambda where, *a: where != folder and access(where, *a))
    assert_scenes("clevr", data.load("clevr", "train", folder), scenes[4:])
    assert list(folder.iterdir()) == [path]

def test_a_full_disk_keeps_no_half_of_a_cache_and_a_later_run_works(clevr, tmp_path):
    data.load("clevr", "test", tmp_path)
    (cache,) = caches(tmp_path)
    cache.unlink()
    cache.with_suffix(".part").symlink_to("/dev/full")
    with pytest.raises(OSError):
        data.load("clevr", "test", tmp_path)
    assert not caches(tmp_path, "part")
    assert_scenes("clevr", data.load("clevr", "test", tmp_path), clevr[1][:2])

# --- data.py: what is refused -------------------------------------------------------------------
def flip(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1:]

def test_what_is_missing_is_named_with_what_belongs_there(tmp_path):
    refused("folder", tmp_path / "typo", tmp_path / "typo")
    assert not list(tmp_path.iterdir())
    refused("folder", tmp_path, tmp_path)
    folder = tmp_path / "shapestacks"
    refused("shapestacks", tmp_path, folder, "shapestacks-file.robots.ox.ac.uk", "iseg", "genesis")
    write_pairs("shapestacks", tmp_path, 6)
    listing = folder / "splits/default/eval.txt"
    listing.write_text("env-1\nenv-9")
    (folder / "recordings/env-9").mkdir()  # without an image
    refused("shapestacks", tmp_path, f"{folder}/recordings/env-9", "unpack", split="val")
    listing.unlink()
    refused("shapestacks", tmp_path, listing, "unpack", split="val")
    write_pairs("ood", tmp_path, 2)
    refused("ood", tmp_path, tmp_path, "too few scenes", "ood", "train")

DAMAGES = {  # the content of a file of records -> another content
    "cut in a record": lambda content: content[:-100],
    "cut gzip stream": lambda content: content[:-1],
    "cut in a length": lambda content: content + bytes(7),
    "cut behind a length": lambda content: content + content[:12],
    "flipped length": lambda content: flip(content, 5 * len(content) // 14 + 2),
    "flipped value": lambda content: flip(content, len(content) // 2 + 500),
    "empty": lambda content: b"",
    "no example": lambda content: record(b"\xff" * 500) * 9,
    "endless length": lambda content: record(b"\n" + b"\xff" * 5000) * 9,
    "no mask": lambda content: record(example(image=np.zeros((6, 8, 3), np.uint8))) * 9}

@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_record_files_are_refused(tmp_path, monkeypatch, case):
    packed = case == "cut gzip stream"
    path, _ = tiny_records(tmp_path, monkeypatch, packed=packed, splits=(1, 1, 98))
    path.write_bytes(DAMAGES[case](path.read_bytes()))
    refused("clevr", tmp_path, "too few scenes" if case == "empty" else path)

@pytest.mark.parametrize("name", ["clevrtex", "shapestacks"])
@pytest.mark.parametrize("case", [
    "cut", "of another size", "labels missing", "labels cut", "labels of another size"])
def test_bad_image_files_are_named(tmp_path, monkeypatch, name, case):
    miniature(monkeypatch, name, source=(24, 30))
    *_, image, labels = write_pairs(name, tmp_path, 10)[7]
    victim = labels if "labels" in case else image
    if "cut" in case:
        victim.write_bytes(victim.read_bytes()[:-200])
    elif "missing" in case:
        victim.unlink()
    else:
        Image.open(victim).resize((7, 9)).save(victim, "PNG")
    hints = {"labels missing": ["unpack" if name == "shapestacks" else "label maps: 1 ("],
             "labels of another size": ["label map", "(7, 9)", "(30, 24)"]}
    refused(name, tmp_path, victim, *hints.get(case, []))

@pytest.mark.parametrize("name, labels, word", [
    ("a_mask.png", np.ones((8, 8, 3), np.uint8), "8 bits"),
    ("a_mask.png", np.full((8, 8), 300, np.uint16), "8 bits"),
    *((near, np.ones((8, 8), np.uint8), "a_mask.png") for near in (
        "a-mask.png", "a.mask.png", "a_masks.png", "a_Mask 2.tif", "a_mask.jpg"))])
def test_label_maps_must_hold_labels_and_have_the_right_name(tmp_path, name, labels, word):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / name)
    refused("folder", tmp_path, name, word, split="test")

# --- data.py: downloads -------------------------------------------------------------------------
class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, {name: content}, with or without Range; cuts the first `cuts` replies;
    takes `pause` seconds; notes each request as (name, first byte)."""
    ranges, cuts, pause = True, 0, 0

    def do_GET(self):
        server = type(self)
        name = self.path.rsplit("/", 1)[1]
        wanted = self.headers["Range"] or "bytes=0-"
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        server.requests.append((name, start))
        threading.Event().wait(server.pause)
        if name not in server.files:
            return self.send_error(404)
        body = server.files[name][start if server.ranges else 0:]
        if not body:
            return self.send_error(416)
        self.send_response(206 if server.ranges else 200)
        if server.ranges:
            size = len(server.files[name])
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        server.cuts -= 1
        self.wfile.write(body[:len(body) // 2] if server.cuts >= 0 else body)

    def log_message(self, *_):
        pass

@pytest.fixture()
def serve(monkeypatch):
    """serve(name, files) publishes the files of a set on this machine: its handler."""
    def start_server(name, files):
        handler = type("Handler", (Server,), {"files": files, "requests": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/some/where"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two attempts
        monkeypatch.setitem(data.DATASETS, name, replace(data.DATASETS[name], url=url))
        return handler
    return start_server

@pytest.fixture()
def online(clevr, serve):
    """The file of small scenes is not here, but on a server: which, path, content, scenes."""
    path, scenes = clevr
    content = path.read_bytes()
    path.unlink()
    return serve("clevr", {path.name: content}), path, content, scenes

@pytest.mark.parametrize("ranges, begun, cuts, starts", [  # in eighths of the file
    (True, 0, 0, [0]), (True, 2, 0, [2]), (True, 0, 2, [0, 4, 6]),
    (False, 2, 0, [2]), (False, 0, 2, [0, 4, 4]), (False, 9, 0, [9])])
def test_a_download_goes_on(online, tmp_path, ranges, begun, cuts, starts):
    server, path, content, scenes = online
    server.ranges = ranges
    server.cuts = cuts
    eighth = len(content) / 8
    if begun:
        Path(f"{path}.part").write_bytes((content + content)[:round(begun * eighth)])
    assert_scenes("clevr", data.load("clevr", "train", tmp_path), scenes[4:])
    assert path.read_bytes() == content and not Path(f"{path}.part").exists()
    assert [start / eighth for _, start in server.requests] == pytest.approx(starts, abs=0.2)

def test_a_download_that_cannot_end_well_is_refused(online, tmp_path):
    """The disk is full; what we have is longer than the file; or the server has it no more."""
    server, path, content, _ = online
    part = Path(f"{path}.part")
    part.symlink_to("/dev/full")
    refused("clevr", tmp_path, path, part, "Errno")
    part.unlink()
    part.write_bytes(2 * content)
    for word in ("416", "404"):
        refused("clevr", tmp_path, path, part, word)
        assert not path.exists() and part.exists()
        server.files = {}

def test_two_that_start_together_download_and_decode_once(online, tmp_path, capsys):
    """The lock is a file's, which two threads share as little as two processes."""
    server, path, content, scenes = online
    server.pause = 0.5
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(data.load, "clevr", "train", tmp_path) for _ in range(2)]
    for load in loads:
        assert_scenes("clevr", load.result(), scenes[4:])
    assert capsys.readouterr().out.count("preparing") == 1
    assert len(server.requests) == 1 and path.read_bytes() == content

def packed(files):
    """{name: bytes} as a .tar.gz."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()

def test_archives_stay_until_their_folder_is_whole(tmp_path, monkeypatch, serve):
    """Each archive has a part of every folder. Of three the second is damaged."""
    endings = ("_part1.tar.gz", "_part2.tar.gz", "_part3.tar.gz")
    names = [f"clevrtex_full{ending}" for ending in endings]
    miniature(monkeypatch, "clevrtex", source=(8, 8), archives=endings)
    truth = write_pairs("clevrtex", tmp_path / "source", 20)
    files = [*contents(tmp_path / "source").items()]
    archives = {name: packed(dict(files[i::3])) for i, name in enumerate(names)}
    server = serve("clevrtex", archives | {names[1]: archives[names[1]][:2000]})
    root = tmp_path / "root"
    refused("clevrtex", root, root / names[1], "remove")
    assert contents(root).keys() > set(names) and not (root / "clevrtex_full").exists()

    server.files = archives
    (root / names[1]).unlink()
    assert_scenes("clevrtex", all_splits("clevrtex", root), truth)
    assert server.requests == [(name, 0) for name in (*names, names[1])]
    assert [path.name for path in sorted(root.iterdir())] == [".cache", "clevrtex_full"]

def test_an_archive_writes_nothing_outside_its_folder(tmp_path, serve):
    root = tmp_path / "deep/root"
    serve("camo", {"clevrtex_camo.tar.gz": packed({"clevrtex_camo/a": b"", "../../outside": b""})})
    refused("camo", root, root / "clevrtex_camo.tar.gz", "remove")
    assert not list(tmp_path.rglob("outside")) and not (root / "clevrtex_camo").exists()

# --- data.py: batches ---------------------------------------------------------------------------
SCENES = data.Scenes(  # their pixels are their own number
    np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 3, 4, 4)), None)

def test_batches_depend_on_seed_and_step_alone_and_each_epoch_is_a_permutation():
    batches = [data.batch_indices(97, 32, 5, step) for step in range(6)]
    epochs = np.reshape(batches, (2, 96))
    assert [len(set(epoch)) for epoch in epochs] == [96, 96] and any(epochs[0] != epochs[1])
    assert np.array_equal(data.batch_indices(97, 32, 5, 4), batches[4])
    assert not np.array_equal(data.batch_indices(97, 32, 6, 4), batches[4])
    few = [data.batch_indices(3, 32, *seeds) for seeds in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(set(indices) == {0, 1, 2} and len(indices) == 32 for indices in few)
    assert np.array_equal(few[0], few[3]) and len({indices.tobytes() for indices in few}) == 3

def test_batches_come_in_order_a_few_ahead_raise_the_error_and_leave_no_thread(monkeypatch):
    threads = threading.active_count()
    expected = [data.batch_indices(50, 8, 3, step).tolist() for step in range(11, 20)]
    original = data.batch_indices
    steps = []

    def note(count, batch_size, seed, step):
        steps.append(step)
        if step == 15:
            raise IndexError
        return original(count, batch_size, seed, step)
    monkeypatch.setattr(data, "batch_indices", note)
    batches = data.batches(SCENES, 8, seed=3, start=11, stop=10**9, device=CPU)
    for k in range(4):
        batch = next(batches)
        assert batch[:, 0, 0, 0].tolist() == expected[k]
        assert batch.dtype == torch.uint8 and batch.shape == (8, 3, 4, 4)
        assert steps == [*range(11, 11 + len(steps))] and len(steps) <= k + 1 + 4
    with pytest.raises(IndexError):  # where it belongs
        next(batches)
    assert threading.active_count() == threads

def test_shifted_batches_show_the_scenes_moved_and_their_borders_repeated():
    """numpy's padding by edges is the authority. A run that goes on sees the same batches."""
    images = np.random.default_rng(0).integers(256, size=(50, 3, 6, 4), dtype=np.uint8)
    scenes = data.Scenes(images, None)
    padded = np.pad(images, [(0, 0), (0, 0), (2, 2), (2, 2)], "edge")
    moved = {(y - 2, x - 2): padded[:, :, y:y + 6, x:x + 4] for y in range(5) for x in range(5)}
    steps = range(11, 211)
    seen = []
    for step, batch in zip(steps, data.batches(scenes, 8, 3, 11, 211, CPU, shift=2)):
        indices = data.batch_indices(50, 8, 3, step)
        seen += [by for by, all in moved.items() if np.array_equal(batch, all[indices])]
    assert len(seen) == len(steps) and set(seen) == set(moved)  # one place each; all 25 occur
    resumed = data.batches(scenes, 8, 3, 19, 21, CPU, slice(1, None, 2), shift=2, shift_from=20)
    for by, step in [((0, 0), 19), (seen[9], 20)]:  # and before shift_from they are not moved
        indices = data.batch_indices(50, 8, 3, step)[1::2]
        assert np.array_equal(next(resumed), moved[by][indices])
