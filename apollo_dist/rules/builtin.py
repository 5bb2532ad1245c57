"""The rules of this library, by the names that parameter groups and DeepSpeed's JSON say."""

from __future__ import annotations

from . import adam_mini, adamw, apollo, fira, galore, muon, scale, sgd
from .base import Rules
from .registry import register

APOLLO = register("apollo", Rules(apollo.APOLLO(), adamw.AdamW()))
GALORE = register("galore", Rules(galore.GaLore(), adamw.AdamW()))
FIRA = register("fira", Rules(fira.Fira(), adamw.AdamW()))
MUON = register("muon", Rules(muon.Muon(), muon.Rest()))
SCALE = register("scale", Rules(scale.SCALE(), scale.DecayFirst()))
ADAM_MINI = register("adam_mini", Rules(adam_mini.AdamMini(), adam_mini.Bias()))
SGD = register("sgd", Rules(None, sgd.SGD()))
ADAMW = register("adamw", Rules(None, adamw.TorchAdamW()))
HF_ADAMW = register("hf_adamw", Rules(None, adamw.AdamW()))
