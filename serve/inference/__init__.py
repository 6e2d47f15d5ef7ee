"""Stubs generated from proto/inference by proto/generate.sh; never edited."""
