"""Read and write checkpoints: a student's file is a plain Detectron2 checkpoint of the student."""

import contextlib
import hashlib
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hkd_d2.files import check_archive, write_text, written_beside


class StudentCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that looks through :class:`HKDDetector`.

    The key ``model`` holds the student's own state, so the student's plain config reads the file;
    the trainable state of the distillation terms stands beside it under ``hkd``. Files are read
    without executing code from them: tensors and plain containers from ``.pth``, numpy arrays and
    plain containers from a model zoo's ``.pkl``, tensors alone from ``.safetensors``.

    Args:
        model: a detector, a :class:`HKDDetector`, or either in DDP.
        save_dir (str), **checkpointables: as in Detectron2.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables):
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if hasattr(model, "student"):
            checkpointables["hkd"] = model.terms
            model = model.student
        super().__init__(model, save_dir, **checkpointables)
        self.resumed = False  # whether resume_or_load has found something
        self.resumed_file = ""  # and the file

    def load(self, path, *args, **kwargs):
        """Load as Detectron2 does.

        Raises:
            FileNotFoundError: no such file, or one that cannot be fetched.
            ValueError: a file that is no checkpoint, or whose states are another run's.
        """
        if path and "://" not in path and not os.path.isfile(path):
            read_checkpoint(path)  # which says what is wrong with it
        try:
            return super().load(path, *args, **kwargs)
        except OSError as error:
            if os.path.exists(path):
                raise
            raise FileNotFoundError(
                f"'{path}' could not be fetched ({error}); download it where there is a network "
                "and give the file's path in MODEL.WEIGHTS or HKD.TEACHER.WEIGHTS."
            ) from error
        finally:
            self._parsed_url_during_load = None  # Detectron2's own, which an error leaves behind

    def load_complete(self, path: str, owner: str) -> None:
        """Load the model from ``path`` and insist that the file fills all of it.

        Args:
            owner: whose weights they are, for the error: "the teacher of x.yaml".

        Raises:
            FileNotFoundError: an empty path or no such file.
            ValueError: keys that are missing, have another shape, or belong to another body.
        """
        if not path:
            raise FileNotFoundError(
                f"No weights are given for {owner}; set MODEL.WEIGHTS to its checkpoint."
            )
        seen = []
        log = self._log_incompatible_keys
        self._log_incompatible_keys = seen.append
        try:
            self.load(path, checkpointables=[])
        finally:
            self._log_incompatible_keys = log
        found = seen[0]
        # Heads for masks or keypoints may be left over; a deeper body, box or dense head may not.
        parts = ("backbone.", "roi_heads.box_", "head.")
        extra = [k for k in found.unexpected_keys if k.startswith(parts)]
        if found.incorrect_shapes:
            key, in_file, in_model = found.incorrect_shapes[0]
            wrong = (
                f"'{key}' has shape {in_file} in the file and {in_model} in the model "
                f"({len(found.incorrect_shapes)} such keys)"
            )
        elif found.missing_keys:
            wrong = (
                f"{len(found.missing_keys)} keys of the model are missing, "
                f"'{found.missing_keys[0]}' for one"
            )
        elif extra:
            wrong = f"the model has no '{extra[0]}' ({len(extra)} such keys)"
        else:
            return
        raise ValueError(
            f"'{path}' is not a checkpoint of {owner}: {wrong}; give the weights of this "
            "architecture or the config of these weights."
        )

    def save(self, name: str, **kwargs) -> None:
        """As Detectron2's, but the file is written beside, read back, and then gets its name.

        Raises:
            ValueError: a value is not finite; nothing is written.
            OSError: the file cannot be written or is not on the disk as it was written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        for key, part in self.checkpointables.items():
            content[key] = part.state_dict()
        check_finite(content)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with written_beside(path, by_the_run=True) as part:
            digest = _write(content | kwargs, part)
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise OSError(
                    f"'{path}' is not on the disk as it was written; look after the disk."
                )
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        marker = os.path.join(self.save_dir, "last_checkpoint")
        write_text(marker, last_filename_basename, by_the_run=True)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from, whole or not."""
        return bool(self.candidates())

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` names, there or not; "" without it."""
        marker = Path(self.save_dir, "last_checkpoint")
        if not marker.is_file():
            return ""
        return os.path.join(self.save_dir, marker.read_text("utf-8", errors="replace").strip())

    def candidates(self) -> list[str]:
        """Files to resume from: the one that ``last_checkpoint`` names, then the others, last
        iteration first."""
        folder = Path(self.save_dir or ".")
        numbered = sorted(folder.glob("model_" + "[0-9]" * 7 + ".pth"), reverse=True)
        final = folder / "model_final.pth"
        others = [str(p) for p in ([final] if final.exists() else []) + numbered]
        marked = self.get_checkpoint_file() if super().has_checkpoint() else None
        return list(dict.fromkeys([marked, *others] if marked else others))

    def is_finished(self) -> bool:
        """Whether the run's last file is there and whole."""
        try:
            read_checkpoint(os.path.join(self.save_dir, "model_final.pth"))
        except (ValueError, FileNotFoundError):
            return False
        return True

    def remove_older(self, keep: int) -> None:
        """Remove all but the last ``keep`` checkpoints of single iterations; 0 keeps all."""
        files = sorted(Path(self.save_dir).glob("model_" + "[0-9]" * 7 + ".pth"))
        for file in files[:-keep] if keep else []:
            file.unlink(missing_ok=True)

    def resume_or_load(self, path, *, resume=True):
        """As Detectron2's, from the last whole checkpoint, which may be older than the last one.

        Raises:
            ValueError: there are checkpoints and none of them is whole; or it is of other terms,
                another architecture or another optimizer.
        """
        found = self._last_whole() if resume and comm.is_main_process() else None
        if resume and comm.get_world_size() > 1:  # machines may have folders of their own
            found = _broadcast(found)
        self.resumed = found is not None
        if not self.resumed:
            return super().resume_or_load(path, resume=False)
        last, content, sentence = found
        if content is None:
            raise ValueError(sentence)
        if sentence:
            self.logger.warning(sentence)
        self.resumed_file = last
        with state_of("the run", last, admitted=(ValueError,)):
            self._check_resumable(last, content)
        return self._load_content(last, content)

    def _last_whole(self) -> tuple[str, dict | None, str] | None:
        """The last whole checkpoint of the folder: its path, what is in it, and a sentence where
        there is a later one that is not whole; None in an empty folder."""
        files, damaged = self.candidates(), []
        for last in files:
            try:
                content = read_checkpoint(last)
                name = _not_finite(content)
                if name is not None:
                    raise ValueError(
                        f"'{name}' in '{last}' is not finite; delete that file, and lower "
                        "SOLVER.BASE_LR if the run diverged."
                    )
            except (ValueError, FileNotFoundError) as error:
                damaged.append(str(error))
                continue
            return last, content, f"Resuming from '{last}': {damaged[0]}" if damaged else ""
        if not files:
            return None
        sentence = f"'{self.save_dir}' has no whole checkpoint to resume from: {damaged[0]}"
        return files[0], None, sentence

    def _load_content(self, path, content):
        """As :meth:`load`, of a file that was read."""
        incompatible = self._load_model(content)
        self._log_incompatible_keys(incompatible)
        for key, part in self.checkpointables.items():
            if key in content:
                with state_of({"hkd": "the terms"}.get(key, f"the {key}"), path):
                    part.load_state_dict(content.pop(key))
        return content

    def _check_resumable(self, path: str, content: dict) -> None:
        """Compare a checkpoint with what it is to fill, before anything is filled."""

        def refuse(found, remedy):
            raise ValueError(
                f"'{path}' {found}, so this run cannot go on from it; {remedy}, or start from it "
                "with MODEL.WEIGHTS and another OUTPUT_DIR."
            )

        missing = [key for key in self.checkpointables if key not in content and key != "hkd"]
        if missing:
            refuse(f"has weights alone, no '{missing[0]}'", "name a run's own checkpoint")
        wanted, found = self.model.state_dict(), content["model"]
        for key in sorted(wanted.keys() | found.keys()):
            ours, theirs = wanted.get(key), found.get(key)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                ours, theirs = ("none" if x is None else tuple(x.shape) for x in (ours, theirs))
                refuse(
                    f"is of another architecture: '{key}' has shape {theirs} in the file and "
                    f"{ours} in the model",
                    "take the config of that run",
                )
        terms = self.checkpointables.get("hkd")
        ours = {} if terms is None else terms.state_dict()
        theirs = content.get("hkd", {})
        if terms is not None and "hkd" not in content:
            refuse("was written by a run without distillation terms", "take HKD.TERMS out")
        names = ([] if terms is None else list(terms)), _term_names(theirs)
        for key in sorted(ours.keys() | theirs.keys()):
            if getattr(ours.get(key), "shape", None) != getattr(theirs.get(key), "shape", None):
                refuse(
                    f"is of other distillation terms: it has the states of "
                    f"{', '.join(names[1]) or 'none'} and HKD.TERMS is {names[0]}, with another "
                    f"'{key}'",
                    "set HKD.TERMS and the terms' keys as in that run's config.yaml",
                )
        trainer = self.checkpointables.get("trainer")
        optimizer = getattr(getattr(trainer, "_trainer", None), "optimizer", None)
        if optimizer is None:
            return
        try:
            theirs = _form_of_optimizer(content["trainer"]["_trainer"]["optimizer"])
        except (KeyError, TypeError):
            refuse("has no state of an optimizer", "name a run's own checkpoint")
        if theirs != _form_of_optimizer(optimizer.state_dict()):
            refuse(
                "was written with another optimizer or other trainable parameters",
                "set HKD.SOLVER.OPTIMIZER, MODEL.BACKBONE.FREEZE_AT and HKD.TERMS as in that "
                "run's config.yaml",
            )
        ours, theirs = trainer.state_dict(), content["trainer"]
        if "grad_scaler" in ours["_trainer"] and "grad_scaler" not in theirs["_trainer"]:
            refuse("was written without mixed precision", "set SOLVER.AMP.ENABLED to False")
        with state_of("the trainer", path):
            _check_form(theirs, ours, "trainer")
            _check_optimizer_state(theirs["_trainer"]["optimizer"]["state"], optimizer)

    def _load_file(self, filename):
        content = read_checkpoint(filename)
        query = parse_qs(self._parsed_url_during_load.query)
        if query.get("matching_heuristics") == ["True"]:
            content["matching_heuristics"] = True
        return content


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint; every door by which one comes in leads here.

    No code in a file is run. A ``.pth`` that this project or PyTorch wrote has a checksum for each
    tensor, which is compared; of safetensors of this project the weights' own is.

    Args:
        path: a local file. Suffix .pkl: numpy arrays and plain containers, as in model zoos;
            .safetensors: tensors; .pyth: a pycls file; any other: a PyTorch file with tensors and
            plain containers.

    Returns:
        ``model`` (names to tensors or arrays) and whatever else the file has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or is damaged.
        ImportError: safetensors is not installed.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"The checkpoint '{path}' does not exist; give an existing file.")
    try:
        if not os.path.isfile(path):
            raise pickle.UnpicklingError("it is a folder")
        if os.path.getsize(path) == 0:
            raise pickle.UnpicklingError("it is empty")
        content = _READERS.get(os.path.splitext(path)[1], _read_torch)(path)
        model = content.get("model")
        if not isinstance(model, dict) or not model:
            raise pickle.UnpicklingError("it has no weights")
        strange = next((k for k, v in model.items() if not _is_weight(k, v)), None)
        if strange is not None:
            raise pickle.UnpicklingError(f"'{strange}' in it is no tensor of real numbers")
        return content
    except (torch.OutOfMemoryError, MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason or "Weights only" in reason:
            reason = "it refers to code, or is none of PyTorch's files"
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint ({reason}); give a file that Detectron2 or "
            "this project wrote, or fetch it again."
        ) from error


@contextlib.contextmanager
def state_of(owner: str, path: str, admitted: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what a damaged state from a file raises into one sentence.

    Args:
        owner: of the state, for the sentence.
        path: of the checkpoint.
        admitted: exceptions that are sentences already.

    Raises:
        ValueError: the state is damaged.
    """
    try:
        yield
    except admitted:
        raise
    except torch.OutOfMemoryError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"'{path}' has a damaged state of {owner} ({reason}); delete the file to go on from an "
            "earlier checkpoint, or start from it with MODEL.WEIGHTS and another OUTPUT_DIR."
        ) from error


def _check_form(found, wanted, name):
    """Compare the types in a trainer's state with those of this run's; raise where they differ."""
    plain = isinstance(found, (int, float)) and not isinstance(found, bool)
    if isinstance(wanted, dict):
        fits = isinstance(found, dict) and wanted.keys() <= found.keys()
    elif isinstance(wanted, (list, tuple)):
        fits = isinstance(found, (list, tuple)) and len(found) == len(wanted)
    elif wanted is None or isinstance(wanted, bool):
        fits = found is None or isinstance(found, (bool, int, float))
    elif name.endswith((".iteration", ".last_epoch")):
        fits = plain and isinstance(found, int) and 0 <= found < 2**31
    elif isinstance(wanted, (int, float)):
        fits = plain and abs(found) <= sys.float_info.max
    else:
        fits = isinstance(found, type(wanted))
    if not fits:
        raise ValueError(f"{name} is of another form")
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            _check_form(found[key], value, f"{name}.{key}")
    elif isinstance(wanted, (list, tuple)):
        for i, value in enumerate(wanted):
            _check_form(found[i], value, f"{name}.{i}")


def _check_optimizer_state(state, optimizer):
    """Raise unless ``state`` has for parameters, by number, tensors of their shape or numbers."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    names = {frozenset(values) for values in state.values()}
    if len(names) > 1 or not set(state) <= set(range(len(shapes))):
        raise ValueError("the optimizer's state is not that of its parameters")
    for number, values in state.items():
        for name, value in values.items():
            tensor = isinstance(value, torch.Tensor)
            if tensor and value.layout == torch.strided and value.is_floating_point():
                fits = value.shape in (shapes[number], torch.Size())
            else:
                fits = not tensor and (value is None or type(value) in (int, float))
            if not fits:
                raise ValueError(f"'{name}' of parameter {number} is of another form")


def _broadcast(value):
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def check_finite(content: object) -> None:
    """Check every tensor of a checkpoint that is to be written.

    Raises:
        ValueError: names the first one with a value that is not finite.
    """
    name = _not_finite(content)
    if name is not None:
        raise ValueError(
            f"'{name}' is not finite, so no checkpoint is written; go on from the last one "
            "with --resume and a smaller SOLVER.BASE_LR, and see in metrics.json which loss "
            "diverges."
        )


def _not_finite(content, name=""):
    """Name of the first tensor with a value that is not finite, or None."""
    if isinstance(content, dict):
        found = (_not_finite(v, f"{name}.{k}" if name else str(k)) for k, v in content.items())
        return next((inner for inner in found if inner is not None), None)
    if not isinstance(content, torch.Tensor) or content.layout != torch.strided:
        return None
    return None if bool(torch.isfinite(content).all()) else name


class _HashedFile:
    """A file that hashes what it is given, and remembers why it could not be written."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, content):
        try:
            self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        return len(content)

    def flush(self):
        self.file.flush()


def _write(content, path):
    """Save ``content`` and return the SHA-256 of what was to be written."""
    with open(path, "wb", buffering=0) as file:
        hashed = _HashedFile(file)
        try:
            torch.save(content, hashed)
        except Exception:
            if hashed.error is not None:  # PyTorch tells of a full disk by a position
                raise hashed.error from None
            raise
    return hashed.digest.hexdigest()


def _is_weight(key, value):
    if isinstance(value, torch.Tensor):
        real = value.layout == torch.strided and not value.is_complex()
    else:
        real = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return isinstance(key, str) and real


def _term_names(state):
    return list(dict.fromkeys(key.partition(".")[0] for key in state))


def _form_of_optimizer(state):
    groups = state["param_groups"]
    return [sorted(g) for g in groups], [len(g["params"]) for g in groups]


def _read_torch(path):
    if zipfile.is_zipfile(path):
        check_archive(path)
    with warnings.catch_warnings():  # sparse tensors, of which it warns, are refused
        warnings.filterwarnings("ignore", "Validating sparse tensor", UserWarning)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}")
    return content if "model" in content else {"model": content}


def _read_pycls(path):
    state = _read_torch(path).get("model_state")
    if not isinstance(state, dict):
        raise pickle.UnpicklingError("it has no 'model_state'")
    weights = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _read_pickle(path):
    with open(path, "rb") as f:
        data = _ArrayUnpickler(f, encoding="latin1").load()
    if not isinstance(data, dict):
        raise pickle.UnpicklingError(f"it holds a {type(data).__name__}")
    if "model" in data and "__author__" in data:
        return data
    data = data.get("blobs", data)
    weights = {k: v for k, v in data.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_safetensors(path):
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ImportError(
            "Safetensors files need safetensors; install it with: pip install safetensors"
        ) from error
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
        metadata = (file.metadata() or {}).get("hkd_d2")
    if metadata and json.loads(metadata).get("weights_sha256") != state_sha256(weights):
        raise pickle.UnpicklingError("its weights are not those that it was written with")
    return {"model": weights}


_READERS = {".pkl": _read_pickle, ".safetensors": _read_safetensors, ".pyth": _read_pycls}


def weights_sha256(model: nn.Module) -> str:
    """:func:`state_sha256` of a model's state."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state: names, dtypes, shapes and values, in the order of names.

    It tells weights apart, not files: the same weights have one in any format.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle numpy arrays and plain containers, nothing that could run code."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
    }

    def find_class(self, module, name):
        if (module.replace("numpy._core", "numpy.core"), name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
