"""Meta-train in Amazon SageMaker, on one machine or several.

`pip install sagemaker`, then, with credentials for an account,

    python examples/sagemaker_launch.py --image IMAGE --bucket s3://BUCKET/learned-opt --preset digits

IMAGE is a container with PyTorch, such as one of the AWS Deep Learning Containers. The job runs `train_optimizer.py` of
this checkout as it is; its result (model.tar.gz) holds optimizer.safetensors. Spot machines may be taken away at any
moment: the job starts again from its last checkpoint, which lies under the bucket's path.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def arguments_of_the_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the SDK's ModelTrainer is given."""
    from sagemaker.core.shapes import StoppingCondition
    from sagemaker.core.training.configs import CheckpointConfig, Compute, InputData, SourceCode
    from sagemaker.train.distributed import Torchrun

    hyperparameters: dict[str, Any] = {"preset": arguments.preset}
    for setting in arguments.setting:
        name, _, value = setting.partition("=")
        hyperparameters[name] = value
    channels = dict(channel.split("=", 1) for channel in arguments.channel)
    return {
        "base_job_name": f"learned-opt-{arguments.preset}".replace("_", "-"),
        "training_image": arguments.image,
        "role": arguments.role or None,
        "source_code": SourceCode(
            source_dir=str(ROOT),
            entry_script="train_optimizer.py",
            requirements="examples/sagemaker_requirements.txt",
            ignore_patterns=[".git", ".venv", "__pycache__", "runs", ".mypy_cache", ".pytest_cache", ".ruff_cache"],
        ),
        "compute": Compute(
            instance_type=arguments.instance,
            instance_count=arguments.machines,
            enable_managed_spot_training=arguments.spot,
        ),
        "distributed": Torchrun(process_count_per_node=arguments.ranks),
        "hyperparameters": hyperparameters,
        "input_data_config": [InputData(channel_name=name, data_source=uri) for name, uri in channels.items()],
        "checkpoint_config": CheckpointConfig(s3_uri=f"{arguments.bucket.rstrip('/')}/checkpoints/{arguments.name}"),
        "stopping_condition": StoppingCondition(
            max_runtime_in_seconds=arguments.hours * 3600,
            **({"max_wait_time_in_seconds": 2 * arguments.hours * 3600} if arguments.spot else {}),
        ),
        "environment": {"WANDB_MODE": "offline"},
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--image", required=True, help="container image with PyTorch")
    made.add_argument("--bucket", required=True, help="s3://… under which checkpoints are kept")
    made.add_argument("--name", default="digits", help="names the checkpoints; the same name continues the same run")
    made.add_argument("--role", default="", help="IAM role of the job; the session's by default")
    made.add_argument("--preset", default="digits")
    made.add_argument(
        "--setting", action="append", default=[], metavar="NAME=VALUE", help="such as trainer.outer-steps=2000"
    )
    made.add_argument(
        "--channel",
        action="append",
        default=[],
        metavar="NAME=S3_URI",
        help="data; settings see it as $SM_CHANNEL_NAME",
    )
    made.add_argument("--instance", default="ml.c7i.4xlarge")
    made.add_argument("--machines", type=int, default=1)
    made.add_argument("--ranks", type=int, default=8, help="processes per machine: GPUs, or cores")
    made.add_argument("--hours", type=int, default=4)
    made.add_argument("--spot", action="store_true")
    return made


def main() -> None:
    """Start the job and follow its log."""
    from sagemaker.train import ModelTrainer

    ModelTrainer(**arguments_of_the_job(parser().parse_args())).train(wait=True, logs=True)


if __name__ == "__main__":
    main()
