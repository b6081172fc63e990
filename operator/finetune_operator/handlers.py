"""The only importer of kopf: watch events go to the store and the queue, and nothing is decided here.

kopf brings lists, watches and reconnects. Its own state machine (annotations, finalizers, diffs, timers, peering, events) stays
off: each part of it writes to objects or can miss a change.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator

import kopf
from finetune_api import names

from finetune_operator.cluster import SELECTOR
from finetune_operator.transport import Transport
from finetune_operator.views import Kind, RawObject

# Takes in the kind, the object, and whether it was deleted.
Receive = Callable[[Kind, RawObject, bool], None]
CleanUp = Callable[[], Awaitable[None]]

_RESOURCES = {
    Kind.FINETUNEJOB: (names.GROUP, names.VERSION, names.PLURAL),
    Kind.JOB: ("batch", "v1", "jobs"),
    Kind.POD: ("", "v1", "pods"),
    Kind.FINETUNEPROFILE: (names.GROUP, names.VERSION, names.PROFILE_PLURAL),
}

# kopf asks again at once, for as long as the API server refuses what it was given.
_LOGIN_SECONDS = 2


async def watch(
    transport: Transport, *, namespaces: tuple[str, ...], receive: Receive, stop: asyncio.Event, clean_up: CleanUp
) -> None:
    """Watch all kinds until `stop` is set or a signal arrives; clean_up runs when the watches have ended."""
    registry = kopf.OperatorRegistry()
    login_count = itertools.count()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: object) -> None:
        configure_kopf(settings)

    @kopf.on.cleanup(registry=registry)
    async def finish(**_: object) -> None:
        await clean_up()

    @kopf.on.login(registry=registry)
    async def login(**_: object) -> kopf.AiohttpSession:
        if next(login_count):
            await asyncio.sleep(_LOGIN_SECONDS)
            await transport.reload()
        return kopf.AiohttpSession(server=transport.server, aiohttp_session=await transport.open_watch_session())

    for kind in Kind:
        _register(kind, registry=registry, receive=receive)
    await kopf.operator(
        registry=registry,
        clusterwide=not namespaces,
        namespaces=namespaces,
        standalone=True,
        identity=names.MANAGED_BY,  # type: ignore[arg-type]  # a NewType not exported; by default the name of a user that has none
        stop_flag=stop,
    )


def _register(kind: Kind, *, registry: kopf.OperatorRegistry, receive: Receive) -> None:
    group, version, plural = _RESOURCES[kind]

    @kopf.on.event(group, version, plural, id=plural, registry=registry)
    async def take_in(event: kopf.RawEvent, **_: object) -> None:
        receive(kind, event["object"], event["type"] == "DELETED")


def name_watchers(namespaces: tuple[str, ...]) -> frozenset[str]:
    """Return the names that kopf gives to its watcher tasks: they must all be alive."""
    resources = {kind: f"{plural}.{version}.{group}".strip(".") for kind, (group, version, plural) in _RESOURCES.items()}
    return frozenset(f"watcher for {resources[kind]}@{each}" for kind in _RESOURCES for each in kind.list_scopes(namespaces))


class EndlessBackoffs:
    """Seconds between the tries of a request: kopf iterates anew for each, and a finite sequence would end the process."""

    def __iter__(self) -> Iterator[float]:
        """Yield growing delays, then the same one for ever."""
        return itertools.chain((1, 1, 2, 3, 5, 8, 13), itertools.repeat(15))


class NoDiffBase(kopf.DiffBaseStorage):
    """Keeps no last state: its copies are three quarters of the cost of an event, and annotations are the user's."""

    def build(self, **_: object) -> kopf.BodyEssence:
        """Return nothing to compare."""
        return {}

    def fetch(self, **_: object) -> None:
        """Return that nothing is stored."""

    def store(self, **_: object) -> None:
        """Store nothing."""


class NoProgress(kopf.ProgressStorage):
    """Keeps no state of handlers."""

    def fetch(self, **_: object) -> None:
        """Return that nothing is stored."""

    def store(self, **_: object) -> None:
        """Store nothing."""

    def purge(self, **_: object) -> None:
        """Remove nothing."""

    def touch(self, **_: object) -> None:
        """Touch nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Return the essence as it is."""
        return essence


def configure_kopf(settings: kopf.OperatorSettings) -> None:
    """Set everything that differs from kopf's defaults."""
    settings.watching.label_selectors["batch", "v1", "jobs"] = SELECTOR
    settings.watching.label_selectors["", "v1", "pods"] = SELECTOR
    settings.watching.chunk_size = 500
    settings.watching.initial_streaming = False
    # A watcher that this timer ends dies silently; streams are bounded by the server and by TCP keepalive instead.
    settings.watching.inactivity_timeout = 365 * 86_400
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 250
    settings.watching.connect_timeout = 10
    settings.watching.reconnect_backoff = 1.0
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 0.5
    settings.queueing.exit_timeout = 1.0
    settings.queueing.error_delays = (1, 1, 2, 3, 5)
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = EndlessBackoffs()
    settings.networking.enforce_retry_after = True
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = 25
    settings.execution.max_workers = 4
