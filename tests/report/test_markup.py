"""Markup escapes what it is given and stands on its own."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from braindino.report.figures import Estimate, interval_figure, mark_patch, png, similarity_picture, svg
from braindino.report.markup import Html, drawing, element, picture, table


def test_children_and_attributes_are_escaped_but_markup_is_not():
    inner = element("b", "a < b & c")
    assert inner == "<b>a &lt; b &amp; c</b>"
    assert element("p", inner, "<i>", title='"x"', class_="k") == (
        '<p title="&quot;x&quot;" class="k"><b>a &lt; b &amp; c</b>&lt;i&gt;</p>'
    )


def test_void_elements_have_no_end_and_unset_attributes_are_left_out():
    assert element("img", src="data:,", alt="", width=None) == '<img src="data:," alt="">'


def test_columns_of_numbers_are_set_to_the_right_and_others_to_the_left():
    made = table(["a", "b"], [["1,024", "T1"], ["0.5 [0.1, 0.9]", "2"], ["n/a", "3"]])
    assert '<td class="number">1,024</td><td>T1</td>' in made
    assert '<th class="number" scope="col">a</th><th scope="col">b</th>' in made


def test_a_picture_that_is_no_png_is_refused():
    with pytest.raises(ValueError, match=r"picture 'montage': found b'GIF89a' at its start; expected a PNG file"):
        picture(b"GIF89a", alt="montage")


def test_a_drawing_takes_the_colours_of_the_page_and_names_no_address():
    figure = interval_figure([Estimate("<b>", 0.5, 0.4, 0.6, 0)], xlabel="accuracy")
    drawn = drawing(svg(figure, salt="a"), alt="x")
    assert isinstance(drawn, Html)
    assert "http" not in drawn and "<metadata" not in drawn and "&lt;b&gt;" in drawn
    assert "var(--series-1)" in drawn and "#0072b2" not in drawn


def test_equal_figures_are_equal_drawings():
    def draw() -> Figure:
        return interval_figure([Estimate("a", 0.5, 0.4, 0.6, None)], xlabel="accuracy", limits=(0, 1))

    assert svg(draw(), salt="a") == svg(draw(), salt="a")


def test_similarity_colours_do_not_depend_on_the_range_of_the_map():
    image = np.ones((8, 8))
    some = similarity_picture(np.array([[0.5] * 8] * 8), image)
    more = similarity_picture(np.array([[0.5] * 4 + [-1.0] * 4] * 8), image)
    np.testing.assert_array_equal(some[1:-1, 1:4], more[1:-1, 1:4])
    assert more[4, 6, 2] > more[4, 6, 0]  # -1 is blue


def test_a_marked_patch_keeps_its_inside_and_stays_in_the_picture():
    pixels = np.full((32, 32, 3), 0.5)
    marked = mark_patch(pixels, 0, 1, 16)
    assert (marked[3:13, 19:29] == 0.5).all() and marked[0, 20].tolist() == [1.0, 1.0, 1.0]
    assert (pixels == 0.5).all()
    assert png(marked).startswith(b"\x89PNG")
