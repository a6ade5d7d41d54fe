"""The transform phase."""
