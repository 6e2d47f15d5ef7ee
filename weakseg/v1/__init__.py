"""Stubs generated from proto/weakseg/v1 by proto/generate.sh; never edited."""
