"""prefect.yaml: a server, a worker and a schedule on loopback run the flow to its end."""

import shutil
import signal
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from fake_project import ROOT, Project, wait_for

PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def test_prefect_yaml_names_the_flow_and_runs_it_every_night() -> None:
    (deployment,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    path, function = deployment["entrypoint"].split(":")
    assert f"def {function}(" in (ROOT / path).read_text()
    assert deployment["schedules"][0]["cron"].split()[2:] == ["*", "*", "*"]


def test_the_readme_deploys_without_a_question() -> None:
    """In a terminal Prefect would ask where to clone the code from, and by default not use this folder."""
    for name in ("README.md", "prefect.yaml"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if "deploy --all" in line]
        assert lines and all("prefect --no-prompt deploy --all" in line for line in lines)


@pytest.mark.timeout(1800)  # under a minute on two quiet cores; a dozen Python processes start one after another
def test_a_scheduled_deployment_runs_to_the_end(project: Project, services: dict[str, str]) -> None:
    project.environment |= services
    shutil.copy(ROOT / "prefect.yaml", project.root)
    shutil.copytree(ROOT / "flows", project.root / "flows")
    project.run([*PREFECT, "work-pool", "create", "lyrics", "--type", "process"])
    worker = project.start([*PREFECT, "worker", "start", "--pool", "lyrics"], PREFECT_WORKER_QUERY_SECONDS="1")
    try:
        project.run([*PREFECT, "deploy", "--name", "nightly", "--interval", "20", "--param", "until=second"])
        wait_for(lambda: "COMPLETED" in scheduled_states(services["PREFECT_API_URL"]), seconds=1500, pause=0.5)
    finally:
        worker.send_signal(signal.SIGINT)
        output, _ = worker.communicate(timeout=240)
    assert project.result("models/second/result"), output
    assert len(project.log()) == 10


def scheduled_states(url: str) -> list[str]:
    """States of the runs that the schedule, and nobody else, has begun; none while the server is too busy to say."""
    try:
        found = httpx.post(f"{url}/flow_runs/filter", json={"limit": 200}, timeout=60)
    except httpx.TransportError:
        return []
    return [run["state_type"] for run in found.json() if run["auto_scheduled"]]


def test_the_deployed_parameters_are_those_of_the_flow() -> None:
    from flows.end_to_end import end_to_end

    (deployment,) = yaml.safe_load(Path(ROOT / "prefect.yaml").read_text())["deployments"]
    assert set(deployment.get("parameters") or {}) <= set(end_to_end.parameters.properties)
