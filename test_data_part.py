"""data.py: what is drawn, what is read, what is kept, what is refused."""

import functools
import gzip
import http.server
import io
import itertools
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

SHARED = Path(__file__).resolve().parent.parent / "shared"
RECORD_SETS = ("clevr", "objects_room", "multi_dsprites", "tetrominoes")
PAIR_SETS = ("clevrtex", "camo", "ood", "shapestacks", "folder")


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


def palette_png(path, labels):
    image = Image.fromarray(labels, "P")
    image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path, "PNG")


def write_pairs(name, root, count, rng, side=None):
    """`count` scenes of a set of image files under `root`. Returns {image file name: (image, labels)}."""
    dataset, truth = data.DATASETS[name], {}
    height, width = (side, side) if side else dataset.source or (20, 30)
    for i in range(count):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        labels = rng.integers(0, 6, (height, width)).astype(np.uint8)
        if name == "folder":
            files = root / f"sub{i % 2}" / f"photo{i}.png", root / f"sub{i % 2}" / f"photo{i}_mask.png"
        elif name == "shapestacks":
            files = (
                root / f"shapestacks/recordings/env-{i}/rgb-w=1-f=0-l=2-c=unique-cam_{i + 1}-mono-0.png",
                root / f"shapestacks/iseg/env-{i}/iseg-w=0-f=0-l=0-c=original-cam_{i + 1}-mono-0.map",
            )
        else:
            stem = root / dataset.path / str(i // 5) / f"CLEVRTEX_{i:06}"
            files = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + "_flat.png")
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGBA" if name != "folder" else "RGB").save(files[0])
        if name == "shapestacks":
            Image.fromarray(np.stack([labels * 32, labels, labels], 2)).save(files[1], "PNG")
        else:
            palette_png(files[1], labels)
        truth[files[0]] = image, labels
    if name == "shapestacks":
        lists = root / "shapestacks/splits/default"
        lists.mkdir(parents=True)
        for split, part in (("test", range(1)), ("eval", range(1, 2)), ("train", range(2, count))):
            (lists / f"{split}.txt").write_text("".join(f"env-{i}\n" for i in part))
    return truth


def all_splits(name, root, **options):
    """Images and labels of all scenes in the order test, val, train."""
    parts = [
        data.load(name, split, root, **options) for split in (["test"] if name == "ood" else data.SPLITS)
    ]
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
    assert whole["clevrtex"] == {
        "test": range(5000),
        "val": range(5000, 10_000),
        "train": range(10_000, 50_000),
    }
    assert whole["ood"] == {
        "test": range(10_000),
        "val": range(10_000, 10_000),
        "train": range(10_000, 10_000),
    }


@pytest.mark.parametrize("name", ["clevr", "objects_room", "clevrtex", "ood"])
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
    write_records(tmp_path / dataset.path, [payload for *_, payload in scenes], packed)
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
    write_records(tmp_path / dataset.path, [payload for *_, payload in scenes])
    for split, expected in (("test", [0]), ("val", [2]), ("train", [4, 5, 8, 10, 12, 13])):
        loaded = data.load("clevr6", split, tmp_path)
        assert [fitted(scenes[i][1], 10, 8).tolist() for i in expected] == loaded.labels.tolist()
    assert data.load("clevr6", "train", tmp_path, limit=3).labels.tolist() == loaded.labels[:3].tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_limit_gives_the_first_scenes_of_the_split_and_decodes_no_others(tmp_path, monkeypatch, packed):
    dataset, rng = tiny_clevr(monkeypatch), np.random.default_rng(3)
    write_records(tmp_path / dataset.path, [random_scene(dataset, rng)[2] for _ in range(21)], packed)
    whole = {split: data.load("clevr", split, tmp_path) for split in data.SPLITS}
    for split, limit in itertools.product(data.SPLITS, (1, 2, 100)):
        part = data.load("clevr", split, tmp_path, limit=limit)
        assert np.array_equal(part.images, whole[split].images[:limit])
    calls, original = [], data.decode_record
    monkeypatch.setattr(data, "decode_record", lambda *a: calls.append(a) or original(*a))
    data.load("clevr", "val", tmp_path, limit=2, size=4)
    assert len(calls) <= 3


@pytest.mark.parametrize("name", PAIR_SETS)
def test_image_files_come_back_exactly(tmp_path, name):
    dataset, rng = data.DATASETS[name], np.random.default_rng(4)
    truth = write_pairs(name, tmp_path, 12, rng)
    images, labels = all_splits(name, tmp_path)
    expected = list(truth.values())
    if name == "folder":  # order by hash: match by content
        expected.sort(key=lambda pair: fitted(pair[0], 0, 128).tobytes())
        order = sorted(range(len(images)), key=lambda i: images[i].tobytes())
        images, labels = images[order], labels[order]
    assert len(images) == 12
    for image, label, scene in zip(images, labels, expected):
        assert np.array_equal(image, fitted(scene[0], dataset.crop, dataset.size))
        assert np.array_equal(label, fitted(scene[1], dataset.crop, dataset.size))


@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="needs ../shared/formats")
@pytest.mark.parametrize("name", RECORD_SETS + PAIR_SETS[:-1])
def test_files_of_the_public_format_come_back_exactly(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset, formats = data.DATASETS[name], SHARED / "formats"
    truth = np.load(formats / f"{Path(dataset.path).name.removesuffix('.tfrecords')}.truth.npz")
    order = range(20)
    if name == "shapestacks":
        lists = [
            (formats / f"shapestacks/splits/default/{s}.txt").read_text() for s in ("test", "eval", "train")
        ]
        order = [int(scenario.split("v=")[-1]) for scenario in "".join(lists).split()]
    images, labels = all_splits(name, formats)
    for i, image, label in zip(order, images, labels, strict=True):
        assert np.array_equal(image, fitted(truth["images"][i], dataset.crop, dataset.size))
        mask = np.maximum(truth["labels"][i].astype(int) - dataset.background_masks + 1, 0).astype(np.uint8)
        assert np.array_equal(label, fitted(mask, dataset.crop, dataset.size))


def test_another_size_is_a_pillow_resize(tmp_path):
    own, small = (data.load("shapes", "test", tmp_path, limit=3, size=size) for size in (None, 48))
    assert small.images.shape == (3, 3, 48, 48) and small.labels.shape == (3, 48, 48)
    for image, resized in zip(own.images, small.images):
        assert np.array_equal(fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), 0, 48), resized)


# --- The user's own images ---


def save_as(path, mode, values):
    """Grey values (h, w) in 0..255 as an image of some mode; returns the RGB that should come back."""
    rgb = np.stack([values] * 3, 2)
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16) * 257).save(path)
    elif mode == "P":
        image = Image.fromarray(255 - values, "P")
        image.putpalette([255 - v for v in range(256) for _ in range(3)])
        image.save(path)
    elif mode == "CMYK":
        Image.fromarray(rgb).convert("CMYK").save(path)
    elif mode == "1":
        rgb = np.where(rgb > 127, 255, 0).astype(np.uint8)
        Image.fromarray(rgb[..., 0]).convert("1").save(path)
    else:
        Image.fromarray(rgb).convert(mode).save(path)
    return rgb


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("I;16", "png"),
        ("I;16", "tiff"),
        ("CMYK", "tiff"),
        ("RGB", "bmp"),
        ("RGB", "TIF"),
        ("RGB", "webp"),
        ("RGB", "JPG"),
    ],
)
def test_images_of_any_mode_and_format(tmp_path, mode, suffix):
    values = np.linspace(0, 255, 24 * 16).astype(np.uint8).reshape(16, 24)
    expected = save_as(tmp_path / f"only.{suffix}", mode, values)
    loaded = data.load("folder", "test", tmp_path, size=16)
    assert not loaded.labelled and not loaded.labels.any()
    lossy = 6 if suffix in ("webp", "JPG") else 0
    assert np.abs(loaded.images[0].astype(int) - expected[:, 4:20].transpose(2, 0, 1)).max() <= lossy


def test_photos_are_turned_upright(tmp_path):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image.save(tmp_path / "photo.png", exif=exif)
    upright = np.asarray(image.transpose(Image.ROTATE_270)).transpose(2, 0, 1)
    assert np.array_equal(data.load("folder", "test", tmp_path, size=16).images[0], upright)


def test_folder_splits_are_disjoint_complete_and_stay_the_same(tmp_path):
    truth = write_pairs("folder", tmp_path, 30, np.random.default_rng(6), side=8)
    parts = [data.load("folder", split, tmp_path, size=8) for split in data.SPLITS]
    assert [len(part) for part in parts] == [3, 3, 24]
    found = {image.tobytes() for part in parts for image in part.images}
    assert found == {fitted(image, 0, 8).tobytes() for image, _ in truth.values()}
    for path in tmp_path.rglob("*.png"):
        path.touch()
    assert np.array_equal(data.load("folder", "train", tmp_path, size=8).images, parts[2].images)


def test_more_objects_than_k_and_large_label_values_stay(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(labels).save(tmp_path / "a_mask.png")
    assert np.array_equal(data.load("folder", "test", tmp_path, size=8).labels[0], labels)


# --- The life of a cache ---


def tiny_file(tmp_path, monkeypatch, count=14, seed=7):
    dataset = tiny_clevr(monkeypatch)
    rng = np.random.default_rng(seed)
    write_records(tmp_path / dataset.path, [random_scene(dataset, rng)[2] for _ in range(count)])
    return tmp_path / dataset.path


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
        assert [p.name for p in folder.iterdir()] == [data.DATASETS["clevr"].path]
        assert list((tmp_path / "user/ast_seg").glob("*/clevr-*"))
    finally:
        folder.chmod(0o755)


# --- Bad input ---


def refused(name, root, *words, split="train", **options):
    """The DataError, one line that names all `words`; no cache stays behind."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, split, root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert caches(root) == []


def test_unknown_names_and_splits(tmp_path):
    refused("clever", tmp_path, "clever", "clevr", "shapes")
    refused("shapes", tmp_path, "training", "train", split="training")
    write_pairs("ood", tmp_path, 2, np.random.default_rng(0))
    refused("ood", tmp_path, "clevrtex_outd", "train")


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
    refused("clevr", tmp_path, str(path), limit=limit)
    assert time.perf_counter() - began < 1


def test_a_truncated_gzip(tmp_path, monkeypatch):
    path = tiny_file(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes()[:-20])
    refused("clevr", tmp_path, str(path), "record")


@pytest.mark.parametrize("name", PAIR_SETS)
@pytest.mark.parametrize("case", ["unreadable", "cut", "no labels", "unreadable labels", "other size"])
def test_bad_image_files(tmp_path, name, case):
    write_pairs(name, tmp_path, 10, np.random.default_rng(0))
    dataset, split = data.DATASETS[name], "test" if name == "ood" else "train"
    image, labels = dataset.reader(dataset, tmp_path / dataset.path, split)[0][:2]
    if case == "unreadable":
        image.write_bytes(b"no picture")
    elif case == "cut":
        image.write_bytes(image.read_bytes()[:-200])
    elif case == "no labels":
        labels.unlink()
    elif case == "unreadable labels":
        labels.write_bytes(b"no picture")
    else:
        Image.new("RGB" if name == "shapestacks" else "L", (7, 9)).save(labels, "PNG")
    refused(name, tmp_path, str(image if case in ("unreadable", "cut") else labels), split=split)


def test_missing_files_say_what_belongs_where(tmp_path):
    refused("folder", tmp_path, str(tmp_path))
    refused("folder", tmp_path / "nowhere", "nowhere")
    refused("shapestacks", tmp_path, "recordings", "shapestacks-file.robots.ox.ac.uk", "iseg")
    write_pairs("shapestacks", tmp_path, 4, np.random.default_rng(0))
    (tmp_path / "shapestacks/splits/default/eval.txt").unlink()
    refused("shapestacks", tmp_path, "eval.txt", split="val")


def test_label_maps_must_hold_labels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a_mask.png")
    refused("folder", tmp_path, "a_mask.png", split="test")
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a_mask.png")
    refused("folder", tmp_path, "a_mask.png", split="test")


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
    _, items, decode = dataset.reader(dataset, root / dataset.path, split)
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
    write_records(tmp_path / dataset.path, [random_scene(dataset, rng)[2] for _ in range(3)], packed)
    fuzz(monkeypatch, name, tmp_path, split, [tmp_path / dataset.path], 2000)


@pytest.mark.parametrize("name", ["clevrtex", "shapestacks", "folder"])
def test_fuzz_image_files(tmp_path, monkeypatch, name):
    dataset = replace(data.DATASETS[name], source=() if name == "folder" else (8, 8), crop=6)
    monkeypatch.setitem(data.DATASETS, name, dataset)
    write_pairs(name, tmp_path, 4, np.random.default_rng(0), side=8)
    files = dataset.reader(dataset, tmp_path / dataset.path, "train")[0]
    fuzz(monkeypatch, name, tmp_path, "train", files, 2000)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tiff"])
def test_fuzz_photos(tmp_path, monkeypatch, suffix):
    """These formats carry no checksum: a changed pixel cannot be told, but nothing may break."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(
        tmp_path / f"a.{suffix}"
    )
    fuzz(monkeypatch, "folder", tmp_path, "test", [tmp_path / f"a.{suffix}"], 500, exact=False)


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
    urls = tuple(address + url.rsplit("/", 1)[1] for url in dataset.urls)
    monkeypatch.setitem(data.DATASETS, name, replace(dataset, urls=urls))
    return handler


def tiny_download(tmp_path, monkeypatch, **behaviour):
    tiny_file(tmp_path, monkeypatch)
    path = tmp_path / data.DATASETS["clevr"].path
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
    refused("clevr", tmp_path, word, str(path), "http://127.0.0.1")
    assert not path.exists()


def test_without_network_one_sentence_names_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setitem(
        data.DATASETS, "clevr", replace(data.DATASETS["clevr"], urls=("http://127.0.0.1:9/file",))
    )
    refused("clevr", tmp_path, "http://127.0.0.1:9/file", str(tmp_path))


def test_download_needs_room_on_the_disk(tmp_path, monkeypatch):
    tiny_download(tmp_path, monkeypatch)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused("clevr", tmp_path, "GB", "room")


def archive(folder, names):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    return out.getvalue()


def test_archives_are_unpacked_and_deleted(tmp_path, monkeypatch):
    source, root = tmp_path / "source", tmp_path / "root"
    write_pairs("camo", source, 10, np.random.default_rng(0))
    serve(monkeypatch, "camo", archive(source, ["clevrtex_camo"]))
    assert len(data.load("camo", "train", root)) == 8
    assert [p.name for p in sorted(root.iterdir())] == [".cache", "clevrtex_camo"]


def test_an_archive_writes_nothing_outside_and_a_damaged_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "evil").write_text("")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(tmp_path / "evil", arcname="../../escaped")
    root = tmp_path / "deep" / "root"
    server = serve(monkeypatch, "camo", out.getvalue())
    refused("camo", root, "clevrtex_camo.tar.gz")
    assert not list(tmp_path.rglob("escaped"))
    for file in root.glob("*.tar.gz"):
        file.unlink()
    server.content = out.getvalue()[:-30]
    refused("camo", root, "clevrtex_camo.tar.gz")
    assert not (root / "clevrtex_camo").exists()


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
