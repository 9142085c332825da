"""Law 2 under fire: runs that are killed at random moments end bit for bit as their uninterrupted twins.

`FAULT_SEED` makes the moments; `FAULTS=full` (as in `make faults`) takes the long list of trials.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distkd import engines, methods
from tests.faults.harness import IN_PLACE, OUTER, Deck, Kill, Length, length_of, plan, survive
from tests.launch.runs import Finish, law_run

FULL = os.environ.get("FAULTS") == "full"
SEED = int(os.environ.get("FAULT_SEED") or 1)
LEAST = 50 if FULL else 10
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
    "fsdp": {"name": "fsdp"},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True, slots=True)
class Case:
    """A config, how many ranks, how many kills, and who starts it again."""

    method: str
    engine: str
    ranks: int
    kills: int
    in_place: bool = False

    def __str__(self) -> str:
        return f"{self.method}-{self.engine}-{self.ranks}" + ("-in_place" if self.in_place else "")


def _reduced() -> list[Case]:
    return [
        Case("dc_distill", "ddp", 2, 3),
        Case("dc_teacher", "ddp", 2, 2, in_place=True),
        Case("logit_kd", "ddp", 1, 5),
    ]


def _full() -> list[Case]:
    every = [Case(method, "ddp", ranks, 4) for method in methods.available() for ranks in (1, 2)]
    in_place = [Case(method, "ddp", 2, 4, in_place=True) for method in ("dc_distill", "supervised")]
    sharded = [Case("dc_distill", name, 2, 4) for name in ENGINES if name != "ddp" and _is_there(name)]
    return [*every, *in_place, *sharded, Case("dc_distill", "ddp", 4, 6)]


def _is_there(engine: str) -> bool:
    """Whether this distkd has the engine, and this environment what it needs."""
    name = ENGINES[engine]["name"]
    ours = {module.name for module in pkgutil.iter_modules(engines.__path__)}
    return name in ours and (name != "deepspeed" or importlib.util.find_spec("deepspeed") is not None)


CASES = _full() if FULL else _reduced()


def _dealt() -> dict[Case, list[tuple[str, str]]]:
    """What happens to each case: over all of them every combination of moment and victim has its turn."""
    outside, in_place = Deck(SEED, OUTER), Deck(SEED, IN_PLACE)
    return {case: (in_place if case.in_place else outside).deal(case.kills) for case in CASES}


@pytest.fixture(scope="module")
def twin(
    tmp_path_factory: pytest.TempPathFactory, finish: Finish, shards: Path, root: Path
) -> Callable[[Case], tuple[dict[str, Any], Path]]:
    """The config of a case and the folder of its uninterrupted run, made once."""
    made: dict[tuple[str, str, int], tuple[dict[str, Any], Path]] = {}

    def of(case: Case) -> tuple[dict[str, Any], Path]:
        key = case.method, case.engine, case.ranks
        if key not in made:
            config = law_run(case.method, shards, root, engine=ENGINES[case.engine])
            place = tmp_path_factory.mktemp("twin")
            made[key] = config, finish(config, place, case.ranks)
        return made[key]

    return of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_ends_as_if_nothing_had_happened(case: Case, twin: Any, finish: Finish, tmp_path: Path):
    config, whole = twin(case)
    kills = plan(f"{SEED} {case}", _dealt()[case], case.ranks, length_of(whole))
    print(f"\n{case}, FAULT_SEED={SEED}", flush=True)
    hits = survive(
        config,
        tmp_path,
        kills=kills,
        ranks=case.ranks,
        in_place=case.in_place,
        whole=whole,
        finish=finish,
        tell=lambda hit: print(f"  {hit}", flush=True),
    )
    assert len(hits) == case.kills


def test_the_list_of_trials_kills_often_enough():
    assert sum(case.kills for case in CASES) >= LEAST


def test_every_moment_and_every_victim_has_its_turn():
    dealt = [card for cards in _dealt().values() for card in cards]
    assert len(dealt) >= LEAST
    if FULL:
        assert set(dealt) == set(OUTER)


def test_the_same_seed_plans_the_same_kills(tmp_path: Path):
    def planned(seed: int) -> list[Kill]:
        return plan(f"{seed} case", Deck(seed, OUTER).deal(12), 4, Length(90, 30))

    assert planned(7) == planned(7)
    assert planned(7) != planned(8)
    assert {(kill.phase, kill.whom) for kill in planned(7)} == set(OUTER)
    assert all(0 <= kill.rank < 4 and 0 < kill.step <= 90 for kill in planned(7))
