"""Each alert fires on what it is meant for, and on nothing else, as Prometheus' own rule evaluation has it."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_client
import pytest
import yaml
from series import find_label_problem, list_metrics

ROOT = Path(__file__).resolve().parents[2]
RULES_FILE = ROOT / "charts" / "finetune-operator" / "files" / "alerts.yaml"
RULES = [rule for group in yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]

# What a healthy operator shows, in the notation of promtool: first value, growth, number of further values; one a minute.
HEALTHY = {
    "finetune_synced": "1x130",
    "finetune_leader": "1x130",
    'finetune_jobs{state="Running"}': "2x130",
    'finetune_jobs{state="Pending"}': "0x130",
    'finetune_jobs{state="Other"}': "0x130",
    "finetune_queue_keys": "1x130",
    'finetune_reconciles_total{result="success"}': "0+60x130",
    'finetune_reconciles_total{result="error"}': "0x130",
    'finetune_api_requests_total{code="2xx",verb="patch",resource="jobs"}': "0+60x130",
    'finetune_api_requests_total{code="5xx",verb="patch",resource="jobs"}': "0+1x130",
    'finetune_reports_total{result="accepted"}': "0+20x130",
    'finetune_reports_total{result="forbidden"}': "0x130",
    'finetune_job_retries_total{cause="disruption"}': "0x130",
    'finetune_job_failures_total{reason="OOMKilled"}': "0x130",
    'finetune_job_duration_seconds_count{result="Complete"}': "0+1x130",
    "finetune_job_start_seconds_count": "0+1x130",
    'finetune_accelerator_seconds_total{kind="nvidia",job_namespace="vision"}': "0+600x130",
    'finetune_wasted_accelerator_seconds_total{kind="nvidia",job_namespace="vision"}': "0+20x130",
    'finetune_events_total{result="dropped"}': "0x130",
    "finetune_process_start_time_seconds": "1000x130",
    "finetune_audit_age_seconds": "120x130",
    "finetune_audit_interval_seconds": "300x130",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What fires an alert, and what it says then."""

    alert: str
    series: dict[str, str | None]
    """Other values than those of a healthy operator; None for a series that is not there."""
    summary: str
    labels: tuple[tuple[str, str], ...] = ()


CASES = (
    Case(
        alert="FineTuneOperatorDown",
        series=dict.fromkeys(HEALTHY),
        summary="No operator for FineTuneJobs is scraped, so nothing starts, retries or ends.",
    ),
    Case(
        alert="FineTuneOperatorNotSynced",
        series={"finetune_synced": "0x130"},
        summary="The operator runs but has not yet seen all objects of the cluster, before which it does nothing.",
    ),
    Case(
        alert="FineTuneLeaderNotOne",
        series={"finetune_leader": "0x130"},
        summary="0 replicas of the operator lead instead of one: without a leader nothing happens, and there must never be two.",
    ),
    Case(
        alert="FineTuneLeaderNotOne",
        series={"finetune_leader": "2x130"},
        summary="2 replicas of the operator lead instead of one: without a leader nothing happens, and there must never be two.",
    ),
    Case(
        alert="FineTuneOperatorRestarting",
        series={"finetune_process_start_time_seconds": "1000x90 2000x10 3000x10 4000x20"},
        summary="The operator has restarted 3 times within an hour; a watch may be deaf, or its memory too small.",
    ),
    Case(
        alert="FineTuneAuditStale",
        series={"finetune_audit_age_seconds": "900x130"},
        summary="The operator has not compared what it saw with the API server for 3 audit intervals.",
    ),
    Case(
        alert="FineTuneQueueStuck",
        series={"finetune_queue_keys": "7x130", 'finetune_reconciles_total{result="success"}': "100x130"},
        summary="FineTuneJobs wait for the operator (7), and none is reconciled.",
    ),
    Case(
        alert="FineTuneAPIErrors",
        series={'finetune_api_requests_total{code="5xx",verb="patch",resource="jobs"}': "0+20x130"},
        summary="The API server fails on 25% of the operator's requests, or does not answer.",
    ),
    Case(
        alert="FineTuneReconcileErrors",
        series={'finetune_reconciles_total{result="error"}': "0+20x130"},
        summary="25% of the reconciles fail and are tried again.",
    ),
    Case(
        alert="FineTuneReportsRefused",
        series={'finetune_reports_total{result="forbidden"}': "0+20x130"},
        summary="The operator refuses 50% of the progress reports.",
    ),
    Case(
        alert="FineTuneReportsSilent",
        series={'finetune_reports_total{result="accepted"}': "100x130"},
        summary="2 FineTuneJobs run, and no progress report of a trainer arrives.",
    ),
    Case(
        alert="FineTuneInfrastructureFailures",
        series={'finetune_job_retries_total{cause="disruption"}': "0+1x130"},
        summary="Nodes, preemptions or evictions ended 60 attempts within an hour.",
    ),
    Case(
        alert="FineTuneJobsFailing",
        series={'finetune_job_failures_total{reason="OOMKilled"}': "0+3x130"},
        summary="180 attempts of FineTuneJobs failed within an hour, far more than jobs were completed.",
    ),
    Case(
        alert="FineTuneJobsPendingLong",
        series={'finetune_jobs{state="Other"}': "4x130", "finetune_job_start_seconds_count": "9x130"},
        summary="At least 4 FineTuneJobs have waited for their pods for an hour, and none has started.",
    ),
    Case(
        alert="FineTuneAcceleratorWaste",
        series={'finetune_wasted_accelerator_seconds_total{kind="nvidia",job_namespace="vision"}': "0+300x130"},
        summary="50% of the accelerator time that ended in namespace vision was lost.",
        labels=(("job_namespace", "vision"),),
    ),
    Case(
        alert="FineTuneEventsDropped",
        series={'finetune_events_total{result="dropped"}': "0+2x130"},
        summary="30 Kubernetes events for users were not recorded within 15 minutes.",
    ),
)


@pytest.fixture(scope="module")
def promtool() -> str:
    return cluster_client.program("promtool")


def test_rules_are_valid(promtool: str) -> None:
    result = subprocess.run([promtool, "check", "rules", "--lint-fatal", RULES_FILE], capture_output=True, text=True, check=False)

    assert 0 == result.returncode, result.stdout + result.stderr


def test_every_alert_has_a_case() -> None:
    assert [rule["alert"] for rule in RULES] == list(dict.fromkeys(case.alert for case in CASES))


def test_each_alert_fires_alone(promtool: str, tmp_path: Path) -> None:
    healthy = {"interval": "1m", "input_series": _list_series(HEALTHY), "alert_rule_test": [_expect(rule) for rule in RULES]}
    apart = {f'finetune_leader{{namespace="{namespace}"}}': "1x130" for namespace in ("one", "other")}
    several = healthy | {"input_series": _list_series({**HEALTHY, **apart})}
    tests = [healthy, several, *(_build_test(case) for case in CASES)]
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps({"rule_files": [str(RULES_FILE)], "evaluation_interval": "1m", "tests": tests}))
    result = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)

    assert 0 == result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_series_of_the_cases_are_those_of_the_operator(case: Case) -> None:
    for name in HEALTHY | case.series:
        assert find_label_problem(name) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_rule_uses_metrics_that_exist(rule: dict[str, Any]) -> None:
    used = set(re.findall(r"finetune_[a-z_]+", rule["expr"]))

    assert used
    assert set() == used - list_metrics()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    page = ROOT / rule["annotations"]["runbook_url"]
    headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert rule["alert"] == page.stem
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert ["Meaning", "Impact", "Diagnosis", "Mitigation"] == headings


def test_no_runbook_is_left_over() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}

    assert {rule["alert"] for rule in RULES} == pages


def _build_test(case: Case) -> dict[str, Any]:
    series = {name: value for name, value in (HEALTHY | case.series).items() if value}
    alerts = [_expect(rule, case if rule["alert"] == case.alert else None) for rule in RULES]
    return {"name": case.alert, "interval": "1m", "input_series": _list_series(series), "alert_rule_test": alerts}


def _list_series(series: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in series.items()]


def _expect(rule: dict[str, Any], case: Case | None = None) -> dict[str, Any]:
    """Return that an alert fires in a case, or does not."""
    expected = []
    if case:
        annotations = {"summary": case.summary, "runbook_url": rule["annotations"]["runbook_url"]}
        expected = [{"exp_labels": dict(case.labels) | rule["labels"], "exp_annotations": annotations}]
    return {"eval_time": "2h5m", "alertname": rule["alert"], "exp_alerts": expected}
