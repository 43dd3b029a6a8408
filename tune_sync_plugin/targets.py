"""What is known of a target: where it is and was, what was asked for, what has been synced.

A target is a trial, or the experiment's directory; a place is its directory on one node. Plain
bookkeeping without a clock of its own; what follows from it is decided in ``dispatcher.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tune_sync_plugin.report import EXPERIMENT, SyncReport


@dataclass(frozen=True)
class Turn:
    """What a job is told about the sync it is about to do.

    Attributes:
        forced: Whether the request was.
        superseded: Whether the target has gone on elsewhere and been synced from there, so that
            nothing of what storage holds may be overwritten from here.
        shared: Whether the target is, or was, on other nodes as well.
    """

    forced: bool = False
    superseded: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Account:
    """How far the syncing is, over all targets.

    Attributes:
        trials: Trials that are known.
        synced: Of them, those synced in full at least once, whose last sync left nothing out.
        owed_trials: Of them, those of which something was asked for and has not arrived since.
        owed: The same of all targets, the experiment's directory among them.
        failing: Targets of which the last sync left something out, and which are tried again.
        oldest_s: Seconds since the oldest request that is not answered; 0 if none is owed.
    """

    trials: int = 0
    synced: int = 0
    owed_trials: int = 0
    owed: int = 0
    failing: int = 0
    oldest_s: float = 0.0


@dataclass(eq=False)
class Place:
    """A target's directory on one node."""

    node_id: str
    job: Any
    wanted: bool = False
    forced: bool = False
    lost: bool = False
    last_start: float = -math.inf
    # The number of the last sync that was submitted (or could not be, and was named for it), and of
    # the last one that has ended. They differ while one is in a task, or waits to go into another.
    submitted: int = 0
    ended: int = 0
    # What ``submitted`` was when the target came here the last time.
    submitted_before: int = 0
    last_success: float | None = None
    # How often the final flush begins anew when the task's process died.
    spare_tries: int = 2
    last_report: SyncReport = SyncReport()
    # When the oldest request came that no complete sync has answered: of those that wait or were
    # tried in vain, and of those that the sync under way is to answer. Infinite if there is none.
    asked: float = math.inf
    asked_under_way: float = math.inf

    @property
    def owed_since(self) -> float:
        """When the oldest request that is not answered came; infinite if there is none."""
        return min(self.asked, self.asked_under_way)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is owed: its node may have been scaled down when its trials were over."""
        owes = (
            self.wanted
            or self.ended < self.submitted  # in a task, of which nothing has been heard yet
            or self.last_success is None
            or not self.last_report.complete
        )
        return not owes

    def begin(self, now: float) -> None:
        """A sync that answers all that was asked for so far is on its way."""
        self.wanted = self.forced = False
        self.last_start = now
        self.submitted += 1
        self.asked, self.asked_under_way = math.inf, self.owed_since

    def end(self, *, answered: bool) -> None:
        """That sync is over; what it did not answer is owed for as long as before."""
        if not answered:
            self.asked = self.owed_since
        self.asked_under_way = math.inf

    def give_up_one(self) -> None:
        """Count a sync that is named as not done in place of being tried."""
        self.submitted += 1
        self.submitted_before += 1  # nothing was synced by it


@dataclass(eq=False)
class Target:
    """A trial, by its id, or the experiment's directory, and all of its places in their order."""

    key: str
    period_s: float
    places: dict[str, Place] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    # Where it is or, while it is nowhere, was.
    latest: list[str] = field(default_factory=list)
    running: bool = False
    # Requests made before the first place was known.
    wanted_early: bool = False
    forced_early: bool = False
    # When it stands in the queue for, if it does.
    queued_for: float = math.inf

    def next_place(self, now: float) -> Place | None:
        """Which of its places is to be synced now, if one is."""
        due = (
            place
            for place in self.places.values()
            if place.forced or (place.wanted and now >= place.last_start + self.period_s)
        )

        # What a trial left behind goes out before what it wrote since, older nodes first. The nodes
        # it is on now take turns: requests that keep coming must not keep one of them waiting.
        def order(place: Place) -> float:
            return place.last_start if place.node_id in self.current else -math.inf

        return min(due, key=order, default=None)

    def next_due(self) -> float:
        """When one of them is; infinite if nothing is asked for."""
        return min(
            (
                -math.inf if place.forced else place.last_start + self.period_s
                for place in self.places.values()
                if place.forced or place.wanted
            ),
            default=math.inf,
        )

    def turn(self, place: Place) -> Turn:
        """What the job of one of its places is told."""
        places = list(self.places.values())
        later = places[places.index(place) + 1 :]
        # A place that it was at before, and is at again: only syncs since then are newer.
        synced_since = any(other.submitted > other.submitted_before for other in later)
        superseded = place.node_id not in self.current and synced_since
        return Turn(place.forced, superseded, shared=len(places) > 1)


def account_of(targets: Iterable[Target], now: float) -> Account:
    """What is synced and what is owed at ``now``."""
    trials = synced = owed_trials = owed = failing = 0
    oldest = math.inf
    for target in targets:
        since, is_whole, was_synced, fails = math.inf, True, False, False
        for place in target.places.values():
            since = min(since, place.owed_since)
            was_synced |= place.last_success is not None
            if not place.last_report.complete:
                is_whole = False
                fails |= not place.lost
        is_trial, is_owed = target.key != EXPERIMENT, since < math.inf
        trials += is_trial
        synced += is_trial and is_whole and was_synced
        owed_trials += is_trial and is_owed
        owed += is_owed
        failing += fails
        oldest = min(oldest, since)
    oldest_s = now - oldest if owed else 0.0
    return Account(trials, synced, owed_trials, owed, failing, oldest_s)
