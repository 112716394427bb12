"""The recipes: what `hf-lsam` runs, and the scripts of a clone. They need the `recipes` extra."""
