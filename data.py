"""Every benchmark of the AST-Seg paper and its peers, from the public files, as uint8 images and label maps.

    scenes = load("clevr", "train", data_dir="datasets")  # .images (N, 3, H, W), .labels (N, H, W)
    for images in Batches(scenes, batch_size=64, seed=0, start=0, stop=1000, device="cuda"): ...

`DATASETS` is the table of them. The first use of a set decodes it, as a stream, into `.npy` files, which are
memory maps from then on. Whatever is wrong with a file ends in a `DataError`.
"""

import gzip
import hashlib
import http.client
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = ("test", "val", "train")  # in the order in which they lie in the public files
BYTES = {"unit": "B", "unit_scale": True, "leave": False}  # for progress bars
CACHE_VERSION = 2  # raise it when a change below changes what is decoded or drawn


class DataError(Exception):
    """One sentence for the user: which file, which record or image, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """One benchmark: where its files lie, how they are read, and what the model has to know about it.

    `reader(dataset, path, split, limit)` returns the source files, an iterator over items, and a function
    from an item to its image (h, w, 3) and labels (h, w), uint8: labels None where there are none,
    both None to skip the scene.
    """

    reader: callable
    slots: int  # K, the largest number of objects
    anisotropic: bool  # one scale for each axis instead of one for both
    background: str = "complex"  # architecture of the background model: simple, complex or small
    background_steps: int = 500_000  # length of phase 1
    size: int = 64  # side of the training images, in pixels
    path: str = ""  # public name of the file or folder, directly under DATA_DIR
    source: tuple = (64, 64)  # height and width of the source; () stands for any
    crop: int = 0  # side of the centre square that is kept, in source pixels; 0 for the largest
    splits: tuple = (0, 0, 0)  # published number of scenes in test, val, train
    masks: int = 0  # TFRecord: masks in a record, the background's included
    masks_last: bool = False  # TFRecord: masks lie as (h, w, masks) instead of (masks, h, w)
    background_masks: int = 1  # TFRecord: this many first masks are background
    most_objects: int = 0  # TFRecord: leave scenes of more objects out; 0 keeps all
    draw: callable = None  # drawn sets: (random generator, side) -> image, labels
    urls: tuple = ()  # what to download
    gigabytes: float = 0.0  # size of the download, where it is known


@dataclass(frozen=True)
class Scenes:
    """images: (N, 3, H, W) uint8 RGB; labels: (N, H, W) uint8, 0 = background (all 0 if not `labelled`)."""

    images: np.ndarray
    labels: np.ndarray
    labelled: bool

    def __len__(self) -> int:
        return len(self.images)


def split_bounds(total, published) -> dict[str, range]:
    """Positions of test, val and train among `total` scenes: as published, fewer in the same proportions."""
    total = min(total, sum(published))
    sizes = [max(round(total * part / sum(published)), 1) if part and total else 0 for part in published]
    stops = [min(sizes[0], total), min(sizes[0] + sizes[1], total), total]
    return dict(zip(SPLITS, map(range, [0, *stops], stops)))


def prefetch(function, items, depth, threads=1):
    """Yield function(item) for all items in order, computed by threads up to `depth` items ahead.

    An exception of `function` is raised here. Leaving early ends the threads.
    """
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


# --- Drawn scenes: shapes and Textured Multi-dSprites ---
DISC, TRIANGLE, SQUARE, STAR = range(4)
CORNERS = (1, 3, 4, 5)
UPRIGHT = (0, np.pi * 5 / 6, 0, np.pi / 2)  # the angle at which each of them stands on its base


def paint(image, labels, label, kind, centre, radius, angle, colour, shading):
    """Paint one anti-aliased sprite over image (side, side, 3) in [0, 1] and labels (side, side), in place.

    centre (x, y) and radius in units of half the image, x and y in [-1, 1]; angle in radians. Shading lights
    the sprite from the upper left.
    """
    side = len(labels)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    near = np.abs(pixels - np.float32(centre)[:, None]) < 1.1 * radius + 2 / side  # (2, side), within reach
    columns, rows = (slice(*np.flatnonzero(axis)[[0, -1]] + (0, 1)) for axis in near)
    dx, dy = pixels[None, columns] - np.float32(centre[0]), pixels[rows, None] - np.float32(centre[1])
    sector = np.pi / CORNERS[kind]
    if kind == DISC:
        edge = 0.9 * radius
    else:  # the outline in polar coordinates; `fold`, 0 to `sector`, is the angle from the middle of a side
        fold = np.abs((np.arctan2(dy, dx) + angle) / (2 * sector) % 1 - 0.5) * 2 * sector
        outline = 0.5 + 0.5 * fold / sector if kind == STAR else np.cos(sector) / np.cos(sector - fold)
        edge = 1.1 * radius * outline
    cover = np.clip(0.5 - (np.hypot(dx, dy) - edge) * side / 2, 0, 1)
    light = 1 - shading * (dx + dy)[..., None] / radius
    patch = image[rows, columns]
    patch += cover[..., None] * (np.clip(np.asarray(colour, np.float32) * light, 0, 1) - patch)
    labels[rows, columns][cover > 0.5] = label


def place(rng, radius, placed, gap):
    """A random centre, `gap` times the sum of the radii away from all `placed` (x, y, radius) if it fits."""
    for _ in range(200):
        x, y = rng.uniform(radius - 1, 1 - radius, 2)
        if all(np.hypot(x - x0, y - y0) > gap * (radius + r0) for x0, y0, r0 in placed):
            break
    placed.append((x, y, radius))
    return x, y


def draw_shapes(rng, side):
    """2-4 shaded shapes of different hues, which may overlap a little, on a grey backdrop lit from a side."""
    count = rng.integers(2, 5)
    hues = (rng.random() + (rng.permutation(count) + rng.uniform(-0.2, 0.2, count)) / count) % 1
    tint, slope, level = rng.uniform(-0.03, 0.03, 3), rng.uniform(-0.15, 0.15, 2), rng.uniform(0.35, 0.6)
    x = np.linspace(1 / side - 1, 1 - 1 / side, side)
    image = (level + tint + (slope[0] * x + slope[1] * x[:, None])[..., None]).astype(np.float32)
    labels, placed = np.zeros((side, side), np.uint8), []
    for label in range(1, count + 1):
        radius = rng.uniform(0.2, 0.34)
        centre = place(rng, radius, placed, gap=0.75)
        kind, tilt = rng.integers(4), rng.uniform(-0.2, 0.2)
        colour = hsv_to_rgb((hues[label - 1], rng.uniform(0.6, 1), rng.uniform(0.75, 1)))
        paint(image, labels, label, kind, centre, radius, UPRIGHT[kind] + tilt, colour, shading=0.25)
    return (image * 255 + 0.5).astype(np.uint8), labels


def draw_tm_dsprites(rng, side):
    """Textured Multi-dSprites (DRC supplement, A.5): 2-3 sprites on one of 20 sinusoidal textures, shifted.

    The text gives no numbers. Ours: 2, 4, 6 or 8 waves, five orientations, sprites a quarter image wide.
    """
    waves, orientation = 2 + 2 * rng.integers(4), np.pi * rng.integers(5) / 5
    x = np.linspace(0, 2 * np.pi * waves, side)
    texture = np.sin(x * np.cos(orientation) + x[:, None] * np.sin(orientation) + rng.uniform(0, 2 * np.pi))
    image = np.repeat((0.5 + 0.3 * texture).astype(np.float32)[..., None], 3, axis=2)
    labels, placed, radius = np.zeros((side, side), np.uint8), [], 0.25
    for label in range(1, rng.integers(3, 5)):
        kind, colour = rng.integers(3), hsv_to_rgb((rng.random(), 1, 1))
        centre = place(rng, radius, placed, gap=1.1)
        paint(image, labels, label, kind, centre, radius, UPRIGHT[kind], colour, shading=0)
    return (image * 255 + 0.5).astype(np.uint8), labels


def read_drawn(dataset, path, split, limit):
    """Scene i of a split is a function of (split, i) alone: run seeds do not change a benchmark."""
    stream = {"train": 0, "test": 1, "val": 2}[split]
    indices = tqdm(range(dataset.splits[SPLITS.index(split)]), unit=" scenes", leave=False, delay=1)
    return [], indices, lambda i: dataset.draw(np.random.default_rng((0, stream, i)), dataset.source[0])


# --- TFRecord files ---
LARGEST_RECORD = 1 << 26  # bytes; one of CLEVR has 3.2 million


@lru_cache
def crc_tables(level):
    """(2, 65536) uint32: what the lower and upper half of a CRC-32C register become 2**level words on."""
    if level:
        return crc_shift(crc_tables(level - 1), level - 1)
    registers = np.arange(1 << 16, dtype=np.uint32) << np.array([[0], [16]], np.uint32)
    for _ in range(32):
        registers = (registers >> 1) ^ (registers & 1) * np.uint32(0x82F63B78)  # the polynomial of Castagnoli
    return registers


def crc_shift(registers, level):
    """CRC registers 2**level zero words of 32 bits later."""
    lower, upper = crc_tables(level)
    return lower[registers & 0xFFFF] ^ upper[registers >> 16]


def masked_crc(data):
    """The masked CRC-32C of a TFRecord, in 20 numpy steps for a CLEVR record (20 ms; a plain loop: 0.5 s).

    A CRC is linear: the first half of a message can be folded onto the second. Zeros in front change nothing.
    """
    level = max(len(data) - 1, 4).bit_length() - 2
    message = np.zeros(4 << level, np.uint8)
    message[-len(data):] = np.frombuffer(data, np.uint8)
    message[-len(data):][:4] ^= 0xFF  # a register starts with all bits set
    words = message.view("<u4")
    for level in reversed(range(level)):
        words = crc_shift(words[:1 << level], level) ^ words[1 << level:]
    crc = int(crc_shift(words, 0)[0]) ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@contextmanager
def readable(path, what):
    """Turn what reading a damaged or cut file raises into a DataError."""
    try:
        yield
    except (ValueError, LookupError, EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise DataError(f"{path}: {what} is damaged or foreign ({error}); delete it and run again.") from None


def read_stream(path, check_data):
    """Yield the records: length (uint64), masked CRC of the length, data, masked CRC of the data."""
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, **BYTES) as bar:
        packed = file.read(2) == b"\x1f\x8b"  # the public files are, but some tools hand them out inflated
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        for number in itertools.count():
            with readable(path, f"record {number}"):
                header = stream.read(12)
                if number and not header:
                    return
                if len(header) < 12 or masked_crc(header[:8]) != int.from_bytes(header[8:], "little"):
                    raise ValueError("no record starts here")
                length = int.from_bytes(header[:8], "little")
                record = stream.read(length + 4) if length <= LARGEST_RECORD else b""
                if len(record) < length + 4:
                    raise ValueError(f"{length} bytes announced, not all there")
                data, crc = record[:-4], int.from_bytes(record[-4:], "little")
                # the end of a gzip stream vouches for its bytes, at less cost, where we get there
                if (check_data or not packed) and masked_crc(data) != crc:
                    raise ValueError("wrong checksum")
            yield data
            bar.update(file.tell() - bar.n)


def feature(data, name, tags, size):
    """The `size` bytes of values of a feature in a tf.train.Example, as (size,) uint8.

    They follow a header of known bytes, nested pairs of tag and length, so one search finds them whatever the
    order of the features. A general parser would visit each of the million strings of a CLEVR record.
    """
    def varint(value):  # seven bits a byte, the lowest first
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    header = b""
    for tag in tags:
        header = tag + varint(len(header) + size) + header
    header = b"\n" + varint(len(name)) + name + header
    start = data.find(header) + len(header)
    if start < len(header) or start + size > len(data):
        raise ValueError(f"no '{name.decode()}' with the number of values that belongs there")
    return np.frombuffer(data, np.uint8, size, start)


def pixel_values(data, name, shape):
    """A feature of one-byte strings -> uint8 array. Each takes three bytes: tag 10, length 1, the value."""
    triples = feature(data, name, (b"\n", b"\x12"), 3 * int(np.prod(shape))).reshape(*shape, 3)
    if (triples[..., 0] != 10).any() or (triples[..., 1] != 1).any():
        raise ValueError(f"'{name.decode()}' does not hold single bytes")
    return triples[..., 2]


def decode_record(dataset, data):
    """A tf.train.Example -> image (h, w, 3), labels (h, w); None, None where it holds too many objects."""
    if dataset.most_objects:  # `visibility` has a float for the background and for each object
        visible = feature(data, b"visibility", (b"\n", b"\x12", b"\x12"), 4 * dataset.masks).view("<f4")
        if np.count_nonzero(visible) - 1 > dataset.most_objects:
            return None, None
    image = pixel_values(data, b"image", (*dataset.source, 3))
    if dataset.masks_last:
        masks = np.moveaxis(pixel_values(data, b"mask", (*dataset.source, dataset.masks)), 2, 0)
    else:
        masks = pixel_values(data, b"mask", (dataset.masks, *dataset.source))
    labels = np.zeros(dataset.source, np.uint8)
    for index in reversed(range(dataset.masks)):  # where masks overlap the first one wins, as in an arg-max
        np.copyto(labels, max(0, index + 1 - dataset.background_masks), where=masks[index] > 127)
    return image, labels


def read_records(dataset, path, split, limit):
    """A TFRecord file: all splits at once, since a short file tells only at its end where they lie.

    With a limit one split alone, for which a short file is read twice.
    """
    def items():
        wanted = range(sum(dataset.splits))
        if limit:
            published = path.stat().st_size > 0.9e9 * dataset.gigabytes > 0
            total = len(wanted) if published else sum(1 for _ in read_stream(path, check_data=False))
            wanted = split_bounds(total, dataset.splits)[split]
        for number, data in enumerate(read_stream(path, check_data=bool(limit))):
            if number in wanted:
                yield number, data
            elif limit and number >= wanted.stop:
                return

    def decode(item):
        with readable(path, f"record {item[0]}"):
            return decode_record(dataset, item[1])

    if not path.exists():
        download(dataset, path)
    return [path], items(), decode


# --- Image files ---
def open_image(path):
    """A whole, checked Pillow image, turned upright as its EXIF data say."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of a PNG, which decoding alone skips
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise DataError(f"{path}: missing or no readable image ({error}); replace it.") from None


def read_image(path):
    """(h, w, 3) uint8 RGB of an image of any mode; transparency is dropped."""
    image = open_image(path)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion would clip at 255
        return np.stack([np.clip(np.asarray(image) / 257 + 0.5, 0, 255).astype(np.uint8)] * 3, axis=2)
    return np.asarray(image.convert("RGB"))


def read_labels(path):
    """(h, w) uint8: the palette index or grey value of the label map."""
    image = open_image(path)
    if path.suffix == ".map":  # ShapeStacks by GENESIS: a PNG despite its name, label = first channel / 32
        return np.asarray(image.convert("RGB"))[..., 0] // 32
    labels = np.asarray(image)
    if labels.ndim != 2 or labels.max(initial=0) > 255:
        raise DataError(f"{path}: no label map, a palette or grey image of values up to 255; replace it.")
    return labels.astype(np.uint8)


def read_pairs(dataset, pairs):
    """The result of a reader for a list of (image path, label path or None)."""
    def decode(pair):
        image, labels = read_image(pair[0]), read_labels(pair[1]) if pair[1] else None
        expected = dataset.source or image.shape[:2]
        for path, pixels in zip(pair, (image, labels)):
            if path and pixels.shape[:2] != expected:
                raise DataError(f"{path}: height, width are {pixels.shape[:2]}, not {expected}; replace it.")
        return image, labels

    files = [path for pair in pairs for path in pair if path and path.exists()]
    return files, tqdm(pairs, unit=" images", leave=False, delay=1), decode


def read_clevrtex(dataset, path, split, limit):
    """ClevrTex, Camo, OOD: <folder>/NAME_000123.png beside NAME_000123_flat.png, split by their numbers."""
    if not path.is_dir():
        download(dataset, path)
    images = sorted((p for p in path.glob("*/*.png") if not p.stem.endswith("_flat")), key=lambda p: p.name)
    chosen = [images[i] for i in split_bounds(len(images), dataset.splits)[split]]
    return read_pairs(dataset, [(image, image.with_name(f"{image.stem}_flat.png")) for image in chosen])


def read_shapestacks(dataset, path, split, limit):
    """ShapeStacks: every view of the scenarios listed in splits/default, with the label maps of GENESIS."""
    listing = path / "splits/default" / f"{'eval' if split == 'val' else split}.txt"
    for needed in (path / "recordings", path / "iseg", listing):
        if not needed.exists():
            raise DataError(
                f"{needed} is missing: unpack http://shapestacks-file.robots.ox.ac.uk/static/download/v1/"
                f"shapestacks-{{meta,rgb}}.tar.gz into {path}, and as iseg/ there the labels from the Google "
                "Drive that the README of github.com/applied-ai-lab/genesis links (it takes a browser).")
    pairs = []
    for scenario in listing.read_text().split():
        for image in sorted((path / "recordings" / scenario).glob("rgb-*-cam_*.png")):
            labels = f"iseg-w=0-f=0-l=0-c=original-cam_{image.stem.split('-cam_')[1]}.map"
            pairs.append((image, path / "iseg" / scenario / labels))
    return read_pairs(dataset, pairs)


def read_folder(dataset, path, split, limit):
    """Any tree of images, label maps NAME_mask.png beside all or none, split 80/10/10 by hashes of names."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    images = [p for p in path.rglob("*") if p.suffix.lower() in suffixes and not p.stem.endswith("_mask")]
    images.sort(key=lambda p: digest(p.relative_to(path).as_posix()))
    masks = [p.with_name(f"{p.stem}_mask.png") for p in images]
    missing = [mask for mask in masks if not mask.exists()]
    if 0 < len(missing) < len(masks):
        raise DataError(f"{missing[0]}: this label map is missing; give all images one, or none.")
    pairs = list(zip(images, [None] * len(images) if missing else masks))
    bounds = split_bounds(len(pairs), (len(pairs), len(pairs), 8 * len(pairs)))
    return read_pairs(dataset, [pairs[i] for i in bounds[split]])


# --- Download ---
def download(dataset, path):
    """Fetch the files of a set, unpack archives and delete them; `path` appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.parent / url.rsplit("/", 1)[1] for url in dataset.urls]
    for url, file in zip(dataset.urls, files):
        if not file.exists():
            fetch(url, file)
    if files == [path]:
        return
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=path.parent) as folder:
        for file in tqdm(files, desc="unpacking", leave=False):
            with readable(file, "the archive"), tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")  # writes nothing outside of `folder`
        os.replace(Path(folder, path.name), path)
    for file in files:
        file.unlink()


def fetch(url, file):
    """Download `url` to `file` by way of FILE.part, going on where an earlier attempt stopped."""
    part, problem = file.with_name(f"{file.name}.part"), None
    for _ in range(5):  # a connection that is cut is taken up again
        part.touch()
        done = part.stat().st_size
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
            with urllib.request.urlopen(request, timeout=30) as reply:
                done = done if reply.status == 206 else 0  # a server without Range starts from the beginning
                total = done + int(reply.headers["Content-Length"] or 0)
                print(f"downloading {url} ({total / 1e9:.1f} GB) to {file}", flush=True)
                if shutil.disk_usage(file.parent).free < 2 * total - done:  # the file, and what is made of it
                    raise DataError(f"{file}: needs {2 * total / 1e9:.1f} GB of free disk; make room there.")
                with open(part, "r+b") as out, tqdm(total=total, **BYTES) as bar:
                    out.truncate(out.seek(done))
                    while block := reply.read(1 << 20):
                        out.write(block)
                        bar.update(out.tell() - bar.n)
            if part.stat().st_size == total:
                return os.replace(part, file)
            problem = "the connection broke off again and again"
        except (http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError) as error:
            problem = error
            if isinstance(error, urllib.error.URLError):
                if getattr(error, "code", 0) != 416:  # 416: the part is longer than the file
                    break
                part.unlink()
    raise DataError(f"{url}: {problem}; run again to go on, or download it to {file} yourself.")


# --- The table ---
BUCKET = "https://storage.googleapis.com/multi-object-datasets"
OXFORD = "https://thor.robots.ox.ac.uk/datasets/clevrtex"

CLEVR = Dataset(
    read_records, slots=10, anisotropic=False, background="simple", background_steps=2500, size=128, crop=192,
    path="clevr_with_masks_train.tfrecords", source=(240, 320), masks=11, splits=(10_000, 10_000, 50_000),
    urls=(f"{BUCKET}/clevr_with_masks/clevr_with_masks_train.tfrecords",), gigabytes=10.5)
CLEVRTEX = Dataset(
    read_clevrtex, slots=10, anisotropic=True, size=128, crop=192, path="clevrtex_full", source=(240, 320),
    splits=(5000, 5000, 40_000), urls=tuple(f"{OXFORD}/clevrtex_full_part{i}.tar.gz" for i in range(1, 6)))
DATASETS = {
    "shapes": Dataset(
        read_drawn, slots=5, anisotropic=False, background="small", splits=(320, 320, 8192),
        draw=draw_shapes),
    "tm_dsprites": Dataset(
        read_drawn, slots=3, anisotropic=False, size=128, source=(128, 128), splits=(1000, 1000, 18_000),
        draw=draw_tm_dsprites),
    "clevr": CLEVR,
    "clevr6": replace(CLEVR, slots=6, most_objects=6),
    "clevrtex": CLEVRTEX,
    "camo": replace(
        CLEVRTEX, path="clevrtex_camo", splits=(2000, 2000, 16_000),
        urls=(f"{OXFORD}/clevrtex_camo.tar.gz",)),
    "ood": replace(
        CLEVRTEX, path="clevrtex_outd", splits=(10_000, 0, 0), urls=(f"{OXFORD}/clevrtex_outd.tar.gz",)),
    "objects_room": Dataset(
        read_records, slots=3, anisotropic=True, path="objects_room_train.tfrecords", masks=7,
        background_masks=4, splits=(10_000, 10_000, 980_000),
        urls=(f"{BUCKET}/objects_room/objects_room_train.tfrecords",), gigabytes=7),
    "shapestacks": Dataset(
        read_shapestacks, slots=6, anisotropic=False, path="shapestacks", source=(224, 224), crop=196),
    "multi_dsprites": Dataset(
        read_records, slots=4, anisotropic=False, path="multi_dsprites_colored_on_colored.tfrecords", masks=5,
        masks_last=True, splits=(10_000, 10_000, 40_000),
        urls=(f"{BUCKET}/multi_dsprites/multi_dsprites_colored_on_colored.tfrecords",)),
    "tetrominoes": Dataset(
        read_records, slots=3, anisotropic=False, background="simple", background_steps=2500, source=(35, 35),
        path="tetrominoes_train.tfrecords", masks=4, splits=(10_000, 10_000, 40_000),
        urls=(f"{BUCKET}/tetrominoes/tetrominoes_train.tfrecords",)),
    "folder": Dataset(read_folder, slots=10, anisotropic=True, size=128, source=()),
}


# --- Cache and loading ---
def digest(value):
    """A short name for any value."""
    return hashlib.sha1(repr(value).encode()).hexdigest()[:12]


def cache_root(data_dir):
    """DATA_DIR/.cache, or a folder of the user's own cache where DATA_DIR is marked read-only."""
    if data_dir.exists() and not (data_dir.stat().st_mode & 0o222 and os.access(data_dir, os.W_OK)):
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(user, "ast_seg", digest(str(data_dir.resolve())))
    return data_dir / ".cache"


def open_cache(folder):
    """(info, images, labels) of a finished cache, the arrays as memory maps; None where there is none."""
    try:
        info = json.loads((folder / "info.json").read_text())
        return info, *(np.load(folder / name, mmap_mode="r") for name in ("images.npy", "labels.npy"))
    except (OSError, ValueError):
        return None


def fit(pixels, dataset):
    """The centre square of an image (h, w, 3) or labels (h, w) in the size of the set, channels first."""
    if pixels is None:
        return None
    height, width = pixels.shape[:2]
    side = dataset.crop or min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top:top + side, left:left + side]))
    resized = square.resize((dataset.size,) * 2, Image.BILINEAR if pixels.ndim == 3 else Image.NEAREST)
    return np.moveaxis(np.asarray(resized), -1, 0) if pixels.ndim == 3 else np.asarray(resized)


def write_arrays(folder, dataset, items, decode, limit):
    """Stream scenes into images.npy and labels.npy; return positions kept, of how many, whether labelled."""
    kept, total, labelled = [], 0, False
    with open(folder / "images.npy", "wb") as image_file, open(folder / "labels.npy", "wb") as label_file:
        for file in (image_file, label_file):
            file.seek(128)  # numpy pads its header to this length, whatever the number of scenes
        scenes = prefetch(lambda item: [fit(pixels, dataset) for pixels in decode(item)], items,
                          depth=8, threads=os.cpu_count())
        for total, (image, labels) in enumerate(scenes, 1):
            if image is None:
                continue
            kept.append(total - 1)
            labelled = labels is not None
            image_file.write(image.tobytes())
            label_file.write(labels.tobytes() if labelled else bytes(dataset.size ** 2))
            if len(kept) == limit:
                break
        for file, shape in (image_file, (3, dataset.size, dataset.size)), (label_file, (dataset.size,) * 2):
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (len(kept), *shape)})
    return kept, total, labelled


def build_cache(folder, dataset, items, decode, limit, split):
    """Decode into `folder`, which appears only when it is whole: nothing stays behind after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        kept, total, labelled = write_arrays(new, dataset, items, decode, limit)
        parts = {split: range(total)} if split else split_bounds(total, dataset.splits)
        splits = {name: np.searchsorted(kept, (at.start, at.stop)).tolist() for name, at in parts.items()}
        (new / "info.json").write_text(json.dumps({"splits": splits, "labelled": labelled}))
        for old in folder.parent.glob(folder.name.rsplit("-", 1)[0] + "-*"):  # of a source that has changed
            if open_cache(folder) is None or old != folder:
                shutil.rmtree(old, ignore_errors=True)
        if kept:
            with suppress(OSError):  # another process was faster
                os.replace(new, folder)


def load(name, split, data_dir="datasets", limit=None, size=None):
    """Scenes: the first `limit` (default: all) of the train, val or test split of a set of the table.

    Looks under `data_dir`, downloads what a program can fetch, decodes on the first use. size: side of the
    images in pixels, the set's own by default. Raises DataError.
    """
    if name not in DATASETS or split not in SPLITS:
        raise DataError(f"{name}, {split}: sets are {', '.join(DATASETS)}, splits {', '.join(SPLITS)}.")
    data_dir, dataset = Path(data_dir), replace(DATASETS[name], size=size or DATASETS[name].size)
    path = data_dir / dataset.path
    try:
        files, items, decode = dataset.reader(dataset, path, split, limit)
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        part = split if limit or dataset.reader is not read_records else None  # None: all splits together
        version = digest((CACHE_VERSION, facts))
        folder = cache_root(data_dir) / f"{name}-{dataset.size}-{part}-{limit}-{version}"
        if open_cache(folder) is None:
            minutes = sum(fact[1] for fact in facts) / 15e6 / 60
            print(f"preparing {name} once, about {minutes:.1f} minutes, in {folder}", flush=True)
            build_cache(folder, dataset, items, decode, limit, part)
        cache = open_cache(folder)
    except OSError as error:
        raise DataError(f"{name}: {error}; check the path, permissions and room on the disk.") from None
    start, stop = cache[0]["splits"][split] if cache else (0, 0)
    if start == stop:
        raise DataError(f"{path}: nothing there for the split '{split}' of {name}.")
    info, images, labels = cache
    return Scenes(images[start:stop], labels[start:stop], info["labelled"])


# --- Batches ---
@lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    """A permutation of range(count)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count, batch_size, seed, step):
    """(batch_size,) int64: which of `count` scenes make the batch at `step`, by the arguments alone.

    Each epoch is a new permutation less its last incomplete batch. Too few scenes: with replacement.
    """
    if count < batch_size:
        return np.random.default_rng((seed, step)).integers(count, size=batch_size)
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]


class Batches:
    """Iterate over the batches of steps start..stop - 1: (batch_size, 3, H, W) uint8 tensors on `device`.

    A thread gathers ahead of the training step; `waited` counts the seconds in which it was not fast enough.
    """

    def __init__(self, scenes, batch_size, seed, start, stop, device):
        self.images, self.batch_size, self.seed = np.asarray(scenes.images), batch_size, seed
        self.steps, self.device, self.waited = range(start, stop), torch.device(device), 0.0

    def gather(self, step):
        chosen = batch_indices(len(self.images), self.batch_size, self.seed, step)
        batch = torch.from_numpy(self.images[chosen])
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # only then does the copy run beside the computation
        return batch.to(self.device, non_blocking=True)

    def __iter__(self):
        batches = prefetch(self.gather, self.steps, depth=4)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch
