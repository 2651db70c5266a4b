"""Benchmarks of the AST-Seg paper and its peers, from the public files, as uint8 images and label maps.

    scenes = load("clevr", "train", data_dir="datasets")  # .images (N, 3, H, W), .labels (N, H, W)
    for images in Batches(scenes, batch_size=64, seed=0, start=0, stop=1000, device="cuda"): ...

`DATASETS` is their table. The first use decodes a set into a `.npy` file, from then on a memory map.
"""

import gzip
import hashlib
import http.client
import itertools
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from tqdm import tqdm

SPLITS = ("test", "val", "train")  # in the order in which they lie in the public files
CACHE_VERSION = 3  # raise it when a change below changes what is decoded or drawn


class DataError(Exception):
    """One sentence for the user: which file, which record or image, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """One benchmark: where its files lie, how they are read, and what the model has to know about it.

    `reader(dataset, path, split)` returns the source files, the items, and a function from an item to image
    (h, w, 3) and labels (h, w), uint8, or None, None to leave the scene out.
    """

    reader: callable
    slots: int  # K, the largest number of objects (shapes: two more)
    anisotropic: bool = False  # one scale for each axis instead of one for both
    background: str = "complex"  # architecture of the background model: simple, complex or small
    background_steps: int = 500_000  # length of phase 1
    size: int = 64  # side of the training images, in pixels
    url: str = ""  # public address; its last part is the name under DATA_DIR
    source: tuple = (64, 64)  # height and width of the source
    crop: int = 0  # side of the centre square that is kept, in source pixels; 0 for the largest
    splits: tuple = (0, 0, 0)  # published number of scenes in test, val, train
    masks: int = 0  # TFRecord: masks in a record, the background's included
    masks_last: bool = False  # TFRecord: masks lie as (h, w, masks) instead of (masks, h, w)
    background_masks: int = 1  # TFRecord: this many first masks are background
    most_objects: int = 0  # TFRecord: leave scenes of more objects out; 0 keeps all
    gigabytes: float = np.inf  # TFRecord: size of the public file, where we know it


@dataclass(frozen=True)
class Scenes:
    """images: (N, 3, H, W) uint8 RGB; labels: (N, H, W) uint8, 0 = background, all 0 if not `labelled`."""

    images: np.ndarray
    labels: np.ndarray
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.images)


def split_bounds(total, published) -> dict[str, range]:
    """Positions of test, val and train among `total` scenes: as published, fewer in the same proportions."""
    total = min(total, sum(published))
    sizes = [max(round(total * part / sum(published)), 1) if part and total else 0 for part in published]
    stops = [min(sizes[0], total), min(sizes[0] + sizes[1], total), total]
    return dict(zip(SPLITS, map(range, [0, *stops], stops)))


@contextmanager
def readable(path, what):
    """Turn whatever a damaged file raises into a DataError."""
    try:
        yield
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {what} cannot be read ({error}); if it is damaged, replace it.") from error


def prefetch(function, items, depth, threads=1):
    """Yield function(item) for all items in order, computed by threads up to `depth` items ahead."""
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:  # at the end, after an error of `function`, and when the caller leaves early
        pool.shutdown(cancel_futures=True)


# --- Drawn scenes: shapes and Textured Multi-dSprites ---
DISC, TRIANGLE, SQUARE, STAR = range(4)
CORNERS = (1, 3, 4, 5)
UPRIGHT = (0, np.pi * 5 / 6, 0, np.pi / 2)  # the angle at which each of them stands on its base


def paint(image, labels, label, kind, centre, radius, tilt, colour, shading):
    """Paint one anti-aliased sprite over image (side, side, 3) in [0, 1] and labels (side, side), in place.

    centre (x, y) in [-1, 1] and radius in units of half the image; tilt in radians; lit from the upper left.
    """
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


def is_gzip(path):
    """The public files are gzip streams, but some tools hand them out inflated."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_stream(path):
    """Yield (number, data, masked CRC of data). A record is: length (uint64), masked CRC of it, data, CRC."""
    with (open(path, "rb") as file,
          tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False) as bar):
        stream = gzip.GzipFile(fileobj=file) if is_gzip(path) else file
        for number in itertools.count():
            with readable(path, f"record {number}"):
                header = stream.read(12)
                if number and not header:
                    return
                length = int.from_bytes(header[:8], "little")
                if len(header) < 12 or masked_crc(header[:8]) != int.from_bytes(header[8:], "little"):
                    raise ValueError("no record starts here")
                record = stream.read(length + 4) if length <= LARGEST_RECORD else b""
                if len(record) < length + 4:
                    raise ValueError(f"{length} bytes announced, not all there")
            yield number, record[:-4], int.from_bytes(record[-4:], "little")
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
    (height, width), count = dataset.source, dataset.masks
    shape = (height, width, count) if dataset.masks_last else (count, height, width)
    masks, labels = pixel_values(data, b"mask", shape), np.zeros(dataset.source, np.uint8)
    for index in reversed(range(count)):  # where masks overlap the first one wins, as in an arg-max
        mask = masks[..., index] if dataset.masks_last else masks[index]
        np.copyto(labels, max(0, index + 1 - dataset.background_masks), where=mask > 127)
    return pixel_values(data, b"image", (height, width, 3)), labels


def read_records(dataset, path, split):
    """A TFRecord file: one split, or all of them where `split` is None.

    A whole gzip stream vouches for its bytes at its end; otherwise the checksum of each record is computed.
    """
    if not path.exists():
        download(dataset.url, path)
    packed, wanted = is_gzip(path), range(sum(dataset.splits))

    def items():
        at = wanted
        if split:
            public = packed and path.stat().st_size > 0.9e9 * dataset.gigabytes
            total = len(wanted) if public else sum(1 for _ in read_stream(path))
            at = split_bounds(total, dataset.splits)[split]
        for record in read_stream(path):
            if split and record[0] >= at.stop:
                return
            if record[0] in at:
                yield record

    def decode(record):
        number, data, crc = record
        with readable(path, f"record {number}"):
            if (split or not packed) and masked_crc(data) != crc:
                raise ValueError("wrong checksum")
            return decode_record(dataset, data)
    return [path], items(), decode


# --- Download ---
def download(url, file):
    """Download `url` to `file` by way of FILE.part, going on where an earlier attempt stopped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part, problem = file.with_name(f"{file.name}.part"), "the connection broke off again and again"
    for _ in range(5):  # a connection that is cut is taken up again
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                done = done if reply.status == 206 else 0  # a server without Range starts from the beginning
                total = done + int(reply.headers["Content-Length"] or 0)
                print(f"downloading {url} ({total / 1e9:.1f} GB) to {file}", flush=True)
                if shutil.disk_usage(file.parent).free < 4 * total - done:  # the file, and its cache
                    raise DataError(f"{file}: needs {4 * total / 1e9:.1f} GB of free disk; make room there.")
                with (open(part, "ab" if done else "wb") as out,
                      tqdm.wrapattr(out, "write", total=total, initial=done, leave=False) as bar):
                    shutil.copyfileobj(reply, bar)
            if part.stat().st_size == total:
                return os.replace(part, file)
        except (http.client.HTTPException, OSError) as error:
            problem = error
            if getattr(error, "code", 0) == 416:  # the part is as long as the file, or longer
                part.unlink()
            elif isinstance(error, urllib.error.URLError):
                break
    raise DataError(f"{url}: {problem}; run again to go on, or download it to {file} yourself.")


# --- The table ---
BUCKET = "https://storage.googleapis.com/multi-object-datasets"

CLEVR = Dataset(
    read_records, slots=10, background="simple", background_steps=2500, size=128, source=(240, 320), crop=192,
    masks=11, splits=(10_000, 10_000, 50_000), gigabytes=10.5,
    url=f"{BUCKET}/clevr_with_masks/clevr_with_masks_train.tfrecords")
DATASETS = {
    "shapes": Dataset(partial(read_drawn, draw_shapes), 6, background="small", splits=(320, 320, 8192)),
    "tm_dsprites": Dataset(partial(read_drawn, draw_tm_dsprites), 3, size=128, source=(128, 128),
                           splits=(320, 320, 19_360)),
    "clevr": CLEVR,
    "clevr6": replace(CLEVR, slots=6, most_objects=6),
    "objects_room": Dataset(
        read_records, slots=3, anisotropic=True, masks=7, background_masks=4, gigabytes=7,
        splits=(10_000, 10_000, 980_000), url=f"{BUCKET}/objects_room/objects_room_train.tfrecords"),
    "multi_dsprites": Dataset(
        read_records, slots=4, masks=5, masks_last=True, splits=(10_000, 10_000, 40_000),
        url=f"{BUCKET}/multi_dsprites/multi_dsprites_colored_on_colored.tfrecords"),
    "tetrominoes": Dataset(
        read_records, slots=3, background="simple", background_steps=2500, source=(35, 35), masks=4,
        splits=(10_000, 10_000, 40_000), url=f"{BUCKET}/tetrominoes/tetrominoes_train.tfrecords"),
}


# --- Cache and loading ---
def digest(value):
    """A short name for any value."""
    return hashlib.sha1(repr(value).encode()).hexdigest()[:12]


def cache_root(data_dir):
    """DATA_DIR/.cache, or a folder of the user's own cache where DATA_DIR is marked read-only."""
    if not data_dir.exists() or data_dir.stat().st_mode & 0o222 and os.access(data_dir, os.W_OK):
        return data_dir / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ast_seg",
                digest(data_dir.resolve()))


def open_cache(file):
    """(N, 4, size, size) uint8 memory map, RGB and labels; N = 0 without a finished cache."""
    with suppress(OSError, ValueError, EOFError):
        return np.load(file, mmap_mode="r")
    return np.empty((0, 4, 1, 1), np.uint8)


def fit(dataset, image, labels):
    """The centre squares of image (h, w, 3) and labels (h, w), resized, as one (4, size, size) uint8."""
    if image is None:
        return None
    height, width = dataset.source
    side = dataset.crop or min(height, width)
    left, top = (width - side) // 2, (height - side) // 2

    def resized(pixels, how):
        square = Image.fromarray(np.ascontiguousarray(pixels[top:top + side, left:left + side]))
        return np.asarray(square.resize((dataset.size, dataset.size), how))
    return np.concatenate([np.moveaxis(resized(image, Image.BILINEAR), 2, 0),
                           resized(labels, Image.NEAREST)[None]])


def write_cache(file, dataset, items, decode, limit):
    """Stream scenes into `file`, which appears only when it is whole: nothing stays behind after an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=file.parent) as folder:
        new, count = Path(folder, "new.npy"), 0
        with open(new, "wb") as out:
            out.seek(128)  # numpy pads its header to this length, whatever the number of scenes
            scenes = prefetch(lambda item: fit(dataset, *decode(item)), items, 8, os.cpu_count())
            kept = (scene for scene in scenes if scene is not None)
            for count, scene in enumerate(itertools.islice(kept, limit), 1):
                out.write(scene.tobytes())
            out.seek(0)
            shape = (count, 4, dataset.size, dataset.size)
            np.lib.format.write_array_header_1_0(out, dict(descr="|u1", fortran_order=False, shape=shape))
        if count:
            os.replace(new, file)
    for old in file.parent.glob(file.name.rsplit("-", 1)[0] + "-*"):  # of a source that has changed
        if old != file:
            old.unlink(missing_ok=True)


def load(name, split, data_dir="datasets", limit=None, size=None):
    """Scenes: the first `limit` (default: all) of the train, val or test split of a set of the table.

    Looks under `data_dir`, downloads what is not there, decodes on the first use. size: side of the images in
    pixels, the set's own by default. Raises DataError.
    """
    if name not in DATASETS or split not in SPLITS:
        raise DataError(f"{name}, {split}: sets are {', '.join(DATASETS)}, splits {', '.join(SPLITS)}.")
    dataset = replace(DATASETS[name], size=size or DATASETS[name].size)
    data_dir, path = Path(data_dir), Path(data_dir, Path(dataset.url).name)
    # a TFRecord file tells only at its end where its splits lie: all are decoded in one pass, where we can
    together = dataset.masks and not limit and not dataset.most_objects
    try:
        files, items, decode = dataset.reader(dataset, path, None if together else split)
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        part = "all" if together else f"{split}-{limit}"
        cache = cache_root(data_dir) / f"{name}-{dataset.size}-{part}-{digest((CACHE_VERSION, facts))}.npy"
        if not len(open_cache(cache)):
            print(f"preparing {name} once, in {cache}", flush=True)
            write_cache(cache, dataset, items, decode, limit)
    except OSError as error:
        raise DataError(f"{name}: {error}; check the path, permissions and room on the disk.") from None
    scenes = open_cache(cache)
    at = split_bounds(len(scenes), dataset.splits)[split] if together else range(len(scenes))
    if not at:
        raise DataError(f"{path}: nothing there for the split '{split}' of {name}.")
    return Scenes(scenes[at.start:at.stop, :3], scenes[at.start:at.stop, 3])


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
