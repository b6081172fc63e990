"""Hazard C: objects are lost when a stream of initial events is cut."""

import kopf


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, **_: object) -> None:
    settings.watching.initial_streaming = True


@kopf.on.event("configmaps", labels={"hazard": "c"})
async def show(type: str | None, name: str, **_: object) -> None:
    print(type, name, flush=True)
