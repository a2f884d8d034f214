"""cluster.yaml as shipped: what it makes on AWS, by Ray's own code, and that none of Ray's unsafe defaults is left."""

import ast
import copy
import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_yaml import FILE, ROOT, for_own_machines

DESCRIBE = Path(__file__).parent / "describe_aws.py"
TEXT = FILE.read_text()
DOCS = (ROOT / "docs" / "cluster.md").read_text()
AWS = yaml.safe_load(TEXT)
OWN = yaml.safe_load(for_own_machines(TEXT))
BOTH = pytest.mark.parametrize("config", [AWS, OWN], ids=["aws", "own"])


# ------------------------------------------------------------------------------------------------ the file by itself


@BOTH
def test_ray_accepts_it(config, monkeypatch, tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    if config["provider"]["type"] == "local":
        config = prepare_config(copy.deepcopy(config))
    else:  # Ray asks AWS for what each instance type has: below
        config = config | {"docker": {}, "cluster_synced_files": []}
    validate_config(config)


def test_what_a_user_must_change_is_marked_few_and_on_top():
    before_the_rest = TEXT.split("# <<< AWS")[0]
    marked = [line for line in before_the_rest.splitlines() if re.search(r"\S.*  # CHANGE", line)]
    assert len(marked) == 9 and "nine values" in TEXT
    assert TEXT.count("  # CHANGE") == 9 + 4, "four more where own machines are named"
    assert before_the_rest.count("\n") < 65
    placeholders = re.findall(r".*(?:CHANGE-ME|0{10}).*", TEXT)
    assert placeholders and all("  # CHANGE" in line for line in placeholders)


@BOTH
def test_nothing_is_left_to_rays_defaults(config):
    commands = [f"{who}_{what}" for who in ("head", "worker") for what in ("setup_commands", "start_ray_commands")]
    for key in ("initialization_commands", "setup_commands", *commands, "file_mounts", "idle_timeout_minutes"):
        assert key in config, f"{key}: Ray would fill in its own"
    commands = json.dumps({key: value for key, value in config.items() if key.endswith("commands")})
    assert "pip install" not in commands and "ray-wheels" not in commands, "the lock file alone says what is installed"
    assert "make --no-print-directory -C ~/sddit-lab setup" in commands
    assert config["idle_timeout_minutes"] == 15


@BOTH
def test_every_node_asks_for_the_token_and_has_it_for_itself_alone(config):
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    setup = "\n".join(config["setup_commands"])
    assert "chmod 600 ~/.ray/auth_token" in setup and "export RAY_AUTH_MODE=token" in setup


@BOTH
def test_what_ray_start_is_given(config):
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for command in (head, worker):
        assert command.startswith("unset OMP_NUM_THREADS;"), "`ray up` exports 1, which would change results on CPUs"
        assert "ray start " in command and "--block" not in command


@BOTH
def test_the_record_is_served_copied_and_addressed(config):
    serve = config["head_start_ray_commands"][0]
    for flag in ("--detach", "--artifacts $SDDIT_BUCKET/artifacts", "--backup $SDDIT_BUCKET/mlflow", "--port 5000"):
        assert flag in serve
    assert "MLFLOW_TRACKING_URI=http://$(hostname -I" in config["head_setup_commands"][0]
    assert not any("MLFLOW" in command for command in config["setup_commands"]), "workers are told by the driver"
    assert "SDDIT_STORAGE=$SDDIT_BUCKET/runs" in "\n".join(config["setup_commands"])


@BOTH
def test_mounts_are_the_source_tree_alone(config):
    """Every file below a mount is read at each `ray up`, and each that changed has all set up again."""
    local = {remote: source for remote, source in config["file_mounts"].items() if not source.startswith("~")}
    assert all(remote == f"~/sddit-lab/{source}" for remote, source in local.items()), "make setup is at home there"
    for source in local.values():
        assert (ROOT / source).exists() and source not in (".", "runs", "mlruns", "figures", ".venv")
    needed = {"sddit", "sweeps", "analysis", "pyproject.toml", "README.md", "Makefile", "setup_env.py"}
    assert {*needed, "requirements.lock", "bootstrap.lock"} == set(local.values())
    assert sum(f.stat().st_size for s in local.values() for f in (ROOT / s).rglob("*") if f.suffix == ".py") < 5e6
    assert config["rsync_exclude"] == ["__pycache__"]


def test_there_are_no_secrets_in_it():
    assert not re.search(r"(?i)password|secret|AKIA|BEGIN .*KEY", TEXT)


def test_the_own_machines_section_is_the_same_cluster_otherwise():
    assert OWN["provider"]["type"] == "local" and set(OWN["auth"]) == {"ssh_user", "ssh_private_key"}
    assert "available_node_types" not in OWN and "max_workers" not in OWN
    shared = set(AWS) & set(OWN) - {"provider", "auth"}
    assert all(AWS[key] == OWN[key] for key in shared)
    assert "RAY_UP_enable_autoscaler_v2=0 ray up" in TEXT and "RAY_UP_enable_autoscaler_v2=0" in DOCS


# --------------------------------------------------------------------------------------------------- on a mocked AWS


def describe(config, folder):
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, DESCRIBE, file, "--json"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return describe(AWS, tmp_path_factory.mktemp("aws"))


@pytest.mark.slow
def test_the_instances_that_it_makes(made):
    import importlib.util

    spec = importlib.util.spec_from_file_location("describe_aws", DESCRIBE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.show(made)  # with pytest -s
    types = made["types"]
    heads = [node for node in types.values() if node["head"]]
    assert len(heads) == 1 and heads[0]["resources"]["CPU"] == 0 and "GPU" not in heads[0]["resources"]
    assert not heads[0]["spot"]
    workers = {name: node for name, node in types.items() if not node["head"]}
    assert all(node["limits"] == [0, 4] and node["resources"]["GPU"] == 1 for node in workers.values())
    spot, on_demand = workers["gpu_spot"], workers["gpu_on_demand"]
    assert spot["spot"] and not on_demand["spot"] and spot["priority"] > on_demand["priority"]
    assert spot["resources"] == on_demand["resources"], "the one stands in for the other"
    assert made["config"]["max_workers"] == 4
    assert tool.faults(made) == []


@pytest.mark.slow
def test_nobody_comes_in_but_by_ssh_from_one_address(made):
    (rules,) = made["groups"].values()
    assert {(rule["ports"], *rule["from"]) for rule in rules} == {
        ("22-22", "203.0.113.7/32"),
        ("all", "the group itself"),
    }
    (group,) = made["groups"]
    assert all(node["groups"] == [group] for node in made["types"].values())


@pytest.mark.slow
def test_roles_are_the_users_own_and_ray_makes_nothing(made):
    assert made["made"] == {"roles": [], "instance profiles": [], "security groups": [], "key pairs": []}
    profiles = {name: node["profile"].rpartition("/")[2] for name, node in made["types"].items()}
    assert profiles == {"head": "sddit-head", "gpu_on_demand": "sddit-worker", "gpu_spot": "sddit-worker"}
    assert all(node["key"] == "sddit-cluster" for node in made["types"].values())


@pytest.mark.slow
def test_disks_and_metadata(made):
    for node in made["types"].values():
        (volume,) = node["volumes"]
        assert volume["encrypted"] and volume["deleted_with_node"] and volume["kind"] == "gp3" and volume["gb"] >= 100
        assert node["metadata"]["HttpTokens"] == "required"
    assert made["config"]["provider"]["cache_stopped_nodes"] is False


@pytest.mark.slow
def test_without_these_lines_it_would_be_as_open_as_rays_default(tmp_path):
    """The checks above see what they are for."""
    config = json.loads(json.dumps(AWS))  # the anchors of the file are one object
    del config["provider"]["cache_stopped_nodes"]
    for node in config["available_node_types"].values():
        for key in ("SecurityGroupIds", "IamInstanceProfile", "MetadataOptions"):
            del node["node_config"][key]
        ebs = node["node_config"]["BlockDeviceMappings"][0]["Ebs"]
        del ebs["Encrypted"], ebs["DeleteOnTermination"]
    found = describe(config, tmp_path)
    code = f"import json, sys; sys.path.insert(0, {str(DESCRIBE.parent)!r}); import describe_aws; "
    code += "print('\\n'.join(describe_aws.faults(json.load(sys.stdin))))"
    said = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(found), capture_output=True, text=True, check=True
    ).stdout
    for fault in ("ports 22-22 are open to 0.0.0.0/0", "gpu_spot: no instance profile", "AmazonEC2FullAccess",
                  "AmazonS3FullAccess", "metadata without a token", "is not encrypted", "outlives its node",
                  "nodes are stopped, not terminated"):  # fmt: skip
        assert fault in said, said


# ------------------------------------------------------------------------------------------------------------- docs


def policies():
    """The JSON documents of docs/cluster.md, by the file name in the line before each."""
    found = re.findall(r"^`([\w-]+\.json)`[^\n]*\n\n```json\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def test_the_roles_of_the_documentation_may_do_little():
    found = policies()
    assert set(found) == {"trust.json", "head.json", "worker.json"}
    (worker,) = [found["worker.json"]]
    actions = {action for s in worker["Statement"] for action in s["Action"]}
    assert all(action.startswith("s3:") for action in actions)
    for name in ("head.json", "worker.json"):
        for statement in found[name]["Statement"]:
            assert not any(action in ("*", "s3:*", "ec2:*", "iam:*") for action in statement["Action"])
            if any(action.startswith("s3:") for action in statement["Action"]):
                resources = statement["Resource"]
                assert all(resource.startswith("arn:aws:s3:::my-bucket") for resource in resources)
    passing = [s for s in found["head.json"]["Statement"] if "iam:PassRole" in s["Action"]]
    assert passing[0]["Resource"] == ["arn:aws:iam::000000000000:role/sddit-worker"]
    ending = [s for s in found["head.json"]["Statement"] if "ec2:TerminateInstances" in s["Action"]]
    assert "ray-cluster-name" in json.dumps(ending[0]["Condition"])


@pytest.mark.slow
def test_aws_accepts_the_policies_of_the_documentation(monkeypatch):
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        iam = boto3.client("iam", "us-east-1")
        for name, document in policies().items():
            text = json.dumps(document)
            if name == "trust.json":
                iam.create_role(RoleName="sddit-head", AssumeRolePolicyDocument=text)
            else:
                iam.create_policy(PolicyName=name, PolicyDocument=text)


def test_commands_and_flags_of_the_documentation_exist():
    from sddit import cli

    tree = ast.parse(Path(cli.__file__).read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    known = {ast.literal_eval(key) for node in ast.walk(main) if isinstance(node, ast.Dict) for key in node.keys}
    named = set(re.findall(r"(?:^|[ '`])sddit ([a-z]+)", DOCS, re.MULTILINE))
    assert {"serve", "doctor", "status"} <= named <= known
    scripts = set(re.findall(r"(?:sweeps|tests)/\S+\.py", DOCS))
    assert scripts and all((ROOT / script).exists() for script in scripts)
    flags = {f"--{field.name}" for field in dataclasses.fields(cli.Serve)}
    served = [*AWS["head_start_ray_commands"][:1], *re.findall(r"sddit serve(?:[^'`\n]|\\\n)*", DOCS)]
    used = {flag for command in served for flag in re.findall(r"--[a-z-]+", command)}
    assert {"--detach", "--backup", "--stop"} <= used <= flags


def test_a_token_for_the_cluster_is_made_as_the_documentation_says(tmp_path):
    assert "ray get-auth-token --generate" in DOCS and "umask 077" in DOCS
    ray = Path(sys.executable).parent / "ray"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    subprocess.run(
        ["bash", "-c", f"umask 077; {ray} get-auth-token --generate > /dev/null"], env=env, check=True, timeout=120
    )
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
