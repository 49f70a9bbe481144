"""What became of one analysis."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding


@dataclass
class Section:
    """The part of the report that one analysis makes."""

    name: str
    title: str
    text: str
    """How to read it."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, go.Figure] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    """Computed from the tables: what they say, in sentences."""
    comparison: pd.DataFrame | None = None
    error: str | None = None
    missing: bool = False
    """The input is absent, which is no fault; `error` says where to get it."""
    notes: list[str] = field(default_factory=list)
    """What could not be done for a part of the data."""
    seconds: float = 0.0
    reused: bool = False
