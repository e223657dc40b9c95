"""Draw docs/scene.png: one scene of the embedded world, what is true of it, and questions with their answers.

`python docs/make_scene.py` from the root of the project; the same scene gives the same bytes.
"""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lyrics import seeding
from lyrics.drawing import draw_objects
from lyrics.refiner.spatial_text import format_objects
from lyrics.world import scenes
from lyrics.world.questions import questions

OUT = Path(__file__).with_name("scene.png")
SCENE = 39
QUESTIONS = 5
PICTURE_PX, SCENE_PX, GAP, TEXT_WIDTH, HEAD = 384, 256, 24, 392, 40
PAPER, INK, SOFT = (250, 250, 248), (28, 30, 34), (104, 108, 116)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def main() -> None:
    scene = scenes.sample_scene(seeding.rng("docs", SCENE), "docs", SCENE_PX)
    picture = scenes.render(scene)
    tags = [item.kind for item in scene.objects]
    boxes = np.array([item.box_xyxy for item in scene.objects], np.float32)
    refined = draw_objects(picture, tags, boxes, np.ones(len(tags)), scenes.masks(scene))
    width = GAP + 2 * (PICTURE_PX + GAP) + TEXT_WIDTH + GAP
    canvas = Image.new("RGB", (width, HEAD + PICTURE_PX + GAP + 8), PAPER)
    pen = ImageDraw.Draw(canvas)
    lefts = [GAP, 2 * GAP + PICTURE_PX, 3 * GAP + 2 * PICTURE_PX]
    for left, image in zip(lefts, (picture, refined), strict=False):
        canvas.paste(image.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS), (left, HEAD))
    for left, title in zip(lefts, ("Scene", "Tags, boxes, masks", "Questions and answers"), strict=True):
        pen.text((left, 12), title, fill=SOFT, font=font(15))
    top = HEAD
    for asked in questions(scene, seeding.rng("docs questions", SCENE), QUESTIONS):
        pen.text((lefts[2], top), asked.text, fill=INK, font=font(16))
        pen.text((lefts[2], top + 22), asked.answer, fill=INK, font=font(16, bold=True))
        top += 56
    pen.text((lefts[2], top + 6), "Spatial representation", fill=SOFT, font=font(15))
    text = format_objects(tags, boxes / SCENE_PX, "grid100")
    for row, line in enumerate(text.replace("; ", ";\n").splitlines()):
        pen.text((lefts[2], top + 30 + 20 * row), line, fill=INK, font=font(14))
    canvas.quantize(128, dither=Image.Dither.NONE).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
