"""Messages between the program and its decoding processes."""

import io
from pathlib import Path

import numpy as np
import pytest

from sdlora.data.decoding import Cut, Seen
from sdlora.data.wire import receive, send
from sdlora.errors import DatasetError


def there_and_back(*messages):
    stream = io.BytesIO()
    for message in messages:
        send(stream, message)
    stream.seek(0)
    return [receive(stream) for _ in messages]


@pytest.mark.parametrize(
    "message",
    [
        None,
        "ready",
        ["cut", Path("a b/ü\udcff'\n.png"), {"background": "#fff"}],
        Seen("00ff", 3, 4, ("no alpha", "two\nlines")),
        [Cut((5, 6), (0, 1), (4, 4), True), Cut((5, 6), (0, 1), (4, 4), False)],
    ],
    ids=repr,
)
def test_a_message_arrives_as_it_was_sent(message):
    assert there_and_back(message) == [message]


def test_arrays_arrive_in_their_order_and_can_be_written_to():
    several = [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        np.zeros((0, 3), np.uint8),
        np.full((3, 2), 10, np.uint8),
    ]
    back, after = there_and_back(several, "next")
    assert after == "next"
    for array, sent in zip(back, several, strict=True):
        np.testing.assert_array_equal(array, sent)
        assert array.shape == sent.shape and array.flags.writeable


def test_a_strided_array_arrives_whole():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]
    np.testing.assert_array_equal(there_and_back([array])[0][0], array)


def test_an_error_arrives_with_its_words():
    (error,) = there_and_back(DatasetError("a.png: is no picture"))
    assert isinstance(error, DatasetError) and str(error) == "a.png: is no picture"


@pytest.mark.parametrize("lost", [1, 10, 23, 30])
def test_a_message_that_was_cut_off_is_the_end(lost):
    stream = io.BytesIO()
    send(stream, [np.arange(24, dtype=np.uint8)])
    with pytest.raises(EOFError):
        receive(io.BytesIO(stream.getvalue()[:-lost]))


def test_nothing_else_is_sent():
    with pytest.raises(TypeError, match="object does not go"):
        send(io.BytesIO(), object())
