"""Reports: pages that parse whatever files are called, show the record's numbers, and fetch nothing."""

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.eval.engine.record import Record
from vistok.eval.report import charts, records
from vistok.eval.report.charts import Series, bars, curves, histogram
from vistok.eval.report.page import Card, Gallery, Report, Strip, Table, error_map, write_html

pytest.importorskip("matplotlib")
VOID = {"meta", "img", "br"}
NASTY = "<script>alert(1)</script> & \"quoted\" 'name' \udcff.png"


class Page(HTMLParser):
    """Tables as rows of text, the sources of images, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.sources, self.text, self.tags = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)


def page(tmp_path, report):
    write_html(tmp_path / "report.html", report)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def svg(chart):
    head, data = chart.svg().split(",", 1)
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def words(chart):
    root = ElementTree.fromstring(svg(chart))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def record(**metrics):
    return Record(
        protocol={"images": "whole"},
        n=12,
        seed=3,
        tokenizer="mini",
        data={"source": NASTY},
        metrics=metrics,
        bad_images=[{"index": 0, "name": NASTY, "reason": "truncated <here>"}],
        duplicates=[[NASTY, "b"]],
        seconds={"encode": 1.0, "decode": 2.0},
        rate=4.0,
    )


def test_nasty_names_are_text_and_nothing_is_fetched(tmp_path):
    picture = torch.zeros(3, 4, 6, dtype=torch.uint8)
    shown = [
        Table(NASTY, [NASTY], [[NASTY]], NASTY),
        histogram(NASTY, "$unclosed", [1.0, 2.0]),
        curves(NASTY, "a_b", "y", [Series("_hidden $x", [1, 2], [3, 4])]),
        bars(NASTY, "s", {"$a": 1.0, "_b": 2.0}),
        Gallery(NASTY, [Strip([(NASTY, picture)], NASTY)], NASTY),
    ]
    found = page(tmp_path, Report(NASTY, NASTY, [Card(NASTY, NASTY, NASTY)], shown))
    assert "script" not in found.tags
    assert len(found.sources) == 4 and all(source.startswith("data:image/") for source in found.sources)
    assert sum("<script>alert(1)</script>" in text for text in found.text) >= 6


def test_drawings_refer_to_nothing_outside(tmp_path):
    drawing = svg(curves("title", "bytes", "dB", [Series("a", [1, 2], [3, 4])]))
    root = ElementTree.fromstring(drawing)
    links = [
        value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")
    ]
    assert all(link.startswith("#") for link in links)
    assert "<image" not in drawing and "@import" not in drawing


def test_the_same_drawing_is_the_same_file():
    first, second = (curves("t", "x", "y", [Series("a", [1, 2], [3, 4])]).svg() for _ in range(2))
    assert first == second


def test_numbers_are_those_of_the_record_and_skipped_ones_are_no_number(tmp_path):
    reason = "FID needs weights: put them there"
    kept = record(
        psnr={"value": 19.876, "low": 19.5, "high": 20.25}, fid={"skipped": reason}, kid={"skipped": reason}
    )
    records.write_fid(tmp_path / "report.html", kept)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ["PSNR", "19.88 dB", "19.50 – 20.25"] in found.rows
    assert ["rFID", "skipped"] in found.rows and ["FID, KID", reason] in found.rows
    cards = records.cards(kept)
    assert [(card.label, card.value) for card in cards] == [("PSNR", "19.88 dB")]
    told = " ".join(found.text)
    assert "n = 12" in told and "1 unreadable" in told and "seed 3" in told


def test_every_table_says_how_many_images_it_is_of():
    cells = [{"alpha": 0.5, "delta": 10, "changed": 0.25, "value": 3.0}]
    shown = records.tables(record(pfid={"value": 3.0, "cells": cells}))
    assert len(shown) == 2 and all("n = 12" in table.title for table in shown)
    assert shown[1].rows == [["0.5", "10", "25.00%", "3.000"]]


@pytest.mark.parametrize(
    ("judged", "real", "text"),
    [(3, 5, "n = 3 against 5"), (4000, 4000, "n = 4,000"), (None, 7, "n = 7"), (None, None, "n unknown")],
)
def test_both_sides_of_a_comparison_are_counted(judged, real, text):
    shown = record(fid={"value": 1.0})
    shown.n, shown.data = judged, {"a": {"source": "x", "n": judged}, "b": {"source": "y", "n": real}}
    assert records.images(shown) == text


def test_a_cell_is_a_number_or_a_text(tmp_path):
    rows = [["1.25", "3.2e-04", "19.50 – 20.25", "0.12 (0.11–0.13)", "25%", "PSNR", "1/2 of it", "skipped"]]
    write_html(tmp_path / "report.html", Report("t", "l", [], [Table("t", list("abcdefgh"), rows)]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<td class="number">') == 5 and text.count('<td class="skipped">') == 1


@given(st.integers(0, 255), st.integers(0, 255))
def test_error_maps_are_black_without_error_and_white_from_a_quarter_of_the_range(a, b):
    images = torch.full((3, 2, 2), a, dtype=torch.uint8), torch.full((3, 2, 2), b, dtype=torch.uint8)
    found = error_map(*images)
    assert found.dtype == torch.uint8 and found.shape == (3, 2, 2)
    assert int(found[0, 0, 0]) == min(255, 4 * abs(a - b))


def test_lines_go_by_cost_and_leave_out_what_is_not_finite():
    chart = curves("t", "x", "y", [Series("a", [4, 1, 2], [8.0, 2.0, float("inf")], [7, 1, 3], [9, 3, 5])])
    (line,) = chart.figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 4]
    np.testing.assert_array_equal(line.get_ydata(), [2, np.nan, 8])
    assert chart.figure.axes[0].get_xscale() == "log"


def test_several_lines_are_named_and_baselines_are_weaker():
    chart = curves("t", "x", "y", [Series("ours", [1], [2]), Series("JPEG", [1], [1], baseline=True)])
    ours, jpeg = chart.figure.axes[0].lines
    assert ours.get_linewidth() > jpeg.get_linewidth() and ours.get_color() != jpeg.get_color()
    assert {"ours", "JPEG"} <= set(words(chart))


def test_a_histogram_counts_every_image_and_says_the_mean():
    chart = histogram("t", "dB", np.linspace(0, 10, 101))
    assert sum(bar.get_height() for bar in chart.figure.axes[0].patches) == 101
    assert "mean 5" in words(chart)
    assert histogram("t", "bits", [8.0, 8.0]).figure.axes[0].patches


def test_bars_are_named_and_numbered():
    told = words(bars("t", "seconds", {"encode": 1.25, "decode": 30.0}))
    assert {"encode", "decode", " 1.25", " 30"} <= set(told)


def test_charts_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'--no-html.* needs matplotlib.*pip install "vistok\[eval\]"'):
        charts.require()


def test_a_page_is_whole_or_not_there(tmp_path):
    broken = Gallery("t", [Strip([("name", torch.zeros(3, 2, 2))], "floats are no picture")])
    with pytest.raises((TypeError, ValueError)):
        write_html(tmp_path / "report.html", Report("t", "l", [], [broken]))
    assert not list(tmp_path.iterdir())
