"""Training runs in processes of their own, kept on the disk and used again."""

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

from hkd_d2.config import default_config, load_config
from hkd_d2.data.streets import PROVENANCE, generate_streets
from hkd_d2.distillation.term import TERM_REGISTRY
from hkd_d2.evaluation.protocols import PROTOCOLS
from hkd_d2.files import write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TEACHER_SEED = 7
PROGRESS_PERIOD = 10  # seconds from one line of progress to the next


@dataclass
class Run:
    """One training run: a detector, its seed, its config file and what is changed in it.

    Attributes:
        kind: what is trained, for people.
        changes: keys and values by turns, after those of the config file.
        seconds_per_iteration: on two cores, a first guess; to be scaled by what this
            machine shows.
        tool: whose run it is; names the record in ``folder``.
    """

    kind: str
    seed: int
    config_file: Path
    folder: Path
    changes: list
    seconds_per_iteration: float
    tool: str = "quickstart"

    @property
    def name(self) -> str:
        return f"{self.kind}, seed {self.seed}"

    @property
    def options(self) -> list:
        return [*self.changes, "SEED", self.seed, "OUTPUT_DIR", str(self.folder)]

    @property
    def config(self) -> CfgNode:
        return read_config(self.config_file, self.options)

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"

    @property
    def record(self) -> Path:
        """Settings and, once finished, seconds: the mark of a folder that the tool made."""
        return self.folder / f"{self.tool}.json"

    @property
    def nominal_seconds(self) -> float:
        return self.seconds_per_iteration * self.config.SOLVER.MAX_ITER

    def settings(self) -> dict:
        """All that decides the outcome: the merged config, the data, the teacher's weights."""
        cfg = self.config
        settings = without_idle_terms(flatten(cfg))
        # Places on the disk; what stands there is told below.
        for key in ("OUTPUT_DIR", "HKD.DATA.REGISTER", "HKD.TEACHER.WEIGHTS"):
            del settings[key]
        root = Path(cfg.HKD.DATA.REGISTER[0][2])
        settings["the streets"] = json.loads((root / PROVENANCE).read_text())
        files = {"the teacher's weights": cfg.HKD.TEACHER.WEIGHTS}
        for number, pool in enumerate(settings.pop("HKD.DATA.PSEUDO", [])):
            files[f"the teacher's detections ({number})"] = pool
        for name, file in files.items():
            if Path(file).is_file():
                settings[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return json.loads(json.dumps(settings))  # as it will be read back

    def seconds(self) -> float | None:
        """Seconds of a finished training."""
        return read_json(self.record)["seconds"] if self.record.is_file() else None

    def changed(self) -> list[str] | None:
        """Settings that differ from those of the finished run; None where there is none.

        A key that is newer than the run had its default then.
        """
        if not (self.seconds() and self.weights.is_file()):
            return None
        then, now = without_idle_terms(read_json(self.record)["settings"]), self.settings()
        defaults = json.loads(json.dumps(flatten(default_config())))
        then = {**{key: defaults[key] for key in now.keys() & defaults.keys()}, **then}
        for settings in (then, now):
            # Where the repository stands decides nothing, nor whose word the same rule was.
            file = settings["HKD.TEACHER.CONFIG_FILE"]
            settings["HKD.TEACHER.CONFIG_FILE"] = file.rsplit(f"{CONFIGS.name}/", 1)[-1]
            if not settings["HKD.EVALUATION.MISSING_POINT"]:
                protocol = PROTOCOLS[settings["HKD.EVALUATION.PROTOCOL"]]
                settings["HKD.EVALUATION.MISSING_POINT"] = protocol.missing_point
        missing = object()
        keys = sorted(then.keys() | now.keys())
        return [key for key in keys if then.get(key, missing) != now.get(key, missing)]

    def finished(self) -> bool:
        """Whether the run is there with these settings."""
        return self.changed() == []

    def detections(self) -> list[dict]:
        """Detections of the evaluation at the end of the training, as COCO results."""
        return read_json(self.folder / "inference" / "detections_streets_val.json")

    def metrics(self) -> list[dict]:
        """The trainer's log, by iteration."""
        lines = (self.folder / "metrics.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def results(self) -> dict:
        """The miss rates and COCO APs of the same evaluation, percent."""
        return next(m for m in reversed(self.metrics()) if "bbox/AP" in m)


def without_idle_terms(settings: dict) -> dict:
    """Flat settings without the nodes of terms that ``HKD.TERMS`` does not name."""
    idle = tuple(f"HKD.{node}" for node in idle_terms(settings["HKD.TERMS"]))
    return {key: value for key, value in settings.items() if not key.startswith(idle)}


def idle_terms(active: list[str]) -> list[str]:
    """The nodes, such as "PYRAMID.", of the terms that ``active`` does not name."""
    names = {name.upper() for name in active}
    return [f"{name.upper()}." for name, _ in TERM_REGISTRY if name.upper() not in names]


def train(
    run: Run,
    later: list[Run],
    *,
    side_by_side: int = 1,
    threads: int | None = None,
    label: str = "",
    children: set | None = None,
) -> None:
    """Train ``run`` from the start in a process of its own, unless it is finished already.

    Args:
        later: what is to be trained after it, for the time left.
        side_by_side: how many runs are trained at a time, for the same.
        threads: of the process; None for PyTorch's choice.
        label: before every line that is printed.
        children: list of running processes, so that the caller can end them.

    Raises:
        ValueError: the folder holds something else.
        RuntimeError: the training failed.
    """

    def say(text):
        print(f"  {label}{text}", flush=True)

    changed = run.changed()
    if changed == []:
        say(f"already there, took {format_time(run.seconds())}: {run.weights}")
        return
    if run.folder.exists():
        if not run.record.is_file():
            raise ValueError(
                f"{run.folder} holds something else than a run of the {run.tool}; move it away or "
                "choose another --output."
            )
        why = f"this changed: {', '.join(changed)}" if changed else "it was interrupted"
        say(f"starting over, since {why}")
        shutil.rmtree(run.folder)
    record = {"settings": run.settings(), "seconds": None}
    run.folder.mkdir(parents=True)
    write_text(run.record, json.dumps(record, indent=1))  # at once: it marks the folder

    command = [sys.executable, "-m", "hkd_d2", "train"]
    command += ["--config-file", str(run.config_file), *map(str, run.options)]
    environment = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    start = last = time.monotonic()
    tail = deque(maxlen=15)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        children = set() if children is None else children
        children.add(child)
        for line in child.stdout:
            tail.append(line)
            progress = read_progress(line)
            if progress and time.monotonic() - last >= PROGRESS_PERIOD:
                last = time.monotonic()
                text, eta = progress
                if eta is not None:
                    speed = (last - start + eta) / run.nominal_seconds
                    everything = eta + predict(later, speed) / side_by_side
                    text += f", this run {format_time(eta)} left, all {format_time(everything)}"
                say(text)
    children.discard(child)
    if child.returncode:
        log = run.folder / "log.txt"
        raise RuntimeError(
            f"the training of the {run.name} ended with status {child.returncode}; its last lines, "
            f"more of which are in {log}:\n{''.join(tail)}"
        )
    record["seconds"] = time.monotonic() - start
    write_text(run.record, json.dumps(record, indent=1))
    say(f"finished in {format_time(record['seconds'])}; log: {run.folder / 'log.txt'}")


def train_all(
    runs: list[Run], side_by_side: int, finished: Callable[[Run], None]
) -> dict[str, Exception]:
    """Train ``runs`` in their order, several at a time, the machine's cores shared out.

    An interruption ends the processes that run.

    Args:
        finished: called in the caller's thread after each run that is there.

    Returns:
        dict: the error of each run that failed, by its name; the others go on.
    """
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    children, failed = set(), {}
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = {}
        for index, run in enumerate(runs):
            future = pool.submit(
                train,
                run,
                runs[index + side_by_side :],
                side_by_side=side_by_side,
                threads=threads,
                label=f"[{index + 1}/{len(runs)}] {run.name}: ",
                children=children,
            )
            futures[future] = run
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    future.result()
                except (RuntimeError, ValueError, OSError) as error:
                    failed[run.name] = error
                    print(f"  {run.name} FAILED: {error}", flush=True)
                else:
                    finished(run)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    return failed


def read_progress(line: str) -> tuple[str, float | None] | None:
    """Progress in a line of Detectron2's log, with the seconds left where it does."""
    found = re.search(
        r"eta: (?:(\d+) days?, )?(\d+):(\d+):(\d+)\s+iter: (\d+)\s+total_loss: (\S+)", line
    )
    if found:
        *times, iteration, loss = found.groups()
        days, hours, minutes, seconds = (int(t or 0) for t in times)
        eta = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        return f"iteration {int(iteration) + 1}: loss {loss}", eta
    found = re.search(r"Inference done (\d+)/(\d+)", line)
    return (f"evaluation: image {found[1]} of {found[2]}", None) if found else None


def predict(runs: list[Run], speed: float) -> float:
    """Seconds that ``runs`` will take on a machine ``speed`` times slower than the nominal one."""
    return sum(0 if run.finished() else run.nominal_seconds * speed for run in runs)


def measured_speed(runs: list[Run]) -> float:
    """Time of the finished ``runs`` over the nominal; 1 where there are none."""
    done = [run for run in runs if run.seconds()]
    if not done:
        return 1.0
    return sum(run.seconds() for run in done) / sum(run.nominal_seconds for run in done)


def draw_streets(folder: Path, smoke: bool = False) -> None:
    """Generate the data set that the quickstart and the methods share."""
    generate_streets(
        folder,
        num_train=8 if smoke else 600,
        num_val=4 if smoke else 200,
        workers=1 if smoke else os.cpu_count() or 1,
    )


def street_options(streets: Path) -> list:
    """The options that register the streets of a folder."""
    splits = ("train", "val")
    sets = [[f"streets_{split}", "citypersons", str(streets), split] for split in splits]
    return ["HKD.DATA.REGISTER", sets]


def read_config(config_file: Path, options: list) -> CfgNode:
    """
    Raises:
        ValueError: ``options`` are no pairs of a key and a value.
    """
    # Through text, as the command line does.
    return load_config(config_file, [str(option) for option in options])


def flatten(node: CfgNode, prefix: str = "") -> dict:
    """``{"A.B": value}`` of nested nodes."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_json(path: Path):
    return json.loads(path.read_text())


def format_time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def parse_seeds(text: str) -> list[int]:
    """The seeds of a command line, such as 0,1,2."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no list of seeds; give different numbers from 0, such as 0,1,2"
        )
    return seeds
