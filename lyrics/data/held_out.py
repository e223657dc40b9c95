"""Pictures of the splits that measure, by what they look like: no near copy of them may be trained on."""

from PIL import Image

from lyrics.data.filters import DuplicateIndex, perceptual_hash

EVALUATED = ("test", "test_ood", "val")
CLEANED = "web"  # where `clean` seeks near copies


class HeldOut:
    """Splits that measure must be read first.

    Args:
        max_bits: of 256 bits of perceptual hash (`clean.duplicate_hamming_bits` of web pairs); None: nothing is sought.
    """

    def __init__(self, max_bits: int | None) -> None:
        self._index = None if max_bits is None else DuplicateIndex(max_bits)

    def add(self, split: str, name: str, picture: Image.Image) -> None:
        """Remember a picture of a split that measures; of other splits nothing."""
        if self._index is not None and split in EVALUATED:
            self._index.add(f"{split}/{name}", perceptual_hash(picture))

    def fault(self, split: str, picture: Image.Image) -> str | None:
        """Why a picture must not be in `split`."""
        if self._index is None or split == CLEANED or split in EVALUATED:
            return None
        original = self._index.find(perceptual_hash(picture))
        return None if original is None else f"leaked: the picture looks like {self._index.name(original)}"
