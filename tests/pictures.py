"""Pictures that are not drawn. Most tests run a command whole and look at none of its pictures, and
to draw them takes longer than all that a tiny run computes."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


ONE_PIXEL = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) \
    + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def draw_on_demand() -> None:
    """From here on in this process, and in its forks, Figure.savefig writes one pixel, unless
    DRAW_PICTURES=1 stands in the environment at that moment."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(figure: Figure, path: str | Path, **options: object) -> None:
        if os.environ.get("DRAW_PICTURES") == "1":
            draw(figure, path, **options)
        else:
            Path(path).write_bytes(ONE_PIXEL)

    Figure.savefig = savefig
