#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, which have jaxlm[tpu] and mount one file system:
#   TPU_NAME=my-slice ZONE=us-central2-b bash launch/tpu_pod.sh /mnt/shared/run.yaml
# While a process is lost (exit code 75) the same command starts again, from the last checkpoint.
set -uo pipefail

config=${1:?give a configuration on a file system that all hosts share}
while true; do
  gcloud compute tpus tpu-vm ssh "${TPU_NAME:?}" --zone="${ZONE:?}" --worker=all --command="
    jaxlm finetune $config --distributed=auto --mesh=fsdp=-1 --compile-cache=${config%/*}/compiled
  "
  code=$?
  [ "$code" -eq 75 ] || exit "$code"
  sleep 10
done
