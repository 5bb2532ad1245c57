"""Who owns which channels, and the collectives of a step."""
