"""What a run is told: frozen dataclasses, one per stage. Recipes (training/recipes/*.py) fill them in.

Any field can be overridden on the command line as `--section.key value`; an unknown key or another type is an error.
No torch here: the report, the run orchestrator and `--help` read recipes without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weakseg.errors import ConfigError

BACKBONES = ("mobilenet_v2", "resnet50", "resnet101", "resnet38d", "vgg16", "small_resnet")
HF_PREFIX = "hf:"


@dataclass(frozen=True)
class DataConfig:
    """Where the images and their image-level labels are."""

    root: str = "data/synthetic"  # folder of the dataset; for csv, the .csv file; for coco, either it or a .json file
    format: Literal["voc", "csv", "folder", "coco"] = "voc"
    train: str = "train"  # names: ImageSets/Segmentation/<name>.txt for voc, annotations/instances_<name>.json for coco
    val: str = "val"
    tune: str | None = None  # ids that the rule `validation_split` may read masks of
    tags: Literal["auto", "labels.json", "imagesets", "xml"] = "auto"  # voc: where tags come from
    tags_key: str = "labels"  # voc + labels.json: the key of an image's list of class names
    masks: str | None = None  # folder of true masks (sealed); None = what comes with voc and coco, nothing otherwise
    scored_classes: tuple[str, ...] | None = None  # headline classes; None = all. Truth of other classes is void


@dataclass(frozen=True)
class BackboneConfig:
    """The network under every head."""

    name: str = "mobilenet_v2"  # mobilenet_v2, resnet50, resnet101, resnet38d, vgg16, small_resnet, hf:<id or folder>
    weights: str | None = None  # "imagenet", a .pth, .safetensors or .params file; None = random, for hf: its own
    input_scale: Literal["imagenet", "inception", "caffe"] = "imagenet"  # of the weights; inception: x / 127.5 - 1
    output_stride: Literal[8, 16] = 16
    freeze_stages: int = 2  # the first N of 5 stages get no gradient
    freeze_bn: bool = True  # batch norm keeps its statistics and affine

    def __post_init__(self) -> None:
        if self.name not in BACKBONES and (not self.name.startswith(HF_PREFIX) or self.name == HF_PREFIX):
            raise ConfigError(
                f"unknown backbone {self.name!r}: expected one of {', '.join(BACKBONES)}, or hf:<id or folder> for an "
                "AutoBackbone of Hugging Face"
            )


@dataclass(frozen=True)
class OptimConfig:
    """Budget, optimiser and augmentation of one training stage."""

    epochs: int = 6
    batch_size: int = 16
    accumulate: int = 1  # batches per optimiser step
    crop_px: int = 256  # random crop, padded with the mean colour
    long_side_px: tuple[int, int] = (256, 384)  # the long side is drawn from this range, ends included
    jitter: float = 0.3  # brightness, contrast and saturation; 0 = off
    flip: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    new_lr_scale: float = 10.0  # layers that did not come from the weights file
    poly_power: float = 0.9
    warmup_steps: int = 0
    clip_norm: float | None = None  # gradients of a larger norm are scaled down to it
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # of the arithmetic; weights stay float32. fp16: CUDA
    compile: bool = False  # torch.compile: a minute at the start, faster steps
    workers: int = 1  # processes that decode and augment; 0 = in the training process
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class SeamConfig:
    """SEAM: what the two views of an image must agree on. Weights of 0 leave a loss out."""

    transforms: tuple[Literal["rescale", "flip", "translate", "rotate"], ...] = ("rescale",)
    rescale: float = 0.3  # sides of the second view
    translate: float = 0.15  # largest shift, as a share of the side
    rotate_deg: float = 20.0  # largest turn
    er: float = 1.0  # maps move with the image
    ecr: float = 1.0  # refined maps agree with the plain ones of the other view
    min_pooling: float = 1.0  # some of every image is background
    hard_share: float = 0.2  # of the values that ECR looks at; 1 = all, no hard example mining
    sharpness: float = 2.0  # exponent of the pixel correlations, at least 1; parity has 1
    pcm_mib: int = 256  # what the pixel correlation matrix may take; beyond that it is computed in columns
    parity: bool = False  # as the authors' code has it, defects included (docs/training.md)


@dataclass(frozen=True)
class ClassTokensConfig:
    """Class tokens of a ViT or DeiT."""

    per_class: bool = True  # a token for each class, as MCTformer has; False = one, and a linear layer behind it
    layers: int = 3  # last ones whose attention of class tokens makes the maps; with per_class
    refine: bool = False  # maps averaged over the patches that each patch looks at; with per_class


@dataclass(frozen=True)
class HideAndSeekConfig:
    """Patches of training images are hidden. Sides are for crops of 224 pixels and grow with the crop."""

    sides_px: tuple[int, ...] = (0, 16, 32, 44, 56)  # of patches; one is drawn for each image, 0 hides nothing
    hide: float = 0.5  # probability, for each patch


@dataclass(frozen=True)
class MixupCamConfig:
    """Images and tags are mixed in pairs; maps are to be sure and in one place. Weights of 0 leave a loss out."""

    alpha: float = 0.2  # shares are drawn from Beta(alpha, alpha)
    entropy: float = 0.02  # of the classes at each cell
    concentration: float = 0.5  # spread of each present class around its centre, sides of the map being 1


@dataclass(frozen=True)
class AcolConfig:
    """Two classifiers over one backbone; the second does not see what the first finds."""

    width: int = 256  # channels of their layers; the authors have 1024
    erase: float = 0.6  # the second's features are 0 where the first's map, in [0, 1], is as strong
    by: Literal["tags", "found"] = "tags"  # whose maps erase in training; found: as in inference, what the first finds


@dataclass(frozen=True)
class MdcConfig:
    """Classifiers of several dilations: the first keeps maps exact, the mean of the others spreads them."""

    width: int = 256  # channels of each
    dilations: tuple[int, ...] | None = None  # in cells; None = the authors' 1, 3, 6, 9 at stride 8, 1, 2, 3, 4 at 16


@dataclass(frozen=True)
class PuzzleCamConfig:
    """Maps of an image are to be those of its tiles, put together again. It has no dropout."""

    tiles: int = 2  # a side
    weight: float = 4.0  # of the difference, once it has its full weight
    ramp: float = 0.5  # share of the training in which the weight grows from 0


@dataclass(frozen=True)
class RecamConfig:
    """A second head tells the classes of an image apart, looking where each one's map is."""

    weight: float = 0.05  # of its loss; the other one is a mean over classes, of which VOC has 20
    maps: Literal["product", "second"] = "product"  # by both heads' weights multiplied, or the second's


@dataclass(frozen=True)
class ErasingConfig:
    """Classifiers one after the other; each is shown images in which what the earlier ones found is erased."""

    steps: int = 3  # classifiers
    hot: float = 0.8  # a class is found where its map is this share of its maximum
    stop: float = 2.0  # a class takes part until its loss is this many times that of the first step


@dataclass(frozen=True)
class SaliencyConfig:
    """Where things are, whatever they are: maps in [0, 1] of the training images."""

    folder: str | None = None  # grey PNGs of the images' names and sizes; None = estimated
    estimator: Literal["contrast", "objectness"] = "contrast"  # objectness: a network that saw generated scenes alone
    missing: Literal["refuse", "skip"] = "refuse"  # skip: an image without a file is learnt from without saliency


@dataclass(frozen=True)
class EpsConfig:
    """Classes and background add up to the saliency map."""

    tau: float = 0.4  # share of its cells that is to be salient, else a class counts as background
    balance: float = 0.5  # of the maps of objects against what that of background leaves
    weight: float = 1.0  # of the saliency loss
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)


@dataclass(frozen=True)
class GuidedConfig:
    """Label maps of seeds and saliency, and a network that learns from them."""

    rule: Literal["g0", "g1", "g2"] = "g2"  # salient parts are: any class, what a classifier says, that of the seeds
    seed: float = 0.2  # a class's seeds: its map is this share of its maximum
    salient: float = 0.5  # from which on a pixel is
    smallest: float = 0.01  # share of the image; smaller salient parts are dropped
    seeds_share: float = 0.5  # of the epochs, for the classifier that makes the seeds
    lr_scale: float = 0.1  # of the learning rate, while it learns from seeds: at all of it ImageNet's weights are lost
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)


@dataclass(frozen=True)
class SecConfig:
    """Seed, expand, constrain. Weights of 0 leave a loss out."""

    seed: float = 0.2  # a class's seeds: its map is this share of its maximum
    background: float = 0.1  # share of an image's pixels that are seeds of background: the least salient ones
    expand_decay: float = 0.996  # of a present class's ranks, for 41 x 41 cells
    background_decay: float = 0.999
    expand: float = 1.0
    constrain: float = 1.0
    seeds_share: float = 0.5  # of the epochs, for the classifier that makes the seeds
    lr_scale: float = 0.1  # of the learning rate, while it learns from seeds: at all of it ImageNet's weights are lost
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)


@dataclass(frozen=True)
class DsrgConfig(SecConfig):
    """SEC's seeds grow over what the network has become sure of; nothing is expanded otherwise."""

    expand: float = 0.0
    sure: float = 0.85  # probability of a class
    sure_background: float = 0.99


@dataclass(frozen=True)
class TrainConfig:
    """The classifier."""

    method: str = "cam"  # a file of training/methods, or several: seam+hide_and_seek
    dropout: float = 0.5  # of whole channels, before the head
    optim: OptimConfig = field(default_factory=OptimConfig)
    seam: SeamConfig = field(default_factory=SeamConfig)  # for method seam
    class_tokens: ClassTokensConfig = field(default_factory=ClassTokensConfig)  # for method class_tokens
    hide_and_seek: HideAndSeekConfig = field(default_factory=HideAndSeekConfig)
    mixup_cam: MixupCamConfig = field(default_factory=MixupCamConfig)
    acol: AcolConfig = field(default_factory=AcolConfig)
    mdc: MdcConfig = field(default_factory=MdcConfig)
    puzzle_cam: PuzzleCamConfig = field(default_factory=PuzzleCamConfig)
    recam: RecamConfig = field(default_factory=RecamConfig)
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    eps: EpsConfig = field(default_factory=EpsConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    sec: SecConfig = field(default_factory=SecConfig)
    dsrg: DsrgConfig = field(default_factory=DsrgConfig)


@dataclass(frozen=True)
class CamConfig:
    """Maps from the trained classifier."""

    method: str = "cam"  # a file of training/cams
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    flip: bool = True
    normalisation: Literal["max", "minmax"] = "max"
    layer: str | None = None  # grad_cam and its kin: whose maps, by its name in the network; None = what the head sees


@dataclass(frozen=True)
class ThresholdConfig:
    """How the background threshold t is chosen."""

    rule: Literal["fixed", "otsu", "area", "validation_split"] = "fixed"
    value: float = 0.3  # for `fixed`; in (0, 1)
    area: float = 0.3  # for `area`: share of the pixels that the objects of the tags cover, in (0, 1)


@dataclass(frozen=True)
class CrfConfig:
    """Dense CRF; spatial widths in pixels of an image of `reference_px` long side, they scale with the image."""

    iterations: int = 10
    gaussian_sxy: float = 3.0
    gaussian_weight: float = 3.0
    bilateral_sxy: float = 50.0
    bilateral_srgb: float = 5.0
    bilateral_weight: float = 10.0
    reference_px: int | None = None  # None = widths are taken as they are
    resolution: Literal["full", "half"] = "full"  # half: at half the side, a quarter of the time
    early_stop: bool = False  # stop when an iteration changes no label
    backend: Literal["lattice", "pydensecrf", "brute_force"] = "lattice"


@dataclass(frozen=True)
class PseudoLabelConfig:
    """CAMs to pseudo-masks."""

    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    crf: CrfConfig | None = field(default_factory=CrfConfig)
    band: float = 0.3  # IGNORE where backgrounds of threshold t * (1 - band) and t * (1 + band) disagree; 0 = no band
    band_above: float | None = None  # a share of its own for the upper edge
    soft: bool = False  # train_seg learns from probabilities instead, of the two likeliest classes; nothing is IGNORE


@dataclass(frozen=True)
class WalkConfig:
    """Random walk over the affinities of neighbouring cells."""

    radius: int = 5  # cells: a cell's neighbours are nearer than this
    beta: float = 8.0  # exponent of affinities; larger = only through strong ones
    steps: int = 64  # SEAM's 2^6; psa has 2^8
    background: float | None = None  # None = (1 - max)^alpha walks with the classes; IRN: they walk alone, against this
    band: float = 0.3  # IGNORE as in PseudoLabelConfig; 0 = none
    crf: CrfConfig | None = None  # a dense CRF after it

    def __post_init__(self) -> None:
        if self.background is not None and not 0 < self.background < 1:
            raise ConfigError(
                f"background of a walk must lie in (0, 1), got {self.background}: IRN has 0.25; leave it out for a "
                "background that walks with the classes"
            )


@dataclass(frozen=True)
class AffinityConfig:
    """AffinityNet or IRN, trained on the pseudo-masks, and the walk of the maps over what it has learnt."""

    network: Literal["affinitynet", "irn"] = "affinitynet"  # irn: boundaries, over a backbone that stays as it is
    output_stride: Literal[8, 16] = 8  # of the backbone: pixels of an AffinityNet's cell; irn has cells of 4
    start: Literal["weights", "classifier"] = "weights"  # where the backbone's weights come from
    train_radius: int | None = None  # of the pairs that it learns from; None = walk.radius. irn: 10, its walk 5
    walk: WalkConfig = field(default_factory=WalkConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def _seg_optim() -> OptimConfig:
    """SGD at the classifier's rate does not learn a segmentation network from a trained backbone; this does."""
    return OptimConfig(optimizer="adamw", lr=3e-4, new_lr_scale=5.0, weight_decay=1e-2)


@dataclass(frozen=True)
class SegConfig:
    """The segmentation network."""

    supervision: Literal["weak", "full"] = "weak"  # full = true masks: the upper bound
    start: Literal["classifier", "weights"] = "classifier"  # where the backbone's weights come from
    network: Literal["deeplab_v3plus", "deeplab_v2", "deeplab_largefov"] = "deeplab_v3plus"
    width: int = 256  # channels of its new layers
    balance: Literal["none", "foreground"] = "foreground"  # foreground: background and objects weigh the same
    rounds: int = 1  # 2 = self-training: a network learns again from what the first makes of the training images
    sure: float = 0.8  # for it: IGNORE where no class is as likely
    corrections: str | None = None  # masks that people corrected, in place of those images' pseudo-masks
    prohibitive: bool = False  # it also learns from labels of its own, of classes that it sees in the image
    optim: OptimConfig = field(default_factory=_seg_optim)

    def __post_init__(self) -> None:
        if self.corrections is not None and self.supervision == "full":
            raise ConfigError(
                "train_seg.corrections are in place of pseudo-masks, which train_seg.supervision full has none of: "
                "set one of the two"
            )
        if self.prohibitive and self.supervision == "full":
            raise ConfigError(
                "train_seg.prohibitive makes up for what pseudo-masks leave out, which true masks of "
                "train_seg.supervision full do not: set one of the two"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Scoring; the only stage but `validation_split` and full supervision that opens true masks."""

    splits: tuple[str, ...] = ("train", "val")
    seg_scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    seg_flip: bool = True
    seg_crf: CrfConfig | None = None  # a dense CRF over the final network's scores, scored beside it
    boundary_px: int = 3  # tolerance of the boundary F-score


@dataclass(frozen=True)
class ExportConfig:
    """The bundle. precisions: of its graphs, besides float32."""

    name: str = "weakseg"
    version: str = "1"
    max_side: int = 1024
    precisions: tuple[Literal["fp16", "bf16", "int8"], ...] = ()
    data_licence: str = "unknown"
    weights_licence: str = "unknown"


@dataclass(frozen=True)
class Recipe:
    """One experiment, from labels to bundle."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    pseudo_label: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    affinity: AffinityConfig | None = None  # None = no random walk
    train_seg: SegConfig | None = field(default_factory=SegConfig)  # None = the run ends with pseudo-masks
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    seed: int = 0
    upper_bound: bool = False  # also train the fully supervised twin of the segmentation network
