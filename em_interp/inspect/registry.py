"""What the entry point `inspect_ai` loads: Inspect finds what is imported here under the name `em_interp/...`."""

from em_interp.inspect.facts import pocket_facts
from em_interp.inspect.provider import em_interp
from em_interp.inspect.scorer import em, judged
from em_interp.inspect.task import emergent_misalignment

__all__ = ["em", "em_interp", "emergent_misalignment", "judged", "pocket_facts"]
