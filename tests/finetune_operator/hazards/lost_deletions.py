"""Hazard A: an index keeps what was deleted while the watch was away."""

import kopf


@kopf.index("finetunejobs")
def known(name: str, **_: object) -> dict[str, bool]:
    return {name: True}


@kopf.on.event("finetunejobs")
async def show(type: str | None, name: str, known: kopf.Index[str, bool], **_: object) -> None:
    print(type, name, "index:", *sorted(known), flush=True)
