"""How weights are stored, where that is not one number an element."""
