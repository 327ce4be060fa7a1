"""A run's pictures: readable at every length, with units and every peak."""

from __future__ import annotations

import math

import pytest
from report_runs import text_boxes, write_run

from hdpissa.engine import pictures, run_pictures
from hdpissa.engine.run_record import RunRecord


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A short run without a GPU, and a long one on many; nothing is drawn yet."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "short": write_run(root / "short", steps=12, slices=2, gpu=False),
        "long": write_run(root / "long", steps=5000, slices=32),
    }


@pytest.mark.parametrize("name", ["short", "long"])
def test_no_text_overlaps_another(folders, name):
    """Titles, legends, labels and ticks, by their boxes; and none of them leaves the picture."""
    for picture in run_pictures.pictures(RunRecord.read(folders[name])):
        boxes = text_boxes(picture)
        assert len(boxes) > 5
        width, height = (100 * side for side in picture.size)
        for text, (x0, y0, x1, y1) in boxes:
            assert x0 > -1, f"{picture.name}: {text!r} leaves the picture"
            assert y0 > -1, f"{picture.name}: {text!r} leaves the picture"
            assert x1 < width + 1, f"{picture.name}: {text!r} leaves the picture"
            assert y1 < height + 1, f"{picture.name}: {text!r} leaves the picture"
        for i, (text, a) in enumerate(boxes):
            for other, b in boxes[i + 1 :]:
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
                assert apart, f"{picture.name}: {text!r} and {other!r} overlap"


def test_colours_and_axes_of_the_loss(folders):
    """Units on the axes, both curves with a name, the validation curve at its own steps."""
    import matplotlib as mpl

    with mpl.rc_context(pictures.RUN_STYLE):
        figure = pictures.make_figure(7, 3.6)
        run_pictures.draw_loss(RunRecord.read(folders["long"]), figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"training (smoothed)", "validation", "skipped step"} <= lines.keys()
    assert list(lines["validation"].get_xdata()) == [0, 1250, 2500, 3750, 5000]
    raw = next(line for label, line in lines.items() if label.startswith("_"))
    assert raw.get_alpha() < 0.5
    assert len(raw.get_xdata()) <= pictures.MOST_POINTS


# --- curves ----------------------------------------------------------------------------------------


def test_thinning_keeps_every_peak():
    y = [math.sin(i / 500) for i in range(50_000)]
    y[12_345], y[40_000], y[7] = 9.0, -9.0, math.nan
    x, thinned = pictures.thin(list(range(len(y))), y, 1000)
    assert len(x) <= 1000
    assert (thinned[x.index(12_345)], thinned[x.index(40_000)]) == (9.0, -9.0)
    assert x == sorted(x)
    assert pictures.thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_smoothing_has_no_lag_and_passes_over_gaps():
    line = [2.0 * i for i in range(200)]
    smoothed = pictures.smooth(line, 5)
    assert smoothed[20:-20] == pytest.approx(line[20:-20])
    line[100] = math.nan
    assert pictures.smooth(line, 5)[100] == pytest.approx(200.0, abs=2)
    assert pictures.smooth([math.nan] * 9, 1)[4] != pictures.smooth([math.nan] * 9, 1)[4]  # nan
    assert pictures.half_window(10) == 0
