import datetime
import http.server
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from finetune_api.contract import FailureReport, TimeLeft, TrainerReport
from finetune_api.v1alpha1 import CheckpointStatus, Metric, OutputStatus, Result, ResultMetric, TrainerStatus
from finetune_trainer.budget import Budget
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.report import Poster, Receiver, fit_termination_message, post_report, write_termination_message


class Operator:
    """An HTTPS server that keeps what it is sent."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, object]]] = []
        self.arrived = threading.Condition()
        certificate, key = write_certificate(folder)
        operator = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with operator.arrived:
                    operator.requests.append((self.path, dict(self.headers), json.loads(body)))
                    operator.arrived.notify_all()
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.token = folder / "token"
        self.token.write_text("first\n")
        url = f"https://127.0.0.1:{self.server.server_address[1]}/apis/x/status"
        self.receiver = Receiver(url, str(certificate), str(self.token))
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def wait_for(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= count, timeout=10)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operator")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(private)
    return folder / "ca.crt", folder / "tls.key"


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    served = Operator(tmp_path)
    yield served
    served.server.shutdown()
    served.server.server_close()


def make_report(percentage: int = 40, **fields: object) -> TrainerReport:
    status = TrainerStatus(
        progress_percentage=percentage, estimated_remaining_seconds=7, metrics=(Metric(name="loss", value="0.5"),)
    )
    return TrainerReport.model_validate({"trainer_status": status, **fields})


def test_report_has_the_body_and_the_token_of_kep_2779(operator: Operator) -> None:
    assert post_report(make_report(), operator.receiver)

    path, headers, body = operator.requests[0]
    assert path == "/apis/x/status"
    assert headers["Authorization"] == "Bearer first"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "trainerStatus": {
            "progressPercentage": 40,
            "estimatedRemainingSeconds": 7,
            "metrics": [{"name": "loss", "value": "0.5"}],
        }
    }


def test_rotated_token_is_used(operator: Operator) -> None:
    post_report(make_report(), operator.receiver)
    operator.token.write_text("second")
    post_report(make_report(), operator.receiver)

    assert operator.requests[1][1]["Authorization"] == "Bearer second"


def test_server_with_another_certificate_is_not_trusted(operator: Operator) -> None:
    assert not post_report(make_report(), Receiver(operator.receiver.url, None, operator.receiver.token_file))


@pytest.mark.parametrize(
    "receiver",
    [
        pytest.param(Receiver("https://127.0.0.1:9/x", None, None), id="nobody listens"),
        pytest.param(Receiver("https://127.0.0.1:9/x", "/no/ca", "/no/token"), id="no files"),
        pytest.param(Receiver("not a url", None, None), id="no URL"),
    ],
)
def test_failed_delivery_is_silent(receiver: Receiver) -> None:
    assert not post_report(make_report(), receiver)


def offer(poster: Poster, report: TrainerReport, *, urgent: bool) -> None:
    poster.offer(report, "", urgent)


def test_only_urgent_reports_are_posted_at_once(operator: Operator) -> None:
    poster = Poster(operator.receiver, seconds_between=3600)
    offer(poster, make_report(1), urgent=False)
    operator.wait_for(1)
    for percentage in range(2, 50):
        offer(poster, make_report(percentage), urgent=False)
    offer(poster, make_report(50), urgent=True)
    operator.wait_for(2)
    offer(poster, make_report(60), urgent=False)
    poster.close()

    percentages = [body["trainerStatus"]["progressPercentage"] for _, _, body in operator.requests]  # type: ignore[index]
    assert percentages == [1, 50, 60]


def test_posting_never_makes_the_training_wait() -> None:
    poster = Poster(Receiver("https://192.0.2.1/x", None, None), seconds_between=0)
    started = time.perf_counter()
    for _ in range(1000):
        offer(poster, make_report(), urgent=True)

    assert time.perf_counter() - started < 1


def make_result(num_warnings: int = 16, length: int = 1000) -> Result:
    metrics = tuple(ResultMetric(name=f"test_{number}", value="0.1234", low="0.1", high="0.2") for number in range(12))
    return Result(candidate="probe", metrics=metrics, warnings=tuple("\u00e4" * length for _ in range(num_warnings)))


CHECKPOINT = CheckpointStatus(step=1200, samples=38_400, time=datetime.datetime(2026, 1, 17, tzinfo=datetime.UTC), attempt=3)


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(make_report(), id="progress"),
        pytest.param(make_report(result=make_result(), output=OutputStatus(uri="pvc://x", digest="d", bytes=1)), id="result"),
        pytest.param(
            make_report(failure=FailureReport(reason="InternalError", message="\u00e4" * 1024), log_tail='"' * 1024), id="failure"
        ),
    ],
)
def test_termination_message_fits_and_tells_of_the_checkpoint(report: TrainerReport) -> None:
    report = report.model_copy(update={"checkpoint": CHECKPOINT})

    message = fit_termination_message(report)

    assert len(message) <= 4096
    kept = TrainerReport.model_validate_json(message)
    assert kept.checkpoint == CHECKPOINT
    assert (kept.output, kept.failure and kept.failure.reason) == (report.output, report.failure and report.failure.reason)
    if report.result:
        assert kept.result
        assert kept.result.metrics == report.result.metrics


def test_small_report_loses_nothing() -> None:
    report = make_report(result=make_result(2, 100))

    assert TrainerReport.model_validate_json(fit_termination_message(report)) == report


def test_termination_message_is_only_written_where_the_kubelet_put_a_file(tmp_path: Path) -> None:
    (tmp_path / "log").touch()

    write_termination_message(tmp_path / "log", make_report())
    write_termination_message(tmp_path / "none", make_report())

    assert TrainerReport.model_validate_json((tmp_path / "log").read_text()) == make_report()
    assert not (tmp_path / "none").exists()


def test_progress_never_falls_and_ends_at_100() -> None:
    reports: list[TrainerReport] = []
    progress = Progress(Budget(100, 0.0, lambda: 30.0), [lambda report, *_: reports.append(report)], with_finetune=True)
    for phase in Phase:
        progress.begin(phase)
        progress.note(loss=0.123456789)
        progress.advance(0.5)
        progress.advance(0.25)
    progress.finish(OutputStatus(uri="u", digest="d", bytes=1), Result())

    percentages = [report.trainer_status.progress_percentage or 0 for report in reports]
    assert percentages == sorted(percentages)
    assert percentages[-1] == 100
    assert reports[-1].trainer_status.estimated_remaining_seconds == 0
    assert reports[1].trainer_status.estimated_remaining_seconds == 70
    assert reports[-1].trainer_status.metrics == (Metric(name="loss", value="0.123457"),)


def test_report_tells_what_the_steps_cannot() -> None:
    progress = Progress(Budget(100, 0.0, lambda: 30.0), (), with_finetune=True)
    progress.begin(Phase.FINETUNE)
    before = progress.report().time_left
    progress.advance(0.5, steps_seconds=20, after_steps_seconds=8)
    during = progress.report().time_left
    progress.begin(Phase.FINISH)
    progress.advance(0.75)
    after = progress.report().time_left

    assert before == TimeLeft(budget_seconds=70)
    assert during == TimeLeft(budget_seconds=70, after_steps_seconds=8)
    assert after == TimeLeft(budget_seconds=70, after_steps_seconds=2)


def test_trainer_without_fine_tuning_leaves_the_estimate_to_its_percentage() -> None:
    assert Progress(Budget(100, 0.0, lambda: 30.0), (), with_finetune=False).report().time_left is None
