"""DeepSpeed's JSON: known keys, lint."""
