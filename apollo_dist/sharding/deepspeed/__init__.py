"""What DeepSpeed's ZeRO wrappers hold: their private attributes are read here."""
