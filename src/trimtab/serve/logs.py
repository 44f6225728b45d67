"""Logs as JSON Lines on standard error: one line for each request, without what it said unless that is asked for."""

import json
import logging
import sys
import time
from typing import Any, TextIO

__all__ = ["configure_logs"]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """To what standard error is at the time: a caller in the same process may have replaced it since."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logs() -> dict[str, Any]:
    """The configuration of `logging.config.dictConfig` for a server, its libraries included."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": _JsonLines}},
        "handlers": {"stderr": {"()": _CurrentStderr, "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"trimtab": {"level": "INFO"}, "uvicorn": {"level": "WARNING"}},
    }
