"""The benchmarks' evaluation protocols by name: setups, ranges and rules, each rule a named switch.

Benchmarks share the log-average miss rate and differ in what counts. A :class:`Protocol` holds one
benchmark's answers; the defaults of its fields are the rules of CityPersons. Where copies of a
benchmark's code disagree, :data:`PROTOCOLS` has the official behaviour and, where papers have used
it, the other one under a name of its own. A rule can be changed for an experiment by
``dataclasses.replace(PROTOCOLS["caltech_new"], resize_detections=True)``.

Sources, by commit where the file is in a repository:

- citypersons: cvgroup-njust/CityPersons, ``evaluation/eval_script`` (839c22f).
- caltech: ``dbEval.m`` 3.2.1 and pdollar/toolbox, ``bbGt.m`` (1a0a7eb), ``bbApply.m``.
- caltech_new: ``dbEval.m`` for the annotations of Zhang et al., "How Far are We from Solving
  Pedestrian Detection?", CVPR 2016, as hasanirtiza/Pedestron has it (3839ee5).
- eurocity: Braun et al., "EuroCity Persons", PAMI 2019; the benchmark's tools, as Pedestron's
  ``tools/ECPB`` has them (28b7202).
- kaist: sejong-rcv/MLPD-Multi-Label-Pedestrian-Detection, ``evaluation_script`` (686fa6d).
- crowdhuman: CrowdDet, ``lib/evaluate`` (Purkialo/CrowdDet, forked as xg-chu/CrowdDet, 7f49e08, and
  lizhaoliu-Lec/CrowdDet, 89ad2ad).

Needs nothing but Python.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

__all__ = [
    "CITYPERSONS",
    "EXACT_FPPI",
    "MISSING_POINTS",
    "NO_LIMIT",
    "PROTOCOLS",
    "ROUNDED_FPPI",
    "SETUPS",
    "CrowdHumanProtocol",
    "Protocol",
    "Setup",
    "describe_ranges",
    "select_protocol",
    "select_setups",
]

NO_LIMIT = 1e10

# 10^(-2 : 0.25 : 0): the four-decimal literals of the published Python scripts, and the numbers
# themselves.
ROUNDED_FPPI = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)
EXACT_FPPI = tuple(10.0 ** (step / 4 - 2) for step in range(9))

# The recall at a reference value below the FPPI of the first operating point.
MISSING_POINTS = MappingProxyType(
    {
        "official": "the recall of the last operating point, which is the best one (index -1 wraps "
        "around in the published Python script)",
        "matlab": "recall 0, as in the MATLAB toolbox of the Caltech benchmark",
    }
)


@dataclass(frozen=True)
class Setup:
    """The pedestrians that count. Ranges include their bounds, unless the protocol says otherwise.

    Attributes:
        height: lowest and highest height in pixels.
        visibility: lowest and highest visible share of the full box's area.
        occlusion, truncation: lowest and highest ``occlusion`` and ``truncation`` of the
            annotation, in the benchmark's own unit; None where the setup does not ask.
    """

    height: tuple[float, float]
    visibility: tuple[float, float] = (0, NO_LIMIT)
    occlusion: tuple[float, float] | None = None
    truncation: tuple[float, float] | None = None

    def counts(self, annotation: Mapping[str, Any]) -> bool:
        """True if an annotation counts where all bounds belong to the ranges."""
        return (
            not annotation.get("ignore", 0)
            and self.height[0] <= annotation["height"] <= self.height[1]
            and self.visibility[0] <= annotation["vis_ratio"] <= self.visibility[1]
        )

    def ranges(self) -> dict[str, list[float]]:
        """The ranges that the setup has, for JSON."""
        return {name: list(bounds) for name, bounds in asdict(self).items() if bounds is not None}


def describe_ranges(setups: Mapping[str, Setup]) -> dict[str, list[str]]:
    """The setups' ranges in words: of each quantity that any of them limits, a cell a setup."""
    columns = {}
    for quantity in ("height", "visibility", "occlusion", "truncation"):
        ranges = [getattr(setup, quantity) or (0, NO_LIMIT) for setup in setups.values()]
        if any(bounds != (0, NO_LIMIT) for bounds in ranges):
            columns[quantity] = [_describe_range(*bounds) for bounds in ranges]
    return columns


def _describe_range(low: float, high: float) -> str:
    if low >= NO_LIMIT:
        return "full"
    return f">= {low:g}" if high >= NO_LIMIT else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class Protocol:
    """The rules of one benchmark's miss rate.

    Attributes:
        name: key in :data:`PROTOCOLS`.
        source: the code whose behaviour it is.
        setups: what is reported, by name.
        annotation_keys: what is read of an annotation beside ``bbox``. ``height`` and ``vis_ratio``
            have defaults (:mod:`hkd_d2.data.annotation_rules`), others have to be there.
        max_detections: of an image, by score; None for all.
        height_slack: detections may miss the setup's heights by this factor, others are dropped;
            None keeps all.
        lowest_is_dropped: a detection of exactly the lowest height is dropped too. One of exactly
            the highest always is.
        half_open: quantities of the setups' ranges ("height", "visibility", "occlusion",
            "truncation") whose upper bound does not belong to the range.
        full_visibility: what a ``vis_ratio`` of 1 is taken for. ``NO_LIMIT`` is dbEval's infinity
            of a person without a visible box, which lies over every range that ends.
        border: x0, y0, x1, y1 in pixels; ground truth that leaves it is ignored. None: no border.
        clip_to_image: all boxes are cut at the image's edges first, and heights are those of the
            cut boxes.
        aspect_ratio: countable ground truth gets this width over height about its centre, after
            the border rule; None leaves it.
        resize_detections: detections get the ``aspect_ratio`` too.
        ignored_overlap: when an ignored box absorbs a detection. "detection": from half of the
            detection's own area on. "crowd": that for boxes with ``iscrowd``; others from an
            intersection over union of one half on.
        labels: annotations with another ``label`` are as if they were not there; those without
            one stay. None: all stay.
        skip_undetected: pedestrians in images without any detection do not count. Their images
            still divide the false positives.
        id_zero_is_unmatched: a detection that takes the annotation of ``id`` 0 is a false positive,
            as in the published Python scripts, which store the id of the match and ask whether
            it is true. Their benchmarks' files number from 1, but for KAIST's.
        height_scale: pixels of the evaluated images over those of the benchmark's. The heights of
            the setups and the border have been multiplied by it; see :meth:`scaled`.
        missing_point: key of :data:`MISSING_POINTS`.
        reference_fppi: the nine values of FPPI.
        miss_floor: a miss is at least this much before its logarithm is taken.
    """

    name: str
    source: str
    setups: Mapping[str, Setup] = field(repr=False)
    annotation_keys: tuple[str, ...] = ("height", "vis_ratio")
    max_detections: int | None = 1000
    height_slack: float | None = 1.25
    lowest_is_dropped: bool = False
    half_open: tuple[str, ...] = ()
    full_visibility: float = 1.0
    border: tuple[float, float, float, float] | None = None
    clip_to_image: bool = False
    aspect_ratio: float | None = None
    resize_detections: bool = False
    ignored_overlap: str = "detection"
    labels: tuple[str, ...] | None = None
    skip_undetected: bool = False
    id_zero_is_unmatched: bool = False
    height_scale: float = 1.0
    missing_point: str = "official"
    reference_fppi: tuple[float, ...] = ROUNDED_FPPI
    miss_floor: float = 0.0

    def scaled(self, height_scale: float) -> "Protocol":
        """The same rules for images of another size.

        Args:
            height_scale: pixels of the evaluated images over those of the benchmark's: 0.5 for
                images, annotations and detections of half the width and height.

        Raises:
            ValueError: a scale that is not positive and finite.
        """
        if not 0 < height_scale < NO_LIMIT:
            raise ValueError(
                f"The height scale is {height_scale!r}; give the evaluated images' height over "
                "that of the benchmark's images, for example 0.5."
            )
        return replace(
            self,
            setups={
                name: replace(setup, height=tuple(_scale(h, height_scale) for h in setup.height))
                for name, setup in self.setups.items()
            },
            border=self.border and tuple(bound * height_scale for bound in self.border),
            height_scale=self.height_scale * height_scale,
        )

    def rules(self) -> dict[str, Any]:
        """Every switch by its name, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "setups"}

    def describe(self) -> list[str]:
        """The rules in words, a line each."""
        half_open = f"the upper bound of {', '.join(self.half_open)}" if self.half_open else "none"
        lines = [
            f"protocol: {self.name} ({self.source})",
            f"bounds that do not belong to the ranges: {half_open}",
            f"detections of an image: {_first(self.max_detections)}",
            f"heights of detections: {self._heights()}",
        ]
        if self.height_scale != 1:
            lines.append(
                f"height scale: {self.height_scale:g}, the setups' heights and the border are the "
                "benchmark's times that"
            )
        if self.border:
            x0, y0, x1, y1 = (f"{bound:g}" for bound in self.border)
            lines.append(f"ground truth outside x {x0} to {x1}, y {y0} to {y1}: ignored")
        if self.clip_to_image:
            lines.append("all boxes: cut at the image's edges")
        if self.aspect_ratio:
            also = "and detections" if self.resize_detections else "but not detections"
            lines.append(f"width over height of {self.aspect_ratio:g}: countable boxes, {also}")
        if self.full_visibility != 1:
            lines.append("a person without a visible box: over every range of visibility that ends")
        if self.ignored_overlap == "crowd":
            lines.append("ignored boxes that are no crowd: absorb from an IoU of 0.5 on")
        if self.labels:
            lines.append(f"ground truth left out: all labels but {', '.join(self.labels)}")
        if self.skip_undetected:
            lines.append("pedestrians of images without any detection: do not count")
        if self.id_zero_is_unmatched:
            lines.append("a match with the annotation of id 0: a false positive")
        exact = "" if self.reference_fppi == ROUNDED_FPPI else ", not rounded"
        lines.append(f"reference points: nine from FPPI 0.01 to 1{exact}")
        lines.append(f"missing reference points: {MISSING_POINTS[self.missing_point]}")
        if self.miss_floor:
            lines.append(f"smallest miss in the mean: {self.miss_floor:g}")
        return lines

    def _heights(self) -> str:
        if self.height_slack is None:
            return "any"
        lowest = "above" if self.lowest_is_dropped else "from"
        slack = f"{self.height_slack:g}"
        return f"{lowest} the setup's lowest / {slack}, below its highest x {slack}"


def _scale(height: float, scale: float) -> float:
    return height if height >= NO_LIMIT else height * scale


def _first(count: int | None) -> str:
    return "all" if count is None else f"the first {count:,}"


@dataclass(frozen=True)
class CrowdHumanProtocol:
    """The rules of CrowdHuman's AP, MR^-2 and JI (:mod:`hkd_d2.evaluation.crowdhuman`).

    Attributes:
        name, source: as of :class:`Protocol`.
        annotation_keys: what an annotation has to have beside ``bbox``.
        min_overlap: detections match above this overlap, not at it.
        epsilon: added to the denominators of overlaps and of the Jaccard index.
        clip_to_image: all boxes are cut at the image's edges first.
        matching: of the Jaccard index: "weight", the greatest sum of overlaps, or "cardinality",
            the greatest number of pairs.
        reference_fppi: the nine values of FPPI.
    """

    name: str
    source: str
    annotation_keys: tuple[str, ...] = ()
    min_overlap: float = 0.5
    epsilon: float = 1e-6
    clip_to_image: bool = True
    matching: str = "weight"
    reference_fppi: tuple[float, ...] = ROUNDED_FPPI

    def rules(self) -> dict[str, Any]:
        """Every switch by its name, for JSON."""
        return dict(vars(self))

    def describe(self) -> list[str]:
        """The rules in words, a line each."""
        kept = "cut at the image's edges" if self.clip_to_image else "as they are"
        return [
            f"protocol: {self.name} ({self.source})",
            f"match: overlap above {self.min_overlap:g}, {self.epsilon:g} in denominators",
            f"boxes: {kept}; all detections of an image",
            "MR^-2: first operating point with at least the reference FPPI, or the last one",
            f"JI: matching of greatest {self.matching}, best of the score thresholds 0 to 0.9",
        ]


# ----------------------------------------------------------------------------------- the table

# Two setups mean "heavily occluded", and they differ by about nine points on the same detections:
# "Reasonable_occ=heavy" (0.2 to 0.65) is the benchmark's own, "heavy" (0 to 0.65) belongs to the
# bare / partial / heavy split of the CSP line of papers.
SETUPS = MappingProxyType(
    {
        # the benchmark's own
        "Reasonable": Setup((50, NO_LIMIT), (0.65, NO_LIMIT)),
        "Reasonable_small": Setup((50, 75), (0.65, NO_LIMIT)),
        "Reasonable_occ=heavy": Setup((50, NO_LIMIT), (0.2, 0.65)),
        "All": Setup((20, NO_LIMIT), (0.2, NO_LIMIT)),
        # by occlusion
        "bare": Setup((50, NO_LIMIT), (0.9, NO_LIMIT)),
        "partial": Setup((50, NO_LIMIT), (0.65, 0.9)),
        "heavy": Setup((50, NO_LIMIT), (0, 0.65)),
        # by size
        "small": Setup((50, 75), (0.65, NO_LIMIT)),
        "middle": Setup((75, 100), (0.65, NO_LIMIT)),
        "large": Setup((100, NO_LIMIT), (0.65, NO_LIMIT)),
    }
)

CITYPERSONS = Protocol(
    name="citypersons", source="cvgroup-njust/CityPersons, eval_script", setups=SETUPS
)

# Of the setups by scale and Occ=none, dbEval counts those without a visible box alone.
_UNOCCLUDED = (NO_LIMIT, NO_LIMIT)
_CALTECH_SETUPS = MappingProxyType(
    {
        "Reasonable": Setup((50, NO_LIMIT), (0.65, NO_LIMIT)),
        "All": Setup((20, NO_LIMIT), (0.2, NO_LIMIT)),
        "Scale=large": Setup((100, NO_LIMIT), _UNOCCLUDED),
        "Scale=near": Setup((80, NO_LIMIT), _UNOCCLUDED),
        "Scale=medium": Setup((30, 80), _UNOCCLUDED),
        "Scale=far": Setup((20, 30), _UNOCCLUDED),
        "Occ=none": Setup((50, NO_LIMIT), _UNOCCLUDED),
        "Occ=partial": Setup((50, NO_LIMIT), (0.65, 1)),
        "Occ=heavy": Setup((50, NO_LIMIT), (0.2, 0.65)),
    }
)
# dbEval's 5 to 635 and 5 to 475 count pixels from 1; ground truth here counts them from 0.
_CALTECH_BORDER = (4, 4, 634, 474)
_CALTECH = Protocol(
    name="caltech",
    source="dbEval.m 3.2.1, pdollar/toolbox",
    setups=_CALTECH_SETUPS,
    max_detections=None,
    half_open=("height",),
    full_visibility=NO_LIMIT,
    border=_CALTECH_BORDER,
    aspect_ratio=0.41,
    resize_detections=True,
    missing_point="matlab",
    reference_fppi=EXACT_FPPI,
)
# On this route the visible share of a person without a visible box is 1, so that Occ=partial holds
# all of Reasonable, and the range [inf, inf] of dbEval's table, which the setups by scale have,
# would hold nobody; the bound 1 in its place is ours.
_CALTECH_NEW_SETUPS = MappingProxyType(
    {
        name: Setup(setup.height, (1, 1)) if setup.visibility == _UNOCCLUDED else setup
        for name, setup in {**_CALTECH_SETUPS, "Small": SETUPS["small"]}.items()
    }
)
_CALTECH_NEW = Protocol(
    name="caltech_new",
    source="dbEval.m of hasanirtiza/Pedestron",
    setups=_CALTECH_NEW_SETUPS,
    max_detections=None,
    border=_CALTECH_BORDER,
    aspect_ratio=0.41,
    missing_point="matlab",
    reference_fppi=EXACT_FPPI,
)
_CALTECH_NEW_NO_BORDER = replace(
    _CALTECH_NEW, name="caltech_new_no_border", source="dbEval.m of liuwei16/CSP", border=None
)

# Occlusion and truncation in percent, as the tags occluded>10, >40, >80 have them.
_EUROCITY = Protocol(
    name="eurocity",
    source="EuroCity Persons benchmark, tools/ECPB of hasanirtiza/Pedestron",
    setups=MappingProxyType(
        {
            "reasonable": Setup((40, NO_LIMIT), occlusion=(0, 40), truncation=(0, 40)),
            "small": Setup((30, 60), occlusion=(0, 40), truncation=(0, 40)),
            "occluded": Setup((40, NO_LIMIT), occlusion=(40, 80), truncation=(0, 80)),
            "all": Setup((20, NO_LIMIT), occlusion=(0, 80), truncation=(0, 80)),
        }
    ),
    annotation_keys=("occlusion",),
    max_detections=None,
    lowest_is_dropped=True,
    half_open=("occlusion", "truncation"),
    clip_to_image=True,
    ignored_overlap="crowd",
    labels=("pedestrian", "person-group-far-away"),
    missing_point="matlab",
    reference_fppi=EXACT_FPPI,
    miss_floor=1e-10,
)
_EUROCITY_IGNORE_RIDERS = replace(
    _EUROCITY,
    name="eurocity_ignore_riders",
    source="tools/ECPB of hasanirtiza/Pedestron, ignore_other_vru",
    labels=("pedestrian", "person-group-far-away", "rider"),
)

# Occlusion: 0 none, 1 partial, 2 heavy.
_KAIST = Protocol(
    name="kaist",
    source="sejong-rcv/MLPD-Multi-Label-Pedestrian-Detection, evaluation_script",
    setups=MappingProxyType(
        {
            "Reasonable": Setup((55, NO_LIMIT), occlusion=(0, 1)),
            "Reasonable_small": Setup((50, 75), occlusion=(0, 1)),
            "Reasonable_occ=heavy": Setup((50, NO_LIMIT), occlusion=(2, 2)),
            "All": Setup((20, NO_LIMIT), occlusion=(0, 2)),
        }
    ),
    annotation_keys=("height", "occlusion"),
    height_slack=None,
    border=(5, 5, 635, 507),
    skip_undetected=True,
    id_zero_is_unmatched=True,
)

PROTOCOLS: Mapping[str, Protocol | CrowdHumanProtocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            CITYPERSONS,
            _CALTECH,
            _CALTECH_NEW,
            _CALTECH_NEW_NO_BORDER,
            _EUROCITY,
            _EUROCITY_IGNORE_RIDERS,
            _KAIST,
            CrowdHumanProtocol(name="crowdhuman", source="CrowdDet, lib/evaluate"),
        )
    }
)


def select_protocol(
    protocol: "str | Protocol | CrowdHumanProtocol",
) -> "Protocol | CrowdHumanProtocol":
    """Look a protocol up by name; one that is no name is returned as it is.

    Raises:
        ValueError: if the name is not in :data:`PROTOCOLS`.
    """
    if not isinstance(protocol, str):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; choose from {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]


def select_setups(
    setups: Mapping[str, Setup] | Iterable[str] | None = None,
    protocol: Protocol = CITYPERSONS,
) -> dict[str, Setup]:
    """Look setups up by name; a mapping is returned as it is, None is all of the protocol's.

    Raises:
        ValueError: if the protocol has no setup of that name.
    """
    if setups is None:
        return dict(protocol.setups)
    if isinstance(setups, Mapping):
        return dict(setups)
    names = [setups] if isinstance(setups, str) else list(setups)
    for name in names:
        if name not in protocol.setups:
            raise ValueError(
                f"setup {name!r} is unknown; choose from {', '.join(protocol.setups)}."
            )
    return {name: protocol.setups[name] for name in names}
