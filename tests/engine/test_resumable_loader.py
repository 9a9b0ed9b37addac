"""The resumable loader gives what Detectron2's gives, and goes on where it stopped."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils.env import seed_all_rng

from hkd_d2.data.loader import MixedTrainingSampler
from hkd_d2.engine.random_state import random_state, set_random_state
from hkd_d2.engine.resumable_loader import ResumableLoader, position, resumable

IMAGES = 9
SAMPLERS = {
    "training": lambda: TrainingSampler(IMAGES),
    "subset": lambda: RandomSubsetTrainingSampler(IMAGES, 0.7),
    "mixed": lambda: MixedTrainingSampler(4, 5, ratio=0.7, batch_size=2),
}


def mapper(record):
    """A record with draws from all three random states."""
    draws = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return {**record, "draws": draws}


def build(grouped=True, workers=0, sampler="training"):
    records = [{"id": i, "width": 4 if i % 3 else 2, "height": 3} for i in range(IMAGES)]
    return build_detection_train_loader(
        records,
        mapper=mapper,
        sampler=SAMPLERS[sampler](),
        total_batch_size=2,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
    )


def take(iterator, number):
    """Batches, with a draw of the model's after each."""
    batches = []
    for _ in range(number):
        batches.append((next(iterator), float(torch.rand(()))))
    return batches


FORMS = pytest.mark.parametrize(
    "grouped, workers", [(True, 0), (False, 0), (True, 2), (False, 2), (True, 3)]
)


@FORMS
def test_the_images_and_draws_of_detectron2s_loader(grouped, workers):
    seed_all_rng(5)
    wanted = take(iter(build(grouped, workers)), 14)
    seed_all_rng(5)
    loader = resumable(build(grouped, workers))
    assert isinstance(loader, ResumableLoader)
    assert take(iter(loader), 14) == wanted


@pytest.mark.parametrize("sampler", SAMPLERS)
@FORMS
def test_a_resumed_loader_goes_on(grouped, workers, sampler, tmp_path):
    seed_all_rng(5)
    loader = ResumableLoader(build(grouped, workers, sampler))
    iterator = iter(loader)
    states, batches = [], []
    for _ in range(9):
        batches += take(iterator, 1)
        states.append({"loader": loader.state_dict(), "random": random_state()})
    torch.save(states, tmp_path / "states.pth")  # as a checkpoint is read
    states = torch.load(tmp_path / "states.pth", weights_only=True)
    for stop in (0, 3, 4) if workers else range(8):
        seed_all_rng(77 + stop)  # a new process, which draws another shuffle
        resumed = ResumableLoader(build(grouped, workers, sampler))
        resumed.load_state_dict(states[stop]["loader"])
        set_random_state(states[stop]["random"])
        assert take(iter(resumed), 8 - stop) == batches[stop + 1 :], stop


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_seen_however_often_the_run_stops(workers):
    """Acceptance: stopped at every step, each image comes as often as without a stop."""
    seen, state = [], None
    for step in range(3 * IMAGES):
        seed_all_rng(5)  # a fixed SEED would begin the same shuffle again
        loader = ResumableLoader(build(workers=workers))
        if state:
            loader.load_state_dict(state)
        seen += [r["id"] for r in next(iter(loader))]
        state = loader.state_dict()
        assert position(state) == 2 * (step + 1)
    times = np.bincount(seen, minlength=IMAGES)
    assert times.min() >= 5 and times.max() <= 7  # of 6, but for images that wait


def test_another_number_of_workers_goes_on_at_the_same_place():
    seed_all_rng(5)
    loader = ResumableLoader(build(grouped=False))
    first = [r["id"] for batch, _ in take(iter(loader), 3) for r in batch]
    state = loader.state_dict()
    resumed = ResumableLoader(build(grouped=False, workers=2))
    with pytest.raises(ValueError):
        resumed.load_state_dict(state)
    resumed.skip(position(state), state["sampler"])
    rest = [r["id"] for batch, _ in take(iter(resumed), 1) for r in batch]
    assert len(first) == 6 and len(set(first + rest)) == 8


def test_a_loader_of_another_kind_is_left_alone(caplog):
    loader = [[1], [2]]
    assert resumable(loader) is loader and "whose position is not saved" in caplog.text
