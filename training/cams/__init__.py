"""CAM methods: one file is one method, found by its name."""
