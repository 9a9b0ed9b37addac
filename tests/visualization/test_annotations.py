"""Samples of a data set: what is drawn, read back from the figure."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from hkd_d2.data.datasets.records import make_annotation
from hkd_d2.visualization import draw_annotations, plot_samples, sample_records
from hkd_d2.visualization.annotations import ROLES


def row(bbox, **flags):
    return make_annotation(bbox, where="here", image_size=(80, 120), **flags)


ROWS = [
    row([10, 20, 20, 50], vis_bbox=[10, 20, 20, 25]),
    row([40, 20, 20, 50], vis_bbox=[40, 20, 20, 50]),  # seen whole: one box
    row([70, 20, 20, 50], ignore=1),
    row([0, 0, 120, 30], ignore=1, iscrowd=1, vis_bbox=[0, 0, 0, 0]),  # visible part unknown
]


@pytest.fixture
def records(tmp_path):
    made = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((80, 120, 3), 40 * i, dtype=np.uint8)).save(path)
        rows = ROWS if i in (1, 3) else []
        made.append(
            {"file_name": str(path), "image_id": i, "height": 80, "width": 120, "annotations": rows}
        )
    return made


def test_every_role_has_its_colour_and_dashes():
    axes = Figure().add_subplot()
    draw_annotations(axes, np.zeros((80, 120, 3), dtype=np.uint8), ROWS)
    drawn = {
        (to_hex(p.get_edgecolor()).upper(), p.get_linestyle(), *p.get_bbox().bounds)
        for p in axes.patches
    }
    # matplotlib's pixel 0 begins at -0.5.
    assert drawn == {
        ("#009E73", "-", 9.5, 19.5, 20, 50),
        ("#56B4E9", "--", 9.5, 19.5, 20, 25),
        ("#009E73", "-", 39.5, 19.5, 20, 50),
        ("#E69F00", "-.", 69.5, 19.5, 20, 50),
        ("#CC79A7", ":", -0.5, -0.5, 120, 30),
    }
    order = [to_hex(p.get_edgecolor()).upper() for p in axes.patches]
    assert order == [ROLES[r][0] for r in ("visible part", "ignored", "crowd", *["pedestrian"] * 2)]


def test_rows_that_training_ignores_are_drawn_so(records, tmp_path):
    rows = [row([10, 20, 20, 30]), row([40, 20, 20, 50], vis_bbox=[40, 20, 20, 20])]
    records = [records[0] | {"annotations": rows}]
    for bounds, ignored in (((), 0), ((30, 0.4), 0), ((31, 0.4), 1), ((31, 0.41), 2)):
        counts = plot_samples(records, tmp_path / "a.png", "", *bounds)
        assert (counts["pedestrian"], counts["ignored"]) == (2 - ignored, ignored)


@pytest.mark.parametrize("name", ["a$x$ $b.png", "l\nm.png", "caf\udce9.png", "\u4eba 100%.png"])
def test_names_of_any_kind(records, tmp_path, name):
    odd = tmp_path / name
    odd.write_bytes((tmp_path / "1.png").read_bytes())
    plot_samples([records[1] | {"file_name": str(odd)}], tmp_path / "out.png", name)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_picture_and_counts(records, tmp_path, monkeypatch):
    written, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        written.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    path = tmp_path / "made" / "samples.png"
    counts = plot_samples(records[:3], path, "three")
    assert counts == {"pedestrian": 2, "ignored": 1, "crowd": 1, "visible part": 1}
    figure = written[0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["pedestrian: 2", "ignored: 1", "crowd: 1", "visible part: 1"]
    assert [axes.get_title() for axes in figure.axes] == [
        "0.png: 0 to find, 0 ignored",
        "1.png: 2 to find, 2 ignored",
        "2.png: 0 to find, 0 ignored",
        "",
    ]
    with Image.open(path) as image:
        assert min(image.size) > 200


def test_samples_have_rows_where_there_are_any(records):
    for seed in range(5):
        assert [r["image_id"] for r in sample_records(records, 2, seed)] == [1, 3]
        chosen = [r["image_id"] for r in sample_records(records, 3, seed)]
        assert len(chosen) == 3 and {1, 3} < set(chosen) and chosen == sorted(chosen)
    assert sample_records(records, 99) == records
    assert len({sample_records(records, 1, seed)[0]["image_id"] for seed in range(20)}) == 2


def test_what_cannot_be_drawn(records, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_samples([], tmp_path / "a.png")
    records[0]["height"] = 81
    with pytest.raises(ValueError, match="0.png: the image is 120x80 and the annotations state"):
        plot_samples(records, tmp_path / "a.png")
    records[0]["file_name"] += ".gone"
    with pytest.raises(FileNotFoundError, match="0.png.gone: no such image"):
        plot_samples(records, tmp_path / "a.png")
