"""Make the bucket once, with versions and Object Lock, which most servers can only set when a bucket is made."""

from __future__ import annotations

import os
import sys

import boto3
from botocore.exceptions import ClientError


def main(bucket: str) -> None:
    """Make it unless it is there; a bucket without Object Lock is refused."""
    client = boto3.client("s3", endpoint_url=os.environ.get("SDP_S3__ENDPOINT_URL"), region_name="us-east-1")
    try:
        client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise
    lock = client.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"]
    if lock.get("ObjectLockEnabled") != "Enabled":
        sys.exit(f"{bucket} has no Object Lock: seals could be deleted")


if __name__ == "__main__":
    main(sys.argv[1])
