"""Named hardware (params/hardware) and what a preset is planned with (params/plan)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lyrics.config import PARAMS, Amount, Count, Fraction, Positive
from lyrics.errors import InputError
from lyrics.numerics import Precision

GIB = 2**30
_FORBID = ConfigDict(extra="forbid")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Hardware:
    """One machine or more, as the plan sees it.

    `devices` are alike and each has `memory_gib`. The rates are those that large products and copies reach, not those
    of a data sheet. `runtime_gib` is what a process holds beside tensors, `allocator_factor` how much more than the
    bytes of activations their allocation takes (fragments, scratch space of kernels). `source` says where the numbers
    are from.
    """

    kind: Annotated[str, Field(pattern="^(cpu|cuda)$")]
    devices: Count
    memory_gib: Positive
    bf16_tflops: Positive
    fp32_tflops: Positive
    bandwidth_gb_s: Positive
    microseconds_per_operation: Positive
    runtime_gib: Positive
    allocator_factor: Annotated[float, Field(ge=1)]
    disk_gib: Positive
    source: str

    def precision(self, chosen: Precision) -> Precision:
        """What `auto` is on it: bf16 where its products are faster."""
        if chosen != "auto":
            return chosen
        return "bf16" if self.bf16_tflops > self.fp32_tflops else "fp32"


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Assumptions:
    """What a preset's data looks like, before there is any: the longest of a batch, since that is what is computed.

    `pairs` None: the scenes of params/world, with those of the annotated splits. `objects`: in the picture of a batch
    that has most. Tokens are those of MQ-Former's tokenizer, but `object_tokens_llm` and `prompt_tokens` (the chat
    template) of the language model's.
    `pair_tokens`: of a caption and a spatial text in a row, the mean of the parts in which matching pads them.
    `packed_share`: rows that a batch of stage 2 takes when it is packed, of those that it takes unpacked.
    `detector_*`: of a detector that is a file of the user's, which the plan cannot build.
    """

    hardware: str
    pairs: Count | None
    raw_bytes_per_pair: Count
    objects: Count
    tag_tokens: Count
    object_tokens: Count
    object_tokens_llm: Count
    caption_tokens: Count
    pair_tokens: Count
    instruction_tokens: Count
    answer_tokens: Count
    prompt_tokens: Amount
    masked_share: Fraction
    packed_share: Fraction
    detector_width: Count
    detector_parameters: Amount
    detector_gflop: float
    source: str


def read_hardware(name: str, params: Path = PARAMS) -> Hardware:
    """params/hardware/NAME.yaml.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    return _read(Hardware, params / "hardware", name)


def read_assumptions(preset: str, params: Path = PARAMS) -> Assumptions:
    return _read(Assumptions, params / "plan", preset)


def _read(kind: type[T], folder: Path, name: str) -> T:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise InputError(f"{folder.name} {name!r} is unknown; choices: {known}, or a file of yours in {folder}")
    try:
        values: Any = yaml.safe_load(path.read_text())
        return TypeAdapter(kind).validate_python(values)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        expected = ", ".join(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
        raise InputError(f"{path} was refused ({'; '.join(wrong)}); it holds {expected}") from None
