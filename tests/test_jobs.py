"""Job files: whole, for the layout asked for, safe in the shell and in YAML, started again after exit code 75 only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from schoolhouse import cli, jobs
from schoolhouse.config import Parallel
from schoolhouse.errors import ConfigError

NASTY = ("data.train=it's; rm -rf $HOME `id` $(id) \"x\" #&|\\ ä: {y}", "model.stop_tokens=[<|a|>, '%s']")
"""Settings that mean something to a shell or to YAML wherever they are not quoted."""


def made(to: str, *overrides: str, nodes: int | None = 2, gpus: int | None = 8, **axes: int) -> str:
    recipe = "examples/sft/multiturn/qwen_05_sp2.yaml"
    return jobs.text(jobs.job(recipe, overrides, Parallel(**axes), nodes, gpus), to)


def command_of(to: str, text: str) -> list[str]:
    """The shell words of the line that trains, as a shell reads them."""
    if to == "slurm":
        line = re.search(r"^srun --\S+ --\S+ (.*) \|\| code=\$\?$", text, re.MULTILINE)[1]
    elif to == "skypilot":
        line = yaml.safe_load(text)["run"].strip().splitlines()[-1].removeprefix("exec ")
    else:
        line = pod(text)["args"][0].removeprefix("exec ")
    return shlex.split(line)


def pod(text: str) -> dict[str, Any]:
    return list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0]


# Every file.


@pytest.mark.parametrize("to", jobs.WRITERS)
def test_the_command_is_the_projects_own_with_the_users_settings_last(to: str) -> None:
    found = command_of(to, made(to, *NASTY))
    assert found[:3] == [".venv/bin/schoolhouse", "run", "examples/sft/multiturn/qwen_05_sp2.yaml"]
    assert found[-2:] == list(NASTY)
    options = cli.parse(found[1:])  # the program understands its own job file
    assert options.recipe == found[2] and options.overrides[-2:] == list(NASTY)
    assert options.nproc == (1 if to == "slurm" else 8), "srun starts the processes itself"


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=40))
def test_no_setting_escapes_its_quotes(value: str) -> None:
    for to in jobs.WRITERS:
        try:
            text = made(to, f"data.train={value}")
        except ConfigError:
            assert not value.isprintable()
            return
        assert command_of(to, text)[-1] == f"data.train={value}"


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "a\u2028b"])
def test_a_line_break_in_a_setting_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="line break"):
        made("slurm", f"data.train={value}")


@pytest.mark.parametrize("to", jobs.WRITERS)
def test_nothing_is_left_to_be_filled_in_and_no_secret_is_written(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    text = made(to)
    assert "hf_secret" not in text and not re.search(r"TODO|<[a-z]|\bXXX|example\.com", text)
    assert text.endswith("\n") and max(map(len, text.splitlines())) <= 150


@pytest.mark.parametrize(("axes", "asked", "wanted"), [
    ({}, (None, None), (1, 8)), ({"ulysses": 2}, (None, None), (1, 8)), ({"ulysses": 3}, (None, None), (1, 6)),
    ({"shard": 2, "ulysses": 2}, (None, None), (1, 4)), ({"shard": 16}, (None, None), (2, 8)),
    ({"replicate": 2, "shard": 8, "ulysses": 2}, (None, None), (4, 8)), ({"shard": 16}, (None, 4), (4, 4)),
    ({"shard": 16}, (4, None), (4, 4)), ({}, (3, 2), (3, 2)), ({"replicate": 2}, (None, 4), (2, 4)),
])
def test_machines_follow_from_the_layout(
    axes: dict[str, int], asked: tuple[int | None, int | None], wanted: tuple[int, int]
) -> None:
    found = jobs.job("a.yaml", (), Parallel(**axes), *asked)
    assert (found.nodes, found.gpus) == wanted


@pytest.mark.parametrize(("axes", "nodes", "gpus"), [
    ({"ulysses": 3}, 1, 8), ({"shard": 16}, 1, 8), ({"shard": 6}, 4, None),
])
def test_machines_that_the_layout_cannot_use_are_refused(axes: dict[str, int], nodes: int, gpus: int | None) -> None:
    with pytest.raises(ConfigError, match="cannot use") as caught:
        jobs.job("a.yaml", (), Parallel(**axes), nodes, gpus)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("recipe", ["7.yaml", "Ünï/Ä_b.yaml", "/a/" + "x" * 200 + ".yaml", "..yaml", "a/b-.yaml"])
def test_names_are_dns_labels(recipe: str) -> None:
    name = jobs.job(recipe, (), Parallel(), 1, 1).name
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name)


# SLURM: the script itself is run, with srun and its friends replaced.


def test_the_slurm_script_is_valid_bash(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(made("slurm", *NASTY))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=style", script], check=True)
    headers = re.findall(r"^#SBATCH --(\S+)$", script.read_text(), re.MULTILINE)
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "requeue", "signal=TERM@300"} <= set(headers)


@pytest.mark.parametrize(("code", "state", "requeued"), [
    (75, "RUNNING", True), (75, "COMPLETING", False), (0, "RUNNING", False), (3, "RUNNING", False),
])
def test_slurm_starts_a_stopped_job_again_and_no_other(
    tmp_path: Path, code: int, state: str, requeued: bool
) -> None:
    """With the scheduler's commands replaced: the exit code is the program's, and only 75 of a living job requeues.

    The list of hosts is long: with a pipe to `head` the script itself would die of SIGPIPE now and then.
    """
    stubs = {
        "srun": f'printf "%s\\n" "$@" > srun.txt; echo "$MASTER_ADDR:$MASTER_PORT" > address.txt; exit {code}',
        "scontrol": 'if [ "$1" = show ]; then printf "node%s\\n" {7..4000}; else echo "$@" >> requeue.txt; fi',
        "squeue": f"echo {state}",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(made("slurm", *NASTY))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    command = ["bash", tmp_path / "job.sbatch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert (tmp_path / "srun.txt").read_text().splitlines()[-2:] == list(NASTY)
    assert (tmp_path / "address.txt").read_text() == "node7:21234\n"
    found = tmp_path / "requeue.txt"
    assert (found.read_text() if found.exists() else "") == ("requeue 41234\n" if requeued else "")


# SkyPilot.


def test_the_skypilot_file_has_the_fields_of_its_schema() -> None:
    """Names and types as in SkyPilot's task schema (sky/utils/schemas.py)."""
    task = yaml.safe_load(made("skypilot"))
    known = {"name", "workdir", "num_nodes", "resources", "volumes", "envs", "setup", "run"}
    assert task.keys() <= known and task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [7, 75]
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "directory=/shared/runs/sft-multiturn-qwen-05-sp2" in task["run"] and "/shared" in task["volumes"]


def test_every_skypilot_machine_finds_the_first(tmp_path: Path) -> None:
    """The script's own lines, run in a shell: what the launcher reads from the environment."""
    run = yaml.safe_load(made("skypilot"))["run"].strip().splitlines()
    script = "\n".join([*run[:-1], "env"])
    environment = {
        "PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("PET_"))
    assert found == {
        "PET_MASTER_ADDR": "10.0.0.4", "PET_MASTER_PORT": "29500", "PET_NNODES": "2", "PET_NODE_RANK": "1",
    }


# Kubernetes.


def test_the_kubernetes_objects_belong_together() -> None:
    """The service's name is the pods' subdomain and its selector finds them; machines, processes and claims agree."""
    service, job = yaml.safe_load_all(made("kubernetes"))
    name, spec = job["metadata"]["name"], job["spec"]
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["name"] == name == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    container, template = pod(made("kubernetes")), spec["template"]["spec"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8} and template["restartPolicy"] == "Never"
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in template["volumes"]}
    values = {one["name"]: one.get("value") for one in container["env"]}
    assert values["PET_NNODES"] == "2" and values["PET_MASTER_ADDR"] == f"{name}-0.{name}"
    assert all(value is None or isinstance(value, str) for value in values.values()), "the API takes strings only"
    place = next(one for one in container["env"] if one["name"] == "PET_NODE_RANK")
    assert "job-completion-index" in place["valueFrom"]["fieldRef"]["fieldPath"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


def test_kubernetes_starts_a_stopped_pod_again_and_gives_up_where_trying_again_is_vain() -> None:
    """75 and drained machines do not count; the user's own faults end the job at once; 1 and 7 may try again."""
    rules = list(yaml.safe_load_all(made("kubernetes")))[1]["spec"]["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert by_code == {75: "Ignore", **dict.fromkeys([2, 3, 4, 5, 6, 8], "FailJob")}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert all(rule.get("onExitCodes", {}).get("containerName", "train") == "train" for rule in rules)


# The command.


def test_the_command_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["job", "examples/sft/gsm8k/qwen_05.yaml", "--to", "slurm", "--nodes", "2", "--gpus", "4", "seed=3"])
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in printed and "qwen_05.yaml seed=3" in printed


def test_a_mistake_in_the_recipe_is_found_before_the_machines_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["job", "examples/sft/gsm8k/qwen_05.yaml", "--to", "slurm", "optim.learning_rat=3"])
    assert caught.value.code == 2 and "optim.learning_rate" in capsys.readouterr().err


def test_job_files_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from schoolhouse import cli; cli.main(sys.argv[1:])"
    command = ["python", "-c", code, "job", "examples/sft/gsm8k/qwen_05.yaml", "--to", "kubernetes"]
    assert "kind: Job" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
