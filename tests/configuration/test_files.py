"""Where configs are found: beside the file that names them, here, or among those of the package."""

from pathlib import Path

import pytest

from hkd_d2.config import load_config
from hkd_d2.configuration.files import find_config, packaged_configs
from hkd_d2.modeling.teacher import load_teacher_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_working_directory_comes_before_the_package():
    assert packaged_configs() == ROOT / "configs"
    packaged = ROOT / "configs" / "methods" / "adl.yaml"
    assert find_config("methods/adl.yaml") == packaged
    assert find_config("configs/methods/adl.yaml") == packaged
    Path("configs/methods").mkdir(parents=True)
    Path("configs/methods/adl.yaml").write_text("")
    assert find_config("configs/methods/adl.yaml") == Path("configs/methods/adl.yaml")
    assert find_config("methods/adl.yaml") == packaged
    with pytest.raises(FileNotFoundError, match="'adl.yaml' is neither in"):
        find_config("adl.yaml")


def test_the_folder_of_the_file_that_names_it_comes_first(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (".", "mine"):
        Path(folder, "Base-FPN.yaml").write_text("SEED: 3\n")
    assert find_config("Base-FPN.yaml", beside="mine/a.yaml") == Path("mine/Base-FPN.yaml")
    Path("mine/Base-FPN.yaml").unlink()
    assert find_config("Base-FPN.yaml", beside="mine/a.yaml") == Path("Base-FPN.yaml")


def test_bases_and_teachers_among_the_packaged():
    Path("mine.yaml").write_text("_BASE_: quickstart/student.yaml\nSEED: 7\n")
    cfg = load_config("mine.yaml")
    assert cfg.SEED == 7 and cfg.MODEL.FPN.OUT_CHANNELS == 32
    assert load_teacher_config("quickstart/teacher.yaml").MODEL.DEVICE == "cpu"
    with pytest.raises(FileNotFoundError, match="CONFIG_FILE: .*'gone.yaml' is neither"):
        load_teacher_config("gone.yaml")
