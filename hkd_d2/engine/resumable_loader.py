"""A training loader that goes on where it stopped: the same images, augmented in the same way.

Nothing is drawn that Detectron2's own loader would not draw, so an uninterrupted run sees what it
sees with that one.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from hkd_d2.engine.random_state import check_random_state, random_state, set_random_state
from hkd_d2.modeling.meta_arch import forked_random_state

logger = logging.getLogger(__name__)

_STAMP = "drawn"


class Stamp(NamedTuple):
    """Origin of a sample.

    Attributes:
        worker: whose share of the stream it is in.
        index: of the record.
        state: the random states before it was made; of a worker process those after it.
    """

    worker: int
    index: int
    state: dict


class TrackedStream(IterableDataset):
    """Detectron2's ``ToIterableDataset`` whose samples say where they come from.

    Args:
        stream: the data set, its sampler, and how many samples in a row a worker takes.

    Attributes:
        start: state of a :class:`ResumableLoader` to go on from, or None.
        skipped: samples of this process that are left out at the beginning.
    """

    def __init__(self, stream: ToIterableDataset):
        self.dataset, self.sampler = stream.dataset, stream.sampler
        self.chunk = stream.shard_chunk_size
        self.start: dict | None = None
        self.skipped = 0

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        done = 0
        if self.start is not None:
            # The loader asks its workers in turn, beginning with the first.
            worker = (worker + self.start["turn"]) % workers
            done = self.start["done"][worker]
            if info and done:
                set_random_state(self.start["states"][worker])
            elif info:
                torch.manual_seed(self.start["base_seed"] + worker)
                worker_init_reset_seed(worker)
        for index in islice(self._share(worker, workers), done, None):
            before = None if info else random_state()
            sample = self.dataset[index]
            sample[_STAMP] = Stamp(worker, index, before or random_state())
            yield sample

    def _share(self, worker, workers):
        """A worker's indices, in Detectron2's order."""
        for number, index in enumerate(islice(iter(self.sampler), self.skipped, None)):
            if number // self.chunk % workers == worker:
                yield index


class ResumableLoader:
    """Batches as Detectron2's training loader gives them, with a state that can be saved.

    Args:
        loader: of :func:`detectron2.data.build_detection_train_loader`.
    """

    def __init__(self, loader: DataLoader | AspectRatioGroupedDataset):
        self.grouped = isinstance(loader, AspectRatioGroupedDataset)
        inner = loader.dataset if self.grouped else loader
        self.batch_size = loader.batch_size
        self.stream = TrackedStream(inner.dataset)
        self.workers = inner.num_workers
        self.loader = DataLoader(
            self.stream,
            batch_size=inner.batch_size,
            drop_last=inner.drop_last,
            num_workers=inner.num_workers,
            collate_fn=inner.collate_fn,
            worker_init_fn=inner.worker_init_fn,
            generator=inner.generator,
            pin_memory=inner.pin_memory,
            prefetch_factor=inner.prefetch_factor,
            persistent_workers=inner.persistent_workers,
        )
        number = max(self.workers, 1)
        self.base_seed: int | None = None
        self.done, self.states = [0] * number, [None] * number
        # Images that wait for others of their shape: (stamp, sample or None to make it again).
        self._buckets: tuple[list, list] = ([], [])

    def __iter__(self) -> Iterator[list[dict]]:
        if self.base_seed is None:
            iterator = iter(self.loader)
            self.base_seed = iterator._base_seed
        else:  # the seed was drawn when the run began
            with forked_random_state():
                iterator = iter(self.loader)
                for bucket in self._buckets:
                    bucket[:] = [(stamp, self._make_again(stamp)) for stamp, _ in bucket]
        for item in iterator:
            samples = [item] if self.grouped else item
            stamps = [self._count(sample) for sample in samples]
            if not self.grouped:
                yield samples
                continue
            (sample,), (stamp,) = samples, stamps
            bucket = self._buckets[0 if sample["width"] > sample["height"] else 1]
            bucket.append((stamp, sample))
            if len(bucket) == self.batch_size:
                batch = [sample for _, sample in bucket]
                bucket.clear()
                yield batch

    def _count(self, sample: dict) -> Stamp:
        """Note that a sample was drawn; returns how to make it again."""
        stamp = sample.pop(_STAMP)
        if self.workers:  # it came with the state after it
            before = self.states[stamp.worker]
            self.states[stamp.worker] = stamp.state
            stamp = stamp._replace(state=before)
        self.done[stamp.worker] += 1
        return stamp

    def _make_again(self, stamp: Stamp) -> dict:
        if stamp.state is None:  # the first one of a worker
            torch.manual_seed(self.base_seed + stamp.worker)
            worker_init_reset_seed(stamp.worker)
        else:
            set_random_state(stamp.state)
        return self.stream.dataset[stamp.index]

    def state_dict(self) -> dict[str, Any]:
        """Position of the loader, in plain containers."""
        tasks = sum(self.done) // (1 if self.grouped else self.batch_size)
        return {
            "form": self._form(),
            "base_seed": self.base_seed,
            "turn": tasks % max(self.workers, 1),
            "done": list(self.done),
            "states": list(self.states),
            "waiting": [[list(stamp) for stamp, _ in bucket] for bucket in self._buckets],
            "sampler": sampler_state(self.stream.sampler),
        }

    def _form(self):
        form = {"images": len(self.stream.dataset), "batch_size": self.batch_size}
        return form | {"workers": self.workers, "grouped": self.grouped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, before the first batch is drawn."""
        if state["form"] != self._form():
            raise ValueError("The state is of another loader.")
        load_sampler_state(self.stream.sampler, state["sampler"])
        self.stream.start = state if state["base_seed"] is not None else None
        self.base_seed = state["base_seed"]
        self.done, self.states = list(state["done"]), list(state["states"])
        self._buckets = tuple([(Stamp(*row), None) for row in b] for b in state["waiting"])

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise unless ``state`` is one of a loader such as this, of any number of workers."""
        form, done, base_seed = state["form"], state["done"], state["base_seed"]
        workers = max(form["workers"], 1)
        fits = [
            {key: type(value) for key, value in form.items()}
            == {key: type(value) for key, value in self._form().items()},
            len(done) == len(state["states"]) == workers and len(state["waiting"]) == 2,
            all(type(n) is int and 0 <= n < 2**40 for n in done),
            type(state["turn"]) is int and 0 <= state["turn"] < workers,
            type(base_seed) is int and 0 <= base_seed < 2**63
            if any(done) or base_seed is not None
            else True,
        ]
        if not all(fits):
            raise ValueError("the loader's position is of another form")
        for worker, random in enumerate(state["states"]):
            if random is not None or (form["workers"] and done[worker]):
                check_random_state(random)
        for stamp in (Stamp(*row) for bucket in state["waiting"] for row in bucket):
            if stamp.worker not in range(workers) or stamp.index not in range(form["images"]):
                raise ValueError("the loader's waiting images are of another form")
            if stamp.state is not None:
                check_random_state(stamp.state)
        check_sampler_state(self.stream.sampler, state["sampler"])

    def skip(self, samples: int, sampler: dict) -> None:
        """Leave out this process's first ``samples``, of the shuffles of a saved sampler."""
        load_sampler_state(self.stream.sampler, sampler)
        self.stream.skipped = samples


def position(state: dict[str, Any]) -> int:
    """Samples of a saved state that were trained on."""
    return sum(state["done"]) - sum(len(bucket) for bucket in state["waiting"])


def resumable(loader: Any) -> Any:
    """A :class:`ResumableLoader` of Detectron2's loader; a loader of another kind as it is."""
    inner = loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader
    if isinstance(inner, DataLoader) and type(inner.dataset) is ToIterableDataset:
        return ResumableLoader(loader)
    logger.warning(
        "The training loader is a %s, whose position is not saved: a resumed run draws its images "
        "anew.",
        type(loader).__name__,
    )
    return loader


def sampler_state(sampler: Sampler) -> dict[str, Any]:
    """The seeds of a sampler, and of samplers inside it."""
    state = {}
    for name, value in vars(sampler).items():
        if isinstance(value, Sampler):
            state[name] = sampler_state(value)
        elif "seed" in name or "subset" in name:
            state[name] = value
    return state


def load_sampler_state(sampler: Sampler, state: dict[str, Any]) -> None:
    """The reverse of :func:`sampler_state`."""
    for name, value in state.items():
        if isinstance(value, dict):
            load_sampler_state(getattr(sampler, name), value)
        else:
            setattr(sampler, name, value)


def check_sampler_state(sampler: Sampler, state: dict[str, Any]) -> None:
    """Raise unless ``state`` has what :func:`sampler_state` has of ``sampler``, in its types."""
    ours = sampler_state(sampler)
    if ours.keys() != state.keys():
        raise ValueError("the sampler's state has other parts")
    for name, value in ours.items():
        if isinstance(value, dict):
            check_sampler_state(getattr(sampler, name), state[name])
        elif type(value) is not type(state[name]):
            raise ValueError(f"the sampler's '{name}' is of another form")
        elif isinstance(value, int):
            torch.Generator().manual_seed(state[name])
        elif isinstance(value, torch.Tensor) and state[name].dtype != value.dtype:
            raise ValueError(f"the sampler's '{name}' is of another form")
