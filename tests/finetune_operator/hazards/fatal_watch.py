"""Hazard D: an API server that is away for a minute ends the process."""

import kopf


@kopf.on.event("configmaps", labels={"hazard": "d"})
async def show(type: str | None, name: str, **_: object) -> None:
    print(type, name, flush=True)
