"""The settings of `jobs/pretrain.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from jobs.support.fed import ChipConditions, FedStore
from jobs.support.online_evaluation import OnlineEvaluation
from jobs.support.presets import PresetName, with_preset
from jobs.support.settings import Group, JobSettings
from jobs.support.tracking import Mlflow
from jobs.support.training_estimate import Assumptions
from jobs.support.worker_counts import WorkerSetting
from pipeline.shard_cache import ShardCache


class Objectives(Group):
    """What pretraining minimises."""

    contrastive_weight: float = Field(default=1.0, ge=0)
    """Weight of the contrastive loss; 0 leaves it out."""

    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Weight of the reconstruction loss; 0 leaves out the joint encoder and the decoder."""

    target_statistics: Literal["shared", "per_sensor"] = "shared"
    """Whether reconstruction targets are normalised over both sensors' values of a patch, as in the reference, or over
    each sensor's."""

    joint_self_bias: Literal["radar", "cross"] = "radar"
    """Distances in the joint encoder's self-attention; cross is what the reference does under masks."""

    gathered_gradient: bool = True
    """Whether gradients flow through other workers' features; the reference lets none through."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if self.contrastive_weight == self.reconstruction_weight == 0:
            raise ValueError("objective: both weights are 0")
        return self


class TrainingSettings(JobSettings):
    """What is trained on what, how, and what becomes of it."""

    store: str | None = None
    """Chip store with both sensors: a path or s3://, az://, gs://."""

    version: int | None = Field(default=None, ge=1)
    """Sealed version of the store; unset: the newest."""

    stores: tuple[FedStore, ...] = ()
    """Instead of store, several that are mixed: in a YAML file a list of store, version and weight, on the command line
    the same as JSON. An epoch has as many samples as without weights; a store that is to give more than it has begins
    again with other crops, one that is to give less gives other chips each epoch until all have had their turn."""

    filter: ChipConditions = ChipConditions()
    """Which chips are fed."""

    cache_dir: str | None = None
    """Directory on each node's own disk, best NVMe, where shards are kept once they were fetched, uncompressed; all
    processes of a node share it, and later runs find it. Unset: none."""

    cache_bytes: int = Field(default=500_000_000_000, gt=0)
    """Bytes that cache_dir may hold; 1.1 MB for a chip of 264 px. Where all shards do not fit, those that do stay."""

    out: str
    """Directory of the run: checkpoints, losses, report.html, model.safetensors; on a cluster a shared file system or
    an object store."""

    preset: PresetName | None = None
    """Named settings, over which others that are given go: what is known of the paper's recipe, or minutes on two
    CPUs. jobs/support/presets.py says what is known and what is not; --print-config shows the values."""

    size: Literal["tiny", "base", "large"] = "base"
    """Size of the model."""

    epochs: int = Field(default=300, ge=1)
    """Times that every sample is seen."""

    crops_per_chip: int = Field(default=1, ge=1, le=16)
    """Crops cut from every chip in an epoch, each a sample; a chip is decoded once for all of them, and they go into
    different steps, unless an epoch has few steps, but for a chip or two between lanes."""

    crop_px: int = Field(default=120, ge=24, multiple_of=24)
    """Side of a crop, pixels of 10 m."""

    global_batch: int = Field(default=1024, ge=2)
    """Samples per step over all workers; all of them are contrasted with each other."""

    num_workers: WorkerSetting = 1
    """Processes that train, one per GPU; divides global_batch. A run may go on with another number. A range such as
    2..8 takes as many as there is room for, from its start on and whenever nodes come or go; every number in it must
    divide global_batch."""

    lanes: int | None = Field(default=None, ge=1)
    """Parts of the dataset that are read at a time, each of which gives as many samples to every step; divides
    global_batch. It decides the order of samples, num_workers does not. With as many as workers, or a multiple, each
    worker reads chips of its own; with fewer, workers read parts of the same shards. Unset: num_workers, the largest of
    a range, as the run began with."""

    use_gpu: bool | None = None
    """Whether workers take a GPU each; unset: if the cluster has any."""

    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray sets aside for each worker; the rest reads the store."""

    feed: Literal["ray", "in_process"] = "ray"
    """Who reads the store. ray: tasks on any CPU of the cluster, so that CPU nodes can read for GPU nodes. in_process:
    threads of each worker, with less work per sample; for workers whose own CPUs suffice. The samples and their order
    are the same, also where a run goes on with the other one."""

    feed_threads: int = Field(default=4, ge=1)
    """Threads of each worker that decode, with feed=in_process; cpus_per_worker sets the CPUs aside for them."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak of the schedule, after the warm-up."""

    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of all samples over which the learning rate rises."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW, on matrices only."""

    mask_fraction: float = Field(default=0.75, gt=0, lt=1)
    """Fraction of the patches hidden, for each sensor on its own."""

    shared_masks: bool = False
    """Hide the same patches of both sensors."""

    augment: bool = True
    """Flip and turn crops."""

    scale_augmentation: bool = False
    """Bring a random square, of half to one and a half times the side of a crop, to the crop's size; reads windows half
    as large again. The paper has 60 to 180 pixels for crops of 120."""

    objective: Objectives = Objectives()
    """What is minimised."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per worker whose activations are in memory at a time; unset: all of its share of the global batch. All
    samples of the global batch are contrasted all the same, for a second pass through the encoders."""

    recompute_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    compile: Literal["off", "inductor", "aot_eager"] = "off"
    """Compile the model's layers with torch.compile: inductor fuses operations, needs a C compiler on the workers (for
    CPUs a C++ one) and some 20 seconds at the start; aot_eager only traces, to tell one's faults from the other's."""

    max_logit_scale: float | None = Field(default=None, gt=0)
    """Keep the log of the inverse temperature at or below this; ln 100 = 4.6 is usual. Unset: free."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 on GPUs and float32 on CPUs."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average the weights over the steps: what the average keeps of its past over 1024 samples, 0.999 for example. It
    reaches back over a tenth of the samples seen at most. The average is what is exported. Unset: none."""

    from_weights: str | None = None
    """Begin with these weights instead of random ones: a model.safetensors of ours, a file of released weights, or
    torchgeo's. What it lacks (decoder and projections, if it holds encoders alone) begins at random. A run that was
    begun goes on from its own checkpoints."""

    normalisation: Literal["store", "ssl4eo-s12", "weights"] = "store"
    """Means and deviations that scale the bands: of this store's training chips, of SSL4EO-S12, or those that come with
    from_weights, which are the default where that is given."""

    report_every_epochs: int = Field(default=1, ge=1)
    """Epochs between checkpoints, unless checkpoint_every_samples is set."""

    checkpoint_every_samples: int | None = Field(default=None, ge=1)
    """Samples between checkpoints, within epochs and across them; after a failure no more than these are seen again.
    Unset: at the ends of epochs."""

    keep_checkpoints: int = Field(default=3, ge=1)
    """Checkpoints that are kept; older ones are deleted."""

    max_failures: int = Field(default=3, ge=0)
    """Times that workers which died or failed are replaced and training goes on from the last checkpoint."""

    max_preemptions: int | None = Field(default=None, ge=0)
    """Times that nodes may be taken away by those who lend them; not counted as failures. Before that happens a
    checkpoint is taken, if there is word of it. Unset: any number."""

    preemption_grace_s: float = Field(default=0.0, ge=0)
    """Seconds that workers on other nodes go on after a node is due to be taken away, for a checkpoint that takes
    longer to write than there was notice."""

    worker_start_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds within which all workers must have started, or they are tried again; longer where nodes pull a large
    image first. With a range of num_workers, a node that was lost costs as much before fewer workers start."""

    grow_interval_s: float = Field(default=60.0, ge=0)
    """With a range of num_workers, seconds between looks at whether more would fit. All workers start anew then, from
    the last checkpoint: what was learnt since is learnt again, so rarer looks suit rare checkpoints."""

    on_nonfinite: Literal["end", "skip"] = "end"
    """What a step does whose loss or gradient is not a number: end the run, or leave the weights as they are and go on;
    its chips are in nonfinite/ in any case."""

    max_skipped_steps: int = Field(default=10, ge=1)
    """Such steps that may be skipped in a run; one more ends it."""

    seed: int = 0
    """Decides weights, order, crops, masks, flips and turns."""

    evaluate: OnlineEvaluation = OnlineEvaluation()
    """Probes of checkpoints on held-out labels, beside the training."""

    mlflow: Mlflow = Mlflow()
    """Losses, rates, scores and the report in MLflow."""

    assume: Assumptions = Assumptions()
    """What a dry run reckons with."""

    @model_validator(mode="after")
    def _scaling_is_there(self) -> Self:
        if self.normalisation == "weights" and self.from_weights is None:
            raise ValueError("normalisation=weights needs from_weights")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        merged = with_preset(given)
        return merged if merged.get("from_weights") is None else {"normalisation": "weights", **merged}

    @model_validator(mode="after")
    def _one_way_to_name_stores(self) -> Self:
        if (self.store is None) == (not self.stores):
            raise ValueError(
                "store is required, or stores; " + ("both were" if self.stores else "neither was") + " given"
            )
        if self.stores and self.version:
            raise ValueError("version is of store; in stores, each has its own")
        return self

    @property
    def cache(self) -> ShardCache | None:
        """Where shards are kept."""
        if self.cache_dir is None:
            return None
        return ShardCache(directory=str(Path(self.cache_dir).expanduser().absolute()), max_bytes=self.cache_bytes)

    @property
    def fed(self) -> tuple[FedStore, ...]:
        """The stores, whichever way they were named."""
        return self.stores or (FedStore(store=str(self.store), version=self.version),)
