"""Optimizer state by parameter, and its resharding, for torch's own state-dict tools."""
