"""From a recipe and the command line to a `Config`: merging, conversion, and errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from apollo_dist.pretrain.config import Config, DataConfig, ModelConfig
from apollo_dist.pretrain.optimizer_config import OPTIMIZERS, ApolloConfig, OptimizerConfig
from apollo_dist.pretrain.override import parse_override

# Short names on the command line.
ALIASES = {
    "lr": "optimizer.lr",
    "optimizer": "optimizer.name",
    "data": "data.path",
    "dataset": "data.dataset",
    "tokenizer": "data.tokenizer",
}
SECTIONS: dict[str, type[Any]] = {"model": ModelConfig, "optimizer": ApolloConfig, "data": DataConfig}
# The deepspeed launcher passes it, torch.distributed.launch too; the environment says the same (LOCAL_RANK).
IGNORED = frozenset({"local_rank", "local-rank"})


@dataclass(frozen=True)
class Settings:
    """A run's configuration, and which of its keys the command line gave (after aliases: ``optimizer.lr``)."""

    config: Config
    explicit: frozenset[str]


def load_settings(arguments: Sequence[str]) -> Settings:
    """Read the recipe that ``arguments`` name (default ``tiny``) and lay the other arguments over it.

    Raises ValueError for unknown keys, values of the wrong type and everything that `Config` refuses.
    """
    given = parse_arguments(arguments)
    recipe_name = str(given.get("recipe", "tiny"))
    recipe = read_recipe(recipe_name)
    merged = _merge(recipe, given, f"recipe {recipe_name!r}")
    merged["recipe"] = recipe_name
    config: Config = build(Config, merged, "")
    parse_override(config.override, ALIASES)
    return Settings(config, frozenset(given))


def overridable(config: Config) -> frozenset[str]:
    """Keys of a run that may differ from its checkpoint's; ValueError if it does not resume one.

    Not an error of the settings: a preflight has them without ``--resume``.
    """
    if config.override is not None and not config.resume:
        raise ValueError(
            f"--override {config.override} without --resume: a new run has every value that it is given, and only a "
            "checkpoint's values are overridden"
        )
    return parse_override(config.override, ALIASES)


def parse_arguments(arguments: Sequence[str]) -> dict[str, object]:
    """``--key value``, ``--key=value`` or, for booleans, ``--key``; keys as in `Config`, or a name in `ALIASES`."""
    known = dict(known_keys())
    given: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: options are written --key value")
        key, equals, text = word[2:].partition("=")
        if key in IGNORED:
            if not equals:
                rest[:1] = []
            continue
        full = ALIASES.get(key, key)
        if full not in known:
            raise ValueError(f"unknown option --{key}" + _nearest(key, [*known, *ALIASES], prefix="--"))
        if full in given:
            raise ValueError(f"option --{key} is given twice")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif known[full] is bool:
                text = "true"
            else:
                raise ValueError(f"option --{key} needs a value")
        given[full] = text
    return given


def read_recipe(name: str) -> dict[str, object]:
    """The YAML mapping of a recipe in this package, or of the file ``name``."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"recipe file {name!r} does not exist")
        text = Path(name).read_text(encoding="utf-8")
    else:
        folder = resources.files("apollo_dist.pretrain") / "recipes"
        names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if name not in names:
            raise ValueError(f"unknown recipe {name!r}" + _nearest(name, names) + f"; there are {', '.join(names)}")
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name!r} is not YAML: {error}") from error
    return _section(recipe, f"recipe {name!r}")


def known_keys() -> Iterable[tuple[str, Any]]:
    """Every full key with its type, in the order of the dataclasses."""
    for key, kind in typing.get_type_hints(Config).items():
        if key in SECTIONS:
            if key == "optimizer":
                yield "optimizer.name", str
                yield from ((f"{key}.{inner}", hint) for inner, (_, hint) in _of_optimizers().items())
                continue
            hints = typing.get_type_hints(SECTIONS[key])
            yield from ((f"{key}.{inner}", hints[inner]) for inner in _fields(SECTIONS[key]))
        else:
            yield key, kind


def _of_optimizers() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Each option of any optimizer: its field and its type, APOLLO's where it has that option."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    kinds: list[type[OptimizerConfig]] = [ApolloConfig, *OPTIMIZERS.values()]
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for name, spec in _fields(kind).items():
            found.setdefault(name, (spec, hints[name]))
    return found


def help_text() -> str:
    """All options with their meaning and default, for ``--help``."""
    lines = ["usage: [torchrun ... -m | deepspeed ... --module | python -m] apollo_dist.pretrain [--key value ...]", ""]
    short = {full: alias for alias, full in ALIASES.items()}
    for key, _ in known_keys():
        section, _, inner = key.rpartition(".")
        if key == "optimizer.name":
            text, default = "one of " + ", ".join(OPTIMIZERS), dataclasses.MISSING
        else:
            spec = _fields(SECTIONS[section] if section else Config).get(inner) or _of_optimizers()[inner][0]
            text, default = spec.metadata["help"], spec.default
        names = f"--{short[key]}, --{key}" if key in short else f"--{key}"
        shown = "" if default in (dataclasses.MISSING, None, "") else f" (default {default})"
        lines.append(f"  {names:34s} {text}{shown}")
    lines += ["", "A recipe's values replace these defaults; the command line replaces a recipe's values."]
    return "\n".join(lines)


def build(kind: type[Any], values: Mapping[str, object], prefix: str) -> Any:
    """Make the dataclass ``kind`` from plain values, converting each to its field's type."""
    hints = typing.get_type_hints(kind)
    fields = _fields(kind)
    unknown = [key for key in values if key not in fields]
    if unknown:
        raise ValueError(f"unknown key {prefix + unknown[0]!r}" + _nearest(unknown[0], fields, prefix))
    absent = [
        prefix + name for name, spec in fields.items() if spec.default is dataclasses.MISSING and name not in values
    ]
    if absent:
        raise ValueError(f"the recipe lacks {', '.join(absent)}")
    made = {}
    for key, value in values.items():
        made[key] = value if dataclasses.is_dataclass(value) else convert(value, hints[key], prefix + key)
    return kind(**made)


def convert(value: object, kind: Any, key: str) -> object:
    """``value`` (from YAML, a command line, or a number of any library) as type ``kind``; ValueError names the key."""
    if type(value) not in (int, float, bool) and isinstance(value, numbers.Real):  # a numpy scalar
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(kind, types.UnionType):
        if value is None or value in ("null", "none"):
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build(typing.cast("type[Any]", kind), value, key + ".")
    if typing.get_origin(kind) is tuple:
        items = value.strip("()[] ").split(",") if isinstance(value, str) else value
        parts = typing.get_args(kind)
        if not isinstance(items, (list, tuple)) or len(items) != len(parts):
            raise ValueError(f"{key} is {value!r}: it must be {len(parts)} numbers, such as 0.9,0.999")
        return tuple(convert(item, part, key) for item, part in zip(items, parts, strict=True))
    if kind is bool:
        words = {"true": True, "false": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float:
                return number
            if number.is_integer():
                return (
                    int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
                )
        except ValueError:
            pass  # reported below, with the key
    raise ValueError(f"{key} is {value!r}: it must be of type {getattr(kind, '__name__', kind)}")


def _merge(recipe: Mapping[str, object], given: Mapping[str, object], source: str) -> dict[str, object]:
    """Recipe and command line as one nested mapping for `build`, the optimizer's section already chosen."""
    for key in recipe:
        if key not in (known := [*_fields(Config), "optimizers"]):
            raise ValueError(f"unknown key {key!r} in {source}" + _nearest(key, known))
    merged = dict(recipe)
    presets = _section(merged.pop("optimizers", None), f"optimizers in {source}")
    chosen = str(given.get("optimizer.name", merged.get("optimizer", "apollo")))
    _check_optimizer(chosen, presets, source)
    options = _section(presets.get(chosen), f"optimizers.{chosen} in {source}")
    data = _section(merged.get("data"), f"data in {source}")
    model = _section(merged.get("model"), f"model in {source}")
    if "data.path" in given and "data.dataset" not in given:
        data.pop("dataset", None)  # the user's files replace the recipe's dataset
    if given.get("data.dataset", data.get("dataset")) != data.get("dataset"):
        for key in ("dataset_config", "train_split", "validation_split", "text_key"):
            data.pop(key, None)  # they belong to the recipe's dataset, not to the user's
    for key, value in given.items():
        section, _, inner = key.partition(".")
        if key == "optimizer.name":
            continue
        target = {"model": model, "data": data, "optimizer": options}.get(section if inner else "", merged)
        target[inner or section] = value
    if "engine" not in given and merged.get("deepspeed_config") is not None:
        merged["engine"] = "deepspeed"
    kind: type[OptimizerConfig] = OPTIMIZERS[chosen]
    return {
        **merged,
        "model": build(ModelConfig, model, "model."),
        "data": build(DataConfig, data, "data."),
        "optimizer": _build_optimizer(kind, options),
    }


def _section(value: object, what: str) -> dict[str, object]:
    """A copy of the mapping ``value``, empty for None; ValueError, saying ``what`` it is, unless it maps names."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {value!r}: it must map names to values")
    return dict(value)


def _check_optimizer(chosen: str, presets: Mapping[str, object], source: str) -> None:
    names = list(OPTIMIZERS)
    if chosen not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {chosen!r}" + _nearest(chosen, names) + f"; there are {', '.join(names)}")
    for name in presets:
        if name not in OPTIMIZERS:
            raise ValueError(f"unknown key 'optimizers.{name}' in {source}" + _nearest(name, names, "optimizers."))


def _build_optimizer(kind: type[OptimizerConfig], options: Mapping[str, object]) -> OptimizerConfig:
    for key in options:
        if key not in _fields(kind):
            known = ", ".join(_fields(kind))
            hint = _nearest(key, _fields(kind), "optimizer.")
            raise ValueError(f"optimizer {kind.name} has no option {key!r}{hint}; its options are {known}")
    made: OptimizerConfig = build(kind, options, "optimizer.")
    return made


def _fields(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {spec.name: spec for spec in dataclasses.fields(kind)}


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
