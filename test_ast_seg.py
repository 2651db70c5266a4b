"""What is true of AST-Seg, and how do we know? The second half of the lesson, in the order of the paper.

Each test states a truth and holds ast_seg.py against an authority that shares no code with it: the equation
itself as a plain loop in float64, a proof, a table of the paper typed in again, a library, or a real run.

    pytest test_ast_seg.py
"""
import dataclasses
import gzip
import http.server
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
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
    warmup_steps=2, entropy_warmup_steps=6, slots=4, d_t=64, d_ff=64, layers=1, s_max=24.0,
    entropy_weight=0.01, limit=12, log_every=1, checkpoint_every=2, validate_every=6)
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
    s = ast_seg.make_settings("clevr", background_steps=80)  # of phase 1 nothing else depends
    assert (s.phase2_steps, s.warmup_steps) == (30_000, 5000)


def test_small_is_the_usual_size_of_shapes_alone_and_of_any_set_that_asks_for_it():
    """What --small stands for; the flags beside it still count, and the set keeps its own facts."""
    assert ast_seg.make_settings("shapes").small and not ast_seg.make_settings("shapes", small=False).small
    s = ast_seg.make_settings("clevr", small=True, lr=7.0, steps=2 * ast_seg.SMALL["steps"])
    assert (s.lr, s.slots, s.background) == (7.0, 10, ast_seg.SMALL["background"])
    assert s.phase2_steps == 2 * ast_seg.SMALL["phase2_steps"]  # proportions of the small run
    rest = ast_seg.SMALL.keys() - {"lr", "steps", "phase2_steps", "warmup_steps", "entropy_warmup_steps"}
    assert {k: getattr(s, k) for k in rest} == {k: ast_seg.SMALL[k] for k in rest}
    large = ast_seg.make_settings("shapes", small=False)
    assert (large.size, large.slots, large.lr, large.generator) == (64, 6, 4e-5, "b3")


@pytest.mark.parametrize("given, flag", [
    (dict(size=48), "--size"), (dict(size=224), "--size"), (dict(steps=0), "--steps"),
    (dict(background_steps=-1), "--background-steps"), (dict(lr=-1.0), "--lr"), (dict(lr=math.nan), "--lr"),
    (dict(d_t=60), "--d-t"), (dict(d_t=32), "--d-t"), (dict(s_min=-1.0), "--s-min"),
    (dict(s_min=5.0, s_max=4.0), "--s-min"), (dict(generator="resnet"), "--generator"),
    (dict(curriculum="none"), "--curriculum"), (dict(slots=0), "--slots"),
    (dict(batch_size=1), "--batch-size"), (dict(lr=math.inf), "--lr"), (dict(window=-1), "--window"),
    (dict(mask_noise=-0.1), "--mask-noise"), (dict(precision="int8"), "--precision"),
    (dict(seed=10 ** 20), "--seed"), (dict(seed=10 ** 400), "--seed"), (dict(seed=-1), "--seed")])
def test_settings_that_cannot_work_are_refused_in_one_sentence(given, flag):
    with pytest.raises(ast_seg.SettingsError, match=flag) as refusal:
        ast_seg.make_settings("shapes", **given)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


@pytest.mark.parametrize("given", [
    *(dict(generator=g, size=size) for g in ("unet-small", "unet", "tiny") for size in (64, 128, 192)),
    *(dict(background=kind, size=size) for kind in ("simple", "complex") for size in (64, 128, 192)),
    dict(small=False, generator="tiny", size=192)], ids=str)
def test_settings_that_are_not_refused_do_work(given):
    """Every part takes images of the size, and glimpses have the side of Table 2, or of the small model."""
    s = tiny(**given, layers=0)
    side = 16 if s.small else {64: 32, 128: 64, 192: 128}[s.size]
    with torch.device("meta"):  # shapes without numbers
        model, images = ast_seg.ASTSeg(s), torch.rand(2, 3, s.size, s.size)
        maps, background = model.feature_maps(images), model.background(images)
        glimpse = model.glimpse_generator(torch.rand(1, s.d_z_what))
    assert maps.shape[:2] == (2, s.slots + 34) and background.shape == (2, 4, s.size, s.size)
    assert glimpse.shape == (1, 4, side, side)


def test_every_setting_is_a_flag():
    for field in dataclasses.fields(ast_seg.Settings):
        flag, choices = "--" + field.name.replace("_", "-"), field.metadata["choices"]
        value = True if field.type is bool else choices[-1] if choices else field.type(7)
        given = [flag] if field.type is bool else [flag, str(value)]
        assert vars(ast_seg.parse_arguments(given))[field.name] == value
    assert not ast_seg.parse_arguments(["--no-small"]).small
    fields = {field.name for field in dataclasses.fields(ast_seg.Settings)}
    assert not fields & vars(ast_seg.parse_arguments([])).keys()  # what is not given is not there


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


def windowed_soft_argmax_as_a_loop(logits, B):
    """Eq. 5 of the keypoint paper's supplement, with tau = 1: the mean of the B x B cells around the highest
    one, weighted by exp. (h, w) -> [x, y]."""
    h, w = logits.shape
    row, column = max(np.ndindex(h, w), key=lambda cell: logits[cell].item())
    kernel = [(i, j) for i, j in np.ndindex(h, w) if max(abs(i - row), abs(j - column)) <= (B - 1) / 2]
    total = sum(math.exp(logits[cell]) for cell in kernel)
    return sum(np.array([j, i]) * math.exp(logits[i, j]) / total for i, j in kernel)


@pytest.mark.parametrize("B", [1, 3, 5, 99])
def test_the_windowed_soft_argmax_is_equation_5_of_the_keypoint_paper(B):
    """On maps with a peak anywhere, at the border and in corners too; and a window of everything is none."""
    logits = torch.randn(40, 5, 8, dtype=torch.float64) * 3
    close(ast_seg.soft_argmax(logits, B), np.stack([windowed_soft_argmax_as_a_loop(m, B) for m in logits]),
          1e-12)
    close(ast_seg.spatial_softmax(logits, B).sum((-2, -1)), np.ones(40), 1e-12)
    if B == 99:
        close(ast_seg.soft_argmax(logits, B), ast_seg.soft_argmax(logits), 1e-12)


def test_the_windowed_soft_argmax_is_equivariant_even_where_the_whole_one_is_not():
    """A peak moves over a floor that stays. The window sees what moves alone: M(T_uv phi) = M(phi) + (u, v).
    The whole map's centre of mass is held back by the floor."""
    patch, found, whole = torch.randn(5, 5, dtype=torch.float64), {}, {}
    patch[2, 2] = 6.0
    for u, v in SHIFTS:
        logits = torch.zeros(16, 18, dtype=torch.float64)
        logits[6 + v:11 + v, 6 + u:11 + u] = patch
        found[u, v], whole[u, v] = ast_seg.soft_argmax(logits, 5), ast_seg.soft_argmax(logits)
    for (u, v), position in found.items():
        close(position, found[0, 0] + torch.tensor([u, v]), 1e-12)
    assert (whole[3, 0] - whole[0, 0])[0] < 2.9


def test_the_windowed_soft_argmax_is_no_counterexample_to_proposition_2_1_as_it_is_not_affine():
    """The proposition says: equivariant and affine means Eq. 4. The window is another equivariant operator
    on maps that sum to 1, so it cannot be affine. Here: of 0.6 delta + 0.4 delta' it sees the higher point
    alone, where Eq. 4 finds the mixture of both positions."""
    phi = torch.zeros(2, 11, 16, dtype=torch.float64)
    phi[0, 2, 3] = phi[1, 8, 13] = 1.0
    a = torch.tensor([0.6, 0.4], dtype=torch.float64)
    mixture = torch.einsum("a,ahw->hw", a, phi)

    def M(maps):
        return ast_seg.soft_argmax(maps.log(), window=5)
    close(M(phi), [[3, 2], [13, 8]], 1e-12)
    close(ast_seg.affine_localizer(mixture), a @ M(phi), 1e-12)  # (7.0, 4.4)
    close(M(mixture), [3, 2], 1e-12)  # M(a phi + b phi') is not a M(phi) + b M(phi')


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


@pytest.mark.parametrize("anisotropic, window", [(False, 0), (True, 0), (True, 3)])
@pytest.mark.parametrize("stretch", [1.0, 5.0], ids=["as found", "clamped"])
def test_encode_is_algorithm_1(anisotropic, window, stretch):
    """From the generator's maps to the latents, by loops; the refinement is replaced by a multiplication."""
    s = tiny(anisotropic=anisotropic, window=window, layers=0)
    model = ast_seg.ASTSeg(s).eval()
    maps = torch.randn(2, s.slots + 1 + anisotropic + 1 + 32, 6, 9) * 3
    model.feature_maps.forward = lambda images: maps
    model.refine.register_forward_hook(lambda module, args, out: stretch * out)
    latents = model.encode(torch.rand(2, 3, 64, 64))
    clamped = 0
    for n in range(2):
        logits = maps[n, :s.slots].double()
        if window:
            for a in logits:
                row, column = divmod(a.argmax().item(), 9)
                for i, j in np.ndindex(6, 9):
                    a[i, j] = a[i, j] if max(abs(i - row), abs(j - column)) <= 1 else -math.inf
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


@pytest.mark.parametrize("generator, stride", [("tiny", 4), ("b3", 4), ("unet-small", 4), ("unet", 1)])
def test_generators_make_maps_of_a_quarter_of_the_resolution_and_table_3_of_all(generator, stride):
    with torch.device("meta"):
        model = ast_seg.ASTSeg(tiny(generator=generator))
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
        first, level, *last = unet
        down, up = [], []
        while len(level.path) == 5:  # of a level: down, a residual block, all below, another one, up
            down, up, level = [*down, level.path[1]], [level.path[4], *up], level.path[2]
        shapes = trace(unet, [first, *down, level.path, *up, *last], torch.rand(1, 3, 64, 64))
    assert shapes == [
        (80, 64), (128, 32), (192, 16), (256, 8), (256, 4), (256, 2), (256, 2),  # down, center
        (256, 4), (256, 8), (192, 16), (128, 32), (80, 64), (d, 64), (d, 64), (d, 64)]  # up, last three
    convolutions = [m for m in unet.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    down, up = [(4, 2, 1), (3, 1, 1)], [(3, 1, 1), (4, 2, 1)]  # kernel, stride, padding
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in convolutions] == (
        [(3, 1, 1)] + 5 * down + [(3, 1, 1)] + 5 * up + [(3, 1, 1), (3, 1, 1), (1, 1, 0)])
    assert [m.transposed for m in convolutions] == [False] * 12 + 5 * [False, True] + [False] * 3
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in unet.modules()) == len(convolutions) - 2
    assert sum(isinstance(m, torch.nn.CELU) for m in unet.modules()) == len(convolutions) - 2


def test_a_level_of_the_unet_sees_the_level_below_and_the_one_across():
    """Skip connections: with the level below silenced, the output still depends on the image."""
    unet = ast_seg.UNet("unet-small", 5).eval()
    levels = [m for m in unet.modules() if isinstance(m, ast_seg.UNetLevel)]
    assert len(levels) == 5
    for level in levels:
        level.path.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
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


def refinement(small):
    return ast_seg.Refinement(36, tiny(layers=3, small=small)).eval()


@pytest.mark.parametrize("small", [False, True])
def test_permuting_the_queries_permutes_what_comes_out(small):
    """Queries have no order. Yet they see each other, unless the transformer starts as the identity."""
    refine = refinement(small)
    triplets, order = torch.randn(2, 5, 36), torch.tensor([3, 0, 4, 1, 2])
    close(refine(triplets)[:, order], refine(triplets[:, order]).detach())
    changed = triplets.clone()
    changed[:, 0] += 1
    effect = (refine(changed) - refine(triplets))[:, 1:].abs().max()
    assert (effect > 1e-3) != small


def test_the_small_transformer_starts_near_the_identity_and_can_leave_it():
    triplets = torch.randn(64, 5, 36)

    def distance(refine):
        return ((refine(triplets) - triplets).norm() / triplets.norm()).item()
    refine = refinement(small=True)
    assert distance(refine) < 0.05 < 0.5 < distance(refinement(small=False))
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
        model = ast_seg.ASTSeg(tiny(size=size, small=False, generator="tiny", layers=0))
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
    s = tiny(log_alpha_0=0.5, anisotropic=anisotropic)
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


def test_mask_noise_is_there_in_training_alone_and_stays_within_its_bounds():
    """DTI-Sprites, C.4: uniform noise in [-0.4, 0.4] on the masks; colours have none."""
    model, latents = ast_seg.ASTSeg(tiny(mask_noise=0.4)).eval(), random_latents(4, 3)
    with torch.no_grad():
        colours, clean = model.draw(latents, 64, 64)
        assert torch.equal(model.draw(latents, 64, 64)[1], clean)
        model.train()
        (noisy_colours, noisy), (_, other) = model.draw(latents, 64, 64), model.draw(latents, 64, 64)
        assert torch.equal(noisy_colours, colours) and not torch.equal(noisy, other)
        assert 0 <= noisy.min() and noisy.max() <= 1
        assert 0.3 < (noisy - clean).abs().max() <= 0.4 + 1e-6
        assert ((noisy - clean)[clean > 0.4].mean()).abs() < 0.05  # centred
        model.settings = tiny()  # none by default
        assert torch.equal(model.draw(latents, 64, 64)[1], clean)


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
        halves = [*model[0], *model[1]]
        shapes = trace(model, halves, torch.rand(2, 3, size, size))
    assert shapes == list(zip(encoder, sides))[1:] + list(zip(generator, sides))[-2::-1]
    assert encoder[-1] == 16 and sides[-1] == 1
    down = [(m.conv.kernel_size[0], m.conv.stride[0], m.conv.padding[0]) for m in model[0]]
    assert down == [(5, 2, 2)] * (len(down) - 2) + [(4, 2, 1), (2, 1, 0)]  # 4 is not above 5; 2 is the whole
    assert [m.conv.kernel_size[0] for m in model[1]] == [kernel for kernel, _, _ in down[::-1]]
    assert all(block.conv.bias is None for block in halves)
    for block in halves[:-1]:
        assert [type(m) for m in block.norm] == [torch.nn.GroupNorm, torch.nn.CELU]
        assert block.norm[0].num_groups == max(1, block.norm[0].num_channels // 16)
    assert isinstance(halves[-1].norm, torch.nn.Sigmoid)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_the_background_model_gives_back_images_of_every_size(size):
    model = ast_seg.Background("small", size).eval()
    out = model(torch.rand(1, 3, size, size))
    assert out.shape == (1, 4, size, size) and 0 <= out.min() <= out.max() <= 1
    assert model[0](torch.rand(1, 3, size, size)).shape == (1, 16, 1, 1)


def test_every_block_of_the_background_model_knows_where_its_pixels_are():
    """The last two channels of a convolution's input: j / (w - 1) - 0.5 and i / (h - 1) - 0.5, or 1 and 1."""
    model, seen = ast_seg.Background("small", 192), []
    for block in (*model[0], *model[1]):
        block.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.rand(2, 3, 192, 192))
    assert [x.shape[-1] for x in seen] == [192, 96, 48, 24, 12, 6, 3, 1, 3, 6, 12, 24, 48, 96]
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


@pytest.mark.parametrize("small, step, robustness", [
    (False, 0, 1.0), (True, 0, 0.0), (True, 450, 0.25), (True, 900, 1.0), (True, 999, 1.0)])
def test_the_loss_of_phase_1_is_the_background_loss(small, step, robustness):
    """In a small run its robustness grows over nine tenths of the phase."""
    s = tiny(background_steps=1000, small=small, generator="tiny", background="small")
    model, images = ast_seg.ASTSeg(s), torch.rand(1, 3, 64, 64)
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
        last = model.background[1][-1].conv.weight.grad  # (channels, 4, kernel, kernel)
        assert last[:, :3].abs().max() > 0
        assert (last[:, 3].abs().max() > 0) == (phase == 1)


# --- 4.2.2 Curriculum training ----------------------------------------------------------------------
@pytest.mark.parametrize("phase, step, rate", [
    (1, 0, 2e-3), (1, 1999, 2e-3), (1, 2000, 2e-4), (1, 2499, 2e-4),  # a tenth after 80 %
    (2, 0, 0), (2, 50, 4e-9), (2, 2500, 1e-5), (2, 5000, 4e-5), (2, 29_999, 4e-5),  # quadratic warm-up
    (3, 30_000, 4e-5), (3, 112_499, 4e-5), (3, 112_500, 4e-6), (3, 124_999, 4e-6)])  # a tenth from 90 % on
def test_the_learning_rate_of_the_paper_at_its_corners(phase, step, rate):
    assert ast_seg.learning_rate(ast_seg.make_settings("clevr"), phase, step) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("phase, step, objects, refine, background", [
    (1, 0, None, None, 0.5), (1, 80, None, None, 0.05),  # phase 1 knows no parts
    (2, 0, 0, 0, None), (2, 100, 0.25, 0.1 / 225, None), (2, 750, 1, 0.025, None),  # refine: until 5/12
    (2, 1799, 1, 0.1, None), (3, 1800, 0, 0, 0), (3, 1850, 0.25, 0.025, 0.075), (3, 1900, 1, 0.1, 0.3),
    (3, 2699, 1, 0.1, 0.3), (3, 2700, 0.1, 0.01, 0.03)])  # a tenth from 75 % on
def test_what_the_small_model_adds_to_it(phase, step, objects, refine, background):
    """A rate and a warm-up of its own for the transformer, a rate of its own for the background; a second
    warm-up of all at the switch to phase 3; and an earlier decay."""
    s = tiny(background_steps=100, background_lr=0.5, steps=3600, phase2_steps=1800, lr=1.0, warmup_steps=200)
    truth = dict(objects=objects, refine=refine, background=background)
    for part, rate in truth.items():
        if rate is not None:
            assert ast_seg.learning_rate(s, phase, step, part) == pytest.approx(rate)


def test_without_small_all_parts_have_one_rate():
    s = ast_seg.make_settings("clevr")
    for phase, step in ((2, 100), (3, 30_000), (3, 30_100), (3, 112_500)):
        rates = {ast_seg.learning_rate(s, phase, step, part) for part in ("objects", "refine", "background")}
        assert len(rates) == 1


def test_the_small_schedule_reaches_each_part_by_its_name():
    """The groups of the optimiser carry the names that learning_rate knows."""
    model = ast_seg.ASTSeg(tiny())
    names = {name: {id(p) for p in getattr(model, name).parameters()} for name in ("refine", "background")}
    for phase, parts in ((2, ["refine", "objects"]), (3, ["background", "refine", "objects"])):
        adam = ast_seg.make_optimizer(model, phase)
        groups = {group["part"]: {id(p) for p in group["params"]} for group in adam.param_groups}
        assert list(groups) == parts and groups["refine"] == names["refine"]
        assert groups.get("background", names["background"]) == names["background"]


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
    def save(self, model, optimizer, t):
        super().save(model, optimizer, t)
        self.__dict__.setdefault("kept", {})[t] = torch.load(self.checkpoint)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    counts = dict(train=12, val=3, test=12)
    return {split: data.load("shapes", split, folder, count, 64) for split, count in counts.items()}


def train(folder, scenes, weights=0, run=ast_seg.Run, **given):
    s = tiny(**given)
    torch.manual_seed(weights)
    model, run = ast_seg.ASTSeg(s), run(folder, s)
    ast_seg.train(model, scenes["train"], scenes["val"], run, CPU)
    return model, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, scenes):
    return train(tmp_path_factory.mktemp("run"), scenes, run=RememberingRun)


def contents(folder, files="*"):
    paths = [path for path in sorted(folder.rglob(files)) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same(state, other, prefix=""):
    return {k: torch.equal(v, other[k]) for k, v in state.items() if k.startswith(prefix)}


def test_each_phase_leaves_what_it_does_not_train_bit_identical_and_moves_the_rest(uninterrupted):
    kept = uninterrupted[1].kept  # phase 1 ends at t = 6, phase 2 at 14, phase 3 at 18
    start, first, second, third = (kept[t]["model"] for t in (0, 6, 14, 18))
    objects = [k for k in start if not k.startswith("background.")]
    assert all(torch.equal(start[k], first[k]) for k in objects)
    assert not any(same(start, first, "background.").values())
    assert all(same(first, second, "background.").values())
    assert not any(same(first, second, "glimpse_generator.").values())
    assert not any(same(second, third, "background.").values())
    assert not any(same(second, third, "glimpse_generator.").values())


def test_the_moments_of_adam_start_anew_at_the_switch_to_phase_3(uninterrupted):
    """Adam counts its steps: after 4 steps of phase 3 the objects' parameters have had 4, not 12."""
    for t, steps in ((6, 6), (14, 8), (18, 4)):
        states = uninterrupted[1].kept[t]["optimizer"]["state"].values()
        assert {int(state["step"]) for state in states} == {steps}


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


def test_the_checkpoint_of_the_end_has_the_model_beside_it(uninterrupted):
    model, run = uninterrupted
    loaded = ast_seg.ASTSeg.from_pretrained(run.folder / "model")
    for state in (loaded.state_dict(), run.kept[18]["model"]):
        assert all(same(model.state_dict(), state).values())


@pytest.mark.parametrize("t", [3, 6, 9, 14, 17])
def test_wherever_a_run_is_interrupted_it_ends_in_the_same_weights(t, tmp_path, scenes, uninterrupted,
                                                                   monkeypatch):
    """Killed in step t, within a phase or at the switch to the next, and continued from its last checkpoint
    by a model of other random weights. The frames of training.gif come out the same, too."""
    true_loss, calls = ast_seg.training_loss, itertools.count()

    def training_loss(*arguments):
        if next(calls) == t:
            raise Killed
        return true_loss(*arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ast_seg, "training_loss", training_loss)
        train(tmp_path, scenes)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"t": 1')  # half a line
    resumed_at = torch.load(tmp_path / "checkpoint.pt")["t"]
    assert resumed_at == t // 2 * 2  # a checkpoint every two steps
    model, run = train(tmp_path, scenes, weights=1)
    truth, true_run = uninterrupted
    assert all(same(model.state_dict(), truth.state_dict()).values())
    losses = [[{k: line.get(k) for k in ("t", "background", "reconstruction", "entropy", "mIoU")}
               for line in ast_seg.read_log(r.log_file)] for r in (run, true_run)]
    assert losses[0] == losses[1]
    frames = contents(true_run.folder / "frames")
    assert list(frames) == ["0000006.png", "0000016.png", "0000017.png", "0000018.png"]
    assert contents(tmp_path / "frames") == frames


def test_a_run_that_is_killed_at_its_very_first_checkpoint_can_start_again(tmp_path, scenes, monkeypatch):
    def save(*_):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", save)
        train(tmp_path / "run", scenes, background_steps=1, steps=1)
    train(tmp_path / "run", scenes, background_steps=1, steps=1)
    assert torch.load(tmp_path / "run/checkpoint.pt")["t"] == 2


def test_another_seed_takes_other_batches(tmp_path, scenes, uninterrupted):
    """Or the test above would be passed by a program that does nothing at random."""
    _, run = train(tmp_path, scenes, run=RememberingRun, seed=1, steps=1)
    kept, other = run.kept, uninterrupted[1].kept
    assert all(same(kept[0]["model"], other[0]["model"]).values())  # from the same weights
    assert not any(same(kept[6]["model"], other[6]["model"], "background.").values())


@pytest.mark.parametrize("curriculum, moved", [("bt", True), ("frozen", False)])
def test_baseline_training_moves_the_background_from_the_start_and_frozen_never(
        curriculum, moved, tmp_path, scenes):
    """In a small run the very first step has the rate 0 of the second warm-up."""
    _, run = train(tmp_path, scenes, run=RememberingRun, curriculum=curriculum, background_steps=0, steps=4)
    assert set(same(run.kept[0]["model"], run.kept[4]["model"], "background.").values()) == {not moved}


@pytest.mark.parametrize("given", [
    dict(layers=0), dict(slots=1), dict(slots=7), dict(generator="unet"), dict(generator="tiny"),
    dict(entropy_weight=0.0), dict(curriculum="frozen"), dict(curriculum="bt"), dict(anisotropic=True),
    dict(window=5), dict(mask_noise=0.4), dict(precision="bfloat16"),
    dict(small=False, generator="tiny", background="small", anisotropic=True, window=3, mask_noise=0.4)],
    ids=str)
def test_every_ablation_trains_and_is_evaluated(given, tmp_path, scenes):
    """Table 4 of the paper, and what its peers do otherwise: a few steps of each phase, a score, a file."""
    few = {split: data.Scenes(s.images[:2], s.labels[:2]) for split, s in scenes.items()}
    short = dict(background_steps=1, steps=4, phase2_steps=2, batch_size=2, background_batch_size=2)
    model, run = train(tmp_path, few, run=RememberingRun, **TINY | short | dict(checkpoint_every=9) | given)
    *_, last = ast_seg.read_log(run.log_file)
    phases = {"frozen": [1, 2, 2, 2, 2], "bt": [3] * 4}.get(given.get("curriculum"), [1, 2, 2, 3, 3])
    assert [line["phase"] for line in ast_seg.read_log(run.log_file)] == phases
    assert math.isfinite(last["reconstruction"]) and 0 <= last["mIoU"] <= 100
    before, after = run.kept[0]["model"], model.state_dict()
    assert all(v.isfinite().all() for v in after.values())
    assert not any(same(before, after, "glimpse_generator.").values())
    loaded = ast_seg.ASTSeg.from_pretrained(tmp_path / "model")
    assert vars(loaded.settings).items() >= given.items()
    scores = [ast_seg.evaluate(m, few["test"], CPU) for m in (model, loaded)]
    for name, values in scores[0].items():
        assert values.shape == (2,) and np.array_equal(values, scores[1][name])


# --- 5. Metrics -------------------------------------------------------------------------------------
def segments_iou(pred, true, p, t):
    pixels = list(np.ndindex(pred.shape))
    union = sum(pred[q] == p or true[q] == t for q in pixels)
    return sum(pred[q] == p and true[q] == t for q in pixels) / union if union else 0.0


def mean_iou_by_all_permutations(pred, true):
    """Over all one-to-one matchings with the largest sum of IoUs; where IoUs of 0 leave the matching open,
    segments that are not there match each other, so that the fewest pairs count."""
    m = max(pred.max(), true.max()) + 1
    iou = [[segments_iou(pred, true, p, t) for t in range(m)] for p in range(m)]
    sums = {order: sum(iou[p][t] for p, t in enumerate(order)) for order in itertools.permutations(range(m))}
    best = max(sums.values())
    return max(best / sum(p in pred or t in true for p, t in enumerate(order))
               for order, value in sums.items() if value > best - 1e-9)


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


def foreground_sets(pred, true):
    """The pixels of all objects, found and true, as sets."""
    return ({q for q in np.ndindex(labels.shape) if labels[q] > 0} for labels in (pred, true))


def foreground_iou_of_sets(pred, true):
    A, B = foreground_sets(pred, true)
    return len(A & B) / len(A | B) if A | B else 1.0


def dice_of_sets(pred, true):
    A, B = foreground_sets(pred, true)
    return 2 * len(A & B) / (len(A) + len(B)) if A or B else 1.0


def random_labels(found, objects, seed):
    """(6, 5, 7) predicted labels below `found` and true ones below `objects`, alike in many pixels."""
    rng = np.random.default_rng(seed)
    true = rng.integers(objects, size=(6, 5, 7))
    pred = np.stack([rng.permutation(max(found, objects))[labels] for labels in true])
    return np.where(rng.random(true.shape) < 0.6, pred, rng.integers(found, size=true.shape)) % found, true


@pytest.mark.parametrize("found, objects", [(4, 4), (6, 3), (2, 5), (1, 4), (5, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_metrics_are_their_definitions(found, objects, seed):
    """All permutations for mIoU, all pairs of pixels for ARI, loops for MSC, sets for IoU and Dice; as many
    slots, more, fewer."""
    pred, true = random_labels(found, objects, seed)
    pred[0] = true[0] = pred[1] = true[2] = 0  # no foreground at all; none found; none there
    table = ast_seg.contingency(torch.from_numpy(pred), torch.from_numpy(true))
    for n, p, t in np.ndindex(table.shape):
        assert table[n, p, t] == ((pred[n] == p) & (true[n] == t)).sum()
    for metric, definition in (
            (ast_seg.mean_iou, mean_iou_by_all_permutations),
            (ast_seg.adjusted_rand_index, partial(adjusted_rand_index_by_pairs, foreground_only=True)),
            (partial(ast_seg.adjusted_rand_index, foreground_only=False),
             partial(adjusted_rand_index_by_pairs, foreground_only=False)),
            (ast_seg.segmentation_covering, segmentation_covering_by_loops),
            (ast_seg.foreground_iou, foreground_iou_of_sets), (ast_seg.METRICS["Dice"], dice_of_sets)):
        close(metric(table), [definition(*pair) for pair in zip(pred, true)], 1e-12)
    assert ast_seg.foreground_iou(table)[0] == ast_seg.METRICS["Dice"](table)[0] == 1


@pytest.mark.parametrize("seed", range(4))
def test_ari_is_the_one_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    pred, true = random_labels(5, 4, seed)
    table = ast_seg.contingency(torch.from_numpy(pred), torch.from_numpy(true))
    close(ast_seg.adjusted_rand_index(table, False),
          [metrics.adjusted_rand_score(b.ravel(), a.ravel()) for a, b in zip(pred, true)], 1e-12)
    close(ast_seg.adjusted_rand_index(table),
          [metrics.adjusted_rand_score(b[b > 0], a[b > 0]) for a, b in zip(pred, true)], 1e-12)


def scores_one_by_one(pred, true):
    """What one writes first: image by image, scikit-learn for ARI and counts, SciPy for the matching."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, confusion_matrix
    scores = {"mIoU": [], "ARI-FG": [], "MSC-FG": []}
    for p, t in zip(pred, true):
        counts = confusion_matrix(p.ravel(), t.ravel(), labels=range(12)).astype(float)
        union = counts.sum(1, keepdims=True) + counts.sum(0) - counts
        iou = counts / np.maximum(union, 1)
        segments, objects = max(len(np.unique(p)), len(np.unique(t))), np.unique(t[t > 0])
        scores["mIoU"].append(iou[linear_sum_assignment(-iou)].sum() / segments)
        scores["ARI-FG"].append(adjusted_rand_score(t[t > 0], p[t > 0]) if len(objects) else 1.0)
        scores["MSC-FG"].append(iou[:, objects].max(0).mean() if len(objects) else 0.0)
    return scores


def test_the_metrics_are_those_of_libraries_image_by_image_and_ten_times_faster():
    """300 maps of 64 x 64 pixels, up to 11 segments: the same to 1e-9, in less than a tenth of the time."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    coarse, change = rng.integers(12, size=(2, 300, 8, 8)), rng.random((300, 64, 64)) < 0.2
    true, other = (np.kron(labels, np.ones((1, 8, 8), int)) for labels in coarse)
    for labels in (true, other):
        labels %= rng.integers(1, 12, size=(300, 1, 1))  # 1 to 11 segments
    true[0], pred = 0, np.where(change, other, true)
    p, t = torch.from_numpy(pred), torch.from_numpy(true)

    def ours():
        table = ast_seg.contingency(p, t)
        return {name: ast_seg.METRICS[name](table) for name in ("mIoU", "ARI-FG", "MSC-FG")}

    def timed(function):
        began = time.perf_counter()
        return function(), time.perf_counter() - began
    one_by_one = [timed(partial(scores_one_by_one, pred, true)) for _ in range(2)]
    at_once = [timed(ours) for _ in range(10)]
    for name, values in at_once[0][0].items():
        close(values, one_by_one[0][0][name], 1e-9)
    ratio = min(seconds for _, seconds in one_by_one) / min(seconds for _, seconds in at_once)
    print(f"{ratio:.0f} times faster")
    assert ratio > 10


@pytest.mark.parametrize("pred, true, miou, ari_fg, msc_fg, iou", [
    ("2201", "0012", 1, 1, 1, 1 / 4),  # perfect, whatever the names: only IoU asks which is the background
    ("0000", "0000", 1, 1, 0, 1),  # no foreground, and none found
    ("0011", "0000", 1 / 4, 1, 0, 0),  # no foreground, but something found: (1/2 + 0) / 2 pairs
    ("0111", "0011", (1 / 2 + 2 / 3) / 2, 1, 2 / 3, 2 / 3),  # one object, with a margin
    ("0012", "0011", (1 + 1 / 2 + 0) / 3, 0, 1 / 2, 1),  # one object, broken in two
    ("0344", "0112", (1 + 1 / 2 + 1 / 2) / 3, -1 / 2, 1 / 2, 1),  # more slots than objects
    ("0000", "0112", (0 + 2 / 4 + 0) / 3, 0, (2 / 4 + 1 / 4) / 2, 0),  # one predicted segment
    ("1111", "2222", 1, 1, 1, 1),  # one object everywhere
    ("0001", "0001", 1, 1, 1, 1)])  # an object of one pixel has no pairs at all
def test_the_metrics_in_the_cases_that_one_can_do_by_hand(pred, true, miou, ari_fg, msc_fg, iou):
    table = ast_seg.contingency(*(torch.tensor([[[int(c) for c in row]]]) for row in (pred, true)))
    truth = {"mIoU": miou, "ARI-FG": ari_fg, "MSC-FG": msc_fg, "IoU": iou, "Dice": 2 * iou / (1 + iou)}
    assert {k: metric(table).item() for k, metric in ast_seg.METRICS.items()} == pytest.approx(truth)


def test_an_image_scores_the_same_alone_and_among_others():
    """Small segments that hardly meet, beside images of many labels."""
    rng = np.random.default_rng(0)
    pred, true = torch.from_numpy(rng.integers(4, size=(2, 40, 4, 5)) * (rng.random((2, 40, 4, 5)) < 0.3))
    pred[20:] += torch.from_numpy(rng.integers(6, size=(20, 4, 5)))
    table = ast_seg.contingency(pred, true)
    alone = [ast_seg.contingency(p[None], t[None]) for p, t in zip(pred, true)]
    for metric in ast_seg.METRICS.values():
        close(metric(table), torch.cat([metric(one) for one in alone]), 1e-12)


def test_the_metrics_cost_little_beside_the_model():
    """2 to 3 % of its time, for a batch of the evaluation."""
    model, images = ast_seg.ASTSeg(ast_seg.make_settings("shapes")).eval(), torch.rand(64, 3, 64, 64)
    pred, true = torch.randint(7, (2, 64, 64, 64))
    seconds = []
    for work in (lambda: [metric(ast_seg.contingency(pred, true)) for metric in ast_seg.METRICS.values()],
                 torch.no_grad()(lambda: model(images))):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        seconds.append(min(times))
    assert seconds[0] < seconds[1] / 2


def test_the_numbers_of_the_paper_are_those_of_its_tables_1_to_3():
    """In the columns of each table, for AST-Seg-B3-BT and -CT, typed in once more."""
    table_1 = """71.92 32.94 76.05 36.13 51 63 57.30 15.72 71.79 22.88 152 39
                 90.27 0.20 98.26 0.07 16 1 79.58 0.54 94.77 0.51 139 7"""
    table_2 = """74.96 10.02 69.86 10.13 74.50 8.61 11.7 2.1 73.77 7.56 74.12 8.63 70.18 12.68 11.8 7.0
                 87.23 0.88 82.22 0.96 85.02 0.79 6.7 0.9 79.34 0.73 77.65 1.3 78.84 0.21 4.5 0.2"""
    table_3 = """- - - - - - - - - - - -
                 67.50 0.75 83.14 0.75 832 24 73.07 0.65 87.27 3.78 145 6"""
    columns = ["mIoU", "ARI-FG", "MSE"], ["ARI-FG", "MSC-FG", "mIoU", "MSE"]
    truth = {}
    for table, sets, names in ((table_1, ("clevr", "clevrtex"), columns[0]),
                               (table_2, ("objects_room", "shapestacks"), columns[1]),
                               (table_3, ("ood", "camo"), columns[0])):
        for row, line in enumerate(table.splitlines()):
            cells = line.split()
            values = [f"{a}±{b}".replace("-±-", "-") for a, b in zip(cells[::2], cells[1::2])]
            for i, (dataset, name) in enumerate(itertools.product(sets, names)):
                truth[dataset, row, name] = values[i]
    ours = {(dataset, row, name): value
            for dataset, rows in ast_seg.PAPER.items() for row, text in enumerate(rows)
            for name, value in zip(("mIoU", "ARI-FG", "MSC-FG", "MSE"),
                                   4 * ["-"] if text == "-" else text.split(), strict=True)}
    assert {key: value for key, value in ours.items() if key in truth} == truth
    assert {ours[key] for key in ours.keys() - truth.keys()} == {"-"}  # what the tables do not have


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
    """The perfect model on 70 scenes, more than a batch; the squared error is summed over channels and
    pixels; of scenes without labels it alone is known."""
    scenes = data.load("shapes", "test", tmp_path, 70, 64)
    scores = ast_seg.evaluate(Perfect(scenes), scenes, CPU)
    assert list(scores) == ["mIoU", "ARI-FG", "MSC-FG", "IoU", "Dice", "MSE"]
    for name in ast_seg.METRICS:
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
    """Wait until step t is logged, then send the signal. Returns (exit code, stderr)."""
    until = time.time() + 120
    while not (log.exists() and f'"t": {t},' in log.read_text()):
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    return process.returncode, error


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


def table_rows(text):
    """{name: [cells]} of the printed table."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_the_command_leaves_numbers_pictures_and_a_model_that_gives_these_numbers(finished):
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    facts = [results[name] for name in ("dataset", "split", "images", "settings")]
    assert facts == ["shapes", "test", 12, vars(tiny())]
    assert results["device"].startswith("cpu") and results["versions"]["torch"][:4] == torch.__version__[:4]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert results["trained"] == log[-1] and log[-1]["t"] == 18 and log[-1]["seconds"] > 0
    assert [line["phase"] for line in log] == [1] * 6 + [2] * 8 + [3] * 4
    model = ast_seg.ASTSeg.from_pretrained(folder / "model").eval()
    test = data.load("shapes", "test", f"{folder}-data", 12, 64)
    images, true = (torch.from_numpy(np.array(array)) for array in (test.images, test.labels))
    images = images.float() / 255
    with torch.no_grad():
        pred, image_hat = model.segment(images), model(images).image
    table = ast_seg.contingency(pred, true)
    truth = {name: 100 * metric(table) for name, metric in ast_seg.METRICS.items()}
    truth["MSE"] = (image_hat - images).square().sum((1, 2, 3))
    scores = np.load(folder / "scores.npz")
    assert set(scores) == set(truth)
    for name, values in truth.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-3, atol=1e-3)
        assert results[name] == scores[name].mean()
    shown = ["mIoU", "ARI-FG", "MSC-FG", "MSE"]  # the table
    assert table_rows(out)["on"] == ["shapes", *shown]
    assert table_rows(out)[str(folder)] == [f"{results[name]:.2f}" for name in shown]
    assert torch.load(folder / "checkpoint.pt")["t"] == 18
    assert not list(folder.rglob("*.part"))


def test_the_pictures_are_there_and_not_blank(finished):
    """Numbers beside them: as many frames in training.gif as moments of the run."""
    folder, _ = finished
    for name in ("segmentations.png", "objects.png", "equivariance.png", "curves.png"):
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 10
    frames, film = sorted((folder / "frames").iterdir()), Image.open(folder / "training.gif")
    assert len(frames) == film.n_frames == 4
    for number, frame in enumerate(frames):
        film.seek(number)
        assert film.size == Image.open(frame).size and np.asarray(film.convert("L")).std() > 10


def test_a_picture_of_segments_has_the_colours_of_the_labels_and_the_images_themselves(tmp_path):
    """draw_grid, cell by cell: an image as it is, labels by the palette, a map in grey, nothing for None."""
    image, labels, grey = torch.rand(3, 8, 8), torch.arange(64).view(8, 8) % 5, torch.rand(8, 8)
    ast_seg.draw_grid(tmp_path / "a.png", [[image, labels], [grey, None]], ("one", "two"), dpi=100)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")) / 255
    colours = {tuple((255 * c).astype(int)) for c in picture.reshape(-1, 3)}
    near = np.array(sorted(colours))
    wanted = [*image.permute(1, 2, 0).reshape(-1, 3).numpy(), *ast_seg.PALETTE[:5],
              *grey.reshape(-1, 1).expand(-1, 3).numpy()]
    for colour in wanted:
        assert np.abs(near - 255 * colour).max(1).min() < 2.5


def test_the_soft_argmax_finds_the_object_that_slides_over_the_image(tmp_path, scenes, monkeypatch):
    """equivariance.png, of an untrained model: exact, wherever the border cuts nothing off."""
    lines, true_plot = {}, ast_seg.plt.Axes.plot

    def plot(axis, x, y, **style):
        lines.setdefault(style.get("label"), (torch.as_tensor(x), torch.as_tensor(y)))
        return true_plot(axis, x, y, **style)
    with torch.no_grad():
        pictures = ast_seg.Pictures(many_labels(), scenes["test"], CPU)
        monkeypatch.setattr(ast_seg.plt.Axes, "plot", plot)
        pictures.equivariance(tmp_path / "e.png")
    true, found = lines["soft-argmax of a convolution"]
    inside = true.abs() < 0.23  # 1 - 1 / s_min: nothing is cut off, whatever the scale
    assert len(true) == 65 and inside.sum() == 15
    close((found - true)[inside].diff(), np.zeros(14), 1e-3)  # it moves as the object moves
    assert (found - true).abs().max() > 0.1  # at the border a part is gone


def test_stopped_by_ctrl_c_and_killed_the_command_goes_on_to_the_same_weights_bit_for_bit(finished, tmp_path):
    """Ctrl-C in phase 1, a kill in phase 2, Ctrl-C in phase 3: each time the same command goes on from the
    last checkpoint, and says so where it can."""
    folder = tmp_path / "run"
    ways = (signal.SIGINT, 130, 3), (signal.SIGKILL, -signal.SIGKILL, 9), (signal.SIGINT, 130, 15)
    for number, code, t in ways:
        ended, error = interrupt(start(folder), number, folder / "log.jsonl", t)
        assert ended == code and "Traceback" not in error
        assert number == signal.SIGKILL or "goes on from its last checkpoint" in error
        assert (t - 1) // 2 * 2 <= torch.load(folder / "checkpoint.pt")["t"]
    assert not (folder / "training.gif").exists()
    process = start(folder)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    truth, ours = (torch.load(f / "checkpoint.pt") for f in (finished[0], folder))
    assert all(same(truth["model"], ours["model"]).values()) and ours["t"] == 18
    for files in ("model.safetensors", "frames/*.png", "scores.npz"):
        assert contents(finished[0], files) == contents(folder, files) != {}


@pytest.mark.parametrize("more", [(), ("--eval",)], ids=["again", "--eval"])
def test_a_finished_run_is_only_evaluated(more, finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(ast_seg, "make_optimizer", lambda *_: pytest.fail("there is nothing left to train"))
    before, results = contents(folder), json.loads((folder / "results.json").read_text())
    (folder / "segmentations.png").unlink()
    assert command(folder, *more) == 0
    after, again = contents(folder), json.loads((folder / "results.json").read_text())
    assert before.keys() == after.keys()
    for name in ("checkpoint.pt", "log.jsonl", "model/model.safetensors"):
        assert before[name] == after[name]
    for name in ("mIoU", "ARI-FG", "MSC-FG", "MSE"):  # other threads may round otherwise
        assert again[name] == pytest.approx(results[name], rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def data_dir(finished):
    return f"{finished[0]}-data"


@pytest.fixture()
def two_runs(finished, tmp_path):
    """A copy of the finished run, as if a longer one were in progress; and a lone model of other weights."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished[0], run)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"t": 19, "phase": 3, "seconds": 9.0, "reconstruction": 0.1}\n{"t": 20, "pha')
    many_labels().save_pretrained(other)
    return run, other


def evaluate(data_dir, *arguments):
    arguments = ["--eval", "--device=cpu", f"--data-dir={data_dir}", "--limit=12", *map(str, arguments)]
    return ast_seg.main(arguments)


def test_several_models_are_compared_in_one_table_with_mean_and_deviation(two_runs, data_dir, capsys):
    """In their own folders, whatever they hold beside the model, which stays as it is."""
    before = [contents(folder) for folder in two_runs]
    assert evaluate(data_dir, "--model", *two_runs, "--foreground") == 0
    rows = table_rows(capsys.readouterr().out)
    results = [json.loads((folder / "results.json").read_text()) for folder in two_runs]
    names = [*ast_seg.METRICS, "MSE"]
    assert rows["on"] == ["shapes", *names]
    for folder, result in zip(two_runs, results):
        assert rows[str(folder)] == [f"{result[name]:.2f}" for name in names]
    a, b = ([result[name] for name in names] for result in results)
    assert a != b
    assert rows["mean"] == [f"{(x + y) / 2:.2f}±{abs(x - y) / math.sqrt(2):.2f}" for x, y in zip(a, b)]
    for folder, old in zip(two_runs, before):
        new = contents(folder)
        kept = [name for name in old if name.startswith(("log", "check", "model", "config", "frames"))]
        assert kept and all(new[name] == old[name] for name in kept)
    assert results[0]["trained"]["t"] == 19 and results[1]["trained"] is None
    assert not (two_runs[1] / "training.gif").exists() and (two_runs[1] / "segmentations.png").exists()


@pytest.mark.parametrize("more, folder, facts", [
    (("--split=val",), "shapes-val-12", ["shapes", "val", 12]),
    (("--limit=0", "--split=val"), "shapes-val", ["shapes", "val", 320]),
    (("--limit=5",), "shapes-test-5", ["shapes", "test", 5]),
    (("--dataset=tm_dsprites",), "tm_dsprites-test-12", ["tm_dsprites", "test", 12])], ids=str)
def test_another_set_or_a_quick_look_goes_to_a_folder_of_its_own(
        more, folder, facts, two_runs, data_dir, capsys):
    run, before = two_runs[0], contents(two_runs[0])
    assert evaluate(data_dir, "--model", run, *more) == 0
    assert "IoU" not in capsys.readouterr().out.replace("mIoU", "")  # it takes --foreground
    after = contents(run)
    assert {name: after[name] for name in before} == before
    new = {name for name in after.keys() - before.keys()}
    assert new >= {f"{folder}/{name}" for name in ("results.json", "scores.npz", "segmentations.png")}
    assert all(name.startswith(folder + "/") for name in new)
    results = json.loads((run / folder / "results.json").read_text())
    scores = np.load(run / folder / "scores.npz")
    assert [results[name] for name in ("dataset", "split", "images")] == facts
    for name in (*ast_seg.METRICS, "MSE"):
        assert scores[name].shape == (facts[2],) and results[name] == scores[name].mean()


def test_a_model_of_the_hub_is_scored_into_a_folder_under_runs(tmp_path, data_dir, monkeypatch):
    model = many_labels()
    monkeypatch.setattr(ast_seg.ASTSeg, "from_pretrained",
                        lambda name, strict: {"somebody/some-model": model}[name])
    monkeypatch.chdir(tmp_path)
    assert evaluate(data_dir, "--model", "somebody/some-model", "--dataset=shapes") == 0
    folder = "runs/somebody/some-model/"
    assert {folder + "results.json", folder + "scores.npz"} <= contents(tmp_path).keys()
    assert all(name.startswith(folder) for name in contents(tmp_path))


def test_where_there_are_no_labels_the_table_has_the_squared_error_alone(capsys):
    ast_seg.print_table("folder", {"a": {"MSE": 1.0}, "b": {"MSE": 3.0}}, False)
    rows = table_rows(capsys.readouterr().out)
    assert (rows["a"], rows["b"], rows["mean"]) == (
        ["-", "-", "-", "1.00"], ["-", "-", "-", "3.00"], ["-", "-", "-", "2.00±1.41"])


@pytest.mark.parametrize("log", [[], [{"t": 5, "background": 0.1}]], ids=["nothing logged", "phase 1 alone"])
def test_curves_of_a_run_that_has_just_begun(log, tmp_path):
    ast_seg.plot_curves(log, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 200


def test_the_table_has_the_numbers_of_the_paper_beside_ours(capsys):
    ast_seg.print_table("clevr", {"ours": {"mIoU": 1.0, "ARI-FG": 2.0, "MSC-FG": 3.0, "MSE": 4.0}}, False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["on", "clevr", "mIoU", "ARI-FG", "MSC-FG", "MSE"], ["ours", "1.00", "2.00", "3.00", "4.00"],
        ["paper,", "B3-BT", "71.92±32.94", "76.05±36.13", "-", "51±63"],
        ["paper,", "B3-CT", "90.27±0.20", "98.26±0.07", "-", "16±1"]]


def refused(capsys, folder, *more, run=None):
    """The command says no: exit code 2 and one line for the user. Returns the line."""
    capsys.readouterr()
    assert (run or partial(command, folder))(*more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "batch/s]" not in line]  # progress bars
    assert len(lines) == 1 and lines[0].startswith("ast_seg.py: ")
    return lines[0]


def offline(monkeypatch):
    def no_network(*_, **__):
        raise OSError("there is no network")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's library would try again for long


@pytest.mark.parametrize("what", [
    "no folder", "a hub name", "an empty folder", "a foreign folder", "a cut model", "foreign settings",
    "foreign weights", "a part of the weights"])
@pytest.mark.parametrize("task", ["--eval", "--segment"])
def test_what_is_no_model_is_refused_in_one_sentence(what, task, tmp_path, data_dir, capsys, monkeypatch):
    offline(monkeypatch)
    source = tmp_path / "runs" / "a"
    if what == "a hub name":
        source = "nobody/ast-seg-nothing"
    elif what != "no folder":
        (source / "model").mkdir(parents=True)
    if what == "a foreign folder":
        (source / "model/config.json").write_text('{"architectures": ["BertModel"]}')
    if what in ("a cut model", "foreign settings", "foreign weights"):
        many_labels().save_pretrained(source / "model")
        file = source / "model" / ("config.json" if what == "foreign settings" else "model.safetensors")
        file.write_bytes(file.read_bytes()[:1000] if what == "a cut model" else b"{}")
    if what == "a part of the weights":  # the rest would be random
        many_labels().save_pretrained(source / "model")
        file = source / "model/model.safetensors"
        weights = safetensors.torch.load_file(file)
        kept = {k: v for k, v in weights.items() if not k.startswith("glimpse_generator")}
        assert len(kept) < len(weights)
        safetensors.torch.save_file(kept, file)
    if what == "foreign weights":
        ast_seg.ASTSeg(tiny(slots=5)).save_pretrained(tmp_path / "five")
        file.write_bytes((tmp_path / "five/model.safetensors").read_bytes())
    before = contents(tmp_path)
    if task == "--segment":
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
        run = partial(segment, tmp_path / "out", tmp_path / "a.png", model=source)
    else:
        run = partial(evaluate, data_dir, "--model", source)
    line = refused(capsys, None, run=run)
    assert str(source) in line and "--model" in line and line.endswith(".")
    (tmp_path / "a.png").unlink(missing_ok=True)
    assert contents(tmp_path) == before


# --- Images of one's own ---
def segment(folder, *paths, model):
    arguments = ["--device=cpu", "--segment", *map(str, paths), "--model", str(model), "--out", str(folder)]
    return ast_seg.main(arguments)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, scenes):
    """Images of many sizes and modes; the first is a scene as the model knows it."""
    folder = tmp_path_factory.mktemp("photos")
    scene = Image.fromarray(scenes["test"].images[0].transpose(1, 2, 0))
    scene.save(folder / "scene.png")
    for name, size, mode in (("wide.jpg", (200, 80), "RGB"), ("tall.png", (50, 131), "RGBA"),
                             ("grey.png", (64, 64), "L"), ("palette.png", (33, 40), "P"),
                             ("deeper/large.webp", (1024, 600), "RGB"), ("line.png", (1300, 1), "RGB")):
        (folder / name).parent.mkdir(exist_ok=True)
        scene.resize(size).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def segmented(photos, tmp_path_factory):
    """(a model of many labels, what --segment makes of the photos, objects.json)."""
    torch.manual_seed(0)
    model, out = many_labels(), tmp_path_factory.mktemp("segmented")
    model.save_pretrained(out / "model")
    assert segment(out / "out", photos, model=out / "model") == 0
    return model, out / "out", json.loads((out / "out/objects.json").read_text())


def labels_and_overlay(out, file):
    stem = file.as_posix().replace("_", "__").replace("/", "_")
    return Image.open(out / f"{stem}_labels.png"), Image.open(out / f"{stem}_overlay.png")


def test_each_image_gets_labels_and_an_overlay_of_its_own_size(photos, segmented):
    _, out, found = segmented
    files = [file for file in sorted(photos.rglob("*")) if file.suffix in data.SUFFIXES]
    assert sorted(found) == [file.as_posix() for file in files] and len(files) == 7
    assert len(list(out.iterdir())) == 2 * 7 + 1
    for file in files:
        image = Image.open(file)
        labels, overlay = labels_and_overlay(out, file)
        assert labels.mode == "P" and overlay.mode == "RGB" and labels.size == overlay.size == image.size
        colours = np.asarray(labels.convert("RGB"))[np.asarray(labels) > 0]
        assert colours.size == 0 or colours.any(1).all()  # no object is black
        if image.mode == "RGB" and file.suffix == ".png":
            same = (np.asarray(image) == np.asarray(overlay)).all(2)
            assert same[np.asarray(labels) == 0].all()  # the background is left as it is


def test_objects_json_counts_what_lies_in_the_labels(photos, segmented):
    """Area and box, in the image's own pixels; a box ends one pixel after its last one."""
    model, out, found = segmented
    several = 0
    for name, objects in found.items():
        labels = np.asarray(labels_and_overlay(out, Path(name))[0])
        h, w = labels.shape
        assert [o["label"] for o in objects] == sorted(set(labels[labels > 0].tolist()))
        several += len(objects) > 1
        for o in objects:
            cells = [(i, j) for i, j in np.ndindex(h, w) if labels[i, j] == o["label"]]
            rows, columns = zip(*cells)
            assert o["area"] == len(cells)
            assert o["box"] == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
            assert 0 <= o["x"] <= w and 0 <= o["y"] <= h and o["alpha"] > 0
            assert all(model.settings.s_min <= s <= model.settings.s_max for s in o["s"])
    assert several > 2


def test_an_image_of_the_models_own_size_is_segmented_as_by_the_model(photos, segmented):
    model, out, found = segmented
    file = photos / "scene.png"
    image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    labels = torch.from_numpy(np.array(labels_and_overlay(out, file)[0])).long()
    assert len(labels.unique()) > 2 and torch.equal(labels, model.segment(image)[0])
    latents = model.encode(image)
    for o in found[file.as_posix()]:
        k = o["label"] - 1
        close(torch.tensor([o["x"], o["y"], o["alpha"]]), [  # pixel edges, not centres: x = -1 is 0
            (latents.x[0, k].item() + 1) * 32, (latents.y[0, k].item() + 1) * 32,
            latents.log_alpha[0, k].exp().item()])


def test_the_labels_of_a_large_image_are_those_of_a_smaller_one_enlarged_and_never_mixed(photos, segmented):
    """Beyond 512 pixels: each label of a drawing of 300 x 512 pixels is repeated in 2 x 2 pixels."""
    labels = np.asarray(labels_and_overlay(segmented[1], photos / "deeper/large.webp")[0])
    assert len(np.unique(labels)) > 1
    assert np.array_equal(labels, np.kron(labels[::2, ::2], np.ones((2, 2), np.uint8)))


def test_segmenting_alone_or_among_others_is_the_same(photos, segmented, tmp_path):
    model, out, found = segmented
    file = photos / "wide.jpg"
    assert segment(tmp_path, file, model=out.parent / "model") == 0
    for one, other in zip(labels_and_overlay(out, file), labels_and_overlay(tmp_path, file)):
        assert (np.asarray(one) != np.asarray(other)).mean() < 0.01  # sums of a batch may round otherwise
    assert [o["label"] for o in json.loads((tmp_path / "objects.json").read_text())[file.as_posix()]] == [
        o["label"] for o in found[file.as_posix()]]


def test_no_two_images_share_their_labels(photos, segmented, tmp_path):
    """Though a / becomes a _ in their names."""
    (tmp_path / "in/a").mkdir(parents=True)
    for name in ("a/b.png", "a_b.png", "a__b.png", "a.png"):
        Image.open(photos / "scene.png").save(tmp_path / "in" / name)
    assert segment(tmp_path / "out", tmp_path / "in", model=segmented[1].parent / "model") == 0
    assert len(list((tmp_path / "out").iterdir())) == 2 * 4 + 1


def test_every_label_has_a_colour_and_only_the_background_is_black():
    assert ast_seg.PALETTE.shape == (256, 3) and (ast_seg.PALETTE.any(1) == (np.arange(256) > 0)).all()
    assert len(np.unique(ast_seg.PALETTE[:20], axis=0)) == 20


@pytest.mark.parametrize("what", ["missing", "empty folder", "folder of texts", "text", "cut", "no image"])
def test_what_is_no_image_is_refused_in_one_sentence(what, photos, segmented, tmp_path, capsys):
    path = tmp_path / "a.png"
    if what in ("empty folder", "folder of texts"):
        path.mkdir()
        if what == "folder of texts":
            (path / "a.txt").write_text("text")
    elif what != "missing":
        whole = (photos / "scene.png").read_bytes()
        path.write_bytes({"text": b"text", "cut": whole[:len(whole) // 2]}.get(what, b""))
    run = partial(segment, tmp_path / "out", path, model=segmented[1].parent / "model")
    line = refused(capsys, None, run=run)
    assert str(path) in line and line.endswith(".")
    assert not (tmp_path / "out/objects.json").exists()


# --- What is refused ---
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
    assert "checkpoint.pt is damaged or foreign" in refused(capsys, folder)


def test_there_must_be_something_to_evaluate(tmp_path, capsys, monkeypatch):
    """And this is found out before anything is downloaded or decoded."""
    offline(monkeypatch)
    assert "There is no model in" in refused(capsys, tmp_path / "run", "--eval")
    assert not list(tmp_path.iterdir())


def test_impossible_settings_and_devices_are_refused_before_anything_is_written(tmp_path, capsys):
    assert "--d-t" in refused(capsys, tmp_path / "run", "--d-t=60")
    for device in ("toaster", "hpu", "meta", "cuda:77"):
        assert "--device" in refused(capsys, tmp_path / "run", f"--device={device}")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_evaluation_at_once_too(finished, monkeypatch, capsys):
    def evaluate(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        pytest.fail("Ctrl-C went unheard during the evaluation")
    monkeypatch.setattr(ast_seg, "evaluate", evaluate)
    assert command(finished[0]) == 130
    assert "goes on" in capsys.readouterr().err


# --- data.py: what is drawn, what is read, what is kept, what is refused ----------------------------
SHARED = Path(__file__).resolve().parent.parent / "shared"
RECORD_SETS = ("clevr", "objects_room", "multi_dsprites", "tetrominoes")
PAIR_SETS = ("clevrtex", "camo", "ood", "shapestacks", "folder")
HERE = Path(data.__file__).parent


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
            ones = np.ones(values.size, np.uint8)
            content = field(1, np.stack([10 * ones, ones, values.ravel()], 1).tobytes())
        else:
            content = field(2, field(1, values.astype("<f4").tobytes()))
        entries.append(field(1, field(1, name.encode()) + field(2, content)))
    return field(1, b"".join(entries))


def record(payload):
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", data.masked_crc(part)) for part in (length, payload)]
    return length + checksums[0] + payload + checksums[1]


def write_records(path, payloads, packed=True):
    content = b"".join(map(record, payloads))
    path.write_bytes(gzip.compress(content, 1) if packed else content)


def random_scene(dataset, rng, objects=None):
    """image, labels as the loader should give them before the crop, and the Example that holds them."""
    height, width = dataset.source
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    index = rng.integers(0, dataset.masks, (height, width))
    masks = np.where(np.arange(dataset.masks)[:, None, None] == index, 255, 0).astype(np.uint8)
    visible = np.arange(dataset.masks) <= (dataset.masks - 1 if objects is None else objects)
    features = {"image": image, "mask": np.moveaxis(masks, 0, dataset.mask_axis),
                "x": np.zeros(11, np.float32), "visibility": visible.astype(np.float32)}
    labels = np.maximum(index - dataset.background_masks + 1, 0).astype(np.uint8)
    return image, labels, example(features, list(rng.permutation(list(features))))


def write_pairs(name, root, count, rng, side=None):
    """`count` scenes of a set of image files under `root`, two views a scenario in ShapeStacks.
    Returns {image file: (image, labels, label file)} in the order of the set's splits."""
    dataset, truth = data.DATASETS[name], {}
    height, width = (side, side) if side else dataset.source or (20, 30)
    stacks, lists = root / "shapestacks", {"test": [], "eval": [], "train": []}
    for i in range(count):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        labels = rng.integers(0, 6, (height, width)).astype(np.uint8)
        if name == "folder":
            folder = root / f"sub{i % 2}"
            file, label_file = folder / f"photo{i}.png", folder / f"photo{i}_mask.png"
        elif name == "shapestacks":
            env, camera = f"env-{i // 2}", f"cam_{i % 2 + 1}-mono-0"
            lists["test" if i < 2 else "eval" if i < 4 else "train"].append(env)
            file = stacks / "recordings" / env / f"rgb-w=1-f=0-l=2-c=unique-{camera}.png"
            label_file = stacks / "iseg" / env / f"iseg-w=0-f=0-l=0-c=original-{camera}.map"
        else:
            folder = root / dataset.path / str(i // 5)
            file, label_file = folder / f"CLEVRTEX_{i:06}.png", folder / f"CLEVRTEX_{i:06}_flat.png"
        for path in (file, label_file):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGBA" if dataset.url else "RGB").save(file)
        if name == "shapestacks":
            Image.fromarray(np.stack([labels * 32, labels, labels], 2)).save(label_file, "PNG")
        else:
            indices = Image.fromarray(labels)
            indices.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
            indices.save(label_file)
        truth[file] = image, labels, label_file
    if name == "shapestacks":
        (stacks / "splits/default").mkdir(parents=True)
        for split, scenarios in lists.items():
            (stacks / f"splits/default/{split}.txt").write_text("\n".join(dict.fromkeys(scenarios)) + "\n")
    return truth


def fitted(pixels, crop, size):
    """Centre square and Pillow's resize, bilinear for images and nearest for labels."""
    height, width = pixels.shape[:2]
    crop = crop or min(height, width)
    left, top = (width - crop) // 2, (height - crop) // 2
    how = Image.BILINEAR if pixels.ndim == 3 else Image.NEAREST
    out = Image.fromarray(pixels).crop((left, top, left + crop, top + crop)).resize((size, size), how)
    return np.asarray(out).transpose(2, 0, 1) if pixels.ndim == 3 else np.asarray(out)


def assert_scenes(dataset, images, labels, truth):
    """Exactly these scenes in this order. truth: pairs of image and labels before crop and resize."""
    for image, label, scene in zip(images, labels, truth, strict=True):
        assert np.array_equal(image, fitted(scene[0], dataset.crop, dataset.size))
        assert np.array_equal(label, fitted(scene[1], dataset.crop, dataset.size))


def all_splits(name, root, **options):
    """Images and labels of all scenes in the order test, val, train."""
    parts = [data.load(name, split, root, **options) for split in data.SPLITS[:1 if name == "ood" else 3]]
    return np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])


# The import of torch takes other processes two seconds, and what they do here does not need it.
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys\nimport data, os\nfrom dataclasses import replace\n"


def caches(root, kind="npy"):
    return sorted((Path(root) / ".cache").glob(f"*.{kind}"))


# --- Drawn sets ---
def test_a_scene_of_shapes_depends_on_split_and_number_alone(tmp_path):
    first = data.load("shapes", "test", tmp_path / "a", limit=12)
    again = data.load("shapes", "test", tmp_path / "b", limit=40)
    assert np.array_equal(first.images, again.images[:12]) and np.array_equal(first.labels, again.labels[:12])
    scenes = [data.load("shapes", split, tmp_path / "a", limit=40).images for split in data.SPLITS]
    assert len({image.tobytes() for part in scenes for image in part}) == 120


def test_shapes_are_two_to_four_objects_on_a_smooth_background(tmp_path):
    scenes = data.load("shapes", "val", tmp_path)
    assert scenes.images.shape == (320, 3, 64, 64) and scenes.images.dtype == np.uint8 and scenes.labelled
    counts = np.array([len(np.unique(labels)) - 1 for labels in scenes.labels])
    assert set(counts) == {2, 3, 4} and np.bincount(counts)[2:].min() > 70
    image, labels = scenes.images[0].astype(int), scenes.labels[0]
    background = (labels == 0) & (np.roll(labels, 1, 1) == 0)
    background[:, 0] = False
    edges = np.abs(image - np.roll(image, 1, 2)).max(0)
    assert np.median(edges[background]) <= 2
    backdrop = [np.median(i[:, label == 0], axis=1) for i, label in zip(scenes.images, scenes.labels)]
    assert np.std(backdrop, axis=0).min() > 10, "the background varies from scene to scene"


@pytest.mark.parametrize("kind, area", [
    (data.DISC, np.pi * 0.9**2), (data.TRIANGLE, 3 * np.sqrt(3) / 4 * 1.1**2), (data.SQUARE, 2 * 1.1**2)])
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
def test_every_set_of_the_issue_is_there_under_its_public_name():
    paths = dict(
        clevr="clevr_with_masks_train.tfrecords", clevr6="clevr_with_masks_train.tfrecords",
        clevrtex="clevrtex_full", camo="clevrtex_camo", ood="clevrtex_outd",
        objects_room="objects_room_train.tfrecords", shapestacks="shapestacks",
        multi_dsprites="multi_dsprites_colored_on_colored.tfrecords",
        tetrominoes="tetrominoes_train.tfrecords", tm_dsprites="", shapes="", folder="")
    assert {name: dataset.path for name, dataset in data.DATASETS.items()} == paths


@pytest.mark.parametrize("name, total, test, val, train", [
    ("clevr", 70_000, 10_000, 10_000, 50_000), ("clevr6", 70_000, 10_000, 10_000, 50_000),
    ("multi_dsprites", 60_000, 10_000, 10_000, 40_000), ("tetrominoes", 60_000, 10_000, 10_000, 40_000),
    ("objects_room", 1_000_000, 10_000, 10_000, 980_000), ("clevrtex", 50_000, 5_000, 5_000, 40_000),
    ("camo", 20_000, 2_000, 2_000, 16_000), ("ood", 10_000, 10_000, 0, 0), ("folder", 763, 76, 76, 611),
    ("clevr", 763, 109, 109, 545)])
def test_published_splits_lie_one_after_the_other_from_the_start(name, total, test, val, train):
    parts = data.split_bounds(total, data.DATASETS[name].splits)
    assert parts == {"test": range(test), "val": range(test, test + val), "train": range(test + val, total)}
    assert train == total - test - val


@pytest.mark.parametrize("name", ["clevr", "objects_room", "clevrtex", "ood"])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 20, 763, 69_999])
def test_splits_of_fewer_scenes_are_disjoint_complete_and_in_proportion(name, total):
    published = data.DATASETS[name].splits
    parts = data.split_bounds(total, published)
    assert list(itertools.chain(*parts.values())) == list(range(total))
    for part, share in zip(parts.values(), published):
        assert abs(len(part) - total * share / sum(published)) <= 2
        assert len(part) > 0 or share == 0 or total < 3


# --- Round trips ---
def test_crc_against_its_definition():
    def crc32c(message):
        register = 0xFFFFFFFF
        for byte in message:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    def masked(crc):
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert crc32c(b"123456789") == 0xE3069283  # the published check value of CRC-32C
    rng = np.random.default_rng(0)
    for length in (4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 4096, 5000):
        message = rng.bytes(length)
        assert data.masked_crc(message) == masked(crc32c(message))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", RECORD_SETS)
def test_records_come_back_exactly(tmp_path, name, packed):
    dataset, rng = data.DATASETS[name], np.random.default_rng(1)
    scenes = [random_scene(dataset, rng) for _ in range(4 if name == "clevr" else 12)]
    write_records(tmp_path / dataset.path, [payload for *_, payload in scenes], packed)
    assert_scenes(dataset, *all_splits(name, tmp_path), scenes)


@pytest.mark.parametrize("name", PAIR_SETS[:-1])
def test_image_files_come_back_exactly_in_the_order_of_their_numbers(tmp_path, name):
    truth = write_pairs(name, tmp_path, 12, np.random.default_rng(4))
    assert_scenes(data.DATASETS[name], *all_splits(name, tmp_path), truth.values())
    if name != "ood":
        sizes = [len(data.load(name, split, tmp_path)) for split in data.SPLITS]
        assert sizes == ([2, 2, 8] if name == "shapestacks" else [1, 1, 10])


@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="needs ../shared/formats")
@pytest.mark.parametrize("name", RECORD_SETS + PAIR_SETS[:-1])
def test_files_of_the_public_formats_come_back_exactly(name, tmp_path):
    dataset, formats = data.DATASETS[name], SHARED / "formats"
    (tmp_path / dataset.path).symlink_to(formats / dataset.path)  # found under its public name
    order, truth = range(20), np.load(formats / f"{Path(dataset.path).stem}.truth.npz")
    if name == "shapestacks":
        lists = [formats / f"shapestacks/splits/default/{split}.txt" for split in ("test", "eval", "train")]
        order = [int(scenario.split("v=")[-1]) for file in lists for scenario in file.read_text().split()]
    labels = np.maximum(truth["labels"].astype(int) - dataset.background_masks + 1, 0).astype(np.uint8)
    scenes = [(truth["images"][i], labels[i]) for i in order]
    assert_scenes(dataset, *all_splits(name, tmp_path), scenes)
    if name == "clevr":  # its first scenes as a plain file
        (tmp_path / dataset.path).unlink()
        (tmp_path / dataset.path).symlink_to(formats / "clevr_with_masks_train.uncompressed.tfrecords")
        for split, scene in zip(data.SPLITS[:2], scenes):
            loaded = data.load(name, split, tmp_path)
            assert_scenes(dataset, loaded.images, loaded.labels, [scene])


def test_where_masks_overlap_the_first_wins_and_uncovered_pixels_are_background():
    dataset = replace(data.DATASETS["tetrominoes"], source=(4, 4), masks=3)
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, 0], masks[1, :2], masks[2, :3] = 255, 255, 255
    payload = example({"mask": masks, "image": np.zeros((4, 4, 3), np.uint8)})
    labels = data.decode_record(dataset, payload)[1]
    assert labels[:, 0].tolist() == [0, 1, 2, 0]


def tiny_clevr(monkeypatch, name="clevr", **changes):
    """CLEVR's layout at 12x16 pixels, for what needs many scenes."""
    dataset = replace(data.DATASETS[name], source=(12, 16), crop=10, size=8, **changes)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    return dataset


def test_clevr6_keeps_scenes_of_at_most_six_objects_within_the_splits_of_clevr(tmp_path, monkeypatch):
    dataset, rng = tiny_clevr(monkeypatch, "clevr6"), np.random.default_rng(2)
    objects = [3, 7, 6, 10, 5, 6, 8, 7, 3, 10, 4, 9, 6, 6]  # 14 scenes: test 0-1, val 2-3, train 4-13
    scenes = [random_scene(dataset, rng, count) for count in objects]
    write_records(tmp_path / dataset.path, [payload for *_, payload in scenes])
    for split, expected in (("test", [0]), ("val", [2]), ("train", [4, 5, 8, 10, 12, 13])):
        loaded = data.load("clevr6", split, tmp_path)
        assert_scenes(dataset, loaded.images, loaded.labels, [scenes[i] for i in expected])
    assert data.load("clevr6", "train", tmp_path, limit=3).labels.tolist() == loaded.labels[:3].tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_limit_gives_the_first_scenes_of_the_split_and_decodes_no_others(tmp_path, monkeypatch, packed):
    dataset, rng = tiny_clevr(monkeypatch), np.random.default_rng(3)
    write_records(tmp_path / dataset.path, [random_scene(dataset, rng)[2] for _ in range(21)], packed)
    whole = {split: data.load("clevr", split, tmp_path) for split in data.SPLITS}
    for split, limit in itertools.product(data.SPLITS, (1, 2, 100)):
        part = data.load("clevr", split, tmp_path, limit=limit)
        assert np.array_equal(part.images, whole[split].images[:limit])
        assert np.array_equal(part.labels, whole[split].labels[:limit])
    calls, original = [], data.decode_record
    monkeypatch.setattr(data, "decode_record", lambda *a: calls.append(a) or original(*a))
    data.load("clevr", "val", tmp_path, limit=2, size=4)
    assert len(calls) <= 3  # of the three in this split


@pytest.mark.parametrize("nothing", [0, None])
def test_no_limit_and_no_size_mean_all_scenes_in_the_size_of_the_set(tmp_path, nothing):
    write_pairs("camo", tmp_path, 10, np.random.default_rng(0))
    usual = data.load("camo", "train", tmp_path)
    scenes = data.load("camo", "train", tmp_path, nothing, nothing)
    assert len(usual) == 8 and np.array_equal(scenes.images, usual.images)
    assert np.array_equal(scenes.labels, usual.labels) and len(caches(tmp_path)) == 1


def test_limit_reads_few_more_images_than_asked(tmp_path, monkeypatch):
    truth = write_pairs("folder", tmp_path, 60, np.random.default_rng(0), side=8)
    whole, calls, original = data.load("folder", "train", tmp_path), [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    part = data.load("folder", "train", tmp_path, limit=5)
    assert np.array_equal(part.images, whole.images[:5]) and np.array_equal(part.labels, whole.labels[:5])
    assert len(set(calls) & set(truth)) <= 5 + 8  # eight are read ahead


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("limit", [None, 10])
def test_scenes_beyond_the_published_ones_stay_out(tmp_path, monkeypatch, packed, limit):
    dataset, rng = tiny_clevr(monkeypatch, splits=(2, 2, 3)), np.random.default_rng(4)
    scenes = [random_scene(dataset, rng) for _ in range(10)]
    write_records(tmp_path / dataset.path, [payload for *_, payload in scenes], packed)
    assert_scenes(dataset, *all_splits("clevr", tmp_path, limit=limit), scenes[:7])


def test_of_the_whole_public_file_a_limited_load_reads_only_the_start(tmp_path, monkeypatch):
    """Its size tells that it is whole, so nothing has to be counted: the cut end goes unseen."""
    dataset, rng = tiny_clevr(monkeypatch, splits=(2, 2, 3), gigabytes=1e-6), np.random.default_rng(4)
    scenes, path = [random_scene(dataset, rng) for _ in range(10)], tmp_path / dataset.path
    path.write_bytes(gzip.compress(b"".join(record(payload) for *_, payload in scenes), 1)[:-2000])
    loaded = data.load("clevr", "val", tmp_path, limit=1)
    assert_scenes(dataset, loaded.images, loaded.labels, scenes[2:3])
    data_refused("clevr", tmp_path, str(path), "record")
    stored = gzip.compress(b"".join(record(payload) for *_, payload in scenes), 0)
    for at in range(3):  # two tags and a pixel of record 2, of which the end of the gzip would tell
        path.write_bytes(flip(stored, len(stored) // 4 + at))
        data_refused("clevr", tmp_path, str(path), "record 2", split="val", limit=1)


def test_another_size_is_a_pillow_resize(tmp_path):
    own, small = (data.load("shapes", "test", tmp_path, limit=3, size=size) for size in (None, 48))
    assert small.images.shape == (3, 3, 48, 48) and small.labels.shape == (3, 48, 48)
    for image, resized in zip(own.images, small.images):
        assert np.array_equal(fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), 0, 48), resized)


# --- The user's own images ---
def save_as(path, mode, grey):
    """Grey values (h, w) in 0..255 as an image of some mode. Returns the RGB that should come back."""
    rgb, image = np.stack([grey] * 3, 2), Image.fromarray(grey)
    if mode == "RGBA":  # colours that the transparency must not change
        rgb = np.stack([grey, grey[::-1], 255 - grey], 2)
        image = Image.fromarray(np.concatenate([rgb, grey.T.reshape(*grey.shape, 1)], 2))
    elif mode.startswith("I"):  # 16 bits: whatever is nearest to this grey
        wide = grey.astype(int) * 257 + np.arange(grey.size).reshape(grey.shape) % 257 - 128
        wide = wide.clip(0, 65535).astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
        image = Image.frombytes(mode, grey.T.shape, wide.tobytes())
    elif mode == "P":
        image = Image.fromarray(255 - grey)
        image.putpalette([255 - value for value in range(256) for _ in range(3)])
    elif mode == "1":
        rgb = np.where(rgb > 127, 255, 0).astype(np.uint8)
        image = Image.fromarray(rgb[..., 0]).convert("1")
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    elif mode != "L":
        image = Image.fromarray(rgb).convert(mode)
    image.save(path)
    return rgb


@pytest.mark.parametrize("mode, kind", [
    *((mode, "png") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *((mode, "tiff") for mode in ("RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F", "LAB", "YCbCr")),
    ("RGB", "bmp"), ("RGB", "TIF"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "JPG"), ("CMYK", "jpeg")])
def test_images_of_any_mode_and_format(tmp_path, mode, kind):
    grey = np.linspace(0, 255, 24 * 16).astype(np.uint8).reshape(16, 24)
    options = dict(lossless=True, exact=True) if (mode, kind) == ("RGBA", "webp") else {}
    expected = save_as(tmp_path / f"only.{kind}", mode, grey)
    if options:
        Image.fromarray(np.dstack([expected, grey])).save(tmp_path / f"only.{kind}", **options)
    loaded = data.load("folder", "test", tmp_path, size=16)
    assert not loaded.labelled and not loaded.labels.any() and loaded.labels.shape == (1, 16, 16)
    lossy = 6 if kind in ("JPG", "jpeg", "webp") and not options else 2 if mode in ("LAB", "YCbCr") else 0
    assert np.abs(loaded.images[0].astype(int) - fitted(expected, 0, 16)).max() <= lossy


@pytest.mark.parametrize("height, width", [(20, 30), (31, 20), (1, 1), (5, 200), (128, 128), (301, 303)])
def test_images_of_any_size_keep_their_largest_centre_square(tmp_path, height, width):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    labels = rng.integers(0, 9, (height, width), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "a_mask.png")
    loaded = data.load("folder", "test", tmp_path)
    assert loaded.labelled
    assert_scenes(data.DATASETS["folder"], loaded.images, loaded.labels, [(image, labels)])


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_label_maps_are_grey_values_or_indices_of_a_palette(tmp_path, mode):
    labels = np.random.default_rng(0).integers(0, 2 if mode == "1" else 256, (8, 8)).astype(np.uint8)
    image = Image.fromarray(labels.astype({"I;16": np.uint16, "1": bool}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "a_mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a_mask.png") as saved:
        assert saved.mode == mode
    assert np.array_equal(data.load("folder", "test", tmp_path, size=8).labels[0], labels)  # more than K stay


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpg"])
def test_photos_are_turned_upright(tmp_path, kind):
    values = np.linspace(0, 255, 32 * 32 * 3).astype(np.uint8).reshape(32, 32, 3)
    image, exif = Image.fromarray(values).resize((16, 12)), Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image.save(tmp_path / f"photo.{kind}", exif=exif)
    upright = np.asarray(image.transpose(Image.ROTATE_270))
    found = data.load("folder", "test", tmp_path, size=12).images[0]
    assert np.abs(fitted(upright, 0, 12).astype(int) - found).max() <= (0 if kind in ("png", "tiff") else 8)


def test_folder_splits_are_disjoint_complete_and_stay_the_same(tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    truth = write_pairs("folder", first, 30, np.random.default_rng(6), side=8)
    parts = [data.load("folder", split, first, size=8) for split in data.SPLITS]
    assert [len(part) for part in parts] == [3, 3, 24]
    found = {tuple(map(np.ndarray.tobytes, pair)) for p in parts for pair in zip(p.images, p.labels)}
    assert found == {(fitted(image, 0, 8).tobytes(), labels.tobytes()) for image, labels, _ in truth.values()}
    for path in reversed(sorted(first.rglob("*.png"))):  # elsewhere, written at other times in another order
        (other / path.relative_to(first)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(first)).write_bytes(path.read_bytes())
    for split, part in zip(data.SPLITS, parts):
        assert np.array_equal(data.load("folder", split, other, size=8).images, part.images)


def test_names_of_equal_checksum_keep_their_order_whatever_order_the_disk_gives(tmp_path, monkeypatch):
    assert zlib.crc32(b"plumless.png") == zlib.crc32(b"buckeroo.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "plumless.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "buckeroo.png")
    original, first = Path.rglob, []
    for backwards in (False, True):
        monkeypatch.setattr(Path, "rglob", lambda *a: sorted(original(*a), reverse=backwards))
        first.append(data.load("folder", "test", tmp_path, size=4 + backwards).images[0, :, 0, 0].tolist())
    assert first[0] == first[1]


# --- The life of a cache ---
def tiny_file(tmp_path, monkeypatch, count=14, seed=7, packed=True):
    """A file of small scenes: of 14 two are test, two are val and ten are train."""
    dataset, rng = tiny_clevr(monkeypatch), np.random.default_rng(seed)
    write_records(tmp_path / dataset.path, [random_scene(dataset, rng)[2] for _ in range(count)], packed)
    return tmp_path / dataset.path


def test_a_cache_is_built_once_for_all_splits_and_reused(tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    first = all_splits("clevr", tmp_path)
    assert len(caches(tmp_path)) == 1 and isinstance(data.load("clevr", "val", tmp_path).images, np.memmap)
    monkeypatch.setattr(data, "decode_record", lambda *_: pytest.fail("decoded again"))
    assert all(map(np.array_equal, first, all_splits("clevr", tmp_path)))


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_cache_is_rebuilt_when_the_source_changes_and_the_old_one_goes(tmp_path, monkeypatch, change):
    path = tiny_file(tmp_path, monkeypatch, packed=False)
    before, facts = data.load("clevr", "test", tmp_path).images.copy(), path.stat()
    tiny_file(tmp_path, monkeypatch, count=15 if change == "size" else 14, seed=8, packed=False)
    assert (path.stat().st_size == facts.st_size) == (change == "time")
    os.utime(path, ns=(1, facts.st_mtime_ns + (change == "time")))
    after = data.load("clevr", "test", tmp_path).images
    assert not np.array_equal(before, after) and len(caches(tmp_path)) == 1


def test_a_changed_added_or_missing_image_is_noticed(tmp_path):
    truth = write_pairs("folder", tmp_path, 10, np.random.default_rng(0), side=8)
    sums = []
    for step in ("as it was", "changed", "labels changed", "added", "removed"):
        image, (_, _, labels) = list(truth.items())[0]
        if "changed" in step:
            changed = labels if "labels" in step else image
            Image.new("L" if "labels" in step else "RGB", (8, 8), 200).save(changed)
        elif step == "removed":
            image.unlink()
        elif step == "added":
            Image.new("RGB", (8, 8), "red").save(tmp_path / "new.png")
            Image.new("L", (8, 8), 3).save(tmp_path / "new_mask.png")
        images, labels = all_splits("folder", tmp_path, size=8)
        sums.append((len(images), int(images.sum()), int(labels.sum())))
        assert len(caches(tmp_path)) == 3
    assert len(set(sums)) == 5 and [count for count, *_ in sums] == [10, 10, 10, 11, 10]


@pytest.mark.parametrize("damage", ["empty", "cut in the header", "cut", "overwritten"])
def test_a_damaged_cache_is_named_and_rebuilt_once_the_user_removed_it(tmp_path, monkeypatch, damage):
    tiny_file(tmp_path, monkeypatch)
    expected = data.load("clevr", "train", tmp_path).images.copy()
    (cache,) = caches(tmp_path)
    whole = cache.read_bytes()
    cache.write_bytes({"empty": b"", "cut in the header": whole[:100], "cut": whole[:-100]}.get(
        damage, b"\x80\x04not a cache" + whole[13:]))
    with pytest.raises(data.DataError) as caught:
        data.load("clevr", "train", tmp_path)
    assert str(cache) in str(caught.value)
    cache.unlink()
    assert np.array_equal(data.load("clevr", "train", tmp_path).images, expected)


def test_an_interrupted_build_is_not_taken_for_whole_and_spares_finished_ones(tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    data.load("clevr", "test", tmp_path, limit=1)
    (finished,) = caches(tmp_path)
    before, original, calls = finished.read_bytes(), data.fit, itertools.count()

    def stop(*arguments):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return original(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(data, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            data.load("clevr", "train", tmp_path)
    assert caches(tmp_path) == [finished] and finished.read_bytes() == before
    assert len(data.load("clevr", "train", tmp_path)) == 10 and finished.read_bytes() == before
    assert caches(tmp_path, "part") == []


def test_a_build_that_is_killed_again_and_again_leaves_one_part_which_is_not_taken_for_whole(
        tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    script = (f"{WITHOUT_TORCH}original, calls = data.fit, iter(range(10 ** 6))\n"
              "data.DATASETS['clevr'] = replace(data.DATASETS['clevr'], source=(12, 16), crop=10, size=8)\n"
              "data.fit = lambda *a: os._exit(9) if next(calls) == int(sys.argv[2]) else original(*a)\n"
              "data.load('clevr', 'train', sys.argv[1])")
    killed = [subprocess.Popen([sys.executable, "-c", script, tmp_path, n], cwd=HERE) for n in ("3", "10")]
    assert [process.wait() for process in killed] == [9, 9]  # one waits for the lock of the other
    assert caches(tmp_path) == [] and len(caches(tmp_path, "part")) == 1
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert len(caches(tmp_path)) == 1 and caches(tmp_path, "part") == []


def run_twice(script, *arguments):
    """The same script in two processes that start together. Returns the last word that each prints."""
    both = [subprocess.Popen([sys.executable, "-c", WITHOUT_TORCH + script, *arguments], cwd=HERE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return [out.split()[-1] for out, _ in outputs]


def test_two_processes_that_start_together_do_not_harm_each_other(tmp_path):
    script = "print(data.load('shapes', 'test', sys.argv[1], limit=150).images.sum())"
    sums = run_twice(script, tmp_path)
    expected = data.load("shapes", "test", tmp_path, limit=150).images.sum()
    assert sums == [str(expected)] * 2 and len(caches(tmp_path)) == 1


def test_a_folder_that_may_not_be_written_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    folder, access = tmp_path / "source", os.access
    folder.mkdir()
    path = tiny_file(folder, monkeypatch)
    monkeypatch.setattr(os, "access", lambda where, *mode: Path(where) != folder and access(where, *mode))
    assert len(data.load("clevr", "train", folder)) == 10
    assert list(folder.iterdir()) == [path]  # to the superuser every folder is writable, so access is played
    assert len(list((tmp_path / "user/.cache/ast_seg").glob("clevr-*.npy"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    tiny_file(tmp_path, monkeypatch)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/clevr.part").symlink_to("/dev/full")
    data_refused("clevr", tmp_path, "clevr", "No space left")
    (tmp_path / ".cache/clevr.part").unlink()
    assert len(data.load("clevr", "train", tmp_path)) == 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_stays_below_500_megabytes_whatever_the_size_of_the_file(tmp_path):
    """0.6 GB of CLEVR's records, inflated, in 2 MB of gzip."""
    dataset = data.DATASETS["clevr"]
    masks, image = np.zeros((11, *dataset.source), np.uint8), np.zeros((*dataset.source, 3), np.uint8)
    member = gzip.compress(record(example({"image": image, "mask": masks})), 6)
    (tmp_path / dataset.path).write_bytes(member * 190)
    script = ("import data, sys\n"
              "assert len(data.load('clevr', 'train', sys.argv[1])) == 136\n"
              "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])")
    out = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=HERE, capture_output=True, text=True)
    assert int(out.stdout.split()[-1]) < 500e3, out  # kilobytes; ru_maxrss would count pytest's memory, too


# --- Bad input ---
def data_refused(name, root, *words, split="train", **options):
    """The DataError, one line that names all `words`; no cache stays behind."""
    before = caches(root)
    with pytest.raises(data.DataError) as caught:
        data.load(name, split, root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert caches(root) == before


def test_unknown_names_and_splits(tmp_path):
    data_refused("clever", tmp_path, "clever", "clevr", "shapes")
    data_refused("shapes", tmp_path, "training", "train", split="training")
    write_pairs("ood", tmp_path, 2, np.random.default_rng(0))
    data_refused("ood", tmp_path, "clevrtex_outd", "train")


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1:]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", [
    "cut", "flipped length", "2^60", "foreign", "empty", "no example", "no image", "no mask", "few values",
    "many values", "wide values", "empty record"])
def test_damaged_record_files(tmp_path, monkeypatch, case, packed, limit):
    path, rng = tiny_file(tmp_path, monkeypatch), np.random.default_rng(0)
    content = gzip.decompress(path.read_bytes())
    size = len(content) // 14
    features = {"image": rng.integers(0, 256, (12, 16, 3), np.uint8),
                "mask": rng.integers(0, 256, (11, 12, 16), np.uint8)}
    if case in ("few values", "many values"):
        features["image"] = np.resize(features["image"], (11 if case[0] == "f" else 13, 16, 3))
    elif case == "wide values":
        features["image"] = np.zeros((12, 16, 3), np.float32)
    elif case in ("no image", "no mask"):
        del features[case[3:]]
    length = struct.pack("<Q", 2**60)
    content = {
        "cut": content[:-size // 2], "flipped length": flip(content, 5 * size + 2),
        "2^60": content + length + struct.pack("<I", data.masked_crc(length)) + bytes(99),
        "foreign": b"name,value\n" * 1000, "empty": b"", "no example": record(b"\xff" * 500) * 14,
        "empty record": length[:4] * 2 + struct.pack("<I", data.masked_crc(bytes(8))) + bytes(4),
    }.get(case, record(example(features)) * 14)
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    began = time.perf_counter()
    data_refused("clevr", tmp_path, str(path), "record", limit=limit)
    assert time.perf_counter() - began < 1


def test_a_flipped_bit_anywhere_in_a_record_is_noticed(tmp_path, monkeypatch):
    dataset = replace(data.DATASETS["multi_dsprites"], source=(2, 2), crop=2, masks=2, size=2)
    monkeypatch.setitem(data.DATASETS, "multi_dsprites", dataset)
    path, rng = tmp_path / dataset.path, np.random.default_rng(0)
    write_records(path, [random_scene(dataset, rng)[2]], packed=False)
    whole = path.read_bytes()
    assert len(data.load("multi_dsprites", "test", tmp_path)) == 1
    caches(tmp_path)[0].unlink()
    for at in range(len(whole)):
        path.write_bytes(flip(whole, at))
        data_refused("multi_dsprites", tmp_path, str(path), "record 0", split="test")


@pytest.mark.parametrize("limit", [None, 2])
def test_a_flipped_bit_that_inflating_does_not_notice(tmp_path, monkeypatch, limit):
    path = tiny_file(tmp_path, monkeypatch, packed=False)
    stored = gzip.compress(path.read_bytes(), 0)
    path.write_bytes(flip(stored, len(stored) // 2))
    data_refused("clevr", tmp_path, str(path), "record", limit=limit)


@pytest.mark.parametrize("limit", [None, 2])
def test_a_truncated_gzip(tmp_path, monkeypatch, limit):
    path = tiny_file(tmp_path, monkeypatch)
    for missing in (1, 9, 20, 5000):
        path.write_bytes(path.read_bytes()[:-missing])
        data_refused("clevr", tmp_path, str(path), "record", limit=limit)


def test_a_length_that_never_ends_is_refused_at_once(tmp_path, monkeypatch):
    path = tiny_file(tmp_path, monkeypatch)
    write_records(path, [b"\n\x04mask\x12\x01\n" + b"\xff" * 300_000 + bytes(9999)])
    began = time.perf_counter()
    data_refused("clevr", tmp_path, str(path), "record 0", "mask")
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("name", PAIR_SETS)
@pytest.mark.parametrize("case", [
    "unreadable", "cut", "flipped", "of another size", "no labels", "unreadable labels", "flipped labels",
    "labels of another size"])
def test_bad_image_files(tmp_path, monkeypatch, name, case):
    dataset = data.DATASETS[name]
    splits = {"ood": (1, 0, 0), "folder": (0, 0, 1)}.get(name, dataset.splits)  # the victim is in `split`
    dataset = replace(dataset, source=(24, 30) if dataset.source else (), crop=20, splits=splits)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    truth = write_pairs(name, tmp_path, 10, np.random.default_rng(0))
    split, victims = "test" if name == "ood" else "train", list(truth)
    victim = victims[7] if "labels" not in case else truth[victims[7]][2]
    if case.startswith("unreadable"):
        victim.write_bytes(b"no picture")
    elif case == "cut":
        victim.write_bytes(victim.read_bytes()[:-200])
    elif case.startswith("flipped"):  # a pixel, which decodes as well as any other
        Image.open(victim).save(victim, "PNG", compress_level=0)
        content = victim.read_bytes()
        victim.write_bytes(flip(content, len(content) // 2))
    elif case == "no labels":
        victim.unlink()
    else:
        mode = "RGB" if victim.suffix == ".map" or "labels" not in case else "L"
        Image.new(mode, (7, 9)).save(victim, "PNG")
        if name == "folder" and "labels" not in case:  # any size goes; now its labels do not fit
            victim = truth[victim][2]
    data_refused(name, tmp_path, str(victim), split=split)


def test_missing_files_say_what_belongs_where(tmp_path):
    data_refused("folder", tmp_path, str(tmp_path))
    data_refused("folder", tmp_path / "nowhere", "nowhere")
    data_refused("shapestacks", tmp_path, "recordings", "shapestacks-file.robots.ox.ac.uk", "iseg")
    write_pairs("shapestacks", tmp_path, 6, np.random.default_rng(0))
    listing = tmp_path / "shapestacks/splits/default/eval.txt"
    for content in (b"env-1\nenv-77\n", b"env-1\nenv-\xff\xfe\n"):
        listing.write_bytes(content)  # a scenario that is not there
        data_refused("shapestacks", tmp_path, f"{tmp_path}/shapestacks/recordings/env-", split="val")
    listing.unlink()
    data_refused("shapestacks", tmp_path, "eval.txt", split="val")


def test_a_data_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    folders = tmp_path / "file", tmp_path / ("a" * 300)
    for name, folder in itertools.product(("clevr", "folder", "shapes"), folders):
        with pytest.raises(data.DataError) as caught:
            data.load(name, "test", folder)
        assert str(folder) in str(caught.value)


def test_label_maps_must_hold_labels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a_mask.png")
    data_refused("folder", tmp_path, "a_mask.png", split="test")
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a_mask.png")
    data_refused("folder", tmp_path, "a_mask.png", split="test")


# --- Fuzz: the right scenes or a DataError, nothing else, at once ---
FUZZ = int(os.environ.get("AST_SEG_FUZZ", 60))  # mutated files for each reader; 2000 take some minutes


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, length = rng.integers(max(len(content), 1)), rng.integers(1, 9)
        action = rng.integers(6)
        if action < 3 and content:
            content[at] ^= 1 << rng.integers(8)
        elif action == 3:
            content[at:at + length] = rng.bytes(length)
        elif action == 4:
            del content[at:at + length]
        else:
            del content[at:]
    return bytes(content)


def fuzz(monkeypatch, name, root, split, limit, victims, exact=True, valid=()):
    """Mutate one of the files `victims` at a time; contents in `valid` are left out. Not `exact`
    are formats without a checksum: a changed pixel cannot be told, but nothing may break."""
    monkeypatch.setattr(data, "tqdm", partial(data.tqdm, disable=True))
    rng, originals = np.random.default_rng(11), {victim: victim.read_bytes() for victim in victims}
    expected, outcomes = data.load(name, split, root, limit), {"right": 0, "refused": 0}
    expected = np.array(expected.images), np.array(expected.labels)
    for _ in range(FUZZ):
        victim = victims[rng.integers(len(victims))]
        mutated = mutate(originals[victim], rng)
        if mutated in valid:
            continue
        victim.write_bytes(mutated)
        for cache in caches(root):
            cache.unlink()
        began = time.process_time()
        try:
            found = data.load(name, split, root, limit)
        except data.DataError as error:
            assert str(root) in str(error) and "\n" not in str(error) and not caches(root)
            outcomes["refused"] += 1
        else:
            assert found.images.shape == expected[0].shape and found.labels.shape == expected[1].shape
            assert not exact or all(map(np.array_equal, (found.images, found.labels), expected))
            outcomes["right"] += 1
        assert time.process_time() - began < 1
        victim.write_bytes(originals[victim])
    print(name, split, limit, outcomes)
    assert outcomes["refused"] > (FUZZ // 4 if exact else 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, split, limit", [
    ("multi_dsprites", "train", None), ("multi_dsprites", "test", 1), ("multi_dsprites", "val", 2),
    ("clevr6", "train", 2)])
def test_fuzz_records(tmp_path, monkeypatch, name, split, limit, packed):
    dataset = replace(data.DATASETS[name], source=(5, 4), crop=4, masks=3, size=4)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    rng, path = np.random.default_rng(0), tmp_path / dataset.path
    payloads = [random_scene(dataset, rng)[2] for _ in range(5)]
    write_records(path, payloads, packed)
    shorter = [b"".join(map(record, payloads[:count])) for count in range(1, 5)]
    fuzz(monkeypatch, name, tmp_path, split, limit, [path], valid=shorter)


@pytest.mark.parametrize("name", ["clevrtex", "shapestacks", "folder"])
def test_fuzz_image_files(tmp_path, monkeypatch, name):
    dataset = replace(data.DATASETS[name], source=() if name == "folder" else (8, 8), crop=6, size=4)
    monkeypatch.setitem(data.DATASETS, name, replace(dataset, splits=(0, 0, 1)))
    truth = write_pairs(name, tmp_path, 6, np.random.default_rng(0), side=8)
    victims = [path for image, (_, _, labels) in list(truth.items())[-2:] for path in (image, labels)]
    fuzz(monkeypatch, name, tmp_path, "train", None, victims)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
@pytest.mark.parametrize("kind", ["jpg", "webp", "bmp", "tiff"])
def test_fuzz_photos(tmp_path, monkeypatch, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    image.save(tmp_path / f"a.{kind}")
    fuzz(monkeypatch, "folder", tmp_path, "test", None, [tmp_path / f"a.{kind}"], exact=False)


# --- Download ---
class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, {name: content}, with or without Range; cuts the first `cuts` replies; announces `lie`
    bytes more than there are, or the text `length`; says the size to who asks for more than that if
    `tells_size`; notes each request as (name, range)."""
    files, ranges, cuts, lie, length, tells_size, requests = {}, True, 0, 0, "", False, []

    def do_GET(self):
        server, wanted = type(self), self.headers.get("Range")
        name = self.path.rsplit("/", 1)[1]
        server.requests.append((name, wanted))
        if name not in server.files:
            return self.send_error(404)
        partial_content = bool(wanted and server.ranges)
        body = server.files[name][int(wanted.split("=")[1].split("-")[0]) if partial_content else 0:]
        if partial_content and not body:
            if not server.tells_size:
                return self.send_error(416)
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.files[name])}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if partial_content else 200)
        self.send_header("Content-Length", server.length or str(len(body) + server.lie))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            body = body[:len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture()
def serve(monkeypatch):
    """serve(name, files, ...) publishes the files of a set on this machine. Returns its handler."""
    servers = []

    def start_server(name, files, **behaviour):
        handler = type("Handler", (Server,), {"files": files, "requests": [], **behaviour})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/some/where"
        monkeypatch.setitem(data.DATASETS, name, replace(data.DATASETS[name], url=url))
        return handler
    yield start_server
    for server in servers:
        server.shutdown()
        server.server_close()


def tiny_download(tmp_path, monkeypatch, serve, **behaviour):
    path = tiny_file(tmp_path, monkeypatch)
    content = path.read_bytes()
    path.unlink()
    return serve("clevr", {path.name: content}, **behaviour), path, content


def test_a_download_says_its_size_first(tmp_path, monkeypatch, serve, capsys):
    server, path, content = tiny_download(tmp_path, monkeypatch, serve)
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and "GB" in capsys.readouterr().out.split("\n")[0]
    assert len(data.load("clevr", "test", tmp_path)) == 2 and len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_stopped(tmp_path, monkeypatch, serve, ranges):
    server, path, content = tiny_download(tmp_path, monkeypatch, serve, ranges=ranges)
    Path(f"{path}.part").write_bytes(content[:1000])
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and server.requests == [(path.name, "bytes=1000-")]
    assert not Path(f"{path}.part").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(tmp_path, monkeypatch, serve, ranges):
    server, path, content = tiny_download(tmp_path, monkeypatch, serve, cuts=2, ranges=ranges)
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and len(server.requests) == 3


def test_a_part_that_is_whole_needs_no_more_bytes(tmp_path, monkeypatch, serve):
    """A kill between the last byte and the renaming: the server has nothing to add, and says the size."""
    server, path, content = tiny_download(tmp_path, monkeypatch, serve, tells_size=True)
    Path(f"{path}.part").write_bytes(content)
    assert len(data.load("clevr", "train", tmp_path)) == 10
    assert path.read_bytes() == content and server.requests == [(path.name, f"bytes={len(content)}-")]
    assert not Path(f"{path}.part").exists()


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_part_longer_than_the_file_starts_anew(tmp_path, monkeypatch, serve, tells_size):
    _, path, content = tiny_download(tmp_path, monkeypatch, serve, tells_size=tells_size)
    Path(f"{path}.part").write_bytes(content + b"more")
    data.load("clevr", "train", tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("behaviour, word", [
    ({"files": {}}, "404"), ({"lie": 50}, "run again"), ({"cuts": 99, "ranges": False}, "broke off"),
    ({"length": "much"}, "much")],
    ids=["404", "fewer bytes than announced", "cut for ever", "a size that is no number"])
def test_a_download_that_cannot_end_well(tmp_path, monkeypatch, serve, behaviour, word):
    server, path, _ = tiny_download(tmp_path, monkeypatch, serve)
    for name, value in behaviour.items():
        setattr(server, name, value)
    data_refused("clevr", tmp_path, word, str(path), "http://127.0.0.1")
    assert not path.exists() and len(server.requests) <= 5


def test_a_file_announced_too_short_is_found_out_when_it_is_read(tmp_path, monkeypatch, serve):
    _, path, _ = tiny_download(tmp_path, monkeypatch, serve, lie=-50)
    data_refused("clevr", tmp_path, str(path), "record", "replace or remove")


def test_without_network_one_sentence_names_address_and_place(tmp_path, monkeypatch):
    for name in ("clevr", "clevrtex"):
        offline = replace(data.DATASETS[name], url="http://127.0.0.1:9/folder")
        monkeypatch.setitem(data.DATASETS, name, offline)
        data_refused(name, tmp_path, "http://127.0.0.1:9/folder", str(tmp_path))


def test_a_download_needs_room_on_the_disk(tmp_path, monkeypatch, serve):
    _, path, content = tiny_download(tmp_path, monkeypatch, serve)
    for room, enough in ((len(content), False), (5 * len(content), True)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": room}))
        if not enough:
            data_refused("clevr", tmp_path, str(path), "GB", "room")
            assert not path.exists()
        else:
            assert len(data.load("clevr", "train", tmp_path)) == 10


def test_two_processes_that_start_together_download_once(tmp_path, monkeypatch, serve):
    server, path, content = tiny_download(tmp_path, monkeypatch, serve)
    sums = run_twice(
        "tiny = replace(data.DATASETS['clevr'], source=(12, 16), crop=10, size=8, url=sys.argv[2])\n"
        "data.DATASETS['clevr'] = tiny\n"
        "print(data.load('clevr', 'train', sys.argv[1]).images.sum())", tmp_path, data.DATASETS["clevr"].url)
    assert sums == [str(data.load("clevr", "train", tmp_path).images.sum())] * 2
    assert path.read_bytes() == content and len(server.requests) == 1 and len(caches(tmp_path)) == 1


def archive(folder, names):
    """A .tar.gz of files or folders, by their names under `folder`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    return out.getvalue()


def several_archives(tmp_path, monkeypatch, serve):
    """ClevrTex in three archives, which share a folder. Returns the server and the images."""
    dataset = replace(data.DATASETS["clevrtex"], source=(8, 8), crop=6, size=6,
                      archives=data.DATASETS["clevrtex"].archives[:3])
    monkeypatch.setitem(data.DATASETS, "clevrtex", dataset)
    truth = write_pairs("clevrtex", tmp_path / "source", 20, np.random.default_rng(0))
    files = sorted(path.relative_to(tmp_path / "source") for path in (tmp_path / "source").rglob("*.png"))
    packed = {name: archive(tmp_path / "source", files[i::3]) for i, name in enumerate(dataset.archives)}
    return serve("clevrtex", packed), list(truth.values())


def test_archives_are_unpacked_into_one_folder_and_deleted(tmp_path, monkeypatch, serve):
    server, truth = several_archives(tmp_path, monkeypatch, serve)
    root = tmp_path / "root"
    assert_scenes(data.DATASETS["clevrtex"], *all_splits("clevrtex", root), truth)
    assert [path.name for path in sorted(root.iterdir())] == [".cache", "clevrtex_full"]
    assert [name for name, _ in server.requests] == [f"clevrtex_full_part{i}.tar.gz" for i in (1, 2, 3)]


@pytest.mark.parametrize("unpacked", [0, 1])
def test_what_is_fetched_stays_fetched_when_unpacking_is_stopped(tmp_path, monkeypatch, serve, unpacked):
    server, truth = several_archives(tmp_path, monkeypatch, serve)
    root, original, calls = tmp_path / "root", data.shutil.unpack_archive, itertools.count()

    def stop(*arguments, **options):
        if next(calls) == unpacked:
            raise KeyboardInterrupt
        original(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "unpack_archive", stop)
        with pytest.raises(KeyboardInterrupt):
            data.load("clevrtex", "train", root)
    assert not (root / "clevrtex_full").exists() and len(server.requests) == 3
    assert_scenes(data.DATASETS["clevrtex"], *all_splits("clevrtex", root), truth)
    assert len(server.requests) == 3
    assert [path.name for path in sorted(root.iterdir())] == [".cache", "clevrtex_full"]


@pytest.mark.parametrize("case", ["above", "absolute", "link", "cut", "flipped", "foreign"])
def test_an_archive_writes_nothing_outside_and_a_damaged_one_is_refused(tmp_path, serve, case):
    (tmp_path / "escaped").write_text("evil")
    out, root, outside = io.BytesIO(), tmp_path / "deep" / "root", tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        if case == "link":
            link = tarfile.TarInfo("clevrtex_camo")
            link.type, link.linkname = tarfile.SYMTYPE, str(outside)
            tar.addfile(link)
        names = {"above": "../../outside/escaped", "absolute": f"{outside}/escaped"}
        tar.add(tmp_path / "escaped", arcname=names.get(case, "clevrtex_camo/escaped"))
    content = {"cut": out.getvalue()[:-30], "flipped": flip(out.getvalue(), 60), "foreign": b"<html>"}.get(
        case, out.getvalue())
    serve("camo", {"clevrtex_camo.tar.gz": content})
    data_refused("camo", root, "clevrtex_camo" if case == "absolute" else "clevrtex_camo.tar.gz")
    assert not list(outside.iterdir())
    assert (root / "clevrtex_camo").exists() == (case == "absolute")  # there the path is made relative


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
    batches = list(data.batches(numbered(50), 8, seed=3, start=11, stop=20, device="cpu"))
    assert len(batches) == 9
    for step, batch in enumerate(batches, 11):
        assert batch.dtype == torch.uint8 and batch.shape == (8, 3, 4, 4)
        assert batch[:, 0, 0, 0].tolist() == data.batch_indices(50, 8, 3, step).tolist()


def test_batches_are_gathered_a_few_ahead_raise_the_error_and_leave_no_thread(monkeypatch):
    before, steps, original = threading.active_count(), [], data.batch_indices
    monkeypatch.setattr(data, "batch_indices", lambda *a: steps.append(a[-1]) or original(*a))
    batches = data.batches(numbered(50), 8, 0, 0, 10**9, "cpu")
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()
    assert steps == list(range(len(steps))) and 3 <= len(steps) <= 3 + 4
    monkeypatch.setattr(data, "batch_indices", lambda *a: np.array([1000]) if a[-1] == 2 else original(*a))
    failing = data.batches(numbered(50), 8, 0, 0, 5, "cpu")
    assert [len(next(failing)) for _ in range(2)] == [8, 8]  # the error comes at its place
    with pytest.raises(IndexError):
        next(failing)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
