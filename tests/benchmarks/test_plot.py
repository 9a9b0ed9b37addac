"""The stacked bars, read back from the figure."""

import pytest
from matplotlib.figure import Figure

from benchmarks.training_step.plot import plot_ledger


def test_stages_are_stacked_in_the_order_of_the_longer_step(monkeypatch, tmp_path):
    written, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (written.append(f), save(f, *a, **k)))
    bars = {
        "stock": {"student": 0.2, "backward": 0.4},
        "fused": {"teacher": 0.1, "student": 0.15, "logit": 0.002, "backward": 0.3},
    }
    plot_ledger(bars, tmp_path / "step.png", "a step")
    (axes,) = written[0].axes
    drawn = {
        c.get_label(): [(round(p.get_y()), round(p.get_height())) for p in c]
        for c in axes.containers
    }
    assert list(drawn) == ["teacher", "student", "logit", "backward"]
    assert drawn["student"] == [(0, 200), (100, 150)]
    assert drawn["backward"] == [(200, 400), (252, 300)]
    assert drawn["teacher"][0] == (0, 0)
    texts = [t.get_text() for t in axes.texts]
    assert "600 ms" in texts and "552 ms" in texts
    assert "300" in texts and "2" not in texts  # too thin for a label
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_stages_too_thin_to_see_are_drawn_as_one(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: written.append(figure))
    bars = {
        "stock": {"a": 0.001, "student": 0.6, "b": 0.002},
        "fused": {"student": 0.5, "b": 0.003, "c": 0.1, "a": 0.001},
    }
    plot_ledger(bars, tmp_path / "step.png")
    (axes,) = written[0].axes
    heights = {c.get_label(): [round(p.get_height(), 6) for p in c] for c in axes.containers}
    assert heights == {"student": [600, 500], "c": [0, 100], "2 stages under 7.2 ms": [3, 4]}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="give at least one step"):
        plot_ledger({}, tmp_path / "step.png")
