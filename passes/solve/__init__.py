"""The solve phase."""
