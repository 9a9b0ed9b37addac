"""Read and write checkpoints: a student's file is a plain Detectron2 checkpoint of the student."""

import hashlib
import os
import pickle

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class StudentCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that looks through :class:`HKDDetector`.

    The key ``model`` holds the student's own state, so the student's plain config reads the file;
    the trainable state of the distillation terms stands beside it under ``hkd``. Files are read
    without executing code from them: tensors and plain containers from ``.pth``, numpy arrays and
    plain containers from a model zoo's ``.pkl``, tensors alone from ``.safetensors``.

    Args:
        model (nn.Module): a detector, a :class:`HKDDetector`, or either in DDP.
        save_dir (str), **checkpointables: as in Detectron2.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables):
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if hasattr(model, "student"):
            checkpointables["hkd"] = model.terms
            model = model.student
        super().__init__(model, save_dir, **checkpointables)

    def load(self, path, *args, **kwargs):
        """Load as Detectron2 does.

        Raises:
            FileNotFoundError: no such file, or one that cannot be fetched.
            ValueError: a file that is no checkpoint.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"The checkpoint '{path}' does not exist; give an existing file."
            )
        try:
            return super().load(path, *args, **kwargs)
        except OSError as error:
            self._parsed_url_during_load = None
            raise FileNotFoundError(
                f"'{path}' could not be fetched ({error}); download it where there is a network "
                "and give the file's path in MODEL.WEIGHTS or HKD.TEACHER.WEIGHTS."
            ) from error
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._parsed_url_during_load = None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"'{path}' cannot be read as a checkpoint ({reason}); give a file that "
                "Detectron2 or this project wrote."
            ) from error

    def load_complete(self, path: str, owner: str) -> None:
        """Load the model from ``path`` and insist that the file fills all of it.

        Args:
            owner (str): whose weights they are, for the error: "the teacher of x.yaml".

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

    def resume_or_load(self, path, *, resume=True):
        """As Detectron2's, for a run that may have terms.

        Raises:
            ValueError: the checkpoint to resume from has no state of the terms.
        """
        if resume and self.has_checkpoint() and "hkd" in self.checkpointables:
            last = self.get_checkpoint_file()
            if "hkd" not in self._torch_load(last):
                raise ValueError(
                    f"'{last}' was written by a run without distillation terms and cannot be "
                    "resumed with them; start from it with MODEL.WEIGHTS and another OUTPUT_DIR."
                )
        return super().resume_or_load(path, resume=resume)

    def _torch_load(self, filename):
        return torch.load(filename, map_location="cpu", weights_only=True)

    def _load_file(self, filename):
        if filename.endswith(".safetensors"):
            return {"model": _read_safetensors(filename)}
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        with PathManager.open(filename, "rb") as f:
            data = _ArrayUnpickler(f, encoding="latin1").load()
        if "model" in data and "__author__" in data:
            return data
        data = data.get("blobs", data)
        weights = {k: v for k, v in data.items() if not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_safetensors(filename):
    try:
        import safetensors
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            "Safetensors files need safetensors; install it with: pip install safetensors"
        ) from error
    try:
        return load_file(filename)
    except safetensors.SafetensorError as error:
        raise pickle.UnpicklingError(str(error)) from error  # see load


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, dtypes, shapes and values, in the order of names.

    It tells weights apart, not files: the same weights have one in any format.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
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
