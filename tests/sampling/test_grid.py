"""A contact sheet shows every picture, whole, large enough, and with its label."""

import numpy as np
import pytest
from PIL import Image

from sdlora.sampling.grid import grid

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def plain(colour, width=64, height=64):
    return Image.new("RGB", (width, height), colour)


def box(sheet: Image.Image, colour) -> tuple[int, int, int, int]:
    """Left, top, width and height of the area of a colour; it must be a full rectangle."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    width, height = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
    assert len(xs) == width * height
    return xs.min(), ys.min(), width, height


def test_small_pictures_are_enlarged_and_keep_their_proportions():
    sheet = grid([[plain(RED), plain(GREEN, 32, 64)]], row_labels=[""], column_labels=["", ""])
    assert box(sheet, RED)[2:] == (192, 192)
    assert box(sheet, GREEN)[2:] == (96, 192)


def test_large_pictures_are_kept_pixel_for_pixel():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 200, 3), dtype=np.uint8))
    sheet = np.asarray(grid([[noise]], row_labels=["x"], column_labels=["y"]))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (256, 200, 3))
    rows, columns = windows.shape[:2]
    wanted = np.asarray(noise)
    assert any(
        (windows[r, c, 0] == wanted).all()
        for r in range(rows)
        for c in range(columns)
        if sheet[r, c, 0] == wanted[0, 0, 0]
    )


def test_rows_and_columns_line_up_and_smaller_pictures_are_centred():
    sheet = grid(
        [[plain(RED), plain(GREEN)], [plain(BLUE, 32, 32), plain((9, 9, 9))]],
        row_labels=["a", "b"],
        column_labels=["c", "d"],
    )
    red, green, blue = (box(sheet, c) for c in (RED, GREEN, BLUE))
    assert red[1] == green[1] and green[0] > red[0] + red[2]
    assert blue[0] - red[0] == (red[2] - blue[2]) // 2
    assert blue[1] > red[1] + red[3]


def test_labels_leave_ink_where_they_belong_and_cost_nothing_when_empty():
    bare = grid([[plain(RED)]], row_labels=[""], column_labels=[""])
    labelled = grid([[plain(RED)]], row_labels=["a prompt"], column_labels=["seed 1"], title="a title")
    x, y, _, height = box(labelled, RED)
    dark = np.asarray(labelled.convert("L")) < 60
    dark[y : y + height, x:] = False
    assert dark[y : y + height, :x].any() and dark[:y, x:].any()
    assert labelled.width > bare.width and labelled.height > bare.height


def test_no_label_runs_over_a_picture_or_off_the_sheet():
    long = "one very long prompt about many things " * 8
    unbroken = "x" * 90
    for label in (long, unbroken):
        sheet = grid([[plain(RED)], [plain(BLUE)]], row_labels=[label, label], column_labels=[label], title=label)
        assert box(sheet, RED)[2:] == box(sheet, BLUE)[2:] == (192, 192)
        pixels = np.asarray(sheet)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 255).all()


def test_a_cell_size_may_be_given():
    assert box(grid([[plain(RED, 512, 256)]], row_labels=[""], column_labels=[""], cell=128), RED)[2:] == (128, 64)


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "message"),
    [
        ([], [], [], "at least one picture"),
        ([[plain(RED)], []], ["", ""], [""], "same length"),
        ([[plain(RED)]], ["", ""], [""], "2 row and 1 column labels"),
    ],
)
def test_what_does_not_fit_together_is_refused(rows, row_labels, column_labels, message):
    with pytest.raises(ValueError, match=message):
        grid(rows, row_labels=row_labels, column_labels=column_labels)
