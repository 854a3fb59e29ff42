"""A choice: other layouts and files that the same weights come in."""
