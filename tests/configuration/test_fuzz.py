"""Configs with mutations end as configs or as one sentence that names the file."""

import random
import shutil
from pathlib import Path

import pytest

from helpers.mutations import mutate_config
from hkd_d2.config import default_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_mutated_configs(tmp_path, seed):
    for file in CONFIGS.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    texts = [file.read_bytes() for file in sorted(CONFIGS.rglob("*.yaml"))]
    texts.append(default_config().dump().encode())
    rng, path, refused = random.Random(seed), tmp_path / "mutated.yaml", 0
    for _ in range(250):
        path.write_bytes(mutate_config(rng.choice(texts), rng))
        try:
            load_config(path)
        except (ValueError, OSError, ImportError) as error:
            refused += 1
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) < 1000, sentence
            assert ".yaml" in sentence or "HKD.IMPORTS" in sentence, sentence
            assert not isinstance(error, UnicodeError), sentence
    assert 50 < refused < 250
