"""SyncConfig: its defaults, what it refuses, and its ways in and out."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
from ray import cloudpickle, tune

import tune_sync_plugin
from tune_sync_plugin.config import SyncConfig, plain, resolve

RAYS = ("sync_period", "sync_timeout", "sync_artifacts", "sync_artifacts_on_checkpoint")

FULL = {
    "sync_period": 60,
    "sync_timeout": 0.5,
    "sync_artifacts": True,
    "sync_artifacts_on_checkpoint": False,
    "include": ["**/*.png", "logs"],
    "exclude": ("**/*.tmp",),
    "follow_symlinks": True,
    "max_concurrent_transfers": 4,
    "max_syncs_per_node": 1,
    "restore_artifacts": False,
    "verify_content": True,
    "experiment_sync_period": 10.5,
    "strict": True,
}


class TestDefaults:
    def test_are_ray_s_for_ray_s_fields(self) -> None:
        assert tuple(f.name for f in dataclasses.fields(tune.SyncConfig)) == RAYS
        ours, rays = SyncConfig(), tune.SyncConfig()
        assert {n: getattr(ours, n) for n in RAYS} == {n: getattr(rays, n) for n in RAYS}

    def test_of_our_fields(self) -> None:
        values = {f.name: getattr(SyncConfig(), f.name) for f in dataclasses.fields(SyncConfig)}
        assert {name: value for name, value in values.items() if name not in RAYS} == {
            "include": (),
            "exclude": (),
            "follow_symlinks": False,
            "max_concurrent_transfers": 64,
            "max_syncs_per_node": 2,
            "restore_artifacts": True,
            "verify_content": False,
            "experiment_sync_period": None,
            "strict": False,
            "upload_dir": None,
            "storage_options": None,
            "keep_up": "latest",
            "preflight": True,
        }

    def test_it_is_a_ray_sync_config_with_ray_s_fields_first(self) -> None:
        assert isinstance(SyncConfig(), tune.SyncConfig)
        assert SyncConfig(1, 2, True, False).sync_timeout == 2
        tune.RunConfig(sync_config=SyncConfig())

    def test_it_is_the_public_one(self) -> None:
        assert tune_sync_plugin.SyncConfig is SyncConfig

    def test_ray_can_show_it(self) -> None:
        assert "Sync" in SyncConfig()._repr_html_()


SECONDS = ("sync_period", "sync_timeout", "experiment_sync_period")
SWITCHES = (
    *("sync_artifacts", "sync_artifacts_on_checkpoint", "follow_symlinks", "strict"),
    *("restore_artifacts", "verify_content"),
)
COUNTS = ("max_concurrent_transfers", "max_syncs_per_node")
GLOBS = ("include", "exclude")

NONSENSE: list[tuple[str, Any]] = [
    *((name, value) for name in SECONDS for value in (-1, -0.001, math.nan, math.inf, -math.inf)),
    *((name, value) for name in SECONDS for value in (True, False, "60", [60], 10**400, 1j)),
    ("sync_period", None),
    ("sync_timeout", None),
    ("sync_timeout", 0),
    ("sync_timeout", 0.0),
    *((name, value) for name in SWITCHES for value in (0, 1, None, "True", [])),
    *((name, value) for name in COUNTS for value in (0, -1, 1.0, 2.5, True, False, None, "4")),
    *((name, value) for name in COUNTS for value in (math.inf, math.nan)),
    *((name, value) for name in GLOBS for value in ("*.txt", b"*.txt", None, 5, {"*.txt"})),
    *((name, [value]) for name in GLOBS for value in ("", "/", "//", None, 5, b"x", ["x"])),
    *((name, [value]) for name in GLOBS for value in ("/abs", "..", "../x", "a/../b", "a/..")),
    *((name, [value]) for name in GLOBS for value in ("a**b", "**a", "a/b**", "x/***/y")),
    *((name, ["*.txt", "/abs"]) for name in GLOBS),
]


class TestNonsense:
    @pytest.mark.parametrize(("name", "value"), NONSENSE)
    def test_is_refused_with_the_field_s_name(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^SyncConfig.{name}\\b") as caught:
            SyncConfig(**{name: value})
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize(("name", "value"), [("sync_period", -1), ("max_syncs_per_node", 2.5)])
    def test_is_shown(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"not {value}$"):
            SyncConfig(**{name: value})

    def test_is_refused_in_ray_s_config_too(self) -> None:
        with pytest.raises(ValueError, match=r"SyncConfig\.sync_period"):
            resolve(tune.SyncConfig(sync_period=-5))

    def test_is_refused_by_replace(self) -> None:
        with pytest.raises(ValueError, match=r"SyncConfig\.sync_timeout"):
            dataclasses.replace(SyncConfig(), sync_timeout=0)

    def test_is_refused_when_it_was_assigned(self) -> None:
        config = SyncConfig()
        config.sync_period = -1
        with pytest.raises(ValueError, match=r"SyncConfig\.sync_period"):
            resolve(config)


class TestSense:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sync_period", 0),
            ("sync_period", 0.5),
            ("sync_timeout", 1e-3),
            ("experiment_sync_period", 0),
            ("experiment_sync_period", None),
            ("max_concurrent_transfers", 1),
            ("max_syncs_per_node", 1),
            ("include", []),
            ("include", ["*"]),
            ("include", ["**"]),
            ("include", ["a/**/b", "dir/", "./x", "..hidden", "a..b", "[ab]?.txt", "with space"]),
            ("exclude", ("*.tmp",)),
        ],
    )
    def test_is_accepted(self, name: str, value: Any) -> None:
        expected = tuple(value) if name in GLOBS else value
        assert getattr(SyncConfig(**{name: value}), name) == expected

    def test_the_engine_s_options_carry_it(self) -> None:
        options = SyncConfig(**FULL).options()
        assert options.follow_symlinks is True
        assert options.concurrency == 4
        assert options.timeout_s == 0.5
        names = ("a/b.png", "logs/x", "b.txt", "logs/x.tmp")
        assert [name for name in names if options.keep(name)] == ["a/b.png", "logs/x"]

    def test_a_list_changed_later_changes_nothing(self) -> None:
        patterns = ["*.txt"]
        config = SyncConfig(include=patterns)
        patterns.append("/abs")
        assert config.include == ("*.txt",)


class TestResolveAndPlain:
    def test_nothing_given_is_the_default(self) -> None:
        assert resolve(None) == SyncConfig()

    def test_ours_stays_as_it_is(self) -> None:
        config = SyncConfig(**FULL)
        assert resolve(config) == config

    def test_ray_s_gets_our_defaults(self) -> None:
        given = tune.SyncConfig(5, 6, True, False)
        resolved = resolve(given)
        assert type(resolved) is SyncConfig
        assert resolved == SyncConfig(5, 6, True, False)

    def test_plain_is_ray_s_part_alone(self) -> None:
        config = plain(SyncConfig(**FULL))
        assert type(config) is tune.SyncConfig
        assert config == tune.SyncConfig(60, 0.5, True, False)

    def test_there_and_back(self) -> None:
        given = tune.SyncConfig(5, 6, True, False)
        assert plain(resolve(given)) == given

    def test_plain_pickles_without_us(self) -> None:
        assert b"tune_sync_plugin" not in pickle.dumps(plain(SyncConfig(**FULL)))


class TestValues:
    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.copy,
            copy.deepcopy,
            dataclasses.replace,
            lambda config: pickle.loads(pickle.dumps(config)),
            lambda config: pickle.loads(cloudpickle.dumps(config)),
            lambda config: SyncConfig(**dataclasses.asdict(config)),
        ],
    )
    def test_copies_are_equal(self, duplicate: Any) -> None:
        config = SyncConfig(**FULL)
        twin = duplicate(config)
        assert twin == config
        assert twin is not config
        assert twin.options().keep("logs/x")

    def test_replace_changes_one_field(self) -> None:
        config = dataclasses.replace(SyncConfig(**FULL), sync_period=1)
        assert config == SyncConfig(**{**FULL, "sync_period": 1})

    def test_a_list_and_a_tuple_of_globs_are_the_same(self) -> None:
        assert SyncConfig(include=["a", "b"]) == SyncConfig(include=("a", "b"))


OPTIONS = {"key": "AKIA", "secret": "hush"}


class TestUploadDir:
    def test_options_are_never_pickled_nor_shown(self) -> None:
        config = SyncConfig(upload_dir="s3://b/a", storage_options=OPTIONS)
        assert b"hush" not in pickle.dumps(config)
        assert "hush" not in repr(config)
        again = pickle.loads(pickle.dumps(config))
        assert (again.storage_options, again.missing_options) == (None, ("key", "secret"))
        assert pickle.loads(pickle.dumps(again)).missing_options == ("key", "secret")
        assert resolve(again).missing_options == ("key", "secret")

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, resolve])
    def test_copies_in_this_process_keep_them(self, copied: Any) -> None:
        config = SyncConfig(upload_dir="s3://b/a", storage_options=OPTIONS)
        assert copied(config).storage_options == OPTIONS
        assert copied(config).missing_options == ()

    @pytest.mark.parametrize(
        "wrong",
        [
            {"upload_dir": ""},
            {"upload_dir": 1},
            {"upload_dir": "s3://key:hush@b/a"},
            {"storage_options": {"secret": "hush"}},
            {"upload_dir": "s3://b", "storage_options": "hush"},
            {"keep_up": "most"},
            {"preflight": 1},
        ],
    )
    def test_what_makes_no_sense_is_named_without_its_secrets(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="SyncConfig") as raised:
            SyncConfig(**wrong)
        assert "hush" not in str(raised.value)
