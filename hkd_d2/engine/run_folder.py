"""The folder of a run: used by one training at a time, and never begun anew unasked."""

import fcntl
import logging
import os
import re
import socket

from hkd_d2.files import remove_unfinished

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"last_checkpoint|model_(\d{7}|final)\.pth")
_LOCKS = {}  # open files, by folder; the system frees a lock when its process ends


def claim_folder(folder: str, resume: bool) -> None:
    """Lock the folder of a training for the life of this process, and look at what is in it.

    Args:
        folder: ``OUTPUT_DIR``; made where it is missing.
        resume: whether the training goes on from what is there.

    Raises:
        ValueError: another training runs there, or one has run there and ``resume`` is False.
        OSError: the folder cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    lock(folder)
    found = [name for name in sorted(os.listdir(folder)) if _CHECKPOINT.fullmatch(name)]
    if found and not resume:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' has a training already ({found[-1]}); add --resume to go on "
            "with it, name another folder, or remove this one."
        )
    for name in remove_unfinished(folder):
        logger.warning("Removed '%s' in %s, which was not written to its end.", name, folder)


def lock(folder: str) -> None:
    """Lock a folder for the life of this process.

    Raises:
        ValueError: another process has it.
    """
    place = os.path.realpath(folder)
    if place in _LOCKS:
        return
    file = open(os.path.join(place, ".lock"), "a+", encoding="utf-8")  # noqa: SIM115  kept open
    try:
        # Of this process alone: loader workers, which outlive it by seconds, do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"OUTPUT_DIR '{folder}' is in use by {holder}; wait for it, or name another folder."
        ) from None
    except OSError as error:
        logger.warning("'%s' cannot be locked (%s); let no other training use it.", folder, error)
    _LOCKS[place] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def unlock(folder: str) -> None:
    """Give a folder back before the process ends."""
    file = _LOCKS.pop(os.path.realpath(folder), None)
    if file is not None:
        file.close()
