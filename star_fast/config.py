"""Every setting of a run, as typed dataclasses: meaning, unit and the paper's value at each field. Standard library
only.

Values that the paper gives are marked (paper), values of LlamaGen (LlamaGen), choices made here because neither says
(choice). Contradictions and unknown keys raise ConfigError with the field's name. From and to plain dicts: records.py.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

from star_fast.errors import ConfigError as ConfigError  # what every check here raises
from star_fast.records import require, require_finite
from star_fast.tokenizer_config import TokenizerConfig as TokenizerConfig  # a run's settings are all found here


@dataclass(frozen=True)
class ModelConfig:
    """The LlamaGen transformer (arXiv 2406.06525). Sizes that follow from the codes may be left at 0: the code store
    fills them in.
    """

    blocks: int = 12  # transformer blocks, L
    heads: int = 12  # attention heads, H
    width: int = 768  # D; the head size is width / heads
    vocab: int = 0  # codebook entries, V; 0: from the code store (LlamaGen: 16384)
    positions: int = 0  # sequence length, T; 0: from the code store (256 px: 256)
    num_classes: int = 0  # classes without the null class; 0: from the code store (ImageNet: 1000)
    dropout: float = 0.1  # on embeddings, attention output and feed-forward output, student only (LlamaGen)
    label_dropout: float = 0.1  # share of labels replaced by the null class (LlamaGen)

    def __post_init__(self) -> None:
        require_finite(self, "model")
        for name, most in (("blocks", 2**10), ("heads", 2**10), ("width", 2**16)):
            require(1 <= getattr(self, name) <= most, f"model.{name}", getattr(self, name), f"1 ... {most}")
        for name, most in (("vocab", 2**16), ("positions", 2**20), ("num_classes", 2**24)):
            require(
                0 <= getattr(self, name) <= most,
                f"model.{name}",
                getattr(self, name),
                f"0 (from the code store) ... {most}",
            )
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of model.heads = {self.heads}")
        require(
            self.width // self.heads % 4 == 0,
            "model.width",
            self.width,
            "a head size (width / heads) that is a multiple of 4, for 2-D rotary",
        )
        for name in ("dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "a share in [0, 1)")

    @property
    def head_size(self) -> int:
        """E = D / H."""
        return self.width // self.heads

    @property
    def feed_forward(self) -> int:
        """Feed-forward width F: int(2 * 4D / 3) rounded up to a multiple of 256 (LlamaGen)."""
        return (int(2 * 4 * self.width / 3) + 255) // 256 * 256


@dataclass(frozen=True)
class MethodConfig:
    """ST-AR (arXiv 2509.15185). With views 1, mask_ratio 0 and both weights 0 it is plain LlamaGen training: no
    teacher, projector or mask exists.
    """

    views: int = 2  # augmented views of each image in a step, M (paper)
    mask_ratio: float = 0.25  # share of image positions hidden as attention keys, r (paper)
    mim_weight: float = 1.0  # alpha, weight of the masked-feature loss (paper); 0 switches it off
    # which positions that loss averages over: all, or those that the key mask hides (choice)
    mim_positions: typing.Literal["all", "hidden"] = "all"
    contrast_weight: float = 0.5  # beta, weight of the two contrastive losses together (paper); 0 switches both off
    step_contrast: bool = True  # the inter-step loss, L_step (paper)
    view_contrast: bool = True  # the inter-view loss, L_view (paper)
    contrast_positions: int = 4  # positions drawn per step for the contrastive losses, K (paper)
    # block whose output is contrasted, counted from 1 (paper: B 6, L 18, XL 18); 0: half the blocks
    contrast_depth: int = 0
    temperature: float = 0.2  # tau of both contrastive losses (choice)
    # keys of the other images that an anchor is told from: those in its positive's slot (fused kernels), or those in
    # all slots (plain torch) (choice)
    negatives: typing.Literal["slot", "all_slots"] = "slot"
    ema_decay: float = 0.9999  # of the teacher, per optimizer step (paper)
    ema_warmup: bool = True  # decay = min(ema_decay, (1 + step) / (10 + step)) (choice)
    projector_width: int = 2048  # hidden width of the student's projector (choice)
    projector_layers: int = 3  # linear layers of the projector (choice)
    # after each linear layer of the projector but the last, before its activation: nothing, or batch norm over the
    # micro-batch of all ranks (choice)
    projector_norm: typing.Literal["none", "batch"] = "none"
    # where the student's label is dropped the teacher gets: no label either, or the label (choice)
    teacher_label: typing.Literal["same", "kept"] = "same"

    def __post_init__(self) -> None:
        require_finite(self, "method")
        require(self.views >= 1, "method.views", self.views, "at least 1")
        require(0 <= self.mask_ratio < 1, "method.mask_ratio", self.mask_ratio, "a share in [0, 1)")
        require(self.mim_weight >= 0, "method.mim_weight", self.mim_weight, "0 or more")
        require(self.contrast_weight >= 0, "method.contrast_weight", self.contrast_weight, "0 or more")
        require(self.contrast_positions >= 1, "method.contrast_positions", self.contrast_positions, "at least 1")
        require(
            self.contrast_depth >= 0,
            "method.contrast_depth",
            self.contrast_depth,
            "0 (half the blocks) or a block number",
        )
        require(self.temperature > 0, "method.temperature", self.temperature, "more than 0")
        require(0 <= self.ema_decay < 1, "method.ema_decay", self.ema_decay, "in [0, 1)")
        require(self.projector_width >= 1, "method.projector_width", self.projector_width, "at least 1")
        require(self.projector_layers >= 1, "method.projector_layers", self.projector_layers, "at least 1")
        for name, known in (
            ("mim_positions", ("all", "hidden")),
            ("negatives", ("slot", "all_slots")),
            ("projector_norm", ("none", "batch")),
            ("teacher_label", ("same", "kept")),
        ):
            require(getattr(self, name) in known, f"method.{name}", getattr(self, name), " or ".join(map(repr, known)))
        if self.mim_weight > 0 and self.mim_positions == "hidden":
            require(
                self.mask_ratio > 0,
                "method.mim_positions",
                self.mim_positions,
                "'all', since method.mask_ratio 0 hides nothing",
            )
        if self.contrast_weight > 0 and self.view_contrast:
            require(
                self.views >= 2, "method.views", self.views, "at least 2 for method.view_contrast (or switch that off)"
            )
        if self.contrast_weight > 0 and self.step_contrast:
            require(
                self.contrast_positions >= 2,
                "method.contrast_positions",
                self.contrast_positions,
                "at least 2 for method.step_contrast (or switch that off)",
            )

    @property
    def contrasts(self) -> bool:
        """Whether a contrastive loss is on (then a projector exists)."""
        return self.contrast_weight > 0 and (self.step_contrast or self.view_contrast)

    @property
    def has_teacher(self) -> bool:
        """Whether any loss needs the EMA teacher."""
        return self.mim_weight > 0 or self.contrasts


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    # learning rate for 256 images a step; scaled linearly with images_per_step (LlamaGen)
    lr_per_256_images: float = 1e-4
    beta1: float = 0.9  # (paper)
    beta2: float = 0.95  # (LlamaGen; the paper's 0.05 is a misprint)
    weight_decay: float = 0.05  # on every tensor of rank >= 2 (paper)
    eps: float = 1e-8  # of AdamW
    clip_norm: float = 1.0  # largest global gradient norm; 0: off (LlamaGen)
    schedule: typing.Literal["constant", "cosine"] = "constant"  # after warm-up (LlamaGen: constant)
    warmup_steps: int = 0  # linear warm-up of the learning rate (choice)
    final_lr_share: float = 0.0  # cosine ends at this share of the peak

    def __post_init__(self) -> None:
        require_finite(self, "optim")
        require(self.lr_per_256_images > 0, "optim.lr_per_256_images", self.lr_per_256_images, "more than 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip_norm", "warmup_steps"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        require(self.eps > 0, "optim.eps", self.eps, "more than 0")
        require(self.schedule in ("constant", "cosine"), "optim.schedule", self.schedule, "'constant' or 'cosine'")
        require(0 <= self.final_lr_share <= 1, "optim.final_lr_share", self.final_lr_share, "a share in [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, in which precision, on which ZeRO stage."""

    # images of one optimizer step over all ranks (each gives `method.views` sequences) (LlamaGen)
    images_per_step: int = 256
    # images of one rank's forward pass; 0: images_per_step / ranks. Smaller: accumulation, and fewer negatives
    micro_batch_images: int = 0
    epochs: float = 50.0  # passes over the training images (paper: 50 and 300); counts images, not views
    max_steps: int = 0  # optimizer steps; 0: from epochs
    # of weights and activations; master weights are float32 (LlamaGen)
    precision: typing.Literal["bf16", "fp32"] = "bf16"
    # in which gradients are accumulated and reduced (LlamaGen: fp32)
    gradient_precision: typing.Literal["fp32", "bf16"] = "fp32"
    # DeepSpeed ZeRO: 1 shards the optimizer and the teacher's masters, 2 the gradients too, 3 the weights too
    zero_stage: int = 1
    offload_optimizer: bool = False  # keep this rank's masters and moments in host memory, and step there
    block_checkpointing: bool = False  # recompute each block in backward: less memory, a third more compute
    keep_attention: bool = False  # with block_checkpointing: keep what attention made and recompute the rest only
    # torch.compile of the student's feed-forwards; the rest is one op of ours between two products already
    compile: bool = False
    # a DeepSpeed JSON of your own, laid over the derived one; what contradicts the fields above is refused
    deepspeed: str = ""
    hang_minutes: float = 20.0  # a rank that makes no progress for so long says where it stands and ends; 0: never
    seed: int = 0  # of initial weights, masks, views, position sets and dropout
    save_every_steps: int = 1000  # steps between checkpoints; also saved at the end and on Ctrl-C
    keep_checkpoints: int = 2  # the newest ones; older ones are removed
    keep_every_steps: int = 0  # but those of every so many steps stay for good; 0: none
    log_every_steps: int = 10  # steps between lines of metrics.jsonl and TensorBoard
    validate_every_steps: int = 500  # steps between losses on the held-out split; 0: never
    tensorboard: bool = True
    # a loss so many standard deviations above the mean of the last 200 steps is reported; 0: never (choice)
    spike_deviations: float = 6.0
    stop_on_spike: bool = False  # stop then, without saving, instead of going on

    def __post_init__(self) -> None:
        require_finite(self, "train")
        require(self.spike_deviations >= 0, "train.spike_deviations", self.spike_deviations, "0 (never) or more")
        require(self.images_per_step >= 1, "train.images_per_step", self.images_per_step, "at least 1")
        require(
            self.micro_batch_images >= 0, "train.micro_batch_images", self.micro_batch_images, "0 (all at once) or more"
        )
        if self.micro_batch_images:
            require(
                self.images_per_step % self.micro_batch_images == 0,
                "train.micro_batch_images",
                self.micro_batch_images,
                f"a divisor of train.images_per_step = {self.images_per_step}",
            )
        require(self.epochs > 0, "train.epochs", self.epochs, "more than 0")
        require(self.max_steps >= 0, "train.max_steps", self.max_steps, "0 (from train.epochs) or more")
        require(self.precision in ("bf16", "fp32"), "train.precision", self.precision, "'bf16' or 'fp32'")
        require(
            self.gradient_precision in ("fp32", "bf16"),
            "train.gradient_precision",
            self.gradient_precision,
            "'fp32' or 'bf16'",
        )
        require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(
            (self.precision, self.gradient_precision, self.zero_stage) != ("bf16", "fp32", 0),
            "train.zero_stage",
            self.zero_stage,
            "1 or more, for float32 gradients of bf16 weights (on one rank it takes the same memory), or "
            "train.gradient_precision bf16",
        )
        require(
            self.zero_stage > 0 or not self.offload_optimizer,
            "train.offload_optimizer",
            self.offload_optimizer,
            "False with train.zero_stage 0",
        )
        require(
            self.block_checkpointing or not self.keep_attention,
            "train.keep_attention",
            self.keep_attention,
            "False without train.block_checkpointing",
        )
        require(self.hang_minutes >= 0, "train.hang_minutes", self.hang_minutes, "0 (never) or more")
        require(self.keep_every_steps >= 0, "train.keep_every_steps", self.keep_every_steps, "0 (none) or more")
        for name in ("save_every_steps", "keep_checkpoints", "log_every_steps"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(
            self.validate_every_steps >= 0, "train.validate_every_steps", self.validate_every_steps, "0 (never) or more"
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the codes are, and how `star-fast prepare` makes them."""

    codes: str = ""  # the code store: a folder written by `star-fast prepare`
    # "ten-crop": four corners and centre, each with its mirror image (LlamaGen); "small-affine": small rotations,
    # shifts, scalings.
    views: typing.Literal["ten-crop", "small-affine"] = "ten-crop"
    # ten-crop: images are resized to int(image_size * range) first; ten views for each range (LlamaGen: 1.1 and 1.05;
    # the paper: "ten crops")
    crop_ranges: tuple[float, ...] = (1.1,)
    affine_views: int = 8  # small-affine: views of each image
    # who decodes JPEGs: Pillow; DALI on the CPU, to the same pixels; or DALI on a GPU, which resizes there too, to
    # nearly the same pixels.
    decoder: typing.Literal["pillow", "dali", "dali-gpu"] = "pillow"
    held_out_share: float = 0.1  # share of each class held out from all training (choice)
    # training on random crops that are drawn afresh in each epoch and encoded while it trains, instead of the views in
    # the code store (choice)
    online: bool = False
    images: str = ""  # online: the folder that the codes were made of; empty: where `star-fast prepare` found it
    # online: share of an image's area, evenly between these (choice; torchvision: 0.08 to 1)
    crop_area: tuple[float, float] = (0.6, 1.0)
    # online: width over height of a crop, evenly in the logarithm (choice; torchvision: 3/4 to 4/3)
    crop_aspect: tuple[float, float] = (1.0, 1.0)
    mirror: bool = True  # online: mirror half of the crops, as ten-crop does

    def __post_init__(self) -> None:
        require_finite(self, "data")
        require(self.views in ("ten-crop", "small-affine"), "data.views", self.views, "'ten-crop' or 'small-affine'")
        ranges = self.crop_ranges
        require(
            1 <= len(ranges) <= 16 and 1 <= min(ranges) <= max(ranges) <= 2**14 and len(set(ranges)) == len(ranges),
            "data.crop_ranges",
            ranges,
            "up to 16 different numbers of 1 ... 16384",
        )
        require(
            self.decoder in ("pillow", "dali", "dali-gpu"),
            "data.decoder",
            self.decoder,
            "'pillow', 'dali' or 'dali-gpu'",
        )
        require(self.affine_views >= 1, "data.affine_views", self.affine_views, "at least 1")
        for name, most in (("crop_area", 1.0), ("crop_aspect", 1e3)):
            pair = getattr(self, name)
            require(
                len(pair) == 2 and 0 < pair[0] <= pair[1] <= most,
                f"data.{name}",
                pair,
                f"two rising numbers above 0, up to {most:g}",
            )
        require(0 <= self.held_out_share < 1, "data.held_out_share", self.held_out_share, "a share in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """One training run; saved, resolved, as config.yaml in its run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        require(
            self.method.contrast_depth <= self.model.blocks,
            "method.contrast_depth",
            self.method.contrast_depth,
            f"at most model.blocks = {self.model.blocks}",
        )
        if self.model.positions and self.method.contrasts:
            require(
                self.method.contrast_positions <= self.model.positions,
                "method.contrast_positions",
                self.method.contrast_positions,
                f"at most model.positions = {self.model.positions}",
            )
        if self.model.positions and self.method.mim_weight > 0 and self.method.mim_positions == "hidden":
            require(
                self.method.mask_ratio * (self.model.positions - 1) >= 1,
                "method.mim_positions",
                self.method.mim_positions,
                f"'all', since method.mask_ratio {self.method.mask_ratio:g} hides none of model.positions = "
                f"{self.model.positions}",
            )

    @property
    def contrast_depth(self) -> int:
        """The block whose output is contrasted, counted from 1."""
        return self.method.contrast_depth or max(1, self.model.blocks // 2)

    @property
    def lr(self) -> float:
        """Peak learning rate at this number of images a step."""
        return self.optim.lr_per_256_images * self.train.images_per_step / 256
