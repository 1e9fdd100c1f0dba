"""registry-enforcer: says which container registries a Linux host's engines and containers may reach."""

__version__ = "0.1.0"
