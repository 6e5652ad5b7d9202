"""The page: well-formed, self-contained, escaped, and honest about its weights."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.pictures import disc

from recallseg.engines.bundle import Bundle
from recallseg.runtime.library import Library
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.evaluation import evaluate
from recallseg.runtime.reports.page import Settings, render_report
from recallseg.runtime.reports.pictures import Thumbnail, outline
from recallseg.runtime.reports.plot import dice_plot
from recallseg.runtime.segmenting.segmenter import Segmenter

VOID = {"meta", "br", "img", "hr", "link"}


class Checker(HTMLParser):
    """Fails on tags that do not match; collects ids, references and everything loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src"):
                (self.uses if tag == "use" else self.loaded).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    with Library.create(tmp_path_factory.mktemp("lib"), fake_bundle, engine="fake") as library:
        for position in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            shown = disc(position)
            library.add(shown.image, shown.masks, key=f"<script>{position}")
        images = [replace(disc(0.1 + i / 25), name=f"<b>case & {i}") for i in range(3)]
        absent = replace(images[2], masks={}, absent=("core", "disc"), name="absent")
        structures = ("disc", "core")

        def make(k: int) -> Segmenter:
            return Segmenter(library, k=k, structures=structures, engine="fake")

        evaluation = evaluate(library, [*images, absent], structures, (1, 3), make)
        settings = Settings.of(library, "A <title> & more", "fake", "fp32", 1)
        return render_report(evaluation, settings, library.source)


def test_is_well_formed_and_self_contained(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert {use.removeprefix("#") for use in checker.uses} <= set(checker.ids)
    assert checker.loaded
    assert all(value.startswith("data:image/jpeg;base64,") for value in checker.loaded)
    assert "script" not in checker.tags
    assert not re.search(r"https?:", re.sub(r"base64,[^\"]*", "", page))


def test_the_page_may_show_itself_and_nothing_else(page: str) -> None:
    head = page.partition("</head>")[0]
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', head)
    assert policy is not None
    assert head.index(policy[0]) < head.index("<style>")  # what stands before is not held by it
    assert policy[1].split("; ") == [
        *("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"),
        *("base-uri 'none'", "form-action 'none'"),
    ]


def test_escapes_names(page: str) -> None:
    assert "<b>case" not in page
    assert "&lt;b&gt;case &amp; 1" in page
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert "&lt;script&gt;0.2" in page


def test_says_what_it_must(page: str, fake_bundle: Bundle) -> None:
    assert '<p class="notice">RANDOM WEIGHTS' in page
    assert fake_bundle.identity in page
    assert "prefers-color-scheme" in page
    assert "Every image, lowest Dice first" in page
    assert "absent, as it is" in page or "absent, yet drawn" in page
    assert "<h2>By image</h2>" in page  # whose they are nobody said
    assert "patients" not in page
    assert "too narrow where several are of one patient" in page


def test_exemplars_are_in_the_page_once(page: str) -> None:
    assert page.count("<symbol") <= 6
    assert page.count('href="#e0"') > 1


def test_a_large_image_becomes_a_small_picture() -> None:
    image = np.random.default_rng(0).integers(0, 60000, (900, 1500)).astype(np.uint16)
    picture = Thumbnail(image, Intensity())
    assert (picture.width, picture.height) == (320, 192)
    assert len(picture.element("a")) < 120_000
    thin = Thumbnail(np.zeros((1, 5000, 3), np.uint8), Intensity())
    assert (thin.width, thin.height) == (320, 1)


def test_an_outline_encloses_the_mask() -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:70] = True
    mask[20:30, 30:40] = False
    drawn = np.zeros((120, 160), np.uint8)
    polygons = [
        np.array([tuple(map(float, point.split(","))) for point in part.split(" ")])
        for part in re.findall(r"M([^Z]*)Z", outline(mask, 160, 120))
    ]
    assert len(polygons) == 2
    cv2.fillPoly(drawn, [np.round(polygon).astype(np.int32) for polygon in polygons], 1)
    large = mask.repeat(2, axis=0).repeat(2, axis=1)
    assert (drawn.astype(bool) != large).mean() < 0.03
    assert outline(np.zeros((5, 5), bool), 5, 5) == ""


def test_plot_has_a_mark_for_every_value() -> None:
    plot = dice_plot({(1, "a"): [0.1, 0.2, 0.3], (1, "b"): [0.5], (4, "a"): [0.9], (4, "b"): []})
    assert plot.count("<circle") == 5
    assert plot.count("<polyline") == 2
    assert "k = 4" in plot
    assert "median 0.200" in plot


def test_style_is_packaged_beside_the_module() -> None:
    from recallseg.runtime.reports import page as report

    assert Path(report.__file__).with_name("templates").joinpath("report.css").is_file()
