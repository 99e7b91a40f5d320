"""Independent, slow and straightforward implementations that the tests compare with."""
