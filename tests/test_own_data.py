"""Data sets that others wrote: whatever is wrong with one is refused by name, what is right trains.

Each case of tests/own_data.py goes through the three checks that training and evaluation call.
"""

import pytest
from own_data import EMPTY, ITEM_FAULTS, MEMBER_FAULTS, RIGHT, RIGHT_TRUTH, TRUTH_FAULTS, OwnData

import engine
from common import BadInput
from data.own import CheckedItems, check_dataset, checked_truth
from engine.metrics import check_ids
from engine.train import check_data


def from_item(first: int, fault: dict) -> OwnData:
    return OwnData(**{name: (first, change) for name, change in fault.items()})


@pytest.mark.parametrize("name", ITEM_FAULTS)
def test_a_wrong_item_is_refused_with_its_number(name):
    """Among the first items before training, later as it is drawn."""
    field = {"item": "", "image": "image|64x48 px"}.get(name.split()[0], name.split()[0])
    with pytest.raises(BadInput, match=rf"item 0(.|\n)*({field})"):
        check_dataset(from_item(0, ITEM_FAULTS[name]), "training")
    late = from_item(5, ITEM_FAULTS[name])
    check_dataset(late, "training")
    items = CheckedItems(late)
    assert [items[i][1]["image_id"] for i in range(5)] == [*range(5)]
    with pytest.raises(BadInput, match=rf"item 5 of OwnData.*({field})"):
        items[5]


@pytest.mark.parametrize("name", {**MEMBER_FAULTS, **EMPTY})
def test_wrong_members_are_refused(name):
    first = name.split()[0]
    field = {"length": "data set", "no": "none of", "all": "none of"}.get(first, first)
    with pytest.raises(BadInput, match=field):
        check_data(None, engine.Settings(), OwnData(**{**MEMBER_FAULTS, **EMPTY}[name]), OwnData())


@pytest.mark.parametrize("name", TRUTH_FAULTS)
def test_a_wrong_ground_truth_is_refused(name):
    """Before training; image ids that are foreign from item 5 on, when they have been drawn."""
    data = OwnData(**TRUTH_FAULTS[name])
    if "later" in name:
        truth = checked_truth(data)
        with pytest.raises(BadInput, match="image_id '?[0-9]+'?: coco.. has no such image"):
            check_ids([data[i][1]["image_id"] for i in range(8)], truth)
        return
    field = next((w for w in ("images", "categories", "image_id", "category_id") if w in name), "")
    said = f"{field}|image_id|no image|unknown category"
    with pytest.raises(BadInput, match=rf"coco\(\) of OwnData.*({said})|have the categories"):
        check_data(None, engine.Settings(), OwnData(), data)


@pytest.mark.parametrize("name", {**RIGHT, **RIGHT_TRUTH})
def test_what_is_right_is_accepted(name):
    data = OwnData(**{**RIGHT, **RIGHT_TRUTH}[name])
    truth = check_data(None, engine.Settings(), OwnData(**RIGHT.get(name, {})), data)
    items = CheckedItems(data)
    check_ids([items[i][1]["image_id"] for i in range(8)], truth)
