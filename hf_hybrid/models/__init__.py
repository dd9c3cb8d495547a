"""The one floor that calls a host model's ``forward`` or touches a cache."""
