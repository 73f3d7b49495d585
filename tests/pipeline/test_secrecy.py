from pathlib import Path

import pytest

from pipeline.compose import compose_members
from pipeline.errors import UserError
from pipeline.secrecy import find_secret

SECRET = "s3cr3t-0123"


def shards(first: str, *others: str) -> dict[str, object]:
    return {"data": {"shards": [first, *others] if others else first}}


def launch(**values: object) -> dict[str, object]:
    return {"launch": values}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (launch(container_command=["apptainer", "exec", "--env", f"WANDB_API_KEY={SECRET}"]), "WANDB_API_KEY"),
        (launch(container_command=["docker", "run", f"-eHF_TOKEN={SECRET}", f"-eA=1,B_PASSWD={SECRET}"]), "HF_TOKEN"),
        (launch(srun_arguments=[f"--export=ALL,WANDB_API_KEY={SECRET}"]), "WANDB_API_KEY"),
        (launch(sbatch_arguments=["--export", f"AWS_SECRET_ACCESS_KEY={SECRET}"]), "AWS_SECRET_ACCESS_KEY"),
        (launch(container_command=["pull", "--password", SECRET]), "--password"),
        (launch(container_command=["pull", f"--api-key={SECRET}"]), "--api-key"),
        (launch(stages={"clip": {"srun_arguments": [f"--export=X_TOKEN={SECRET}"]}}), "launch.stages.clip"),
        (launch(stages={"clip": {"environment": {"X_TOKEN": SECRET}}}), "X_TOKEN"),
        (shards(f"https://me:{SECRET}@host/{{00..09}}.tar"), "data.shards would write the login"),
        (shards(f"https://{SECRET}@host/0.tar"), "login"),
        (shards("/data/0.tar", f"sftp://me:{SECRET}@host/0.tar"), "login"),
        (shards(f"https://b.host/0.tar?X-Amz-Expires=9&X-Amz-Signature={SECRET}"), "X-Amz-Signature"),
        (shards(f"https://b.host/0.tar?X-Goog-Credential={SECRET}"), "X-Goog-Credential"),
        (shards(f"https://b.host/0.tar?sv=2024&sig={SECRET}"), "sig"),
        (shards("/data/0.tar", f"https://b.host/0.tar?token={SECRET}"), "token"),
        (shards(f"s3://me:{SECRET}@bucket/0.tar"), "login"),
        (shards(f"s3://me:ab/{SECRET}@bucket/0.tar"), "login"),
        (shards(f"s3://bucket/0.tar?X-Amz-Signature={SECRET}"), "X-Amz-Signature"),
        (shards(f"s3://bucket/0.tar?AWSAccessKeyId={SECRET}"), "AWSAccessKeyId"),
        (shards(f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host/0.tar"), "Authorization"),
        (shards(f'pipe:curl -H "X-Auth-Token: {SECRET}" https://host/0.tar'), "X-Auth-Token"),
        (shards(f"pipe:curl -u me:{SECRET} https://host/0.tar"), "-u"),
        (shards(f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp s3://b/0.tar -"), "AWS_SECRET_ACCESS_KEY"),
        ({"tracking": {"project": f"https://me:{SECRET}@host"}}, "tracking.project"),
    ],
)  # fmt: skip
def test_a_secret_is_found_and_named_but_not_repeated(config: dict[str, object], named: str):
    found = find_secret(config)
    assert found is not None
    assert named in found
    assert "give it by the environment" in found
    assert SECRET not in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "config",
    [
        launch(srun_arguments=["--export=ALL", "--mpi=pmix", "--nodelist=a,b"]),
        launch(container_command=["apptainer", "exec", "--nv", "--bind", "/keys/token:/token", "image.sif"]),
        launch(container_command=["docker", "run", "--user", "1000:1000", "--env", "TOKENIZERS_PARALLELISM=false"]),
        launch(container_command=["run", "--key-file=/home/me/key", "--env", "WANDB_API_KEY"]),
        launch(environment={"NCCL_DEBUG": "INFO", "HF_HOME": "/cache"}),
        shards("/data/{00..09}.tar"),
        shards("https://host/{00..09}.tar?version=3&part=a", "hf://datasets/a/b/0.tar", "gs://bucket/0.tar"),
        shards("s3://bucket/{00..09}.tar", "s3://bucket/0.tar?versionId=3HL4kqt", "s3://bucket/a@b/c:d/"),
        shards("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/a@b.tar"),
        shards("sftp://me@host/0.tar"),
        shards("pipe:curl -H \"Authorization: Bearer $TOKEN\" -u $WHO https://host/0.tar"),
        shards("pipe:curl https://host/0.tar?token=$TOKEN"),
        {"run": {"name": "key=1"}, "stage": {"clip": {"tokenizer": "a=b", "token_drop": 0.1}}},
    ],
)  # fmt: skip
def test_what_holds_no_secret_is_let_through(config: dict[str, object]):
    assert find_secret(config) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["launch=slurm", f"launch.container_command=[apptainer,exec,--env,'WANDB_API_KEY={SECRET}']"],
        ["launch=slurm", f"launch.srun_arguments=['--export=ALL,WANDB_API_KEY={SECRET}']"],
        ["data=webdataset", f"data.shards='https://me:{SECRET}@host/0.tar'"],
        ["data=webdataset", f"data.shards='https://host/0.tar?X-Amz-Signature={SECRET}'"],
    ],
)
def test_a_config_that_would_write_a_secret_down_is_refused_in_one_line(tmp_path: Path, arguments: list[str]):
    with pytest.raises(UserError) as refusal:
        compose_members("unclip run", [*arguments, f"paths.outputs={tmp_path}"])
    assert "would write" in str(refusal.value)
    assert SECRET not in str(refusal.value)
    assert "\n" not in str(refusal.value)
