"""Every benchmark of the AST-Seg paper and its peers, from the public files, decoded once.

    scenes = load("clevr", "train", data_dir="datasets")  # images (N, 3, H, W), labels (N, H, W)
    for images in batches(scenes, batch_size=64, seed=0, start=0, stop=1000, device=device): ...
"""
import itertools
import json
import os
import platform
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import google_crc32c
import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.file_download import http_get
from matplotlib import colormaps, colors
from matplotlib import pyplot as plt
from PIL import Image, ImageOps
from tqdm import tqdm
from zlib_ng import gzip_ng

SPLITS = ("test", "val", "train")  # in the order in which they lie in the public files
CACHE_VERSION = 6  # raise it when a change below changes what is decoded or drawn

class UserError(Exception):
    """What the user can mend, in one sentence: what is wrong, and what to do."""

class Damaged(UserError):
    """Some of the scenes of a split are of no use."""

@dataclass(frozen=True)
class Dataset:
    """A row of the table. `reader(dataset, path, split)` returns files of the split and, for each
    scene, a function that decodes it: image (h, w, 3), then labels (h, w), both uint8, or ()."""
    reader: Callable
    slots: int  # K, the largest number of objects (shapes: two more); clevr6 has no other scenes
    anisotropic: bool  # one scale for each axis instead of one for both
    background: str  # architecture of the background model: simple, complex or small
    splits: tuple[int, ...]  # scenes of test, val, train, or their proportions
    size: int = 64  # side of the training images, in pixels
    source: tuple[int, ...] = (64, 64)  # height and width as published; () stands for any
    crop: int = 0  # side of the centre square that is kept, in their pixels; 0 for the largest
    path: str = ""  # public name of the file or folder under `data_dir`
    url: str = ""  # where a program can fetch it
    archives: tuple[str, ...] = ()  # endings of the archives there that hold the folder
    masks: int = 0  # records: number of masks, the background's included
    mask_axis: int = 0  # records: the axis that counts them, 0: (masks, h, w), 2: (h, w, masks)
    background_masks: int = 1  # records: this many first masks are background
    pattern: str = "*"  # image files: the names of scenes (ClevrTex: its render passes are none)
    ending: str = "_mask"  # image files: what a label map's name has in addition

class Scenes(NamedTuple):
    images: np.ndarray  # (N, 3, H, W) uint8, RGB
    labels: np.ndarray  # (N, H, W) uint8, 0 = background; 0 throughout where they are unknown
    source: str = ""  # a checksum of the names, sizes and dates of their files, if they have any

def split_bounds(total, published):
    """{split: range of positions} among `total` scenes: as published, fewer in proportion."""
    test, val = (max(round(total * n / sum(published)), min(n, 1)) for n in published[:2])
    every = range(total)
    return {"test": every[:test], "val": every[test:test + val], "train": every[test + val:]}

@contextmanager
def usable(what, advice="if the file is damaged, replace or remove it"):
    """Turn whatever a library raises on a missing, damaged or foreign file into a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} is of no use ({reason}); {advice}.") from error

def prefetch(function, items, depth, threads=1):
    """Yield function(item) for all items in order, computed by threads `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead = []
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == depth:
                yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)

# --- Drawn scenes: shapes and Textured Multi-dSprites ---
CORNERS = (0, 3, 4, 5)  # of the kinds: a disc, a triangle, a square and a star
UPRIGHT = (0, np.pi * 5 / 6, 0, np.pi / 2)  # the angle at which each of them stands on its base

def cover(kind, dx, dy, radius, tilt, side):
    """(h, w): 1 in a shape, 0 outside. dx (w,), dy (h, 1), radius: half images; side: pixels."""
    # The edge in polar coordinates. `fold`, at most sector, is the angle from a corner or notch.
    edge = 0.9 * radius
    if CORNERS[kind] > 0:
        sector = np.pi / CORNERS[kind]
        angle = np.arctan2(dy, dx) + (UPRIGHT[kind] + tilt)
        fold = np.abs(angle / (2 * sector) % 1 - 0.5) * 2 * sector
        edge = 1.1 * radius * (np.cos(sector) / np.cos(sector - fold))
    if CORNERS[kind] == 5:
        edge = 1.1 * radius * (0.5 + 0.5 * fold / sector)
    return np.clip(0.5 - (np.hypot(dx, dy) - edge) * side / 2, 0, 1)  # falls within one pixel

def paint(rng, image, hues, kinds, radii, gap, pale, shading):
    """Paint a random shape of each hue over image (side, side, 3) in [0, 1]; return it and labels.
    gap: between centres, in sums of radii, where that fits. pale: least saturation and value."""
    side = len(image)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    labels = np.zeros((side, side), np.uint8)
    placed = []
    for label, hue in enumerate(hues, 1):
        radius = rng.uniform(*radii)
        for _ in range(200):
            x, y = rng.uniform(radius - 1, 1 - radius, 2)
            if all(np.hypot(x - x0, y - y0) > gap * (radius + r0) for x0, y0, r0 in placed):
                break
        placed.append((x, y, radius))

        near = 1.2 * radius  # no pixel further away changes
        columns = slice(*np.searchsorted(pixels, (x - near, x + near)))
        rows = slice(*np.searchsorted(pixels, (y - near, y + near)))
        dx = pixels[columns] - np.float32(x)
        dy = pixels[rows, None] - np.float32(y)
        inside = cover(rng.integers(kinds), dx, dy, radius, rng.uniform(-0.2, 0.2), side)
        colour = colors.hsv_to_rgb((hue, *rng.uniform(pale, 1))).astype(np.float32)
        light = 1 - shading * (dx + dy)[..., None] / radius  # from the upper left
        around = image[rows, columns]  # a view
        around += inside[..., None] * (np.clip(colour * light, 0, 1) - around)
        labels[rows, columns][inside > 0.5] = label
    return (image * 255 + 0.5).astype(np.uint8), labels

def draw_shapes(rng, side):
    """2-4 shaded shapes of different hues, which may overlap, on a grey backdrop lit aslant."""
    count = rng.integers(2, 5)
    hues = (rng.random() + (rng.permutation(count) + rng.uniform(-0.2, 0.2, count)) / count) % 1
    tint = rng.uniform(-0.03, 0.03, 3)
    slope = rng.uniform(-0.15, 0.15, 2)
    x = np.linspace(1 / side - 1, 1 - 1 / side, side)
    light = (slope[0] * x + slope[1] * x[:, None])[..., None]  # (side, side, 1)
    image = (rng.uniform(0.35, 0.6) + tint + light).astype(np.float32)
    return paint(rng, image, hues, 4, (0.2, 0.34), gap=0.75, pale=(0.6, 0.75), shading=0.25)

def draw_tm_dsprites(rng, side):
    """2-3 sprites on one of 20 shifted textures (DRC supplement, A.5). The numbers are ours."""
    hues = rng.random(rng.integers(2, 4))
    angle = np.pi * rng.integers(5) / 5
    x = np.linspace(0, 4 * np.pi * rng.integers(1, 5), side)  # 2, 4, 6 or 8 waves
    phase = x * np.cos(angle) + x[:, None] * np.sin(angle) + rng.uniform(0, 2 * np.pi)
    image = np.repeat((0.5 + 0.3 * np.sin(phase)).astype(np.float32)[..., None], 3, axis=2)
    return paint(rng, image, hues, 3, (0.25, 0.25), gap=1.1, pale=(1, 1), shading=0)

def read_drawn(draw, dataset, path, split):
    """Scene i of a split depends on (split, i) alone: run seeds do not change a benchmark."""
    def decode(i):
        rng = np.random.default_rng((0, ("train", "test", "val").index(split), i))
        return draw(rng, dataset.source[0])
    return [], [partial(decode, i) for i in range(dataset.splits[SPLITS.index(split)])]

# --- TFRecord files, without TensorFlow ---
def read_checked(stream, size):
    """`size` bytes, or b"" at the end, whose masked CRC-32C follows them as a uint32."""
    data = stream.read(size)
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if data and masked != int.from_bytes(stream.read(4), "little"):
        raise ValueError("wrong checksum")
    return data

def iterate_records(path):
    """Yield the data of each record: length (uint64), its checksum, data, its checksum."""
    with usable(path), open(path, "rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"  # some tools hand the public files out inflated
        stream = gzip_ng.open(file) if packed else file  # eleven times as fast as Python's gzip
        for length in iter(partial(read_checked, stream, 8), b""):  # until the end
            yield read_checked(stream, int.from_bytes(length, "little"))

def protobuf_fields(message):
    """Yield the contents of the fields of a protobuf message, here all strings or messages again.
    A field is: tag (one byte), length (7 bits a byte, the lowest first, 0x80: more), content."""
    while message:
        digits = re.match(rb".([\x80-\xff]{0,9}[\x00-\x7f])", message, re.DOTALL)[1]
        length = sum((digit & 0x7F) << 7 * place for place, digit in enumerate(digits))
        start = 1 + len(digits)
        yield message[start:start + length]
        message = message[start + length:]

def decode_record(dataset, path, data):
    """A tf.train.Example -> image, labels, or () where it holds more objects than slots."""
    with usable(path, f"give a file of scenes with {dataset.masks} masks"):
        # CLEVR's lists are a million strings, each of which a general parser would visit.
        (features,) = protobuf_fields(memoryview(data))
        entries = map(protobuf_fields, protobuf_fields(features))  # features come in any order
        lists = {bytes(name): next(protobuf_fields(feature)) for name, feature in entries}
        if b"visibility" in lists:  # a 0 or 1 for the background and each object
            floats = next(protobuf_fields(lists[b"visibility"]))
            if np.count_nonzero(np.frombuffer(floats, "<f4")) > 1 + dataset.slots:
                return ()
        # A string takes three bytes: tag, length, value. Where masks overlap the first wins.
        image = np.frombuffer(lists[b"image"], np.uint8).reshape(*dataset.source, 3, 3)[..., 2]
        shape = np.insert(dataset.source, dataset.mask_axis, dataset.masks)
        masks = np.frombuffer(lists[b"mask"], np.uint8).reshape(*shape, 3)[..., 2]  # 0 or 255
        labels = np.maximum(masks.argmax(dataset.mask_axis) + 1 - dataset.background_masks, 0)
        return image, labels.astype(np.uint8)

def read_records(dataset, path, split):
    """A TFRecord file, which is read once before to count the scenes: its splits depend on it."""
    def scenes():
        total = sum(1 for _ in tqdm(iterate_records(path), desc="counting", leave=False))
        at = split_bounds(min(total, sum(dataset.splits)), dataset.splits)[split]
        for data in itertools.islice(iterate_records(path), at.start, at.stop):
            yield partial(decode_record, dataset, path, data)
    return [path], scenes()

# --- Image files ---
def is_image(path):
    """Whether it is an image by its name, no label map, and not what segment_files writes."""
    return (path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
            and not path.name.endswith(("_mask.png", "_labels.png", "_overlay.png")))

def read_image(path, size=()):
    """(h, w, 3) uint8 RGB of an image of any format and mode. size: the (h, w) it must have."""
    with usable(path):
        image = ImageOps.exif_transpose(Image.open(path))
        if size and image.size != size[::-1]:
            raise ValueError(f"its width and height are {image.size} instead of {size[::-1]}")
        if image.mode == "F":
            raise ValueError("its values are floats")
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return np.asarray(image.convert("RGB"))

def read_labels(path, size):
    """(h, w) uint8 of a label map: the indices of its palette, or its grey values."""
    with usable(path, "give a label map of one channel of 8 bits, as large as the image"):
        labels = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        if path.suffix == ".map":  # ShapeStacks by GENESIS: a PNG, label = first channel / 32
            labels = labels[..., 0] // 32
        if labels.shape != size:
            raise ValueError(f"it has {labels.T.shape} values, the image {size[::-1]} pixels")
        return labels.astype(np.uint8, casting="safe")

def read_pairs(dataset, pairs):
    """What a reader returns, for a list of (image path, label path), or of (image path,)."""
    def decode(image_path, *label_paths):
        image = read_image(image_path, dataset.source)
        labels = [read_labels(path, image.shape[:2]) for path in label_paths]
        return image, *(labels or [np.zeros_like(image[..., 0])])
    return itertools.chain(*pairs), [partial(decode, *pair) for pair in pairs]

def read_folder(dataset, path, split):
    """A tree of images, all or none of them with a label map NAME<ending>.png."""
    images = sorted(filter(is_image, path.rglob(dataset.pattern)), key=lambda image: image.name)
    if not dataset.path:  # names tell what is to be seen; their checksums mix that, always alike
        images.sort(key=lambda image: zlib.crc32(image.relative_to(path).as_posix().encode()))
    stems = {image.stem for image in images}
    for image in images:
        near = re.match("(.+?)[-_. ]*mask", image.stem, re.IGNORECASE)
        if near and near[1] in stems:
            raise UserError(f"{image} looks like a label map; save that, without loss, as "
                            f"{near[1]}_mask.png.")
    pairs = [(image, image.with_name(f"{image.stem}{dataset.ending}.png")) for image in images]
    missing = [str(label) for _, label in pairs if not label.exists()]
    if len(missing) == len(pairs):
        for label in path.rglob("*_mask.png"):
            raise UserError(f"{label} belongs to no image; beside NAME.png put NAME_mask.png.")
        pairs = list(zip(images))
    elif missing:
        raise UserError(f"Missing label maps: {len(missing)} ({', '.join(missing[:5])}); "
                        "give all images one, or none.")
    return read_pairs(dataset, [pairs[i] for i in split_bounds(len(pairs), dataset.splits)[split]])

def read_shapestacks(dataset, path, split):
    """ShapeStacks: every view of the scenarios in splits/default, with the labels of GENESIS."""
    pairs = []
    with usable(path, "unpack there shapestacks-{meta,rgb}.tar.gz from "
                "shapestacks-file.robots.ox.ac.uk/static/download/v1, and as its folder iseg the "
                "labels that the README of github.com/applied-ai-lab/genesis links"):
        listing = path / f"splits/default/{split.replace('val', 'eval')}.txt"
        for scenario in listing.read_text().split():
            views = path / "recordings" / scenario / "rgb-*-cam_*.png"
            for image in sorted(views.parent.glob(views.name)) or [views]:
                image.stat()  # raises where there is none
                camera = image.stem.split("-cam_")[1]
                label = path / f"iseg/{scenario}/iseg-w=0-f=0-l=0-c=original-cam_{camera}.map"
                label.stat()
                pairs.append((image, label))
    return read_pairs(dataset, pairs)

# --- Download ---
def download(dataset, path):
    """Fetch the file `path`, or the archives of this folder, which appears only when whole."""
    files = [path.with_name(path.name + ending) for ending in dataset.archives or [""]]
    for file in files:
        url = f"{dataset.url}/{file.name}"
        part = file.with_name(f"{file.name}.part")
        advice = f"run again to go on, remove {part} to begin anew, or fetch {file} yourself"
        if not file.exists():
            with usable(url, advice), open(part, "ab") as out:
                http_get(url, out, resume_size=out.tell())  # it retries where a reply breaks off
            os.replace(part, file)
    if dataset.archives:
        folder = path.with_name(f"{path.name}.part")
        for archive in tqdm(files, desc="unpacking", leave=False):
            with usable(archive):
                shutil.unpack_archive(archive, folder, filter="data")  # only into `folder`
        os.replace(folder, path)
        for archive in files:
            archive.unlink()

# --- The table ---
DEEPMIND = "https://storage.googleapis.com/multi-object-datasets"  # split as in GENESIS
CLEVR = Dataset(
    read_records, 10, False, "simple", (10_000, 10_000, 80_000), 128, (240, 320), 192, masks=11,
    path="clevr_with_masks_train.tfrecords", url=f"{DEEPMIND}/clevr_with_masks")
CLEVRTEX = Dataset(  # as github.com/karazijal/clevrtex reads it
    read_folder, 10, True, "complex", (1, 1, 8), 128, (240, 320), 192, "clevrtex_full",
    "https://thor.robots.ox.ac.uk/datasets/clevrtex", pattern="CLEVRTEX_????_??????.png",
    archives=tuple(f"_part{i}.tar.gz" for i in range(1, 6)), ending="_flat")
DATASETS: dict[str, Dataset] = {
    "shapes": Dataset(partial(read_drawn, draw_shapes), 6, False, "small", (320, 320, 8192)),
    "tm_dsprites": Dataset(partial(read_drawn, draw_tm_dsprites), 3, False, "complex",
                           (320, 320, 19_360), 128, (128, 128)),  # ours, after DRC's text
    "clevr": CLEVR,
    "clevr6": replace(CLEVR, slots=6),
    "clevrtex": CLEVRTEX,
    "camo": replace(CLEVRTEX, path="clevrtex_camo", archives=(".tar.gz",)),
    "ood": replace(CLEVRTEX, path="clevrtex_outd", archives=(".tar.gz",), splits=(1, 0, 0)),
    "objects_room": Dataset(  # masks of the background: sky, floor, two halves of the wall
        read_records, 3, True, "complex", (10_000, 10_000, 980_000), masks=7, background_masks=4,
        path="objects_room_train.tfrecords", url=f"{DEEPMIND}/objects_room"),
    "shapestacks": Dataset(  # it lists its splits
        read_shapestacks, 6, False, "complex", (), 64, (224, 224), 196, "shapestacks"),
    "multi_dsprites": Dataset(
        read_records, 4, False, "complex", (10_000, 10_000, 40_000), masks=5, mask_axis=2,
        path="multi_dsprites_colored_on_colored.tfrecords", url=f"{DEEPMIND}/multi_dsprites"),
    "tetrominoes": Dataset(
        read_records, 3, False, "simple", (10_000, 10_000, 40_000), 64, (35, 35), masks=4,
        path="tetrominoes_train.tfrecords", url=f"{DEEPMIND}/tetrominoes"),
    "folder": Dataset(read_folder, 10, True, "complex", (1, 1, 8), 128, ())}  # one's own images

# --- Cache and loading ---
def decode_planes(dataset, errors, decode):
    """The centre square of a scene, (4, size, size) uint8: RGB, labels. Empty if left out."""
    planes = []
    try:
        for pixels in decode():  # (h, w, 3), (h, w)
            side = dataset.crop or min(pixels.shape[:2])
            top, left = (np.array(pixels.shape[:2]) - side) // 2
            square = Image.fromarray(pixels[top:top + side, left:left + side])
            how = Image.BILINEAR if pixels.ndim == 3 else Image.NEAREST
            square = square.resize((dataset.size, dataset.size), how)
            planes.extend(np.atleast_3d(square).transpose(2, 0, 1))
    except UserError as error:
        errors.append(str(error))
    return np.array(planes)

def write_cache(cache, path, dataset, decoders, limit, threads):
    """Decode the first `limit` scenes into a file, which has another name until it is whole."""
    print(f"preparing {cache}", flush=True)
    errors = []
    planes = prefetch(partial(decode_planes, dataset, errors), tqdm(decoders), 8, threads)
    part = cache.with_suffix(".part")
    try:
        with open(part, "wb") as out:
            out.writelines(itertools.islice(filter(np.size, planes), limit or None))
        if errors:
            raise Damaged(f"Damaged scenes: {len(errors)}. {' '.join(sorted(set(errors))[:5])}")
        if not part.stat().st_size:
            raise UserError(f"There are too few scenes in {path} for {cache.name}; choose another "
                            "--data-dir or --split.")
        os.replace(part, cache)
    finally:  # a full disk keeps no half of it
        planes.close()  # and its progress bar, before the message
        part.unlink(missing_ok=True)

def load(name: str, split: str, data_dir="datasets", limit: int = 0, size: int = 0) -> Scenes:
    """The first `limit` scenes, 0 for all, of a split. The first use fetches and decodes them,
    under data_dir. size: their side in pixels, 0 for the set's own. Raises UserError, OSError."""
    dataset = replace(DATASETS[name], size=size or DATASETS[name].size)
    path = Path(data_dir, dataset.path)
    root = Path(data_dir, ".cache")
    if path.exists() and not os.access(data_dir, os.W_OK):  # a folder that others share
        root = Path.home() / ".cache/ast_seg"
    if name == "folder" and not path.is_dir():
        raise UserError(f"There is no folder {path}; choose another --data-dir.")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{dataset.path or name}.lock"):  # whoever comes second finds it done
        if dataset.url and not path.exists():
            download(dataset, path)
        files, decoders = dataset.reader(dataset, path, split)

        # The name tells the source, so that another one, or a changed one, makes another cache.
        facts = [(file.relative_to(data_dir).as_posix(), file.stat().st_size,
                  file.stat().st_mtime_ns) for file in files]
        source = f"-{zlib.crc32(repr((CACHE_VERSION, facts)).encode()):08x}"
        stem = f"{name}-{dataset.size}-{split}-{limit}"
        cache = root / f"{stem}{source}.uint8"
        if not cache.exists():
            # Drawing holds Python's lock: with two threads it takes 1.8 times as long.
            threads = os.cpu_count() if facts else 1
            write_cache(cache, path, dataset, decoders, limit, threads)
            for old in set(root.glob(f"{stem}-*")) - {cache}:
                old.unlink()
    with usable(cache):
        planes = np.memmap(cache, np.uint8, "c").reshape(-1, 4, dataset.size, dataset.size)
    return Scenes(planes[:, :3], planes[:, 3], source if facts else "")

def load_splits(name: str, data_dir, limit: int, size: int) -> list[Scenes]:
    """Test, validation (at most 256 without a limit) and training scenes, as `load` has them; what
    is damaged in any of them is named at once."""
    scenes = []
    errors = []
    for split in SPLITS:
        try:
            scenes.append(load(name, split, data_dir, limit or 256 * (split == "val"), size))
        except UserError as error:
            errors.append(str(error))
            if not isinstance(error, Damaged):
                break
    if errors:
        raise UserError(" ".join(errors))
    return scenes

# --- Batches ---
@lru_cache(4)
def epoch_order(count, seed, epoch):  # kept, since a million scenes take longer than a step
    return np.random.default_rng((seed, epoch)).permutation(count)

def batch_indices(count, batch_size, seed, step):
    """(batch_size,) int64: which of `count` scenes make the batch at `step`, by the arguments
    alone. Each epoch is a new permutation without its last incomplete batch."""
    if count < batch_size:  # too few scenes are drawn with replacement
        return np.random.default_rng((seed, step)).integers(count, size=batch_size)
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]

def batches(scenes: Scenes, batch_size: int, seed: int, start: int, stop: int,
            device: torch.device, share=slice(None), shift=0, shift_from=0):
    """Yield the batches of steps start..stop - 1: (batch_size, 3, H, W) uint8 tensors on `device`;
    of each the `share` of this process. A thread gathers them ahead of the training step.
    From `shift_from` on, a batch's scenes all move by up to `shift` pixels, borders repeated."""
    images = np.asarray(scenes.images)
    if batch_size % (share.step or 1):
        raise UserError(f"{share.step} processes cannot share batches of {batch_size} equally.")
    if device.type == "cuda" and 4 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
        images = torch.from_numpy(images).to(device)  # then a batch is an index, without a copy
    def gather(step):
        indices = batch_indices(len(images), batch_size, seed, step)[share]
        batch = torch.as_tensor(images[indices])
        if shift and step >= shift_from:
            h, w = batch.shape[2:]
            down, right = np.random.default_rng((seed, step)).integers(-shift, shift + 1, 2)
            rows = (torch.arange(h) - down).clamp(0, h - 1)
            columns = (torch.arange(w) - right).clamp(0, w - 1)
            batch = batch[:, :, rows[:, None], columns]
        return batch.to(device)
    return prefetch(gather, range(start, stop), depth=4)

# --- The files of a run: checkpoints, scores, curves, images of one's own ---
def claim(folder: Path):
    """A context in which no other process trains in a run's folder. Raises UserError."""
    ours = any((folder / name).exists() for name in ("checkpoint.pt", "model.safetensors"))
    files = (path for path in itertools.chain([folder], folder.rglob("*"))
             if path.is_file() and path.suffix != ".part" and path.name != "run.lock")
    if not ours and any(path.stat().st_size for path in files):
        raise UserError(f"{folder} is not empty, and no run of ours; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        context = FileLock(folder / "run.lock", timeout=1).acquire()
    except Timeout:
        raise UserError(f"{trainer(folder)} trains in {folder}; choose another --out.") from None
    (folder / "run.lock").write_text(f"Process {os.getpid()} on {platform.node()}")
    return context

def trainer(folder: Path) -> str:
    """Which process trains in a run's folder now, or nothing."""
    lock = folder / "run.lock"
    try:
        if os.access(lock, os.W_OK):
            FileLock(lock, timeout=0).acquire().lock.release()
        return ""
    except Timeout:
        return lock.read_text() or "Another process"  # some versions of filelock empty the file

def save(state: dict, file: Path):
    """torch.save, under another name until the file is whole and on the disk."""
    part = file.with_name(f"{file.name}.part")
    with usable(file.parent, "make room there, and the same command goes on"):
        with open(part, "wb") as out:
            torch.save(state, out)
            os.fsync(out.fileno())
        part.replace(file)

def save_checkpoint(folder: Path, state: dict, model):
    """Write log.jsonl as far as `state` goes, the model, and last, as it means that all the rest
    is there, checkpoint.pt."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state["log"]))
    if state["t"] > 0:
        model.save_pretrained(folder)
    save(state, folder / "checkpoint.pt")

def load_checkpoint(folder: Path, config: dict) -> dict:
    """What was saved, or the start of a new run. Raises UserError if it is not this run's."""
    file = folder / "checkpoint.pt"
    if not file.exists() and not (folder / "model.safetensors").exists():
        return {"config": config, "t": 0, "seconds": 0.0, "log": [], "skipped": 0}
    with usable(file, "the run cannot go on, but --eval scores its model; choose another --out"):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        changed = [name for name, value in config.items() if saved["config"].get(name) != value
                   and not name.endswith("_every")]
    if changed and saved["t"]:
        raise UserError(f"{folder} is a run with other settings ({', '.join(changed)}); "
                        "repeat its flags, or choose another --out.")
    return saved | {"config": config}

def print_scores(name: str, runs: dict[str, dict]):
    """Print the mean scores of runs on a set. runs: by name, mean by metric."""
    rows = {title: list(means.values()) for title, means in runs.items()}
    if len(runs) > 1:
        table = list(rows.values())
        rows |= {"mean": np.mean(table, 0), "deviation": np.std(table, 0, ddof=1)}
    print(f"on {name:21}" + "".join(f"{metric:>14}" for metric in next(iter(runs.values()))))
    for title, row in rows.items():
        print(f"{title:24}" + "".join(f"{value:14.2f}" for value in row))
    if "mIoU" not in next(iter(runs.values())):
        print("These scenes have no labels, so there is only the error of the reconstruction.")

PALETTE = np.array([(0, 0, 0), *12 * (colormaps["tab10"].colors + colormaps["Set3"].colors)])[:256]

def show(axis, picture, title: str = ""):
    """Show an image (3, h, w) or (h, w, 3) in [0, 1], or a map (h, w); x and y from -1 to 1."""
    picture = torch.as_tensor(picture).cpu()
    picture = picture.movedim(0, 2).clamp(0, 1) if len(picture) == 3 else picture
    axis.imshow(picture.numpy(), "gray", vmin=0, extent=(-1, 1, 1, -1), interpolation="nearest")
    axis.set_title(title, fontsize=9, pad=3)
    axis.axis("off")

def draw_curves(bounds: dict, log: list, path: Path):
    """Losses and validation scores over the steps of a run. bounds: the first step of each phase,
    and the first one after it. log: the lines of log.jsonl."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 3, 1))
    panels = (("background", "reconstruction", "entropy"), ("mIoU", "ARI-FG", "MSC-FG"), ("lr",))
    for axis, names in zip(axes, panels):
        for name in names:
            points = {line["t"]: line[name] for line in log if line.get(name) is not None}
            axis.plot(points.keys(), points.values(), ".-", ms=3, lw=1, label=name)
        for phase, (first, last) in bounds.items():
            axis.axvspan(first, last, color="gray", alpha=0.1 * (phase - 1), lw=0)
        axis.legend()
    axes[0].set(title="phases 1, 2 and 3, from white to dark", ylabel="loss", yscale="log")
    axes[1].set(ylabel="validation score (%)", ylim=(0, 100))
    axes[2].set(ylabel="learning rate", xlabel="step")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)

def find_images(paths: list, out: Path):
    """{path of what will be written under `out`, without its ending: image}, for images and
    folders of them, and a sentence for each that is left out."""
    images = {}
    failed = []
    for path in map(Path, paths):
        files = [path] if path.is_file() else sorted(filter(is_image, path.rglob("*")))
        if not files:
            failed.append(f"There is no image in {path}; give images or folders.")
        for file in files:
            stem = out / file.relative_to(path.parent if file == path else path).with_suffix("")
            if images.setdefault(stem, file) != file:
                failed.append(f"{file} has the output of {images[stem]}; give it another --out.")
    return images, failed

def segment_files(paths: list, out: Path, model, device) -> list:
    """Write a label map and an overlay of each image, or image in a folder, and objects.json.
    Returns a sentence for each image that has none. model: an ASTSeg."""
    images, failed = find_images(paths, out)
    listing = out / "objects.json"  # there, even if empty, from the first image on
    if out.exists() and not listing.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is not empty, and no output of --segment; choose another --out.")
    with usable(listing, "choose another --out"):
        earlier = dict(json.loads(listing.read_text() or "{}")) if listing.exists() else {}
    side = model.config.size
    objects = {}
    for stem, file in tqdm(images.items(), desc="segmenting", unit="image"):
        try:
            image = Image.fromarray(read_image(file))
        except UserError as error:
            failed.append(str(error))
            continue
        square = torch.from_numpy(np.array(image.resize((side, side), Image.BILINEAR))).to(device)
        fine = model.segment(square.permute(2, 0, 1)[None] / 255, 4 * side, 4 * side)[0]
        flat = Image.fromarray(fine.byte().cpu().numpy()).resize(image.size, Image.NEAREST)
        labels = np.asarray(flat)  # (h, w)
        flat.putpalette((255 * PALETTE).astype(np.uint8).tobytes())
        stem.parent.mkdir(parents=True, exist_ok=True)
        listing.touch()
        flat.save(f"{stem}_labels.png")
        mixed = Image.blend(image, flat.convert("RGB"), 0.5)
        Image.composite(mixed, image, Image.fromarray(labels > 0)).save(f"{stem}_overlay.png")
        objects[file.as_posix()] = []
        for label in np.unique(labels[labels > 0]).tolist():
            pixels = np.argwhere(labels == label)
            y, x = pixels.mean(0) + 0.5
            box = Image.fromarray(labels == label).getbbox()  # left, top, right, bottom
            facts = {"label": label, "area": len(pixels), "box": box, "x": x, "y": y}
            objects[file.as_posix()].append(facts)
    if not objects:
        raise UserError(" ".join(failed[:5]))
    listing.write_text(json.dumps(earlier | objects, indent=1) + "\n")
    return failed
