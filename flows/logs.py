"""Prefect logs the traceback of every failure; one that has a sentence for the user needs none."""

import logging

from flows.stages import StageError
from lyrics.stage import has_sentence, verdict


class _OneSentence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, StageError):
            record.msg, record.args, record.exc_info = str(error), (), None
        elif error is not None and has_sentence(error):
            record.msg, record.args, record.exc_info = verdict(error)[1], (), None
        return True


def without_tracebacks() -> None:
    """Have Prefect log such failures in their sentence."""
    for name in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(_ONE_SENTENCE)


_ONE_SENTENCE = _OneSentence()
