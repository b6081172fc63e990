"""The settings of the operator, loaded after another script: `kopf run SCRIPT guard.py`."""

import kopf
from finetune_operator.handlers import configure_kopf


@kopf.on.startup()
async def guard(settings: kopf.OperatorSettings, **_: object) -> None:
    configure_kopf(settings)
