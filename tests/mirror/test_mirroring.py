"""What goes to the mirror, and in which order: no reader ever finds a state that is not whole."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.support import HERE, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_everything_arrives(world: World) -> None:
    for _ in range(3):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_artifact("t1", "plots/a.png", b"png")
    world.experiment.write_artifact("t1", "result.json", b"{}")
    world.experiment.write_state()
    world.mirroring.change(["t1"])
    world.settle()
    world.assert_sound()
    assert world.named() == {"t1/checkpoint_000001", "t1/checkpoint_000002"} == world.checkpoints()
    assert (world.mirror / "t1" / "plots" / "a.png").read_bytes() == b"png"
    assert (world.mirror / "t1" / "result.json").read_bytes() == b"{}"
    report = world.mirroring.report()
    assert (report.checkpoints_uploaded, report.states, report.failures) == (2, 1, [])
    assert report.owed == 0


def test_a_state_waits_for_its_checkpoints(world: World) -> None:
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.step()
    assert world.calls.names() == ["t1", "t1/checkpoint_000000"]
    assert world.mirroring.report().owed == 3, "these, and the state"
    world.calls.end_one("t1")
    world.step()
    assert world.calls.names() == ["t1/checkpoint_000000"]
    assert world.state() is None
    world.settle()
    assert world.named() == {"t1/checkpoint_000000"}


def test_a_state_waits_for_the_first_files_of_its_trials(world: World) -> None:
    world.experiment.write_artifact("t1", "result.json", b"{}")
    world.experiment.write_state()
    world.step()
    assert world.calls.names() == ["t1"]
    assert world.state() is None
    world.settle()
    assert world.state() is not None
    assert (world.mirror / "t1" / "result.json").exists()


def test_a_checkpoint_that_tune_deletes_meanwhile_arrives_and_goes_again(world: World) -> None:
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.step()
    for _ in range(3):  # faster than the link
        world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.calls.end_one("t1")
    world.calls.end_one("t1/checkpoint_000000")  # which is no longer where it was
    world.step()
    world.calls.end_one("state")
    world.step()
    assert world.named() == {"t1/checkpoint_000000"}
    world.assert_sound()
    world.experiment.write_state()
    world.settle()
    world.settle()
    assert world.named() == world.checkpoints() == set(world.experiment.named())
    report = world.mirroring.report()
    assert report.checkpoints_deleted == 1


def test_the_link_skips_to_the_newest(world: World) -> None:
    sent = []
    for number in range(30):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
        world.experiment.write_state()
        world.step()
        if number % 10 == 9 and world.calls.pending:
            sent.append(world.calls.pending[0]["do"][1][0])
            world.calls.end()
        world.assert_sound()
        pinned = list((world.experiment.directory / ".tune_sync" / "pins").glob("*/*"))
        assert len(pinned) <= 2 + 2 + 3, "disk is bounded: the pending ones, the kept, the last few"
    world.finish()
    world.assert_sound()
    assert world.checkpoints() == set(world.experiment.named())
    report = world.mirroring.report()
    assert report.checkpoints_skipped > 10
    assert not report.failures
    assert not list((world.experiment.directory / ".tune_sync").glob("pins/*"))


def test_keep_up_all_sends_every_one(tmp_path: Path) -> None:
    world = World(tmp_path, all_checkpoints=True)
    for _ in range(8):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
        world.experiment.write_state()
        world.step()
    world.finish()
    report = world.mirroring.report()
    assert (report.checkpoints_uploaded, report.checkpoints_skipped) == (8, 0)
    assert report.checkpoints_deleted == 6
    assert world.checkpoints() == set(world.experiment.named())


def test_what_no_state_names_yet_stays(tmp_path: Path) -> None:
    world = World(tmp_path, all_checkpoints=True)
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.settle()
    world.settle()
    assert world.named() == {"t1/checkpoint_000000"}
    assert world.checkpoints() == {"t1/checkpoint_000000", "t1/checkpoint_000001"}


def test_what_the_last_state_names_stays_though_tune_has_deleted_it(tmp_path: Path) -> None:
    world = World(tmp_path, num_to_keep=1)
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.settle()
    world.settle()
    assert world.named() == {"t1/checkpoint_000000"}
    world.assert_sound()


def test_the_file_that_names_checkpoints_goes_last(world: World) -> None:
    in_the_way = world.mirror / "tuner.pkl" / "x"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    world.experiment.write_state()
    world.settle()
    assert world.state() is None
    assert "tuner.pkl" in str(world.mirroring.report().failures)


def test_what_others_put_there_stays(world: World) -> None:
    theirs = world.mirror / "t1" / "checkpoint_000000" / "theirs.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    old = world.mirror / "t0" / "checkpoint_000007" / "model.bin"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    for _ in range(5):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
        world.experiment.write_state()
        world.settle()
    world.finish()
    assert world.mirroring.report().checkpoints_deleted == 3
    assert world.stored("t1/checkpoint_000000") == {"theirs.bin": b"theirs"}
    assert old.read_bytes() == b"old"


def test_a_checkpoint_is_sent_once(world: World) -> None:
    world.experiment.num_to_keep = 100
    for _ in range(5):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
        world.experiment.write_state()
        world.settle()
    world.restart()
    world.experiment.write_state()
    world.settle()
    world.finish()
    names = [name for name in world.calls.by_node[HERE] if "checkpoint" in name]
    assert sorted(names) == sorted(world.experiment.named())


def test_a_trial_that_begins_anew_uses_its_names_again(world: World) -> None:
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    shutil.rmtree(world.experiment.directory / "t1" / "checkpoint_000000")
    world.experiment.numbers.clear()
    world.experiment.kept.clear()
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    world.assert_sound()


def test_a_failed_checkpoint_keeps_its_state_back_and_is_tried_again(world: World) -> None:
    world.calls.fail = lambda node, name: OSError("503") if "checkpoint" in name else None
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    assert world.state() is None
    (failure,) = world.mirroring.report().failures
    assert failure.trial == "t1/checkpoint_000000"
    world.finish()
    assert world.state() is None
    assert world.mirroring.report().failures
    assert not (world.mirror / ".tune_sync" / "summary.json").exists()
    world.calls.fail = lambda node, name: None
    world.finish()
    world.assert_sound()
    assert not world.mirroring.report().failures


def test_a_state_that_names_what_is_gone_is_passed_over(world: World) -> None:
    name = world.experiment.checkpoint("t1")
    world.experiment.write_state()
    shutil.rmtree(world.experiment.directory / name)  # before anybody knew of it
    world.settle()
    assert world.state() is None
    assert world.mirroring.report().states_passed_over == 1
    world.experiment.kept["t1"].clear()
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.settle()
    assert world.named() == {"t1/checkpoint_000001"}
    world.finish()
    assert not world.mirroring.report().failures


def test_the_end_is_told_when_the_last_state_can_not_go(world: World) -> None:
    name = world.experiment.checkpoint("t1")
    world.experiment.write_state()
    shutil.rmtree(world.experiment.directory / name)
    world.finish()
    (failure,) = world.mirroring.report().failures
    assert "names a checkpoint that is gone" in failure.message


def test_without_hard_links_a_deleted_checkpoint_is_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.step()
    for _ in range(3):
        world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.calls.end()  # of what is no longer there
    world.experiment.write_state()
    world.settle()
    world.settle()
    assert world.named() == world.checkpoints() == set(world.experiment.named())
    report = world.mirroring.report()
    assert (report.failures, report.checkpoints_skipped > 0) == ([], True)


def test_the_period_holds_back_trials_and_states(tmp_path: Path) -> None:
    world = World(tmp_path, period_s=100.0)
    world.experiment.write_state()
    world.mirroring.change(["t1"])
    world.experiment.write_artifact("t1", "a", b"1")
    world.settle()
    assert world.state() == {"number": 1, "paths": []}
    world.experiment.write_artifact("t1", "a", b"2")
    world.experiment.write_state()
    world.mirroring.change(["t1"])
    world.settle()
    assert world.state() == {"number": 1, "paths": []}
    assert (world.mirror / "t1" / "a").read_bytes() == b"1"
    world.step(100)
    world.settle()
    assert world.state() == {"number": 2, "paths": []}
    assert (world.mirror / "t1" / "a").read_bytes() == b"2"


def test_the_index_goes_last(world: World) -> None:
    world.experiment.write_artifact("t1", "a", b"1")
    world.experiment.write_artifact("t1", ".tune_sync/index.json", b"names a")
    world.calls.fail = lambda node, name: None
    world.mirroring.change(["t1"])
    world.settle()
    assert (world.mirror / "t1" / ".tune_sync" / "index.json").read_bytes() == b"names a"


def test_work_is_spread_and_a_trial_goes_where_it_is_known(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=(HERE, "n1", "n2"))
    trials = [f"t{n}" for n in range(12)]
    for _ in range(3):
        for trial in trials:
            world.experiment.write_artifact(trial, "a", b"1")
        world.mirroring.change(trials)
        world.settle()
    assert {node: len(names) for node, names in world.calls.by_node.items()} == {
        HERE: 12,
        "n1": 12,
        "n2": 12,
    }
    for names in world.calls.by_node.values():
        assert len(set(names)) == 4


def test_a_node_that_does_not_see_the_directory_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=(HERE, "blind"))
    world.mirroring.change(["t1", "t2", "t3"])
    for trial in ("t1", "t2", "t3"):
        world.experiment.write_artifact(trial, "a", b"1")
    world.step()
    for call in world.calls.pending:
        if call["node"] == "blind":
            call["do"] = (lambda *_: None, call["do"][1])
    world.settle()
    for trial in ("t1", "t2", "t3"):
        assert (world.mirror / trial / "a").exists()
    assert not world.mirroring.report().failures


def test_a_hanging_task_is_killed_and_named(world: World) -> None:
    world.experiment.write_artifact("t1", "a", b"1")
    world.mirroring.change(["t1"])
    world.step()
    world.step(60 + 61)
    (failure,) = world.mirroring.report().failures
    assert failure.error == "TimeoutError"
    world.finish()
    assert not world.mirroring.report().failures


def test_what_is_owed_at_the_end_of_time_is_named(world: World) -> None:
    world.mirroring.pin(world.experiment.checkpoint("t1"))
    world.experiment.write_state()
    world.mirroring.finish()
    world.step()
    world.mirroring.give_up("no time is left")
    named = {f.trial for f in world.mirroring.report().failures}
    assert named == {"state", "t1", "t1/checkpoint_000000"}, "what was under way, too"


OPERATIONS = st.sampled_from(
    ["checkpoint", "checkpoint unseen", "state", "artifact", "step", "end", "fail", "restart"]
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(OPERATIONS, st.integers(0, 5)), max_size=40),
    st.integers(1, 3),
    st.booleans(),
)
def test_no_reader_ever_sees_half_of_anything(
    operations: list[tuple[str, int]], num_to_keep: int, all_checkpoints: bool
) -> None:
    directory = Path(tempfile.mkdtemp())
    try:
        world = World(directory, num_to_keep=num_to_keep, all_checkpoints=all_checkpoints)
        for operation, number in operations:
            _apply(world, operation, number)
            world.assert_sound()
        world.calls.fail = lambda node, name: None
        world.experiment.write_state()
        world.finish()
        world.assert_sound()
        assert not world.mirroring.report().failures
        assert world.named() == set(world.experiment.named())
        for trial in ("t0", "t1"):
            for source in (world.experiment.directory / trial).glob("*.txt"):
                assert (world.mirror / trial / source.name).read_bytes() == source.read_bytes()
        assert not list((world.experiment.directory / ".tune_sync").glob("pins/*/*"))
    finally:
        shutil.rmtree(directory)


def _apply(world: World, operation: str, number: int) -> None:
    trial = f"t{number % 2}"
    if operation.startswith("checkpoint"):
        name = world.experiment.checkpoint(trial)
        if operation == "checkpoint":  # else the message is late, or its process dead
            world.mirroring.pin(name)
    elif operation == "state":
        world.experiment.write_state()
    elif operation == "artifact":
        world.experiment.write_artifact(trial, f"{number}.txt", bytes([number]) * number)
        world.mirroring.change([trial])
    elif operation == "step":
        world.step()
    elif operation == "end" and world.calls.pending:
        world.calls.end(number)
    elif operation == "fail":
        failing = number % 3 == 0
        world.calls.fail = lambda node, name: OSError("no") if failing else None
    elif operation == "restart":
        world.restart()
