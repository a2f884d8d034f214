import os

import pytest


@pytest.fixture(scope="session")
def s3():
    """The environment in which S3 is moto's server on loopback, with an empty bucket 'lab'."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    env = keys | {"AWS_ENDPOINT_URL": endpoint}
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)  # pyarrow reads it in this process, too
    boto3.client("s3").create_bucket(Bucket="lab")
    yield env
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    server.stop()
