"""What an attempt was begun with, kept in its Job's annotations: its profile may change or be gone before it ends (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api import names
from finetune_api.profile import AcceleratorKind, Price
from pydantic import TypeAdapter, ValidationError

_PRICE: TypeAdapter[str] = TypeAdapter(Price)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What an attempt was begun with."""

    profile: str | None = None
    profile_generation: int | None = None
    accelerators: int = 1
    """Number of accelerators over all pods; of a CPU job, the number of its pods."""
    accelerator_kind: AcceleratorKind = AcceleratorKind.CPU
    price_per_accelerator_hour: str | None = None
    training_seconds: int | None = None

    def build_annotations(self) -> dict[str, str]:
        """Return the annotations that parse_snapshot reads back."""
        values = {
            names.ANNOTATION_PROFILE: self.profile,
            names.ANNOTATION_PROFILE_GENERATION: self.profile_generation,
            names.ANNOTATION_ACCELERATORS: self.accelerators,
            names.ANNOTATION_ACCELERATOR_KIND: self.accelerator_kind.value,
            names.ANNOTATION_PRICE: self.price_per_accelerator_hour,
            names.ANNOTATION_TRAINING_SECONDS: self.training_seconds,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def parse_snapshot(annotations: Mapping[str, str]) -> Snapshot:
    """Return the snapshot in a Job's annotations. What is missing or was spoilt has its default."""
    return Snapshot(
        profile=annotations.get(names.ANNOTATION_PROFILE),
        profile_generation=_parse_number(annotations.get(names.ANNOTATION_PROFILE_GENERATION)),
        accelerators=_parse_number(annotations.get(names.ANNOTATION_ACCELERATORS)) or 1,
        accelerator_kind=_parse_kind(annotations.get(names.ANNOTATION_ACCELERATOR_KIND)),
        price_per_accelerator_hour=_parse_price(annotations.get(names.ANNOTATION_PRICE)),
        training_seconds=_parse_number(annotations.get(names.ANNOTATION_TRAINING_SECONDS)) or None,
    )


def _parse_number(text: str | None) -> int | None:
    is_number = text is not None and text.isascii() and text.isdecimal() and len(text) <= 9
    return int(text) if text and is_number else None


def _parse_kind(text: str | None) -> AcceleratorKind:
    return AcceleratorKind(text) if text in set(AcceleratorKind) else AcceleratorKind.CPU


def _parse_price(text: str | None) -> str | None:
    try:
        return _PRICE.validate_python(text)
    except ValidationError:
        return None
