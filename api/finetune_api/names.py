"""Names that the operator, the trainer and the chart must agree on."""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
PROFILE_KIND = "FineTuneProfile"
PROFILE_PLURAL = "finetuneprofiles"
PROFILE_SINGULAR = "finetuneprofile"
PROFILE_SHORT_NAME = "ftp"
API_VERSION = f"{GROUP}/{VERSION}"

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "finetune-operator"
LABEL_JOB = f"{GROUP}/job"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_RUN = f"{GROUP}/run"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_POD_SHAPE = f"{GROUP}/pod-shape"
# The number of a pod within its Indexed Job: https://kubernetes.io/docs/reference/labels-annotations-taints/
LABEL_INDEX = "batch.kubernetes.io/job-completion-index"
# Labels and annotations of Kueue, which are copied from a FineTuneJob to its child Jobs and their pods:
# https://kueue.sigs.k8s.io/docs/reference/labels-and-annotations/
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
ANNOTATION_PREFIX_TOPOLOGY = "kueue.x-k8s.io/podset-"
ANNOTATION_QUEUE = f"{GROUP}/queue"
ANNOTATION_CA = f"{GROUP}/ca.crt"
# What an attempt was begun with: the operator reads them back from the child Job, people read them as well.
ANNOTATION_PROFILE = f"{GROUP}/profile"
ANNOTATION_PROFILE_GENERATION = f"{GROUP}/profile-generation"
ANNOTATION_ACCELERATORS = f"{GROUP}/accelerators"
ANNOTATION_ACCELERATOR_KIND = f"{GROUP}/accelerator-kind"
ANNOTATION_PRICE = f"{GROUP}/price-per-accelerator-hour"
ANNOTATION_TRAINING_SECONDS = f"{GROUP}/training-seconds"
# On the Lease: where the leader receives the reports that other replicas hand on.
ANNOTATION_REPORT_URL = f"{GROUP}/report-url"

FIELD_MANAGER = "finetune-operator"
STATUS_FIELD_MANAGER = "finetune-operator-status"
OWNER_FIELD_MANAGER = "finetune-operator-owner"

# One name for the container and the projected token's audience, so that a token of another service is never accepted.
CONTAINER = "trainer"
REPORT_AUDIENCE = "finetune.dev/reports"

DATASET_MOUNT = "/mnt/dataset"
MODEL_MOUNT = "/mnt/model"
OUTPUT_MOUNT = "/mnt/output"
CHECKPOINT_MOUNT = "/mnt/checkpoint"
REPORT_MOUNT = "/var/run/finetune"
REPORT_TOKEN_FILE = f"{REPORT_MOUNT}/token"
REPORT_CA_FILE = f"{REPORT_MOUNT}/ca.crt"
TERMINATION_MESSAGE_FILE = "/dev/termination-log"

ENV_TRAINER_CONFIG = "FINETUNE_TRAINER_CONFIG"
# Names of Kubeflow Trainer's KEP-2779, so that trainers which already speak it report to this operator as well.
ENV_REPORT_URL = "KUBEFLOW_TRAINER_SERVER_URL"
ENV_REPORT_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
ENV_REPORT_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105  the name of a variable that holds a file's path
ENV_METRICS_PORT = "FINETUNE_METRICS_PORT"

PORT_REPORTS = 10443
PORT_HEALTH = 8081
PORT_METRICS = 8080
# As torchrun's default.
PORT_RENDEZVOUS = 29500

# A child Job is called <job>-<run>-<attempt>; its pods add -<index>-<5 characters>, their host names -<index>: at most 63.
MAX_NAME_LENGTH = 45


def report_path(namespace: str, name: str) -> str:
    """Return the URL path at which the progress of one FineTuneJob is received.

    Source: Kubeflow Trainer KEP-2779 (trainer.kubeflow.org/v1alpha1, trainjobs/{name}/status).
    """
    return f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"


def child_name(job: str, run: str, attempt: int) -> str:
    """Return the name of the batch/v1 Job that runs one attempt."""
    return f"{job}-{run}-{attempt}"


def service_name(job: str, uid: str) -> str:
    """Return the name of the headless Service by which the pods of a FineTuneJob find each other."""
    return f"{job}-{uid[:8]}"
