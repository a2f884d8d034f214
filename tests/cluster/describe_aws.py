"""What `ray up cluster.yaml` would make on AWS, without AWS: Ray's own code against moto's EC2 and IAM.

    python tests/cluster/describe_aws.py [cluster.yaml]            # tables
    python tests/cluster/describe_aws.py [cluster.yaml] --json

The account has what docs/cluster.md says to make; the values marked CHANGE that name it are set to that. What stands
in the answer as `made` is what Ray added by itself.
"""

import contextlib
import copy
import io
import ipaddress
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ME = "203.0.113.7/32"
ROLES = ("sddit-head", "sddit-worker")
TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"},
    ],
}


def describe(config: dict) -> dict:
    """The instances, security groups, roles and key pairs of a configuration, each as plain values."""
    home = tempfile.TemporaryDirectory(prefix="describe-aws-")
    fake = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        del os.environ[name]
    # Ray writes a key file below HOME where it makes a key pair.
    os.environ.update(fake, HOME=home.name, MOTO_IAM_LOAD_MANAGED_POLICIES="true", RAY_USAGE_STATS_ENABLED="0")
    from moto import mock_aws

    quiet = io.StringIO()  # Ray announces every look-up
    with home, mock_aws(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return _describe(config)


def _describe(config: dict) -> dict:
    import boto3
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    aws_config.time.sleep = lambda seconds: None  # twice 15 s for a role to be known everywhere
    region = config["provider"]["region"]
    ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
    config = _in_this_account(copy.deepcopy(config), ec2, iam)
    before = _account(ec2, iam)

    prepared = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(prepared)
    booted = AWSNodeProvider.bootstrap_config(prepared)
    provider = AWSNodeProvider(booted["provider"], booted["cluster_name"])
    types = {}
    for name, node_type in booted["available_node_types"].items():
        is_head = name == booted["head_node_type"]
        extra = booted.get("head_node", {}) if is_head else {}
        kind = "head" if is_head else "worker"
        tags = {TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_NODE_KIND: kind, TAG_RAY_LAUNCH_CONFIG: name}
        made = provider.create_node({**node_type["node_config"], **extra}, tags, 1)
        (instance,) = ec2.describe_instances(InstanceIds=list(made))["Reservations"][0]["Instances"]
        types[name] = {
            "head": is_head,
            "limits": [node_type.get("min_workers", 0), node_type.get("max_workers", 0)],
            "priority": node_type.get("priority", 0),
            "resources": node_type["resources"],
            "instance_type": instance["InstanceType"],
            "spot": instance.get("InstanceLifecycle") == "spot",
            "profile": instance.get("IamInstanceProfile", {}).get("Arn"),
            "groups": [group["GroupId"] for group in instance["SecurityGroups"]],
            "image": instance["ImageId"],
            "key": instance.get("KeyName"),
            "metadata": node_type["node_config"].get("MetadataOptions", {}),
            "volumes": [_volume(each, ec2) for each in instance["BlockDeviceMappings"]],
        }
    used = {group for node_type in types.values() for group in node_type["groups"]}
    groups = {
        group["GroupId"]: [_rule(rule, group["GroupId"]) for rule in group["IpPermissions"]]
        for group in ec2.describe_security_groups(GroupIds=sorted(used))["SecurityGroups"]
    }
    after = _account(ec2, iam)
    made = {kind: sorted(set(after[kind]) - set(before[kind])) for kind in before}
    policies = {}
    for role in after["roles"]:
        attached = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        policies[role] = [policy["PolicyName"] for policy in attached]
    return {"types": types, "groups": groups, "made": made, "policies": policies, "config": booted}


def _in_this_account(config: dict, ec2, iam) -> dict:
    """The configuration with its placeholders set to what is made here, as docs/cluster.md makes it."""
    vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="sddit-cluster", Description="sddit", VpcId=vpc)["GroupId"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ME}]}
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, inside])
    ec2.create_key_pair(KeyName="sddit-cluster")
    profiles = {}
    for role in ROLES:
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(TRUST))
        profile = iam.create_instance_profile(InstanceProfileName=role)["InstanceProfile"]
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        profiles[role] = profile["Arn"]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if "SecurityGroupIds" in node:
            node["SecurityGroupIds"] = [group]
        if "ImageId" in node:
            node["ImageId"] = image
        if "IamInstanceProfile" in node:
            node["IamInstanceProfile"] = {"Arn": profiles[node["IamInstanceProfile"]["Arn"].rpartition("/")[2]]}
    return config


def _account(ec2, iam) -> dict:
    return {
        "roles": [role["RoleName"] for role in iam.list_roles()["Roles"]],
        "instance profiles": [each["InstanceProfileName"] for each in iam.list_instance_profiles()["InstanceProfiles"]],
        "security groups": [each["GroupId"] for each in ec2.describe_security_groups()["SecurityGroups"]],
        "key pairs": [each["KeyName"] for each in ec2.describe_key_pairs()["KeyPairs"]],
    }


def _volume(mapping: dict, ec2) -> dict:
    (volume,) = ec2.describe_volumes(VolumeIds=[mapping["Ebs"]["VolumeId"]])["Volumes"]
    return {
        "device": mapping["DeviceName"],
        "gb": volume["Size"],
        "kind": volume["VolumeType"],
        "encrypted": volume["Encrypted"],
        "deleted_with_node": mapping["Ebs"]["DeleteOnTermination"],
    }


def _rule(rule: dict, group: str) -> dict:
    peers = [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
    ranges = [r["CidrIp"] for r in rule["IpRanges"]] + [r["CidrIpv6"] for r in rule.get("Ipv6Ranges", [])]
    ports = "all" if rule["IpProtocol"] == "-1" else f"{rule['FromPort']}-{rule['ToPort']}"
    return {"ports": ports, "from": ["the group itself" if peer == group else peer for peer in peers] + ranges}


def faults(found: dict) -> list[str]:
    """What is open, too mighty, or goes on costing. Empty: nothing."""
    bad = []
    for group, rules in found["groups"].items():
        for rule in rules:
            nets = [ipaddress.ip_network(peer) for peer in rule["from"] if "/" in peer]
            bad += [f"{group}: ports {rule['ports']} are open to {net}" for net in nets if net.num_addresses > 2**16]
    for name, node in found["types"].items():
        if not node["profile"]:
            bad.append(f"{name}: no instance profile")
        if node["metadata"].get("HttpTokens") != "required":
            bad.append(f"{name}: instance metadata without a token")
        for volume in node["volumes"]:
            if not volume["encrypted"]:
                bad.append(f"{name}: {volume['device']} is not encrypted")
            if not volume["deleted_with_node"]:
                bad.append(f"{name}: {volume['device']} outlives its node")
    for role, policies in found["policies"].items():
        bad += [f"{role}: {policy}" for policy in policies if "FullAccess" in policy or "Administrator" in policy]
    if found["config"]["provider"].get("cache_stopped_nodes", True):
        bad.append("nodes are stopped, not terminated")
    return bad


def show(found: dict) -> None:
    """Tables for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    nodes = Table(title="Node types", title_justify="left")
    for column in ("type", "instance", "market", "priority", "nodes", "Ray's resources", "role", "metadata", "volume"):
        nodes.add_column(column)
    for name, node in found["types"].items():
        (volume,) = node["volumes"]
        resources = {k: v for k, v in node["resources"].items() if k in ("CPU", "GPU")}
        nodes.add_row(
            f"{name} (the head)" if node["head"] else name,
            node["instance_type"],
            "spot" if node["spot"] else "on demand",
            str(node["priority"]),
            "1" if node["head"] else f"{node['limits'][0]} to {node['limits'][1]}",
            ", ".join(f"{v:g} {k}" for k, v in resources.items()),
            (node["profile"] or "none").rpartition("/")[2],
            f"token {node['metadata'].get('HttpTokens', 'optional')}",
            f"{volume['gb']} GB {volume['kind']}, {'encrypted' if volume['encrypted'] else 'not encrypted'}, "
            f"{'goes' if volume['deleted_with_node'] else 'stays'} with its node",
        )
    console.print(nodes)
    rules = Table(title="May come in", title_justify="left")
    for column in ("security group", "ports", "from"):
        rules.add_column(column)
    for group, allowed in found["groups"].items():
        for rule in allowed:
            rules.add_row(group, rule["ports"], ", ".join(rule["from"]))
    console.print(rules)
    made = {kind: names for kind, names in found["made"].items() if names}
    console.print(f"Made by Ray itself: {made or 'nothing'}.")
    console.print("\n".join(f"Unsafe: {fault}" for fault in faults(found)) or "Nothing open to the world.")


if __name__ == "__main__":
    import yaml

    words = [word for word in sys.argv[1:] if word != "--json"]
    answer = describe(yaml.safe_load(Path(words[0] if words else ROOT / "cluster.yaml").read_text()))
    if "--json" in sys.argv:
        print(json.dumps(answer))
    else:
        show(answer)
