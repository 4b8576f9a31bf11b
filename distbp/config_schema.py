"""The keys of a run's configuration: name, type, range, default, and one line that explains each.

The structs below are the only place where a key is written down.  The checker, the JSON schema,
`distbp config init` and the documents all read them at run time, so a new key is one annotated line.

This file knows nothing of files, flags or messages (`config_read.py`, `config_check.py`), and nothing of
the parts that use the values: `nn` and `optim` carry their own tables of names, and a test holds the choices
below against them.  The choices are spelled out because importing those tables would import NumPy, which
`distbp --help` must not pay for.

Lists are tuples: a configuration is hashed, compared and shared, so nobody may change it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

__all__ = [
    "OPTIONS_OF",
    "Checkpoint",
    "Config",
    "Data",
    "Loss",
    "Model",
    "Optimizer",
    "Run",
    "Schedule",
    "Train",
]

# Upper limits are far above any sensible run; they exist so that a slip such as 10^9 layers is refused at
# once and not found by the memory allocator.
_COUNT_LIMIT = 10**9
_WIDTH_LIMIT = 1_000_000
_LAYER_LIMIT = 1_000
_CLASS_LIMIT = 10_000
_WORKER_LIMIT = 65_536
_SECONDS_LIMIT = 10**9

Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=_COUNT_LIMIT)]
CountOrZero = Annotated[int, Meta(ge=0, le=_COUNT_LIMIT)]
Width = Annotated[int, Meta(ge=1, le=_WIDTH_LIMIT)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Seconds = Annotated[float, Meta(gt=0, le=_SECONDS_LIMIT)]
Text = Annotated[str, Meta(min_length=1)]


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which samples, and what is done to them before the first step."""

    path: Annotated[str, Meta(description="file, directory or built-in name of the data set")] = ""
    target: Annotated[
        Text | None,
        Meta(description="column of a table to predict; none: the one called target, label, class or y"),
    ] = None
    validation: Annotated[
        Text | None, Meta(description="data set to validate on; it takes the place of validation_fraction")
    ] = None
    validation_fraction: Annotated[
        BelowOne, Meta(description="share of the samples kept for validation; 0: no validation")
    ] = 0.1
    split: Annotated[
        Literal["auto", "random", "tail"],
        Meta(
            description="which samples are kept for validation: drawn by the seed, or the last ones; auto: "
            "the last ones of a text, else drawn"
        ),
    ] = "auto"
    normalize: Annotated[
        Literal["auto", "none", "targets", "global", "feature"],
        Meta(
            description="one mean and deviation for all (global) or one per feature; auto: global for "
            "images and sounds, targets for bells, else feature; numbers to predict are normalised too, "
            "except with none, and nothing else with targets"
        ),
    ] = "auto"
    categories: Annotated[
        Literal["auto", "one_hot", "codes"],
        Meta(
            description="table: a column of texts is one feature for each text (one_hot), or one of numbers "
            "that stand for them; auto: codes with the model tabular, else one_hot"
        ),
    ] = "auto"
    categorical: Annotated[
        Annotated[tuple[Text, ...], Meta(max_length=_LAYER_LIMIT)],
        Meta(description="table: columns of numbers that are names, such as a user's, and are read as texts"),
    ] = ()
    samples: Annotated[
        Count | None, Meta(description="bells: sounds to train on; a tenth as many validate; none: 20000")
    ] = None
    on_disk: Annotated[
        bool | None,
        Meta(
            description=".npy files: leave the samples in the file and read them when they are wanted; none: "
            "where they are larger than half of the memory"
        ),
    ] = None
    shuffle: Annotated[
        Literal["auto", "full", "block"],
        Meta(
            description="order of the samples: any may follow any (full), or runs of neighbours are mixed, "
            "which a disk reads faster (block); auto: block for samples on disk"
        ),
    ] = "auto"
    length: Annotated[
        Width | None,
        Meta(
            description="numbers to which sound files are cut, or filled up with silence; none: all must "
            "have one length"
        ),
    ] = None
    level: Annotated[
        Literal["byte", "char"], Meta(description="text: what a token is, a character or a byte")
    ] = "char"
    context: Annotated[Width, Meta(description="text: tokens in a sample, which the model sees at once")] = 64
    stride: Annotated[
        Width | None,
        Meta(description="text: tokens between the beginnings of two samples; none: as many as in a sample"),
    ] = None
    image_size: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        Meta(
            description="side in pixels of the square that image files are scaled and cut to; none: all "
            "must have one size"
        ),
    ] = None
    augment_crop: Annotated[
        int,
        Meta(ge=0, le=4096, description="pixels by which an image is moved at most, at random; 0: none"),
    ] = 0
    augment_flip: Annotated[bool, Meta(description="mirror every second image, at random")] = False
    augment_noise: Annotated[
        NotNegative,
        Meta(description="deviation of noise added to samples, in units of normalised samples; 0: none"),
    ] = 0.0


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The function that is trained."""

    name: Annotated[
        Literal[
            "auto",
            "audio",
            "cnn",
            "gru",
            "lenet",
            "linear",
            "lstm",
            "mlp",
            "resnet20",
            "resnet32",
            "resnet56",
            "tabular",
            "transformer",
        ],
        Meta(
            description="architecture; cnn, lenet and the resnets are for images, gru and lstm for series, "
            "audio for sounds, tabular for tables; auto: transformer for text, audio for sounds, else mlp"
        ),
    ] = "auto"
    hidden: Annotated[
        Annotated[tuple[Width, ...], Meta(max_length=_LAYER_LIMIT)] | None,
        Meta(
            description="widths of the hidden fully connected or recurrent layers; none: mlp 256, 128; lenet "
            "120, 84; cnn 1024; gru and lstm 64; tabular 128, 64; audio 128"
        ),
    ] = None
    activation: Annotated[
        Literal["gelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh"] | None,
        Meta(description="function between the layers of an mlp; none: relu"),
    ] = None
    layers: Annotated[
        Annotated[int, Meta(ge=1, le=_LAYER_LIMIT)] | None,
        Meta(description="transformer: number of blocks; none: 4"),
    ] = None
    heads: Annotated[
        Annotated[int, Meta(ge=1, le=_LAYER_LIMIT)] | None,
        Meta(description="transformer: heads of attention in each block; none: 4"),
    ] = None
    width: Annotated[
        Width | None,
        Meta(
            description="transformer: numbers for each token, a multiple of heads; none: 128; tabular: "
            "numbers for each code; none: 8"
        ),
    ] = None
    dropout: Annotated[
        BelowOne | None,
        Meta(description="lenet, cnn: share dropped before the connected layers; none: lenet 0.5, cnn 0"),
    ] = None
    cross: Annotated[
        Annotated[int, Meta(ge=0, le=16)] | None,
        Meta(description="tabular: features in one product, 0 for no products; none: 2"),
    ] = None


class Loss(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is made small."""

    name: Annotated[
        Literal["auto", "binary_cross_entropy", "cross_entropy", "huber", "mean_squared_error"],
        Meta(
            description="auto: cross entropy for classes, mean squared error for numbers, in units of their "
            "variance"
        ),
    ] = "auto"
    label_smoothing: Annotated[
        BelowOne, Meta(description="share of the target spread evenly over all classes (cross entropy only)")
    ] = 0.0
    class_weights: Annotated[
        Annotated[tuple[NotNegative, ...], Meta(min_length=1, max_length=_CLASS_LIMIT)] | None,
        Meta(description="weight of each class in the loss (cross entropy only); none: all 1"),
    ] = None
    delta: Annotated[
        Positive | None,
        Meta(
            description="huber: error up to which the loss is a square, in deviations of the targets; none: 1"
        ),
    ] = None


class Optimizer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mean gradient changes the parameters."""

    name: Annotated[
        Literal["auto", "adagrad", "adam", "adamw", "lamb", "lars", "lion", "rmsprop", "sgd"],
        Meta(
            description="update rule; auto: adamw for tabular and the transformer, adam for audio and lenet, "
            "else sgd"
        ),
    ] = "auto"
    lr: Annotated[
        Positive | None,
        Meta(
            description="learning rate at the peak of the schedule; none: the update rule's own, but 0.002 "
            "for adam with lenet, 0.003 for adamw with tabular, 0.03 for sgd with lenet, 0.01 for sgd with "
            "cnn"
        ),
    ] = None
    momentum: Annotated[
        BelowOne | None, Meta(description="share of the last velocity that is kept; 0: none")
    ] = None
    nesterov: Annotated[bool, Meta(description="sgd: look ahead along the velocity; needs momentum")] = False
    weight_decay: Annotated[
        NotNegative | None,
        Meta(description="factor by which the parameters pull towards 0; how is a matter of the update rule"),
    ] = None
    beta1: Annotated[
        BelowOne | None, Meta(description="share of the old mean gradient that is kept (adam and its kin)")
    ] = None
    beta2: Annotated[
        BelowOne | None, Meta(description="share of the old mean square (lion: momentum) that is kept")
    ] = None
    epsilon: Annotated[
        Positive | None, Meta(description="added to what is divided by, so that it is never 0")
    ] = None
    trust: Annotated[
        Positive | None,
        Meta(description="lars: learning rate of a tensor, in units of its norm by its gradient's"),
    ] = None
    average: Annotated[
        BelowOne | None,
        Meta(
            description="share kept by a moving average of the parameters, which then validates and "
            "predicts; none: no average"
        ),
    ] = None
    clip_norm: Annotated[
        Positive | None,
        Meta(
            description="largest norm of the mean gradient; longer ones are shortened to it; none: 1 for "
            "numbers, no limit for classes"
        ),
    ] = None


OPTIONS_OF = {
    "adagrad": ("epsilon", "weight_decay"),
    "adam": ("beta1", "beta2", "epsilon", "weight_decay"),
    "adamw": ("beta1", "beta2", "epsilon", "weight_decay"),
    "lamb": ("beta1", "beta2", "epsilon", "weight_decay"),
    "lars": ("momentum", "trust", "weight_decay"),
    "lion": ("beta1", "beta2", "weight_decay"),
    "rmsprop": ("beta2", "epsilon", "momentum", "weight_decay"),
    "sgd": ("momentum", "nesterov", "weight_decay"),
}
"""Update rule -> the keys of `[optimizer]` that mean something to it, besides lr, clip_norm and average."""


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the learning rate changes with the step."""

    name: Annotated[
        Literal["constant", "cosine", "one_cycle", "polynomial", "step"],
        Meta(description="shape of the learning rate after the warm-up"),
    ] = "cosine"
    warmup_steps: Annotated[
        CountOrZero, Meta(description="steps during which the learning rate rises linearly to lr")
    ] = 0
    warmup_epochs: Annotated[
        NotNegative | None,
        Meta(description="the same in epochs, in place of steps; none: 5 with linear scaling"),
    ] = None
    scaling: Annotated[
        Literal["none", "linear"],
        Meta(
            description="linear: lr is meant for scaling_batch samples and grows with batch_size; the "
            "warm-up then begins at lr"
        ),
    ] = "none"
    scaling_batch: Annotated[Count, Meta(description="scaling: batch size for which lr is right")] = 64
    step_size: Annotated[Count, Meta(description="step: number of steps between two reductions")] = 1000
    gamma: Annotated[float, Meta(gt=0, le=1, description="step: factor of each reduction")] = 0.1
    final_fraction: Annotated[
        Fraction, Meta(description="cosine, polynomial, one_cycle: last learning rate as a share of lr")
    ] = 0.0
    power: Annotated[Positive, Meta(description="polynomial: exponent; 1 is a straight line")] = 1.0
    initial_fraction: Annotated[
        Fraction, Meta(description="one_cycle: first learning rate as a share of lr")
    ] = 0.04
    rise_fraction: Annotated[BelowOne, Meta(description="one_cycle: share of the steps spent rising")] = 0.3


class Train(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, and in what portions."""

    epochs: Annotated[Count, Meta(description="passes over the training samples")] = 20
    max_steps: Annotated[Count | None, Meta(description="stop after this many steps, whatever the epoch")] = (
        None
    )
    batch_size: Annotated[Count, Meta(description="samples of one step, over all workers together")] = 64
    micro_batch: Annotated[
        Count | None,
        Meta(description="samples computed at once; divides batch_size; none: batch_size / k, k at most 8"),
    ] = None


class Checkpoint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the state is made durable, and how much of it is kept."""

    every_steps: Annotated[
        Count | None,
        Meta(description="steps between two checkpoints; a save waits for the one before it"),
    ] = None
    every_seconds: Annotated[
        Seconds | Literal["auto"] | None,
        Meta(
            description="seconds between two checkpoints, besides every_steps; auto: so that at most 60 s of "
            "work are lost, or longer where that would cost more than 3.5 % of the run"
        ),
    ] = "auto"
    keep: Annotated[
        int,
        Meta(ge=2, le=_COUNT_LIMIT, description="newest checkpoints kept; two, so that one may be damaged"),
    ] = 3


class Run(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where it runs and what is written down; nothing here but `threads` changes the numbers."""

    backend: Annotated[
        Literal["auto", "serial", "local", "mpi", "ray"],
        Meta(description="who starts the workers; auto: mpi under mpirun or srun, else local"),
    ] = "auto"
    nproc: Annotated[
        Annotated[int, Meta(ge=1, le=_WORKER_LIMIT)] | None,
        Meta(description="number of workers; none: one per core, at most batch_size / micro_batch"),
    ] = None
    threads: Annotated[
        int, Meta(ge=1, le=1024, description="BLAS threads of each worker; part of the run's identity")
    ] = 1
    out: Annotated[Text | None, Meta(description="run directory; none: runs/DATA-MODEL-DATE-TIME")] = None
    resume: Annotated[
        str,
        Meta(min_length=1, description="auto: go on where --out stopped; never: start anew; or a checkpoint"),
    ] = "auto"
    max_restarts: Annotated[
        int, Meta(ge=0, le=1_000_000, description="restarts without progress before the job is given up")
    ] = 10
    join_timeout_s: Annotated[
        Seconds, Meta(description="seconds to wait at the start for every worker to appear")
    ] = 30.0
    verify_every: Annotated[
        CountOrZero, Meta(description="steps between two checks of the state in memory; 0: never")
    ] = 100
    overlap: Annotated[
        bool, Meta(description="several hosts: begin to exchange gradients while backprop goes on")
    ] = True
    bucket_kib: Annotated[
        Annotated[int, Meta(ge=1, le=_COUNT_LIMIT)] | None,
        Meta(description="several hosts: least KiB of gradients sent at once; none: measured at the start"),
    ] = None
    log_samples: Annotated[
        bool, Meta(description="write the sample numbers of every step to samples.log")
    ] = False
    records: Annotated[
        Annotated[tuple[Literal["tensorboard", "prometheus", "mlflow", "wandb"], ...], Meta(max_length=16)],
        Meta(
            description="where measurements go besides metrics.jsonl; a sink that fails, or that is not "
            "installed, is named and left out"
        ),
    ] = ("tensorboard",)
    ray_insecure: Annotated[
        bool, Meta(description="use a Ray cluster that asks for no token; its network must be trusted")
    ] = False


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that describes a run."""

    seed: Annotated[
        Seed, Meta(description="selects initial weights, sample order, validation split and augmentation")
    ] = 0
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()
