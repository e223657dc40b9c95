"""Gates, then alias, then audit trail: `python -m flows.promote [--version N] [--rollback] [--reason TEXT]`."""

import argparse
import sys
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from lyrics.errors import InputError, RetryableError
from lyrics.track import promotion


def _only_retryable(_task: Any, _run: Any, state: State) -> bool:
    """Retry what may pass by itself: a registry that is down."""
    return isinstance(state.result(raise_on_failure=False), RetryableError)


@task(name="gates", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_only_retryable)
def check_gates(version: int | None) -> Any:
    """A refusal is a failed state with its sentence, not a traceback."""
    try:
        return promotion.check(version)
    except InputError as error:
        return Failed(message=str(error))


@task(name="alias", cache_policy=NO_CACHE)
def move_alias(verdict: promotion.Verdict) -> None:
    promotion.move(verdict)


@task(name="audit-trail", cache_policy=NO_CACHE)
def write_audit_trail(verdict: promotion.Verdict, reason: str) -> None:
    promotion.write_audit(verdict, reason)
    create_markdown_artifact(key="promotion", markdown=f"```\n{verdict}\n```", description=reason or None)


@task(name="rollback", cache_policy=NO_CACHE)
def roll_back(reason: str) -> Any:
    try:
        return promotion.rollback(reason)
    except InputError as error:
        return Failed(message=str(error))


@flow(name="promote")
def promote(version: int | None = None, rollback: bool = False, reason: str = "") -> Any:
    """Make a registered version (the candidate, if None) the champion, or bring the former champion back."""
    state: State = roll_back(reason, return_state=True) if rollback else check_gates(version, return_state=True)
    if state.is_failed():
        return Failed(message=state.message)
    outcome = state.result()
    if not rollback:
        move_alias(outcome)
        write_audit_trail(outcome, reason)
    return Completed(message=str(outcome))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.promote", description=promote.__doc__)
    parser.add_argument("--version", type=int, help="a registered version; the candidate if left out")
    parser.add_argument("--rollback", action="store_true", help="make the former champion champion again")
    parser.add_argument("--reason", default="", help="kept in the audit trail")
    chosen = parser.parse_args(arguments)
    state: Any = promote(chosen.version, chosen.rollback, chosen.reason, return_state=True)
    print(state.message, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 2


if __name__ == "__main__":
    sys.exit(main())
