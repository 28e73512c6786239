"""A picture in the terminal: Sixel or Kitty's graphics if the terminal supports them, else half blocks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mmkd.base.errors import UserError
from mmkd.base.install import install_command

if TYPE_CHECKING:
    from PIL import Image

HEIGHT_LINES = 24


def draw(image: Image.Image) -> None:
    """Draw a picture into the terminal, at most `HEIGHT_LINES` lines high and as wide as the terminal. The terminal is
    queried for its features (0.1 s without an answer). Raises UserError if standard output is not a terminal, or the
    package that draws is not installed."""
    if not sys.stdout.isatty():
        raise UserError("--image draws into a terminal, and the output is none; leave --image out")
    try:
        from rich.console import Console
        from textual_image.renderable import Image as Drawing
    except ModuleNotFoundError as error:
        raise UserError(
            f"--image needs the package {error.name!r}: {install_command('terminal')}, or leave --image out"
        ) from error
    # An `auto` side follows from the other and the picture's shape: a wide picture is bound by the terminal's width.
    console = Console()
    columns = min(console.width, round(2 * HEIGHT_LINES * image.width / image.height))
    console.print(Drawing(image.convert("RGB"), width=max(columns, 1), height="auto"))
