"""What is true of AST-Seg, and how do we know? The second half of the lesson, in the order of the paper.

Each test states a truth and holds ast_seg.py against an authority that shares no code with it: the equation
itself as a plain loop in float64, a proof, a table of the paper typed in again, a library, or a real run.

    pytest test_ast_seg.py
"""
import dataclasses
import functools
import gzip
import http.server
import itertools
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ast_seg
import data

torch.set_num_threads(1)  # sums are added in the same order everywhere, and quickly where cores are busy
CPU = torch.device("cpu")
TINY = dict(  # a model and a run of 18 steps, each in a tenth of a second: 6 of phase 1, 8 of 2, 4 of 3
    background_steps=6, steps=12, phase2_steps=8, batch_size=4, background_batch_size=4, lr=1e-3,
    warmup_steps=2, entropy_warmup_steps=6, refine_warmup_steps=4, switch_warmup_steps=1,
    robust_warmup_steps=4, decay_at=0.9, slots=4, d_t=64, d_ff=64, layers=1, s_max=24.0, entropy_weight=0.01,
    limit=12, log_every=1, checkpoint_every=2, validate_every=6)
tiny = partial(ast_seg.make_settings, "shapes", **TINY)


@pytest.fixture(autouse=True)
def same_randomness_every_time():
    torch.manual_seed(0)


def close(ours, truth, tolerance=1e-5):
    truth = torch.as_tensor(np.asarray(truth), dtype=torch.float64)
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours.detach().double(), truth, rtol=tolerance, atol=tolerance)


# --- Settings: Table 1 of the supplement ----------------------------------------------------------
def test_the_defaults_are_table_1():
    table_1 = dict(
        background_batch_size=128, background_lr=0.002, background_steps=2500, batch_size=64, lr=0.00004,
        adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-9, steps=125000, phase2_steps=30000,
        warmup_steps=5000, entropy_warmup_steps=10000, log_alpha_0=11, d_z_what=32, entropy_weight=0.01,
        s_min=1.3, s_max=24, d_t=256, heads=8, d_ff=512, layers=6)
    for settings in (ast_seg.Settings(), ast_seg.make_settings("clevr")):
        assert {k: getattr(settings, k) for k in table_1} == table_1


@pytest.mark.parametrize("name, size, slots, anisotropic, background, background_steps", [
    ("clevr", 128, 10, False, "simple", 2500), ("objects_room", 64, 3, True, "complex", 500000)])
def test_what_the_paper_says_of_each_dataset(name, size, slots, anisotropic, background, background_steps):
    """Sections 4 and 5, and Table 1."""
    s = ast_seg.make_settings(name)
    assert (s.size, s.slots, s.anisotropic) == (size, slots, anisotropic)
    assert (s.background, s.background_steps) == (background, background_steps)


def test_a_shorter_run_keeps_its_proportions():
    s = ast_seg.make_settings("clevr", steps=1250)
    assert (s.phase2_steps, s.warmup_steps, s.entropy_warmup_steps) == (300, 50, 100)
    s = ast_seg.make_settings("clevr", steps=1250, warmup_steps=7)  # what is given stays
    assert (s.phase2_steps, s.warmup_steps) == (300, 7)
    s = ast_seg.make_settings("shapes", background_steps=80)  # phase 1 has a warm-up of its own
    usual = ast_seg.SHAPES
    assert s.robust_warmup_steps == math.ceil(usual["robust_warmup_steps"] * 80 / usual["background_steps"])
    assert s.phase2_steps == usual["phase2_steps"]


@pytest.mark.parametrize("given, flag", [
    (dict(size=48), "--size"), (dict(size=224), "--size"), (dict(steps=0), "--steps"),
    (dict(background_steps=-1), "--background-steps"), (dict(lr=-1.0), "--lr"), (dict(lr=math.nan), "--lr"),
    (dict(d_t=60), "--d-t"), (dict(d_t=32, identity_init=True), "--d-t"), (dict(s_min=-1.0), "--s-min"),
    (dict(s_min=5.0, s_max=4.0), "--s-min"), (dict(generator="resnet"), "--generator"),
    (dict(curriculum="none"), "--curriculum"), (dict(slots=0), "--slots"),
    (dict(batch_size=1), "--batch-size"), (dict(lr=math.inf), "--lr"),
    (dict(glimpse_size=24), "--glimpse-size"), (dict(glimpse_channels=56), "--glimpse-channels")])
def test_settings_that_cannot_work_are_refused_in_one_sentence(given, flag):
    with pytest.raises(ast_seg.SettingsError, match=flag) as refusal:
        ast_seg.make_settings("shapes", **given)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


@pytest.mark.parametrize("given", [
    *(dict(generator=g, size=size) for g in ("unet-small", "unet", "tiny") for size in range(32, 193, 32)),
    dict(glimpse_size=4, glimpse_channels=32), dict(glimpse_size=128, glimpse_channels=32)], ids=str)
def test_settings_that_are_not_refused_do_work(given):
    """Every part takes images of the size, and glimpses have the side that was asked for."""
    try:
        s = tiny(**given, layers=0)
    except ast_seg.SettingsError:
        return
    with torch.device("meta"):  # shapes without numbers
        model, images = ast_seg.ASTSeg(s), torch.rand(2, 3, s.size, s.size)
        maps, background = model.feature_maps(images), model.background(images)
        glimpse = model.glimpse_generator(torch.rand(1, s.d_z_what))
    assert maps.shape[:2] == (2, s.slots + 34) and background.shape == (2, 4, s.size, s.size)
    assert glimpse.shape == (1, 4, s.glimpse_size, s.glimpse_size)


def test_every_setting_is_a_flag():
    for field in dataclasses.fields(ast_seg.Settings):
        flag, choices = "--" + field.name.replace("_", "-"), field.metadata["choices"]
        value = not field.default if field.type is bool else choices[-1] if choices else field.type(7)
        given = [flag] if field.type is bool else [flag, str(value)]
        assert vars(ast_seg.parse_arguments(given))[field.name] == value
    assert not ast_seg.parse_arguments(["--no-identity-init"]).identity_init


def test_the_help_can_be_read(capsys):
    with pytest.raises(SystemExit) as end:
        ast_seg.main(["--help"])
    assert end.value.code == 0
    assert "N_pixel" in capsys.readouterr().out  # the notation of Table 1, with no % left to trip over


# --- 2. Motivation: Proposition 2.1 -----------------------------------------------------------------
def shift(phi, u, v):
    """T_uv of Eq. 1: u columns to the right, v rows down. What left the map would be lost, so nothing may."""
    h, w = phi.shape
    shifted = torch.zeros_like(phi)
    for i, j in phi.nonzero().tolist():
        assert 0 <= i + v < h and 0 <= j + u < w
        shifted[i + v, j + u] = phi[i, j]
    return shifted


def random_map(h, w, total=1.0):
    """A map of positive and negative values with the given sum, and room of 3 cells around them."""
    phi = torch.zeros(h, w, dtype=torch.float64)
    phi[3:-3, 3:-3] = torch.randn(h - 6, w - 6, dtype=torch.float64)
    phi[4, 5] += total - phi.sum()
    return phi


SHIFTS = list(itertools.product(range(-3, 4), range(-3, 4)))


def test_soft_argmax_is_equation_10():
    """sum_p p softmax(phi)(p), as a loop: (x, y) with x along columns. And nothing overflows."""
    logits = torch.randn(2, 3, 5, 8, dtype=torch.float64) * 3
    truth = np.zeros((2, 3, 2))
    for n, k in np.ndindex(2, 3):
        total = sum(math.exp(logits[n, k, i, j]) for i in range(5) for j in range(8))
        for i, j in np.ndindex(5, 8):
            truth[n, k] += np.array([j, i]) * math.exp(logits[n, k, i, j]) / total
    close(ast_seg.soft_argmax(logits), truth, 1e-13)
    spike = torch.full((4, 6), -1e4).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(1e4))
    assert ast_seg.soft_argmax(spike).tolist() == [5, 1]


def test_forward_soft_argmax_is_equivariant():
    """M(T_uv phi) = M(phi) + (u, v) (Eq. 3), for logits with room around them and all shifts in a window."""
    patch, room = torch.randn(6, 9, dtype=torch.float64) * 3, 5
    found = {}
    for u, v in itertools.product(range(-room, room + 1), repeat=2):
        logits = torch.full((6 + 2 * room, 9 + 2 * room), -math.inf, dtype=torch.float64)
        logits[room + v:room + v + 6, room + u:room + u + 9] = patch
        found[u, v] = ast_seg.soft_argmax(logits)
    for (u, v), position in found.items():
        close(position, found[0, 0] + torch.tensor([u, v]), 1e-13)


@pytest.mark.parametrize("C", [0.0, torch.tensor([0.7, -40.0], dtype=torch.float64)], ids=["C=0", "C"])
def test_forward_equation_4_is_affine_and_equivariant_where_maps_sum_to_1(C):
    M = partial(ast_seg.affine_localizer, C=C)
    phi = random_map(11, 12)
    for u, v in SHIFTS:
        close(M(shift(phi, u, v)), M(phi) + torch.tensor([u, v]), 1e-12)
    alphas = torch.tensor([0.3, -2.0, 2.7], dtype=torch.float64)  # they sum to 1
    maps = torch.stack([random_map(11, 12) for _ in alphas])
    mixture = torch.einsum("a,ahw->hw", alphas, maps)
    close(M(mixture), alphas @ M(maps), 1e-12)


@pytest.mark.parametrize("total", [0.0, 0.9, 2.0])
def test_forward_but_not_where_they_do_not(total):
    """A map of sum m moves by m (u, v): not equivariant. And outside of mixtures, C spoils what is affine."""
    phi = random_map(11, 12, total)
    M = partial(ast_seg.affine_localizer, C=1.0)
    for u, v in SHIFTS:
        moved = M(shift(phi, u, v)) - M(phi)
        close(moved, [total * u, total * v], 1e-12)
        assert (u, v) == (0, 0) or (moved - torch.tensor([u, v])).abs().max() > 0.05
    assert not torch.allclose(M(total * random_map(11, 12)), total * M(random_map(11, 12)))


def test_backward_no_other_affine_operator_is_equivariant():
    """The proposition itself, as linear algebra. The most general affine operator on an h x w grid is
    M(phi) = sum_p phi(p) a_p + b with a_p, b in R^2. Equivariance, M(T_uv phi) - M(phi) = (u, v), is linear
    in (a, b). By rank, the values M(delta_p) of its solutions are p + C, C in R^2 free, no others: Eq. 4."""
    h, w = 4, 5
    cells = list(itertools.product(range(h), range(w)))
    maps = [F.one_hot(torch.tensor(i * w + j), h * w).view(h, w).double() for i, j in cells]  # every delta_p
    for rows, columns in [(1, 3), (2, 2), (3, 2), (3, 4), (4, 1)]:  # and mixtures, in the room that they need
        mixture = torch.zeros(h, w, dtype=torch.float64)
        mixture[:rows, :columns] = torch.randn(rows, columns, dtype=torch.float64)
        mixture[0, 0] += 1 - mixture.sum()
        maps.append(mixture)
    equations, right_hand_sides = [], []
    for phi, u, v in itertools.product(maps, range(1 - w, w), range(1 - h, h)):
        if all(0 <= i + v < h and 0 <= j + u < w for i, j in phi.nonzero().tolist()):  # it stays in the grid
            in_a = (shift(phi, u, v) - phi).flatten().numpy()
            equations.append([*in_a, 0.0])  # b cancels
            right_hand_sides.append([u, v])  # for the x and the y of M
    E, R, rank = np.array(equations), np.array(right_hand_sides, float), np.linalg.matrix_rank
    assert rank(E) == rank(np.hstack([E, R])) == h * w - 1  # solutions exist, and one is:
    solution = np.linalg.lstsq(E, R, rcond=None)[0]  # (h w + 1, 2)
    values = solution[:-1] + solution[-1]  # M(delta_p) = a_p + b, all there is to M on maps that sum to 1
    C = values[0] - [0, 0]
    np.testing.assert_allclose(values, [C + [j, i] for i, j in cells], atol=1e-12)
    # Any two solutions differ by a kernel of E, per axis (a, b) of 2 dimensions, whose values M(delta_p) ...
    kernel = np.linalg.svd(E)[2][rank(E):]
    kernel_values = kernel[:, :-1] + kernel[:, -1:]
    assert len(kernel) == 2 and rank(kernel_values, tol=1e-9) == 1  # ... have one, so that x and y have two,
    constants = kernel_values[:, :1].repeat(h * w, 1)
    np.testing.assert_allclose(kernel_values, constants, atol=1e-12)  # ... the same for all p: it is C
    M = ast_seg.affine_localizer(torch.stack(maps), torch.from_numpy(C))  # and the code is that operator
    np.testing.assert_allclose(M, torch.stack(maps).flatten(1).numpy() @ values, atol=1e-12)


def test_what_it_buys_a_convolution_finds_what_moved_where_it_moved_to():
    """Features of a plain convolution are equivariant (Eq. 2), so the position found in them moves along."""
    bright, kernel = torch.rand(5, 5, dtype=torch.float64), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    found = {}
    for u, v in SHIFTS:
        image = torch.zeros(1, 1, 24, 30, dtype=torch.float64)
        image[0, 0, 9 + v:14 + v, 12 + u:17 + u] = bright
        logits = 10 * F.conv2d(image, kernel, padding=2).square()  # sharp, as trained ones are
        found[u, v] = ast_seg.soft_argmax(logits[0])  # (4, 2), four attention maps
    for (u, v), positions in found.items():
        close(positions, found[0, 0] + torch.tensor([u, v]), 1e-6)


def test_what_breaks_it_a_border():
    """A detector of vertical edges, on a square before grey: without padding, the square is found 5 pixels
    further when it moves by 5. With zeros around the image, its border is an edge too, and one that stays
    where it is. And of a square that leaves the image a part is gone, padding or not."""
    detector = torch.tensor([[[[-1.0, 0.0, 1.0]]]], dtype=torch.float64)

    def find(u, padding):
        image = torch.full((1, 1, 24, 40), 0.5, dtype=torch.float64)
        image[..., 8:16, 10 + u:18 + u] = 1.0
        edges = F.conv2d(image, detector, padding=(0, padding))
        return ast_seg.soft_argmax(40 * edges.relu())[0, 0]
    close(find(5, 0) - find(0, 0), [5.0, 0.0], 1e-4)
    assert (find(5, 1) - find(0, 1))[0] < 3
    assert (find(-14, 0) - find(0, 0))[0] > -13


# --- 4.1 Feature maps and attention (Algorithm 1) ---------------------------------------------------
def attend_as_loops(attention, features):
    """Eq. 12-16, with indices from 1 as there. (K, h, w), (d, h, w) -> (K, d + 2): phi_k, x_k, y_k."""
    K, h, w = attention.shape
    out = np.zeros((K, len(features) + 2))
    for k, j, i in np.ndindex(K, h, w):
        x, y = 2 * (i + 1 - 1) / (w - 1) - 1, 2 * (j + 1 - 1) / (h - 1) - 1
        out[k] += float(attention[k, j, i]) * np.array([*features[:, j, i].tolist(), x, y])
    return out


def test_attend_is_equations_12_to_16():
    attention = ast_seg.spatial_softmax(torch.randn(2, 3, 4, 7, dtype=torch.float64))
    close(attention.sum((-2, -1)), np.ones((2, 3)), 1e-12)
    features = torch.randn(2, 5, 4, 7, dtype=torch.float64)
    truth = [attend_as_loops(a, f) for a, f in zip(attention, features)]
    close(ast_seg.attend(attention, features), truth, 1e-12)


def test_attend_never_holds_the_product_of_maps_and_features():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                self.numel = max(self.numel, tensor.numel())
            return result
    n, K, d, h, w = 2, 8, 16, 12, 12
    with Largest() as largest:
        ast_seg.attend(torch.rand(n, K, h, w), torch.rand(n, d, h, w))
    assert 0 < largest.numel <= n * (d + 2) * h * w < n * K * (d + 2) * h * w / 4


@pytest.mark.parametrize("anisotropic", [False, True])
@pytest.mark.parametrize("stretch", [1.0, 5.0], ids=["as found", "clamped"])
def test_encode_is_algorithm_1(anisotropic, stretch):
    """From the generator's maps to the latents, by loops; the refinement is replaced by a multiplication."""
    s = tiny(anisotropic=anisotropic, layers=0)
    model = ast_seg.ASTSeg(s).eval()
    maps = torch.randn(2, s.slots + 1 + anisotropic + 1 + 32, 6, 9) * 3
    model.feature_maps.forward = lambda images: maps
    model.refine.register_forward_hook(lambda module, args, out: stretch * out)
    latents = model.encode(torch.rand(2, 3, 64, 64))
    clamped = 0
    for n in range(2):
        logits = maps[n, :s.slots].double()
        attention = [a.exp() / a.exp().sum() for a in logits]  # Eq. (11)
        close(latents.attention[n], torch.stack(attention))
        phi = stretch * attend_as_loops(torch.stack(attention), maps[n, s.slots:])
        scale, log_alpha, z_what, x, y = np.split(phi, np.cumsum([1 + anisotropic, 1, 32, 1]), axis=1)
        clamped += (np.abs([x, y]) > 1).sum()
        close(latents.x[n], np.minimum(np.maximum(x, -1), 1)[:, 0])
        close(latents.y[n], np.minimum(np.maximum(y, -1), 1)[:, 0])
        close(latents.s[n], 1.3 + (24 - 1.3) / (1 + np.exp(-scale)))
        close(latents.log_alpha[n], log_alpha[:, 0])
        close(latents.z_what[n], z_what)
    assert (clamped > 0) == (stretch > 1)


def test_bfloat16_stops_at_the_feature_maps():
    """Positions are computed in float32: bfloat16 has no numbers between 0.5 and 0.504."""
    latents = ast_seg.ASTSeg(tiny(precision="bfloat16")).eval().encode(torch.rand(2, 3, 64, 64))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in latents)
    close(latents.attention.sum((-2, -1)), np.ones((2, 4)))


def count_segformer(depths, widths, reductions, decoder, labels):
    """Parameters of SegFormer, added up from its paper [48]: overlapping patches, attention whose keys and
    values are reduced by a convolution, feed-forward with a 3x3 depthwise convolution, an all-MLP decoder."""
    def linear(c, c_out, kernel=1):
        return kernel * kernel * c * c_out + c_out

    total, c = 0, 3
    for stage, (depth, wide, r) in enumerate(zip(depths, widths, reductions)):
        norm = 2 * wide
        reduce = linear(wide, wide, r) + norm if r > 1 else 0
        feed_forward = linear(wide, 4 * wide) + (9 + 1) * 4 * wide + linear(4 * wide, wide)
        total += linear(c, wide, 3 if stage else 7) + norm  # patches
        total += depth * (2 * norm + 4 * linear(wide, wide) + reduce + feed_forward) + norm
        total += linear(wide, decoder)
        c = wide
    return total + 4 * decoder * decoder + 2 * decoder + linear(decoder, labels)


def test_the_b3_generator_has_47_million_parameters():
    """MiT-B3 and its decoder, here for K + d_phi maps, d_phi = 1 + 1 + 32: 47.3 million, as in [48]."""
    with torch.device("meta"):
        model = ast_seg.ASTSeg(ast_seg.make_settings("clevr"))
    ours = sum(p.numel() for p in model.feature_maps.parameters())
    assert ours == count_segformer((3, 4, 18, 3), (64, 128, 320, 512), (8, 4, 2, 1), 768, 10 + 34)
    assert ours == pytest.approx(47.3e6, rel=0.002)


@pytest.mark.parametrize("generator, stride", [("tiny", 4), ("b0", 4), ("unet-small", 4), ("unet", 1)])
def test_generators_make_maps_of_a_quarter_of_the_resolution_and_table_3_of_all(generator, stride):
    with torch.device("meta"):
        model = ast_seg.ASTSeg(tiny(generator=generator, identity_init=False))
        assert model.feature_maps(torch.rand(2, 3, 64, 128)).shape == (2, 4 + 34, 64 // stride, 128 // stride)


def trace(network, modules, *inputs):
    """(channels, side) of what leaves each of the modules."""
    seen = []
    hooks = [module.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:3])))
             for module in modules]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_unet_is_table_3_layer_by_layer():
    d = 10 + 34
    with torch.device("meta"):
        unet = ast_seg.UNet("unet", d)
        rows = [unet.first, *unet.down, unet.center, *unet.up, *unet.last]
        shapes = trace(unet, rows, torch.rand(1, 3, 64, 64))
    assert shapes == [
        (80, 64), (128, 32), (192, 16), (256, 8), (256, 4), (256, 2), (256, 2),  # down, center
        (256, 4), (256, 8), (192, 16), (128, 32), (80, 64), (d, 64), (d, 64), (d, 64)]  # up, last three
    convolutions = [m for row in rows for m in row.modules()
                    if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    down, up = [(4, 2, 1), (3, 1, 1)], [(3, 1, 1), (4, 2, 1)]  # kernel, stride, padding
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in convolutions] == (
        [(3, 1, 1)] + 5 * down + [(3, 1, 1)] + 5 * up + [(3, 1, 1), (3, 1, 1), (1, 1, 0)])
    assert [m.transposed for m in convolutions] == [False] * 12 + 5 * [False, True] + [False] * 3
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in unet.modules()) == len(convolutions) - 2
    assert sum(isinstance(m, torch.nn.CELU) for m in unet.modules()) == len(convolutions) - 2


def test_a_level_of_the_unet_sees_the_level_below_and_the_one_across():
    """Skip connections: with the level below silenced, the output still depends on the image."""
    unet = ast_seg.UNet("unet-small", 5).eval()
    for module in (unet.center, *unet.up):
        module.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    one, other = unet(torch.rand(2, 3, 64, 64))
    assert (one - other).abs().max() > 1e-3


def save_backbone(folder, **changes):
    from transformers import SegformerConfig, SegformerModel
    depths, widths, heads, _ = ast_seg.SEGFORMERS["tiny"]
    sizes = dict(depths=list(depths), hidden_sizes=list(widths), num_attention_heads=list(heads)) | changes
    backbone = SegformerModel(SegformerConfig(**sizes))
    backbone.save_pretrained(folder)
    return backbone


def test_a_pretrained_backbone_comes_from_a_folder_and_the_decoder_stays_random(tmp_path):
    backbone = save_backbone(tmp_path)
    model = ast_seg.Segformer("tiny", 20)
    decoder = {k: v.clone() for k, v in model.net.decode_head.state_dict().items()}
    model.load_backbone(str(tmp_path))
    ours = model.net.segformer.state_dict()
    assert ours.keys() == backbone.state_dict().keys()
    assert all(torch.equal(v, ours[k]) for k, v in backbone.state_dict().items())
    assert all(torch.equal(v, decoder[k]) for k, v in model.net.decode_head.state_dict().items())


@pytest.mark.parametrize("what", ["missing", "empty", "other size", "fewer layers", "foreign", "damaged"])
def test_a_backbone_that_does_not_fit_is_refused_in_one_sentence(what, tmp_path):
    from transformers import ViTConfig, ViTModel
    folder = tmp_path / "a" / "backbone"  # three parts and more: no hub name looks like this
    if what != "missing":
        folder.mkdir(parents=True)
    if what == "other size":
        save_backbone(folder, hidden_sizes=[16, 32, 64, 256])
    if what == "fewer layers":
        save_backbone(folder, depths=[2, 1, 1, 1])
    if what == "foreign":
        ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32)).save_pretrained(folder)
    if what == "damaged":
        save_backbone(folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ast_seg.SettingsError, match="Cannot load backbone .*--backbone") as refusal:
        ast_seg.Segformer("tiny", 20).load_backbone(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("identity_init", [False, True])
def test_permuting_the_queries_permutes_what_comes_out(identity_init):
    """Queries have no order. Yet they see each other, unless the transformer starts as the identity."""
    refine = ast_seg.Refinement(36, tiny(layers=3, identity_init=identity_init)).eval()
    triplets, order = torch.randn(2, 5, 36), torch.tensor([3, 0, 4, 1, 2])
    close(refine(triplets)[:, order], refine(triplets[:, order]).detach())
    changed = triplets.clone()
    changed[:, 0] += 1
    effect = (refine(changed) - refine(triplets))[:, 1:].abs().max()
    assert (effect > 1e-3) != identity_init


def test_identity_init_starts_near_the_identity_and_can_leave_it():
    triplets = torch.randn(64, 5, 36)

    def distance(refine):
        return ((refine.eval()(triplets) - triplets).norm() / triplets.norm()).item()
    refine = ast_seg.Refinement(36, tiny(layers=3, identity_init=True))
    random = ast_seg.Refinement(36, tiny(layers=3, identity_init=False))
    assert distance(refine) < 0.05 < 0.5 < distance(random)
    refine(triplets).square().mean().backward()
    for layer in refine.encoder.layers:
        assert layer.self_attn.out_proj.weight.grad.any() and layer.linear2.weight.grad.any()


# --- 4.1 Rendering (Algorithm 2) --------------------------------------------------------------------
@pytest.mark.parametrize("size, rows", [
    (64, [(64, 2), (32, 4), (16, 8), (8, 16), (4, 32)]),
    (128, [(128, 2), (64, 4), (32, 8), (16, 16), (8, 32), (4, 64)]),
    (192, [(256, 2), (128, 4), (64, 8), (32, 16), (16, 32), (8, 64), (4, 128)])])  # once more, as for 256
def test_the_glimpse_generator_is_table_2_layer_by_layer(size, rows):
    """(channels, side) after each transposed convolution; the groups and the bias, too."""
    with torch.device("meta"):
        model = ast_seg.ASTSeg(tiny(size=size, glimpse_size=0, glimpse_channels=0, layers=0))
        layers = [m for m in model.glimpse_generator.modules() if not list(m.children())]
        convolutions = [m for m in layers if isinstance(m, torch.nn.ConvTranspose2d)]
        assert trace(model.glimpse_generator, convolutions, torch.rand(1, 32)) == rows
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in convolutions] == (
        [(2, 2, 0)] + [(4, 2, 1)] * (len(rows) - 1))
    assert [m.bias is not None for m in convolutions] == [False] * (len(rows) - 1) + [True]
    groups = {256: 16, 128: 8, 64: 4, 32: 2, 16: 1, 8: 1}  # GroupNorm(8, 128) and so on
    norms = [m for m in layers if isinstance(m, torch.nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(groups[c], c) for c, _ in rows[:-1]]
    names = " ".join(type(m).__name__ for m in layers)
    assert names.endswith("ConvTranspose2d GroupNorm CELU " * len(norms) + "ConvTranspose2d Sigmoid")


def place(glimpse, x, y, s_x, s_y, h, w):
    """The spatial transformer as loops in float64: (c, g, g) -> (c, h, w). Pixel j of w has its centre at
    (2 j + 1) / w - 1. Between the centres of a glimpse's pixels it is bilinear, beyond them it fades to 0."""
    c, g, _ = glimpse.shape
    out = np.zeros((c, h, w))
    for i, j in np.ndindex(h, w):
        column = ((s_x * ((2 * j + 1) / w - 1 - x) + 1) * g - 1) / 2  # in pixels of the glimpse
        row = ((s_y * ((2 * i + 1) / h - 1 - y) + 1) * g - 1) / 2
        for a, b in itertools.product((0, 1), repeat=2):
            r, q = math.floor(row) + a, math.floor(column) + b
            if 0 <= r < g and 0 <= q < g:
                out[:, i, j] += (1 - abs(row - r)) * (1 - abs(column - q)) * glimpse[:, r, q]
    return out


@pytest.mark.parametrize("s", [[2.0], [5.5], [1.3, 4.0], [7.0, 2.5]], ids=str)
@pytest.mark.parametrize("h, w", [(9, 9), (8, 15), (14, 7)])
def test_the_spatial_transformer_is_bilinear_sampling(s, h, w):
    glimpses = torch.rand(3, 4, 5, 5, dtype=torch.float64)
    x, y = torch.tensor([[0.0, -0.9, 0.31], [0.0, 0.6, -1.0]], dtype=torch.float64)
    placed = ast_seg.spatial_transformer(glimpses, x, y, torch.tensor([s] * 3, dtype=torch.float64), h, w)
    truth = [place(g.numpy(), float(a), float(b), s[0], s[-1], h, w) for g, a, b in zip(glimpses, x, y)]
    close(placed, np.stack(truth), 1e-12)


@pytest.mark.parametrize("s", [[2.5], [4.0], [12.0], [2.5, 8.0], [9.0, 3.0]], ids=str)
@pytest.mark.parametrize("h, w", [(96, 96), (80, 144), (144, 80)])
@pytest.mark.parametrize("x, y", [(0.0, 0.0), (0.55, -0.2), (-0.4, 0.5)])
def test_an_object_at_x_y_has_its_centre_of_mass_there_and_the_extent_2_over_s(s, h, w, x, y):
    """x runs over columns and y over rows, both from -1 to 1, on images that are not square as well."""
    where = torch.tensor([x]), torch.tensor([y]), torch.tensor([s])
    mask = ast_seg.spatial_transformer(torch.ones(1, 1, 32, 32), *where, h, w)[0, 0]
    columns, rows = mask.sum(0).double(), mask.sum(1).double()
    pixel = 2 / min(h, w)
    for profile, position, scale in ((columns, x, s[0]), (rows, y, s[-1])):
        centres = (2 * torch.arange(len(profile)).double() + 1) / len(profile) - 1
        assert (profile @ centres / profile.sum()).item() == pytest.approx(position, abs=pixel / 2)
        inside = (profile > profile.max() / 2).sum().item() * 2 / len(profile)
        assert inside == pytest.approx(2 / scale, abs=pixel * 1.01)


def random_latents(n, K, d_s=1):
    return ast_seg.Latents(
        x=torch.rand(n, K) * 2 - 1, y=torch.rand(n, K) * 2 - 1, s=1.3 + 3 * torch.rand(n, K, d_s),
        log_alpha=torch.randn(n, K) * 2, z_what=torch.randn(n, K, 32) * 2, attention=torch.rand(n, K, 4, 4))


@pytest.mark.parametrize("anisotropic", [False, True])
def test_render_is_algorithm_2(anisotropic):
    """Object by object, pixel by pixel, in float64: place the glimpse, Eq. 17 with M_0 = 1, Eq. 18."""
    s = tiny(glimpse_size=4, glimpse_channels=32, log_alpha_0=0.5, anisotropic=anisotropic)
    model = ast_seg.ASTSeg(s)
    latents, background = random_latents(2, 3, 1 + anisotropic), torch.rand(2, 3, 7, 10)
    scene = model.eval().render(latents, background)
    assert scene.image.shape == (2, 3, 7, 10)
    for n in range(2):
        layers, masks, alphas = [background[n].double().numpy()], [np.ones((7, 10))], [math.exp(0.5)]
        for k in range(3):
            glimpse = model.glimpse_generator(latents.z_what[n, k][None])[0].detach().double().numpy()
            s = latents.s[n, k].tolist()
            drawn = place(glimpse, latents.x[n, k].item(), latents.y[n, k].item(), s[0], s[-1], 7, 10)
            layers.append(drawn[:3])
            masks.append(drawn[3])
            alphas.append(math.exp(latents.log_alpha[n, k]))
        w, image = np.zeros((4, 7, 10)), np.zeros((3, 7, 10))
        for k, i, j in np.ndindex(w.shape):
            w[k, i, j] = alphas[k] * masks[k][i, j] / sum(a * m[i, j] for a, m in zip(alphas, masks))
            image[:, i, j] += w[k, i, j] * layers[k][:, i, j]
        close(scene.layers[n], np.stack(layers))
        close(scene.weights[n], w)
        close(scene.image[n], image)


@pytest.mark.parametrize("log_alpha_0", [-80.0, 11.0, 80.0])
@pytest.mark.parametrize("log_alphas", [(80.0, -80.0, 80.0), (-80.0, -80.0, -80.0), (40.0, 80.0, 0.0)])
def test_no_activation_overflows(log_alpha_0, log_alphas):
    """The square of e^80 is beyond float32. The weights still sum to 1, are those of Eq. 17, and have finite
    gradients, also where masks are 0, or as small as numbers get."""
    masks = torch.rand(2, 3, 5, 6)
    masks[:, :, 0], masks[:, 1, 1], masks[:, :, 2] = 0, 1e-38, 1
    masks, alphas = masks.requires_grad_(), torch.tensor([log_alphas] * 2, requires_grad=True)
    first = torch.tensor(log_alpha_0, requires_grad=True)
    weights = ast_seg.layer_weights(masks, alphas, first)
    close(weights.sum(1), np.ones((2, 5, 6)))
    activations = torch.cat([first.double().expand(2, 1), alphas.double()], 1).exp()[..., None, None]
    claims = activations * torch.cat([torch.ones(2, 1, 5, 6), masks], 1).double()
    close(weights, (claims / claims.sum(1, keepdim=True)).detach())
    (ast_seg.pixel_entropy_loss(weights) + (weights * torch.rand(2, 4, 5, 6)).sum()).backward()
    for tensor in (weights, masks.grad, alphas.grad, first.grad):
        assert tensor.isfinite().all()


def many_labels(**given):
    """A model that, untrained, shows objects."""
    model = ast_seg.ASTSeg(tiny(log_alpha_0=-1.0, s_max=2.5, **given))
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64))  # in training mode: batch norm learns the mean of images
    return model.eval()


def test_segment_is_the_arg_max_of_the_weights_and_never_calls_the_background_model():
    model, images = many_labels(), torch.rand(3, 3, 64, 64)
    truth = model(images).weights.argmax(1)
    del model.background
    labels = model.segment(images)
    assert labels.dtype == torch.int64 and labels.shape == (3, 64, 64)
    assert len(labels.unique()) > 1 and 0 in labels
    assert torch.equal(labels, truth)


# --- 4.1 The background model, reference [38] -------------------------------------------------------
FACTS = {  # kind and size of the image: channels of the encoder; of the generator, from image to latent
    ("simple", 128): ("3 64 160 320 160 160 32 16", "4 144 256 512 256 256 32 16"),
    ("simple", 64): ("3 64 160 320 160 32 16", "4 144 256 512 256 32 16"),
    ("complex", 128): ("3 64 320 640 640 320 16 16", "4 144 640 1280 640 320 16 16"),
    ("complex", 64): ("3 64 160 320 160 16 16", "4 144 640 1280 640 16 16")}


@pytest.mark.parametrize("kind, size", FACTS)
def test_the_background_model_has_the_channels_of_its_table(kind, size):
    """Blocks halve the image down to a latent of 16 numbers at 1 x 1, and back up."""
    encoder, generator = ([int(c) for c in line.split()] for line in FACTS[kind, size])
    sides = [size >> i for i in range(len(encoder))]
    with torch.device("meta"):
        model = ast_seg.Background(kind, size)
        shapes = trace(model, [*model.encoder, *model.generator], torch.rand(2, 3, size, size))
    assert shapes == list(zip(encoder, sides))[1:] + list(zip(generator, sides))[-2::-1]
    assert encoder[-1] == 16 and sides[-1] == 1
    down = [(m.conv.kernel_size[0], m.conv.stride[0], m.conv.padding[0]) for m in model.encoder]
    assert down == [(5, 2, 2)] * (len(down) - 2) + [(4, 2, 1), (2, 1, 0)]  # 4 is not above 5; 2 is the whole
    assert [m.conv.kernel_size[0] for m in model.generator] == [kernel for kernel, _, _ in down[::-1]]
    for block in (*model.encoder, *model.generator):
        assert block.conv.bias is None
    for block in (*model.encoder, *model.generator[:-1]):
        assert [type(m) for m in block.norm] == [torch.nn.GroupNorm, torch.nn.CELU]
        assert block.norm[0].num_groups == max(1, block.norm[0].num_channels // 16)
    assert isinstance(model.generator[-1].norm, torch.nn.Sigmoid)


@pytest.mark.parametrize("size", [51, 64, 96, 100, 127, 160, 192])
def test_the_background_model_gives_back_images_of_any_size(size):
    model = ast_seg.Background("small", size).eval()
    out = model(torch.rand(1, 3, size, size))
    assert out.shape == (1, 4, size, size) and 0 <= out.min() <= out.max() <= 1
    assert model.encoder(torch.rand(1, 3, size, size)).shape == (1, 16, 1, 1)


def test_every_block_of_the_background_model_knows_where_its_pixels_are():
    """The last two channels of a convolution's input: j / (w - 1) - 0.5 and i / (h - 1) - 0.5, or 1 and 1."""
    model, seen = ast_seg.Background("small", 51), []
    for block in (*model.encoder, *model.generator):
        block.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.rand(2, 3, 51, 51))
    assert [x.shape[-1] for x in seen] == [51, 26, 13, 7, 4, 2, 1, 2, 4, 7, 13, 26]
    for x in seen:
        side = x.shape[-1]
        truth = np.ones((2, 2, side, side))
        for i, j in np.ndindex(side, side) if side > 1 else ():
            truth[:, :, i, j] = j / (side - 1) - 0.5, i / (side - 1) - 0.5
        close(x[:, -2:], truth)


# --- 4.2.1 Losses -----------------------------------------------------------------------------------
def smooth_l1(d, beta=3 / 255):
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def background_loss_as_loops(output, image, robustness):
    """The loss of [38] and its gradient for the output, both term by term; weights and e count as constants
    wherever the text stops the gradient. (n, 4, h, w), (n, 3, h, w) -> number, (n, 4, h, w)."""
    n, _, h, w = image.shape
    e, loss, gradient, radius = np.zeros((n, h, w)), 0.0, np.zeros(output.shape), w // 75
    slope = np.vectorize(lambda d: max(-1.0, min(1.0, d / (3 / 255))))  # of smooth_l1
    for b, i, j in np.ndindex(n, h, w):
        e[b, i, j] = sum(smooth_l1(output[b, c, i, j] - image[b, c, i, j]) for c in range(3))
    for b, i, j in np.ndindex(n, h, w):
        window = [math.tanh(e[b, r, q] / 0.25) for r in range(max(0, i - radius), min(h, i + radius + 1))
                  for q in range(max(0, j - radius), min(w, j + radius + 1))]
        weight = math.exp(-6 * robustness * sum(window) / len(window)) / (n * h * w)
        noise = output[b, 3, i, j] - e[b, i, j] / 3
        loss += weight * (e[b, i, j] + robustness * smooth_l1(noise))
        gradient[b, :3, i, j] = weight * slope(output[b, :3, i, j] - image[b, :, i, j])
        gradient[b, 3, i, j] = weight * robustness * slope(noise)
    return loss, gradient


@pytest.mark.parametrize("robustness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("h, w", [(5, 20), (6, 80), (7, 160)], ids=["window 1", "window 3", "window 5"])
def test_the_background_loss_is_that_of_38_and_its_weights_carry_no_gradient(robustness, h, w):
    """If the weights had a gradient, or the error channel n one into e, it would differ from the loops'."""
    image = torch.rand(2, 3, h, w, dtype=torch.float64)
    output = torch.cat([image + 0.1 * torch.randn(2, 3, h, w).double() ** 3, torch.rand(2, 1, h, w) / 20], 1)
    output.requires_grad_()
    loss = ast_seg.background_loss(output, image, robustness)
    truth, gradient = background_loss_as_loops(output.detach().numpy(), image.numpy(), robustness)
    assert loss.item() == pytest.approx(truth, rel=1e-10)
    loss.backward()
    close(output.grad, gradient, 1e-10)


def test_objects_count_up_to_e_to_the_6_times_less():
    """The point of the robust loss: a large error pulls by e^-6 of what a small one does."""
    output = torch.zeros(2, 4, 8, 8, requires_grad=True)
    image = torch.stack([torch.full((3, 8, 8), 0.9), torch.full((3, 8, 8), 3 / 255)])
    ast_seg.background_loss(output, image).backward()
    large, small = output.grad[:, :3].abs().mean((1, 2, 3)).tolist()
    assert large / small < math.exp(-5.5)


def test_the_reconstruction_loss_is_equations_19_and_20():
    image_hat, image = torch.rand(2, 2, 3, 4, 5, dtype=torch.float64)
    truth = 0.0
    for n, i, j in np.ndindex(2, 4, 5):
        local = sum(abs(image_hat[n, c, i, j].item() - image[n, c, i, j].item()) for c in range(3))
        truth += local ** 2 / (2 * 4 * 5)
    assert ast_seg.reconstruction_loss(image_hat, image).item() == pytest.approx(truth, rel=1e-12)


def test_the_pixel_entropy_loss_is_equation_21():
    weights = (torch.randn(2, 4, 3, 5, dtype=torch.float64) * 2).softmax(1)
    weights[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    truth = 0.0
    for n, i, j in np.ndindex(2, 3, 5):
        entropy = -sum(w * math.log(w) for w in weights[n, :, i, j].tolist() if w > 0)
        truth += entropy ** 2 / (2 * 3 * 5)
    assert ast_seg.pixel_entropy_loss(weights).item() == pytest.approx(truth, rel=1e-12)


def test_the_pixel_entropy_loss_lies_between_certain_and_undecided():
    certain = F.one_hot(torch.randint(4, (2, 3, 5)), 4).permute(0, 3, 1, 2).float().requires_grad_()
    loss = ast_seg.pixel_entropy_loss(certain)
    loss.backward()
    assert loss.item() == 0 and certain.grad.isfinite().all()
    undecided = torch.full((2, 4, 3, 5), 0.25)
    assert ast_seg.pixel_entropy_loss(undecided).item() == pytest.approx(math.log(4) ** 2, rel=1e-6)


@pytest.mark.parametrize("step, share", [(0, 0), (1000, 0.01), (5000, 0.25), (10_000, 1), (125_000, 1)])
def test_the_loss_is_equation_22_and_the_entropy_weight_warms_up_quadratically(step, share):
    model = many_labels(entropy_warmup_steps=10_000)
    loss, parts = ast_seg.training_loss(model, torch.rand(2, 3, 64, 64), 3, step)
    assert set(parts) == {"reconstruction", "entropy"} and parts["entropy"] > 0
    truth = parts["reconstruction"].item() + share * 0.01 * parts["entropy"].item()
    assert loss.item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("step, robustness", [(0, 0.0), (50, 0.25), (100, 1.0), (900, 1.0)])
def test_the_loss_of_phase_1_is_the_background_loss(step, robustness):
    model, images = ast_seg.ASTSeg(tiny(robust_warmup_steps=100)), torch.rand(1, 3, 64, 64)
    loss, parts = ast_seg.training_loss(model, images, 1, step)
    output = model.background(images).detach().double().numpy()
    truth, _ = background_loss_as_loops(output, images.double().numpy(), robustness)
    assert loss.item() == pytest.approx(truth)
    assert parts == {"background": loss}


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_each_phase_has_gradients_for_what_it_trains_and_for_nothing_else(phase):
    """Phase 2 leaves the background alone. Phase 3 trains it by Eq. 22, which ignores the error channel."""
    model = many_labels().train()
    ast_seg.training_loss(model, torch.rand(4, 3, 64, 64), phase, 10)[0].backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    objects = {"feature_maps", "refine", "glimpse_generator", "log_alpha_0"}
    assert with_gradient == {1: {"background"}, 2: objects, 3: objects | {"background"}}[phase]
    if phase != 2:
        last = model.background.generator[-1].conv.weight.grad  # (channels, 4, kernel, kernel)
        assert last[:, :3].abs().max() > 0
        assert (last[:, 3].abs().max() > 0) == (phase == 1)


# --- 4.2.2 Curriculum training ----------------------------------------------------------------------
@pytest.mark.parametrize("phase, step, rate", [
    (1, 0, 2e-3), (1, 1999, 2e-3), (1, 2000, 2e-4), (1, 2499, 2e-4),  # a tenth after 80 %
    (2, 0, 0), (2, 50, 4e-9), (2, 2500, 1e-5), (2, 5000, 4e-5), (2, 29_999, 4e-5),  # quadratic warm-up
    (3, 30_000, 4e-5), (3, 112_499, 4e-5), (3, 112_500, 4e-6), (3, 124_999, 4e-6)])  # a tenth from 90 % on
def test_the_learning_rate_of_the_paper_at_its_corners(phase, step, rate):
    assert ast_seg.learning_rate(ast_seg.make_settings("clevr"), phase, step) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("phase, step, rate", [
    (2, 0, 0), (2, 100, 0.25), (2, 200, 1), (2, 999, 1), (3, 1000, 0), (3, 1010, 0.25), (3, 1020, 1),
    (3, 1499, 1), (3, 1500, 0.1)])
def test_what_the_small_model_adds_to_it(phase, step, rate):
    """A second warm-up at the switch to phase 3; a rate and a warm-up of its own for the transformer; and an
    earlier decay."""
    s = tiny(steps=2000, phase2_steps=1000, lr=1.0, warmup_steps=200, switch_warmup_steps=20, decay_at=0.75)
    assert ast_seg.learning_rate(s, phase, step) == pytest.approx(rate)
    slower = ast_seg.learning_rate(s, phase, step, 0.5, 400)
    assert slower == pytest.approx(0.5 * rate * min(1, step / 400) ** 2 / (min(1, step / 200) ** 2 or 1))


@pytest.mark.parametrize("curriculum, phases", [
    ("ct", [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (3, 4)]),
    ("bt", [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]),
    ("frozen", [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)])])
def test_the_phases_of_curriculum_and_baseline_training_and_a_frozen_background(curriculum, phases):
    s = tiny(background_steps=2, steps=5, phase2_steps=3, curriculum=curriculum)
    assert s.background_steps + s.steps == len(phases)
    assert [ast_seg.phase_at(s, t) for t in range(len(phases))] == phases


def test_a_new_phase_has_a_new_adam_over_what_it_trains():
    model = ast_seg.ASTSeg(tiny(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7))
    background = {p for n, p in model.named_parameters() if n.startswith("background.")}
    everything = set(model.parameters())
    for phase, trained in ((1, background), (2, everything - background), (3, everything)):
        adam = ast_seg.make_optimizer(model, phase)
        parameters = [p for group in adam.param_groups for p in group["params"]]
        assert type(adam) is torch.optim.Adam and not adam.state
        assert len(parameters) == len(trained) and set(parameters) == trained
        for group in adam.param_groups:
            assert group["betas"] == ((0.9, 0.999) if phase == 1 else (0.8, 0.9))
            assert group["eps"] == (1e-8 if phase == 1 else 1e-7) and group["weight_decay"] == 0


class Killed(Exception):
    """Stands for whatever ends a program between two of its lines."""


class RememberingRun(ast_seg.Run):
    """A run that also keeps what each of its checkpoints held."""
    def save(self, model, optimizer, t, seconds):
        super().save(model, optimizer, t, seconds)
        self.__dict__.setdefault("saved", {})[t] = self.load()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {split: data.load("shapes", split, folder, 12, 64) for split in ("train", "val", "test")}


@pytest.fixture()
def signals():
    """Training catches Ctrl-C; afterwards pytest shall have it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder, scenes, weights=0, run=ast_seg.Run, **given):
    s = tiny(**given)
    torch.manual_seed(weights)
    model, run = ast_seg.ASTSeg(s), run(folder, s)
    finished = ast_seg.train(model, scenes["train"], scenes["val"], run, CPU)
    return model, run, finished


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, scenes):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    model, run, finished = train(tmp_path_factory.mktemp("run"), scenes, run=RememberingRun)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert finished
    return model, run


def same(state, other, prefix=""):
    return {k: torch.equal(v, other[k]) for k, v in state.items() if k.startswith(prefix)}


def test_each_phase_leaves_what_it_does_not_train_bit_identical_and_moves_the_rest(uninterrupted):
    saved = uninterrupted[1].saved  # phase 1 ends at t = 6, phase 2 at 14, phase 3 at 18
    start, first, second, third = (saved[t]["model"] for t in (0, 6, 14, 18))
    objects = [k for k in start if not k.startswith("background.")]
    assert all(torch.equal(start[k], first[k]) for k in objects)
    assert not any(same(start, first, "background.").values())
    assert all(same(first, second, "background.").values())
    assert not any(same(first, second, "glimpse_generator.").values())
    assert not any(same(second, third, "background.").values())
    assert not any(same(second, third, "glimpse_generator.").values())


def test_the_moments_of_adam_start_anew_at_the_switch_to_phase_3(uninterrupted):
    """Adam counts its steps: after 4 steps of phase 3 the objects' parameters have had 4, not 12."""
    saved = uninterrupted[1].saved
    for t, steps in ((6, 6), (14, 8), (18, 4)):
        assert {int(state["step"]) for state in saved[t]["optimizer"]["state"].values()} == {steps}


def test_the_log_has_a_line_for_each_step_with_the_rate_of_its_schedule(uninterrupted):
    model, run = uninterrupted
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [line["t"] for line in lines] == list(range(1, 19))
    assert [(line["phase"], line["step"]) for line in lines] == (
        [(1, i) for i in range(6)] + [(2, i) for i in range(8)] + [(3, i) for i in range(8, 12)])
    for line in lines:
        assert line["lr"] == pytest.approx(ast_seg.learning_rate(model.settings, line["phase"], line["step"]))
        assert ("background" in line) == (line["phase"] == 1)
        assert ("reconstruction" in line and "entropy" in line) == (line["phase"] > 1)
        assert ("mIoU" in line and "ARI-FG" in line) == (line["t"] in (12, 18))
    assert lines[-1]["images_per_second"] > 0


@pytest.mark.parametrize("t", [3, 6, 9, 14, 17])
def test_wherever_a_run_is_interrupted_it_ends_in_the_same_weights(t, tmp_path, scenes, uninterrupted,
                                                                   monkeypatch, signals):
    """Killed in step t, within a phase or at the switch to the next, and continued from its last checkpoint
    by a model of other random weights."""
    true_loss, calls = ast_seg.training_loss, itertools.count()

    def training_loss(*arguments):
        if next(calls) == t:
            raise Killed
        return true_loss(*arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ast_seg, "training_loss", training_loss)
        train(tmp_path, scenes)
    half_a_line = tmp_path / "log.jsonl"
    half_a_line.write_text(half_a_line.read_text() + '{"t": 1')
    resumed_at = torch.load(tmp_path / "checkpoint.pt")["t"]
    assert resumed_at == t // 2 * 2  # a checkpoint every two steps
    model, run, finished = train(tmp_path, scenes, weights=1)
    truth, true_run = uninterrupted
    assert finished and all(same(model.state_dict(), truth.state_dict()).values())
    losses = [[{k: line.get(k) for k in ("t", "background", "reconstruction", "entropy", "mIoU")}
               for line in r.read_log()] for r in (run, true_run)]
    assert losses[0] == losses[1]


def test_another_seed_takes_other_batches(tmp_path, scenes, uninterrupted, signals):
    """Or the test above would be passed by a program that does nothing at random."""
    _, run, _ = train(tmp_path, scenes, run=RememberingRun, seed=1, steps=1)
    state, other = run.saved, uninterrupted[1].saved
    assert all(same(state[0]["model"], other[0]["model"]).values())  # from the same weights
    assert not any(same(state[6]["model"], other[6]["model"], "background.").values())


@pytest.mark.parametrize("curriculum, moved", [("bt", True), ("frozen", False)])
def test_baseline_training_moves_the_background_from_the_first_step_and_frozen_never(
        curriculum, moved, tmp_path, scenes, signals):
    _, run, _ = train(tmp_path, scenes, run=RememberingRun, curriculum=curriculum, background_steps=0,
                      steps=4, switch_warmup_steps=0)
    assert set(same(run.saved[0]["model"], run.saved[4]["model"], "background.").values()) == {not moved}


# --- 5. Metrics -------------------------------------------------------------------------------------
def segments_iou(pred, true, p, t):
    pixels = list(np.ndindex(pred.shape))
    union = sum(pred[q] == p or true[q] == t for q in pixels)
    return sum(pred[q] == p and true[q] == t for q in pixels) / union if union else 0.0


def mean_iou_by_all_permutations(pred, true):
    """The scores of all one-to-one matchings with the largest sum of IoUs; they differ only where IoUs of 0
    leave the matching open."""
    m = max(pred.max(), true.max()) + 1
    iou = [[segments_iou(pred, true, p, t) for t in range(m)] for p in range(m)]
    sums = {order: sum(iou[p][t] for p, t in enumerate(order)) for order in itertools.permutations(range(m))}
    best = max(sums.values())
    return {round(best / sum(p in pred or t in true for p, t in enumerate(order)), 9)
            for order, value in sums.items() if value > best - 1e-9}


def adjusted_rand_index_by_pairs(pred, true, foreground_only):
    pixels = [q for q in np.ndindex(true.shape) if true[q] > 0 or not foreground_only]
    both = in_pred = in_true = pairs = 0
    for a, b in itertools.combinations(pixels, 2):
        both += pred[a] == pred[b] and true[a] == true[b]
        in_pred, in_true, pairs = in_pred + (pred[a] == pred[b]), in_true + (true[a] == true[b]), pairs + 1
    by_chance = in_pred * in_true / max(1, pairs)
    most = (in_pred + in_true) / 2
    return 1.0 if most == by_chance else (both - by_chance) / (most - by_chance)


def segmentation_covering_by_loops(pred, true):
    objects = [t for t in range(1, true.max() + 1) if t in true]
    best = [max(segments_iou(pred, true, p, t) for p in range(pred.max() + 1)) for t in objects]
    return sum(best) / len(best) if best else 0.0


def random_labels(found, objects, seed):
    """(6, 5, 7) predicted labels below `found` and true ones below `objects`, alike in many pixels."""
    rng = np.random.default_rng(seed)
    true = rng.integers(objects, size=(6, 5, 7))
    pred = np.stack([rng.permutation(max(found, objects))[labels] for labels in true])
    return np.where(rng.random(true.shape) < 0.6, pred, rng.integers(found, size=true.shape)) % found, true


@pytest.mark.parametrize("found, objects", [(4, 4), (6, 3), (2, 5), (1, 4), (5, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_metrics_are_their_definitions(found, objects, seed):
    """All permutations for mIoU, all pairs of pixels for ARI, loops for MSC; as many slots, more, fewer."""
    pred, true = random_labels(found, objects, seed)
    p, t = torch.from_numpy(pred), torch.from_numpy(true)
    for ours, options in zip(ast_seg.mean_iou(p, t).tolist(), map(mean_iou_by_all_permutations, pred, true)):
        assert any(ours == pytest.approx(option, abs=1e-8) for option in options)
    for foreground_only in (True, False):
        truth = [adjusted_rand_index_by_pairs(*pair, foreground_only) for pair in zip(pred, true)]
        close(ast_seg.adjusted_rand_index(p, t, foreground_only), truth, 1e-12)
    truth = [segmentation_covering_by_loops(*pair) for pair in zip(pred, true)]
    close(ast_seg.segmentation_covering(p, t), truth, 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_ari_is_the_one_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    pred, true = random_labels(5, 4, seed)
    p, t = torch.from_numpy(pred), torch.from_numpy(true)
    close(ast_seg.adjusted_rand_index(p, t, False),
          [metrics.adjusted_rand_score(b.ravel(), a.ravel()) for a, b in zip(pred, true)], 1e-12)
    close(ast_seg.adjusted_rand_index(p, t),
          [metrics.adjusted_rand_score(b[b > 0], a[b > 0]) for a, b in zip(pred, true)], 1e-12)


@pytest.mark.parametrize("pred, true, miou, ari_fg, msc_fg", [
    ("2201", "0012", 1, 1, 1),  # perfect, whatever the names of the segments
    ("0000", "0000", 1, 1, 0),  # no foreground, and none found
    ("0011", "0000", 1 / 4, 1, 0),  # no foreground, but something found: (1/2 + 0) / 2 pairs
    ("0111", "0011", (1 / 2 + 2 / 3) / 2, 1, 2 / 3),  # one object, with a margin
    ("0012", "0011", (1 + 1 / 2 + 0) / 3, 0, 1 / 2),  # one object, broken in two
    ("0344", "0112", (1 + 1 / 2 + 1 / 2) / 3, -1 / 2, 1 / 2),  # more slots than objects
    ("0000", "0112", (0 + 2 / 4 + 0) / 3, 0, (2 / 4 + 1 / 4) / 2),  # one predicted segment
    ("1111", "2222", 1, 1, 1),  # one object everywhere
    ("0001", "0001", 1, 1, 1)])  # an object of one pixel has no pairs at all
def test_the_metrics_in_the_cases_that_one_can_do_by_hand(pred, true, miou, ari_fg, msc_fg):
    pred, true = (torch.tensor([[[int(c) for c in row]]]) for row in (pred, true))
    assert ast_seg.mean_iou(pred, true).item() == pytest.approx(miou)
    assert ast_seg.adjusted_rand_index(pred, true).item() == pytest.approx(ari_fg)
    assert ast_seg.segmentation_covering(pred, true).item() == pytest.approx(msc_fg)


def test_an_image_scores_the_same_alone_and_among_others():
    """Small segments that hardly meet, beside images of many labels."""
    rng = np.random.default_rng(0)
    pred, true = torch.from_numpy(rng.integers(4, size=(2, 40, 4, 5)) * (rng.random((2, 40, 4, 5)) < 0.3))
    pred[20:] += torch.from_numpy(rng.integers(6, size=(20, 4, 5)))
    for metric in (ast_seg.mean_iou, ast_seg.adjusted_rand_index, ast_seg.segmentation_covering):
        close(metric(pred, true), torch.cat([metric(p[None], t[None]) for p, t in zip(pred, true)]), 1e-12)


def test_the_squared_error_is_summed_over_channels_and_pixels():
    one, other = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    truth = np.zeros(2)
    for n, c, i, j in np.ndindex(2, 3, 4, 5):
        truth[n] += (one[n, c, i, j].item() - other[n, c, i, j].item()) ** 2
    close(ast_seg.squared_error(one, other), truth)


class Perfect(torch.nn.Module):
    """Knows the labels of all scenes, and paints every image a hundredth too bright."""
    def __init__(self, scenes):
        super().__init__()
        self.known = {image.tobytes(): label for image, label in zip(scenes.images, scenes.labels)}

    def forward(self, images):
        assert not self.training
        keys = [i.tobytes() for i in (images * 255).round().byte().numpy()]
        labels = torch.from_numpy(np.stack([self.known[k] for k in keys])).long()
        return ast_seg.Scene(images + 0.01, F.one_hot(labels, 5).permute(0, 3, 1, 2).float(), None)


def test_evaluate_scores_every_scene_in_percent(tmp_path):
    """The perfect model on 70 scenes, more than a batch; of scenes without labels only the MSE is known."""
    scenes = data.load("shapes", "test", tmp_path, 70, 64)
    scores = ast_seg.evaluate(Perfect(scenes), scenes, CPU)
    assert list(scores) == ["mIoU", "ARI-FG", "MSC-FG", "MSE"]
    for name in ("mIoU", "ARI-FG", "MSC-FG"):
        np.testing.assert_allclose(scores[name], np.full(70, 100))
    np.testing.assert_allclose(scores["MSE"], np.full(70, 0.01 ** 2 * 3 * 64 * 64), rtol=1e-3)
    unlabelled = data.Scenes(scenes.images, scenes.labels, labelled=False)
    assert list(ast_seg.evaluate(Perfect(scenes), unlabelled, CPU)) == ["MSE"]


# --- The model as a file ----------------------------------------------------------------------------
@pytest.mark.parametrize("given", [{}, dict(generator="tiny", anisotropic=True, slots=6, lr=3e-7)], ids=str)
def test_a_saved_model_segments_as_before_with_its_settings_and_without_network(given, tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("nothing may be looked up")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    model, images = many_labels(**given), torch.rand(3, 3, 64, 64)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = ast_seg.ASTSeg.from_pretrained(tmp_path)
    assert loaded.settings == model.settings and type(loaded.settings) is ast_seg.Settings
    assert all(same(model.state_dict(), loaded.state_dict()).values())
    labels = model.segment(images)
    assert len(labels.unique()) > 1 and torch.equal(loaded.eval().segment(images), labels)


# --- The command ------------------------------------------------------------------------------------
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


def start(folder):
    """The real command, in a process of its own; one thread, as several may add numbers in another order."""
    where = [f"--out={folder}", f"--data-dir={folder}-data"]
    return subprocess.Popen(
        [sys.executable, "ast_seg.py", "--device=cpu", *where, *FLAGS],
        cwd=Path(ast_seg.__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(process, number, log, t):
    """Wait until step t is logged, then send the signal. Returns (exit code, stdout, stderr)."""
    until = time.time() + 120
    while not (log.exists() and f'"t": {t},' in log.read_text()):
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of the real command, and what it printed."""
    folder = tmp_path_factory.mktemp("command") / "run"
    process = start(folder)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return folder, out


def command(folder, *more):
    """The same command in this process. Returns its exit code."""
    return ast_seg.main(["--device=cpu", f"--out={folder}", f"--data-dir={folder}-data", *FLAGS, *more])


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_leaves_numbers_pictures_and_a_model_that_gives_these_numbers(finished):
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    facts = [results[name] for name in ("dataset", "split", "images", "steps")]
    assert facts == ["shapes", "test", 12, 12]
    assert results["seconds"] > 0 and results["device"].startswith("cpu")
    model = ast_seg.ASTSeg.from_pretrained(folder / "model").eval()
    test = data.load("shapes", "test", f"{folder}-data", 12, 64)
    images, true = (torch.from_numpy(np.array(array)) for array in (test.images, test.labels))
    images = images.float() / 255
    with torch.no_grad():
        pred, image_hat = model.segment(images), model(images).image
    truth = {"mIoU": 100 * ast_seg.mean_iou(pred, true),
             "ARI-FG": 100 * ast_seg.adjusted_rand_index(pred, true),
             "MSC-FG": 100 * ast_seg.segmentation_covering(pred, true),
             "MSE": ast_seg.squared_error(image_hat, images)}
    for name, values in truth.items():
        assert results[name] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-3)
        assert name in out and f"{results[name]:.2f}" in out  # the table
    for name in ("segmentations.png", "curves.png"):
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300 and picture.std() > 10
    phases = [json.loads(line)["phase"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert phases == [1] * 6 + [2] * 8 + [3] * 4
    assert torch.load(folder / "checkpoint.pt")["t"] == 18
    assert not list(folder.rglob("*.part"))


def test_stopped_by_ctrl_c_and_killed_the_command_goes_on_to_the_same_weights_bit_for_bit(finished, tmp_path):
    """Ctrl-C in phase 1 leaves a checkpoint of that very step and says how to go on; a kill in phase 2 leaves
    an older one. Both times the same command goes on."""
    folder = tmp_path / "run"
    code, out, error = interrupt(start(folder), signal.SIGINT, folder / "log.jsonl", t=3)
    assert code == 130 and "Traceback" not in error
    assert str(folder / "checkpoint.pt") in out and "goes on" in out
    stopped_at = torch.load(folder / "checkpoint.pt")["t"]
    logged = [json.loads(line)["t"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert 3 <= stopped_at < 18 and logged[-1] == stopped_at
    code, _, _ = interrupt(start(folder), signal.SIGKILL, folder / "log.jsonl", t=max(9, stopped_at + 1))
    assert code == -signal.SIGKILL
    assert stopped_at <= torch.load(folder / "checkpoint.pt")["t"] < 18
    assert not (folder / "results.json").exists()
    process = start(folder)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    truth, ours = (torch.load(f / "checkpoint.pt") for f in (finished[0], folder))
    assert all(same(truth["model"], ours["model"]).values()) and ours["t"] == 18
    weights = [(f / "model/model.safetensors").read_bytes() for f in (finished[0], folder)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("more", [(), ("--eval",)], ids=["again", "--eval"])
def test_a_finished_run_is_only_evaluated(more, finished, monkeypatch, signals):
    folder, _ = finished
    monkeypatch.setattr(ast_seg, "make_optimizer", lambda *_: pytest.fail("there is nothing left to train"))
    before, results = contents(folder), json.loads((folder / "results.json").read_text())
    (folder / "segmentations.png").unlink()
    assert command(folder, *more) == 0
    after, again = contents(folder), json.loads((folder / "results.json").read_text())
    assert before.keys() == after.keys()
    for name in ("checkpoint.pt", "log.jsonl", "model/model.safetensors"):
        assert before[folder / name] == after[folder / name]
    for name in ("mIoU", "ARI-FG", "MSC-FG", "MSE"):  # other threads may round otherwise
        assert again[name] == pytest.approx(results[name], rel=1e-3, abs=1e-3)


def refused(capsys, folder, *more):
    """The command says no: exit code 2 and one line for the user. Returns the line."""
    capsys.readouterr()
    assert command(folder, *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ast_seg.py: ")
    return lines[0]


def test_a_run_with_other_settings_is_refused_and_left_as_it_is(finished, capsys):
    folder, _ = finished
    before = contents(folder)
    assert "lr = 0.001 there, 0.5 here" in refused(capsys, folder, "--lr=0.5")
    assert "--out" in refused(capsys, folder, "--lr=0.5", "--eval")
    assert contents(folder) == before


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, capsys):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("all my work")
    assert "not empty" in refused(capsys, folder)
    assert "not empty" in refused(capsys, folder / "chapter1.tex")
    assert {path.name for path in tmp_path.rglob("*")} == {"thesis", "chapter1.tex"}


@pytest.mark.parametrize("damage", ["cut off", "overwritten", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused(damage, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes({"cut off": whole[:len(whole) // 2], "empty": b"",
                                            "overwritten": b"not a checkpoint" + whole[16:]}.get(damage, b""))
    if damage == "foreign":
        torch.save({"epoch": 3}, folder / "checkpoint.pt")
    assert "checkpoint.pt is damaged or not ours" in refused(capsys, folder)


def test_there_must_be_something_to_evaluate(tmp_path, capsys):
    """And this is found out before anything is downloaded or decoded."""
    assert "no checkpoint" in refused(capsys, tmp_path / "run", "--eval")
    assert not list(tmp_path.iterdir())


def test_impossible_settings_and_devices_are_refused_before_anything_is_written(tmp_path, capsys):
    assert "--size" in refused(capsys, tmp_path / "run", "--size=50")
    assert "--device" in refused(capsys, tmp_path / "run", "--device=toaster")
    assert not list(tmp_path.iterdir())


def test_after_training_ctrl_c_ends_the_command_at_once(finished, monkeypatch, signals):
    """Training must not keep Ctrl-C for itself once it is over: the evaluation can be stopped, too."""
    def evaluate(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        pytest.fail("Ctrl-C went unheard during the evaluation")
    monkeypatch.setattr(ast_seg, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        command(finished[0])


# --- data.py: what is drawn, what is read, what is kept, what is refused ----------------------------
SHARED = Path(__file__).resolve().parent.parent / "shared"
RECORD_SETS = ("clevr", "objects_room", "multi_dsprites", "tetrominoes")


# --- Files as the benchmarks publish them, written by the tests themselves ---


def varint(value):
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def field(number, content):
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(features, order=None):
    """A tf.train.Example of byte lists (uint8 arrays) and float lists (float arrays)."""
    entries = []
    for name in order or features:
        values = features[name]
        if values.dtype == np.uint8:
            triples = np.empty((values.size, 3), np.uint8)
            triples[:] = np.stack([np.full(values.size, 10), np.ones(values.size), values.ravel()], 1)
            content = field(1, triples.tobytes())
        else:
            content = field(2, field(1, values.astype("<f4").tobytes()))
        entries.append(field(1, field(1, name.encode()) + field(2, content)))
    return field(1, b"".join(entries))


def record(payload):
    length = struct.pack("<Q", len(payload))
    return (
        length
        + struct.pack("<I", data.masked_crc(length))
        + payload
        + struct.pack("<I", data.masked_crc(payload))
    )


def write_records(path, payloads, packed=True):
    content = b"".join(map(record, payloads))
    path.write_bytes(gzip.compress(content, 1) if packed else content)


def random_scene(dataset, rng, objects=None):
    """image, labels as the loader should give them before the crop, and the Example that holds them."""
    height, width = dataset.source
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    index = rng.integers(0, dataset.masks, (height, width))
    masks = np.where(np.arange(dataset.masks)[:, None, None] == index, 255, 0).astype(np.uint8)
    stored = np.moveaxis(masks, 0, 2) if dataset.masks_last else masks
    visible = (np.arange(dataset.masks) <= (dataset.masks - 1 if objects is None else objects)).astype(
        np.float32
    )
    features = {"image": image, "x": np.zeros(11, np.float32), "mask": stored, "visibility": visible}
    order = list(rng.permutation(list(features)))
    labels = np.maximum(index - dataset.background_masks + 1, 0).astype(np.uint8)
    return image, labels, example(features, order)


def fitted(pixels, crop, size):
    """Centre square and Pillow's resize, bilinear for images and nearest for labels."""
    height, width = pixels.shape[:2]
    crop = crop or min(height, width)
    box = ((width - crop) // 2, (height - crop) // 2, (width + crop) // 2, (height + crop) // 2)
    how = Image.BILINEAR if pixels.ndim == 3 else Image.NEAREST
    out = np.asarray(Image.fromarray(pixels).crop(box).resize((size, size), how))
    return out.transpose(2, 0, 1) if pixels.ndim == 3 else out


def all_splits(name, root, **options):
    """Images and labels of all scenes in the order test, val, train."""
    parts = [data.load(name, split, root, **options) for split in data.SPLITS]
    return np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])


def caches(root):
    return sorted(p for p in (root / ".cache").glob("*")) if (root / ".cache").exists() else []


# --- Drawn sets ---


def test_shapes_scene_depends_on_split_and_index_alone(tmp_path):
    first = data.load("shapes", "test", tmp_path / "a", limit=12)
    again = data.load("shapes", "test", tmp_path / "b", limit=40)
    assert np.array_equal(first.images, again.images[:12]) and np.array_equal(first.labels, again.labels[:12])
    scenes = [data.load("shapes", split, tmp_path / "a", limit=40).images for split in data.SPLITS]
    assert len({image.tobytes() for part in scenes for image in part}) == 120


def test_shapes_are_two_to_four_objects_of_all_kinds_on_a_smooth_background(tmp_path):
    scenes = data.load("shapes", "val", tmp_path)
    assert scenes.images.shape == (320, 3, 64, 64) and scenes.images.dtype == np.uint8 and scenes.labelled
    counts = np.array([len(np.unique(labels)) - 1 for labels in scenes.labels])
    assert set(counts) == {2, 3, 4} and np.bincount(counts)[2:].min() > 70
    image, labels = scenes.images[0].astype(int), scenes.labels[0]
    background = (labels == 0) & (np.roll(labels, 1, 1) == 0)
    background[:, 0] = False
    edges = np.abs(image - np.roll(image, 1, 2)).max(0)
    assert np.median(edges[background]) <= 2
    backdrop = [
        np.median(image[:, labels == 0], axis=1) for image, labels in zip(scenes.images, scenes.labels)
    ]
    assert np.std(backdrop, axis=0).min() > 10, "the background varies from scene to scene"


@pytest.mark.parametrize(
    "kind, area",
    [(data.DISC, np.pi * 0.9**2), (data.TRIANGLE, 3 * np.sqrt(3) / 4 * 1.1**2), (data.SQUARE, 2 * 1.1**2)],
)
def test_sprites_have_the_area_of_their_outline_wherever_they_are(kind, area):
    for centre, angle in (((0.0, 0.0), 0.3), ((0.31, -0.42), 2.0), ((-0.5, 0.5), 5.5)):
        image, labels = np.zeros((128, 128, 3), np.float32), np.zeros((128, 128), np.uint8)
        data.paint(image, labels, 3, kind, centre, 0.3, angle, (1, 1, 1), 0)
        assert image.sum() / 3 * (2 / 128) ** 2 == pytest.approx(area * 0.3**2, rel=0.01)
        rows, columns = np.nonzero(labels == 3)
        found = np.array([columns.mean(), rows.mean()]) * 2 / 127 - 1
        assert np.abs(found - centre).max() < 0.02


def test_tm_dsprites_follows_the_text(tmp_path):
    assert data.DATASETS["tm_dsprites"].splits == (320, 320, 19_360)
    scenes = data.load("tm_dsprites", "test", tmp_path, limit=60)
    assert scenes.images.shape[1:] == (3, 128, 128)
    assert {len(np.unique(labels)) - 1 for labels in scenes.labels} == {2, 3}
    for image, labels in zip(scenes.images, scenes.labels):
        for k in range(1, labels.max() + 1):
            colour = image[:, labels == k]
            middle = np.median(colour, axis=1)
            assert middle.min() == 0 and middle.max() == 255, "saturated"
            assert (np.abs(colour - middle[:, None]).max(0) <= 1).mean() > 0.85, "uniform"
            assert (labels == k).sum() > 380, "not occluded: the triangle, the smallest, has 402 pixels"
        assert (np.ptp(image[:, labels == 0], axis=0) == 0).mean() > 0.9, "grey texture"


# --- Splits ---


def test_published_splits():
    whole = {name: data.split_bounds(10**7, d.splits) for name, d in data.DATASETS.items() if sum(d.splits)}
    for name, end in (
        ("clevr", 70_000),
        ("clevr6", 70_000),
        ("multi_dsprites", 60_000),
        ("tetrominoes", 60_000),
    ):
        assert whole[name] == {
            "test": range(10_000),
            "val": range(10_000, 20_000),
            "train": range(20_000, end),
        }
    assert whole["objects_room"]["train"] == range(20_000, 1_000_000)


@pytest.mark.parametrize("name", ["clevr", "objects_room"])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 20, 763, 69_999])
def test_splits_of_a_shorter_file_are_disjoint_complete_and_in_proportion(name, total):
    published = data.DATASETS[name].splits
    parts = data.split_bounds(total, published)
    assert list(itertools.chain(*parts.values())) == list(range(min(total, sum(published))))
    for part, share in zip(parts.values(), published):
        assert abs(len(part) - min(total, sum(published)) * share / sum(published)) <= 2
        assert len(part) > 0 or share == 0 or total < 3


def test_clevr_of_763_scenes_has_109_109_545():
    assert [len(part) for part in data.split_bounds(763, data.DATASETS["clevr"].splits).values()] == [
        109,
        109,
        545,
    ]


# --- Round trips ---


def test_crc_against_its_definition():
    def crc32c(message):
        register = 0xFFFFFFFF
        for byte in message:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        register ^= 0xFFFFFFFF
        return ((register >> 15 | register << 17) + 0xA282EAD8) & 0xFFFFFFFF

    published = 0xE3069283  # the check value of CRC-32C
    assert crc32c(b"123456789") == ((published >> 15 | published << 17) + 0xA282EAD8) & 0xFFFFFFFF
    rng = np.random.default_rng(0)
    for length in (4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 4096, 5000):
        message = rng.bytes(length)
        assert data.masked_crc(message) == crc32c(message)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", RECORD_SETS)
def test_records_come_back_exactly(tmp_path, name, packed):
    dataset, rng = data.DATASETS[name], np.random.default_rng(1)
    scenes = [random_scene(dataset, rng) for _ in range(5 if name == "clevr" else 12)]
    write_records(tmp_path / Path(dataset.url).name, [payload for *_, payload in scenes], packed)
    images, labels = all_splits(name, tmp_path)
    assert len(images) == len(scenes)
    for image, label, scene in zip(images, labels, scenes):
        assert np.array_equal(image, fitted(scene[0], dataset.crop, dataset.size))
        assert np.array_equal(label, fitted(scene[1], dataset.crop, dataset.size))


def test_where_masks_overlap_the_first_wins_and_uncovered_pixels_are_background(tmp_path):
    dataset = replace(data.DATASETS["tetrominoes"], source=(4, 4), masks=3)
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, 0], masks[1, :2], masks[2, :3] = 255, 255, 255
    payload = example({"mask": masks, "image": np.zeros((4, 4, 3), np.uint8)})
    labels = data.decode_record(dataset, payload)[1]
    assert labels[:, 0].tolist() == [0, 1, 2, 0]


def tiny_clevr(monkeypatch, name="clevr"):
    """CLEVR's layout at 12x16 pixels, for what needs many scenes."""
    tiny = replace(data.DATASETS[name], source=(12, 16), crop=10, size=8)
    monkeypatch.setitem(data.DATASETS, name, tiny)
    return tiny


def test_clevr6_keeps_scenes_of_at_most_six_objects_within_the_splits_of_clevr(tmp_path, monkeypatch):
    dataset, rng = tiny_clevr(monkeypatch, "clevr6"), np.random.default_rng(2)
    objects = [3, 7, 6, 10, 5, 6, 8, 7, 3, 10, 4, 9, 6, 6]  # 14 scenes: test 0-1, val 2-3, train 4-13
    scenes = [random_scene(dataset, rng, count) for count in objects]
    write_records(tmp_path / Path(dataset.url).name, [payload for *_, payload in scenes])
    for split, expected in (("test", [0]), ("val", [2]), ("train", [4, 5, 8, 10, 12, 13])):
        loaded = data.load("clevr6", split, tmp_path)
        assert [fitted(scenes[i][1], 10, 8).tolist() for i in expected] == loaded.labels.tolist()
    assert data.load("clevr6", "train", tmp_path, limit=3).labels.tolist() == loaded.labels[:3].tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_limit_gives_the_first_scenes_of_the_split_and_decodes_no_others(tmp_path, monkeypatch, packed):
    dataset, rng = tiny_clevr(monkeypatch), np.random.default_rng(3)
    payloads = [random_scene(dataset, rng)[2] for _ in range(21)]
    write_records(tmp_path / Path(dataset.url).name, payloads, packed)
    whole = {split: data.load("clevr", split, tmp_path) for split in data.SPLITS}
    for split, limit in itertools.product(data.SPLITS, (1, 2, 100)):
        part = data.load("clevr", split, tmp_path, limit=limit)
        assert np.array_equal(part.images, whole[split].images[:limit])
    calls, original = [], data.decode_record
    monkeypatch.setattr(data, "decode_record", lambda *a: calls.append(a) or original(*a))
    data.load("clevr", "val", tmp_path, limit=2, size=4)
    assert len(calls) <= 3


@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="needs ../shared/formats")
@pytest.mark.parametrize("name", RECORD_SETS)
def test_files_of_the_public_format_come_back_exactly(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset, formats = data.DATASETS[name], SHARED / "formats"
    truth = np.load(formats / f"{Path(dataset.url).name.removesuffix('.tfrecords')}.truth.npz")
    images, labels = all_splits(name, formats)
    for i, image, label in zip(range(20), images, labels, strict=True):
        assert np.array_equal(image, fitted(truth["images"][i], dataset.crop, dataset.size))
        mask = np.maximum(truth["labels"][i].astype(int) - dataset.background_masks + 1, 0).astype(np.uint8)
        assert np.array_equal(label, fitted(mask, dataset.crop, dataset.size))


def test_another_size_is_a_pillow_resize(tmp_path):
    own, small = (data.load("shapes", "test", tmp_path, limit=3, size=size) for size in (None, 48))
    assert small.images.shape == (3, 3, 48, 48) and small.labels.shape == (3, 48, 48)
    for image, resized in zip(own.images, small.images):
        assert np.array_equal(fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), 0, 48), resized)


# --- The life of a cache ---


def tiny_file(tmp_path, monkeypatch, count=14, seed=7):
    dataset = tiny_clevr(monkeypatch)
    rng = np.random.default_rng(seed)
    write_records(tmp_path / Path(dataset.url).name, [random_scene(dataset, rng)[2] for _ in range(count)])
    return tmp_path / Path(dataset.url).name


def test_cache_is_built_once_for_all_splits_and_reused(tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    first = all_splits("clevr", tmp_path)
    assert len(caches(tmp_path)) == 1 and isinstance(data.load("clevr", "val", tmp_path).images, np.memmap)

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "decode_record", fail)
    assert all(map(np.array_equal, first, all_splits("clevr", tmp_path)))


def test_cache_is_rebuilt_when_the_source_changes_and_the_old_one_goes(tmp_path, monkeypatch):
    path = tiny_file(tmp_path, monkeypatch)
    before = data.load("clevr", "test", tmp_path).images.copy()
    tiny_file(tmp_path, monkeypatch, seed=8)
    os.utime(path, ns=(1, 1))
    after = data.load("clevr", "test", tmp_path).images
    assert not np.array_equal(before, after) and len(caches(tmp_path)) == 1


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_damaged_cache_is_rebuilt(tmp_path, monkeypatch, kept):
    tiny_file(tmp_path, monkeypatch)
    expected = data.load("clevr", "train", tmp_path).images.copy()
    (cache,) = caches(tmp_path)
    cache.write_bytes(cache.read_bytes()[:kept])
    assert np.array_equal(data.load("clevr", "train", tmp_path).images, expected)


def test_an_interrupted_build_leaves_nothing_and_a_killed_one_is_not_taken_for_whole(tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    original, calls = data.fit, itertools.count()

    def interrupt(*arguments):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(data, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load("clevr", "train", tmp_path)
    assert caches(tmp_path) == []
    monkeypatch.undo()
    script = (
        "import data, os, sys\nfrom dataclasses import replace\n"
        "original, calls = data.fit, iter(range(10 ** 6))\n"
        "data.DATASETS['clevr'] = replace(data.DATASETS['clevr'], source=(12, 16), crop=10, size=8)\n"
        "data.fit = lambda *a: os._exit(9) if next(calls) == 10 else original(*a)\n"
        "data.load('clevr', 'train', sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=Path(data.__file__).parent, capture_output=True
    )
    assert done.returncode == 9
    tiny_clevr(monkeypatch)
    assert len(data.load("clevr", "train", tmp_path)) == 10


def test_two_processes_that_start_together_do_not_harm_each_other(tmp_path):
    script = "import data, sys; print(data.load('shapes', 'test', sys.argv[1], limit=150).images.sum())"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path],
            cwd=Path(data.__file__).parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    sums = [process.communicate()[0].split()[-1] for process in both]
    expected = data.load("shapes", "test", tmp_path, limit=150).images.sum()
    assert sums == [str(expected)] * 2 and len(caches(tmp_path)) == 1


def test_a_read_only_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = tmp_path / "source"
    folder.mkdir()
    tiny_file(folder, monkeypatch)
    folder.chmod(0o555)
    try:
        assert len(data.load("clevr", "train", folder)) == 10
        assert [p.name for p in folder.iterdir()] == [Path(data.DATASETS["clevr"].url).name]
        assert list((tmp_path / "user/ast_seg").glob("*/clevr-*"))
    finally:
        folder.chmod(0o755)


# --- Bad input ---


def data_refused(name, root, *words, split="train", **options):
    """The DataError, one line that names all `words`; no cache stays behind."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, split, root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert caches(root) == []


def test_unknown_names_and_splits(tmp_path):
    data_refused("clever", tmp_path, "clever", "clevr", "shapes")
    data_refused("shapes", tmp_path, "training", "train", split="training")


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        "cut",
        "flipped pixel",
        "flipped length",
        "2^60",
        "foreign",
        "empty",
        "no records",
        "no image",
        "no mask",
        "few values",
        "no example",
        "gzip of nothing",
    ],
)
def test_damaged_record_files(tmp_path, monkeypatch, case, packed, limit):
    path = tiny_file(tmp_path, monkeypatch)
    rng = np.random.default_rng(0)
    content = gzip.decompress(path.read_bytes())
    features = {
        "image": rng.integers(0, 256, (12, 16, 3), np.uint8),
        "mask": rng.integers(0, 256, (11, 12, 16), np.uint8),
    }
    if case == "few values":
        features["image"] = features["image"][1:]
    elif case in ("no image", "no mask"):
        del features[case[3:]]
    size = len(content) // 14
    content = (
        {
            "cut": content[: -size // 2],
            "flipped pixel": flip(content, 5 * size + size // 2),
            "flipped length": flip(content, 5 * size + 2),
            "2^60": content
            + struct.pack("<QI", 2**60, data.masked_crc(struct.pack("<Q", 2**60)))
            + bytes(99),
            "foreign": b"name,value\n" * 1000,
            "empty": b"",
            "no records": b"",
            "gzip of nothing": b"",
            "no example": record(b"\xff" * 500),
        }.get(case)
        if not case.startswith(("no image", "no mask", "few"))
        else record(example(features)) * 14
    )
    if packed and case == "flipped pixel":
        content = flip(
            content, 5 * size + size // 2
        )  # as it was, to be damaged where inflating does not notice
        path.write_bytes(flip(gzip.compress(content, 0), 5 * size + size // 2))
    else:
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    began = time.perf_counter()
    data_refused("clevr", tmp_path, str(path), limit=limit)
    assert time.perf_counter() - began < 1


def test_a_truncated_gzip(tmp_path, monkeypatch):
    path = tiny_file(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes()[:-20])
    data_refused("clevr", tmp_path, str(path), "record")


# --- Fuzz: the right scenes or a DataError, nothing else, at once ---


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, length = rng.integers(max(len(content), 1)), rng.integers(1, 9)
        action = rng.integers(6)
        if action < 3 and content:
            content[at] ^= 1 << rng.integers(8)
        elif action == 3:
            content[at : at + length] = rng.bytes(length)
        elif action == 4:
            del content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def decode_all(name, root, split):
    dataset = data.DATASETS[name]
    _, items, decode = dataset.reader(dataset, root / Path(dataset.url).name, split)
    return [decode(item) for item in items]


def fuzz(monkeypatch, name, root, split, victims, count, exact=True):
    """Mutate one of the files `victims` at a time."""
    monkeypatch.setattr(data, "tqdm", functools.partial(data.tqdm, disable=True))
    rng, originals = np.random.default_rng(11), {victim: victim.read_bytes() for victim in victims}
    expected, outcomes = decode_all(name, root, split), {"right": 0, "refused": 0}
    for _ in range(count):
        victim = victims[rng.integers(len(victims))]
        victim.write_bytes(mutate(originals[victim], rng))
        began = time.perf_counter()
        try:
            found = decode_all(name, root, split)
        except data.DataError as error:
            assert str(root) in str(error)
            outcomes["refused"] += 1
        else:
            assert not exact or all(map(np.array_equal, itertools.chain(*found), itertools.chain(*expected)))
            assert len(found) == len(expected)
            outcomes["right"] += 1
        assert time.perf_counter() - began < 1
        victim.write_bytes(originals[victim])
    assert outcomes["refused"] > (count // 2 if exact else 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, split", [("multi_dsprites", None), ("clevr6", "test")])
def test_fuzz_records(tmp_path, monkeypatch, name, split, packed):
    dataset = replace(data.DATASETS[name], source=(5, 4), crop=4, masks=3, size=4)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    rng = np.random.default_rng(0)
    payloads = [random_scene(dataset, rng)[2] for _ in range(3)]
    write_records(tmp_path / Path(dataset.url).name, payloads, packed)
    fuzz(monkeypatch, name, tmp_path, split, [tmp_path / Path(dataset.url).name], 2000)


# --- Download ---


class Server(http.server.BaseHTTPRequestHandler):
    content, ranges, cuts, missing, lie, requests = b"", True, 0, False, 0, []

    def do_GET(self):
        server = type(self)
        server.requests.append(self.headers.get("Range"))
        if server.missing:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        start = int(wanted.split("=")[1].split("-")[0]) if wanted and server.ranges else 0
        body = server.content[start:]
        if wanted and server.ranges and not body:
            return self.send_error(416)
        self.send_response(206 if wanted and server.ranges else 200)
        self.send_header("Content-Length", str(len(body) + server.lie))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(monkeypatch, name, content, **behaviour):
    handler = type("Handler", (Server,), {"content": content, "requests": [], **behaviour})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dataset = data.DATASETS[name]
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setitem(data.DATASETS, name, replace(dataset, url=address + Path(dataset.url).name))
    return handler


def tiny_download(tmp_path, monkeypatch, **behaviour):
    tiny_file(tmp_path, monkeypatch)
    path = tmp_path / Path(data.DATASETS["clevr"].url).name
    content = path.read_bytes()
    path.unlink()
    return serve(monkeypatch, "clevr", content, **behaviour), path, content


def test_download_says_its_size_first(tmp_path, monkeypatch, capsys):
    server, path, content = tiny_download(tmp_path, monkeypatch)
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and "GB" in capsys.readouterr().out.split("\n")[0]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_stopped(tmp_path, monkeypatch, ranges):
    server, path, content = tiny_download(tmp_path, monkeypatch, ranges=ranges)
    Path(f"{path}.part").write_bytes(content[:1000])
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and server.requests == ["bytes=1000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(tmp_path, monkeypatch, ranges):
    server, path, content = tiny_download(tmp_path, monkeypatch, cuts=2, ranges=ranges)
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and len(server.requests) == 3


def test_a_part_longer_than_the_file_starts_anew(tmp_path, monkeypatch):
    server, path, content = tiny_download(tmp_path, monkeypatch)
    Path(f"{path}.part").write_bytes(content + b"more")
    data.load("clevr", "train", tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "behaviour, word",
    [({"missing": True}, "404"), ({"lie": 50}, "run again"), ({"cuts": 99, "ranges": False}, "broke off")],
)
def test_download_that_cannot_end_well(tmp_path, monkeypatch, behaviour, word):
    _, path, _ = tiny_download(tmp_path, monkeypatch, **behaviour)
    data_refused("clevr", tmp_path, word, str(path), "http://127.0.0.1")
    assert not path.exists()


def test_without_network_one_sentence_names_address_and_place(tmp_path, monkeypatch):
    offline = replace(data.DATASETS["clevr"], url="http://127.0.0.1:9/file")
    monkeypatch.setitem(data.DATASETS, "clevr", offline)
    data_refused("clevr", tmp_path, "http://127.0.0.1:9/file", str(tmp_path))


def test_download_needs_room_on_the_disk(tmp_path, monkeypatch):
    tiny_download(tmp_path, monkeypatch)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    data_refused("clevr", tmp_path, "GB", "room")


# --- Batches ---


def numbered(count):
    """Scenes whose pixels are their own number."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 4, 4))
    return data.Scenes(images, images[:, 0], True)


def test_batches_depend_on_seed_and_step_alone_and_each_epoch_is_a_permutation():
    epoch = np.concatenate([data.batch_indices(96, 32, 5, step) for step in range(3)])
    assert sorted(epoch) == list(range(96))
    following = np.concatenate([data.batch_indices(96, 32, 5, step) for step in range(3, 6)])
    assert sorted(following) == list(range(96)) and not np.array_equal(epoch, following)
    data.epoch_order.cache_clear()
    assert np.array_equal(data.batch_indices(96, 32, 5, 4), following[32:64])
    assert not np.array_equal(data.batch_indices(96, 32, 6, 4), following[32:64])
    few = data.batch_indices(3, 32, 0, 0)
    assert few.dtype == np.int64 and len(few) == 32 and set(few) == {0, 1, 2}


def test_batches_come_in_order_from_any_step():
    batches = list(data.Batches(numbered(50), 8, seed=3, start=11, stop=20, device="cpu"))
    assert len(batches) == 9
    for step, batch in enumerate(batches, 11):
        assert batch.dtype == torch.uint8 and batch.shape == (8, 3, 4, 4)
        assert batch[:, 0, 0, 0].tolist() == data.batch_indices(50, 8, 3, step).tolist()


def test_batches_count_the_wait_raise_the_error_and_leave_no_thread(monkeypatch):
    before = threading.active_count()
    batches = data.Batches(numbered(50), 8, 0, 0, 10**9, "cpu")
    for batch in itertools.islice(batches, 3):
        pass
    assert 0 < batches.waited < 10
    for _ in batches:
        break
    monkeypatch.setattr(data, "batch_indices", lambda *_: np.array([1000]))
    with pytest.raises(IndexError):
        next(iter(data.Batches(numbered(50), 8, 0, 0, 5, "cpu")))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
