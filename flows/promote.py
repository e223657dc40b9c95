"""Gates, then alias, then audit trail: `python -m flows.promote [--version N] [--rollback] [--reason TEXT]`."""

import argparse
import sys
from typing import Any

import flows  # noqa: F401  # settles Prefect's environment: before the import of prefect

# isort: split
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from flows import logs
from lyrics.errors import RetryableError
from lyrics.evaluate.again import evaluate_again
from lyrics.stage import one_sentence
from lyrics.track import promotion

logs.without_tracebacks()


def _only_retryable(_task: Any, _run: Any, state: State) -> bool:
    """Retry what may pass by itself: a registry that is down."""
    return isinstance(state.result(raise_on_failure=False), RetryableError)


@task(name="gates", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_only_retryable)
def check_gates(version: int | None) -> promotion.Verdict:
    return promotion.check(version, evaluate_again=evaluate_again)


@task(name="alias", cache_policy=NO_CACHE)
def move_alias(verdict: promotion.Verdict) -> None:
    promotion.move(verdict)


@task(name="audit-trail", cache_policy=NO_CACHE)
def write_audit_trail(verdict: promotion.Verdict, reason: str) -> None:
    promotion.write_audit(verdict, reason)
    create_markdown_artifact(key="promotion", markdown=f"```\n{verdict}\n```", description=reason or None)


@task(name="rollback", cache_policy=NO_CACHE)
def roll_back(version: int | None, reason: str) -> promotion.Rollback:
    return promotion.rollback(reason, version=version)


@flow(name="promote")
def promote(version: int | None = None, rollback: bool = False, reason: str = "") -> str:
    """Make a registered version (the candidate, if None) the champion, or bring the former champion back."""
    if rollback:
        return str(roll_back(version, reason))
    verdict = check_gates(version)
    move_alias(verdict)
    write_audit_trail(verdict, reason)
    return str(verdict)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.promote", description=promote.__doc__)
    parser.add_argument("--version", type=int, help="a registered version; the candidate if left out")
    parser.add_argument("--rollback", action="store_true", help="make the former champion champion again")
    parser.add_argument("--reason", default="", help="kept in the audit trail")
    chosen = parser.parse_args(arguments)
    print(promote(chosen.version, chosen.rollback, chosen.reason))


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
