"""What the curves show, read back from the figure before it is written."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from hkd_d2.evaluation import SETUPS, evaluate_miss_rate
from hkd_d2.visualization import plot_miss_rate, plot_training


@pytest.fixture
def figures(monkeypatch):
    """Figures in the order in which they are written."""
    written, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        written.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return written


def result(scores_and_places):
    """Four images with one pedestrian each at x 0; detections (score, image, x)."""
    truth = {
        "images": [{"id": i} for i in range(4)],
        "categories": [{"id": 1, "name": "pedestrian"}],
        "annotations": [
            {
                "image_id": i,
                "category_id": 1,
                "bbox": [0, 0, 40, 100],
                "height": 100,
                "vis_ratio": 1,
            }
            for i in range(4)
        ],
    }
    found = [
        {"image_id": i, "category_id": 1, "bbox": [x, 0, 40, 100], "score": score}
        for score, i, x in scores_and_places
    ]
    return evaluate_miss_rate(truth, found, {"Reasonable": SETUPS["Reasonable"]})["Reasonable"]


def drawn(axes):
    """The lines with data; the others stand for the legend, or mark the reference values."""
    return [line for line in axes.lines if line.get_drawstyle() == "steps-post"]


def test_miss_rate_curve_has_the_operating_points(figures, tmp_path):
    # Hit, false alarm, hit: miss 3/4, 3/4, 1/2 at 0, 1/4, 1/4 false positives per image.
    one = result([(0.9, 0, 0), (0.8, 1, 200), (0.7, 1, 0)])
    plot_miss_rate({"small one": one}, tmp_path / "curves.png", "Reasonable")
    axes = figures[0].axes[0]
    (line,) = drawn(axes)
    np.testing.assert_allclose(line.get_xdata(), [1e-9, 1e-9, 0.25, 0.25])
    np.testing.assert_allclose(line.get_ydata(), [1, 0.75, 0.75, 0.5])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == (0.01, 10) and axes.get_ylim() == (0.4, 1)
    (text,) = axes.get_legend().get_texts()
    assert text.get_text() == f"{one.miss_rate:.1f} %  small one"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_miss_rates_of_several_seeds_are_averaged_and_share_a_style(figures, tmp_path):
    seeds = [result([(0.9, 0, 0)]), result([(0.9, 0, 0), (0.8, 1, 0)])]
    plot_miss_rate({"teacher": seeds[1], "student": seeds}, tmp_path / "curves.png", "Reasonable")
    # One hit in four misses 75 % everywhere, two miss 50 %: log-averages of constants.
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == ["50.0 %  teacher", "62.5 %  student"]
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn(figures[0].axes[0])]
    assert len(styles) == 3 and styles[1] == styles[2]
    assert styles[0][0] != styles[1][0] and styles[0][1] != styles[1][1]


def test_detector_without_detections_is_in_the_legend_only(figures, tmp_path):
    plot_miss_rate({"blind": result([])}, tmp_path / "curves.png", "Reasonable")
    assert not drawn(figures[0].axes[0])
    assert figures[0].axes[0].get_legend().get_texts()[0].get_text() == "100.0 %  blind"


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one detector"):
        plot_miss_rate({}, tmp_path / "curves.png", "Reasonable")
    with pytest.raises(ValueError, match="of 'student'; give at least one run"):
        plot_training({"student": []}, tmp_path / "curves.png")


@pytest.fixture
def write_metrics(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_training_curves_leave_distillation_out_of_the_own_loss(figures, tmp_path, write_metrics):
    plain = write_metrics(
        "plain.json",
        {"iteration": 19, "loss_cls": 1.0, "loss_rpn_cls": 0.5, "total_loss": 9, "lr": 7},
        {"iteration": 39, "loss_cls": 0.5, "loss_rpn_cls": 0.25},
        {"iteration": 40, "bbox/AP": 12.0},
    )
    distilled = write_metrics(
        "hkd.json",
        {"iteration": 20, "hkd/pyramid_raw": 3.0, "hkd/pyramid_weight": 0.5},
        {"iteration": 19, "loss_cls": 0.75, "loss_hkd_pyramid": 1.5},
    )
    plot_training({"plain": plain, "hkd": [distilled]}, tmp_path / "training.png")
    own, terms = figures[0].axes
    first, second = (line.get_xydata().tolist() for line in own.lines)
    assert first == [[19, 1.5], [39, 0.75]]
    assert second == [[19, 0.75]]
    assert [t.get_text() for t in own.get_legend().get_texts()] == ["plain", "hkd"]
    assert [line.get_xydata().tolist() for line in terms.lines] == [[[20, 3.0]]]
    assert [t.get_text() for t in terms.get_legend().get_texts()] == ["pyramid"]
    # A term has no detector's colour.
    assert terms.lines[0].get_color() not in {line.get_color() for line in own.lines}


def test_training_curves_of_plain_runs_have_one_panel(figures, tmp_path, write_metrics):
    plain = write_metrics("plain.json", {"iteration": 19, "loss_cls": 1.0})
    plot_training({"plain": plain}, tmp_path / "training.png")
    assert len(figures[0].axes) == 1


def test_bad_metrics_are_named(tmp_path, write_metrics):
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        plot_training({"plain": tmp_path / "nowhere.json"}, tmp_path / "training.png")
    cut = write_metrics("cut.json", {"iteration": 19, "loss_cls": 1.0})
    cut.write_text(cut.read_text() + '{"iteration": 39, "los')
    with pytest.raises(ValueError, match=r"cut.json, line 2 is no JSON object"):
        plot_training({"plain": cut}, tmp_path / "training.png")
