"""MATLAB files that unpack to more than they may."""

import zlib

import numpy as np
import pytest
import scipy.io

from hkd_d2.data import mat_files


@pytest.mark.parametrize("compressed", [False, True])
def test_size_and_bound(tmp_path, monkeypatch, compressed):
    path = tmp_path / "a.mat"
    values = {"a": np.arange(30000.0), "b": np.ones((200, 300))}
    scipy.io.savemat(path, values, do_compression=compressed)
    # Eight bytes a number, and some fifty of names and sizes for each.
    size = mat_files.unpacked_size(path)
    assert 720_000 < size < 720_200 if compressed else size == 0
    assert np.array_equal(mat_files.read_mat(path, "b"), values["b"])
    monkeypatch.setattr(mat_files, "MAX_BYTES", 700_000)
    if compressed:
        with pytest.raises(ValueError, match="unpacks to more than"):
            mat_files.read_mat(path, "b")


def test_counting_ends_at_the_bound(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"a": np.zeros(2**22)}, do_compression=True)
    assert path.stat().st_size < 2**16
    monkeypatch.setattr(mat_files, "MAX_BYTES", 2**20)
    assert 2**20 < mat_files.unpacked_size(path) <= 2**20 + 2**16
    path.write_bytes(path.read_bytes()[:5000])
    mat_files.unpacked_size(path)  # of a damaged file whatever could be unpacked


@pytest.mark.parametrize("compressed", [False, True])
def test_a_piece_is_missing(tmp_path, compressed):
    """SciPy itself ends the process on some of these."""
    path = tmp_path / "a.mat"
    cells = np.empty((1, 9), dtype=object)
    cells[0, :] = [np.zeros((0, 0)) if i % 2 else np.ones((1, 4)) for i in range(9)]
    scipy.io.savemat(path, {"a": {"cells": cells, "text": "abc"}}, do_compression=compressed)
    whole = path.read_bytes()
    mat_files.check_structure(path)
    mat_files.read_mat(path, "a")
    for start in range(136, len(whole) - 44, 8):
        path.write_bytes(whole[:start] + whole[start + 44 :])
        with pytest.raises((ValueError, zlib.error)):
            mat_files.check_structure(path)
