"""What strangers may leave in an inbox: nothing of it may hang, crash or end the watcher."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel
import numpy as np

from support.dicom_series import make_slice

__all__ = ["KINDS", "leave"]

Random = np.random.Generator


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    ends = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + ends


def picture(rng: Random, size: int = 48) -> np.ndarray:
    image = rng.integers(0, 60, (size, size)).astype(np.uint8)
    image[: size // 2] += 150
    return image


def dicom(rng: Random, **fields: object) -> bytes:
    import io

    dataset = make_slice(picture(rng).astype(np.uint16), **fields)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def nifti(rng: Random) -> bytes:
    volume = np.stack([picture(rng) for _ in range(3)], -1)
    whole: bytes = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    return whole


def nrrd(sizes: str, more: str = "", data: bytes = b"") -> bytes:
    head = (
        f"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n{more}encoding: raw\n\n"
    )
    return head.encode() + data


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def sparse(path: Path, head: bytes, size: int) -> None:
    path.write_bytes(head)
    os.truncate(path, size)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(1, len(data) - 1))]


def flipped(data: bytes, rng: Random) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, len(changed), max(3, len(changed) // 500))
    changed[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
    return changed.tobytes()


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
            Path("s").rename(path.name)
    finally:
        os.chdir(here)


def npy(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


def deep(path: Path, data: bytes) -> None:
    folder = path.parent / path.stem
    for _ in range(12):
        folder /= "d" * 200
        try:
            folder.mkdir(parents=True)
        except OSError:
            return
    (folder / "x.png").write_bytes(data)


KINDS: dict[str, Callable[[Path, Random], None]] = {
    "pipe.png": lambda p, r: os.mkfifo(p),
    "pipe.dcm": lambda p, r: os.mkfifo(p),
    "pipe": lambda p, r: os.mkfifo(p),
    "socket.png": lambda p, r: unix_socket(p),
    "zero.png": lambda p, r: p.symlink_to("/dev/zero"),
    "zero.dcm": lambda p, r: p.symlink_to("/dev/zero"),
    "random.nii.gz": lambda p, r: p.symlink_to("/dev/urandom"),
    "passwd.png": lambda p, r: p.symlink_to("/etc/passwd"),
    "nothing.png": lambda p, r: p.symlink_to("/no such file"),
    "itself.png": lambda p, r: p.symlink_to(p.name),
    "root": lambda p, r: p.symlink_to("/"),
    "loop": lambda p, r: p.symlink_to(".."),
    "folder.png": lambda p, r: p.mkdir(),
    "folder.json": lambda p, r: p.mkdir(),
    "empty.png": lambda p, r: write(p, b""),
    "empty.dcm": lambda p, r: write(p, b""),
    "empty": lambda p, r: write(p, b""),
    "declared.png": lambda p, r: write(p, png(100_000, 100_000, zlib.compress(bytes(1000)))),
    "declared.bmp": lambda p, r: write(p, b"BM" + bytes(16) + struct.pack("<ii", 60_000, 60_000)),
    "short.png": lambda p, r: write(p, png(9000, 9000, zlib.compress(bytes(1000)))),
    "comment.png": lambda p, r: write(
        p,
        png(8, 8, zlib.compress(bytes(72)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))),
    ),
    "cut.png": lambda p, r: write(p, cut(cv2.imencode(".png", picture(r))[1].tobytes(), r)),
    "cut.jpg": lambda p, r: write(p, cut(cv2.imencode(".jpg", picture(r))[1].tobytes(), r)),
    "cut.tif": lambda p, r: write(p, cut(cv2.imencode(".tif", picture(r))[1].tobytes(), r)),
    "cut.dcm": lambda p, r: write(p, cut(dicom(r), r)),
    "cut.nii": lambda p, r: write(p, cut(nifti(r), r)),
    "flipped.jpg": lambda p, r: write(p, flipped(cv2.imencode(".jpg", picture(r))[1].tobytes(), r)),
    "flipped.tif": lambda p, r: write(p, flipped(cv2.imencode(".tif", picture(r))[1].tobytes(), r)),
    "flipped.dcm": lambda p, r: write(p, flipped(dicom(r), r)),
    "flipped.nii.gz": lambda p, r: write(p, flipped(gzip.compress(nifti(r)), r)),
    "noise.png": lambda p, r: write(p, r.bytes(500)),
    "noise.dcm": lambda p, r: write(p, r.bytes(500)),
    "noise.nrrd": lambda p, r: write(p, r.bytes(500)),
    "noise.npy": lambda p, r: write(p, r.bytes(500)),
    "noise": lambda p, r: write(p, bytes(128) + b"DICM" + r.bytes(500)),
    "zeros.dcm": lambda p, r: sparse(p, bytes(128) + b"DICM", 3 * 10**9),
    "sparse.png": lambda p, r: sparse(p, b"\x89PNG\r\n\x1a\n", 10**11),
    "sparse.nii": lambda p, r: sparse(p, nifti(r)[:400], 10**11),
    "sparse": lambda p, r: sparse(p, b"", 10**11),
    "bomb.nii.gz": lambda p, r: write(p, gzip.compress(nifti(r) + bytes(10**7))),
    "rows.dcm": lambda p, r: write(p, dicom(r, Rows=65_535, Columns=65_535)),
    "frames.dcm": lambda p, r: write(p, dicom(r, NumberOfFrames=2_000_000_000)),
    "sizes.nrrd": lambda p, r: write(p, nrrd("90000 90000 90000")),
    "detached.nrrd": lambda p, r: write(p, nrrd("8 8 8", "data file: /etc/passwd\n")),
    "negative.nrrd": lambda p, r: write(p, nrrd("-8 8 8", data=bytes(512))),
    "shape.npy": lambda p, r: write(p, npy((10**9, 10**9))),
    "pickle.npy": lambda p, r: np.save(p, np.array([{}], object), allow_pickle=True),
    "deep.png": lambda p, r: deep(p, cv2.imencode(".png", picture(r))[1].tobytes()),
}
"""By the end of the name: what is left there."""


def leave(folder: Path, number: int, rng: Random) -> str:
    """Leave one hostile item, under a name that may be hostile too; return its kind."""
    kind = list(KINDS)[number % len(KINDS)]
    prefix = ("h", "h\n", "h ", "-h", "h;$(x)", "h\udcf6\udcff", "h" + "x" * 190)[number % 7]
    path = folder / f"{prefix}{number}.{kind}"
    KINDS[kind](path, rng)
    return kind
