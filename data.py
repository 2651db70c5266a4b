"""Every benchmark of the AST-Seg paper and its peers, from the public files, as uint8 images and label maps.

    scenes = load("clevr", "train", data_dir="datasets")  # .images (N, 3, H, W), .labels (N, H, W)
    for images in batches(scenes, batch_size=64, seed=0, start=0, stop=1000, device="cuda"): ...

`DATASETS` is their table. The first use decodes a set into a `.npy` file, from then on a memory map.
"""
import gzip
import http.client
import itertools
import os
import re
import shutil
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = ("test", "val", "train")  # in the order in which they lie in the public files
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of images
CACHE_VERSION = 4  # raise it when a change below changes what is decoded or drawn

class DataError(Exception):
    """One sentence for the user: which file, which record or image, and what to do."""

@dataclass(frozen=True)
class Dataset:
    """One benchmark: where its files lie, how they are read, and what the model has to know about it.
    `reader(dataset, path, split)` returns the source files, the items, and a function from an item to image
    (h, w, 3) and labels (h, w), uint8: labels None where there are none, image None to leave the scene out.
    """
    reader: callable
    slots: int  # K, the largest number of objects (shapes: two more)
    anisotropic: bool = False  # one scale for each axis instead of one for both
    background: str = "complex"  # architecture of the background model: simple, complex or small
    size: int = 64  # side of the training images, in pixels
    path: str = ""  # public name of the file or folder under DATA_DIR
    url: str = ""  # where it is published
    archives: tuple = ()  # the files there that hold the folder
    source: tuple = (64, 64)  # height and width of the source; () stands for any
    crop: int = 0  # side of the centre square that is kept, in source pixels; 0 for the largest
    splits: tuple = (1, 1, 8)  # published number of scenes in test, val, train, or their proportions
    masks: int = 0  # TFRecord: masks in a record, the background's included
    mask_axis: int = 0  # TFRecord: which axis counts them, 0: (masks, h, w), 2: (h, w, masks)
    background_masks: int = 1  # TFRecord: this many first masks are background
    most_objects: int = 0  # TFRecord: leave scenes of more objects out; 0 keeps all
    gigabytes: float = np.inf  # TFRecord: size of the public file, where we know it

@dataclass(frozen=True)
class Scenes:
    """images: (N, 3, H, W) uint8 RGB; labels: (N, H, W) uint8, 0 = background, all 0 if not `labelled`."""
    images: np.ndarray
    labels: np.ndarray
    labelled: bool = True

    def __len__(self):
        return len(self.images)

def split_bounds(total, published):
    """Positions of test, val and train among `total` scenes: as published, fewer in the same proportions."""
    sizes = [max(round(total * part / sum(published)), 1) if part else 0 for part in published]
    stops = [min(stop, total) for stop in (sizes[0], sizes[0] + sizes[1], total)]
    return dict(zip(SPLITS, map(range, [0, *stops], stops)))

@contextmanager
def readable(path, what):
    """Turn whatever a damaged file raises, with Pillow almost anything, into a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path}: {what} cannot be read ({error}); if damaged, replace or remove.") from error

def prefetch(function, items, depth, threads=1):
    """Yield function(item) for all items in order, computed by threads up to `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

# --- Drawn scenes: shapes and Textured Multi-dSprites ---
DISC, TRIANGLE, SQUARE, STAR = range(4)
CORNERS = (1, 3, 4, 5)
UPRIGHT = (0, np.pi * 5 / 6, 0, np.pi / 2)  # the angle at which each of them stands on its base

def paint(image, labels, label, kind, centre, radius, tilt, colour, shading):
    """Paint one anti-aliased sprite over image (side, side, 3) in [0, 1] and labels (side, side), in place.
    centre (x, y) in [-1, 1] and radius in half images; tilt in radians; lit from the upper left."""
    side = len(labels)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    dx, dy = pixels - np.float32(centre[0]), pixels[:, None] - np.float32(centre[1])
    edge, sector = 0.9 * radius, np.pi / CORNERS[kind]
    if kind != DISC:  # the outline in polar coordinates; `fold`: the angle from the middle of a side
        fold = np.abs((np.arctan2(dy, dx) + (UPRIGHT[kind] + tilt)) / (2 * sector) % 1 - 0.5) * 2 * sector
        outline = 0.5 + 0.5 * fold / sector if kind == STAR else np.cos(sector) / np.cos(sector - fold)
        edge = 1.1 * radius * outline
    cover = np.clip(0.5 - (np.hypot(dx, dy) - edge) * side / 2, 0, 1)
    light = 1 - shading * (dx + dy)[..., None] / radius
    image += cover[..., None] * (np.clip(np.asarray(colour, np.float32) * light, 0, 1) - image)
    labels[cover > 0.5] = label

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
    for label, hue in enumerate(hues, 1):
        radius = rng.uniform(0.2, 0.34)
        centre = place(rng, radius, placed, gap=0.75)
        kind, tilt = rng.integers(4), rng.uniform(-0.2, 0.2)
        colour = hsv_to_rgb((hue, rng.uniform(0.6, 1), rng.uniform(0.75, 1)))
        paint(image, labels, label, kind, centre, radius, tilt, colour, shading=0.25)
    return image, labels

def draw_tm_dsprites(rng, side):
    """Textured Multi-dSprites (DRC supplement, A.5): 2-3 sprites on one of 20 sinusoidal textures, shifted.
    The numbers are ours: 2, 4, 6 or 8 waves in five orientations, sprites a quarter image wide."""
    waves, angle = 2 + 2 * rng.integers(4), np.pi * rng.integers(5) / 5
    x = np.linspace(0, 2 * np.pi * waves, side)
    texture = np.sin(x * np.cos(angle) + x[:, None] * np.sin(angle) + rng.uniform(0, 2 * np.pi))
    image = np.repeat((0.5 + 0.3 * texture).astype(np.float32)[..., None], 3, axis=2)
    labels, placed, radius = np.zeros((side, side), np.uint8), [], 0.25
    for label in range(1, rng.integers(3, 5)):
        kind, colour = rng.integers(3), hsv_to_rgb((rng.random(), 1, 1))
        paint(image, labels, label, kind, place(rng, radius, placed, gap=1.1), radius, 0, colour, shading=0)
    return image, labels

def read_drawn(draw, dataset, path, split):
    """Scene i of a split is a function of (split, i) alone: run seeds do not change a benchmark."""
    def decode(i):
        stream = {"train": 0, "test": 1, "val": 2}[split]
        image, labels = draw(np.random.default_rng((0, stream, i)), dataset.source[0])
        return (image * 255 + 0.5).astype(np.uint8), labels
    return [], tqdm(range(dataset.splits[SPLITS.index(split)]), leave=False, delay=1), decode

# --- TFRecord files ---
@lru_cache
def crc_shift(level):
    """A function from CRC-32C registers, uint32, to what they are 2**level zero words of 32 bits later."""
    registers = np.arange(1 << 16, dtype=np.uint32) << np.array([[0], [16]], np.uint32)  # lower, upper halves
    for _ in range(2 if level else 32):  # twice half the way, or bit by bit
        registers = (crc_shift(level - 1)(registers) if level else
                     (registers >> 1) ^ (registers & 1) * np.uint32(0x82F63B78))  # Castagnoli's polynomial
    lower, upper = registers
    return lambda registers: lower[registers & 0xFFFF] ^ upper[registers >> 16]

def masked_crc(data):
    """The masked CRC-32C of a TFRecord, in 20 numpy steps for a CLEVR record (20 ms; a plain loop: 0.5 s).
    A CRC is linear: the first half of a message is folded onto the second. Zeros in front change nothing."""
    level = max(len(data) - 1, 4).bit_length() - 2
    message = np.zeros(4 << level, np.uint8)
    message[-len(data):] = np.frombuffer(data, np.uint8)
    message[-len(data):][:4] ^= 0xFF  # a register starts with all bits set
    words = message.view("<u4")
    for level in reversed(range(level)):
        words = crc_shift(level)(words[:1 << level]) ^ words[1 << level:]
    crc = int(crc_shift(0)(words)[0]) ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

def read_stream(path, packed):
    """Yield (number, data, masked CRC of data). A record is: length (uint64), masked CRC of it, data, CRC."""
    with (open(path, "rb") as file,
          tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False) as bar):
        stream = gzip.GzipFile(fileobj=file) if packed else file
        for number in itertools.count():
            with readable(path, f"record {number}"):
                header = stream.read(12)
                if number and not header:
                    return
                length = int.from_bytes(header[:8], "little")
                if len(header) < 12 or masked_crc(header[:8]) != int.from_bytes(header[8:], "little"):
                    raise ValueError("no record starts here")
                record = stream.read(length + 4) if length < 1 << 26 else b""  # CLEVR's: 3.2 million bytes
                if len(record) < length + 4:
                    raise ValueError(f"{length} bytes announced, not all there")
            yield number, record[:-4], int.from_bytes(record[-4:], "little")
            bar.update(file.tell() - bar.n)

def feature(data, name, tags, size):
    """The `size` bytes of values of a feature in a tf.train.Example, (size,) uint8. They follow its name and
    pairs of tag and length, so one search finds them whatever the order of the features. A general parser
    would visit each of the million strings of a CLEVR record."""
    key = b"\n%c%b" % (len(name), name)
    lengths = b"".join(b"%c([\x80-\xff]{0,9}[\x00-\x7f])" % tag for tag in tags)  # 7 bits each, lowest first
    found = re.compile(key + lengths).match(data, max(data.find(key), 0))
    length = found and sum((byte & 127) << 7 * i for i, byte in enumerate(found[len(tags)]))
    if length != size or found.end() + size > len(data):
        raise ValueError(f"no '{name.decode()}' with the number of values that belongs there")
    return np.frombuffer(data, np.uint8, size, found.end())

def pixel_values(data, name, shape):
    """A feature of one-byte strings -> uint8 array. Each takes three bytes: tag 10, length 1, the value."""
    triples = feature(data, name, b"\x12\n", 3 * int(np.prod(shape))).reshape(*shape, 3)
    if (triples[..., 0] != 10).any() or (triples[..., 1] != 1).any():
        raise ValueError(f"'{name.decode()}' does not hold single bytes")
    return triples[..., 2]

def decode_record(dataset, data):
    """A tf.train.Example -> image (h, w, 3), labels (h, w); None, None where it holds too many objects."""
    if dataset.most_objects:  # `visibility` has a float for the background and for each object
        visible = feature(data, b"visibility", b"\x12\x12\n", 4 * dataset.masks).view("<f4")
        if np.count_nonzero(visible) - 1 > dataset.most_objects:
            return None, None
    shape, labels = [*dataset.source], np.zeros(dataset.source, np.uint8)
    shape.insert(dataset.mask_axis, dataset.masks)
    masks = np.moveaxis(pixel_values(data, b"mask", shape), dataset.mask_axis, 0)
    for index in reversed(range(dataset.masks)):  # where masks overlap the first one wins, as in an arg-max
        np.copyto(labels, max(0, index + 1 - dataset.background_masks), where=masks[index] > 127)
    return pixel_values(data, b"image", (*dataset.source, 3)), labels

def read_records(dataset, path, split):
    """A TFRecord file: one split, or all of them where `split` is None.
    A gzip stream read to its end vouches for its bytes; otherwise the checksum of each record is computed."""
    packed = np.fromfile(path, np.uint8, 2).tobytes() == b"\x1f\x8b"  # some tools hand the files out inflated

    def items():
        at = range(sum(dataset.splits))
        if split:
            public = packed and path.stat().st_size > 0.9e9 * dataset.gigabytes
            total = at.stop if public else sum(1 for _ in read_stream(path, packed))
            at = split_bounds(min(total, at.stop), dataset.splits)[split]
        stream = read_stream(path, packed)
        yield from itertools.islice(stream, at.start, at.stop)
        deque(() if split else stream, maxlen=0)  # on to its end, where gzip has a checksum of everything

    def decode(record):
        number, data, crc = record
        with readable(path, f"record {number}"):
            if (split or not packed) and masked_crc(data) != crc:
                raise ValueError("wrong checksum")
            return decode_record(dataset, data)
    return [path], items(), decode

# --- Image files ---
def read_image(path, size, is_labels=False):
    """(h, w, 3) uint8 RGB of an image of any mode, less its transparency; (h, w) uint8 of a label map.
    size: the (h, w) it must have; () stands for any."""
    with readable(path, "the image"):
        Image.open(path).verify()  # the checksums of a PNG, which decoding alone skips
        image = Image.open(path)
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.asarray(image)
        if size and pixels.shape[:2] != size:
            raise ValueError(f"its height and width are {pixels.shape[:2]} instead of {size}")
        if path.suffix == ".map":  # ShapeStacks by GENESIS: a PNG, label = first channel / 32
            return np.asarray(image.convert("RGB"))[..., 0] // 32
        if is_labels and (pixels.ndim != 2 or pixels.max(initial=0) > 255):
            raise ValueError("labels are the indices of a palette or grey values, up to 255")
        if image.mode.startswith("I") and not is_labels:  # 16-bit grey; Pillow's conversion would clip it
            image = Image.fromarray((pixels / 257 + 0.5).clip(0, 255).astype(np.uint8))
        return np.asarray(pixels if is_labels or image.mode == "RGB" else image.convert("RGB"), np.uint8)

def read_pairs(dataset, pairs):
    """The result of a reader for a list of (image path, label path or None)."""
    def decode(pair):
        image = read_image(pair[0], dataset.source)
        return image, pair[1] and read_image(pair[1], image.shape[:2], is_labels=True)
    files = [path for pair in pairs for path in pair if path and path.exists()]
    return files, tqdm(pairs, leave=False, delay=1), decode

def read_folder(ending, dataset, path, split):
    """A tree of images, label maps NAME<ending>.png beside all or none: ClevrTex and its kin, the user's own.
    ClevrTex is split in the order of its numbers, other images in that of checksums of their names."""
    images = sorted(path.rglob("*"))
    images = [p for p in images if p.suffix.lower() in SUFFIXES and not p.stem.endswith(ending)]
    images.sort(key=lambda p: p.name if dataset.url else zlib.crc32(p.relative_to(path).as_posix().encode()))
    labels = [p.with_name(f"{p.stem}{ending}.png") for p in images]
    missing = [p for p in labels if not p.exists()]
    if missing and (dataset.url or len(missing) < len(labels)):
        raise DataError(f"{missing[0]}: this label map is missing; give all images one, or none.")
    at = split_bounds(len(images), dataset.splits)[split]
    return read_pairs(dataset, [(images[i], None if missing else labels[i]) for i in at])

def read_shapestacks(dataset, path, split):
    """ShapeStacks: every view of the scenarios listed in splits/default, with the label maps of GENESIS."""
    listing, pairs = path / "splits/default" / f"{'eval' if split == 'val' else split}.txt", []
    for needed in (path / "recordings", path / "iseg", listing):
        if not needed.exists():
            raise DataError(
                f"{needed} is missing: unpack http://shapestacks-file.robots.ox.ac.uk/static/download/v1/"
                f"shapestacks-{{meta,rgb}}.tar.gz into {path}, and as iseg/ there the labels from the Google "
                "Drive that the README of github.com/applied-ai-lab/genesis links (it takes a browser).")
    for scenario in listing.read_text(errors="replace").split():
        folder, views = path / "recordings" / scenario, "rgb-*-cam_*.png"
        for image in sorted(folder.glob(views)) or [folder / views]:  # the latter: to be missed when read
            labels = f"iseg-w=0-f=0-l=0-c=original-cam_{image.stem.split('-cam_')[1]}.map"
            pairs.append((image, path / "iseg" / scenario / labels))
    return read_pairs(dataset, pairs)

# --- Download ---
def download(dataset, path):
    """Fetch the file `path`, or the archives of that folder, which appears only when it is whole."""
    for i, name in enumerate(dataset.archives or [path.name]):
        room = 2.5 * len(dataset.archives) - i or 4  # all archives, also unpacked; a file, and its cache
        if not path.with_name(name).exists():
            fetch(f"{dataset.url}/{name}", path.with_name(name), room)
    folder = path.with_name(f"{path.name}.part")
    for name in tqdm(dataset.archives, desc="unpacking", leave=False):
        with readable(path.with_name(name), "the archive"):
            shutil.unpack_archive(path.with_name(name), folder, filter="data")  # nothing outside of `folder`
    if dataset.archives:
        os.replace(folder, path)
    for name in dataset.archives:
        path.with_name(name).unlink()

def fetch(url, file, room=1):
    """Download `url` to `file` by way of FILE.part, going on where an earlier attempt stopped. room: how many
    times its size must be free on the disk."""
    part, problem = file.with_name(f"{file.name}.part"), "the connection broke off again and again"
    for _ in range(5):  # a connection that is cut is taken up again
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                done = done if reply.status == 206 else 0  # a server without Range starts from the beginning
                total = done + int(reply.headers["Content-Length"] or 0)
                print(f"downloading {url} ({total / 1e9:.1f} GB) to {file}", flush=True)
                if shutil.disk_usage(file.parent).free < room * total - done:
                    raise DataError(f"{file}: needs {room * total / 1e9:.1f} GB of free disk; make room.")
                with (open(part, "ab" if done else "wb") as out,
                      tqdm.wrapattr(out, "write", total=total, initial=done, leave=False) as bar):
                    shutil.copyfileobj(reply, bar)
            if part.stat().st_size == total:
                return os.replace(part, file)
        except (http.client.HTTPException, OSError, ValueError) as error:
            problem = error
            if getattr(error, "code", 0) == 416:  # the part is as long as the file, or longer
                if error.headers.get("Content-Range", "").endswith(f"/{done}"):
                    return os.replace(part, file)
                part.unlink()
            elif isinstance(error, urllib.error.URLError):
                break
    raise DataError(f"{url}: {problem}; run again to go on, or download it to {file} yourself.")

# --- The table ---
BUCKET = "https://storage.googleapis.com/multi-object-datasets"
CLEVR = Dataset(
    read_records, slots=10, background="simple", size=128, source=(240, 320), crop=192, masks=11,
    path="clevr_with_masks_train.tfrecords", url=f"{BUCKET}/clevr_with_masks",
    splits=(10_000, 10_000, 50_000), gigabytes=10.5)
CLEVRTEX = Dataset(
    partial(read_folder, "_flat"), slots=10, anisotropic=True, size=128, source=(240, 320), crop=192,
    path="clevrtex_full", url="https://thor.robots.ox.ac.uk/datasets/clevrtex",
    archives=tuple(f"clevrtex_full_part{i}.tar.gz" for i in range(1, 6)))
DATASETS = {
    "shapes": Dataset(partial(read_drawn, draw_shapes), 6, background="small", splits=(320, 320, 8192)),
    "tm_dsprites": Dataset(partial(read_drawn, draw_tm_dsprites), 3, size=128, source=(128, 128),
                           splits=(320, 320, 19_360)),
    "clevr": CLEVR,
    "clevr6": replace(CLEVR, slots=6, most_objects=6),
    "clevrtex": CLEVRTEX,
    "camo": replace(CLEVRTEX, path="clevrtex_camo", archives=("clevrtex_camo.tar.gz",)),
    "ood": replace(CLEVRTEX, path="clevrtex_outd", archives=("clevrtex_outd.tar.gz",), splits=(1, 0, 0)),
    "objects_room": Dataset(
        read_records, slots=3, anisotropic=True, masks=7, background_masks=4, gigabytes=7,
        path="objects_room_train.tfrecords", url=f"{BUCKET}/objects_room", splits=(10_000, 10_000, 980_000)),
    "shapestacks": Dataset(read_shapestacks, slots=6, path="shapestacks", source=(224, 224), crop=196),
    "multi_dsprites": Dataset(
        read_records, slots=4, masks=5, mask_axis=2, path="multi_dsprites_colored_on_colored.tfrecords",
        url=f"{BUCKET}/multi_dsprites", splits=(10_000, 10_000, 40_000)),
    "tetrominoes": Dataset(
        read_records, slots=3, background="simple", source=(35, 35), masks=4,
        path="tetrominoes_train.tfrecords", url=f"{BUCKET}/tetrominoes", splits=(10_000, 10_000, 40_000)),
    "folder": Dataset(partial(read_folder, "_mask"), slots=10, anisotropic=True, size=128, source=()),
}

# --- Cache and loading ---
def fit(dataset, image, labels):
    """Centre squares of image (h, w, 3) and labels (h, w) or None, resized: (4 or 3, size, size) uint8."""
    planes = []
    for pixels, how in ((image, Image.BILINEAR), (labels, Image.NEAREST)):
        if pixels is not None:
            height, width = pixels.shape[:2]
            side = dataset.crop or min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            square = Image.fromarray(pixels[top:top + side, left:left + side])
            planes += square.resize((dataset.size, dataset.size), how).split()
    return np.stack(planes) if planes else None

def write_cache(file, dataset, items, decode, limit):
    """Stream scenes into a .part, which becomes `file` when it is whole, or goes where there are none."""
    part, shape = file.with_name(file.name.split("-")[0] + ".part"), (0,)
    with open(part, "wb") as out:
        out.seek(128)  # numpy pads its header to this length, whatever the number of scenes
        scenes = prefetch(lambda item: fit(dataset, *decode(item)), items, 8, os.cpu_count())
        for scene in itertools.islice((scene for scene in scenes if scene is not None), limit or None):
            out.write(scene.tobytes())
            shape = (shape[0] + 1, *scene.shape)
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, dict(descr="|u1", fortran_order=False, shape=shape))
    for old in file.parent.glob(file.name.rsplit("-", 1)[0] + "-*.npy"):  # of a source that has changed
        old.unlink()
    os.replace(part, file) if shape[0] else part.unlink()

def load(name, split, data_dir="datasets", limit=0, size=0):
    """Scenes: the first `limit` (0: all) of the train, val or test split of a set of the table. Looks under
    `data_dir`, downloads what a program can fetch, decodes on the first use. size: side of the images in
    pixels, 0: the set's own. Raises DataError."""
    if name not in DATASETS or split not in SPLITS:
        raise DataError(f"{name}, {split}: sets are {', '.join(DATASETS)}, splits {', '.join(SPLITS)}.")
    dataset = replace(DATASETS[name], size=size or DATASETS[name].size)
    root, path = Path(data_dir, ".cache"), Path(data_dir, dataset.path)
    # a TFRecord file tells only at its end where its splits lie: all are decoded in one pass, where we can
    together = dataset.masks and not limit and not dataset.most_objects
    try:
        if path.exists() and not os.access(data_dir, os.W_OK):  # a folder that others share
            root = Path.home() / ".cache/ast_seg"
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{dataset.path or name}.lock"):  # whoever comes second finds it done
            if dataset.url and not path.exists():
                download(dataset, path)
            files, items, decode = dataset.reader(dataset, path, None if together else split)
            facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            facts = zlib.crc32(repr((CACHE_VERSION, facts)).encode())
            part = "all" if together else f"{split}-{limit or 0}"
            cache = root / f"{name}-{dataset.size}-{part}-{facts:08x}.npy"
            if not cache.exists():
                print(f"preparing {name} once, in {cache}", flush=True)
                write_cache(cache, dataset, items, decode, limit)
    except OSError as error:
        raise DataError(f"{name}: {error}; check the path, permissions and room on the disk.") from None
    with readable(cache, "the cache"):
        scenes = np.load(cache, mmap_mode="r") if cache.exists() else ()
    at = split_bounds(len(scenes), dataset.splits)[split] if together else range(len(scenes))
    if not at:
        raise DataError(f"{path}: nothing there for the split '{split}' of {name}.")
    images, labels = scenes[at.start:at.stop, :3], scenes[at.start:at.stop, 3:]
    return Scenes(images, labels[:, 0] if labels.size else np.zeros_like(images[:, 0]), labels.size > 0)

# --- Batches ---
# epoch_order(count, seed, epoch): a permutation of range(count)
epoch_order = lru_cache(4)(lambda count, *seeds: np.random.default_rng(seeds).permutation(count))

def batch_indices(count, batch_size, seed, step):
    """(batch_size,) int64: which of `count` scenes make the batch at `step`, by the arguments alone.
    Each epoch is a new permutation less its last incomplete batch. Too few scenes: with replacement."""
    if count < batch_size:
        return np.random.default_rng((seed, step)).integers(count, size=batch_size)
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]

def batches(scenes, batch_size, seed, start, stop, device):
    """Yield the batches of steps start..stop - 1: (batch_size, 3, H, W) uint8 tensors on `device`.
    A thread gathers them ahead of the training step."""
    images = np.asarray(scenes.images)
    return prefetch(lambda step: torch.from_numpy(
        images[batch_indices(len(images), batch_size, seed, step)]).to(device), range(start, stop), depth=4)
