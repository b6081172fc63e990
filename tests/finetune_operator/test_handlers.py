"""The settings of kopf are what the design asks for."""

from pathlib import Path

import kopf
from finetune_operator import handlers
from finetune_operator.handlers import EndlessBackoffs, configure_kopf
from plain_kopf import HAZARDS


def test_backoffs_never_end_and_begin_anew() -> None:
    backoffs = EndlessBackoffs()
    rounds = [[seconds for _, seconds in zip(range(100), backoffs, strict=False)] for _ in range(2)]

    assert rounds[0] == rounds[1]
    assert (rounds[0][:4], rounds[0][-1]) == ([1, 1, 2, 3], 15)


def test_kopf_writes_nothing_and_hears_everything() -> None:
    settings = kopf.OperatorSettings()
    configure_kopf(settings)

    assert settings.persistence.diffbase_storage.build(body=kopf.Body({"spec": {}})) == {}
    assert not settings.posting.enabled
    assert settings.peering.standalone
    assert settings.scanning.disabled
    assert not settings.watching.initial_streaming
    assert settings.watching.inactivity_timeout > 86_400
    assert (settings.watching.server_timeout, settings.watching.client_timeout) == (240, 250)


def test_watcher_of_profiles_is_one_for_the_cluster() -> None:
    assert "watcher for finetuneprofiles.v1alpha1.finetune.dev@None" in handlers.name_watchers(())
    watchers = handlers.name_watchers(("a", "b"))

    assert {each for each in watchers if "finetuneprofiles" in each} == {
        "watcher for finetuneprofiles.v1alpha1.finetune.dev@None"
    }
    assert {"watcher for pods.v1@a", "watcher for pods.v1@b"} <= watchers


def test_page_of_hazards_shows_the_scripts_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "design" / "kopf-hazards.md").read_text(encoding="utf-8")
    scripts = [path for path in HAZARDS.glob("*.py") if path.stem != "guard"]

    assert len(scripts) == 4
    assert [path.name for path in scripts if path.read_text(encoding="utf-8").split("\n\n", 1)[1] not in page] == []
