"""Data sets that task families share, and how their rows are split."""
