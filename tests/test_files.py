"""Files are written whole or not at all."""

import errno
import os
import zipfile

import pytest
import torch

from hkd_d2 import files


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with files.written_beside(path) as part:
        part.write_text("new")
        assert part.name == "a.json" and not path.exists()
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), files.written_beside(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_links_and_devices(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a")
    files.write_text(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/a").read_text() == "through"
    files.write_text("/dev/null", "gone")
    assert not os.path.isfile("/dev/null")
    with pytest.raises(OSError):
        files.write_text(tmp_path / "there", "a folder")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x")])
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with pytest.raises(OSError, match="There is no room for '.*a.pth'"):
        with files.written_beside(tmp_path / "a.pth") as part:
            part.write_text("half")
            raise error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_pytorchs_words(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="There is no room"):
        with files.written_beside(tmp_path / "a.pt2"):
            raise RuntimeError("unexpected pos 4021312 vs 4021204")
    monkeypatch.setattr(usage, "free", 1 << 40)
    with pytest.raises(RuntimeError, match="another"):
        with files.written_beside(tmp_path / "a.pt2"):
            raise RuntimeError("another")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none/a' cannot be written"):
        files.write_text(tmp_path / "none" / "a", "text")


def test_several_files_at_once(tmp_path):
    out = tmp_path / "new" / "out"
    with files.files_beside(out) as part:
        (part / "a").write_text("1")
        (part / "b").write_text("2")
        assert [p for p in out.iterdir() if p != part] == []
    (out / "other").write_text("3")
    with pytest.raises(ValueError), files.files_beside(out) as part:
        (part / "a").write_text("4")
        raise ValueError
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a": "1", "b": "2", "other": "3"}
    with pytest.raises(ValueError), files.files_beside(tmp_path / "x" / "y"):
        raise ValueError
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"), files.files_beside(tmp_path / "file/x"):
        pass


def test_a_runs_own_files_are_not_replaced(tmp_path):
    for name in ("config.yaml", "last_checkpoint", "metrics.json", "model_final.pth"):
        (tmp_path / name).write_text("the run's")
    for name in ("config.yaml", "metrics.json", "model_final.pth"):
        with pytest.raises(ValueError, match="belongs to the training run"):
            files.write_text(tmp_path / name, "another")
        with pytest.raises(ValueError, match="belongs to the training run"):
            with files.files_beside(tmp_path) as part:
                (part / "0").write_text("first")
                (part / name).write_text("another")
        assert (tmp_path / name).read_text() == "the run's" and not (tmp_path / "0").exists()
    files.write_text(tmp_path / "results.json", "new")
    files.write_text(tmp_path / "config.yaml", "the run's own", by_the_run=True)


def test_archives_that_pytorch_does_not_write(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(9)}, path)
    files.check_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**20))
    files.check_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**27))
    with pytest.raises(ValueError, match="it unpacks to 134 MB, far more than its size"):
        files.check_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(2**24))
        archive.filelist *= 9  # entries of one part
    with pytest.raises(ValueError, match="it unpacks to 151 MB"):
        files.check_archive(path)
    path.write_bytes(b"PK\3\4" + bytes(99))
    with pytest.raises(ValueError, match="not a zip file"):
        files.check_archive(path)
