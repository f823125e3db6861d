"""Tasks for EleutherAI's lm-eval: those it knows by name, and local files of JSON lines.

A file's fields say what kind of task it is:

    query, choices, gold       multiple choice: the likeliest of `choices` after `query`; gold is an index
    context, continuation      the likeliest text after `context`, as LAMBADA's last words
    question, answer           generation: the number after "####" in `answer`, as in GSM8K, after five other questions
"""

import json
import logging
from pathlib import Path
from typing import Any

from greenroom.errors import ConfigError

_ANSWER_TOKENS = 256
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_KINDS: "dict[tuple[str, ...], dict[str, Any]]" = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.rstrip()}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [_ACCURACY, {**_ACCURACY, "metric": "acc_norm"}],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            _ACCURACY,
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    ("question", "answer"): {
        "output_type": "generate_until",
        "fewshot_split": "train",
        "num_fewshot": 5,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "Question:"], "do_sample": False, "max_gen_toks": _ANSWER_TOKENS},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
    },
}
"""lm-eval's settings of a task by the fields of its file; texts and filters as lm-eval has them for these tasks."""


def task_of(path: Path) -> "dict[str, Any]":
    """An lm-eval task of the JSON lines in `path`. Raises ConfigError where its fields are of no known kind."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline() or "null")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as JSON lines ({error}): give a file with one object a line"
        ) from error
    fields = first.keys() if isinstance(first, dict) else ()
    for kind, settings in _KINDS.items():
        if set(kind) <= set(fields):
            data = {"data_files": str(path.absolute())}
            # datasets calls the one part of such a file "train"
            return {
                "task": path.stem,
                "dataset_path": "json",
                "dataset_kwargs": data,
                "test_split": "train",
                **settings,
            }
    known = "; ".join(", ".join(kind) for kind in _KINDS)
    raise ConfigError(f"{path} has the fields {', '.join(fields) or 'of no object'}: a task needs {known}")


def run(
    model: str,
    names: "list[str]",
    *,
    include: "str | None" = None,
    limit: "int | None" = None,
    context: int = 2048,
    **arguments: Any,
) -> "dict[str, Any]":
    """Run tasks on `model`: each of `names` is one of lm-eval's or a file for `task_of`.

    `include`: a folder with task files of lm-eval's own format; `limit`: the first so many questions of each task;
    `context`, `arguments`: as `adapter.GreenroomLM` takes them.

    Returns task → {"questions", "metrics": {name: {"value", "se"}}}. Raises ConfigError where lm-eval is missing or
    does not know a task.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from greenroom.evaluate.adapter import GreenroomLM
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval ({error}): pip install 'greenroom[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include)
    tasks = [_task(name, manager) for name in names]
    if context <= _ANSWER_TOKENS and any(isinstance(task, dict) and "generation_kwargs" in task for task in tasks):
        raise ConfigError(f"--context {context} leaves no room for an answer of {_ANSWER_TOKENS} tokens: give more")
    engine = GreenroomLM(model, context, **arguments)
    try:
        found = lm_eval.simple_evaluate(
            model=engine, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    finally:
        engine.close()
    questions = found["n-samples"]
    return {
        name: {"questions": questions.get(name, {}).get("effective"), "metrics": _metrics(figures)}
        for name, figures in found["results"].items()
    }


def _task(name: str, manager: Any) -> "str | dict[str, Any]":
    if Path(name).suffix in (".jsonl", ".json"):
        return task_of(Path(name).expanduser())
    if not manager.match_tasks([name]):
        raise ConfigError(f"lm-eval knows no task {name}: see `lm_eval ls tasks`, give --include-path or a .jsonl file")
    return name


def _metrics(figures: "dict[str, Any]") -> "dict[str, dict[str, float | None]]":
    """`{"acc,none": a, "acc_stderr,none": s, …}` as `{"acc": {"value": a, "se": s}}`."""
    metrics = {}
    for key, value in figures.items():
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr"):
            se = figures.get(f"{name}_stderr,{filtered}")
            shown = name if filtered == "none" else f"{name} ({filtered})"
            metrics[shown] = {"value": value, "se": se if isinstance(se, float) else None}
    return metrics
