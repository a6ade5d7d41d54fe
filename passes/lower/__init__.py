"""The lower phase."""
