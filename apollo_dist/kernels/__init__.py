"""Arithmetic on tensors of one device, chosen for speed; it knows neither rules nor ranks."""
