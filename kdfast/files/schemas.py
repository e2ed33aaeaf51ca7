"""What every JSON file that kdfast reads back must hold: fields, types and ranges.

`kdfast.files.validate` compares with the classes; readers get the plain dicts. Other fields are kept and not checked. A
field with a default may be missing, as in files of earlier versions.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

_MAX_INT = 2**63 - 1
_MAX_FLOAT = sys.float_info.max

Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
Positive = Annotated[int, Meta(ge=1, le=_MAX_INT)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Number = Annotated[float, Meta(ge=-_MAX_FLOAT, le=_MAX_FLOAT)]
Plotted = Annotated[float, Meta(ge=-1e100, le=1e100)]  # products of a few are finite
NotNegative = Annotated[float, Meta(ge=0, le=_MAX_FLOAT)]
Above0 = Annotated[float, Meta(gt=0, le=_MAX_FLOAT)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
# Sums of such counts, over up to a million bins or classes, are exact in 64 bits.
Samples = Annotated[int, Meta(ge=0, le=2**40)]
Json = dict[str, Any]


CHECKPOINT_NAME = r"^step-[0-9]{9,18}\.pt$"

# A training run: config.json, metrics.jsonl, checkpoints/latest.json, result.json.


class RunConfigFile(Struct):
    """config.json: settings, and what may differ when a run resumes."""

    started_with: Json


class SavedCheckpoint(Struct):
    """A checkpoint of latest.json."""

    file: Annotated[str, Meta(pattern=CHECKPOINT_NAME)]
    sha256: Sha256
    step: Count = 0


class LatestCheckpoint(SavedCheckpoint):
    """latest.json: the latest checkpoint and the one before."""

    before: SavedCheckpoint | None = None


class Calibration(Struct):
    """How probable the predicted classes are, and how often they are right."""

    ece: Percent
    bins: Positive
    confidence: Percent


class RunResult(Struct):
    """result.json."""

    test_top1: Percent
    test_top5: Percent
    test_loss: Number
    steps: Count
    images: Count
    seconds: NotNegative
    images_per_second: NotNegative
    kept: Count
    alpha: NotNegative  # above 1 only with a weight of the cross-entropy of its own
    views: Count
    loader: str
    targets: str | None
    weights: Sha256
    per_class: list[Percent | None] | None = None
    calibration: Calibration | None = None
    agreement: Percent | None = None


class MetricsRow(Struct):
    """A line of metrics.jsonl."""

    step: Count
    epoch: Count = 0
    loss: Number | None = None
    lr: Number | None = None
    train_seconds: NotNegative = 0
    test_top1: Percent | None = None
    test_loss: Number | None = None


# Data: data.json, its record of checks, relabelled.json.


class DataFile(Struct):
    """A .beton file in data.json."""

    bytes: Count
    sha256: Sha256


class BetonFacts(Struct):
    """What both versions of data.json hold."""

    format: str
    classes: Annotated[list[str], Meta(min_length=1)]
    views: Json
    jpeg_quality: int | None
    origin: Sha256 | None
    fingerprint: Sha256 | None


class BetonRecord(BetonFacts):
    """data.json of version 2. `files` is empty while a conversion is under way."""

    files: dict[str, DataFile]


class BetonRecord1(BetonFacts):
    """data.json of version 1: of each file, its size in bytes and time of modification in nanoseconds."""

    files: dict[str, Annotated[list[int], Meta(min_length=2, max_length=2)]]


class CheckedFiles(Struct):
    """.checked.json: facts of files whose content was compared with their digests."""

    files: dict[str, Json]


class RelabelledRecord1(Struct):
    """relabelled.json of version 1."""

    format: str
    data: str
    base: Sha256
    share: Annotated[float, Meta(gt=0, lt=1)]
    seed: int


class RelabelledRecord(RelabelledRecord1):
    """relabelled.json of version 2, with the digest of the labels."""

    labels: Sha256


# Subsets: idx.json, and its part about IF-Beta; the checkpoint of a search.


class Provenance(Struct):
    """idx.json, as far as training reads it."""

    data: str
    ids: Sha256
    seconds: NotNegative = 0


class Histogram(Struct):
    """Counts of all and of the kept samples in bins."""

    edges: Annotated[list[Plotted], Meta(min_length=2, max_length=1 << 20)]
    all: Annotated[list[Samples], Meta(min_length=1, max_length=1 << 20)]
    kept: Annotated[list[Samples], Meta(min_length=1, max_length=1 << 20)]


class ClassCounts(Struct):
    """Counts of all and of the kept samples of each class."""

    all: Annotated[list[Samples], Meta(min_length=1, max_length=1 << 20)]
    kept: Annotated[list[Samples], Meta(min_length=1, max_length=1 << 20)]


class Extreme(Struct):
    """A kept sample of very high or low score."""

    id: Count
    label: Count
    score: Plotted
    u: Annotated[float, Meta(ge=0, le=1)]


class Extremes(Struct):
    """The kept samples of highest and lowest score."""

    lowest: list[Extreme]
    highest: list[Extreme]


class Gain(Struct):
    """The learned policy against the uniform one."""

    difference: Plotted
    half_width: Plotted
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    baseline_accuracy: Annotated[float, Meta(ge=0, le=1)]


class Distillation(Struct):
    """The estimated cost of one distillation."""

    student: str
    epochs: Positive
    seconds: NotNegative


Parameters = Annotated[list[Annotated[float, Meta(gt=0, le=1e6)]], Meta(min_length=2, max_length=2)]


class TeacherEpoch(Struct):
    """The estimated cost of one epoch of the teacher's training."""

    network: str
    seconds: Above0


class IfBetaRecord(Struct):
    """The record of a search in idx.json; the fields with defaults are missing in older files."""

    a: Annotated[float, Meta(gt=0, le=1e6)]
    b: Annotated[float, Meta(gt=0, le=1e6)]
    learned: Parameters
    path: Annotated[list[Parameters], Meta(min_length=1)]
    rewards: Annotated[list[Plotted], Meta(min_length=1)]
    gain: Gain
    trials: Count
    percent_of_distillation: NotNegative
    score_seconds: NotNegative
    search_seconds: NotNegative
    distillation: Distillation
    ranks: Histogram
    scores: Histogram
    classes: ClassCounts
    ends: Extremes
    preset: str = "kdfast"
    flatten_seconds: NotNegative = 0.0
    epoch: TeacherEpoch | None = None
    epochs: NotNegative | None = None


class IfBetaParameters(Struct):
    """Parameters in the idx.json of IF-Beta."""

    fraction: Annotated[float, Meta(gt=0, le=1)]


class IfBetaProvenance(Struct, rename={"if_beta": "if-beta"}):
    """idx.json of a subset selected by IF-Beta."""

    method: Literal["if-beta"]
    seed: int
    parameters: IfBetaParameters
    if_beta: IfBetaRecord


Pair = Annotated[list[Number], Meta(min_length=2, max_length=2)]
Logarithm = Annotated[float, Meta(ge=-14, le=14)]  # of a or b


class SearchProgress(Struct, forbid_unknown_fields=True):
    """The state of a search."""

    phi: Annotated[list[Logarithm], Meta(min_length=2, max_length=2)]
    step: Count
    first: Pair
    second: Annotated[list[NotNegative], Meta(min_length=2, max_length=2)]
    quiet: Count
    path: list[Parameters]
    rewards: list[Plotted]
    accuracies: list[Plotted]
    trials: Count
    seconds: NotNegative

    def __post_init__(self) -> None:
        """Compare the lists with the number of steps."""
        if not self.step == len(self.path) - 1 == len(self.rewards) == len(self.accuracies):
            raise ValueError("step, path, rewards and accuracies are of different lengths")


class SearchFile(Struct):
    """The checkpoint of a search."""

    format: str
    identity: str
    state: SearchProgress


# A teacher's cache: manifest.json, plan.json, timing.json, records of shards.


class CachedData(Struct):
    """The data of a cache."""

    fingerprint: str
    samples: Positive
    classes: Positive
    image: Annotated[list[Positive], Meta(min_length=3, max_length=3)]


class CachedTeacher(Struct):
    """The teacher of a cache."""

    net: str
    digest: Sha256
    mean: Annotated[list[Number], Meta(min_length=3, max_length=3)] | None = None
    std: Annotated[list[Above0], Meta(min_length=3, max_length=3)] | None = None


class CachedViews(Struct):
    """The views of a cache."""

    spec: Json
    view_seed: Count
    n_views: Positive


class Coverage(Struct):
    """The samples of a cache."""

    samples: Positive
    whole: bool
    digest: Sha256


class TopKFields(Struct, forbid_unknown_fields=True):
    """What a cache of the most probable classes keeps; one temperature in files of earlier versions."""

    k: Positive
    temperature: Above0 | None = None
    temperatures: Annotated[list[Above0], Meta(min_length=1)] | None = None


class FormatVersion(Struct):
    """Format and version, which are compared before anything else."""

    format: str
    version: int


class CachePlan(FormatVersion):
    """plan.json of an unfinished cache."""

    data: CachedData
    teacher: CachedTeacher
    views: CachedViews
    coverage: Coverage
    dtype: Literal["float16", "float32"]
    precision: Literal["float32", "bfloat16"]
    per_shard: Positive
    top_k: TopKFields | None = None
    kind: Literal["logits", "features"] = "logits"


class CacheManifest(CachePlan, kw_only=True):
    """manifest.json of a cache."""

    train_top1: Percent
    test_top1: Percent | None
    features: Count
    files: dict[str, DataFile]


class CacheTiming(Struct):
    """timing.json of a cache."""

    seconds: NotNegative


class ShardRecord(Struct):
    """The record of a finished shard."""

    plan: Sha256
    files: dict[str, Sha256]
    seconds: NotNegative


class CachePart(Struct, forbid_unknown_fields=True):
    """The record of a part of a cache, whose shards one process has built."""

    plan: Sha256
    rank: Count
    world: Positive
    correct: Count
    test_top1: Percent | None
    extras: dict[str, Sha256]


# A cache of a language model's log-probabilities: plan.json, records of shards, manifest.json.


class TokenPlan(FormatVersion):
    """plan.json."""

    vocabulary: Annotated[int, Meta(ge=2, le=2**31 - 1)]
    temperature: Above0
    sources: list[Json]
    options: Json
    sampled: bool = False


class TokenShard(Struct):
    """What a shard holds."""

    sequences: Positive
    tokens: Count
    entries: Count


class TokenShardRecord(TokenShard, kw_only=True):
    """The record of a finished shard."""

    plan: Sha256
    files: dict[str, DataFile]
    numbered: bool
    labels: bool


class TokenManifest(TokenPlan, kw_only=True):
    """manifest.json."""

    shards: Annotated[list[TokenShard], Meta(min_length=1)]
    numbered: bool
    labels: bool
    files: dict[str, DataFile]


# Dynamics: plan.json, sealed.json, manifest.json.


class DynamicsPlan(FormatVersion):
    """plan.json."""

    samples: Positive
    epochs: Positive
    labels: Sha256
    fingerprint: str | None
    feature_epochs: list[Count]
    facts: Json
    top_k: Count = 0
    classes: Count = 0
    record: Literal["epoch", "batch"] = "epoch"


class RunSeal(Struct):
    """sealed.json of a recorded run."""

    files: dict[str, DataFile]


class DynamicsManifest(DynamicsPlan, kw_only=True):
    """manifest.json."""

    runs: Annotated[list[dict[str, DataFile]], Meta(min_length=1)]


# A sweep: results.jsonl.


class SweepSettings(Struct):
    """Settings of a row, as far as tables read them."""

    data: str
    student: str
    steps: Count


class SweepKey(Struct):
    """A line of results.jsonl, as far as it decides what is left to run."""

    key: str


class SweepRow(SweepKey):
    """A line of results.jsonl."""

    method: str
    fraction: Annotated[float, Meta(gt=0, le=1)]
    kd: bool
    seed: int
    steps: Count
    kept: Count
    test_top1: Percent
    seconds: NotNegative
    settings: SweepSettings
    epochs: Count | None = None
    subset_seconds: NotNegative | None = None
    costs: dict[str, NotNegative | None] | None = None


class StudyRow(SweepKey):
    """A line of results.jsonl of a study."""

    study: str
    cell: Json
    seed: int
    epochs: Positive
    compressed_to: Positive | None
    dataset: str
    teacher_top1: Percent | None
    test_top1: Percent
    test_top5: Percent
    steps: Count
    images: Count
    seconds: NotNegative
    targets: str | None
    precision: str
    machine: Json
    command: str
    settings: Json


# Score files: the description of scores.npz.


class ScoresAbout(Struct):
    """The description in scores.npz."""

    format: str
    method: str
    parameters: Json
    data: str
    sources: dict[str, str]
    seconds: NotNegative
    digest: Sha256


# Models: T.pt and student.pt, apart from the tensors.


class CodeFields(Struct):
    """The file of a network's own code or configuration, in a checkpoint of a model."""

    file: str
    sha256: Sha256


class ModelFields(Struct):
    """The fields of a checkpoint of a model."""

    format: str
    version: int
    net: str
    classes: Annotated[int, Meta(ge=2, le=1 << 24)]
    class_names: list[str]
    mean: Annotated[list[Number], Meta(min_length=3, max_length=3)]
    std: Annotated[list[Above0], Meta(min_length=3, max_length=3)]
    metadata: Json
    digest: Sha256
    seal: Sha256 | None = None
    code: CodeFields | None = None


class FlattenState(Struct):
    """The state of a flattening, apart from the tensors."""

    settings: Json
    step: Count
    seconds: NotNegative
    seal: Sha256


class TrainingState(Struct):
    """The plain fields of a checkpoint of a training run."""

    step: Count
    train_seconds: NotNegative
    net: Json
    optimizer: Json
    scaler: Json
    loss_steps: Count
