"""hkd train with slow steps and slow checkpoints, so that a test can stop it in the midst of one.

While a checkpoint is being written a file called ``writing`` stands in the working directory.
"""

import sys
import time
from pathlib import Path

from hkd_d2.cli.dispatch import main
from hkd_d2.engine import Trainer
from hkd_d2.modeling import checkpoint

if __name__ == "__main__":
    run_step, write, save = Trainer.run_step, checkpoint._HashedFile.write, checkpoint._write
    flag = Path("writing")
    flag.unlink(missing_ok=True)

    def slow_step(trainer):
        time.sleep(0.1)
        run_step(trainer)

    def slow_write(file, content):
        time.sleep(0.005)
        return write(file, content)

    def noted(content, path):
        flag.touch()
        digest = save(content, path)
        flag.unlink()
        return digest

    Trainer.run_step, checkpoint._HashedFile.write, checkpoint._write = slow_step, slow_write, noted
    sys.exit(main(["train", *sys.argv[1:]]))
