"""Readers: turn files of each supported kind into a `DataSource`."""
