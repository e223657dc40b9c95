"""Instructions and targets: how a sample becomes a question and an answer."""

from lyrics.data.records import Sample
from lyrics.refiner.spatial_text import CoordinateFormat, format_box

DESCRIBE = "Describe the image."


def instruction(sample: Sample) -> str:
    """What the model is asked; the first question of a dialogue."""
    if sample.task == "caption":
        return DESCRIBE
    if sample.task == "refer":
        return f"Where is {sample.question}?"
    if sample.task == "chat":
        return sample.turns[0][0]
    return sample.question


def target(sample: Sample, width: int, height: int, coordinate_format: CoordinateFormat, choice: int = 0) -> str:
    """What the model should say. Of several references number `choice` modulo their count, of a dialogue the first.

    Args:
        width: of the image, pixels; with `height` it turns the box of a referring expression into fractions.
    """
    if sample.task == "refer":
        x0, y0, x1, y1 = sample.box_xyxy or (0.0, 0.0, 0.0, 0.0)
        return format_box((x0 / width, y0 / height, x1 / width, y1 / height), coordinate_format)
    if sample.task == "chat":
        return sample.turns[0][1]
    return sample.references[choice % len(sample.references)]
