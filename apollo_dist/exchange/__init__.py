"""Who owns which channels, and the two collectives of a step."""
