"""What the store keeps, in whatever order events and answers arrive."""

import itertools
import tracemalloc
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.contract import TrainerReport
from finetune_operator.observed import Observed, PodRefusal, ReceivedReport
from finetune_operator.store import Store
from finetune_operator.views import Key, Kind

_KEY = ("team", "emoji")
_REPORT = ReceivedReport(
    run="0a1b2c3d",
    attempt=1,
    received_at=datetime(2026, 1, 1, tzinfo=UTC),
    report=TrainerReport.model_validate({"trainerStatus": {"progressPercentage": 7}}),
)


@pytest.fixture
def store() -> Store:
    return Store()


def _generation(store: Store) -> int | None:
    seen = store.read(_KEY)
    return seen[0].generation if seen else None


def test_newest_version_stays_whatever_the_order(objects: Any) -> None:
    for order in itertools.permutations((1, 2, 3)):
        store = Store()
        for version in order:
            store.observe(Kind.FINETUNEJOB, objects.job(version=version, generation=version))

        assert _generation(store) == 3, order


def test_versions_are_compared_as_numbers(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(version=10, generation=10))
    store.observe(Kind.FINETUNEJOB, objects.job(version=9, generation=9))

    assert _generation(store) == 10


def test_every_event_names_the_job_to_reconcile(store: Store, objects: Any) -> None:
    # Also an old one: the answer to our own write may have carried a change of the user with it.
    store.observe(Kind.FINETUNEJOB, objects.job(version=2))

    assert store.observe(Kind.FINETUNEJOB, objects.job(version=1)) == (_KEY,)
    assert store.observe(Kind.JOB, objects.child()) == (_KEY,)
    assert store.observe(Kind.POD, objects.pod(), is_deleted=True) == (_KEY,)


def test_deleted_object_is_gone(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.observe(Kind.FINETUNEJOB, objects.job(version=2), is_deleted=True)

    assert store.read(_KEY) is None


def test_late_answer_does_not_bring_back_a_deleted_object(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(version=1))
    store.observe(Kind.FINETUNEJOB, objects.job(version=5), is_deleted=True)
    store.observe(Kind.FINETUNEJOB, objects.job(version=4))

    assert store.read(_KEY) is None


def test_object_that_gets_its_labels_back_comes_back(store: Store, objects: Any) -> None:
    # A watch with a label selector shows an object that loses its labels as deleted.
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.observe(Kind.JOB, objects.child(version=5), is_deleted=True)
    store.observe(Kind.JOB, objects.child(version=6))

    seen = store.read(_KEY)
    assert seen is not None
    assert len(seen[1].children) == 1


def test_deletion_of_a_predecessor_does_not_touch_its_successor(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(uid="new", version=9))
    store.observe(Kind.FINETUNEJOB, objects.job(uid="old", version=8), is_deleted=True)

    seen = store.read(_KEY)
    assert seen is not None
    assert seen[0].uid == "new"


def test_job_sees_its_own_children_and_pods_alone(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(uid="new"))
    store.observe(Kind.JOB, objects.child("mine", job_uid="new"))
    store.observe(Kind.JOB, objects.child("of-a-predecessor", job_uid="old"))
    store.observe(Kind.JOB, objects.child("of-another-job", job="other"))
    store.observe(Kind.JOB, objects.child("of-another-namespace", namespace="else", job_uid="new"))
    store.observe(Kind.POD, objects.pod("my-pod", job_uid="new"))
    store.observe(Kind.POD, objects.pod("old-pod", job_uid="old"))

    seen = store.read(_KEY)
    assert seen is not None
    assert [child.name for child in seen[1].children] == ["mine"]
    assert [pod.name for pod in seen[1].pods] == ["my-pod"]


def test_child_that_arrives_before_its_job_is_there(store: Store, objects: Any) -> None:
    store.observe(Kind.JOB, objects.child())
    store.observe(Kind.FINETUNEJOB, objects.job())

    seen = store.read(_KEY)
    assert seen is not None
    assert len(seen[1].children) == 1


def test_latest_report_is_kept_as_long_as_its_job(store: Store, objects: Any) -> None:
    store.put_report(_KEY, _REPORT)
    store.observe(Kind.FINETUNEJOB, objects.job())
    seen_before = store.read(_KEY)
    store.put_report(_KEY, _REPORT)
    seen_after = store.read(_KEY)
    store.observe(Kind.FINETUNEJOB, objects.job(version=2), is_deleted=True)
    store.observe(Kind.FINETUNEJOB, objects.job(uid="successor", version=3))
    seen_successor = store.read(_KEY)

    assert [seen[1].report for seen in (seen_before, seen_after, seen_successor) if seen] == [None, _REPORT, None]


def test_purge_removes_by_uid_and_names_the_owners(store: Store, objects: Any) -> None:
    store.observe(Kind.JOB, objects.child("gone", uid="1"))
    store.observe(Kind.JOB, objects.child("kept", uid="2"))

    assert store.purge(Kind.JOB, ["1"]) == [_KEY]
    assert store.versions(Kind.JOB) == {"2": 1}


@pytest.mark.parametrize(
    ("uid", "version", "expected"),
    [
        pytest.param("uid-team-emoji", 4, True, id="older than seen"),
        pytest.param("uid-team-emoji", 5, True, id="as seen"),
        pytest.param("uid-team-emoji", 6, False, id="newer"),
        pytest.param("another", 1, False, id="never seen"),
        pytest.param("buried", 99, True, id="deleted since"),
    ],
)
def test_store_knows_what_it_saw(store: Store, objects: Any, *, uid: str, version: int, expected: bool) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(uid="buried", version=3), is_deleted=True)
    store.observe(Kind.FINETUNEJOB, objects.job(version=5))

    assert store.knows(Kind.FINETUNEJOB, _KEY, uid=uid, version=version) is expected


def test_states_are_counted(store: Store, objects: Any) -> None:
    def ready(reason: str) -> dict[str, Any]:
        return {"conditions": [{"type": "Ready", "status": "False", "reason": reason}]}

    for number, reason in enumerate(("Pending", "Pending", "Running")):
        store.observe(Kind.FINETUNEJOB, objects.job(f"job-{number}", status=ready(reason)))
    store.observe(Kind.FINETUNEJOB, objects.job("job-0", version=2, status=ready("Running")))
    store.observe(Kind.FINETUNEJOB, objects.job("job-2", version=2), is_deleted=True)

    assert {state: number for state, number in store.count_states().items() if number} == {"Pending": 1, "Running": 1}


def test_object_costs_at_most_two_kilobytes(store: Store, objects: Any) -> None:
    number = 500
    raw = [(objects.job(f"job-{index}"), objects.child(f"child-{index}"), objects.pod(f"pod-{index}")) for index in range(number)]
    tracemalloc.start()
    for job, child, pod in raw:
        store.observe(Kind.FINETUNEJOB, job)
        store.observe(Kind.JOB, child)
        store.observe(Kind.POD, pod)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert used / (3 * number) < 2000


def _read(store: Store) -> Observed:
    seen = store.read(_KEY)
    assert seen is not None
    return seen[1]


def _observe_ended_pod(store: Store, objects: Any, name: str, *, child: str, version: int, **fields: Any) -> None:
    ended = {"phase": "Failed", "reason": "Evicted"}
    store.observe(Kind.POD, objects.pod(name, child=child, version=version, status=ended, **fields), is_deleted=True)


def test_deleted_pod_is_kept_as_it_was_seen_last(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.observe(Kind.POD, objects.pod("a", version=2))
    _observe_ended_pod(store, objects, "a", child="emoji-0a1b2c3d-1", version=3)

    assert () == _read(store).pods
    assert [("a", "Evicted")] == [(pod.name, pod.pod_reason) for pod in _read(store).former_pods]


def test_pod_whose_deletion_was_missed_is_kept_too(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.observe(Kind.POD, objects.pod("a", uid="u"))
    store.purge(Kind.POD, ["u"])

    assert ["a"] == [pod.name for pod in _read(store).former_pods]


def test_only_the_deleted_pods_of_the_latest_attempt_are_kept(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    _observe_ended_pod(store, objects, "old", child="emoji-0a1b2c3d-1", version=2)
    for number in range(9):
        _observe_ended_pod(store, objects, f"new-{number}", child="emoji-0a1b2c3d-2", version=3 + number)

    assert ["new-5", "new-6", "new-7", "new-8"] == [pod.name for pod in _read(store).former_pods]


def test_of_many_deleted_pods_the_first_one_and_those_that_went_first_are_kept(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    for index in range(20, -1, -1):
        _observe_ended_pod(store, objects, f"p{index}", child="emoji-0a1b2c3d-1", version=30 - index, index=index)

    assert [0, *range(20, 4, -1)] == [pod.index for pod in _read(store).former_pods]


def test_deleted_pods_and_refusals_go_with_their_job(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.put_refusal(_KEY, PodRefusal(child_uid="c", checked_at=_REPORT.received_at, message="no"))
    _observe_ended_pod(store, objects, "a", child="emoji-0a1b2c3d-1", version=2)
    store.observe(Kind.FINETUNEJOB, objects.job(version=3), is_deleted=True)
    store.observe(Kind.FINETUNEJOB, objects.job(version=4, uid="successor"))

    assert (None, ()) == (_read(store).refusal, _read(store).former_pods)


def test_deleted_pods_of_a_predecessor_are_not_the_successors(store: Store, objects: Any) -> None:
    store.observe(Kind.FINETUNEJOB, objects.job(uid="successor"))
    _observe_ended_pod(store, objects, "a", child="emoji-0a1b2c3d-1", version=2, job_uid="predecessor")

    assert () == _read(store).former_pods


@pytest.fixture
def team(store: Store, objects: Any) -> Store:
    """A store with a job that names profile a, one that names b, and one that names none."""
    for name in ("a", "b"):
        store.observe(Kind.FINETUNEJOB, objects.job(name, spec={"profileRef": {"name": name}}))
    store.observe(Kind.FINETUNEJOB, objects.job("none", spec={}))
    foreign = {"profileRef": {"name": "a"}, "managedBy": "kueue.x-k8s.io/multikueue"}
    store.observe(Kind.FINETUNEJOB, objects.job("another-managers", spec=foreign))
    return store


def _users(keys: Iterable[Key]) -> list[str]:
    return sorted(name for _, name in keys)


def test_profile_concerns_the_jobs_that_name_it(team: Store, objects: Any) -> None:
    assert _users(team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=1))) == ["a"]
    assert _users(team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=2, image="x"))) == ["a"]
    assert _users(team.observe(Kind.FINETUNEPROFILE, objects.profile("other"))) == []
    assert _users(team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=3), is_deleted=True)) == ["a"]


def test_profile_that_was_seen_already_concerns_nobody(team: Store, objects: Any) -> None:
    team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=2))

    assert team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=2)) == ()
    assert team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=1)) == ()


def test_default_profile_concerns_the_jobs_that_name_none(team: Store, objects: Any) -> None:
    def observe(name: str, version: int, *, is_default: bool = True, is_deleted: bool = False) -> list[str]:
        raw = objects.profile(name, version=version, isDefault=is_default)
        return _users(team.observe(Kind.FINETUNEPROFILE, raw, is_deleted=is_deleted))

    assert observe("m", 1) == ["none"]
    assert observe("m", 2) == ["none"]
    assert observe("x", 1) == [], "the first by name stays the default"
    assert observe("a", 1) == ["a", "none"]
    assert observe("m", 3) == [], "it is the default no more"
    assert observe("a", 2, is_default=False) == ["a", "none"], "it was the default before"
    assert observe("m", 4, is_deleted=True) == ["none"]
    assert observe("x", 2, is_deleted=True) == ["none"]


def test_purged_profile_concerns_its_users(team: Store, objects: Any) -> None:
    team.observe(Kind.FINETUNEPROFILE, objects.profile("b", isDefault=True))

    assert _users(team.purge(Kind.FINETUNEPROFILE, ["uid-b"])) == ["b", "none"]
    assert len(team.profiles) == 0


def test_every_job_sees_all_profiles(team: Store, objects: Any) -> None:
    team.observe(Kind.FINETUNEPROFILE, objects.profile("a", version=7, image="x:1"))
    seen = team.read(("team", "none"))

    assert seen is not None
    (profile,) = seen[1].profiles
    assert (profile.name, profile.generation, profile.spec.image if profile.spec else None) == ("a", 7, "x:1")


def test_unreadable_profile_is_still_the_default(team: Store, objects: Any) -> None:
    keys = team.observe(Kind.FINETUNEPROFILE, objects.profile("z", isDefault=True, limits={"maxNodes": "all"}))
    (profile,) = (record.content for record in team.profiles)

    assert _users(keys) == ["none"]
    assert (profile.is_default, profile.spec) == (True, None)
    assert profile.spec_error is not None
    assert "spec.limits.maxNodes" in profile.spec_error


def test_pods_before_an_eviction_are_forgotten_with_the_next_admission(store: Store, objects: Any) -> None:
    suspended = objects.child(version=2) | {"spec": {"suspend": True}}
    store.observe(Kind.FINETUNEJOB, objects.job())
    store.observe(Kind.JOB, suspended)
    _observe_ended_pod(store, objects, "a", child="emoji-0a1b2c3d-1", version=3)
    assert ["a"] == [pod.name for pod in _read(store).former_pods]
    store.observe(Kind.JOB, objects.child(version=4) | {"spec": {"suspend": False}})
    assert () == _read(store).former_pods
    _observe_ended_pod(store, objects, "b", child="emoji-0a1b2c3d-1", version=5)
    store.observe(Kind.JOB, objects.child(version=6) | {"spec": {"suspend": False}})

    assert ["b"] == [pod.name for pod in _read(store).former_pods]


def test_job_of_another_manager_is_known_and_left_alone(store: Store, objects: Any) -> None:
    foreign = objects.job(spec={"managedBy": "kueue.x-k8s.io/multikueue"}, version=3)
    store.observe(Kind.FINETUNEJOB, foreign)

    assert None is store.read(_KEY)
    assert ([], {}) == (store.list_keys(), store.count_states())
    assert store.knows(Kind.FINETUNEJOB, _KEY, uid=foreign["metadata"]["uid"], version=3), "or the audit would wait for it"
    store.observe(Kind.FINETUNEJOB, foreign, is_deleted=True)
    assert {} == store.count_states()
