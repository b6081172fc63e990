"""Hazard B: a watcher ends without a word when its timer fires while an event is handed on."""

import asyncio
import os
import time

import kopf

# The default is 70; a smaller one shows the same sooner.
WINDOW = float(os.environ.get("INACTIVITY_TIMEOUT", "70"))
# A turn of a busy event loop. The window ends in the middle of one.
TURN = WINDOW / 4.5


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, **_: object) -> None:
    settings.watching.inactivity_timeout = WINDOW


async def compute() -> None:
    """Stand for whatever keeps an event loop busy: a handler that computes, a large JSON document, a CPU limit."""
    for _ in range(7):
        time.sleep(TURN)
        await asyncio.sleep(0)
    print("idle", flush=True)


@kopf.on.event("configmaps")
async def show(name: str, memo: kopf.Memo, **_: object) -> None:
    print("configmap", name, flush=True)
    if name == "first":
        memo.task = asyncio.create_task(compute())
        print("busy", flush=True)


@kopf.on.event("secrets")
async def list_watchers(name: str, **_: object) -> None:
    names = (task.get_name() for task in asyncio.all_tasks())
    print("secret", name, "alive:", *sorted(each for each in names if each.startswith("watcher for")), flush=True)
