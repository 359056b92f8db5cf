"""The places that tests make fail: silent unless asked, and exact when asked."""

import errno

import pytest

from sdlora import faults


@pytest.fixture(autouse=True)
def disarm():
    yield
    faults.arm("")


def test_without_a_wish_nothing_happens():
    faults.arm("")
    faults.place("anything")


def test_places_are_noted_with_their_numbers_left_out(tmp_path):
    faults.arm(str(tmp_path / "log"))
    faults.place("epochs/x-000010.safetensors begun")
    faults.place("metrics written")
    assert (tmp_path / "log").read_text() == "epochs/x-N.safetensors begun\nmetrics written\n"


@pytest.mark.parametrize(("what", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_the_nth_pass_fails_and_only_that(what, number):
    faults.arm(f"here@2={what}")
    faults.place("here")
    faults.place("elsewhere")
    with pytest.raises(OSError) as caught:
        faults.place("here")
    assert caught.value.errno == number
    faults.place("here")


def test_a_disk_can_stay_full_for_several_writes():
    faults.arm("here@1=enospc*3")
    faults.place("elsewhere")
    for name in ("here", "elsewhere", "there"):
        with pytest.raises(OSError, match="No space"):
            faults.place(name)
    faults.place("here")
