"""The discover phase."""
