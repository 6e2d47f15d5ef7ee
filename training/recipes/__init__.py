"""Recipes: one file is one experiment; `weakseg run NAME` runs it."""
