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

    def fault(self, split: str, name: str, picture: Image.Image) -> str | None:
        """Why a picture must not be in `split`; one of a split that measures is remembered."""
        if self._index is None or split == CLEANED:
            return None
        seen = perceptual_hash(picture)
        if split in EVALUATED:
            self._index.add(f"{split}/{name}", seen)
            return None
        original = self._index.find(seen)
        return None if original is None else f"leaked: the picture looks like {self._index.name(original)}"
