"""What may stand in a config, what is said about the rest, and that a run's own config starts it again."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from distkd import methods
from distkd.base import World
from distkd.cli import main
from distkd.config import default_name, load, parse_overrides, schema
from distkd.errors import ConfigError
from distkd.metrics.classification import METRICS
from distkd.train.export import write_export
from distkd.train.job import assemble, split_digest
from distkd.train.loop import train
from tests.small import Small

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))

GOOD = """
    method: {name: logit_kd}
    model: {modalities: [path]}
    data: {make: synthetic}
    teacher: {export: teacher}
"""


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def refusal(folder: Path, text: str, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), overrides)
    return str(caught.value)


# all mistakes at once


def test_every_mistake_is_named_at_once_with_its_path(tmp_path: Path):
    message = refusal(
        tmp_path,
        """
        run: {epochs: 0, nmae: x}
        method: {name: dc_distill, temperatur: 3, alpha: -1, bank_momentum: 1.0}
        model: {modalities: path, feature_dim: 1.5, lr: 3, encoders: {path: {name: cn}}}
        data: {shards: 7, augment: {hflip: 2, crop: [1, 2]}}
        optim: {schedule: linar, betas: [0.9, 1.7]}
        optm: {lr: 1}
        eval: {metric: auc_makro}
        """,
    )
    head, *lines = message.splitlines()
    known = ", ".join(sorted(METRICS))
    encoders = "'auto', 'mlp', 'snn', 'cnn', 'resnet18', 'vgg16', 'timm' or 'monai'"
    assert re.fullmatch(r"config .*config\.yaml has 16 problems:", head)
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "run.epochs: input should be greater than 0, found 0",
            "run.nmae: unknown key; did you mean 'name'?",
            "method.alpha: input should be greater than or equal to 0, found -1",
            "method.bank_momentum: input should be less than 1, found 1.0",
            "method.temperatur: unknown key; did you mean 'temperature'?",
            "model.modalities: input should be a valid list, found 'path'",
            f"model.encoders.path.name: input should be {encoders}, found 'cn'",
            "model.feature_dim: input should be a valid integer, got a number with a fractional part, found 1.5",
            "model.lr: unknown key; did you mean 'optim.lr'?",
            "data.shards: input should be a valid string, found 7",
            "data.augment.hflip: input should be less than or equal to 1, found 2",
            "data.augment.crop: input should be a valid number; or input should be a valid dictionary, found [1, 2]",
            "optim.betas.1: input should be less than 1, found 1.7",
            "optim.schedule: input should be 'constant', 'linear' or 'cosine', found 'linar'",
            f"eval.metric: unknown metric; did you mean 'auc_macro'?; available: {known}, found 'auc_makro'",
            "optm: unknown key; did you mean 'optim'?",
        ]
    )


def test_what_is_wrong_of_whole_sections_is_not_followed_by_all_of_them(tmp_path: Path):
    rest = "model: {modalities: [path]}\ndata: {make: synthetic}\n"
    message = refusal(tmp_path, f"method: {{name: at_plus, classes: target, attention: at}}\n{rest}")
    assert message.splitlines()[1:] == [
        "  method: classes=target has no meaning for attention=at, whose map has no classes; leave it out"
    ]
    message = refusal(tmp_path, f"method: supervised\noptim: {{fused: apex}}\nengine: {{name: fsdp}}\n{rest}")
    assert message.splitlines()[1:] == ["  optim.fused=apex is not available under fsdp; use optim.fused torch"]
    message = refusal(tmp_path, GOOD + "    run: {epochs: {a: 1}}\n")
    assert message.endswith("run.epochs: input should be a valid integer, found {'a': 1}")


def test_a_key_that_resembles_none_lists_what_is_known(tmp_path: Path):
    message = refusal(tmp_path, GOOD + "    batch: {xyzzy: 1}\n")
    assert "batch.xyzzy: unknown key; known here: global_batch, micro_batch" in message


def test_an_unknown_method_is_named_with_what_there_is(tmp_path: Path):
    message = refusal(tmp_path, "method: {name: dc_distil, alpha: 1}\nmodel: {modalities: [path]}\ndata: {flod: 1}")
    assert f"method.name: unknown method 'dc_distil'; available: {', '.join(methods.available())}" in message
    assert "did you mean 'dc_distill'?" in message
    assert "data.flod: unknown key; did you mean 'fold'?" in message  # the rest is looked at all the same
    assert "alpha" not in message  # nobody knows what a method that does not exist takes


@pytest.mark.parametrize(
    "text, lines",
    [
        ("run: {seed: 1}", ["method.name: missing; available: at_plus", "model: missing", "data: missing"]),
        ("method: {alpha: 1}", ["method.name: missing", "model: missing", "data: missing"]),
        ("method: {name: no}", ["method.name: input should be a valid string, found False"]),
        ("method: [a]", ["method.name: input should be a valid string, found ['a']"]),
        ("method: supervised\nmodel:\ndata:\n", ["model: missing", "data: missing"]),
    ],
)
def test_missing_sections_are_named_together(tmp_path: Path, text: str, lines: list[str]):
    message = refusal(tmp_path, text)
    for line in lines:
        assert f"\n  {line}" in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1", "is not YAML: while parsing"),
        ("- a\n- b", "holds list, expected sections such as method, model and data"),
        ("", "holds nothing, expected sections"),
        ("run: {seed: 1, seed: 2}", "key 'seed' stands twice in one section - line 1; remove one"),
        ("run: {seed: 1}\nmethod: supervised\nrun: {}", "key 'run' stands twice in one section"),
        ("on: {seed: 1}", "key True is no text - in the section of line 1; put it in quotes"),
        ("model: {encoders: {1: {name: cnn}}}", "key 1 is no text"),
    ],
)
def test_what_is_no_config_is_refused_with_its_place(tmp_path: Path, text: str, words: str):
    message = refusal(tmp_path, text)
    assert words in message
    assert str(tmp_path / "config.yaml") in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file or directory"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory; name a YAML file"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not YAML"):
        load(tmp_path / "binary.yaml")


# the traps of YAML


def test_scientific_notation_is_a_number(tmp_path: Path):
    settings = load(write(tmp_path, GOOD + "    optim: {lr: 1e-4, weight_decay: 3E-5, clip: 2.e+1}\n"), {})
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.clip) == (1e-4, 3e-5, 20.0)
    assert parse_overrides(["--optim.lr", "1e-3"]) == {"optim.lr": 1e-3}


@pytest.mark.parametrize(
    "line, path",
    [
        ("run: {name: no}", "run.name"),
        ("run: {epochs: yes}", "run.epochs"),
        ("run: {seed: off}", "run.seed"),
        ("optim: {weight_decay: no}", "optim.weight_decay"),
        ("optim: {betas: [no, 0.9]}", "optim.betas.0"),
        ("batch: {micro_batch: on}", "batch.micro_batch"),
    ],
)
def test_a_bare_no_is_neither_text_nor_a_number(tmp_path: Path, line: str, path: str):
    message = refusal(tmp_path, f"{GOOD}    {line}\n")
    assert f"{path}: input should be a valid" in message
    assert "(a bare yes, no, on or off is a boolean in YAML)" in message
    assert "has 1 problem:" in message


def test_a_boolean_is_one_where_it_is_meant(tmp_path: Path):
    path = write(
        tmp_path, GOOD + "    method: {name: dc_distill, agreement: {normalise: yes}}\n".replace("method", "methud")
    )
    text = path.read_text().replace("method: {name: logit_kd}\n", "").replace("methud", "method")
    settings = load(write(tmp_path, text))
    assert settings.method.agreement.normalise is True  # pyright: ignore[reportAttributeAccessIssue]
    assert load(write(tmp_path, GOOD), {"model.detach_branches": True}).model.detach_branches is True


def test_a_merged_key_may_be_overridden(tmp_path: Path):
    settings = load(write(tmp_path, GOOD + "    run: {<<: {seed: 1, epochs: 2}, seed: 3}\n"))
    assert (settings.run.seed, settings.run.epochs) == (3, 2)


def test_an_empty_section_is_no_section(tmp_path: Path):
    assert load(write(tmp_path, GOOD + "    run:\n    optim:\n"), {}).optim.lr > 0


# overrides


def test_overrides_are_pairs_in_two_spellings():
    words = [
        "--optim.lr=3e-4",
        "--run.name",
        "a b",
        "--teacher.export=",
        "--model.modalities",
        "[a, b]",
        "--run.seed",
        "-1",
    ]
    assert parse_overrides(words) == {
        "optim.lr": 3e-4,
        "run.name": "a b",
        "teacher.export": None,
        "model.modalities": ["a", "b"],
        "run.seed": -1,
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["extra.yaml"], "cannot read argument 'extra.yaml'; overrides are --section.field VALUE, see --help"),
        (["--seed", "3"], "cannot read argument '--seed'; overrides are --section.field VALUE"),
        (["-run.seed", "3"], "cannot read argument '-run.seed'"),
        (["--run..seed", "3"], "cannot read argument '--run..seed'"),
        (["--run.", "3"], "cannot read argument '--run.'"),
        (["--run.seed"], "--run.seed needs a value, as in --run.seed VALUE"),
        (["--run.seed", "--run.name", "x"], "--run.seed needs a value"),
        (["--run.name", "[a"], "--run.name: cannot read '[a' as YAML; quote it"),
        (["--run.name", "{a: 1, a: 2}"], "--run.name: cannot read"),
    ],
)
def test_what_is_no_override_is_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        parse_overrides(words)


def test_overrides_win_and_are_checked_like_the_file(tmp_path: Path):
    settings = load(write(tmp_path, GOOD + "    run: {seed: 1}\n"), {"run.seed": 2, "method.alpha": 0.5})
    assert settings.run.seed == 2
    assert settings.method.model_dump()["alpha"] == 0.5
    message = refusal(tmp_path, GOOD, **{"optim.lrr": 3, "run.epochs": -1})
    assert "optim.lrr: unknown key; did you mean 'lr'?" in message
    assert "run.epochs: input should be greater than 0, found -1" in message


def test_a_value_cannot_be_overridden_as_a_section(tmp_path: Path):
    message = refusal(tmp_path, GOOD + "    run: {seed: 1}\n", **{"run.seed.x": 2})
    assert message == "--run.seed.x: 'seed' is the value 1 in the config, not a section"


def test_a_method_may_be_given_by_name_alone(tmp_path: Path):
    path = write(tmp_path, GOOD.replace("{name: logit_kd}", "logit_kd"))
    assert load(path, {"method.temperature": 2}).method.model_dump()["temperature"] == 2.0


# names of runs


@pytest.mark.parametrize(
    "path, name",
    [
        ("configs/tiny/teacher.yaml", "tiny-teacher"),
        ("configs/teacher.yaml", "teacher"),
        ("/a/b c/x.yaml", "b c-x"),
    ],
)
def test_a_run_is_named_after_its_file(path: str, name: str):
    assert default_name(Path(path)) == name


@pytest.mark.parametrize(
    "name, export, study, expected",
    [
        ("run-{fold}-{seed}", "t-{fold}", {}, ("run-2-5", "t-2")),
        ("run", "t", {}, ("run", "t")),
        ("run", "t", {"fold": 7}, ("run-fold7", "t-fold7")),
        ("run", "t", {"fold": 7, "seed": 3}, ("run-fold7-seed3", "t-fold7-seed3")),
        ("{seed}-run", "t{fold}", {"fold": 7, "seed": 3}, ("3-run-fold7", "t7-seed3")),
        ("a/run", "runs/t", {"seed": 3}, ("a/run-seed3", "runs/t")),  # a path means what it says
        ("run", "runs/t-{seed}/export", {"seed": 3}, ("run-seed3", "runs/t-3/export")),
    ],
)
def test_fold_and_seed_are_put_into_names(
    tmp_path: Path, name: str, export: str, study: dict[str, int], expected: tuple[str, str]
):
    path = write(tmp_path, GOOD)
    overrides = {"run.name": name, "teacher.export": export, "data.fold": 2, "run.seed": 5}
    settings = load(path, overrides, **study)  # pyright: ignore[reportArgumentType]
    assert (settings.run.name, settings.teacher.export) == expected
    assert settings.data.fold == study.get("fold", 2)
    assert settings.run.seed == study.get("seed", 5)


def test_an_unknown_placeholder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.name: unknown placeholder '\{flod\}'; available: \{fold\}, \{seed\}"):
        load(write(tmp_path, GOOD), {"run.name": "x-{flod}"})
    with pytest.raises(ConfigError, match=r"teacher\.export: unknown placeholder"):
        load(write(tmp_path, GOOD), {"teacher.export": "x-{sede}"})


def test_a_run_without_a_name_is_refused(tmp_path: Path):
    assert "run.name: string should have at least 1 character" in refusal(tmp_path, GOOD, **{"run.name": ""})


# the resolved config


def test_the_config_in_a_run_folder_is_the_one_that_made_it(small: Small):
    assert load(small.root / "student" / "config.yaml") == small.settings("student")


def test_the_config_in_a_run_folder_starts_the_same_run_again(small: Small, tmp_path: Path):
    first, again = small.root / "student", tmp_path / "runs" / "student"
    assert main(["train", str(first / "config.yaml"), "--run.root", str(tmp_path / "runs")]) == 0
    for name in ("export/student.safetensors", "eval/test.predictions.csv", "eval/val.predictions.csv"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def test_a_finished_run_started_by_its_own_config_is_left_alone(small: Small, tmp_path: Path):
    path = small.write(tmp_path, "alone")
    train(load(path), World())
    folder = tmp_path / "runs" / "alone"
    before = {item: item.stat().st_mtime_ns for item in folder.rglob("*")}
    assert main(["train", str(folder / "config.yaml")]) == 0
    assert {item: item.stat().st_mtime_ns for item in folder.rglob("*")} == before


def test_config_prints_what_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path, GOOD)
    assert main(["config", str(path), "--optim.lr", "1e-5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 1e-5
    assert printed["method"] == {"name": "logit_kd", "alpha": 1.0, "temperature": 4.0}
    again = write(tmp_path, yaml.safe_dump(printed), "again.yaml")
    assert load(again) == load(path, {"optim.lr": 1e-5})


# the schema


class Schema:
    """As much of JSON Schema as pydantic writes; a keyword that it does not know fails the test."""

    ABOUT = frozenset({"title", "description", "default", "format", "$defs", "discriminator"})
    TYPES: ClassVar[dict[str, tuple[type, ...]]] = {
        "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
        "number": (int, float), "integer": (int,),
    }  # fmt: skip

    def __init__(self, root: dict[str, Any]):
        self.root = root

    def accepts(self, value: Any, node: dict[str, Any] | None = None) -> bool:
        node = self.root if node is None else node
        return all(
            getattr(self, f"_{key.removeprefix('$')}")(value, item, node)
            for key, item in node.items()
            if key not in self.ABOUT
        )

    def _ref(self, value: Any, name: str, node: dict[str, Any]) -> bool:
        return self.accepts(value, self.root["$defs"][name.removeprefix("#/$defs/")])

    def _type(self, value: Any, name: str, node: dict[str, Any]) -> bool:
        return isinstance(value, self.TYPES[name]) and (name == "boolean" or not isinstance(value, bool))

    def _anyOf(self, value: Any, nodes: list[dict[str, Any]], node: dict[str, Any]) -> bool:
        return any(self.accepts(value, item) for item in nodes)

    def _oneOf(self, value: Any, nodes: list[dict[str, Any]], node: dict[str, Any]) -> bool:
        return sum(self.accepts(value, item) for item in nodes) == 1

    def _properties(self, value: Any, known: dict[str, Any], node: dict[str, Any]) -> bool:
        return not isinstance(value, dict) or all(
            self.accepts(value[key], known[key]) for key in known.keys() & value.keys()
        )

    def _patternProperties(self, value: Any, rules: dict[str, dict[str, Any]], node: dict[str, Any]) -> bool:
        return not isinstance(value, dict) or all(
            self.accepts(value[key], rule) for name, rule in rules.items() for key in value if re.search(name, key)
        )

    def _additionalProperties(self, value: Any, rule: bool | dict[str, Any], node: dict[str, Any]) -> bool:
        if not isinstance(value, dict):
            return True
        extra = value.keys() - node.get("properties", {}).keys()
        return not extra if rule is False else rule is True or all(self.accepts(value[key], rule) for key in extra)

    def _required(self, value: Any, names: list[str], node: dict[str, Any]) -> bool:
        return not isinstance(value, dict) or set(names) <= value.keys()

    def _items(self, value: Any, rule: dict[str, Any], node: dict[str, Any]) -> bool:
        return not isinstance(value, list) or all(self.accepts(item, rule) for item in value)

    def _prefixItems(self, value: Any, rules: list[dict[str, Any]], node: dict[str, Any]) -> bool:
        return not isinstance(value, list) or all(
            self.accepts(item, rule) for item, rule in zip(value, rules, strict=False)
        )

    def _enum(self, value: Any, allowed: list[Any], node: dict[str, Any]) -> bool:
        return value in allowed

    def _const(self, value: Any, only: Any, node: dict[str, Any]) -> bool:
        return value == only

    def _pattern(self, value: Any, pattern: str, node: dict[str, Any]) -> bool:
        return not isinstance(value, str) or re.search(pattern, value) is not None

    def _minimum(self, value: Any, bound: float, node: dict[str, Any]) -> bool:
        return not isinstance(value, int | float) or value >= bound

    def _maximum(self, value: Any, bound: float, node: dict[str, Any]) -> bool:
        return not isinstance(value, int | float) or value <= bound

    def _exclusiveMinimum(self, value: Any, bound: float, node: dict[str, Any]) -> bool:
        return not isinstance(value, int | float) or value > bound

    def _exclusiveMaximum(self, value: Any, bound: float, node: dict[str, Any]) -> bool:
        return not isinstance(value, int | float) or value < bound

    def _minLength(self, value: Any, bound: int, node: dict[str, Any]) -> bool:
        return not isinstance(value, str) or len(value) >= bound

    def _minItems(self, value: Any, bound: int, node: dict[str, Any]) -> bool:
        return not isinstance(value, list) or len(value) >= bound

    def _maxItems(self, value: Any, bound: int, node: dict[str, Any]) -> bool:
        return not isinstance(value, list) or len(value) <= bound


def read(path: Path) -> Any:
    """As an editor reads it: YAML 1.2 has 5e-4 for a number."""
    return json.loads(json.dumps(yaml.safe_load(re.sub(r"\b(\d+)e-", r"\1.0e-", path.read_text()))))


@pytest.fixture(scope="module")
def printed() -> Schema:
    return Schema(json.loads(json.dumps(schema())))


def test_the_schema_is_printed_as_json(printed: Schema, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == printed.root


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_schema_accepts_every_config(printed: Schema, path: Path):
    assert printed.accepts(read(path))


@pytest.mark.parametrize("method", methods.available())
def test_the_schema_explains_every_key_of_every_method(printed: Schema, method: str):
    sections = [
        node for node in printed.root["$defs"].values() if node["properties"].get("name", {}).get("const") == method
    ]
    assert len(sections) == 1
    for name, node in sections[0]["properties"].items():
        assert name == "name" or node["description"], name


@pytest.mark.parametrize(
    "section, change",
    [
        ("run", {"nmae": "x"}),
        ("run", {"epochs": 0}),
        ("run", {"epochs": "ten"}),
        ("method", {"name": "dc_distil"}),
        ("method", {"temperatur": 1}),
        ("model", {"modalities": []}),
        ("optim", {"schedule": "linar"}),
        ("optim", {"betas": [0.9]}),
        ("sections", {}),
    ],
)
def test_the_schema_refuses_what_load_refuses(printed: Schema, tmp_path: Path, section: str, change: dict[str, Any]):
    config = yaml.safe_load(textwrap.dedent(GOOD))
    assert printed.accepts(config)
    config[section] = {**config.get(section, {}), **change}
    assert not printed.accepts(config)
    with pytest.raises(ConfigError):
        load(write(tmp_path, yaml.safe_dump(config)))


# the configs of the repository


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_loads(path: Path):
    settings = load(path)
    assert settings.run.name == f"{path.parent.name}-{path.stem}"
    assert settings.method.needs_teacher == (settings.teacher.export is not None)


MADE = sorted({path.parent for path in CONFIGS if "make:" in path.read_text()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.mark.slow
@pytest.mark.parametrize("folder", MADE, ids=lambda folder: folder.name)
def test_every_config_whose_data_can_be_made_is_put_together(made: Path, folder: Path):
    everything = [load(path, {"run.root": made, "engine.device": "cpu"}) for path in sorted(folder.glob("*.yaml"))]
    for settings in sorted(everything, key=lambda settings: settings.method.needs_teacher):
        job = assemble(settings, World())
        assert job.plan.n_steps > 0
        write_export(  # untrained, but a teacher for those that follow
            settings.folder / "export",
            job.method.student.state_dict(),
            config=settings.model,
            dataset=job.dataset,
            about={"split_digest": split_digest(job.dataset), "fold": 0, "shards": "made"},
        )


# paths


def test_a_leading_tilde_of_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home of mine"
    monkeypatch.setenv("HOME", str(home))
    path = write(tmp_path, GOOD + "    run: {root: ~/x y, name: ~a}\n")
    paths = {"data.shards": "~/sets", "data.scratch": "~/local", "data.stream.cache": "~", "teacher.export": "~/t"}
    settings = load(path, paths)
    assert settings.run.root == home / "x y"
    assert (settings.data.shards, settings.data.scratch) == (f"{home}/sets", f"{home}/local")
    assert settings.data.stream.cache == home
    assert settings.teacher.export == f"{home}/t"
    assert settings.run.name == "~a", "no path"


def test_the_home_folder_of_nobody_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.root: '~no-such-user/x' names no home folder .*write the whole path"):
        load(write(tmp_path, GOOD), {"run.root": "~no-such-user/x"})


def test_a_scratch_folder_that_depends_on_where_one_is_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data\.scratch=me/foo is no whole path"):
        load(write(tmp_path, GOOD), {"data.scratch": "me/foo"})
    assert load(write(tmp_path, GOOD), {"data.scratch": "$TMPDIR/x"}).data.scratch == "$TMPDIR/x"


def test_a_run_root_that_cannot_be_made_is_said_by_its_name(small: Small, tmp_path: Path, capsys: Any):
    config = small.config("teacher", run={"root": "/proc/nope"}, data={"shards": None, "make": "synthetic"})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    said = capsys.readouterr().err
    assert "run root /proc/nope cannot be made: " in said
    assert "--out" not in said
