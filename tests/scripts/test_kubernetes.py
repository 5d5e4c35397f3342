"""Manifest of a run on Kubernetes: valid, and consistent with the config file and the scripts."""

import re

import pytest
import yaml

from config_files import exported
from paths import ROOT

SERVICE, JOB = yaml.safe_load_all((ROOT / "kubernetes" / "job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENV = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}


def test_manifest_fits_the_schemas_of_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in (SERVICE, JOB):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_nodes_and_accelerators_are_those_of_the_config_file():
    config = exported(ENV["DGXSYSTEM"])
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(config["DGXNNODES"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(config["DGXNGPU"])


def test_every_variable_is_one_of_the_script():
    usage = (ROOT / "run_and_time.sh").read_text().partition("\nEND\n")[0]
    assert {name for name in ENV if not re.search(rf"\b{name}\b", usage)} == set()


def test_nodes_find_node_0_by_the_name_of_the_service():
    assert ENV["MASTER_ADDR"] == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    (rank,) = (variable for variable in CONTAINER["env"] if variable["name"] == "NODE_RANK")
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    assert JOB["spec"]["completionMode"] == "Indexed"


def test_folders_are_on_mounted_volumes():
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in POD["volumes"]}
    assert ENV["RUN_DIR"].startswith("/logs/")
    assert not mounts["/logs"].get("readOnly")
    assert ENV["DATADIR"].startswith("/data/")


def test_runs_that_would_end_alike_are_not_repeated():
    rule = JOB["spec"]["podFailurePolicy"]["rules"][0]
    usage = (ROOT / "run_and_time.sh").read_text()
    assert "2 bad configuration or input, 3 target not reached" in usage
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert POD["restartPolicy"] == "Never"  # the policy requires it
