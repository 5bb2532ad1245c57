"""Random projections: generated from counters, cached between refreshes."""
