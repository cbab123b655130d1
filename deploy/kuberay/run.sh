#!/bin/sh
# One run on a Ray cluster: shards up, training, shards down. Ends as the training has ended.
#
#     sh run.sh [OPTION of ray_train.py]…
#
# A run of this name that is up already belongs to somebody else: then the first command fails, and nothing is ended.
set -eu
name=digits
state=${STATE:-/state}
secrets=${SECRETS:-/etc/thresher}

thresher ray up "$name" --shards 2 --density 0.01 --state-dir "$state/$name" \
    --tls-cert "$secrets/tls/shard.pem" --tls-key "$secrets/tls/shard.key" --tokens "$secrets/shard/tokens" \
    --worker-tls-ca "$secrets/worker/ca.pem" --worker-token-file "$secrets/worker/token"
trap 'thresher ray down "$name"' EXIT

thresher ray targets "$name" --listen 0.0.0.0:8099 & # for Prometheus: see podmonitor.yaml
targets=$!
trap 'kill "$targets" || :; thresher ray down "$name"' EXIT

python "$(dirname "$0")/ray_train.py" "$name" "$@"
