"""The recipes: the scripts in `recipes/` of a clone, and the commands of `hf-lsam`. They need the `recipes` extra."""
