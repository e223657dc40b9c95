"""What the frozen parts saw in one picture: the input of MQ-Former."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenImage:
    """One picture after the image encoder and the visual refiner. N objects, ordered by score; N may be 0.

    Attributes:
        image_tokens_PD: image-encoder tokens, float16 or float32, (patches, encoder width).
        detector_tokens_ND: detector features pooled inside each box, (objects, detector width).
        segmenter_tokens_ND: segmenter features averaged under each mask, (objects, segmenter width).
        tags: N names.
        boxes_xyxy_N4: corners as fractions of width and height, in [0, 1].
        spatial_text: tags and boxes as text (`refiner.spatial_text.format_objects`).
    """

    image_tokens_PD: np.ndarray
    detector_tokens_ND: np.ndarray
    segmenter_tokens_ND: np.ndarray
    tags: tuple[str, ...]
    boxes_xyxy_N4: np.ndarray
    spatial_text: str
