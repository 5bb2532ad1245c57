"""One optimizer step, by phase: plan, reduce, own, apply."""
