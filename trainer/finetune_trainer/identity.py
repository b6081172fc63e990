"""What shapes a model, field by field: a checkpoint is of use only where all of it is the same (pure)."""

from collections.abc import Mapping

from finetune_api.contract import TrainerConfig

_MAX_SHOWN_LENGTH = 48


def describe_identity(config: TrainerConfig, *, data_digest: str, backbone_digest: str) -> dict[str, str]:
    """Return the fields that shape the model, under the names that they have in the spec."""
    hyperparameters = config.hyperparameters.model_dump(mode="json", by_alias=True)
    return {
        "task": config.task.value,
        "model.uri": config.model_uri,
        "model.sha256": backbone_digest,
        "dataset.sha256": data_digest,
        "method.type": config.method.value,
        "budget.trainingSeconds": _show(config.training_seconds),
        **{f"hyperparameters.{name}": _show(value) for name, value in sorted(hyperparameters.items())},
    }


def find_differences(kept: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """Return a phrase for each field that differs."""
    return tuple(
        f"{name} was {_cut(kept.get(name, 'not there'))} and is {_cut(wanted.get(name, 'not there'))}"
        for name in sorted(kept.keys() | wanted.keys())
        if kept.get(name) != wanted.get(name)
    )


def _show(value: object) -> str:
    return "unset" if value is None else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_LENGTH else text[:12]
