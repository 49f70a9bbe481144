"""The report: one HTML file that opens with the findings and needs no network, and the summary on the terminal.

- `section`: what became of an analysis
- `page`: the file, of `page.html.j2`, `style.css` and `script.js`; `figures`: for any width, dark or on paper;
  `tables`: their first rows, with `units`
- `terminal`: a row for each analysis, and the story
"""

from analyses.report.page import write_report
from analyses.report.section import Section
from analyses.report.terminal import story, summary

__all__ = ["Section", "story", "summary", "write_report"]
