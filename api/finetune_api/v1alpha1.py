"""FineTuneJob `finetune.dev/v1alpha1` as pydantic models: the one source of the CRD, its documentation and its bounds.

Attribute docstrings become the descriptions that `kubectl explain` prints, so each begins with the field's JSON name.
Rules that span fields stand twice, side by side: as CEL for the API server (`x-kubernetes-validations`) and as a validator
for local runs. tests/finetune_api holds both to the same table of cases.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune_api import names
from finetune_api.accelerator import Accelerator
from finetune_api.base import ApiModel, LongText, MetricText, NameText, ObjectName, Pattern, ShortText, rules
from finetune_api.profile import AcceleratorKind, Price

_SEGMENT = "[A-Za-z0-9_][A-Za-z0-9._-]*"
_PVC = f"pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/{_SEGMENT})*"
_PVC_URI = Pattern(
    _PVC,
    message="uri must be pvc://CLAIM/PATH, such as pvc://datasets/pets: the name of a PersistentVolumeClaim and a folder in it; "
    "names in the path are letters, digits, '.', '_' and '-', and do not begin with '.' or '-'",
)
_MODEL_URI = Pattern(
    f"timm://{_SEGMENT}|{_PVC}",
    message="uri must be timm://NAME, such as timm://resnet18, or pvc://CLAIM/PATH, the folder of a model in a "
    "PersistentVolumeClaim",
)
_CHECKPOINT_URI = Pattern(
    f"{_PVC}|s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/{_SEGMENT})*",
    message="uri must be pvc://CLAIM/PATH, a folder in a PersistentVolumeClaim, or s3://BUCKET/PATH, a prefix in an object store",
)
_COST = Pattern("[0-9]{1,24}[.][0-9]{4}", message="cost must be a decimal number with 4 places, such as 12.3400")
_REASON = Pattern("[A-Z][A-Za-z0-9]*", message="a reason is one CamelCase word, such as OOMKilled")
# The subset of Kubernetes quantities that people write.
_CPU = Pattern(
    "[1-9][0-9]{0,5}m|[1-9][0-9]{0,3}([.][0-9]{1,3})?|0[.]([1-9][0-9]{0,2}|0[1-9][0-9]?|00[1-9])",
    message="cpu must be a number of cores over zero, such as 2, 1.5 or 500m",
)
_MEMORY = Pattern(
    "[1-9][0-9]{0,8}(Mi|Gi|Ti|M|G|T)",
    message="memory must be a whole number with a unit of Mi, Gi, Ti, M, G or T, such as 4Gi",
)

PvcUri = Annotated[
    str, StringConstraints(max_length=512), AfterValidator(_PVC_URI.validate), Field(json_schema_extra=_PVC_URI.build_rule())
]
ModelUri = Annotated[
    str, StringConstraints(max_length=512), AfterValidator(_MODEL_URI.validate), Field(json_schema_extra=_MODEL_URI.build_rule())
]
CheckpointUri = Annotated[
    str,
    StringConstraints(max_length=512),
    AfterValidator(_CHECKPOINT_URI.validate),
    Field(json_schema_extra=_CHECKPOINT_URI.build_rule()),
]
ReasonText = Annotated[
    str, StringConstraints(max_length=64), AfterValidator(_REASON.validate), Field(json_schema_extra=_REASON.build_rule())
]
CpuQuantity = Annotated[
    str, StringConstraints(max_length=16), AfterValidator(_CPU.validate), Field(json_schema_extra=_CPU.build_rule())
]
MemoryQuantity = Annotated[
    str, StringConstraints(max_length=20), AfterValidator(_MEMORY.validate), Field(json_schema_extra=_MEMORY.build_rule())
]


class ModelSource(ApiModel):
    """The pretrained model to adapt."""

    uri: ModelUri = "timm://tf_efficientnet_lite0"
    """uri names the pretrained backbone: `timm://NAME` for any timm image model, or `pvc://CLAIM/PATH` for a folder with
    config.json and model.safetensors (an earlier result of this operator, for example)."""


class DatasetFormat(StrEnum):
    """How the pictures and their labels are laid out."""

    IMAGEFOLDER = "imagefolder"
    CSV = "csv"


# The API server compares whole numbers with the bound's whole part, so that `minimum: 0.05` alone lets 0 pass.
_VALIDATION = (
    "self.validationFraction >= 0.05",
    "validationFraction is below 0.05; models are chosen on this share of the data, so give 0.05 or more",
)
_FRACTIONS = (
    "self.validationFraction + self.testFraction <= 0.9",
    "validationFraction + testFraction is over 0.9; leave at least a tenth of the data for training",
)


class Dataset(ApiModel):
    """The labelled data to learn from."""

    model_config = ConfigDict(json_schema_extra=rules(_VALIDATION, _FRACTIONS))

    uri: PvcUri
    """uri is the folder with the data: `pvc://CLAIM/PATH`, in the namespace of the FineTuneJob. It is mounted read-only."""
    format: DatasetFormat = DatasetFormat.IMAGEFOLDER
    """format is the layout: `imagefolder` has one folder per class (optionally below train, val and test folders),
    `csv` has a file labels.csv with the columns path, label and, optionally, split."""
    validation_fraction: Annotated[float, Field(ge=0.05, le=0.5)] = 0.15
    """validationFraction is the share of the data kept for choosing between models, used when the data names no
    validation split. The split follows file contents: stratified by class, and duplicates stay on one side."""
    test_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    """testFraction is the share of the data kept for the final measurement, used when the data names no test split.
    0 means that no test metrics are reported."""

    @model_validator(mode="after")
    def _leave_data_for_training(self) -> Self:
        if self.validation_fraction + self.test_fraction > 0.9:
            raise ValueError(_FRACTIONS[1])
        return self


class MethodType(StrEnum):
    """How the model is adapted."""

    AUTO = "auto"
    PROBE = "probe"
    FULL = "full"


class Method(ApiModel):
    """How the pretrained model is adapted to the data."""

    type: MethodType = MethodType.AUTO
    """type is `probe` for a linear classifier on frozen features (seconds to a minute), `full` to fine-tune all layers from
    that classifier, or `auto` to do the probe first and fine-tune when the budget and the data make it worthwhile. The
    best candidate on the validation data is published, so the result is never worse than the probe."""


class Precision(StrEnum):
    """Number format of the training arithmetic."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


_EPOCHS_OR_STEPS = ("!(has(self.epochs) && has(self.maxSteps))", "epochs and maxSteps are both set; give one of them")


class Hyperparameters(ApiModel):
    """Training settings. Every one is optional, and the defaults are chosen from the data and the backbone."""

    model_config = ConfigDict(json_schema_extra=rules(_EPOCHS_OR_STEPS))

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """epochs is the number of passes over the training data in fine-tuning. Not together with maxSteps."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """maxSteps is the number of optimizer steps in fine-tuning. Not together with epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """learningRate is the peak learning rate of the head. Earlier layers use smaller ones."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """batchSize is the number of examples per optimizer step, over all processes."""
    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    """imageSize is the side of the square, in pixels, to which pictures are resized. Default: what the backbone was
    trained with."""
    precision: Precision = Precision.AUTO
    """precision is `fp32`, `bf16` (automatic mixed precision) or `auto`: bf16 where the device is faster with it."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 0
    """seed fixes the split, the order of the data, the augmentation and the initial weights. The same seed, data and steps
    give the same model."""

    @model_validator(mode="after")
    def _have_one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(_EPOCHS_OR_STEPS[1])
        return self


class Resources(ApiModel):
    """What each trainer pod requests, and may not exceed."""

    cpu: CpuQuantity = "2"
    """cpu is the number of cores, as a Kubernetes quantity: `2`, `1.5` or `500m`."""
    memory: MemoryQuantity = "4Gi"
    """memory is the amount of memory, as a Kubernetes quantity such as `4Gi`."""


class Budget(ApiModel):
    """How much the job may spend."""

    training_seconds: Annotated[int, Field(ge=10, le=31_536_000)] | None = None
    """trainingSeconds is the wall-clock time of the trainer process, in seconds, features and probe included. The learning
    rate schedule reaches zero exactly at its end, and the model is published within a tenth of it after that. Without a
    budget the recipe decides on the number of steps."""


class Output(ApiModel):
    """Where the fine-tuned model goes."""

    uri: PvcUri
    """uri is the folder that receives the model: `pvc://CLAIM/PATH`, in the namespace of the FineTuneJob. The files are
    complete when the file COMPLETE is there. Intermediate files are kept beside them in the folder .finetune."""


class SecretReference(ApiModel):
    """A Secret in the namespace of the FineTuneJob."""

    name: ObjectName
    """name is the name of the Secret. The kubelet hands its keys to the trainer as environment variables; the operator never
    reads it."""


_CHECKPOINT_SECRET = (
    "!has(self.secretRef) || (has(self.uri) && self.uri.startsWith('s3://'))",
    "secretRef is set, and uri is not s3://BUCKET/PATH; only object stores need a Secret, so remove it or give such a uri",
)


class Checkpoint(ApiModel):
    """Where and how often the trainer saves its state. Resuming from it is always on."""

    model_config = ConfigDict(json_schema_extra=rules(_CHECKPOINT_SECRET))

    uri: CheckpointUri | None = None
    """uri is the folder for checkpoints: `pvc://CLAIM/PATH`, or `s3://BUCKET/PATH` for an object store. Without it they are
    kept beside the output."""
    interval_seconds: Annotated[int, Field(ge=1, le=86_400)] = 60
    """intervalSeconds is the time between two checkpoints while the model trains: what a power cut can cost at most. The end of
    each stage, a suspension and an eviction are saved besides."""
    keep: Annotated[int, Field(ge=1, le=20)] = 2
    """keep is the number of checkpoints of the fine-tuning that are kept, the newest ones."""
    secret_ref: SecretReference | None = None
    """secretRef names a Secret with the credentials for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for a store that
    is not Amazon's, AWS_ENDPOINT_URL."""

    @model_validator(mode="after")
    def _need_a_secret_only_for_object_stores(self) -> Self:
        if self.secret_ref is not None and not (self.uri or "").startswith("s3://"):
            raise ValueError(_CHECKPOINT_SECRET[1])
        return self


class FailureAction(StrEnum):
    """What follows a failed attempt."""

    RETRY = "Retry"
    RETRY_FREE = "RetryFree"
    FAIL = "Fail"


_RULE_CRITERION = (
    "(has(self.onExitCodes) && self.onExitCodes.size() > 0) || (has(self.onReasons) && self.onReasons.size() > 0)",
    "a failure rule needs onExitCodes or onReasons; without them it would match nothing",
)


class FailureRule(ApiModel):
    """What to do about a kind of failure."""

    model_config = ConfigDict(json_schema_extra=rules(_RULE_CRITERION))

    name: Annotated[str, StringConstraints(min_length=1, max_length=63)]
    """name identifies the rule; it stands in the message of a failure that the rule decided on."""
    on_exit_codes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=255)], ...],
        Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """onExitCodes are exit codes of the trainer container that the rule is about."""
    on_reasons: Annotated[tuple[ReasonText, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"})] = ()
    """onReasons are reasons of failures, as in status.failure.reason, that the rule is about. With onExitCodes as well, one
    of both is enough."""
    action: FailureAction
    """action is `Retry` for a retry that counts towards backoffLimit, `RetryFree` for one that does not, and `Fail` for none."""

    @model_validator(mode="after")
    def _match_something(self) -> Self:
        if not self.on_exit_codes and not self.on_reasons:
            raise ValueError(_RULE_CRITERION[1])
        return self


class RunPolicy(ApiModel):
    """What happens around the training itself."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """backoffLimit is the number of retries after failed attempts, before the job is marked Failed. Disruptions (an eviction,
    a preemption, a lost node) are retried without being counted; failures that a retry cannot mend (an invalid spec, unusable
    data, a missing model) are never retried."""
    start_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """startDeadlineSeconds is how long an attempt may wait until its trainer runs. After that its pods are deleted, so that they
    hold no accelerators and no quota, and the job is marked Failed with the cause. Without it an attempt waits for ever."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """activeDeadlineSeconds is how long trainers may run, over all attempts of the run; waiting and being suspended do not
    count. When it is reached the trainer saves, its pods are deleted, and the job is marked Failed."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """ttlSecondsAfterFinished is how long the Jobs and pods of a finished run are kept for their logs. The FineTuneJob itself
    and the model are never removed. Without it they stay until the FineTuneJob is deleted or its run is replaced."""
    failure_rules: Annotated[
        tuple[FailureRule, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """failureRules change what follows a failure. The first rule that matches decides; without a match, the built-in
    table does."""


class Task(StrEnum):
    """What the model is to learn."""

    IMAGE_CLASSIFICATION = "image-classification"


_PROBE_SETTINGS = ("epochs", "maxSteps", "learningRate")
_PROBE = (
    "!(has(self.method.type) && self.method.type == 'probe') || !has(self.hyperparameters) || "
    "!(" + " || ".join(f"has(self.hyperparameters.{name})" for name in _PROBE_SETTINGS) + ")",
    (
        "method.type probe trains no layers of the backbone, so hyperparameters epochs, maxSteps and learningRate do not apply; "
        "remove them or choose method.type full"
    ),
)
_OUTPUT = (
    "self.output.uri != self.dataset.uri && !self.output.uri.startsWith(self.dataset.uri + '/')",
    "output.uri lies inside dataset.uri; the model would become part of the data, so give another folder",
)


_SIDES = "self.accelerator.tpu.topology.split('x')"
_CHIPS = f"int({_SIDES}[0]) * int({_SIDES}[1]) * ({_SIDES}.size() > 2 ? int({_SIDES}[2]) : 1)"
_IS_FLAT = f"{_SIDES}.size() == 2"
# A host has 4 chips; slices of one host may have 1 or 8 as well.
_FITS = f"self.nodes * 4 == {_CHIPS} || (self.nodes == 1 && {_IS_FLAT} && {_CHIPS} <= 8)"
# string() and join() would make texts of unknown length, whose cost the API server estimates as boundless; format() does not.
_HOSTS_TEXT = f"{_CHIPS} == 8 && {_IS_FLAT} ? '1 or 2' : '%d'.format([{_CHIPS} < 4 ? 1 : ({_CHIPS}) / 4])"
_NODES = (
    f"!has(self.nodes) || !has(self.accelerator) || !has(self.accelerator.tpu) || {_FITS}",
    "nodes contradicts accelerator.tpu.topology",
    (
        "'nodes %s contradicts accelerator.tpu.topology, whose hosts are %s; remove nodes or correct it'"
        f".format(['%d'.format([self.nodes]), {_HOSTS_TEXT}])"
    ),
)


class ProfileReference(ApiModel):
    """A FineTuneProfile."""

    name: ObjectName
    """name is the name of the FineTuneProfile."""


class ManagedBy(StrEnum):
    """Who acts on a FineTuneJob."""

    OPERATOR = "finetune.dev/operator"
    MULTIKUEUE = "kueue.x-k8s.io/multikueue"


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and how."""

    model_config = ConfigDict(json_schema_extra=rules(_PROBE, _OUTPUT, _NODES))

    task: Task
    """task is what the model learns: `image-classification` assigns one of several labels to a picture."""
    model: ModelSource = ModelSource()
    """model is the pretrained model to adapt."""
    dataset: Dataset
    """dataset is the labelled data to learn from."""
    method: Method = Method()
    """method says how the model is adapted."""
    hyperparameters: Hyperparameters = Hyperparameters()
    """hyperparameters override single training settings. None of them is needed."""
    profile_ref: ProfileReference | None = None
    """profileRef names the FineTuneProfile with the administrator's defaults and limits. Default: the default profile, if there
    is one. A change takes effect with the next attempt."""
    accelerator: Accelerator = Accelerator()
    """accelerator is what each trainer pod computes on: one member, or none for CPU. The number of processes, the nodes and the
    device's settings follow from it."""
    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """nodes is the number of trainer pods, which train one model together: they start, fail and go on as one. The model is the
    same for any number. More than one need volumes that all nodes can mount. Default: 1, or the hosts of accelerator.tpu."""
    resources: Resources = Resources()
    """resources are what each trainer pod requests, and may not exceed."""
    budget: Budget = Budget()
    """budget limits what the job may spend."""
    checkpoint: Checkpoint = Checkpoint()
    """checkpoint says where and how often the trainer saves its state. Resuming from it is always on."""
    output: Output
    """output is where the fine-tuned model goes."""
    suspend: bool = False
    """suspend, when true, deletes the pods of the job and keeps its progress. Set it to false to go on."""
    managed_by: Annotated[
        ManagedBy,
        Field(
            json_schema_extra=rules(
                ("self == oldSelf", "managedBy cannot be changed; delete the FineTuneJob and create it again")
            )
        ),
    ] = ManagedBy.OPERATOR
    """managedBy says who acts on this object: this operator, or `kueue.x-k8s.io/multikueue`, which runs it in another cluster.
    The operator does nothing at all with objects of others."""
    run_policy: RunPolicy = RunPolicy()
    """runPolicy says what happens around the training itself, such as retries."""

    @model_validator(mode="after")
    def _allow_only_settings_that_apply(self) -> Self:
        unused = (self.hyperparameters.epochs, self.hyperparameters.max_steps, self.hyperparameters.learning_rate)
        if self.method.type is MethodType.PROBE and any(value is not None for value in unused):
            raise ValueError(_PROBE[1])
        if f"{self.output.uri}/".startswith(f"{self.dataset.uri}/"):
            raise ValueError(_OUTPUT[1])
        if self.accelerator.tpu and self.nodes is not None and self.nodes not in self.accelerator.tpu.hosts:
            hosts = " or ".join(str(number) for number in self.accelerator.tpu.hosts)
            raise ValueError(
                f"nodes {self.nodes} contradicts accelerator.tpu.topology, whose hosts are {hosts}; remove nodes or correct it"
            )
        return self

    @property
    def num_nodes(self) -> int:
        """Return the number of trainer pods: as given, else the fewest that the accelerator allows."""
        return self.nodes or (self.accelerator.tpu.hosts[0] if self.accelerator.tpu else 1)


class ConditionStatus(StrEnum):
    """Status of a condition as in metav1.Condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(ApiModel):
    """One aspect of the state, in the shape of metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=316)]
    """type is the name of the condition, such as Ready or Complete."""
    status: ConditionStatus
    """status is True, False or Unknown."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9_])?$")]
    """reason is one CamelCase word for the cause of the last transition."""
    message: Annotated[str, StringConstraints(max_length=4096)]
    """message says the same to a person, in a sentence."""
    last_transition_time: datetime
    """lastTransitionTime is when status last changed."""
    observed_generation: Annotated[int, Field(ge=0)]
    """observedGeneration is the metadata.generation that the condition was derived from."""


class Metric(ApiModel):
    """One measured value. Text, because Kubernetes APIs hold no floating point numbers."""

    name: MetricText
    """name is the name of the metric, such as loss or val_accuracy."""
    value: MetricText
    """value is the decimal value."""


class ResultMetric(ApiModel):
    """One measured value of the published model, with its 95 % confidence interval."""

    name: MetricText
    """name is the name of the metric with its split in front, such as test_accuracy."""
    value: MetricText
    """value is the decimal value."""
    low: MetricText | None = None
    """low is the lower end of the 95 % bootstrap interval."""
    high: MetricText | None = None
    """high is the upper end of the 95 % bootstrap interval."""


class TrainerStatus(ApiModel):
    """Progress as reported by the trainer, with the names and units of Kubeflow's KEP-2779."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    """progressPercentage is how much of the training is done, from 0 to 100."""
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    """estimatedRemainingSeconds is the time that is probably left, estimated from the steps of this attempt."""
    metrics: Annotated[tuple[Metric, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "atomic"})] = ()
    """metrics are the latest values that the trainer reported."""
    last_updated_time: datetime | None = None
    """lastUpdatedTime is when the report was received."""


class OutputStatus(ApiModel):
    """The published model."""

    uri: LongText
    """uri is the folder that holds the model."""
    digest: Annotated[str, StringConstraints(max_length=80)]
    """digest is `sha256:` and the SHA-256 of the model's manifest.json, which lists the digest of every file."""
    bytes: Annotated[int, Field(ge=0)]
    """bytes is the size of all files of the model."""


class Result(ApiModel):
    """What was measured on the published model."""

    candidate: ShortText | None = None
    """candidate is the kind of model that won on the validation data, such as probe or finetuned."""
    metrics: Annotated[
        tuple[ResultMetric, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """metrics are the measured values with their confidence intervals."""
    warnings: Annotated[tuple[LongText, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})] = ()
    """warnings are findings that did not stop the training, such as files that could not be read."""


class Failure(ApiModel):
    """The last failed attempt."""

    reason: ShortText
    """reason is one CamelCase word for the cause."""
    message: LongText
    """message says what happened and what to do."""
    attempt: Annotated[int, Field(ge=0)]
    """attempt is the number of the failed attempt."""
    exit_code: int | None = None
    """exitCode is the exit code of the trainer container, if it ran."""
    pod: NameText | None = None
    """pod is the name of the failed pod."""
    node: NameText | None = None
    """node is the name of the node that it ran on."""
    container: ShortText | None = None
    """container is the name of the failed container."""
    log_tail: LongText | None = None
    """logTail is the end of the container's output."""


class CheckpointStatus(ApiModel):
    """The newest saved state of the training."""

    step: Annotated[int, Field(ge=0)]
    """step is the number of optimizer steps that were done."""
    samples: Annotated[int, Field(ge=0)]
    """samples is the number of training examples that were consumed."""
    time: datetime
    """time is when the checkpoint was saved."""
    attempt: Annotated[int, Field(ge=0)]
    """attempt is the number of the attempt that saved it."""


class Restart(ApiModel):
    """One attempt that ended early and was followed by another one."""

    attempt: Annotated[int, Field(ge=0)]
    """attempt is the number of the attempt that ended."""
    reason: ShortText
    """reason is one CamelCase word for the cause."""
    time: datetime
    """time is when the attempt ended."""
    counted: bool
    """counted says whether the restart counts towards backoffLimit."""
    lost_seconds: Annotated[int, Field(ge=0)]
    """lostSeconds is the running time since the last checkpoint, which has to be spent again."""


class Usage(ApiModel):
    """What the attempts of a run that have ended have used. A new run begins with nothing."""

    accelerator_seconds: Annotated[int, Field(ge=0)] = 0
    """acceleratorSeconds is the number of accelerators times the seconds that their trainers ran. Of a CPU job, its pods
    count."""
    wasted_accelerator_seconds: Annotated[int, Field(ge=0)] = 0
    """wastedAcceleratorSeconds is the part of it that lay after the last checkpoint of attempts that ended early."""
    cost: (
        Annotated[
            str, StringConstraints(max_length=32), AfterValidator(_COST.validate), Field(json_schema_extra=_COST.build_rule())
        ]
        | None
    ) = None
    """cost is the accelerator seconds of each attempt times the price that its profile had when it began, as a decimal number in
    the currency of that price. Attempts without a price cost nothing."""
    accelerators: Annotated[int, Field(ge=1)] = 1
    """accelerators is the number of accelerators of the current attempt, over all its pods; of a CPU job, the number of pods."""
    accelerator_kind: AcceleratorKind = AcceleratorKind.CPU
    """acceleratorKind is the kind of the current attempt's accelerators."""
    price_per_accelerator_hour: Price | None = None
    """pricePerAcceleratorHour is the price of the current attempt's profile when it began."""


class FineTuneJobStatus(ApiModel):
    """What the operator observed. Written by the operator alone."""

    observed_generation: Annotated[int, Field(ge=-1)] | None = None
    """observedGeneration is the metadata.generation that this status was derived from; -1 before the operator's first look."""
    run: ShortText | None = None
    """run identifies the training: a hash of the fields that shape it. A change of one of them starts a new run."""
    attempt: Annotated[int, Field(ge=0)] = 0
    """attempt is the number of the current attempt within the run. The first is 1."""
    restarts: Annotated[int, Field(ge=0)] = 0
    """restarts is how often the run was started again after an attempt ended early, whatever the cause."""
    restarts_counted_towards_limit: Annotated[int, Field(ge=0)] = 0
    """restartsCountedTowardsLimit is how many of the restarts count towards runPolicy.backoffLimit; disruptions do not."""
    restart_history: Annotated[
        tuple[Restart, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """restartHistory lists the latest restarts, the newest one last."""
    lost_seconds: Annotated[int, Field(ge=0)] = 0
    """lostSeconds is the running time that restarts have cost in total: what lay between the last checkpoint and the end of
    each attempt."""
    active_seconds: Annotated[int, Field(ge=0)] = 0
    """activeSeconds is how long trainers of ended attempts of this run were running; activeDeadlineSeconds limits it."""
    pending_since: datetime | None = None
    """pendingSince is since when the current attempt waits for its trainer to run, or waited when startDeadlineSeconds, which
    counts from it, ended the run."""
    running_since: datetime | None = None
    """runningSince is since when the trainer of the current attempt runs."""
    micro_batch_divisor: Annotated[int, Field(ge=1, le=1024)] = 1
    """microBatchDivisor is into how many parts the trainer splits each batch: doubled whenever it ran out of memory."""
    pod_shape: ShortText | None = None
    """podShape is a hash of what the pods of the current attempt request."""
    training_seconds: Annotated[int, Field(ge=1)] | None = None
    """trainingSeconds is the budget that the run began with: that of the spec, else that of the profile. The run keeps it, as
    another one would make its checkpoints worthless."""
    usage: Usage | None = None
    """usage is what the attempts of this run have used that have ended. A new run begins with nothing."""
    checkpoint: CheckpointStatus | None = None
    """checkpoint is the newest saved state, which the next attempt goes on from."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = ()
    """conditions are Ready, Stalled, Suspended, Scheduled, Running, Complete and Failed. The reason of Ready is the STATE
    that `kubectl get` shows."""
    start_time: datetime | None = None
    """startTime is when a trainer of the current run first started."""
    completion_time: datetime | None = None
    """completionTime is when the current run became Complete or Failed."""
    trainer_status: TrainerStatus | None = None
    """trainerStatus is the progress as reported by the trainer."""
    metric: ShortText | None = None
    """metric is the task's main metric for people: the last one reported, then that of the result."""
    output: OutputStatus | None = None
    """output is the published model."""
    result: Result | None = None
    """result is what was measured on the published model."""
    failure: Failure | None = None
    """failure describes the last failed attempt."""


_NAME = (
    f"self.metadata.name.size() <= {names.MAX_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    (
        f"metadata.name must be at most {names.MAX_NAME_LENGTH} lower-case letters, digits and hyphens, and begin with a letter, "
        "because the names of Jobs, pods and hosts are made from it"
    ),
)


class FineTuneJob(ApiModel):
    """A FineTuneJob adapts a pretrained model to your data and publishes the result."""

    model_config = ConfigDict(json_schema_extra=rules(_NAME))

    spec: FineTuneJobSpec
    """spec is what to train, on what, and how."""
    # Without a status, kstatus and the tools that build on it would take a job for ready that no operator has looked at.
    status: FineTuneJobStatus | None = Field(default=None, json_schema_extra={"default": {"observedGeneration": -1}})
    """status is what the operator observed."""


StateReason = Literal[
    "Queued",
    "Pending",
    "Retrying",
    "Running",
    "Suspending",
    "Suspended",
    "Complete",
    "Failed",
    "InvalidSpec",
]
"""Reasons of Ready that name no problem of a pod; a pending job shows its problem's own reason instead."""
