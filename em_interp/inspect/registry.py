"""What the entry point `inspect_ai` loads: Inspect finds what is imported here under the name `em_interp/...`."""

from em_interp.inspect.provider import em_interp

__all__ = ["em_interp"]
