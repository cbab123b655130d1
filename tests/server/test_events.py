"""The union that every `match` over events is checked against has all of them."""

import dataclasses
from typing import get_args

from thresher.server import events

VALUES = {events.Worker, events.History, events.IterationRow}  # what events are made of


def test_no_event_is_left_out() -> None:
    """One that is missing in `Event` could not be handed to a shard, and no type checker would say so."""
    defined = {
        one
        for one in vars(events).values()
        if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == events.__name__
    }
    assert set(get_args(events.Event)) == defined - VALUES
