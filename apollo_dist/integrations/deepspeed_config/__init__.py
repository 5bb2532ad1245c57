"""DeepSpeed's JSON: known keys, unsupported settings, lint."""
