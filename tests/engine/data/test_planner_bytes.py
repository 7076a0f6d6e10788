"""Plans as bytes and as words."""

import re

import pytest
from plan_samples import COVER, plans, view_with

from voxtrast.engine.data.planner import Plan
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import AffineRanges, ElasticRanges, PixelShuffle, View

EVERYTHING = {
    **COVER,
    "all": View(
        size=[12, 10, 10],
        affine=AffineRanges(),
        elastic=ElasticRanges(),
        flips=[0.5, 0.5, 0.5],
        quarter_turns=True,
        appearance=view_with(
            ["bias_field", "bezier", "pixel_shuffle", "patch_swap"], pixel_shuffle=PixelShuffle(count=20)
        ).appearance,
        clean=True,
    ),
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plans(EVERYTHING, 1, seed=2**64 - 5)[0]


def test_a_plan_survives_being_written_and_read(plan: Plan) -> None:
    again = Plan.from_bytes(plan.to_bytes())
    assert again.to_bytes() == plan.to_bytes()
    assert again.describe() == plan.describe()
    assert (again.step, again.slot, again.split, again.crop, again.region) == (
        plan.step,
        plan.slot,
        plan.split,
        plan.crop,
        plan.region,
    )
    assert again.native.seed == 2**64 - 5
    assert again.native.views[2].clean
    assert again.native.views[1].displacement


def test_bytes_cut_off_anywhere_are_refused(plan: Plan) -> None:
    content = plan.to_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        with pytest.raises(UserError, match="plan"):
            Plan.from_bytes(content[:length])


def test_a_changed_byte_anywhere_is_noticed(plan: Plan) -> None:
    content = plan.to_bytes()
    for place in range(0, len(content), 53):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        with pytest.raises(UserError, match=r"plan: (damaged|not a plan)"):
            Plan.from_bytes(bytes(damaged))


def test_bytes_left_over_are_refused(plan: Plan) -> None:
    with pytest.raises(UserError, match="plan: damaged"):
        Plan.from_bytes(plan.to_bytes() + b"\0")


def forged(content: bytes, place: int, new: bytes) -> bytes:
    """Other bytes at a place, under a checksum that fits: plan.cpp's, in Python."""
    body = bytearray(content[12:])
    body[place - 12 : place - 12 + len(new)] = new
    total = len(body) * 0x9E3779B97F4A7C15 % 2**64
    for start in range(0, len(body), 8):
        total = (total ^ int.from_bytes(body[start : start + 8], "little")) * 0xD6E8FEB86659FD93 % 2**64
        total ^= total >> 32
    return content[:4] + total.to_bytes(8, "little") + bytes(body)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (28, b"\xff\xff\xff\xff", "longer than the rest"),  # the length of the split's name
        (129, (1000).to_bytes(8, "little"), "region ends before it begins"),
        (177, b"\xff\xff\xff\x00", "longer than the rest"),  # the number of views
        (177, b"\x00\x00\x00\x00", "left over"),
        (191, b"\x00" * 8, "a view has no voxels"),
    ],
)
def test_impossible_content_is_refused_even_under_a_right_checksum(
    plan: Plan, place: int, new: bytes, message: str
) -> None:
    content = plan.to_bytes()
    assert forged(content, place, content[place : place + 1]) == content
    with pytest.raises(UserError, match=message):
        Plan.from_bytes(forged(content, place, new))


def test_a_plan_can_be_read_by_people(plan: Plan) -> None:
    text = plan.describe()
    assert f"seed {2**64 - 5}, split train, step 0, slot 0" in text
    assert re.search(r"view all: 12x10x10 voxels of the box \[\d+:\d+, \d+:\d+, \d+:\d+\]", text)
    for word in ("crop [", "region [", "contrast ", "pixel_shuffle", "20 boxes", "also clean", "control points"):
        assert word in text
