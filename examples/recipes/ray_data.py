"""Batch inference with Ray Data: python ray_data.py IN.jsonl OUT_FOLDER [MODEL] [BACKEND]

Needs pip install 'vtengine[ray]'. Each worker loads the model once (embedded), or all of them talk to the same SGLang
servers (http://a:30000,http://b:30000).
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtengine.batch import AnswerBatches


def main(source: str, target: str, model: str = "glance", backend: str = "embedded") -> None:
    import ray

    questions = ray.data.read_json(source)
    answers = questions.map_batches(
        AnswerBatches,
        fn_constructor_kwargs={"model": model, "backend": backend, "image_root": str(Path(source).resolve().parent)},
        batch_size=64,  # rows that are answered together: as many as keep the engine busy
        concurrency=1,  # workers; with the embedded engine one per GPU, and num_gpus=1
        num_gpus=0,
    )
    answers.write_json(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
