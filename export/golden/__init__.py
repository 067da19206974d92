"""Reference numbers for the Rust tests, made by the Python implementations that the engine follows."""
