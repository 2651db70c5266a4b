"""Every benchmark of the AST-Seg paper and its peers, from the public files.

    scenes = load("clevr", "train", data_dir="datasets")  # images (N, 3, H, W), labels (N, H, W)
    for images in batches(scenes, batch_size=64, seed=0, start=0, stop=1000, device="cuda"): ...

`load` crops and resizes them once, into a file which from then on is a memory map."""
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.file_download import http_get
from matplotlib import colormaps, colors
from PIL import Image, ImageOps
from tqdm import tqdm
from zlib_ng import gzip_ng

SPLITS = ("test", "val", "train")  # in the order in which they lie in the public files
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of images
CACHE_VERSION = 5  # raise it when a change below changes what is decoded or drawn

class UserError(Exception):
    """What the user can mend, in one sentence: what is wrong, and what to do."""

@dataclass(frozen=True)
class Dataset:
    """A row of the table. `reader(dataset, path, split)` returns files of the split and, for each
    scene, a function that decodes it: image (h, w, 3), then labels (h, w) if known, both uint8."""
    reader: Callable
    slots: int  # K, the largest number of objects (shapes: two more)
    anisotropic: bool  # one scale for each axis instead of one for both
    background: str  # architecture of the background model: simple, complex or small
    size: int  # side of the training images, in pixels
    source: tuple[int, ...]  # height and width of the published images; () stands for any
    crop: int  # side of the centre square that is kept, in their pixels; 0 for the largest
    splits: tuple[int, ...]  # scenes of test, val, train, or their proportions
    path: str = ""  # public name of the file or folder under `data_dir`
    url: str = ""  # where a program can fetch it
    archives: tuple[str, ...] = ()  # the files there that hold the folder
    draw: Callable | None = None  # drawn sets: (rng, side) -> image in [0, 1], labels
    masks: int = 0  # records: number of masks, the background's included
    mask_axis: int = 0  # records: the axis that counts them, 0: (masks, h, w), 2: (h, w, masks)
    background_masks: int = 1  # records: this many first masks are background
    most_objects: int = 0  # records: scenes of more objects are left out; 0 keeps all
    pattern: str = "*"  # image files: the names of scenes (ClevrTex: its render passes are none)
    ending: str = "_mask"  # image files: what a label map's name has in addition

class Scenes(NamedTuple):
    images: np.ndarray  # (N, 3, H, W) uint8, RGB
    labels: np.ndarray  # (N, H, W) uint8, 0 = background; 0 throughout where they are unknown

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
DISC, TRIANGLE, SQUARE, STAR = range(4)
CORNERS = (1, 3, 4, 5)
UPRIGHT = (0, np.pi * 5 / 6, 0, np.pi / 2)  # the angle at which each of them stands on its base

def paint(image, labels, label, kind, centre, radius, tilt, colour, shading):
    """Paint a sprite over image (side, side, 3) in [0, 1] and labels (side, side), in place.
    centre (x, y) in [-1, 1], radius in half images, tilt in radians, colour RGB in [0, 1]."""
    side = len(labels)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    dx = pixels - np.float32(centre[0])
    dy = pixels[:, None] - np.float32(centre[1])

    # The edge in polar coordinates. `fold`, at most sector, is the angle from a corner or notch.
    edge = 0.9 * radius
    if kind != DISC:
        sector = np.pi / CORNERS[kind]
        angle = np.arctan2(dy, dx) + (UPRIGHT[kind] + tilt)
        fold = np.abs(angle / (2 * sector) % 1 - 0.5) * 2 * sector
        edge = 1.1 * radius * (np.cos(sector) / np.cos(sector - fold))
    if kind == STAR:
        edge = 1.1 * radius * (0.5 + 0.5 * fold / sector)

    # Within one pixel of the edge the cover falls from 1 to 0. The light is from the upper left.
    cover = np.clip(0.5 - (np.hypot(dx, dy) - edge) * side / 2, 0, 1)  # (side, side)
    light = 1 - shading * (dx + dy)[..., None] / radius
    image += cover[..., None] * (np.clip(np.asarray(colour, np.float32) * light, 0, 1) - image)
    labels[cover > 0.5] = label

def place(rng, radius, placed, gap):
    """A random centre, where it fits `gap` times the sum of the radii away from all `placed`."""
    for _ in range(200):
        x, y = rng.uniform(radius - 1, 1 - radius, 2)
        if all(np.hypot(x - x0, y - y0) > gap * (radius + r0) for x0, y0, r0 in placed):
            break
    placed.append((x, y, radius))
    return x, y

def draw_shapes(rng, side):
    """2-4 shaded shapes of different hues, which may overlap, on a grey backdrop lit aslant."""
    count = rng.integers(2, 5)
    hues = (rng.random() + (rng.permutation(count) + rng.uniform(-0.2, 0.2, count)) / count) % 1
    tint = rng.uniform(-0.03, 0.03, 3)
    slope = rng.uniform(-0.15, 0.15, 2)
    x = np.linspace(1 / side - 1, 1 - 1 / side, side)
    light = (slope[0] * x + slope[1] * x[:, None])[..., None]  # (side, side, 1)
    image = (rng.uniform(0.35, 0.6) + tint + light).astype(np.float32)

    labels = np.zeros((side, side), np.uint8)
    placed = []
    for label, hue in enumerate(hues, 1):
        radius = rng.uniform(0.2, 0.34)
        centre = place(rng, radius, placed, gap=0.75)
        kind = rng.integers(4)
        tilt = rng.uniform(-0.2, 0.2)
        colour = colors.hsv_to_rgb((hue, rng.uniform(0.6, 1), rng.uniform(0.75, 1)))
        paint(image, labels, label, kind, centre, radius, tilt, colour, shading=0.25)
    return image, labels

def draw_tm_dsprites(rng, side):
    """2-3 sprites on one of 20 shifted textures (DRC supplement, A.5). The numbers are ours."""
    waves = 2 + 2 * rng.integers(4)
    angle = np.pi * rng.integers(5) / 5
    x = np.linspace(0, 2 * np.pi * waves, side)
    phase = x * np.cos(angle) + x[:, None] * np.sin(angle) + rng.uniform(0, 2 * np.pi)
    image = np.repeat((0.5 + 0.3 * np.sin(phase)).astype(np.float32)[..., None], 3, axis=2)

    labels = np.zeros((side, side), np.uint8)
    placed = []
    for label in range(1, rng.integers(3, 5)):
        kind = rng.integers(3)
        colour = colors.hsv_to_rgb((rng.random(), 1, 1))
        centre = place(rng, 0.25, placed, gap=1.1)
        paint(image, labels, label, kind, centre, 0.25, 0, colour, shading=0)
    return image, labels

def read_drawn(dataset, path, split):
    """Scene i of a split depends on (split, i) alone: run seeds do not change a benchmark."""
    def decode(i):
        rng = np.random.default_rng((0, ("train", "test", "val").index(split), i))
        image, labels = dataset.draw(rng, dataset.source[0])
        return (image * 255 + 0.5).astype(np.uint8), labels
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
    """Yield (number, data) of each record: length (uint64), its checksum, data, its checksum."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # some tools hand the public gzip files out inflated
    opener = gzip_ng.open if packed else open  # eleven times as fast as Python's gzip
    with opener(path, "rb") as stream:
        for number in itertools.count():
            with usable(f"Record {number} of {path}"):
                length = read_checked(stream, 8)
                data = read_checked(stream, int.from_bytes(length, "little"))
            if not length:
                return
            yield number, data

def protobuf_fields(message):
    """Yield the contents of the fields of a protobuf message, here all strings or messages again.
    A field is: tag (one byte), length (7 bits a byte, the lowest first, 0x80: more), content."""
    at = 0
    while at < len(message):
        length = 0
        for shift in range(0, 64, 7):
            at += 1
            length |= (message[at] & 0x7F) << shift
            if message[at] < 0x80:
                break
        yield message[at + 1:at + 1 + length]
        at += 1 + length

def decode_record(dataset, path, number, data):
    """A tf.train.Example -> image, labels, or () where it holds too many objects."""
    with usable(f"Record {number} of {path}, a scene with {dataset.masks} masks,"):
        # CLEVR's lists are a million strings, each of which a general parser would visit.
        (features,) = protobuf_fields(memoryview(data))
        entries = map(protobuf_fields, protobuf_fields(features))  # features come in any order
        lists = {bytes(name): next(protobuf_fields(feature)) for name, feature in entries}

        if dataset.most_objects:  # `visibility` has a 0 or 1 for the background and each object
            floats = next(protobuf_fields(lists[b"visibility"]))
            if np.count_nonzero(np.frombuffer(floats, "<f4")) - 1 > dataset.most_objects:
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
        counting = tqdm(iterate_records(path), desc="counting", unit=" records", leave=False)
        total = min(sum(1 for _ in counting), sum(dataset.splits))
        at = split_bounds(total, dataset.splits)[split]
        for number, data in itertools.islice(iterate_records(path), at.start, at.stop):
            yield partial(decode_record, dataset, path, number, data)
    return [path], scenes()

# --- Image files ---
def read_image(path, size, is_labels=False):
    """(h, w, 3) uint8 RGB of an image of any format and mode, without its transparency, or the
    (h, w) uint8 of a label map. size: the (h, w) it must have, () for any. Raises UserError."""
    with usable(f"The image {path}"):
        image = ImageOps.exif_transpose(Image.open(path))
        if size and image.size != size[::-1]:
            raise ValueError(f"its width and height are {image.size} instead of {size[::-1]}")

        pixels = np.asarray(image)
        if path.suffix == ".map":  # ShapeStacks by GENESIS: a PNG, label = first channel / 32
            return np.asarray(image.convert("RGB"))[..., 0] // 32
        if is_labels and (pixels.ndim != 2 or pixels.max() > 255):
            raise ValueError("labels are indices of a palette, or grey values up to 255")
        if is_labels:
            return pixels.astype(np.uint8)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            image = Image.fromarray((pixels / 257 + 0.5).clip(0, 255).astype(np.uint8))
        return np.asarray(image.convert("RGB"))

def read_pairs(dataset, pairs):
    """What a reader returns, for a list of (image path, label path), or of (image path,)."""
    def decode(image_path, *label_paths):
        image = read_image(image_path, dataset.source)
        return image, *(read_image(path, image.shape[:2], True) for path in label_paths)
    return itertools.chain(*pairs), [partial(decode, *pair) for pair in pairs]

def read_folder(dataset, path, split):
    """A tree of images, all or none of them with a label map NAME<ending>.png."""
    images = [image for image in sorted(path.rglob(dataset.pattern), key=lambda image: image.name)
              if image.suffix.lower() in SUFFIXES and not image.stem.endswith(dataset.ending)]
    if not dataset.url:  # names tell what is to be seen; their checksums mix that, always alike
        images.sort(key=lambda image: zlib.crc32(image.relative_to(path).as_posix().encode()))

    pairs = [(image, image.with_name(f"{image.stem}{dataset.ending}.png")) for image in images]
    missing = [label for _, label in pairs if not label.exists()]
    if len(missing) == len(pairs):
        pairs = list(zip(images))
    elif missing:
        raise UserError(f"The label map {missing[0]} is missing; give all images one, or none.")
    return read_pairs(dataset, [pairs[i] for i in split_bounds(len(pairs), dataset.splits)[split]])

def read_shapestacks(dataset, path, split):
    """ShapeStacks: every view of the scenarios in splits/default, with the labels of GENESIS."""
    pairs = []
    with usable(f"The set {path}", "unpack shapestacks-{meta,rgb}.tar.gz there, from the website "
                "shapestacks-file.robots.ox.ac.uk/static/download/v1, and as its folder iseg the "
                "labels that the README of github.com/applied-ai-lab/genesis links"):
        listing = path / f"splits/default/{split.replace('val', 'eval')}.txt"
        for scenario in listing.read_text(errors="replace").split():
            images = sorted((path / "recordings" / scenario).glob("rgb-*-cam_*.png"))
            if not images:
                raise FileNotFoundError(f"no image in {path}/recordings/{scenario}")
            for image in images:
                camera = image.stem.split("-cam_")[1]
                label = path / f"iseg/{scenario}/iseg-w=0-f=0-l=0-c=original-cam_{camera}.map"
                label.stat()  # raises where it is missing
                pairs.append((image, label))
    return read_pairs(dataset, pairs)

# --- Download ---
def download(dataset, path):
    """Fetch the file `path`, or the archives of this folder, which appears only when whole."""
    files = [path.with_name(name) for name in dataset.archives or [path.name]]
    for file in files:
        if not file.exists():
            fetch(f"{dataset.url}/{file.name}", file)
    if dataset.archives:
        folder = path.with_name(f"{path.name}.part")
        for archive in tqdm(files, desc="unpacking", leave=False):
            with usable(f"The archive {archive}"):
                shutil.unpack_archive(archive, folder, filter="data")  # only into `folder`
        os.replace(folder, path)
        for archive in files:
            archive.unlink()

def fetch(url, file):
    """Download `url` to `file` by way of FILE.part, going on where an earlier attempt stopped."""
    part = file.with_name(f"{file.name}.part")
    print(f"downloading {url} to {part}", flush=True)
    advice = f"run again to go on, remove {part} to begin anew, or download it to {file} yourself"
    with usable(url, advice), open(part, "ab") as out:
        # The last byte is fetched again: servers refuse (416) to send what follows a whole file.
        start = max(out.tell() - 1, 0)
        out.truncate(start)
        out.seek(start)
        http_get(url, out, resume_size=start)  # it also goes on by itself where a reply breaks off
    os.replace(part, file)

# --- The table ---
DEEPMIND = "https://storage.googleapis.com/multi-object-datasets"  # split as in GENESIS
CLEVR = Dataset(
    read_records, 10, False, "simple", 128, (240, 320), 192, (10_000, 10_000, 80_000),
    "clevr_with_masks_train.tfrecords", f"{DEEPMIND}/clevr_with_masks", masks=11)
CLEVRTEX = Dataset(  # as github.com/karazijal/clevrtex reads it
    read_folder, 10, True, "complex", 128, (240, 320), 192, (1, 1, 8), "clevrtex_full",
    "https://thor.robots.ox.ac.uk/datasets/clevrtex", pattern="CLEVRTEX_????_??????.png",
    archives=tuple(f"clevrtex_full_part{i}.tar.gz" for i in range(1, 6)), ending="_flat")
DATASETS: dict[str, Dataset] = {  # the fields in their order, up to `splits`, `path` and `url`
    "shapes": Dataset(  # ours, for a laptop
        read_drawn, 6, False, "small", 64, (64, 64), 0, (320, 320, 8192), draw=draw_shapes),
    "tm_dsprites": Dataset(read_drawn, 3, False, "complex", 128, (128, 128), 0, (320, 320, 19_360),
                           draw=draw_tm_dsprites),  # ours, after DRC's text
    "clevr": CLEVR,
    "clevr6": replace(CLEVR, slots=6, most_objects=6),
    "clevrtex": CLEVRTEX,
    "camo": replace(CLEVRTEX, path="clevrtex_camo", archives=("clevrtex_camo.tar.gz",)),
    "ood": replace(CLEVRTEX, path="clevrtex_outd", archives=("clevrtex_outd.tar.gz",),
                   splits=(1, 0, 0)),  # all of it is for tests
    "objects_room": Dataset(  # masks of the background: sky, floor, two halves of the wall
        read_records, 3, True, "complex", 64, (64, 64), 0, (10_000, 10_000, 980_000),
        "objects_room_train.tfrecords", f"{DEEPMIND}/objects_room", masks=7, background_masks=4),
    "shapestacks": Dataset(  # it lists its splits
        read_shapestacks, 6, False, "complex", 64, (224, 224), 196, (), "shapestacks"),
    "multi_dsprites": Dataset(
        read_records, 4, False, "complex", 64, (64, 64), 0, (10_000, 10_000, 40_000),
        "multi_dsprites_colored_on_colored.tfrecords", f"{DEEPMIND}/multi_dsprites",
        masks=5, mask_axis=2),
    "tetrominoes": Dataset(
        read_records, 3, False, "simple", 64, (35, 35), 0, (10_000, 10_000, 40_000),
        "tetrominoes_train.tfrecords", f"{DEEPMIND}/tetrominoes", masks=4),
    "folder": Dataset(read_folder, 10, True, "complex", 128, (), 0, (1, 1, 8))}  # one's own images

# --- Cache and loading ---
def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """An image (h, w, 3) or labels (h, w), uint8, squeezed to the square (size, size, ...)."""
    how = Image.BILINEAR if pixels.ndim == 3 else Image.NEAREST
    return np.array(Image.fromarray(pixels).resize((size, size), how))

def decode_planes(dataset, decode):
    """The centre square of a scene as the cache keeps it: (4, size, size) uint8, RGB and labels
    (0 where they are unknown). Empty where the scene is left out."""
    planes = []
    for pixels in decode():  # (h, w, 3), (h, w)
        side = dataset.crop or min(pixels.shape[:2])
        top, left = (np.array(pixels.shape[:2]) - side) // 2
        square = resize(pixels[top:top + side, left:left + side], dataset.size)
        planes.extend(np.atleast_3d(square).transpose(2, 0, 1))
    if len(planes) == 3:
        planes.append(np.zeros_like(planes[0]))
    return np.array(planes)

def prepare(name, dataset, split, data_dir, limit):
    """The cache file of a split, decoded, and downloaded before, where it is not there yet."""
    path = data_dir / dataset.path
    root = data_dir / ".cache"
    if path.exists() and not os.access(data_dir, os.W_OK):  # a folder that others share
        root = Path.home() / ".cache/ast_seg"
    root.mkdir(parents=True, exist_ok=True)

    with FileLock(root / f"{dataset.path or name}.lock"):  # whoever comes second finds it done
        if dataset.url and not path.exists():
            download(dataset, path)
        files, decoders = dataset.reader(dataset, path, split)

        # The name tells the source, so that another one, or a changed one, makes another cache.
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        checksum = zlib.crc32(repr((CACHE_VERSION, facts)).encode())
        stem = f"{name}-{dataset.size}-{split}-{limit}"
        cache = root / f"{stem}-{checksum:08x}.uint8"
        if cache.exists():
            return cache

        print(f"preparing {name} once, in {cache}", flush=True)
        bar = tqdm(decoders, desc=name, unit=" scenes", leave=False)
        planes = prefetch(partial(decode_planes, dataset), bar, 8, os.cpu_count())
        scenes = itertools.islice(filter(np.size, planes), limit or None)
        part = root / f"{name}.part"  # takes its name when it is whole
        with open(part, "wb") as out:
            out.writelines(scenes)
        if not part.stat().st_size:
            raise UserError(f"{path}: nothing there for the split '{split}' of {name}.")
        for old in root.glob(f"{stem}-*.uint8"):
            old.unlink()
        os.replace(part, cache)
    return cache

def load(name: str, split: str, data_dir="datasets", limit: int = 0, size: int = 0) -> Scenes:
    """The first `limit` scenes, 0 for all, of a split of a set. The first use fetches and decodes
    them, under data_dir. size: their side in pixels, 0 for the set's own. Raises UserError or OSError."""
    if name not in DATASETS or split not in SPLITS:
        raise UserError(f"{name}, {split}: choose from {[*DATASETS]} and from {[*SPLITS]}.")
    dataset = replace(DATASETS[name], size=size or DATASETS[name].size)
    cache = prepare(name, dataset, split, Path(data_dir), limit)
    with usable(f"The cache {cache}"):
        scenes = np.memmap(cache, np.uint8, "c").reshape(-1, 4, dataset.size, dataset.size)
    return Scenes(scenes[:, :3], scenes[:, 3])

# --- Batches ---
@lru_cache(4)
def epoch_order(count, seed, epoch):
    """A permutation of range(count), kept while its batches are taken."""
    return np.random.default_rng((seed, epoch)).permutation(count)

def batch_indices(count, batch_size, seed, step):
    """(batch_size,) int64: which of `count` scenes make the batch at `step`, by the arguments
    alone. Each epoch is a new permutation without its last incomplete batch."""
    if count < batch_size:  # too few scenes are drawn with replacement
        return np.random.default_rng((seed, step)).integers(count, size=batch_size)
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]

def batches(scenes: Scenes, batch_size: int, seed: int, start: int, stop: int,
            device: torch.device, share=slice(None)):
    """Yield the batches of steps start..stop - 1: (batch_size, 3, H, W) uint8 tensors on `device`;
    of each the `share` of this process. A thread gathers them ahead of the training step."""
    images = np.asarray(scenes.images)
    if batch_size % (share.step or 1):
        raise UserError(f"{share.step} processes cannot share batches of {batch_size} equally.")
    if device.type == "cuda" and 4 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
        images = torch.from_numpy(images).to(device)  # then a batch is an index, without a copy

    def gather(step):
        indices = batch_indices(len(images), batch_size, seed, step)[share]
        return torch.as_tensor(images[indices]).to(device)
    return prefetch(gather, range(start, stop), depth=4)

# --- The files of a run: checkpoints, scores, images of one's own ---
def save_checkpoint(folder: Path, state: dict):
    """Write checkpoint.pt, under another name first: whatever happens, no half file is found.
    log.jsonl is made to agree with it: a run that goes on logs later steps again."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    part = folder / "checkpoint.pt.part"
    torch.save(state, part)
    part.replace(folder / "checkpoint.pt")
    log = "".join(json.dumps(line) + "\n" for line in state["log"])
    (folder / "log.jsonl").write_text(log)

def load_checkpoint(folder: Path, config: dict) -> dict:
    """What was saved, or the start of a new run. Raises UserError if it is not this run's."""
    file = folder / "checkpoint.pt"
    saved = {"config": config, "t": 0, "seconds": 0.0, "log": []}
    if file.exists():
        with usable(file, "move its folder away to start anew, or choose another --out"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            theirs = dict(saved["config"])
        changed = [name for name, value in config.items()
                   if theirs.get(name) != value and not name.endswith(("_every", "_minutes"))]
        if changed and saved["t"]:
            raise UserError(f"{folder} is a run with other settings ({', '.join(changed)}); "
                            "repeat its flags, or choose another --out.")
    elif any(path.is_file() and path.suffix != ".part" for path in (folder, *folder.rglob("*"))):
        raise UserError(f"{folder} is not empty, and no run of ours; choose another --out.")
    return saved | {"config": config}

def print_scores(name: str, runs: dict[str, dict]):
    """Print the mean scores of runs on a set. runs: by name, mean by metric."""
    metrics = list(next(iter(runs.values())))
    rows = {f"on {name}": metrics}
    for run, means in runs.items():
        rows[run] = [f"{mean:.2f}" for mean in means.values()]
    if len(runs) > 1:
        values = np.array([list(means.values()) for means in runs.values()])
        spread = zip(values.mean(0), values.std(0, ddof=1))
        rows["mean"] = [f"{mean:.2f}±{deviation:.2f}" for mean, deviation in spread]
    for title, row in rows.items():
        print(f"{title:24}" + "".join(f"{text:>14}" for text in row))

PALETTE = np.array([(0, 0, 0), *12 * (colormaps["tab10"].colors + colormaps["Set3"].colors)])[:256]

def show(axis, picture, title: str = ""):
    """Show an image (3, h, w) or (h, w, 3) in [0, 1], or a map (h, w); x and y from -1 to 1."""
    picture = torch.as_tensor(picture).cpu()
    picture = picture.movedim(0, 2).clamp(0, 1) if len(picture) == 3 else picture
    axis.imshow(picture.numpy(), "gray", vmin=0, extent=(-1, 1, 1, -1), interpolation="nearest")
    axis.set_title(title, fontsize=9, pad=3)
    axis.axis("off")

def segment_files(paths: list, out: Path, segment: Callable, size: int, device):
    """Write a label map and an overlay of each image, or image in a folder, and objects.json.
    segment: images (1, 3, size, size) in [0, 1], h, w -> labels (1, h, w), as ASTSeg has it."""
    files = []
    for path in map(Path, paths):
        tree = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        files += [path] if path.is_file() else tree
    if not files:
        raise UserError(f"There is no image in {', '.join(paths)}; give images or folders.")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(files)} images on {device}, into {out}", flush=True)

    objects = {}
    for file in tqdm(files, desc="segmenting", unit="image"):
        image = read_image(file, ())  # (h, w, 3)
        square = torch.from_numpy(resize(image, size)).permute(2, 0, 1)[None].to(device) / 255
        fine = segment(square, 4 * size, 4 * size)[0].byte().cpu().numpy()
        flat = Image.fromarray(fine).resize(image.shape[1::-1], Image.NEAREST)
        labels = np.asarray(flat)  # (h, w)

        flat.putpalette((255 * PALETTE).astype(np.uint8).tobytes())
        stem = file.as_posix().replace("_", "__").replace("/", "_")  # no two names become one
        flat.save(out / f"{stem}_labels.png")
        overlay = np.where(labels[..., None] > 0, image / 2 + 127.5 * PALETTE[labels], image)
        Image.fromarray(overlay.astype(np.uint8)).save(out / f"{stem}_overlay.png")
        found = []
        for label in np.unique(labels[labels > 0]).tolist():
            y, x = np.nonzero(labels == label)
            box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            found.append({"label": label, "area": len(x), "box": box,
                          "x": x.mean() + 0.5, "y": y.mean() + 0.5})
        objects[file.as_posix()] = found
    (out / "objects.json").write_text(json.dumps(objects, indent=1) + "\n")
