"""Tokens for training and validation: files, streamed datasets, or the standard library's source."""

from apollo_dist.pretrain.data.build import Data, build_data

__all__ = ["Data", "build_data"]
