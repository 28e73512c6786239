"""A picture in the terminal: Kitty's or iTerm2's graphics where the terminal has them, else coloured half blocks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mmkd.store.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

HEIGHT_LINES = 24


def preview(image: Image.Image) -> str:
    """What to print for a picture, at most `HEIGHT_LINES` lines high.

    Raises:
        UserError: no terminal, or the package that draws is not installed.
    """
    if not sys.stdout.isatty():
        raise UserError("--image draws into a terminal, and the output is none; leave --image out")
    return drawn(image)


def drawn(image: Image.Image) -> str:
    """The picture as text with colour codes.

    Raises:
        UserError: the package `term-image` is not installed.
    """
    try:
        from term_image.exceptions import TermImageError
        from term_image.image import AutoImage
    except ModuleNotFoundError as error:
        raise UserError(
            f"--image needs the package {error.name!r}: pip install 'mmkd[terminal]', or leave --image out"
        ) from error
    try:
        return str(AutoImage(image.convert("RGB"), height=HEIGHT_LINES))
    except TermImageError as error:
        raise UserError(f"the terminal cannot show the picture: {error}; leave --image out") from error
