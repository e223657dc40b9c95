"""One file per block of the paper. MQ-Former is offered here too, imported when asked for: torch costs seconds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lyrics.model.mq_former import MQFormer, MQFormerConfig

__all__ = ["MQFormer", "MQFormerConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lyrics.model import mq_former

    return getattr(mq_former, name)
