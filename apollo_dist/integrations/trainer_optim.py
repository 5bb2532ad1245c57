"""``TrainingArguments(optim="apollo_adamw")`` and ``"apollo_adamw_layerwise"``, made by this library.

The Hugging Face ``Trainer`` knows these two names and builds the optimizer of apollo-torch for them, which needs whole
matrices. Where that package is not installed, or after ``replace_apollo_torch()``, they mean ``apollo_dist.APOLLO`` and
its form that updates inside backward: with the keys that ``optim_args`` may hold, the modules that
``optim_target_modules`` names, and the learning rate, betas, epsilon and weight decay of the ``TrainingArguments``.

Sources: ``Trainer.get_optimizer_cls_and_kwargs`` and ``_get_apollo_optimizer`` of transformers 4.49 to 5.24, and the
documentation of ``TrainingArguments``. Nothing of transformers is imported here.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

from ..distributed import rank_of, world_of
from ..optimizers.options import check_known
from ..rules import builtin
from ..sharding import fsdp1
from ..sharding.deepspeed.zero_engine import NOT_IN_BACKWARD
from ..sharding.internals import first_of
from ..sharding.local_shard import matrices
from ..sharding.names import canonical_name
from ..sharding.parameters import logical_shape
from .import_hooks import after_import, wrap_function

logger = logging.getLogger("apollo_dist")

PLAIN, LAYERWISE = "apollo_adamw", "apollo_adamw_layerwise"
# What Hugging Face takes where ``optim_args`` does not say: its rank is 128, the rest are ours as well.
_APOLLO = builtin.APOLLO
DEFAULTS: dict[str, Any] = {
    **{key: option.default for key, option in _APOLLO.options.items() if key in _APOLLO.matrix_options},
    "rank": 128,
}
# Keys of ``optim_args`` that are not options of the low-rank groups but of the whole optimizer.
WHOLE: dict[str, type] = {
    "seed": int,
    "cache_projection": bool,
    "kernels": str,
    "skip_nonfinite": bool,
    "max_skipped_steps": int,
}
_TYPES: dict[str, type] = {**{key: type(value) for key, value in DEFAULTS.items()}, **WHOLE, "projection_dtype": str}
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_replaced = False
# The Trainer whose ``create_optimizer`` is running: ``get_optimizer_cls_and_kwargs`` is not told.
creating: ContextVar[Any] = ContextVar("creating", default=None)


def replace_apollo_torch() -> None:
    """Let ``optim="apollo_adamw"`` mean this library even where apollo-torch is installed.

    Without apollo-torch it does so from ``import apollo_dist`` on, and this is not needed. Call it before training.
    """
    global _replaced
    _replaced = True


def takes_names() -> bool:
    """Whether the two names mean this library: apollo-torch is not installed, or is replaced."""
    try:
        return _replaced or importlib.util.find_spec("apollo_torch") is None
    except ValueError:  # a module without a spec is in its place
        return False


def register() -> None:
    """Make the ``Trainer`` ask here first; called once, when ``apollo_dist`` is imported."""
    after_import("transformers.trainer", _register)


def _register(module: ModuleType) -> None:
    wrap_function(module, "deepspeed_init", _check_json)
    wrap_function(module.Trainer, "get_optimizer_cls_and_kwargs", _optimizer)
    if hasattr(module.Trainer, "get_optimizer_cls_and_kwargs"):
        module.Trainer.get_optimizer_cls_and_kwargs = staticmethod(module.Trainer.get_optimizer_cls_and_kwargs)


def _name(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _optimizer(function: Callable[..., Any], args: Any, model: Any = None, *more: Any, **keywords: Any) -> Any:
    """Around ``Trainer.get_optimizer_cls_and_kwargs(args, model=None)``."""
    name = _name(args)
    if name not in (PLAIN, LAYERWISE):
        return function(args, *(() if model is None else (model,)), *more, **keywords)
    if not takes_names():
        _say(
            logging.WARNING,
            f'optim="{name}" takes apollo-torch, which is installed and needs whole matrices: it fails or becomes '
            "AdamW under FSDP and ZeRO. apollo_dist.hugging_face.replace_apollo_torch() makes it mean apollo_dist",
        )
        return function(args, *(() if model is None else (model,)), *more, **keywords)
    return optimizer_of(args, model, creating.get())


def optimizer_of(args: Any, model: Any, trainer: Any = None) -> tuple[type[Any], dict[str, Any]]:
    """The optimizer's class and keywords for ``TrainingArguments`` with one of the two names.

    Args:
        args: the ``TrainingArguments``.
        model: what is trained, wrapped or not.
        trainer: whose ``create_optimizer`` asks; says what takes weight decay, and whether FSDP will shard the model.

    Returns:
        A class, and keywords of which ``params`` is its first argument.

    Raises:
        ValueError, TypeError: for arguments that are missing, unknown or make no sense; they are the same on all ranks.
    """
    from ..optimizers.apollo import APOLLO
    from ..optimizers.in_backward_later import TrainerLayerwiseAPOLLO

    name = _name(args)
    if not isinstance(model, nn.Module):
        raise ValueError(f'optim="{name}" needs the model: get_optimizer_cls_and_kwargs(args, model)')
    given = parse_optim_args(args.optim_args)
    low = {**DEFAULTS, **{key: value for key, value in given.items() if key in DEFAULTS}}
    whole = {key: value for key, value in given.items() if key in WHOLE}
    common = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    chosen = target_names(model, args.optim_target_modules, name, low["rank"])
    keywords = {"params": _groups(model, chosen, low, _decayed(args, model, trainer)), **common, **whole}
    shown = ", ".join(f"{key}={value}" for key, value in {**low, **whole}.items())
    _say(logging.INFO, f'optim="{name}": apollo_dist.APOLLO, {shown}; weight_decay={args.weight_decay}')
    if name == PLAIN:
        return APOLLO, keywords
    fsdp = bool(args.fsdp) if trainer is None else bool(trainer.is_fsdp_enabled)
    _check_layerwise(args, fsdp)
    return TrainerLayerwiseAPOLLO, {**keywords, "module": model, "wait": fsdp}


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """``optim_args``, "rank=1,scale=128.0" or a mapping, with each value of its option's type.

    Raises:
        ValueError: for unknown keys, and values of another type.
    """
    if isinstance(text, Mapping):
        pairs = list(text.items())
    else:
        words = [word for word in (text or "").replace(" ", "").split(",") if word]
        for word in words:
            if "=" not in word:
                raise ValueError(f"optim_args is {text!r}: {word!r} is not key=value")
        pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in words]
    check_known((key for key, _ in pairs), _TYPES, "key of optim_args")
    return {key: _value(key, value) for key, value in pairs}


def _value(key: str, value: Any) -> Any:
    kind, text = _TYPES[key], str(value)
    if kind is bool:
        if key == "cache_projection" and text == "auto":
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        raise ValueError(f"optim_args: {key} must be true or false, got {value!r}")
    try:
        return kind(text)
    except ValueError:
        want = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"optim_args: {key} must be {want}, got {value!r}") from None


def target_names(model: nn.Module, targets: Any, name: str, rank: int) -> set[str]:
    """Canonical names of the trained weights that ``optim_target_modules`` makes low-rank.

    As Hugging Face defines it: weights of ``nn.Linear`` modules whose name a string matches as a regular expression
    from end to end, or a list's entry equals, is part of, or matches so; "all-linear" takes every ``nn.Linear``.
    What matches and cannot be low-rank takes AdamW, and is named in one line of the log.

    Args:
        model: what is trained, wrapped or not.
        targets: ``optim_target_modules``.
        name: of the optimizer, for messages.
        rank: of the projections.

    Raises:
        ValueError: if ``targets`` is None, is no regular expression, or matches no weight that can be low-rank.
        TypeError: if it is neither a string nor a list of strings.
    """
    if targets is None:
        raise ValueError(
            f'optim="{name}" needs optim_target_modules: names or regular expressions of nn.Linear modules, such as '
            '["self_attn", "mlp"], or "all-linear". (The choice of apollo_dist itself: leave optim out, and pass '
            'Trainer(optimizer_cls_and_kwargs=(APOLLO, {"lr": ..., "rank": ...})).)'
        )
    matches = _matcher(targets)
    fsdp1.register(model)
    trained = {canonical_name(key): p for key, p in model.named_parameters() if p.requires_grad}
    chosen: set[str] = set()
    other: dict[str, str] = {}
    for wrapped, module in model.named_modules():
        prefix = canonical_name(wrapped)
        if not matches(prefix, module):
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            key = canonical_name(f"{prefix}.{leaf}")
            shape = logical_shape(trained[key]) if key in trained else ()
            if len(shape) < 2:
                continue
            if not isinstance(module, nn.Linear):
                other[key] = f"{type(module).__name__} is no nn.Linear"
            elif rank > min(matrices(shape)[1:]):
                other[key] = f"{tuple(shape)} is smaller than rank {rank}"
            else:
                chosen.add(key)
    if other:
        shown = "; ".join(f"{key}: {why}" for key, why in list(other.items())[:8])
        more = f"; and {len(other) - 8} more" if len(other) > 8 else ""
        numel = {key: math.prod(logical_shape(p)) for key, p in trained.items()}
        share = sum(numel[key] for key in other) / sum(numel.values())
        _say(
            logging.WARNING,
            f"optim_target_modules matches {len(other)} parameters that take AdamW all the same, {share:.1%} of all "
            f"elements ({shown}{more}). A smaller rank= in optim_args takes small matrices; "
            "Trainer(optimizer_cls_and_kwargs=(APOLLO, {...})) takes other linear layers and stacked experts",
        )
    if not chosen:
        raise ValueError(
            f"optim_target_modules={targets!r} matches no trained nn.Linear weight of {type(model).__name__} that "
            f"rank {rank} fits: APOLLO would silently be AdamW. Module names are those of model.named_modules()"
        )
    return chosen


def _matcher(targets: Any) -> Callable[[str, nn.Module], bool]:
    """Whether a module's canonical name is among ``optim_target_modules``."""
    if isinstance(targets, str):
        if targets.replace("_", "-") == "all-linear":
            return lambda name, module: isinstance(module, nn.Linear)
        whole = _patterns([targets])
        return lambda name, module: bool(whole[0].fullmatch(name))
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, str) for target in targets):
        raise TypeError(
            'optim_target_modules must be a list of strings, a regular expression, or "all-linear"; '
            f"got {targets!r} of type {type(targets).__name__}"
        )
    # A list's entries are first of all parts of names; those that are no regular expression are nothing else.
    patterns = _patterns(targets, strict=False)
    return lambda name, module: any(t in name for t in targets) or any(p.fullmatch(name) for p in patterns)


def _patterns(texts: Iterable[str], strict: bool = True) -> list[re.Pattern[str]]:
    found = []
    for text in texts:
        try:
            found.append(re.compile(text))
        except re.error as error:
            if strict:
                raise ValueError(f"optim_target_modules={text!r} is no regular expression: {error}") from None
    return found


def _decayed(args: Any, model: nn.Module, trainer: Any) -> Callable[[str], float]:
    """Weight decay by canonical name: none for biases and norms, as the ``Trainer`` decides it."""
    if not args.weight_decay:
        return lambda name: 0.0
    if trainer is None:
        import transformers

        names = first_of(transformers.Trainer, "get_decay_parameter_names")(None, model)
    else:
        names = first_of(trainer, "get_decay_parameter_names")(model)
    decayed = {canonical_name(name) for name in names}
    return lambda name: float(args.weight_decay) if name in decayed else 0.0


def _groups(
    model: nn.Module, chosen: set[str], low: Mapping[str, Any], decay: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Parameter groups: others before targets, decayed before not decayed; none that is empty."""
    found: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for wrapped, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = canonical_name(wrapped)
            found.setdefault((name in chosen, -decay(name)), []).append((name, parameter))
    return [
        {"params": pairs, "weight_decay": -negative, **(low if targeted else {})}
        for (targeted, negative), pairs in sorted(found.items(), key=lambda item: item[0])
    ]


def _check_layerwise(args: Any, fsdp: bool) -> None:
    """Raise ValueError, or say in the log, what updates inside backward make of the ``TrainingArguments``."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(f'optim="{LAYERWISE}" under DeepSpeed: {NOT_IN_BACKWARD}: optim="{PLAIN}"')
    if world_of() > 1 and not fsdp:
        raise ValueError(
            f'optim="{LAYERWISE}" on {world_of()} ranks that hold whole parameters (DDP): nothing averages a gradient '
            f'before it is used. Take FSDP2 (fsdp=True), or optim="{PLAIN}"'
        )
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f'optim="{LAYERWISE}" with gradient_accumulation_steps={args.gradient_accumulation_steps}: every gradient '
            f'is used and freed inside backward, so none can be added to. Take 1, or optim="{PLAIN}"'
        )
    if args.max_grad_norm:
        _say(
            logging.WARNING,
            f'optim="{LAYERWISE}": max_grad_norm={args.max_grad_norm} has no effect, for gradients are used before '
            "their norm is known (the Trainer then logs a norm of 0); the norm-growth limiter takes its part",
        )


def _check_json(function: Callable[..., Any], trainer: Any, *args: Any, **keywords: Any) -> Any:
    """Around ``deepspeed_init(trainer, num_training_steps, inference=False)``: DeepSpeed's JSON outranks ``optim``."""
    name = _name(trainer.args)
    inference = keywords.get("inference", args[1] if len(args) > 1 else False)
    if name in (PLAIN, LAYERWISE) and takes_names() and not inference:
        config = trainer
        for attribute in ("accelerator", "state", "deepspeed_plugin", "hf_ds_config", "config"):
            config = first_of(config, attribute)
        named = (config.get("optimizer") or {}).get("type")
        if named in ("APOLLO", "APOLLOMini") and name == PLAIN:
            _say(
                logging.WARNING,
                f'optim="{name}" is outranked by the DeepSpeed config\'s "optimizer", {named}: its params are used, '
                "and optim_args and optim_target_modules are not. Remove one of the two",
            )
        elif named is not None:
            raise ValueError(
                f'optim="{name}" is outranked by the DeepSpeed config\'s "optimizer", {named}, and the Trainer would '
                f'train with that. Remove "optimizer" from the config, or name it there: {{"type": "APOLLO", ...}}'
            )
    return function(trainer, *args, **keywords)


def _say(level: int, line: str) -> None:
    if rank_of() == 0:
        logger.log(level, line)
