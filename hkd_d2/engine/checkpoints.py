"""Checkpoints of a run, complete enough that a resumed run ends like an uninterrupted one."""

import logging
import math

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from hkd_d2.engine.random_state import check_random_state, random_state, set_random_state
from hkd_d2.engine.resumable_loader import ResumableLoader, position
from hkd_d2.engine.stopping import StopRequest
from hkd_d2.modeling.checkpoint import StudentCheckpointer

logger = logging.getLogger(__name__)

# The key of a checkpoint under which the state of each process stands.
PROCESSES = "processes"


class Checkpoints(HookBase):
    """Saves every ``period`` iterations, at the end, and where a signal asks to stop.

    All processes have this hook, since each has states of its own.

    Args:
        checkpointer: of the run.
        period: iterations.
        keep: checkpoints of the last iterations that stay, beside model_final.pth; 0 for all.
        stop: of the run.
    """

    def __init__(
        self, checkpointer: StudentCheckpointer, period: int, keep: int, stop: StopRequest
    ):
        self.checkpointer = checkpointer
        self.period, self.keep, self.stop = period, keep, stop

    def before_train(self):
        # A run that was stopped between its last step and the end of its last file.
        if self.trainer.start_iter >= self.trainer.max_iter and not self.checkpointer.is_finished():
            self.trainer.iter = self.trainer.max_iter - 1
            self._save("model_final")

    def after_step(self):
        number = self.trainer.iter + 1
        signal = self.stop.agreed()
        if number % self.period == 0 or signal:
            self._save(f"model_{self.trainer.iter:07d}")
            if comm.is_main_process():
                self.checkpointer.remove_older(self.keep)
        if number == self.trainer.max_iter:
            self._save("model_final")
        if signal:
            logger.info("Stopped after %d iterations; --resume goes on from there.", number)
            raise SystemExit(128 + signal)

    def _save(self, name):
        states = comm.gather(process_state(self.trainer._trainer))
        own = {PROCESSES: states} if comm.is_main_process() else {}
        self.checkpointer.save(name, iteration=self.trainer.iter, **own)


def process_state(step: object) -> dict:
    """State of this process beyond that of the model, the terms and the optimizer.

    Args:
        step: Detectron2's trainer of one step, with ``model`` and ``data_loader``.
    """
    model = getattr(step.model, "module", step.model)
    loader = step.data_loader
    state = {
        "random": random_state(),
        "loader": loader.state_dict() if isinstance(loader, ResumableLoader) else None,
        "running_means": running_means(model),
    }
    if comm.get_rank() > 0:  # those of the first are the checkpoint's own
        state["buffers"] = own_states(model)
    return state


def load_process_state(step: object, states: list[dict]) -> None:
    """Put back what :func:`process_state` saved of every process.

    Where the run goes on with another number of processes or workers or other images, its images
    and draws cannot be those of an uninterrupted run; one warning says so, and it goes on from the
    same place of the data.

    Raises:
        ValueError, TypeError, LookupError, ...: the states are damaged.
    """
    model, loader = getattr(step.model, "module", step.model), step.data_loader
    for state in states:
        check_random_state(state["random"])
        for name, value in state["running_means"].items():
            if not (isinstance(value, float) and 0 < value < math.inf):
                raise ValueError(f"the running mean of '{name}' is {value!r}")
        if isinstance(loader, ResumableLoader) and state["loader"] is not None:
            loader.check_state(state["loader"])
    rank, processes = comm.get_rank(), comm.get_world_size()
    state = states[rank if rank < len(states) else 0]
    modules = dict(model.named_modules())
    for name, value in state["running_means"].items():
        modules[name].loss_normalizer = value
    load_own_states(model, state.get("buffers", {}))
    changed = None
    if len(states) != processes:
        changed = f"{len(states)} processes and now has {processes}"
    if isinstance(loader, ResumableLoader) and state["loader"] is not None:
        before, now = state["loader"]["form"], loader.state_dict()["form"]
        if before != now:
            key = next(k for k in now if before.get(k) != now[k])
            changed = changed or f"{before.get(key)} {key.replace('_', ' ')} and now has {now[key]}"
        if changed is None:
            loader.load_state_dict(state["loader"])
        elif before["images"] == now["images"]:
            done = sum(position(s["loader"]) for s in states if s["loader"] is not None)
            loader.skip(done // processes, state["loader"]["sampler"])
    if changed is not None:
        if comm.is_main_process():
            logger.warning(
                "The run had %s: from here on its images and draws are not those of an "
                "uninterrupted run.",
                changed,
            )
        if rank >= len(states):
            return  # a state of its own, not that of another process
    set_random_state(state["random"])


def running_means(model: nn.Module) -> dict[str, float]:
    """Detectron2's running means of objects, attributes of its one-stage detectors."""
    found = {n: vars(m).get("loss_normalizer") for n, m in model.named_modules()}
    return {name: float(value) for name, value in found.items() if value is not None}


def own_states(model: nn.Module) -> dict[str, dict]:
    """Buffers and further states of the detector and the terms, which processes do not share."""
    return {
        part: {
            name: value
            for name, value in module.state_dict().items()
            if name not in dict(module.named_parameters())
        }
        for part, module in _parts(model).items()
    }


def load_own_states(model: nn.Module, states: dict[str, dict]) -> None:
    """The reverse of :func:`own_states`."""
    for part, module in _parts(model).items():
        if part in states:
            module.load_state_dict(states[part], strict=False)


def _parts(model):
    if hasattr(model, "terms"):
        return {"model": model.student, "hkd": model.terms}
    return {"model": model}
