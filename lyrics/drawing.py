"""What the refiner saw, drawn on the picture."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MASK_OPACITY = 0.4
_LEAST_SIDE_PX = 512  # smaller pictures are enlarged, so that names can be read


def object_colour(index: int) -> tuple[int, int, int]:
    """Well-spread hues: golden-ratio steps around the colour wheel."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_objects(
    image: Image.Image,
    tags: Sequence[str],
    boxes_xyxy: np.ndarray | Sequence[Sequence[float]],
    scores: np.ndarray | Sequence[float],
    masks_NHW: np.ndarray | Sequence[np.ndarray] = (),
) -> Image.Image:
    """Boxes (pixels), masks and names over `image`, in the order given; a new picture is returned."""
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    for index, mask in enumerate(masks_NHW):
        inside = np.asarray(mask, bool)
        pixels[inside] = (1 - _MASK_OPACITY) * pixels[inside] + _MASK_OPACITY * np.array(object_colour(index))
    scale = max(1, -(-_LEAST_SIDE_PX // max(image.size)))
    drawn = Image.fromarray(pixels.astype(np.uint8)).resize((image.width * scale, image.height * scale))
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=max(14, drawn.width // 40))
    for index, (tag, box, score) in enumerate(zip(tags, boxes_xyxy, scores, strict=True)):
        corners = [float(value) * scale for value in box]
        pen.rectangle(corners, outline=object_colour(index), width=3)
        label = f"{tag} {score:.2f}"
        height = font.getbbox(label)[3] + 4
        top = corners[1] - height if corners[1] >= height else corners[3]
        pen.rectangle(
            (corners[0], top, corners[0] + font.getlength(label) + 6, top + height), fill=object_colour(index)
        )
        pen.text((corners[0] + 3, top + 1), label, fill=(0, 0, 0), font=font)
    return drawn
