"""The contenders: every method of configs/methods on the quickstart's small detectors."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from experiments.runs import (
    CONFIGS,
    ROOT,
    TEACHER_SEED,
    Run,
    flatten,
    idle_terms,
    read_config,
    street_options,
)
from experiments.scores import MISS_RATES

TOOL = "comparison"
# Chosen so that the slowest method's run takes at most 90 seconds on two cores.
MAX_ITER = 450
# Iterations from one logged raw loss and gradient share to the next; the raw losses' own.
SHARE_PERIOD = 20
# Keys of HKD that are the detectors' and the data's, not the method's.
DETECTORS_OWN = (
    "STUDENT.META_ARCHITECTURE",
    "TEACHER.CONFIG_FILE",
    "TEACHER.WEIGHTS",
    "BACKBONE.",
    "FCOS.",
    "DATA.REGISTER",
    "DATA.MIN_",
    "EVALUATION.",
    "SOLVER.",
)


@dataclass(frozen=True)
class Family:
    """A small teacher and student of configs/quickstart that stand for the large ones of a kind.

    Attributes:
        teacher, student: names of their config files; the teacher's is its folder's too.
        architectures: meta-architectures of the large students.
        seconds: of an iteration of teacher, plain and distilled student, a first guess.
    """

    name: str
    teacher: str
    student: str
    architectures: tuple[str, ...]
    seconds: tuple[float, float, float]

    def config_file(self, role: str) -> Path:
        return CONFIGS / "quickstart" / f"{getattr(self, role)}.yaml"


FAMILIES = (
    Family("two-stage", "teacher", "student", ("GeneralizedRCNN",), (0.145, 0.061, 0.106)),
    Family(
        "RetinaNet",
        "teacher_retinanet",
        "student_retinanet",
        ("RetinaNet", "IgnoreAwareRetinaNet"),
        (0.2, 0.07, 0.14),
    ),
)


@dataclass
class Contender:
    """A method, or the plain student of a family, and its runs, one a seed.

    Attributes:
        section: those that are compared with each other: the family, and the share of the
            labels where it is not all.
        config_file: of the small student with the method's changes.
        terms: names of the distillation terms, as in the log.
        pool: the teacher's detections, for a method that trains on them.
    """

    name: str
    family: Family
    section: str
    config_file: Path
    terms: list[str]
    pool: Path | None
    runs: list[Run] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the others of the section are measured by it: labels alone, no distillation."""
        return not self.terms and self.pool is None

    @property
    def description(self) -> str:
        """The config file's text, the same wherever the repository stands."""
        return self.config_file.read_text().replace(f"{ROOT}/", "")


def find_methods() -> dict[str, Path]:
    """The config file of each method by name: configs/methods, and HKD with several weights."""
    files = sorted((CONFIGS / "methods").glob("*.yaml"))
    files += [CONFIGS / "quickstart" / "hkd.yaml"]
    files += [CONFIGS / f"hkd_{x}.yaml" for x in ("citypersons", "retinanet_citypersons")]
    return {file.stem: file for file in files}


def choose_methods(names: list[str]) -> dict[str, Path]:
    """The methods of these names, all for [].

    Raises:
        ValueError: an unknown name.
    """
    known = find_methods()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"'{unknown[0]}' is no method; choose from {', '.join(known)}, or add "
            f"configs/methods/{unknown[0]}.yaml."
        )
    return {name: known[name] for name in names or known}


def find_family(config_file: Path) -> Family:
    """The small pair for the student of a method's config file.

    Raises:
        ValueError: there is none.
    """
    architecture = read_config(config_file, []).HKD.STUDENT.META_ARCHITECTURE
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    raise ValueError(
        f"{config_file} distils a {architecture}, and configs/quickstart has no small pair of that "
        "kind; leave it out with --methods, or build it on another student."
    )


def overlay(config_file: Path, family: Family, iterations: int) -> dict:
    """Changes that a method makes to the family's small student, as nested nodes.

    That is its ``HKD`` node but for idle terms, and ``SOLVER.CLIP_GRADIENTS`` where it clips. Its
    levels become the small student's of the same place among those of the head. Warm-ups and
    stops, counted in iterations, shrink with the run.
    """
    student = read_config(family.config_file("student"), [])
    method = read_config(config_file, [])
    theirs, ours = head_levels(method), head_levels(student)
    level = dict(zip(theirs, ours, strict=True))
    share = iterations / method.SOLVER.MAX_ITER

    def adapt(key, value):
        if isinstance(value, str):
            return level.get(value, value)
        if isinstance(value, (list, tuple)) and set(value) <= level.keys():
            return [level[name] for name in value]
        if key.endswith(("_ITER", "_ITERS")):
            return round(share * value)
        return list(value) if isinstance(value, tuple) else value

    before, after = flatten(student.HKD), flatten(method.HKD)
    idle = idle_terms(method.HKD.TERMS)
    changes = {"HKD": {}}
    if method.MODEL.META_ARCHITECTURE == "HKDDetector":
        changes["MODEL"] = {"META_ARCHITECTURE": "HKDDetector"}
    for key, value in after.items():
        if not key.startswith((*DETECTORS_OWN, *idle)):
            value = adapt(key, value)
            if key not in before or before[key] != value:
                put(changes["HKD"], key, value)
    if method.HKD.TEACHER.CONFIG_FILE:
        put(changes["HKD"], "TEACHER.CONFIG_FILE", str(family.config_file("teacher")))
    clip = method.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        changes["SOLVER"] = {"CLIP_GRADIENTS": dict(clip)}
    return changes


def head_levels(cfg: CfgNode) -> list[str]:
    """The pyramid levels that the RPN or the dense head of a config reads, finest first."""
    two_stage = cfg.HKD.STUDENT.META_ARCHITECTURE == "GeneralizedRCNN"
    return list((cfg.MODEL.RPN if two_stage else cfg.MODEL.RETINANET).IN_FEATURES)


def put(nodes: dict, key: str, value) -> None:
    """Set ``value`` at a dotted key of nested dictionaries."""
    *path, last = key.split(".")
    for name in path:
        nodes = nodes.setdefault(name, {})
    nodes[last] = value


def plan_teacher(family: Family, quickstart: Path, smoke: bool) -> Run:
    """The teacher's run, in the quickstart's folder and as the quickstart trains it."""
    changes = street_options(quickstart / "streets")
    if smoke:
        changes += ["SOLVER.MAX_ITER", 2]
    return Run(
        family.teacher,
        TEACHER_SEED,
        family.config_file("teacher"),
        quickstart / family.teacher,
        changes,
        family.seconds[0],
    )


def plan_contenders(
    methods: dict[str, Path], seeds: list[int], quickstart: Path, output: Path, iterations: int
) -> list[Contender]:
    """Plain students of the families that ``methods`` need, and the methods, with their runs.

    Writes the config file of each contender to ``output/configs``.
    """
    families = {name: find_family(file) for name, file in methods.items()}
    chosen = []
    for family in FAMILIES:
        if family in families.values():
            chosen.append((family.student, family, {}))
            chosen += [
                (name, family, overlay(file, family, iterations))
                for name, file in methods.items()
                if families[name] is family
            ]
    return [
        plan_contender(name, family, changes, seeds, quickstart, output, iterations)
        for name, family, changes in chosen
    ]


def plan_contender(
    name: str,
    family: Family,
    changes: dict,
    seeds: list[int],
    quickstart: Path,
    output: Path,
    iterations: int,
) -> Contender:
    """A contender of these changes; see :func:`plan_contenders`."""
    file = output / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    base = {"_BASE_": str(family.config_file("student"))}
    file.write_text(yaml.safe_dump({**base, **changes}, sort_keys=False))

    node = changes.get("HKD", {})
    options = [*street_options(quickstart / "streets"), "SOLVER.MAX_ITER", iterations]
    options += ["HKD.GRADIENT_SHARE_PERIOD", SHARE_PERIOD]
    if "CONFIG_FILE" in node.get("TEACHER", {}):
        weights = plan_teacher(family, quickstart, False).weights
        options += ["HKD.TEACHER.WEIGHTS", str(weights)]
    data, pool = node.get("DATA", {}), None
    if data.get("PSEUDO"):
        pool = output / f"pool_{family.teacher}.json"
        options += ["HKD.DATA.PSEUDO", [str(pool)]]
    share = data.get("LABELED_SHARE", 1.0)
    section = family.name if share == 1.0 else f"{family.name}, {100 * share:g} % of the labels"
    terms = list(read_config(file, []).HKD.TERMS)
    seconds = family.seconds[2 if terms else 1]
    runs = [
        Run(name, seed, file, output / "runs" / f"{name}_seed{seed}", options, seconds, TOOL)
        for seed in seeds
    ]
    return Contender(name, family, section, file, terms, pool, runs)


def read_row(contender: Contender, run: Run) -> dict:
    """The row of a finished run: scores, and each term's raw loss and gradient share."""
    results = run.results()
    row = {
        "method": contender.name,
        "section": contender.section,
        "plain": contender.plain,
        "seed": run.seed,
        **{name: results[f"miss_rate/{setup}"] for name, setup in MISS_RATES.items()},
        "AP": results["bbox/AP"],
        "seconds": run.seconds(),
    }
    metrics = run.metrics()
    for column, key in (("raw", "hkd/{}_raw"), ("share", "hkd_gradient_share/loss_hkd_{}")):
        row[column] = {term: ends(metrics, key.format(term)) for term in contender.terms}
    return row


def ends(metrics: list[dict], key: str) -> tuple[float, float] | None:
    """Means of a logged value over the first and the last fifth of its entries.

    Entries of 0, of a batch without anything to compare or a term that does not act yet, are left
    out, unless all are.
    """
    values = [entry[key] for entry in metrics if key in entry]
    if not values:
        return None
    values = [value for value in values if value] or values
    few = max(1, len(values) // 5)
    return sum(values[:few]) / few, sum(values[-few:]) / few
