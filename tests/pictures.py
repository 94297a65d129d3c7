"""Pictures that are not drawn. Most tests run a command whole and look at none of its pictures, and
to draw them takes longer than all that a tiny run computes."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

pixel = io.BytesIO()
Image.new("L", (1, 1)).save(pixel, "PNG")
ONE_PIXEL = pixel.getvalue()


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
