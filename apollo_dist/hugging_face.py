"""What users of Hugging Face's tools call (see ``integrations.trainer_optim``)."""

from .integrations.trainer_optim import replace_apollo_torch

__all__ = ["replace_apollo_torch"]
