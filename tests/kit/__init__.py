"""What the tests share; pytest has `tests` in its path, so that it is `kit` wherever it is called from."""
