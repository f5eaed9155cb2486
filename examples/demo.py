"""The main job, end to end: shipped questions through the shipped model on the embedded engine, then a page to look at.

    make demo            or: python examples/demo.py [FOLDER]      (default folder: out/demo)

The questions of `examples/glance` are held out from training and have answers: accuracy is measured on them. Those of
`examples/photos` show real photographs going through the same path; `glance` reads rendered documents only, so their
answers are not scored.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vtengine.cli import main

EXAMPLES = Path(__file__).resolve().parent


def questions(folder: str, *, scored: bool) -> list[dict[str, Any]]:
    """The questions of one example folder, with absolute image paths."""
    rows = [
        json.loads(line) for line in (EXAMPLES / folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row in rows:
        row["image"] = str(EXAMPLES / folder / row["image"])
        if not scored:
            row["reference"] = row.pop("answer", None)
    return rows


def demo(folder: Path) -> int:
    """Runs the demonstration in `folder`; returns an exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answers, page = folder / "questions.jsonl", folder / "answers.jsonl", folder / "answers.html"
    rows = questions("glance", scored=True) + questions("photos", scored=False)
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers.unlink(missing_ok=True)
    started_s = time.monotonic()
    print(f"{len(rows)} questions: {asked}\n")
    status = main(["generate", str(asked), "-o", str(answers), "--model", "glance", "--image-root", str(EXAMPLES)])
    if status == 0:
        status = main(["view", str(answers), "-o", str(page), "--title", "vtengine demo"])
    if status == 0:
        print(f"done in {time.monotonic() - started_s:.0f} s; open {page.resolve().as_uri()} in a browser")
    return status


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[-1].startswith("-"):
        print(__doc__)
        sys.exit(0 if "--help" in sys.argv or "-h" in sys.argv else 2)
    sys.exit(demo(Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES.parent / "out" / "demo"))
