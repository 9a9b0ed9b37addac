"""hkd train under torchrun whose second process is killed in its tenth step, the first time."""

import os
import signal
import sys

from hkd_d2.cli.dispatch import main
from hkd_d2.engine import Trainer

if __name__ == "__main__":
    run_step = Trainer.run_step

    def step(trainer):
        if trainer.iter == 9 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        run_step(trainer)

    Trainer.run_step = step
    sys.exit(main(["train", *sys.argv[1:]]))
