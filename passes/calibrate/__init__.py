"""The calibrate phase."""
